"""The perceptron under JAX's transformations, and split over devices."""

import functools

import helpers
import jax
import jax.numpy as jnp
import mlp_oracle
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as S
from test_mlp import problem

from jax_knn_aggregate import Softplus, mlp

FUNCTIONS = mlp_oracle.softplus(3.0), mlp_oracle.ACTIVATIONS["none"]


def step(x, parameters, implementation=None):
    """Of an Eikonal loss: every role of the family, and the sum of a first and a second order."""

    def field(x):
        return mlp(x, *parameters, activation=Softplus(3.0), implementation=implementation)

    slope = jax.grad(lambda x: field(x).sum())(x)
    return jnp.square(jnp.square(slope).sum(-1) - 1).sum() + jnp.square(field(x)).sum()


def step_in_numpy(x, parameters):
    """The gradients of ``step`` in x and parameters."""
    x, parameters = helpers.wide((x, tuple(parameters)))
    o = mlp_oracle.Oracle(x, *parameters, *FUNCTIONS)
    ones = np.ones_like(o.y)
    slope = o.first(ones)[0]
    v = 4 * (np.square(slope).sum(-1, keepdims=True) - 1) * slope
    in_x, in_w, in_b, _ = o.second(ones, (v, *jax.tree.map(np.zeros_like, parameters)))
    in_z = jax.tree.map(np.add, (in_x, in_w, in_b), o.first(2 * o.y))
    return in_z[0], in_z[1:]


