"""The hash grid under JAX's transformations, and split over devices."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

from jax_knn_aggregate import HashGrid, hash_grid

GRID = HashGrid(3, 3, 2, 5, 3, 1.6, "smoothstep")


def step(x, table, implementation=None, grid=GRID):
    """Of an Eikonal loss: every role of the family, and the sum of a first and a second order."""

    def field(x):
        return jnp.tanh(hash_grid(x, table, grid, implementation=implementation)).sum(-1)

    slope = jax.grad(lambda x: field(x).sum())(x)
    return jnp.square(jnp.square(slope).sum(-1) - 1).sum() + jnp.square(field(x)).sum()


def step_in_numpy(x, table, grid=GRID):
    """The gradients of ``step`` in x and table."""
    o = oracle.Oracle(grid, x)
    y = o.value(table)
    t = np.tanh(y)
    ct = 1 - t * t
    slope, _ = o.first(table, ct)
    v = 4 * (np.square(slope).sum(-1, keepdims=True) - 1) * slope
    in_x, in_table, in_ct = o.second(table, ct, v, 0 * table)
    more = o.first(table, in_ct * (-2 * t * ct) + 2 * t.sum(-1, keepdims=True) * ct)
    return in_x + more[0], in_table + more[1]


def points(rng, *lead):
    return rng.uniform(-0.2, 1.2, (*lead, GRID.dim))


def tables(rng, *lead):
    return 0.3 * rng.normal(size=(*lead, GRID.rows, GRID.features))


# ---- vmap


@pytest.mark.parametrize(
    ("axes", "out_axes"),
    [((0, None), 0), ((None, 0), 0), ((0, 0), 0), ((1, 2), (2, 1)), ((2, None), (1, 2))],
    ids=str,
)
@pytest.mark.thorough_if(implementation="xla")
def test_vmap(axes, out_axes, implementation, rng):
    """Over x, table or both, anywhere, of the gradient: first and second order."""
    n = 3
    x, table = (
        fn(rng, *([n] if axis is not None else []))
        for fn, axis in zip((lambda r, *b: points(r, *b, 5), tables), axes, strict=True)
    )
    single = [
        step_in_numpy(*(a if axis is None else a[i] for a, axis in zip((x, table), axes, strict=True)))
        for i in range(n)
    ]
    outs = out_axes if isinstance(out_axes, tuple) else (out_axes,) * 2
    want = tuple(np.stack(a, axis) for a, axis in zip(zip(*single, strict=True), outs, strict=True))
    placed = [a if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip((x, table), axes, strict=True)]
    fn = jax.grad(functools.partial(step, implementation=implementation), (0, 1))
    got = helpers.quick_jit(jax.vmap(fn, axes, out_axes))(*placed)
    helpers.assert_trees_close(got, want, 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_what_is_shared_gets_the_sum(implementation, rng):
    """Of gradients of first and second order, along each axis that it does not have; it is not copied on the way."""
    x, table = points(rng, 2, 3, 5), tables(rng, 2)

    def total(x, table):  # the table is mapped by the outer vmap alone
        inner = jax.vmap(functools.partial(step, implementation=implementation), (0, None))
        return jax.vmap(inner)(x, table).sum()

    got = helpers.quick_jit(jax.grad(total, (0, 1)))(x, table)
    single = [[step_in_numpy(x[i, j], table[i]) for j in range(3)] for i in range(2)]
    helpers.assert_close(got[0], np.array([[a for a, _ in row] for row in single]), 1e-10)
    helpers.assert_close(got[1], np.array([sum(b for _, b in row) for row in single]), 1e-10)
    if implementation == "ffi":
        shapes = [e.outvars[0].aval.shape for e in helpers.equations(jax.make_jaxpr(jax.grad(total, (0, 1)))(x, table))]
        assert not [s for s in shapes if np.prod(s, dtype=int) >= 6 * table[0].size]


@pytest.mark.thorough_if(implementation="xla")
def test_second_order_of_and_under_vmap(implementation, rng):
    """A Hessian of each point by vmap over directions, against the oracle's second derivatives."""
    x, table = points(rng, 4), tables(rng)
    ct = rng.normal(size=GRID.outputs)

    def one(x):
        return (hash_grid(x[None], table, GRID, implementation=implementation)[0] * ct).sum()

    o = oracle.Oracle(GRID, x)
    cts = np.broadcast_to(ct, (4, GRID.outputs))
    units = [np.broadcast_to(np.eye(3)[d], (4, 3)) for d in range(3)]
    want = np.stack([o.second(table, cts, e, 0 * table)[0] for e in units], -1)
    for hessian in (jax.jacfwd(jax.grad(one)), jax.jacrev(jax.grad(one))):
        helpers.assert_close(helpers.quick_jit(jax.vmap(hessian))(jnp.asarray(x)), want, 1e-10)


# ---- Loops, memory, export


