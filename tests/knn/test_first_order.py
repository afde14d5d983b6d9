"""First derivatives: every output in every argument, reverse and forward, alone and together."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka
from jax_knn_aggregate.core import ffi

Q, P, F, K = 6, 9, 3, 4
#: (Q, P, F, K, batch)
SIZES = [(70, 300, 64, 33, (2,)), (5, 1, 1, 1, ()), (1, 64, 33, 16, (3,)), (300, 40, 2, 5, ())]


@pytest.fixture
def problem(rng):
    return functools.partial(helpers.problem, rng, Q=Q, P=P, F=F, K=K)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_reverse(metric, implementation, problem):
    """Each output, each argument, some and all: what is not asked for is not computed, and changes nothing."""
    x, idxs, ct, _ = problem(metric, batch=(2,))
    op = helpers.outputs(metric, K, implementation)
    names = helpers.ARGUMENTS[metric]
    cases = [((n,), names) for n in helpers.OUTPUTS]
    cases += [(helpers.OUTPUTS, wrt) for wrt in (names, ("q",), ("p",), ("f",), ("q", "sigma"), names[1:])]
    cases += [(("f_out", "dists"), ("sigma",)), (("w_out",), ("q",)), (("f_out",), ("f",)), (("f_out",), names[3:])]

    def every(x, ct):
        return [helpers.first(metric, op, x, {n: ct[n] for n in outs}, wrt) for outs, wrt in cases]

    for (outs, wrt), got in zip(cases, helpers.quick_jit(every)(x, ct), strict=True):
        want = helpers.oracle_first(metric, x, idxs, {n: ct[n] for n in outs})
        assert set(got) == set(wrt)
        for name in wrt:
            helpers.assert_close(got[name], want[name], 1e-10, f"{name} among {wrt} from {outs}")


@pytest.mark.thorough_if(implementation="xla")
def test_reverse_eager(implementation, problem):
    x, idxs, ct, _ = problem("aniso")
    got = helpers.first("aniso", helpers.outputs("aniso", K, implementation), x, ct)
    want = helpers.oracle_first("aniso", x, idxs, ct)
    for name in got:
        helpers.assert_close(got[name], want[name], 1e-10, name)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(size=SIZES[1:])
def test_sizes(metric, size, implementation, problem):
    Q, P, F, K, batch = size
    x, idxs, ct, _ = problem(metric, batch=batch, Q=Q, P=P, F=F, K=K)
    op = helpers.outputs(metric, K, implementation)
    got = helpers.quick_jit(lambda x, ct: helpers.first(metric, op, x, ct))(x, ct)
    want = helpers.oracle_first(metric, x, idxs, ct)
    for name in helpers.ARGUMENTS[metric]:
        helpers.assert_close(got[name], want[name], 1e-10, name)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_forward(metric, implementation, problem):
    x, idxs, _, v = problem(metric)
    op = helpers.outputs(metric, K, implementation)
    names = helpers.ARGUMENTS[metric]
    cases = (names, *((n,) for n in names))

    def along(moving, x, v):
        def some(*z):
            given = dict(zip(moving, z, strict=True))
            return op(*(given.get(n, a) for n, a in zip(names, x, strict=True)))

        return jax.jvp(some, tuple(x[names.index(n)] for n in moving), tuple(v[n] for n in moving))

    def every(x, v):
        linear = jax.linearize(op, *x)[1]
        return [*(along(moving, x, v) for moving in cases), linear(*(v[n] for n in names))]

    plain = helpers.oracle_jit(lambda x, t: jax.jvp(helpers.formula(metric, idxs), x, t)[1])
    want = {m: plain(x, tuple(v[n] if n in m else jnp.zeros_like(v[n]) for n in names)) for m in cases}
    *got, linearized = helpers.quick_jit(every)(x, v)
    for moving, (values, tangents) in zip(cases, got, strict=True):
        helpers.assert_trees_close(values, helpers.oracle_values(metric, helpers.wide(x), idxs), 1e-12, "values")
        helpers.assert_trees_close(tangents, want[moving], 1e-10, f"along {moving}")
    helpers.assert_trees_close(linearized, want[names], 1e-10, "linearize")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_jacobians(metric, implementation, problem):
    x, idxs, _, _ = problem(metric, Q=2, P=5, F=2, K=3)
    op = helpers.outputs(metric, 3, implementation)
    every = tuple(range(len(x)))
    want = helpers.oracle_jit(jax.jacrev(helpers.formula(metric, idxs), every))(*x)
    helpers.assert_trees_close(helpers.quick_jit(jax.jacrev(op, every))(*x), want, 1e-10, "jacrev")
    helpers.assert_trees_close(helpers.quick_jit(jax.jacfwd(op, every))(*x), want, 1e-10, "jacfwd")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_lookup_and_precomputed(metric, implementation, problem, rng):
    """Given neighbours: a point named twice in a row counts twice, an empty slot not at all."""
    x, _, ct, v = problem(metric, batch=(2,))
    table = rng.integers(0, P, (P, K + 1))
    table[:, 1] = table[:, 0]
    table[3] = -1
    rows = table[helpers.oracle_search("iso", x, 1)[..., 0], :K]
    want = helpers.oracle_first(metric, x, rows, ct)
    want_second = helpers.oracle_second(metric, x, rows, ct, v)
    ops = {"precomputed": lambda *x: helpers.precomputed(metric, x, rows, implementation=implementation)[:3]}
    if metric == "aniso":
        ops["lookup"] = lambda *x: jka.knn_aggregate_aniso_lookup(*x, table, K, implementation=implementation)[:3]
    for what, op in ops.items():
        got, second = helpers.quick_jit(
            lambda x, ct, v, op=op: (helpers.first(metric, op, x, ct), helpers.second(metric, op, x, ct, v))
        )(x, ct, v)
        for name in got:
            helpers.assert_close(got[name], want[name], 1e-10, f"{what}, {name}")
        for name in second:
            helpers.assert_close(second[name], want_second[name], 1e-9, f"{what}, second order, {name}")


@pytest.mark.thorough_if(implementation="xla")
def test_indices_have_no_tangent(implementation, problem):
    x, idxs, _, v = problem("aniso")
    ones = tuple(v[n] for n in helpers.ARGUMENTS["aniso"])
    for op in (
        lambda *x: jka.knn_aggregate_aniso(*x, K, implementation=implementation),
        lambda *x: jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation),
        lambda q, p, f, sigma, R: jka.knn_search_aniso(q, p, sigma, R, K, implementation=implementation),
    ):
        y, dy = jax.jvp(op, x, ones)
        assert dy.idxs.dtype == jax.dtypes.float0
        assert dy.idxs.shape == y.idxs.shape
        assert np.isfinite(dy.dists).all()
    table = jax.jvp(lambda p: jka.build_knn_table(p, 3, implementation=implementation), (x[1],), (x[1],))[1]
    assert table.dtype == jax.dtypes.float0


# The reference on a GPU sums with XLA's scatter, in no fixed order; kernels do not.
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.parametrize(
    "platform, path",
    [("cpu", "xla")] + [(p, "ffi") for p in dict.fromkeys(("cpu", helpers.PLATFORM)) if ffi.TARGETS.get(p)],
)
@pytest.mark.thorough_if(path="xla")
def test_gradients_repeat_bitwise(metric, platform, path, rng):
    """The same bits from call to call and from compilation to compilation, with many queries on each point."""
    x = helpers.cloud(rng, metric, 3000, 40, 8, dtype=np.float32)
    ct, v = helpers.cotangents(rng, metric, x, 8)
    op = helpers.outputs(metric, 8, path)
    x, ct, v = jax.device_put((x, ct, v), jax.devices(platform)[0])

    def fresh():
        return helpers.user_jit(
            lambda x, ct, v: (helpers.first(metric, op, x, ct), helpers.second(metric, op, x, ct, v))
        )

    one, other = fresh(), fresh()
    want = one(x, ct, v)
    for again in (one, one, other):
        for (name, a), b in zip(
            jax.tree_util.tree_leaves_with_path(again(x, ct, v)), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_array_equal(
                np.asarray(a).view(np.int32), np.asarray(b).view(np.int32), err_msg=jax.tree_util.keystr(name)
            )
