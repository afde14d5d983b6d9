"""Clouds split over CPU devices (points_axis): the same neighbours and derivatives as in one cloud, nothing gathered.

The failures guarded against: ties broken by device; gradients of a part lost or counted once per device; points or
features moved after all.
"""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as S

import jax_knn_aggregate as jka

N = 4  # devices along the points' axis
PART, F, K = 7, 2, 5
P = N * PART


@pytest.fixture
def mesh(eight_cpu_devices):
    return jax.make_mesh((2, N), ("q", "p"), devices=eight_cpu_devices)


#: Queries replicated over the points' axis, and split over it as well.
QUERIES = {"replicated": S("q"), "own": S(("q", "p"))}


def specs(queries, metric="aniso"):
    return (queries, *[S("p")] * (len(helpers.ARGUMENTS[metric]) - 1))


def over(mesh, fn, in_specs, out_specs):
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def placed(mesh, x, in_specs):
    return helpers.place(mesh, x, in_specs)


def field(metric, implementation=None, **options):
    """The op on a split cloud, as helpers.outputs gives it on a whole one."""
    return helpers.outputs(metric, K, implementation, points_axis="p", **options)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(cpu_implementation="xla")
def test_values_and_ties(metric, queries, cpu_implementation, mesh, rng):
    """Exact neighbours, equal distances by global index, with copies of each point on other devices."""
    in_specs = specs(QUERIES[queries], metric)
    Q = 16 if queries == "own" else 18  # 9 queries on 4 devices are filled up
    x = helpers.integer_cloud(rng, metric, Q, P, F, copies=True)
    options = {"implementation": cpu_implementation, "points_axis": "p"}

    def both(*x):
        return helpers.aggregate(metric, x, K, **options), helpers.search(metric, x, K, **options)

    compiled = helpers.quick_jit(over(mesh, both, in_specs, in_specs[0]))
    out, found = compiled(*placed(mesh, x, in_specs))
    want = helpers.oracle(metric, x, K)
    for idxs in (out.idxs, found.idxs):
        np.testing.assert_array_equal(idxs, want[3])
    helpers.assert_trees_close(tuple(out)[:3], want[:3], 1e-12)
    helpers.assert_close(found.dists, want[2], 1e-12)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(queries="replicated")
def test_eikonal_step(queries, cpu_implementation, mesh, rng):
    """Differentiated from outside and inside of shard_map. Gradients of points are where the points are."""
    in_specs = specs(QUERIES[queries])
    Q = 16
    x = helpers.cloud(rng, "aniso", Q, P, F)
    everywhere = ("q",) if queries == "replicated" else ("q", "p")

    def part(*x):  # of the mean over all queries
        return helpers.eikonal(field("aniso", cpu_implementation))(*x) * (x[0].shape[-2] / Q)

    def whole(*x):
        return over(mesh, lambda *x: jax.lax.psum(part(*x), everywhere), in_specs, S())(*x)

    outside = helpers.quick_jit(jax.value_and_grad(whole, range(5)))
    inside = helpers.quick_jit(over(mesh, jax.grad(part, range(5)), in_specs, in_specs))
    x_placed = placed(mesh, x, in_specs)
    want = helpers.oracle_jit(jax.value_and_grad(helpers.eikonal(helpers.outputs("aniso", K)), range(5)))(*x)
    got = outside(*x_placed)
    helpers.assert_trees_close(got, want, 1e-9)
    helpers.assert_trees_close(inside(*x_placed), want[1], 1e-9)
    for a, s in zip(got[1], in_specs, strict=True):
        assert a.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, s), a.ndim)
    for compiled in (outside, inside):
        for kind, shapes in helpers.collectives(compiled, *x_placed):
            for shape in shapes:
                assert P not in shape, f"{kind} of an array of shape {shape}"
                # The sum over the queries' axis of the gradients of a device's own points.
                assert PART not in shape or kind == "all-reduce", f"{kind} of an array of shape {shape}"


