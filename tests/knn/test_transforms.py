"""The op inside jax.checkpoint, scan, cond, while and custom derivatives, forward and reverse."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jax_knn_aggregate as jka

Q, P, F, K = 4, 8, 2, 3


@pytest.fixture
def x(rng):
    return helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))


@pytest.mark.thorough_if(implementation="xla")
def test_checkpoint(x, implementation):
    op = helpers.outputs("aniso", K, implementation)

    def twice(op):
        return lambda x: helpers.eikonal(op)(*x)

    def every(x):
        return {
            "around an Eikonal loss": jax.grad(jax.checkpoint(twice(op)))(x),
            "inside an Eikonal loss": jax.grad(twice(jax.checkpoint(op)))(x),
        }

    want = helpers.quick_jit(jax.grad(twice(op)))(x)
    for name, got in helpers.quick_jit(every)(x).items():
        helpers.assert_trees_close(got, want, 1e-10, name)


@pytest.mark.thorough_if(implementation="xla")
def test_checkpoint_with_saved_indices(x, implementation):
    """The recipe that keeps jax.checkpoint from searching again."""

    def loss(x, save):
        idxs = jka.knn_search_aniso(x[0], x[1], x[3], x[4], K, implementation=implementation).idxs
        idxs = checkpoint_name(idxs, "knn_idxs") if save else idxs
        return helpers.total(jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation))

    policy = jax.checkpoint_policies.save_only_these_names("knn_idxs")
    saved = jax.grad(jax.checkpoint(lambda x: loss(x, True), policy=policy))
    repeated = jax.grad(jax.checkpoint(lambda x: loss(x, False)))
    assert helpers.primitives(saved, x)["aniso_search"] == 1
    assert helpers.primitives(repeated, x)["aniso_search"] == 2
    want = helpers.quick_jit(jax.grad(lambda x: loss(x, False)))(x)
    helpers.assert_trees_close(helpers.quick_jit(saved)(x), want, 1e-12)


def walk(x, implementation):
    """Moves the queries by what the op says; one step."""
    out = jka.knn_aggregate_aniso(*x, K, implementation=implementation)
    step = jnp.tanh(out.f_out).sum(-1, keepdims=True) + out.w_out.sum(-1, keepdims=True)
    return (x[0] + 0.01 * step * jnp.cos(x[0]), *x[1:]), out


@pytest.mark.thorough_if(implementation="xla")
def test_scan(x, implementation):
    def scanned(x):
        (q, *_), outs = jax.lax.scan(lambda x, _: walk(x, implementation), x, None, length=2)
        return helpers.total(outs) + jnp.sum(q * q), outs.idxs

    def unrolled(x):
        outs = []
        for _ in range(2):
            x, out = walk(x, implementation)
            outs.append(out)
        outs = jax.tree.map(lambda *a: jnp.stack(a), *outs)
        return helpers.total(outs) + jnp.sum(x[0] * x[0]), outs.idxs

    got, want = (helpers.quick_jit(jax.value_and_grad(f, has_aux=True))(x) for f in (scanned, unrolled))
    np.testing.assert_array_equal(got[0][1], want[0][1])
    helpers.assert_trees_close(got, want, 1e-10)

    def second(f):  # forward over reverse, through the loop
        return lambda x: jax.jvp(jax.grad(lambda x: f(x)[0]), (x,), (jax.tree.map(jnp.cos, x),))[1]

    got, want = (helpers.quick_jit(second(f))(x) for f in (scanned, unrolled))
    helpers.assert_trees_close(got, want, 1e-9, "second order")


@pytest.mark.thorough_if(implementation="xla")
def test_cond(x, implementation):
    def branch(K):
        def fn(x):
            out = jka.knn_aggregate_aniso(*x, K, implementation=implementation)
            return jnp.sum(jnp.sin(out.f_out)) + jnp.sum(out.w_out) + jnp.sum(jnp.tanh(out.dists))

        return fn

    def loss(x, flag):
        return jax.lax.cond(flag, branch(K), branch(1), x)

    for flag, k in ((True, K), (False, 1)):
        got = helpers.quick_jit(jax.value_and_grad(loss))(x, flag)
        helpers.assert_trees_close(got, helpers.quick_jit(jax.value_and_grad(branch(k)))(x), 1e-12)
    ones = jax.tree.map(jnp.cos, x)
    got = helpers.quick_jit(lambda x, f: jax.jvp(jax.grad(loss), (x, f), (ones, np.zeros((), jax.dtypes.float0)))[1])
    want = helpers.quick_jit(lambda x: jax.jvp(jax.grad(branch(K)), (x,), (ones,))[1])(x)
    helpers.assert_trees_close(got(x, True), want, 1e-9, "second order")


@pytest.mark.thorough_if(implementation="xla")
def test_while_forward(x, implementation):
    def looped(x):
        def go_on(state):
            return state[0] < 3

        def body(state):
            i, x, total = state
            x, out = walk(x, implementation)
            return i + 1, x, total + helpers.total(out)

        return jax.lax.while_loop(go_on, body, (0, x, jnp.zeros(())))[2]

    def unrolled(x):
        total = jnp.zeros(())
        for _ in range(3):
            x, out = walk(x, implementation)
            total = total + helpers.total(out)
        return total

    v = jax.tree.map(jnp.cos, x)
    got, want = (helpers.quick_jit(lambda x, f=f: jax.jvp(f, (x,), (v,)))(x) for f in (looped, unrolled))
    helpers.assert_trees_close(got, want, 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_transpose_of_a_linearized_op(x, implementation):
    op = helpers.outputs("aniso", K, implementation)
    _, linear = jax.linearize(op, *x)
    ct = tuple(jnp.cos(a) for a in op(*x))
    got = jax.linear_transpose(linear, *x)(ct)
    helpers.assert_trees_close(got, jax.vjp(op, *x)[1](ct), 1e-12)


@pytest.mark.thorough_if(implementation="xla")
def test_inside_custom_derivatives(x, implementation):
    """A custom_vjp whose backward pass differentiates the op, as a user's own layer would."""
    op = helpers.outputs("aniso", K, implementation)

    @jax.custom_vjp
    def layer(x):
        return helpers.total(op(*x))

    layer.defvjp(
        lambda x: (layer(x), x),
        lambda x, ct: (jax.tree.map(lambda g: ct * g, jax.grad(lambda x: helpers.total(op(*x)))(x)),),
    )
    got = helpers.quick_jit(jax.grad(lambda x: jnp.sin(layer(x))))(x)
    want = helpers.quick_jit(jax.grad(lambda x: jnp.sin(helpers.total(op(*x)))))(x)
    helpers.assert_trees_close(got, want, 1e-10)


def test_in_place_of_a_named_tuple(x):
    """Results are pytrees with names, and K may be marked static."""
    op = jax.jit(jka.knn_aggregate_aniso, static_argnames=("K", "implementation"))
    out = op(*x, K=K)
    assert isinstance(out, jka.KnnAggregate)
    doubled = jax.tree.map(lambda a: 2 * a, out)
    assert isinstance(doubled, jka.KnnAggregate)
    np.testing.assert_array_equal(doubled.idxs, 2 * np.asarray(out.idxs))
    assert isinstance(jka.knn_search(x[0], x[1], K), jka.KnnSearch)
