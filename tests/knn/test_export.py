"""jax.export: a round trip through bytes, one artifact for both platforms, symbolic sizes, custom calls declared."""

import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka
from jax_knn_aggregate.core import ffi

Q, P, F, K = 5, 9, 3, 4
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(name) for name in jka.FFI_TARGETS]


def export(fn, x, platforms):
    return jax.export.export(jax.jit(fn), platforms=platforms, disabled_checks=CHECKS)(*x)


def targets(exported):
    return set(re.findall(r"custom_call @(jax_knn_aggregate\.\w+)", str(exported.mlir_module())))


FUNCTIONS = {
    "values": lambda *x: tuple(jka.knn_aggregate_aniso(*x, K)),
    "Eikonal step": jax.value_and_grad(helpers.eikonal(helpers.outputs("aniso", K)), range(5)),
}


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")], ids=["this platform", "cpu and cuda"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.thorough_if(name="values", platforms=[("cpu", "cuda")])
@pytest.mark.thorough_if(name="Eikonal step", platforms=[None])
def test_round_trip(name, platforms, rng):
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))
    read = helpers.through_bytes(FUNCTIONS[name], x, platforms)
    if platforms:
        assert read.platforms == platforms
    want = jax.jit(FUNCTIONS[name])(*x)
    helpers.assert_trees_close(jax.tree.leaves(read.call(*x)), jax.tree.leaves(want), 1e-12)


def test_differentiable_artifact(rng):
    """An exported forward pass brings its derivative along."""
    pytest.importorskip("flatbuffers")
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))

    def fn(*x):
        return helpers.total(jka.knn_aggregate_aniso(*x, K))

    read = jax.export.deserialize(bytearray(export(fn, x, None).serialize(vjp_order=1)))
    helpers.assert_trees_close(jax.grad(read.call, range(5))(*x), jax.jit(jax.grad(fn, range(5)))(*x), 1e-10)


def test_isotropic_and_search(rng):
    x = helpers.tree(helpers.cloud(rng, "iso", Q, P, F))
    loss = helpers.eikonal(helpers.outputs("iso", K))
    exported = export(lambda *x: (jax.grad(loss, range(4))(*x), jka.knn_search(x[0], x[1], K).idxs), x, None)
    assert targets(exported) <= set(jka.FFI_TARGETS)
    bars, idxs = exported.call(*x)
    helpers.assert_trees_close(bars, jax.jit(jax.grad(loss, range(4)))(*x), 1e-12)
    np.testing.assert_array_equal(idxs, helpers.oracle_search("iso", x, K))


def test_artifacts_hold_the_kernels(kernels, rng):
    """What is exported calls the kernels, and is refused without the declared safety checks."""
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))
    exported = export(FUNCTIONS["Eikonal step"], x, None)
    assert {f"jax_knn_aggregate.aniso_{r}" for r in ("search", "value", "vjp", "vjp_vjp")} <= targets(exported)
    with pytest.raises(ValueError, match="jax_knn_aggregate"):
        jax.export.export(jax.jit(FUNCTIONS["Eikonal step"]))(*x)


# ---- Symbolic sizes


@pytest.fixture
def cuda_kernels(monkeypatch):
    """The artifact's part for CUDA calls kernels, also where none were built. It is not run then."""
    if "cuda" not in ffi.TARGETS:
        monkeypatch.setitem(ffi.TARGETS, "cuda", ffi.TARGETS.get("cpu", frozenset()))


def avals(dtype, *shapes):
    """Arrays whose sizes may be letters."""
    scope = jax.export.SymbolicScope()
    return [jax.ShapeDtypeStruct(jax.export.symbolic_shape(s, scope=scope), dtype) for s in shapes]


def symbolic_cloud(metric, q="b, q", cloud=f"b, {P}"):
    rest = (f"{cloud}, 3", f"{cloud}, 3, 3") if metric == "aniso" else (f"{cloud}, 1",)
    return avals(jnp.float64, f"{q}, 3", f"{cloud}, 3", f"{cloud}, {F}", *rest)


