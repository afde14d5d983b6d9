"""Built-in solids whose signed distance is exact everywhere, in units of their bounding box diagonal."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .scan import Scan, Truth

Sdf = Callable[[jax.Array], jax.Array]


def _length(a: jax.Array, b: jax.Array) -> jax.Array:
    # The constant gives a derivative at zero. Not hypot: XLA's CPU compiler (jax 0.10.2) gets its gradient wrong here.
    return jnp.sqrt(a * a + b * b + 1e-30)


def _link(centre: tuple[float, float, float], along: int, around: int, half: float, radius: float, tube: float) -> Sdf:
    """A chain link: straight over 2·half along one axis, bent with `radius` in the plane of `along` and `around`."""
    through = 3 - along - around

    def sdf(x: jax.Array) -> jax.Array:
        d = x - jnp.asarray(centre, x.dtype)
        straight = jnp.maximum(jnp.abs(d[along]) - half, 0.0)
        return _length(_length(straight, d[around]) - radius, d[through]) - tube

    return sdf


def _box(half: tuple[float, float, float]) -> Sdf:
    def sdf(x: jax.Array) -> jax.Array:
        d = jnp.abs(x) - jnp.asarray(half, x.dtype)
        outside = jnp.maximum(d, 0.0)
        # sqrt has no derivative at zero, where every point inside the box lands.
        square = (outside * outside).sum()
        return jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0).astype(x.dtype) + jnp.minimum(d.max(), 0.0)

    return sdf


def _union(*solids: Sdf) -> Sdf:
    """Exact inside and outside as long as the solids do not touch."""
    return lambda x: jnp.stack([solid(x) for solid in solids]).min()


# Name -> (signed distance of one point (3,), half extents of the bounding box).
SHAPES: dict[str, tuple[Sdf, tuple[float, float, float]]] = {
    "links": (
        _union(_link((-0.55, 0, 0), 0, 1, 0.4, 0.5, 0.18), _link((0.55, 0, 0), 0, 2, 0.4, 0.5, 0.18)),
        (1.63, 0.68, 0.68),
    ),
    "torus": (_link((0, 0, 0), 0, 1, 0.0, 0.7, 0.3), (1.0, 1.0, 0.3)),
    "plate": (_box((0.5, 0.5, 0.025)), (0.5, 0.5, 0.025)),
}


def shape_scan(name: str, count: int, rng: np.random.Generator) -> Scan:
    """`count` oriented points on a built-in solid, and its exact signed distance as the truth."""
    solid, half = SHAPES[name]
    diagonal = 2.0 * float(np.linalg.norm(half))
    extent = np.asarray(half) / diagonal

    def unit(x: jax.Array) -> jax.Array:
        return solid(x * jnp.float32(diagonal)) / jnp.float32(diagonal)

    value_and_normal = jax.jit(jax.vmap(jax.value_and_grad(unit)))

    def evaluate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, normal = value_and_normal(jnp.asarray(x, jnp.float32))
        return np.asarray(value, np.float64), np.asarray(normal, np.float64)

    def sample(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # Points of a thin shell below the surface, moved onto it: uniform by area up to the curvature over the shell.
        # From inside, as an outer shell would gather points on convex edges.
        shell, kept = 0.004, np.zeros((0, 6))
        while len(kept) < count:
            x = rng.uniform(-extent, extent, (1 << 18, 3))
            value, normal = evaluate(x)
            inside = (value < 0) & (value > -shell)
            kept = np.concatenate([kept, np.concatenate([x - value[:, None] * normal, normal], axis=1)[inside]])
        return kept[:count, :3], kept[:count, 3:]

    def distance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, normal = evaluate(x)
        return np.abs(value), normal

    truth = Truth(sample, distance, lambda x: evaluate(x)[0])
    return Scan(name, "built-in shape", *truth.sample(count, rng), np.zeros(3), diagonal, truth)
