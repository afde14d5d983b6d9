"""Scenes and queries split over CPU devices, points replicated: under ``shard_map``, and under ``jit`` on its own.

The failures guarded against: values right, gradients silently those of one shard; results right, but only because every
device gathered everything and did all the work.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

import jax_knn_aggregate as jka

Q, P, F, K = 8, 9, 2, 3


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(np.array(cpu_devices), ("shard",))


def losses(implementation):
    op = helpers.outputs("aniso", K, implementation)
    return {
        "first": lambda *x: helpers.total(op(*x)),
        # Sums, not means, so that shards add up.
        "Eikonal": lambda *x: x[0].shape[-2] * helpers.eikonal(op)(*x),
    }


def problem(rng, batch=()):
    return helpers.cloud(rng, "aniso", Q, P, F, batch=batch)


@functools.cache
def _single(name, implementation):
    return helpers.oracle_jit(jax.value_and_grad(losses(implementation)[name], range(5)))


def single(name, implementation, x):
    """The same on one device."""
    return _single(name, implementation)(*x)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(check_vma=False)
def test_sharded_queries_replicated_points(check_vma, cpu_implementation, mesh, rng):
    x = problem(rng)
    specs = (S("shard"), S(), S(), S(), S())
    for name, loss in losses(cpu_implementation).items():

        def sharded(*x, loss=loss):
            return jax.shard_map(
                lambda *x: jax.lax.psum(loss(*x), "shard"),
                mesh=mesh,
                in_specs=specs,
                out_specs=S(),
                check_vma=check_vma,
            )(*x)

        got = helpers.quick_jit(jax.value_and_grad(sharded, range(5)))(*x)
        helpers.assert_trees_close(got, single(name, cpu_implementation, x), 1e-9, f"{name}: ")


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_gradient_inside(cpu_implementation, mesh, rng):
    """Under check_vma a gradient taken inside is summed over shards for what is replicated, and local for the rest."""
    x = problem(rng)
    specs = (S("shard"), S(), S(), S(), S())
    for name, loss in losses(cpu_implementation).items():
        inside = jax.shard_map(jax.grad(loss, range(5)), mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)
        helpers.assert_trees_close(
            helpers.quick_jit(inside)(*x), single(name, cpu_implementation, x)[1], 1e-9, f"{name}: "
        )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(check_vma=False)
def test_sharded_clouds_replicated_queries(check_vma, cpu_implementation, mesh, rng):
    """Each shard has a cloud of its own, and all see the same queries."""
    x = problem(rng, (4,))
    x = (x[0][0], *x[1:])
    specs = (S(), *[S("shard")] * 4)
    for name, loss in losses(cpu_implementation).items():

        def sharded(*x, loss=loss):
            def local(q, *rest):
                if (
                    check_vma
                ):  # so that the Eikonal loss's own gradient stays local; its transpose is the sum over shards
                    q = jax.lax.pcast(q, "shard", to="varying")
                return jax.lax.psum(loss(q, *(a[0] for a in rest)), "shard")

            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=S(), check_vma=check_vma)(*x)

        got = helpers.quick_jit(jax.value_and_grad(sharded, range(5)))(*x)

        each = [single(name, cpu_implementation, (x[0], *(a[i] for a in x[1:]))) for i in range(4)]
        summed = sum(e[0] for e in each), sum(e[1][0] for e in each)
        want = (summed[0], (summed[1], *(np.stack(a) for a in zip(*(e[1][1:] for e in each), strict=True))))
        helpers.assert_trees_close(got, want, 1e-9, f"{name}: ")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(check_vma=False)
def test_values_of_every_entry_point(check_vma, cpu_implementation, mesh, rng):
    x = problem(rng)
    options = {"implementation": cpu_implementation}
    idxs = rng.integers(-1, P, (Q, K))
    table = rng.integers(-1, P, (P, K))

    def every(q, idxs, table, length, *rest):
        p, f, sigma, _ = rest
        return (
            jka.knn_aggregate_aniso(q, *rest, K, p_lengths=length, **options),
            jka.knn_aggregate_aniso_precomputed(q, *rest, idxs, **options),
            jka.knn_aggregate_aniso_lookup(q, *rest, table, K, **options),
            jka.knn_aggregate(q, p, f, sigma[:, :1], K, **options),
            jka.knn_aggregate_precomputed(q, p, f, sigma[:, :1], idxs, **options),
            jka.knn_search(q, p, K, p_lengths=length, **options),
        )

    args = (x[0], idxs, table, np.int32(7), *x[1:])
    specs = (S("shard"), S("shard"), *[S()] * 6)
    fn = jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=S("shard"), check_vma=check_vma)
    got, want = helpers.quick_jit(fn)(*args), helpers.quick_jit(every)(*helpers.on_cpu(args))
    helpers.assert_trees_close(got, want, 1e-12)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g.idxs, w.idxs)
    table = jax.shard_map(
        lambda p: jka.build_knn_table(p, K, **options), mesh=mesh, in_specs=S(), out_specs=S(), check_vma=check_vma
    )
    np.testing.assert_array_equal(table(x[1]), jka.build_knn_table(x[1], K))


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_forward_mode_and_vmap_inside(cpu_implementation, mesh, rng):
    x = problem(rng)
    v = problem(rng)
    op = helpers.outputs("aniso", K, cpu_implementation)

    def push(q, dq, rest, drest):  # the queries' tangents vary, those of the points do not
        return jax.jvp(op, (q, *rest), (dq, *drest))[1]

    def mapped(q, dq, rest, drest):
        return jax.vmap(lambda q: op(q, *rest))(jnp.stack([q, q + 0.1]))

    args = (x[0], v[0], x[1:], v[1:])
    for fn, out in ((push, S("shard")), (mapped, S(None, "shard"))):
        sharded = jax.shard_map(fn, mesh=mesh, in_specs=(S("shard"), S("shard"), S(), S()), out_specs=out)
        want = helpers.quick_jit(fn)(*helpers.on_cpu(args))
        helpers.assert_trees_close(helpers.quick_jit(sharded)(*args), want, 1e-10)


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_explicit_mesh(cpu_implementation, cpu_devices, rng):
    """The default kind of mesh: explicit axes, arrays placed on it before."""
    mesh = jax.make_mesh((4,), ("shard",), devices=cpu_devices)
    x = problem(rng)
    specs = (S("shard"), S(), S(), S(), S())
    placed = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(x, specs, strict=True))
    name = "Eikonal"
    loss = losses(cpu_implementation)[name]

    def sharded(*x):
        return jax.shard_map(lambda *x: jax.lax.psum(loss(*x), "shard"), mesh=mesh, in_specs=specs, out_specs=S())(*x)

    got = helpers.quick_jit(jax.value_and_grad(sharded, range(5)))(*placed)
    helpers.assert_trees_close(got, single(name, cpu_implementation, x), 1e-9)


# ---- jit over sharded arrays


KINDS = (AxisType.Auto, AxisType.Explicit)


@pytest.fixture(autouse=True)
def _x64_in_all_threads():
    """XLA asks for the program of one shard in a thread of its own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def grid(request, eight_cpu_devices):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(request.param,) * 2, devices=eight_cpu_devices)


