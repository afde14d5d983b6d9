"""``jax-knn-aggregate doctor``: what is installed, which kernels there are, and whether their results are right."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Literal

import jax
import numpy as np


def main() -> int:
    """Prints the report; returns 0, or 1 where a self-check fails."""
    try:
        import jax_knn_aggregate as jka

        from . import _ffi
    except ImportError as error:
        print(f"jax_knn_aggregate cannot be imported: {error}", file=sys.stderr)
        return 1
    print(f"jax_knn_aggregate {jka.__version__}   jax {jax.__version__}   jaxlib {metadata.version('jaxlib')}")
    print(f"python {platform.python_version()}   {platform.platform()}")
    for key, value in _ffi.build_info().items():
        print(f"built with: {key.replace('_', ' ')} {value}")
    for name in ("cpu", "cuda"):
        targets = sorted(_ffi.TARGETS.get(name, ()))
        print(f"kernels registered for {name}: {', '.join(targets) if targets else 'none'}")
    ok = True
    for device in _devices():
        off = _self_check(device)
        ok &= off < 1e-4
        kernels = "kernels" if _ffi.available("aniso_value", _platform(device)) else "pure JAX"
        print(f"{device}: {kernels}, Eikonal gradient off by {off:.1e}: {'ok' if off < 1e-4 else 'WRONG'}")
    return 0 if ok else 1


def _devices() -> list[jax.Device]:
    devices = list(jax.devices())
    if devices[0].platform != "cpu":
        devices += jax.devices("cpu")
    return devices


def _platform(device: jax.Device) -> str:
    return {"gpu": "cuda"}.get(device.platform, device.platform)


def _self_check(device: jax.Device) -> float:
    """The relative error of an Eikonal step's gradient against the pure-JAX reference on the same device."""
    import jax.numpy as jnp

    import jax_knn_aggregate as jka

    rng = np.random.default_rng(0)
    shapes = ((300, 3), (200, 3), (200, 16), (200, 3), (200, 3, 3))
    x = jax.device_put(tuple(rng.random(s).astype(np.float32) for s in shapes), device)

    def step(implementation: Literal[None, "xla"]) -> tuple[jax.Array, ...]:
        def loss(x: tuple[jax.Array, ...]) -> jax.Array:
            def sdf(q: jax.Array) -> jax.Array:
                _, p, f, sigma, R = x
                return jka.knn_aggregate_aniso(q, p, f, sigma, R, 8, implementation=implementation).f_out.sum()

            return jnp.square(jnp.linalg.norm(jax.grad(sdf)(x[0]), axis=-1) - 1).mean()

        return jax.jit(jax.grad(loss))(x)

    def flat(arrays: tuple[jax.Array, ...]) -> np.ndarray:
        return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])

    ours, reference = flat(step(None)), flat(step("xla"))
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
