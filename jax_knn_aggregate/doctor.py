"""``jax-knn-aggregate doctor``: what is installed, which kernels there are, and whether their results are right."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import (
    HashGrid,
    __version__,
    distortion_loss,
    flatten_distortion_loss,
    hash_grid,
    knn_aggregate,
    knn_aggregate_aniso,
    mlp,
    render_gaussians,
)
from .core import ffi

Arrays = tuple[jax.Array, ...]
TOLERANCE = 1e-4


def main() -> int:
    """Prints the report; returns 0, or 1 where a self-check fails."""
    print(f"jax_knn_aggregate {__version__}   jax {jax.__version__}   jaxlib {metadata.version('jaxlib')}")
    print(f"python {platform.python_version()}   {platform.platform()}")
    for key, value in ffi.build_info().items():
        print(f"built with: {key.replace('_', ' ')} {value}")
    for name in ("cpu", "cuda"):
        targets = sorted(ffi.TARGETS.get(name, ()))
        print(f"kernels registered for {name}: {', '.join(targets) if targets else 'none'}")
    ok = True
    for device in _devices():
        for name, target, fn, x in _families():
            kernels = "kernels" if ffi.available(target, _platform(device)) else "pure JAX"
            off = _self_check(fn, jax.device_put(x, device))
            ok &= off < TOLERANCE
            print(f"{device}: {name}: {kernels}, gradients off by {off:.1e}: {'ok' if off < TOLERANCE else 'WRONG'}")
    return 0 if ok else 1


def _devices() -> list[jax.Device]:
    devices = list(jax.devices())
    if devices[0].platform != "cpu":
        devices += jax.devices("cpu")
    return devices


def _platform(device: jax.Device) -> str:
    return {"gpu": "cuda"}.get(device.platform, device.platform)


def _families() -> Iterator[tuple[str, str, Callable[..., jax.Array], tuple[np.ndarray, ...]]]:
    """Name, one target, function and arguments of each family."""
    rng = np.random.default_rng(0)

    def arrays(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        return tuple(rng.random(s).astype(np.float32) for s in shapes)

    def aniso(q: Any, p: Any, f: Any, sigma: Any, R: Any, **options: Any) -> jax.Array:
        return knn_aggregate_aniso(q, p, f, sigma, R, 8, **options).f_out

    def iso(q: Any, p: Any, f: Any, sigma: Any, **options: Any) -> jax.Array:
        return knn_aggregate(q, p, f, sigma, 8, **options).f_out

    def equal(w: Any, m: Any, interval: Any, **options: Any) -> jax.Array:
        return distortion_loss(w, m, interval, sort=True, **options)

    def flattened(w: Any, m: Any, interval: Any, **options: Any) -> jax.Array:
        return flatten_distortion_loss(w, m, interval, ids, 40, sort=True, **options)

    def encoded(x: Any, table: Any, **options: Any) -> jax.Array:
        return hash_grid(x, table, grid, **options)

    def network(x: Any, first: Any, second: Any, bias: Any, **options: Any) -> jax.Array:
        biases = bias, bias[:1]
        return mlp(x, (first, second), biases, activation="softplus", precision="highest", **options)

    def seen(offset: Any, scales: Any, opacities: Any, colors: Any, **options: Any) -> jax.Array:
        args = means, quats, scales / 5, opacities, colors, camera, K, 40, 30  # kernels see nothing of means and pose
        r = render_gaussians(*args, means2d_offset=offset, **options)
        return r.image.sum() + r.alpha.sum() + r.depth.sum()

    ids = np.sort(rng.integers(0, 40, 800))
    grid = HashGrid(dim=2, levels=8, log2_hashmap_size=8, per_level_scale=1.5, interpolation="smoothstep")
    camera, K = np.eye(4, dtype=np.float32), np.array([[40, 0, 0], [0, 40, 0], [0, 0, 1]], np.float32)
    means, quats = arrays((100, 3), (100, 4))
    points = (300, 3), (200, 3), (200, 16)
    yield "knn_aggregate_aniso", "aniso_value", aniso, arrays(*points, (200, 3), (200, 3, 3))
    yield "knn_aggregate", "iso_value", iso, arrays(*points, (200, 1))
    yield "distortion_loss", "distortion", equal, arrays(*[(20, 40)] * 3)
    yield "flatten_distortion_loss", "flat_distortion", flattened, arrays(*[(800,)] * 3)
    yield "hash_grid", "hash_grid", encoded, arrays((300, 2), (grid.rows, grid.features))
    yield "mlp", "mlp", network, arrays((300, 5), (32, 5), (1, 32), (32,))
    yield "render_gaussians", "splat_forward", seen, arrays((100, 2), (100, 3), (100,), (100, 3))


def _self_check(fn: Callable[..., jax.Array], x: Arrays) -> float:
    """The largest relative error of gradients of first and second order against the pure-JAX reference."""

    def step(implementation: str | None) -> Arrays:
        def loss(x: Arrays) -> jax.Array:
            def value(first: jax.Array) -> jax.Array:
                return jnp.square(fn(first, *x[1:], implementation=implementation)).sum()

            y, gradient = jax.value_and_grad(value)(x[0])
            return y + jnp.square(gradient).sum()

        return jax.jit(jax.grad(loss))(x)

    def error(got: jax.Array, want: jax.Array) -> float:
        g, w = np.asarray(got, np.float64), np.asarray(want, np.float64)
        return float(np.linalg.norm(g - w) / np.linalg.norm(w))

    return max(map(error, step(None), step("xla")))