# ---- vmap


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, -1)], ids=str)
@pytest.mark.thorough_if(implementation="xla")
def test_vmap(mapped, implementation, rng):
    """Over x, over weights and biases (many small networks), both; of the gradient of a gradient."""
    problems = [problem(rng)[0] for _ in range(3)]
    columns = [(z[0] for z in problems), (z[1:] for z in problems)]
    columns = [[next(c)] * 3 if axis is None else list(c) for c, axis in zip(columns, mapped, strict=True)]

    def placed(column, axis):
        return column[0] if axis is None else jax.tree.map(lambda *a: jnp.stack(a, axis), *column)

    args = map(placed, columns, mapped)
    fn = jax.grad(functools.partial(step, implementation=implementation), (0, 1))
    got = helpers.quick_jit(jax.vmap(fn, mapped))(*args)
    want = jax.tree.map(lambda *a: np.stack(a), *map(step_in_numpy, *columns))
    helpers.assert_trees_close(got, want, 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_what_is_shared_gets_the_sum(implementation, rng):
    """Of gradients of first and second order, along each axis that it does not have; it is not copied on the way.

    The outer vmap maps one weight and one bias, the inner one x alone.
    """
    (x, W, b), *_ = problem(rng)
    xs = rng.normal(size=(2, 3, *x.shape))
    first, bias = rng.normal(size=(2, *W[0].shape)), rng.normal(size=(2, *b[2].shape))

    def total(first, bias, W, b):
        def outer(x, first, bias):
            parameters = (first, *W[1:]), (*b[:2], bias)
            return jax.vmap(lambda x: step(x, parameters, implementation))(x).sum()

        return jax.vmap(outer)(xs, first, bias).sum()

    args = first, bias, W, b
    got = helpers.quick_jit(jax.grad(total, (0, 1, 2, 3)))(*args)
    single = [[step_in_numpy(a, ((first[i], *W[1:]), (*b[:2], bias[i])))[1] for a in xs[i]] for i in range(2)]
    by_entry = [jax.tree.map(lambda *a: sum(a), *row) for row in single]
    in_w, in_b = jax.tree.map(lambda *a: sum(a), *by_entry)
    want = (
        np.stack([e[0][0] for e in by_entry]),
        np.stack([e[1][2] for e in by_entry]),
        (np.zeros(W[0].shape), *in_w[1:]),
        (*in_b[:2], np.zeros(b[2].shape)),
    )
    helpers.assert_trees_close(got, want, 1e-10)
    shapes = [e.outvars[0].aval.shape for e in helpers.equations(jax.make_jaxpr(jax.grad(total, (0, 1, 2, 3)))(*args))]
    assert not [s for s in shapes if s[-2:] == W[1].shape and max(s[:-2], default=1) > 1]


@pytest.mark.thorough_if(implementation="xla")
def test_row_by_row(implementation, rng):
    """Functions of one row under vmap, whose entries kernels put together; gradients of each row as well."""
    (x, W, b), *_ = problem(rng, N=70)

    def one(row, parameters):
        return step(row[None], parameters, implementation)

    slope = jax.vmap(jax.grad(one, (0, 1)), (0, None))
    total = jax.grad(lambda *z: jax.vmap(one, (0, None))(*z).sum(), (0, 1))
    got = helpers.quick_jit(lambda *z: (slope(*z), total(*z)))(x, (W, b))
    by_row = jax.tree.map(lambda *a: np.stack(a), *(step_in_numpy(row[None], (W, b)) for row in x))
    helpers.assert_trees_close(got[0], (by_row[0][:, 0], by_row[1]), 1e-10)
    helpers.assert_trees_close(got[1], step_in_numpy(x, (W, b)), 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_hessians(implementation, rng):
    """Of each row, by vmap over directions, against the oracle's second derivatives along units."""
    (x, W, b), *_ = problem(rng, widths=(3, 9, 1), N=4)

    def one(row):
        return mlp(row[None], W, b, activation=Softplus(3.0), implementation=implementation)[0, 0]

    o = mlp_oracle.Oracle(*helpers.wide((x, W, b)), *FUNCTIONS)
    still = jax.tree.map(np.zeros_like, helpers.wide((W, b)))
    units = [(np.broadcast_to(np.eye(3)[d], (4, 3)), *still) for d in range(3)]
    want = np.stack([o.second(np.ones((4, 1)), unit)[0] for unit in units], -1)
    for hessian in (jax.jacfwd(jax.grad(one)), jax.jacrev(jax.grad(one))):
        helpers.assert_close(helpers.quick_jit(jax.vmap(hessian))(x), want, 1e-10)


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=str)
def test_empty(sizes, implementation, rng):
    """No entries, and no rows: sums are 0."""
    (x, W, b), *_ = problem(rng, N=sizes[1])
    xs = jnp.zeros((sizes[0], *x.shape))
    fn = functools.partial(step, implementation=implementation)
    got = helpers.quick_jit(jax.grad(lambda *z: jax.vmap(fn, (0, None))(*z).sum(), (0, 1)))(xs, (W, b))
    helpers.assert_trees_close(got, jax.tree.map(np.zeros_like, (xs, (W, b))), 0)


# ---- Roles, bits, loops, export


def test_kernels_of_an_eikonal_step(rng):
    """Value and vjp, and on the way back vjp again and the derivative of vjp; nothing of forward mode is left."""
    z, *_ = problem(rng)
    names = {e.primitive.name for e in helpers.equations(jax.make_jaxpr(jax.grad(step, 1))(z[0], z[1:]))}
    assert {n for n in names if n.startswith("mlp")} == {"mlp_value", "mlp_vjp", "mlp_vjp_vjp"}


def test_the_same_bits(kernels, rng):
    """Twice, although threads take turns as they like."""
    z, *_ = problem(rng, widths=(3, 33, 1), N=5000, dtype=np.float32)
    fn = helpers.user_jit(jax.grad(functools.partial(step, implementation="ffi"), (0, 1)))
    some = [jax.tree.map(np.asarray, fn(z[0], z[1:])) for _ in range(3)]
    for other in some[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, some[0])


def test_activations_are_static(rng):
    (x, W, b), *_ = problem(rng)
    traced = []

    @functools.partial(jax.jit, static_argnames="activation")
    def fn(x, W, b, activation):
        traced.append(activation)
        return mlp(x, W, b, activation=activation)

    got = [fn(x, W, b, activation=a) for a in (Softplus(2), Softplus(np.float32(2)), Softplus(3.0))]
    assert len(traced) == 2
    np.testing.assert_array_equal(got[0], got[1])
    assert not np.array_equal(got[0], got[2])


@pytest.mark.thorough_if(implementation="xla")
def test_checkpoint_and_scan(implementation, rng):
    (x, W, b), *_ = problem(rng)
    fn = functools.partial(mlp, activation="silu", implementation=implementation)
    loss = jax.checkpoint(lambda W: jnp.square(fn(x, W, b)).mean())

    def descend(W, _):
        value, g = jax.value_and_grad(loss)(W)
        return jax.tree.map(lambda a, g: a - 0.05 * g, W, g), value

    values = helpers.quick_jit(lambda W: jax.lax.scan(descend, W, None, 20)[1])(W)
    assert (jnp.diff(values) < 0).all()


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")], ids=["this platform", "cpu and cuda"])
@pytest.mark.thorough_if(platforms=[("cpu", "cuda")])
def test_export_for_any_number_of_rows(platforms, rng):
    (x, *parameters), *_ = problem(rng, N=33)
    parameters = tuple(parameters)
    (N,) = jax.export.symbolic_shape("N")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, parameters))
    shapes = jax.ShapeDtypeStruct((N, 3), np.float64), shapes[1]
    read = helpers.through_bytes(jax.grad(step, (0, 1)), shapes, platforms)
    for n in (1, 33):
        helpers.assert_trees_close(read.call(x[:n], parameters), step_in_numpy(x[:n], parameters), 1e-10)