def at_sizes(rng, given, sizes):
    """Random arrays in [0, 1) for avals with these sizes; along the last axis they ascend."""
    shapes = [tuple(sizes.get(str(n), n) for n in a.shape) for a in given]
    return [jnp.asarray(np.sort(rng.uniform(size=s), -1), a.dtype) for s, a in zip(shapes, given, strict=True)]


def assert_serves(fn, given, all_sizes, rng):
    """One artifact for both platforms gives at each of these sizes what fn gives there. Returns the artifact."""
    exported = export(fn, given, ("cpu", "cuda"))
    if helpers.PLATFORM in exported.platforms:
        call, direct = helpers.quick_jit(exported.call), helpers.quick_jit(fn)
        for sizes in all_sizes:
            x = at_sizes(rng, given, sizes)
            got, want = jax.tree.leaves(call(*x)), jax.tree.leaves(direct(*x))
            helpers.assert_trees_close(got, want, 1e-10, f"{sizes}")
    return exported


def eikonal_step(metric, implementation=None, over=lambda op: op):
    loss = helpers.eikonal(over(helpers.outputs(metric, K, implementation)))
    return jax.value_and_grad(loss, range(len(helpers.ARGUMENTS[metric])))


def over_scenes(op):
    """Many sets of queries, and one cloud."""
    return lambda q, *cloud: jax.vmap(op, (0, *[None] * len(cloud)))(q, *cloud)


def searches(q, p, f, sigma, R):
    lengths = jnp.full(q.shape[0], P - 1)
    index = jka.build_index(p, sigma, R, p_lengths=lengths)
    guess = jka.knn_search(q, p, 2).idxs
    lookup = jka.knn_aggregate_aniso_lookup(q, p, f, sigma, R, jka.build_knn_table(p, K), K)
    precomputed = jka.knn_aggregate_aniso_precomputed(q, p, f, sigma, R, lookup.idxs)
    return (
        jka.knn_search_aniso(q, p, sigma, R, K, p_lengths=lengths, index=index),
        jka.knn_search_aniso(q, p, sigma, R, K, warm_idxs=guess),
        lookup,
        precomputed,
    )


SYMBOLIC = {
    "Eikonal step": (eikonal_step("aniso"), symbolic_cloud("aniso")),
    "isotropic": (eikonal_step("iso"), symbolic_cloud("iso")),
    "one scene": (eikonal_step("aniso"), symbolic_cloud("aniso", "q", f"{P}")),
    "one cloud, many scenes": (eikonal_step("aniso", over=over_scenes), symbolic_cloud("aniso", "b, q", f"{P}")),
    "searches": (searches, symbolic_cloud("aniso")),
}
SCENES = [{"b": 1, "q": 1}, {"b": 1, "q": 6}, {"b": 3, "q": 5}]


@pytest.mark.parametrize("name", SYMBOLIC)
@pytest.mark.thorough_if(name=["isotropic", "one scene", "one cloud, many scenes"])
def test_symbolic_scenes_and_queries(name, rng, kernels, cuda_kernels):
    fn, given = SYMBOLIC[name]
    exported = assert_serves(fn, given, SCENES, rng)
    assert "top_k" not in str(exported.mlir_module()), "a part of the artifact searches by the reference"


@pytest.mark.thorough_if()
def test_symbolic_scenes_and_queries_of_the_reference(rng):
    """So on a platform without kernels, in more than one chunk of queries."""

    def fn(*x):
        op = helpers.outputs("aniso", K, "xla")
        return jax.value_and_grad(lambda *x: helpers.total(op(*x)), range(5))(*x)

    assert_serves(fn, symbolic_cloud("aniso"), [{"b": 1, "q": 1}, {"b": 2, "q": 300}], rng)


