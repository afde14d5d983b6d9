"""Second derivatives and beyond: every pair of arguments, every output, every way to compose."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

Q, P, F, K = 5, 7, 3, 4
#: (Q, P, F, K, batch)
SIZES = [(70, 300, 64, 33, (2,)), (5, 1, 1, 1, ()), (1, 64, 33, 16, (3,)), (300, 40, 2, 5, ()), (9, 400, 130, 256, ())]


@pytest.fixture
def problem(rng):
    return functools.partial(helpers.problem, rng, Q=Q, P=P, F=F, K=K)


@pytest.mark.parametrize("output", helpers.OUTPUTS)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_every_pair(metric, output, implementation, problem):
    """For one output, tangents along one argument: gradients in every argument, and in the cotangent."""
    x, idxs, ct, v = problem(metric, batch=(2,))
    op = helpers.outputs(metric, K, implementation)
    names = helpers.ARGUMENTS[metric]

    def every(x, ct, v):
        return {n: helpers.second(metric, op, x, {output: ct[output]}, {n: v[n]}) for n in names}

    for along, got in helpers.quick_jit(every)(x, ct, v).items():
        want = helpers.oracle_second(metric, x, idxs, {output: ct[output]}, {along: v[along]})
        assert set(got) == {*names, output}
        for name in got:
            helpers.assert_close(got[name], want[name], 1e-9, f"∂/∂{name} of ∂{output}/∂{along}")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_all_at_once_and_one_at_a_time(metric, implementation, problem):
    x, idxs, ct, v = problem(metric)
    op = helpers.outputs(metric, K, implementation)
    names = helpers.ARGUMENTS[metric]
    cases = [(names, helpers.OUTPUTS), *(((n,), ()) for n in names), *(((), (o,)) for o in helpers.OUTPUTS)]
    want = helpers.oracle_second(metric, x, idxs, ct, v)
    got = helpers.quick_jit(lambda x, ct, v: [helpers.second(metric, op, x, ct, v, *case) for case in cases])(x, ct, v)
    for (wrt, wrt_ct), bars in zip(cases, got, strict=True):
        assert set(bars) == {*wrt, *wrt_ct}
        for name in bars:
            helpers.assert_close(bars[name], want[name], 1e-9, f"{name} among {wrt}, {wrt_ct}")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_moving_cotangents(metric, implementation, problem, rng):
    """Forward over reverse along arguments and cotangents, all and one at a time, for all gradients and one."""
    x, idxs, ct, v = problem(metric, F=5)
    v_ct, _ = helpers.tree(helpers.cotangents(rng, metric, x, K))
    op = helpers.outputs(metric, K, implementation)
    names, outputs = helpers.ARGUMENTS[metric], helpers.OUTPUTS
    cases = [(outputs, names, outputs, names), (outputs, names, (), names)]
    cases += [(outputs, names, (o,), names) for o in outputs]
    cases += [((o,), (n,), (o,), names) for o in outputs for n in names]
    cases += [(outputs, names, outputs, (n,)) for n in names]

    def some(arrays, chosen):
        return {n: arrays[n] for n in chosen}

    def every(x, ct, v, v_ct):
        return [
            helpers.moving(metric, op, x, some(ct, outs), some(v, along), some(v_ct, along_ct), wrt)
            for outs, along, along_ct, wrt in cases
        ]

    for case, got in zip(cases, helpers.quick_jit(every)(x, ct, v, v_ct), strict=True):
        outs, along, along_ct, wrt = case
        want = helpers.oracle_moving(metric, x, idxs, some(ct, outs), some(v, along), some(v_ct, along_ct))
        assert set(got) == set(wrt)
        for name, bar in got.items():
            helpers.assert_close(bar, want[name], 1e-9, f"{name} of {case}")


@pytest.mark.thorough_if(implementation="xla")
def test_eager(implementation, problem):
    x, idxs, ct, v = problem("aniso")
    got = helpers.second("aniso", helpers.outputs("aniso", K, implementation), x, ct, v)
    want = helpers.oracle_second("aniso", x, idxs, ct, v)
    for name in got:
        helpers.assert_close(got[name], want[name], 1e-9, name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(size=SIZES[2:4])
@pytest.mark.thorough_if(metric="iso", size=SIZES[1:])
def test_sizes(metric, size, implementation, problem):
    Q, P, F, K, batch = size
    x, idxs, ct, v = problem(metric, batch=batch, Q=Q, P=P, F=F, K=K)
    op = helpers.outputs(metric, K, implementation)
    got, moved = helpers.quick_jit(
        lambda x, ct, v: (
            helpers.second(metric, op, x, ct, v),
            helpers.moving(metric, op, x, ct, v, helpers.turned(ct)),
        )
    )(x, ct, v)
    want = helpers.oracle_second(metric, x, idxs, ct, v)
    for name in got:
        helpers.assert_close(got[name], want[name], 1e-9, name)
    want = helpers.oracle_moving(metric, x, idxs, ct, v, helpers.turned(ct))
    for name in moved:
        helpers.assert_close(moved[name], want[name], 1e-9, f"forward over reverse, {name}")


def losses(metric, idxs, K, implementation):
    return helpers.eikonal(helpers.outputs(metric, K, implementation)), helpers.eikonal(helpers.formula(metric, idxs))


@pytest.mark.parametrize("frozen", [(), ("f",), ("q", "p", "sigma", "R")], ids=["all", "f", "f alone"])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla", frozen=[("f",), ("q", "p", "sigma", "R")])
@pytest.mark.thorough_if(metric="iso", frozen=[("f",), ("q", "p", "sigma", "R")])
@pytest.mark.thorough_if(implementation="xla", metric="iso")
def test_eikonal(metric, frozen, implementation, problem):
    x, idxs, _, _ = problem(metric, batch=(2,))
    ours, plain = losses(metric, idxs, K, implementation)
    wrt = tuple(i for i, n in enumerate(helpers.ARGUMENTS[metric]) if n not in frozen)
    got = helpers.quick_jit(jax.value_and_grad(ours, wrt))(*x)
    helpers.assert_trees_close(got, helpers.oracle_jit(jax.value_and_grad(plain, wrt))(*x), 1e-9)


@pytest.mark.thorough_if(implementation="xla")
def test_eikonal_of_a_head_on_frozen_inputs(implementation, problem):
    """Only what follows the op is trained: second order runs through the cotangent alone."""
    x, idxs, _, _ = problem("aniso")
    head = jnp.linspace(-1.0, 1.0, F)

    def loss(op):
        def fn(head):
            g = jax.grad(lambda q: jnp.sum(jnp.tanh(op(q, *x[1:])[0]) @ head))(x[0])
            return jnp.sum((jnp.sum(g * g, -1) - 1) ** 2)

        return fn

    got = helpers.quick_jit(jax.grad(loss(helpers.outputs("aniso", K, implementation))))(head)
    plain = helpers.quick_jit(jax.grad(loss(helpers.formula("aniso", idxs))))(head)
    helpers.assert_close(got, plain, 1e-9)


def compositions(metric):
    """Name -> what it makes of a scalar loss of x. All are d²loss, in one form or another."""
    every = tuple(range(len(helpers.ARGUMENTS[metric])))

    def ones(x):
        return tuple(jnp.cos(a) for a in x)

    def square(loss):  # |∇loss|²
        return lambda *x: sum(jnp.sum(g * g) for g in jax.grad(loss, every)(*x))

    return {
        "reverse over reverse": lambda loss: jax.grad(square(loss), every),
        "forward over reverse": lambda loss: lambda *x: jax.jvp(jax.grad(loss, every), x, ones(x))[1],
        "reverse over forward": lambda loss: jax.grad(lambda *x: jax.jvp(loss, x, ones(x))[1], every),
        "forward over forward": lambda loss: lambda *x: jax.jvp(lambda *x: jax.jvp(loss, x, ones(x))[1], x, x)[1],
        "linearize of grad": lambda loss: lambda *x: jax.linearize(jax.grad(loss, every), *x)[1](*ones(x)),
        "jacrev of jacfwd": lambda loss: jax.jacrev(jax.jacfwd(loss, 3), 0),
        "jacfwd of jacfwd": lambda loss: jax.jacfwd(jax.jacfwd(loss, 0), 3),
    }


@pytest.mark.parametrize("name", compositions("aniso"))
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(name=["linearize of grad", "jacrev of jacfwd", "jacfwd of jacfwd"])
def test_compositions(name, implementation, problem):
    x, idxs, _, _ = problem("aniso", Q=3, P=5, F=2, K=3)
    transform = compositions("aniso")[name]

    def ours(implementation):
        op = helpers.outputs("aniso", 3, implementation)
        return helpers.quick_jit(transform(lambda *x: helpers.total(op(*x))))

    if implementation == "ffi" and name in ("forward over forward", "jacfwd of jacfwd"):
        with pytest.raises(NotImplementedError, match="aniso_jvp_jvp: implementation='ffi'"):
            ours("ffi")(*x)
        implementation = None
    got = ours(implementation)(*x)
    want = helpers.oracle_jit(transform(lambda *x: helpers.total(helpers.formula("aniso", idxs)(*x))))(*x)
    helpers.assert_trees_close(got, want, 1e-9, name)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_hessian(metric, implementation, problem):
    """Forward over reverse and reverse over reverse give one matrix, and that is symmetric."""
    x, idxs, _, _ = problem(metric, Q=2, P=4, F=2, K=3)
    names = helpers.ARGUMENTS[metric]
    every = range(len(names))
    op = helpers.outputs(metric, 3, implementation)
    want = helpers.oracle_jit(jax.hessian(lambda *x: helpers.total(helpers.formula(metric, idxs)(*x)), every))(*x)
    for hessian in (jax.hessian, lambda f, n: jax.jacrev(jax.grad(f, n), n)):
        got = jax.tree.map(np.asarray, helpers.quick_jit(hessian(lambda *x: helpers.total(op(*x)), every))(*x))
        helpers.assert_trees_close(got, want, 1e-9)
        for i, j in itertools.combinations(every, 2):
            one = np.reshape(got[i][j], (x[i].size, x[j].size))
            other = np.reshape(got[j][i], (x[j].size, x[i].size))
            helpers.assert_close(one, other.T, 1e-9, f"{names[i]}, {names[j]}")


THIRD = {
    "gradient of the gradient of an Eikonal loss": lambda loss, every: jax.grad(
        lambda *x: sum(jnp.sum(g * g) for g in jax.grad(loss, every)(*x)), every
    ),
    "forward over an Eikonal gradient": lambda loss, every: (
        lambda *x: jax.jvp(jax.grad(loss, every), x, tuple(jnp.cos(a) for a in x))[1]
    ),
    "reverse over an Eikonal loss moved forward": lambda loss, every: jax.grad(
        lambda *x: jax.jvp(loss, x, tuple(jnp.cos(a) for a in x))[1], every
    ),
}


@pytest.mark.parametrize("metric, name", list(zip(("aniso", "aniso", "iso"), THIRD, strict=True)))
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="aniso")
def test_third_order(metric, name, implementation, problem):
    x, idxs, _, _ = problem(metric, Q=3, P=5, F=2, K=3)
    every = range(len(x))
    if implementation == "ffi":
        with pytest.raises(NotImplementedError, match="no kernels for derivatives beyond the second order"):
            jax.eval_shape(THIRD[name](losses(metric, idxs, 3, "ffi")[0], every), *x)
        implementation = None
    ours, plain = losses(metric, idxs, 3, implementation)
    got = helpers.quick_jit(THIRD[name](ours, every))(*x)
    want = helpers.oracle_jit(THIRD[name](plain, every))(*x)
    helpers.assert_trees_close(got, want, 1e-8, name)