def test_forward_moves_no_points(mesh, rng):
    in_specs = specs(S("q"))
    x = placed(mesh, helpers.cloud(rng, "aniso", 16, P, F), in_specs)
    compiled = helpers.quick_jit(over(mesh, lambda *x: field("aniso")(*x)[0], in_specs, S("q")))
    moved = helpers.collectives(compiled, *x)
    assert moved
    for kind, shapes in moved:
        for shape in shapes:
            assert not {P, PART} & set(shape), f"{kind} of an array of shape {shape}"


def test_missing_and_nonfinite_points(mesh, rng):
    """Devices with few or no points, a point that is NaN, one at distance +inf, fewer points than K in all."""
    x = list(helpers.cloud(rng, "aniso", 8, P, F))
    x[1][3] = np.nan
    x[3][PART + 1] = np.inf
    for lengths in ([PART, 2, 0, 5], [0, 1, 0, 2]):
        exists = np.concatenate([np.arange(PART) < n for n in lengths])
        kept = np.flatnonzero(exists)
        some = (x[0], *(a[kept] for a in x[1:]))
        idxs = helpers.oracle_search("aniso", some, min(K, len(kept)))
        idxs = np.pad(idxs, ((0, 0), (0, K - idxs.shape[1])), constant_values=-1)
        values = helpers.oracle_values("aniso", helpers.wide(some), idxs)

        def op(length, *x):
            return helpers.aggregate("aniso", x, K, p_lengths=length[0], points_axis="p")

        in_specs = (S("p"), *specs(S()))
        out = jax.jit(over(mesh, op, in_specs, S()))(*placed(mesh, (np.array(lengths), *x), in_specs))
        np.testing.assert_array_equal(out.idxs, np.where(idxs < 0, -1, kept[idxs]))
        helpers.assert_trees_close(tuple(out)[:3], values, 1e-12)


def test_more_neighbours_than_points_on_a_device(mesh, rng):
    x = helpers.cloud(rng, "iso", 8, P, F)
    many = P - 1
    in_specs = specs(S("q"), "iso")
    fn = over(mesh, lambda *x: jka.knn_aggregate(*x, many, points_axis="p"), in_specs, S("q"))
    out = jax.jit(fn)(*placed(mesh, x, in_specs))
    np.testing.assert_array_equal(out.idxs, helpers.oracle_search("iso", x, many))


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(metric="aniso", queries="replicated")
@pytest.mark.thorough_if(metric="iso", queries="own")
def test_given_neighbours(metric, queries, mesh, rng):
    """Indices into the points of all devices, and what lies outside of them."""
    Q = 16
    x = helpers.cloud(rng, metric, Q, P, F)
    idxs = rng.integers(-2, P + 2, (Q, K))
    in_specs = (QUERIES[queries], *specs(QUERIES[queries], metric))
    fn = over(
        mesh,
        lambda idxs, *x: helpers.precomputed(metric, x, idxs, points_axis="p"),
        in_specs,
        QUERIES[queries],
    )
    out = jax.jit(fn)(*placed(mesh, (idxs, *x), in_specs))
    np.testing.assert_array_equal(out.idxs, np.where((idxs < 0) | (idxs >= P), -1, idxs))
    helpers.assert_trees_close(tuple(out)[:3], helpers.oracle_values(metric, helpers.wide(x), idxs), 1e-12)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(queries="replicated")