def split(batch, q, rest):
    """Specs of x: those of q; of the points' arrays."""
    return (S(*q), *[S(*rest)] * 4), batch


LAYOUTS = {
    "queries": split((), "a", ()),
    "queries over two axes": split((), (("a", "b"),), ()),
    "scenes": split((8,), "b", "b"),
    "scenes and queries": split((4,), "ab", "a"),
}


@pytest.mark.parametrize("layout, path", [*((name, None) for name in LAYOUTS), ("scenes and queries", "xla")])
@pytest.mark.thorough_if(path="xla")
@pytest.mark.thorough_if(grid=AxisType.Auto, layout=["queries over two axes", "scenes"])
@pytest.mark.thorough_if(grid=AxisType.Explicit, layout=["queries", "scenes and queries"])
def test_jit(layout, path, grid, rng):
    """Values, first and second derivatives; no collective forward, only all-reduce backward; results stay split."""
    specs, batch = LAYOUTS[layout]
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=batch)
    placed = helpers.place(grid, x, specs)
    op = helpers.outputs("aniso", K, path)
    forward = helpers.quick_jit(op)
    assert not helpers.collectives(forward, *placed)
    got = forward(*placed)
    helpers.assert_trees_close(got, helpers.oracle("aniso", x, K)[:3], 1e-12)
    for a in got:
        assert a.sharding.is_equivalent_to(NamedSharding(grid, specs[0]), a.ndim)

    step = helpers.quick_jit(jax.value_and_grad(losses(path)["Eikonal"], range(5)))
    assert helpers.kinds(step, *placed) <= {"all-reduce"}
    got = step(*placed)
    helpers.assert_trees_close(got, single("Eikonal", path, x), 1e-9)
    for a, s in zip(got[1], specs, strict=True):
        assert a.sharding.is_equivalent_to(NamedSharding(grid, s), a.ndim)