@pytest.mark.thorough_if(implementation="xla")
def test_scan_and_checkpoint(implementation, rng):
    """Tables that a loop carries, and values that are computed again for the gradient."""
    x, table = points(rng, 4, 5), tables(rng)

    def loss(x, table):
        @jax.checkpoint
        def body(total, x):
            return total + step(x, table, implementation), None

        return jax.lax.scan(body, jnp.zeros(()), x)[0]

    got = helpers.quick_jit(jax.grad(loss, (0, 1)))(x, table)
    single = [step_in_numpy(a, table) for a in x]
    want = np.stack([a for a, _ in single]), sum(b for _, b in single)
    helpers.assert_trees_close(got, want, 1e-10)


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")], ids=["this platform", "cpu and cuda"])
@pytest.mark.thorough_if(platforms=[("cpu", "cuda")])
def test_export_for_any_number_of_points(platforms, rng):
    table = tables(rng)
    (N,) = jax.export.symbolic_shape("N")
    fn = jax.grad(step, (0, 1))
    shapes = jax.ShapeDtypeStruct((N, 3), np.float64), jax.ShapeDtypeStruct(table.shape, np.float64)
    read = helpers.through_bytes(fn, shapes, platforms)
    for n in (1, 33):
        x = points(rng, n)
        helpers.assert_trees_close(read.call(x, table), step_in_numpy(x, table), 1e-10)


# ---- Devices


@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(mesh=AxisType.Explicit)
def test_points_split_over_devices(cpu_implementation, mesh, rng):
    """Nothing moves forward or for gradients in x; the table's gradient is one all-reduce."""
    x, table = points(rng, 16), tables(rng)
    fn = functools.partial(hash_grid, grid=GRID, implementation=cpu_implementation)
    for spec in (S("a"), S(("a", "b"))):
        placed = helpers.place(mesh, (x, table), (spec, S()))
        forward = helpers.quick_jit(fn)
        assert not helpers.collectives(forward, *placed)
        y = forward(*placed)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        helpers.assert_close(y, oracle.Oracle(GRID, x).value(table), 1e-12)

        slope = helpers.quick_jit(jax.grad(lambda x, table: jnp.sin(fn(x, table)).sum()))
        assert not helpers.collectives(slope, *placed)
        assert slope(*placed).sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)

        first = helpers.quick_jit(jax.grad(lambda x, table: jnp.sin(fn(x, table)).sum(), 1))
        assert helpers.collectives(first, *placed) == [("all-reduce", [table.shape])]

        both = helpers.quick_jit(jax.grad(functools.partial(step, implementation=cpu_implementation), (0, 1)))
        found = helpers.collectives(both, *placed)
        assert {kind for kind, _ in found} == {"all-reduce"}
        got = both(*placed)
        helpers.assert_trees_close(got, step_in_numpy(x, table), 1e-10)
        assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        assert got[1].sharding.is_equivalent_to(NamedSharding(mesh, S()), 2)


def test_batches_split_over_devices(mesh, rng):
    """Leading axes of x as well, also along with its points."""
    x, table = points(rng, 4, 2), tables(rng)
    fn = helpers.quick_jit(functools.partial(hash_grid, grid=GRID))
    for spec in (S("a"), S("a", "b"), S(None, "b")):
        placed = helpers.place(mesh, (x, table), (spec, S()))
        assert not helpers.collectives(fn, *placed)
        want = oracle.Oracle(GRID, x.reshape(8, 3)).value(table).reshape(4, 2, -1)
        helpers.assert_close(fn(*placed), want, 1e-12)


def test_split_tables(mesh, rng):
    """Every device needs the table whole: Auto meshes gather it, on Explicit ones it is an error."""
    x, table = points(rng, 8), tables(rng)
    assert GRID.rows % 4 == 0
    fn = jax.jit(functools.partial(hash_grid, grid=GRID))
    for spec in (S("a"), S(None, "b")):
        placed = helpers.place(mesh, (x, table), (S(), spec))
        if AxisType.Explicit in mesh.axis_types:
            with pytest.raises(ValueError, match="which every device needs whole"):
                fn(*placed)
        else:
            helpers.assert_close(fn(*placed), oracle.Oracle(GRID, x).value(table), 1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
def test_shard_map(check_vma, cpu_implementation, cpu_devices, rng):
    """Points sharded, the table with all: its gradient is the sum over shards."""
    x, table = points(rng, 8), tables(rng)
    sharded = jax.shard_map(
        lambda x, table: jax.lax.psum(step(x, table, cpu_implementation), "shard"),
        mesh=Mesh(np.array(cpu_devices), ("shard",)),
        in_specs=(S("shard"), S()),
        out_specs=S(),
        check_vma=check_vma,
    )
    got = helpers.quick_jit(jax.grad(sharded, (0, 1)))(x, table)
    helpers.assert_trees_close(got, step_in_numpy(x, table), 1e-10)