@pytest.mark.thorough_if(metric="iso")
def test_index_and_guesses(metric, queries, cpu_implementation, mesh, rng):
    """An index of each device's points, kept between calls, and guesses among the points of all."""
    split = QUERIES[queries]
    in_specs = specs(split, metric)
    x = helpers.cloud(rng, metric, 16, P, F)
    options = {"implementation": cpu_implementation}
    want = helpers.oracle(metric, x, K)
    guesses = np.where(rng.random((16, K)) < 0.5, want[3], rng.integers(-9, P + 9, (16, K)))

    def build(q, p, f, *parameters):
        return jka.build_index(p, *(parameters if metric == "aniso" else ()), **options)

    def op(warm, index, *x):
        return helpers.aggregate(metric, x, K, warm_idxs=warm, index=index, points_axis="p", **options)

    x_placed = placed(mesh, x, in_specs)
    index = helpers.quick_jit(over(mesh, build, in_specs, S("p")))(*x_placed)
    (warm,) = placed(mesh, (guesses,), (split,))
    for given in ((warm, None), (None, index), (warm, index)):
        out = helpers.quick_jit(over(mesh, op, (split, S("p"), *in_specs), split))(*given, *x_placed)
        np.testing.assert_array_equal(out.idxs, want[3])
        helpers.assert_trees_close(tuple(out)[:3], want[:3], 1e-12)


def test_index_and_guesses_alone_under_vmap(mesh, rng):
    x = helpers.cloud(rng, "iso", 16, P, F)
    in_specs = specs(S("q"), "iso")
    want = helpers.oracle_search("iso", x, K)

    def op(q, p, *_):
        indexes = jax.tree.map(lambda a: jnp.stack([a, a]), jka.build_index(p))
        guesses = jnp.zeros((3, q.shape[0], 2), int)

        def search(**options):
            return jka.knn_search(q, p, K, points_axis="p", implementation="xla", **options).idxs

        return (
            jax.vmap(lambda w: search(warm_idxs=w))(guesses),
            jax.vmap(lambda i: search(index=i))(indexes),
        )

    got = jax.jit(over(mesh, op, in_specs, S(None, "q")))(*placed(mesh, x, in_specs))
    for idxs, n in zip(got, (3, 2), strict=True):
        np.testing.assert_array_equal(idxs, np.stack([want] * n))


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_own_queries_with_common_indices(cpu_implementation, mesh, rng):
    """Indices that are the same on all devices of the axis, as constants are, for queries that are not."""
    x = helpers.cloud(rng, "aniso", 16, P, F)
    in_specs = specs(S(("q", "p")))
    part = 16 // mesh.size
    idxs = rng.integers(-1, P, (part, K))
    options = {"implementation": cpu_implementation, "points_axis": "p"}

    def both(*x):
        return (
            jka.knn_aggregate_aniso_precomputed(*x, idxs, **options),
            jka.knn_aggregate_aniso(*x, K, warm_idxs=idxs, **options),
        )

    given, searched = jax.jit(over(mesh, both, in_specs, in_specs[0]))(*placed(mesh, x, in_specs))
    tiled = np.tile(idxs, (mesh.size, 1))
    np.testing.assert_array_equal(given.idxs, tiled)
    helpers.assert_trees_close(tuple(given)[:3], helpers.oracle_values("aniso", helpers.wide(x), tiled), 1e-12)
    want = helpers.oracle("aniso", x, K)
    np.testing.assert_array_equal(searched.idxs, want[3])
    helpers.assert_trees_close(tuple(searched)[:3], want[:3], 1e-12)


def test_common_queries_with_own_indices_raise(mesh, rng):
    x = helpers.cloud(rng, "aniso", 8, P, F)
    in_specs = (S(("q", "p")), *specs(S("q")))
    args = placed(mesh, (np.zeros((8 * N, K), int), *x), in_specs)

    def given(idxs, *x):
        return jka.knn_aggregate_aniso_precomputed(*x, idxs, points_axis="p")

    def guessed(idxs, *x):
        return jka.knn_aggregate_aniso(*x, K, warm_idxs=idxs, points_axis="p")

    for name, op in {"knn_idxs": given, "warm_idxs": guessed}.items():
        with pytest.raises(ValueError, match=rf"{name} varies over points_axis 'p', but q does not.*Split both"):
            jax.eval_shape(over(mesh, op, in_specs, S("q")), *args)