# ---- Devices


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_rows_split_over_devices(cpu_implementation, mesh, rng):
    """Nothing moves forward or for gradients in x; those in parameters are all-reduced."""
    (x, *parameters), *_ = problem(rng, N=16)
    parameters = tuple(parameters)

    def fn(x, parameters):
        return mlp(x, *parameters, activation=Softplus(3.0), implementation=cpu_implementation)

    for spec in (S("a"), S(("a", "b"))):
        whole = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, S())), parameters)
        placed = jax.device_put(x, NamedSharding(mesh, spec)), whole
        forward = helpers.quick_jit(fn)
        assert not helpers.collectives(forward, *placed)
        y = forward(*placed)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        helpers.assert_close(y, mlp_oracle.Oracle(*helpers.wide((x, *parameters)), *FUNCTIONS).y, 1e-12)

        slope = helpers.quick_jit(jax.grad(lambda x, parameters: jnp.sin(fn(x, parameters)).sum()))
        assert not helpers.collectives(slope, *placed)

        both = helpers.quick_jit(jax.grad(functools.partial(step, implementation=cpu_implementation), (0, 1)))
        assert helpers.kinds(both, *placed) == {"all-reduce"}
        got = both(*placed)
        helpers.assert_trees_close(got, step_in_numpy(x, parameters), 1e-10)
        assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        assert all(g.sharding.is_equivalent_to(NamedSharding(mesh, S()), g.ndim) for g in jax.tree.leaves(got[1]))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
def test_shard_map(check_vma, cpu_implementation, cpu_devices, rng):
    """Rows sharded, parameters with all: their gradient is the sum over shards."""
    (x, *parameters), *_ = problem(rng, N=8)
    sharded = jax.shard_map(
        lambda x, parameters: jax.lax.psum(step(x, parameters, cpu_implementation), "shard"),
        mesh=Mesh(np.array(cpu_devices), ("shard",)),
        in_specs=(S("shard"), S()),
        out_specs=S(),
        check_vma=check_vma,
    )
    got = helpers.quick_jit(jax.grad(sharded, (0, 1)))(x, tuple(parameters))
    helpers.assert_trees_close(got, step_in_numpy(x, parameters), 1e-10)