def test_symbolic_queries_count_as_many(rng, kernels, cuda_kernels):
    """What CUDA does with a large cloud is decided at export: it gets an index."""

    def fn(q, p):
        return jka.knn_search(q, p, K)

    exported = assert_serves(fn, avals(jnp.float64, "q, 3", "9000, 3"), [{"q": 1}, {"q": 5}], rng)
    assert {"jax_knn_aggregate.iso_index", "jax_knn_aggregate.iso_search"} <= targets(exported)


def second_order(loss, argnums):
    """Value, gradient, and the gradient of |gradient|²."""

    def squared(*x):
        value, bars = jax.value_and_grad(loss, argnums)(*x)
        return sum(jnp.sum(b * b) for b in bars), (value, bars)

    return jax.grad(squared, argnums, has_aux=True)


def dense(w, m, interval, **options):
    return jka.distortion_loss(w, m, interval, **options)


def flat(w, m, interval, ids, **options):
    ray_id = jnp.floor(5 * ids - 1).astype(jnp.int32)  # from −1 to 3, ascending as ids do
    return jka.flatten_distortion_loss(w, m, interval, ray_id, 3, **options)


@pytest.mark.parametrize("shared", [False, True], ids=["intervals", "one interval"])
@pytest.mark.parametrize("layout", ["dense", "flat"])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(layout="dense", shared=True)
@pytest.mark.thorough_if(layout="flat", shared=False)
def test_symbolic_rays_and_samples(layout, shared, implementation, rng, cuda_kernels):
    fn, shape = {"dense": (dense, "r, n"), "flat": (flat, "n")}[layout]
    given = avals(jnp.float64, *[shape] * (2 if shared else 3), *(["n"] if layout == "flat" else []))

    def loss(w, m, *rest):
        interval, *ids = (0.3 * m.mean(), *rest) if shared else rest
        return fn(w, m, interval, *ids, implementation=implementation)

    sizes = [{"r": 1, "n": 1}, {"r": 3, "n": 1}, {"r": 2, "n": 70}]
    exported = assert_serves(second_order(loss, range(2 if shared else 3)), given, sizes, rng)
    assert bool(targets(exported)) == (implementation == "ffi")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.thorough_if(reduction=["sum", "none"])
def test_symbolic_sizes_with_options(reduction, rng, cuda_kernels):
    def fn(w, m, ids):
        options = {"reduction": reduction, "sort": True}
        return dense(w[None], m[None], 0.3, **options), flat(w, m, 0.3, ids, **options)

    assert_serves(fn, avals(jnp.float64, "n", "n", "n"), [{"n": 1}, {"n": 9}], rng)


def test_what_cannot_be_symbolic():
    x = symbolic_cloud("aniso", cloud="b, p")
    q, p, _, sigma, R = x
    for fn, args in (
        (lambda *x: jka.knn_aggregate_aniso(*x, K).f_out, x),
        (lambda q, p: jka.knn_search(q, p, K).idxs, (q, p)),
        (lambda *x: jka.knn_aggregate_aniso_precomputed(*x, jnp.zeros((*x[0].shape[:2], K), int)), x),
        (lambda p, sigma, R: jka.build_index(p, sigma, R).order, (p, sigma, R)),
        (lambda p: jka.build_knn_table(p, K), (p,)),
    ):
        with pytest.raises(ValueError, match=r"^p has P = p points, which is symbolic, .*fixed P, .*p_lengths\."):
            export(fn, args, None)
    (table,) = avals(jnp.int32, f"{P}, k")
    y = helpers.tree(helpers.cloud(np.random.default_rng(0), "aniso", Q, P, F))
    with pytest.raises(ValueError, match=r"^K is 4, expected K <= k, the width of knn_table, which is symbolic"):
        export(lambda table: jka.knn_aggregate_aniso_lookup(*y, table, K).f_out, [table], None)
    (w,) = avals(jnp.float64, "n")
    with pytest.raises(TypeError, match="n_rays is n, expected a Python integer"):
        export(lambda w: jka.flatten_distortion_loss(w, w, 0.1, jnp.zeros(w.shape, int), w.shape[0]), [w], None)
