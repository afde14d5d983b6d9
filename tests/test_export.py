"""jax.export: a round trip through bytes, one artifact for both platforms, every custom call declared."""

import re

import helpers
import jax
import numpy as np
import pytest

import jax_knn_aggregate as jka

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
def test_round_trip(name, platforms, rng):
    if platforms and helpers.PLATFORM not in platforms:
        pytest.skip(f"the artifact for {platforms} does not run on {helpers.PLATFORM}")
    pytest.importorskip("flatbuffers")
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))
    data = export(FUNCTIONS[name], x, platforms).serialize()
    read = jax.export.deserialize(bytearray(data))
    if platforms:
        assert read.platforms == platforms
    assert targets(read) <= set(jka.FFI_TARGETS)
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