@pytest.mark.parametrize("beyond", [False, True], ids=["", "third order"])
@pytest.mark.thorough_if(grid=AxisType.Explicit)
@pytest.mark.thorough_if(beyond=True)
def test_jit_forward_mode_and_third_order(beyond, grid, rng):
    """The primitives that a reverse-mode step does not have: jvp, vjp_jvp, and the reference's own derivatives."""
    x, v = (problem(rng) for _ in range(2))
    specs = LAYOUTS["queries"][0]
    loss = losses(None)["Eikonal"]

    def derivatives(*xv):
        x, v = xv[:5], xv[5:]
        if beyond:
            return jax.grad(lambda q: jnp.sum(jax.grad(loss)(q, *x[1:]) * v[0]))(x[0])
        first = jax.jvp(helpers.outputs("aniso", K), x, v)[1]
        return first, jax.jvp(jax.grad(losses(None)["first"], range(5)), x, v)[1]

    compiled = helpers.quick_jit(derivatives)
    placed = helpers.place(grid, (*x, *v), specs * 2)
    assert helpers.kinds(compiled, *placed) <= {"all-reduce"}
    helpers.assert_trees_close(compiled(*placed), helpers.oracle_jit(derivatives)(*x, *v), 1e-9)


@pytest.mark.thorough_if()
def test_third_order_outside_jit(cpu_devices, rng):
    """On Explicit axes: the reference's gathers are typed, and transposed one operation after the other."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,), devices=cpu_devices)
    q, p, f, sigma = helpers.cloud(rng, "iso", Q, P, F)
    cloud, idxs = (p, f, sigma), rng.integers(-1, P, (Q, K))
    w, m = jnp.asarray(rng.random((4, 6))), jnp.asarray(np.sort(rng.random((4, 6))))
    squared = lambda fn: lambda x: jnp.sum(jax.grad(fn)(x) ** 2)  # noqa: E731

    def third(q, cloud, idxs, w, m):
        aggregate = lambda q: jnp.sum(jka.knn_aggregate_precomputed(q, *cloud, idxs).f_out)  # noqa: E731
        distortion = lambda w: jnp.sum(jka.distortion_loss(w, m, 0.1, reduction="none") ** 3)  # noqa: E731
        return [jax.grad(squared(squared(fn)))(a) for fn, a in ((aggregate, q), (distortion, w))]

    args = (q, cloud, idxs, w, m)
    want = helpers.oracle_jit(third)(*args)
    split, whole = NamedSharding(mesh, S("a")), NamedSharding(mesh, S())
    for given in (args, jax.device_put(args, (split, whole, split, split, split))):
        with jax.set_mesh(mesh):
            helpers.assert_trees_close(third(*given), want, 1e-9)


@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(grid=AxisType.Explicit)
def test_jit_every_entry_point(cpu_implementation, grid, rng):
    x = problem(rng)
    options = {"implementation": cpu_implementation}
    idxs, table = rng.integers(-1, P, (Q, K)), rng.integers(-1, P, (P, K))

    def every(q, p, f, sigma, R, idxs, table, length):
        return (
            jka.knn_aggregate_aniso(q, p, f, sigma, R, K, p_lengths=length, **options),
            jka.knn_aggregate_aniso_precomputed(q, p, f, sigma, R, idxs, **options),
            jka.knn_aggregate_aniso_lookup(q, p, f, sigma, R, table, K, **options),
            jka.knn_aggregate(q, p, f, sigma[:, :1], K, **options),
            jka.knn_aggregate_precomputed(q, p, f, sigma[:, :1], idxs, **options),
            jka.knn_search(q, p, K, p_lengths=length, **options),
            jka.knn_search_aniso(q, p, sigma, R, K, **options),
        )

    args = (*x, idxs, table, np.int32(7))
    placed = helpers.place(grid, args, (*LAYOUTS["queries"][0], S("a"), S(), S()))
    compiled = helpers.quick_jit(every)
    assert not helpers.collectives(compiled, *placed)
    got, want = compiled(*placed), helpers.quick_jit(every)(*helpers.on_cpu(args))
    helpers.assert_trees_close(got, want, 1e-12)
    for a in jax.tree.leaves(got):
        assert a.sharding.is_equivalent_to(NamedSharding(grid, S("a")), a.ndim)
    tables = jax.jit(lambda p: jka.build_knn_table(p, K, **options))  # of points split as the queries that they are
    (q,) = helpers.place(grid, x[:1], [S("a") if KINDS[0] in grid.axis_types else S()])
    np.testing.assert_array_equal(tables(q), tables(helpers.on_cpu(x[0])))


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.parametrize("layout", ["queries", "scenes and queries"])
@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(grid=AxisType.Auto, metric="iso")
@pytest.mark.thorough_if(grid=AxisType.Explicit, metric="aniso")
@pytest.mark.thorough_if(layout="queries", metric="aniso")
@pytest.mark.thorough_if(layout="scenes and queries", metric="iso")
def test_jit_index_and_guesses(layout, metric, cpu_implementation, grid, rng):
    """Guesses split as the queries, an index as the scenes; no collective, and results stay split."""
    specs, batch = LAYOUTS[layout]
    specs = specs[: len(helpers.ARGUMENTS[metric])]
    options = {"implementation": cpu_implementation}
    x = helpers.cloud(rng, metric, Q, P, F, batch=batch)
    want = helpers.oracle(metric, x, K)
    guesses = np.where(rng.random(want[3].shape) < 0.5, want[3], rng.integers(-9, P + 9, want[3].shape))

    def build(p, *parameters):
        return jka.build_index(p, *(parameters if metric == "aniso" else ()), **options)

    def op(warm, index, *x):
        return helpers.aggregate(metric, x, K, warm_idxs=warm, index=index, **options)

    placed = helpers.place(grid, x, specs)
    index = helpers.quick_jit(build)(placed[1], *placed[3:])
    (warm,) = helpers.place(grid, (guesses,), specs[:1])
    compiled = helpers.quick_jit(op)
    for given in ((warm, None), (None, index), (warm, index)):
        assert not helpers.collectives(compiled, *given, *placed)
        got = compiled(*given, *placed)
        np.testing.assert_array_equal(got.idxs, want[3])
        helpers.assert_trees_close(tuple(got)[:3], want[:3], 1e-12)
        for a in got:
            assert a.sharding.is_equivalent_to(NamedSharding(grid, specs[0]), a.ndim)


def test_replicated_operands_join_split_ones(grid, rng):
    """Queries of all scenes on every device, scenes split: each device takes the queries of its own scenes."""
    x = problem(rng, (8,))
    specs = (S(), *[S("a")] * 4)
    step = helpers.quick_jit(jax.value_and_grad(losses(None)["Eikonal"], range(5)))
    got = step(*helpers.place(grid, x, specs))
    helpers.assert_trees_close(got, single("Eikonal", None, x), 1e-9)


@pytest.mark.parametrize("manual", [(), ("a",), ("a", "b")], ids=["jit", "partially manual", "fully manual"])
@pytest.mark.thorough_if(grid=AxisType.Auto, manual=[("a",), ("a", "b")])
@pytest.mark.thorough_if(grid=AxisType.Explicit, manual=[(), ("a", "b")])
def test_scan_of_remat_of_vmap(manual, grid, rng):
    """Descent on scenes, split over a, of queries, split over b."""
    specs = (S("a", "b"), *[S("a")] * 4)
    x = problem(rng, (4,))

    def steps(gradient):
        def step(x, _):
            return tuple(a - 0.01 * d for a, d in zip(x, gradient(*x), strict=True)), None

        return lambda *x: jax.lax.scan(step, x, length=2)[0]

    def descent(total=lambda a: a):
        each = jax.vmap(jax.checkpoint(losses(None)["Eikonal"]))
        return steps(jax.grad(lambda *x: total(each(*x).sum()), range(5)))

    def spread(fn):
        if not manual:
            return fn
        inside = tuple(S(*(name if name in manual else None for name in spec)) for spec in specs)
        return jax.shard_map(fn, mesh=grid, in_specs=inside, out_specs=inside, axis_names=set(manual))

    compiled = helpers.quick_jit(spread(descent(lambda a: jax.lax.psum(a, "b")) if "b" in manual else descent()))
    placed = helpers.place(grid, x, specs)
    moved = helpers.collectives(compiled, *placed)
    if manual == ("a",) and AxisType.Auto in grid.axis_types:  # docs/sharding.md: gathers
        assert "all-gather" in dict(moved)
    else:
        # jax 0.10.1 to 0.11.1 gathers what enters and leaves a partially manual shard_map, along Explicit axes that are
        # not manual and whatever is inside. The op adds sums and nothing else.
        without_op = helpers.collectives(helpers.quick_jit(spread(steps(lambda *x: x))), *placed)
        gathers = manual == ("a",) and (0, 10, 1) <= jax.__version_info__ <= (0, 11, 1)
        assert {kind for kind, _ in without_op} == ({"all-gather"} if gathers else set())
        assert sorted(c for c in moved if c[0] != "all-reduce") == sorted(without_op)
    helpers.assert_trees_close(compiled(*placed), helpers.oracle_jit(descent())(*x), 1e-9)


# ---- What cannot be split


def test_uneven_shards_are_gathered(eight_cpu_devices, rng):
    """13 queries on 4 devices are padded by XLA; the padding must not enter the points' gradients."""
    mesh = Mesh(np.array(eight_cpu_devices[:4]), ("a",))
    x = helpers.cloud(rng, "aniso", 16, P, F)
    fn = jax.value_and_grad(lambda q, *rest: losses(None)["Eikonal"](q[:13] * 1.5, *rest), range(5))
    compiled = helpers.quick_jit(fn)
    placed = helpers.place(mesh, x, LAYOUTS["queries"][0])
    helpers.assert_trees_close(compiled(*placed), helpers.oracle_jit(fn)(*x), 1e-9)


