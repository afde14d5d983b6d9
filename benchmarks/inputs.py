"""Input clouds, by the names that the documentation uses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

Arrays = tuple[jnp.ndarray, ...]


def rotations(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random rotation matrices (*shape, 3, 3), uniform over SO(3)."""
    q = rng.normal(size=(*shape, 4))
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def uniform(B: int, Q: int, P: int, F: int, seed: int = 0) -> Arrays:
    """q, p, f, sigma, R with every entry from U(0, 1), the entries of R too."""
    rng = np.random.default_rng(seed)
    shapes = ((B, Q, 3), (B, P, 3), (B, P, F), (B, P, 3), (B, P, 3, 3))
    return tuple(jnp.asarray(rng.random(s, dtype=np.float32)) for s in shapes)


def sphere(B: int, Q: int, P: int, F: int, seed: int = 0, shell: float = 0.05) -> Arrays:
    """Points on the unit sphere, random rotations, sigma = (0.3 + 2 U)/(2 h)² with spacing h = √(4π/P); queries at
    radius 1 + shell·N(0, 1)."""
    rng = np.random.default_rng(seed)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    p = unit(rng.normal(size=(B, P, 3)))
    q = unit(rng.normal(size=(B, Q, 3))) * (1 + shell * rng.normal(size=(B, Q, 1)))
    h = np.sqrt(4 * np.pi / P)
    sigma = (0.3 + 2 * rng.random((B, P, 3))) / (2 * h) ** 2
    f = rng.normal(size=(B, P, F))
    return tuple(jnp.asarray(a, jnp.float32) for a in (q, p, f, sigma, rotations(rng, B, P)))
