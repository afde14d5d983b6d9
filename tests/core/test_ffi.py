"""Loading the extension: version check, registration, and kernels that refuse wrong operands."""

import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka
from jax_knn_aggregate.core import ffi


@pytest.mark.parametrize("built, runtime", [((0, 3), (0, 3)), ((0, 3), (0, 5)), ((0, 3), None), ((0, 1), (0, 3))])
def test_versions_that_work(built, runtime):
    ffi.check_api_version(built, runtime)


@pytest.mark.parametrize("built, runtime", [((0, 4), (0, 3)), ((1, 0), (0, 9)), ((0, 3), (1, 5))])
def test_versions_that_do_not(built, runtime):
    with pytest.raises(ImportError) as error:
        ffi.check_api_version(built, runtime)
    message = str(error.value)
    for word in (".".join(map(str, built)), ".".join(map(str, runtime)), "jaxlib", "pip install"):
        assert word in message, message


def test_a_wrong_version_registers_nothing(monkeypatch):
    """The check comes before registration, which would take down every backend of JAX."""
    from jax_knn_aggregate import _ext

    class Extension:
        ffi_api_version = staticmethod(lambda: (0, 10**6))
        registrations = staticmethod(_ext.registrations)

    import jax_knn_aggregate

    monkeypatch.setattr(jax_knn_aggregate, "_ext", Extension)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: pytest.fail("registered all the same"))
    with pytest.raises(ImportError, match=r"0\.1000000"):
        ffi._register_extension()


def test_runtime_version_is_found():
    version = ffi._runtime_api_version()
    assert version is not None
    assert version >= (0, 3)


def test_target_names():
    assert isinstance(jka.FFI_TARGETS, tuple)
    registered = {ffi.PREFIX + n for names in ffi.TARGETS.values() for n in names}
    assert set(jka.FFI_TARGETS) == registered
    assert len(set(jka.FFI_TARGETS)) == len(jka.FFI_TARGETS)
    assert set(ffi.TARGETS) <= {"cpu", "cuda"}
    for name in jka.FFI_TARGETS:
        aggregates = r"(aniso|iso)_(index|search|value|jvp|vjp|vjp_vjp|vjp_jvp)|invert"
        roles = rf"{aggregates}|(flat_)?distortion|ray_offsets|hash_grid|mlp|splat_(project|tiles|forward|backward)"
        assert re.fullmatch(rf"jax_knn_aggregate\.({roles})", name), f"{name} is of no op, or of no role"


def test_kernels_are_complete(kernels):
    """Some kernels without the others would leave a derivative to the reference."""
    assert ffi.TARGETS[kernels] >= helpers.REQUIRED


def test_availability():
    assert not ffi.available("aniso_value", "tpu")
    assert not ffi.available("no_such_target", helpers.PLATFORM)


def test_masks_of_many_operands():
    assert ffi.bits([1, None] * 31) == int("01" * 31, 2)
    assert ffi.bits([None] * 62 + [1]) == 2**62
    with pytest.raises(ValueError, match="has bits for 63"):
        ffi.bits([None] * 64)


def test_kernels_check_their_operands(kernels, rng):
    """Operands that Python's checks would never pass: an error of the call, not a crash, and JAX lives on."""
    x = helpers.tree(helpers.cloud(rng, "aniso", 4, 6, 2, dtype=np.float32))
    q, p, f, sigma, R = x
    idxs = jnp.zeros((4, 3), jnp.int32)
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 2), (4, 3), (4, 3))]
    good = (q, p, f, sigma, R, idxs)
    bad = {
        "too few operands": good[:-1],
        "another number of points": (q, p[:-1], f, sigma, R, idxs),
        "a flat R": (q, p, f, sigma, R.reshape(6, 9), idxs),
        "two coordinates": (q[:, :2], p, f, sigma, R, idxs),
        "mixed dtypes": (q, p.astype(jnp.float64), f, sigma, R, idxs),
        "float indices": (q, p, f, sigma, R, idxs.astype(jnp.float32)),
        "other queries' indices": (q, p, f, sigma, R, idxs[:-1]),
    }
    for what, operands in bad.items():
        with pytest.raises(jax.errors.JaxRuntimeError):
            jax.block_until_ready(ffi.call("aniso_value", structs)(*operands))
            pytest.fail(what)
    small = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 2), (4, 3), (4, 2))]
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(ffi.call("aniso_value", small)(*good))
    want = helpers.oracle_values("aniso", helpers.wide(x), np.zeros((4, 3), int))
    for got, w in zip(ffi.call("aniso_value", structs)(*good), want, strict=True):
        helpers.assert_close(got, w, 1e-5)


def test_kernels_read_nothing_out_of_bounds(kernels, rng):
    """Indices that did not pass through Python's range check mean "no neighbour" to a kernel as well."""
    x = helpers.tree(helpers.cloud(rng, "aniso", 4, 6, 2))
    wild = jnp.asarray([[0, 6, -1], [2**31 - 1, 5, -(2**31)], [7, 1, 2], [-6, 100000, 3]], jnp.int32)
    structs = [jax.ShapeDtypeStruct(s, jnp.float64) for s in ((4, 2), (4, 3), (4, 3))]
    got = ffi.call("aniso_value", structs)(*x, wild)
    for name, g, w in zip(helpers.OUTPUTS, got, helpers.oracle_values("aniso", x, np.asarray(wild)), strict=True):
        helpers.assert_close(g, w, 1e-12, name)