@pytest.mark.parametrize("over", ["vmap", "map"])
@pytest.mark.thorough_if(over="map")
def test_parts_of_a_mesh_axis_are_gathered(over, eight_cpu_devices, rng):
    """Queries in chunks, fewer than devices: a reshape leaves each axis split over a part of the mesh axis."""
    each = {"vmap": jax.vmap, "map": lambda f: functools.partial(jax.lax.map, f)}[over]
    mesh = Mesh(np.array(eight_cpu_devices[:4]), ("a",))
    x = helpers.cloud(rng, "aniso", 16, P, F)
    loss = losses(None)["Eikonal"]
    fn = jax.value_and_grad(lambda q, *rest: each(lambda q: loss(q, *rest))(q.reshape(2, 8, 3)).sum(), range(5))
    placed = helpers.place(mesh, x, LAYOUTS["queries"][0])
    helpers.assert_trees_close(helpers.quick_jit(fn)(*placed), helpers.oracle_jit(fn)(*x), 1e-9)


def test_split_points_are_gathered_on_auto_meshes(eight_cpu_devices, rng):
    mesh = Mesh(np.array(eight_cpu_devices[:3]), ("a",))
    x = problem(rng)
    placed = helpers.place(mesh, x, (S(), *[S("a")] * 4))
    step = helpers.quick_jit(jax.value_and_grad(losses(None)["Eikonal"], range(5)))
    assert "all-gather" in helpers.kinds(step, *placed)
    helpers.assert_trees_close(step(*placed), single("Eikonal", None, x), 1e-9)