def test_half_precision_features(mesh, rng):
    """Summed over devices in float32, rounded once."""
    q, p, f, sigma, R = helpers.cloud(rng, "aniso", 8, P, 3, dtype=np.float32)
    x = (q, p, jnp.asarray(f, jnp.bfloat16), sigma, R)
    in_specs = specs(S("q"))
    fn = jax.jit(over(mesh, lambda *x: field("aniso")(*x)[0], in_specs, S("q")))
    got = fn(*placed(mesh, x, in_specs))
    assert got.dtype == jnp.bfloat16
    want = helpers.oracle("aniso", (q, p, np.asarray(x[2], np.float32), sigma, R), K)[0]
    helpers.assert_close(got, want, 1e-2)


def test_scan_of_remat_of_vmap(mesh, rng):
    """Descent on two scenes, each split over the devices, the search saved or repeated."""
    x = helpers.cloud(rng, "aniso", 8, P, F, batch=(2,))
    in_specs = (S(None, "q"), *[S(None, "p")] * 4)

    def steps(op, total):
        def loss(*x):
            return total(jax.vmap(jax.checkpoint(lambda *x: jnp.sum(jnp.sin(op(*x)[0]))))(*x).sum())

        def step(x, _):
            return tuple(a - 0.01 * d for a, d in zip(x, jax.grad(loss, range(5))(*x), strict=True)), None

        return lambda *x: jax.lax.scan(step, x, length=2)[0]

    split = steps(field("aniso"), lambda a: jax.lax.psum(a, "q"))
    compiled = helpers.quick_jit(over(mesh, split, in_specs, in_specs))
    want = helpers.oracle_jit(steps(helpers.outputs("aniso", K), lambda a: a))(*x)
    helpers.assert_trees_close(compiled(*placed(mesh, x, in_specs)), want, 1e-9)


def test_partially_manual(mesh, rng):
    """Only the points' axis is manual; queries are split by their type along the other one, which moves lists of
    neighbours along it too (README), but no points."""
    x = helpers.cloud(rng, "aniso", 16, P, F)
    in_specs = specs(S("q"))
    inside = (S(), *[S("p")] * 4)
    fn = jax.shard_map(lambda *x: field("aniso")(*x)[0], mesh=mesh, in_specs=inside, out_specs=S(), axis_names={"p"})
    compiled = helpers.quick_jit(fn)
    x_placed = placed(mesh, x, in_specs)
    helpers.assert_close(compiled(*x_placed), helpers.oracle("aniso", x, K)[0], 1e-12)
    for kind, shapes in helpers.collectives(compiled, *x_placed):
        assert not any({P, PART} & set(shape) for shape in shapes), f"{kind} of {shapes}"


def test_errors(eight_cpu_devices, rng):
    mesh = Mesh(np.array(eight_cpu_devices).reshape(2, N), ("q", "p"))
    x = helpers.cloud(rng, "aniso", 16, P, F)

    def call(points="p", check_vma=True, **options):
        fn = jax.shard_map(
            lambda *x: jka.knn_aggregate_aniso(*x, **{"K": K, "points_axis": "p", **options}).f_out,
            mesh=mesh,
            in_specs=(S("q"), *[S(points)] * 4),
            out_specs=S("q"),
            check_vma=check_vma,
        )
        return jax.eval_shape(fn, *x)

    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        jka.knn_aggregate_aniso(*x, K, points_axis="p")
    with pytest.raises(ValueError, match="does not vary over points_axis 'p'"):
        call(None)
    with pytest.raises(ValueError, match="check_vma=True"):
        call(check_vma=False)
    with pytest.raises(TypeError, match="expected the name of a mesh axis"):
        call(points_axis=0)
    with pytest.raises(ValueError, match=f"1 <= K <= {P}, the number of points P of all devices"):
        call(K=P + 1)