def test_errors_on_explicit_meshes(eight_cpu_devices, rng):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=eight_cpu_devices[:4])
    x = helpers.cloud(rng, "aniso", Q, 8, F)
    op = jax.jit(lambda *x: jka.knn_aggregate_aniso(*x, K))
    with pytest.raises(ValueError, match=r"which every device needs whole.*reshard.*points_axis"):
        op(*helpers.place(mesh, x, (S("a"), *[S("b")] * 4)))
    batched = problem(rng, (4,))
    with pytest.raises(ValueError, match="but another operand over"):
        op(*helpers.place(mesh, batched, (S("a"), S("b"), *[S("a")] * 3)))
    with pytest.raises(ValueError, match="used for different axes"):
        op(*helpers.place(mesh, batched, (S(None, "a"), *[S("a")] * 4)))


def test_export_on_several_devices(grid, rng):
    """What README says of each kind: inside shard_map always, under jit alone on Explicit meshes."""
    pytest.importorskip("flatbuffers")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in jka.FFI_TARGETS]
    x = problem(rng)
    specs = LAYOUTS["queries"][0]
    placed = helpers.place(grid, x, specs)
    op = helpers.outputs("aniso", K)

    def read(fn):
        data = jax.export.export(helpers.quick_jit(fn), platforms=["cpu"], disabled_checks=checks)(*placed).serialize()
        return jax.export.deserialize(bytearray(data))

    inside = jax.shard_map(op, mesh=grid, in_specs=specs, out_specs=S("a"))
    artifacts = [read(inside)]
    if AxisType.Explicit in grid.axis_types:
        artifacts.append(read(op))
    else:
        with pytest.raises(NotImplementedError):
            read(op)
    for artifact in artifacts:
        assert artifact.nr_devices == 8
        call = jax.jit(artifact.call)
        assert not helpers.collectives(call, *placed)
        helpers.assert_trees_close(call(*placed), helpers.oracle("aniso", x, K)[:3], 1e-12)


def test_x64_of_one_thread(eight_cpu_devices, rng):
    """The right result, or an error that says what to do; not one about shapes from inside JAX."""
    jax.config.update("jax_enable_x64", False)  # the test itself runs under jax.enable_x64(True)
    mesh = Mesh(np.array(eight_cpu_devices[:4]), ("a",))
    x = problem(rng)
    try:
        got = helpers.quick_jit(helpers.outputs("aniso", K))(*helpers.place(mesh, x, LAYOUTS["queries"][0]))
    except jax.errors.JaxRuntimeError as error:
        assert "Set it for all threads" in str(error)
    else:
        helpers.assert_trees_close(got, helpers.oracle("aniso", x, K)[:3], 1e-12)
