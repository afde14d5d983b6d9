"""Input clouds, by the names that the documentation uses."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Arrays = tuple[jax.Array, ...]

#: Names of the clouds for searches at scale.
CLOUDS = ("surface", "volume", "far shell")


def rotations(quaternions: jax.Array) -> jax.Array:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), of any length: uniform over SO(3) for normal ones."""
    w, x, y, z = jnp.moveaxis(_unit(quaternions), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def _unit(a: jax.Array) -> jax.Array:
    return a / jnp.linalg.norm(a, axis=-1, keepdims=True)


def uniform(B: int, Q: int, P: int, F: int, seed: int = 0) -> Arrays:
    """q, p, f, sigma, R with every entry from U(0, 1), the entries of R too."""
    rng = np.random.default_rng(seed)
    shapes = ((B, Q, 3), (B, P, 3), (B, P, F), (B, P, 3), (B, P, 3, 3))
    return tuple(jnp.asarray(rng.random(s, dtype=np.float32)) for s in shapes)


def sphere(B: int, Q: int, P: int, F: int, seed: int = 0) -> Arrays:
    """Points on the unit sphere, random rotations, sigma = (0.3 + 2 U)/(2 h)² with spacing h = √(4π/P); queries at
    radius 1 + 0.05·N(0, 1)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    p, q = _unit(normal(B, P, 3)), _unit(normal(B, Q, 3)) * (1 + 0.05 * normal(B, Q, 1))
    h = math.sqrt(4 * math.pi / P)
    sigma = jnp.asarray((0.3 + 2 * rng.random((B, P, 3))) / (2 * h) ** 2, jnp.float32)
    return q, p, normal(B, P, F), sigma, rotations(normal(B, P, 4))


class Clouds:
    """Clouds of different sizes without batch axis, made on the device from one draw of random numbers."""

    def __init__(self, largest: int, seed: int = 0):
        self._draw = _draw(largest, seed)

    def __call__(self, cloud: str, P: int, Q: int) -> Arrays:
        """q, earlier q, p, sigma, R.

        surface: points on the unit sphere, spacing h = √(4π/P), queries at radius 1 + h·N(0, 1).
        far shell: the same, queries at radius 1 + 0.05·N(0, 1).
        volume: points and queries uniform in the unit cube, h = P^(−1/3).
        Of all: random rotations, sigma = (0.3 + 2 U)/(2 h)²; earlier queries are 0.1·h·N(0, 1) away in each axis.
        """
        return _cut(cloud, P, Q, *self._draw)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(n: int, seed: int) -> Arrays:
    keys = jax.random.split(jax.random.key(seed), 8)
    normal = lambda i, d: jax.random.normal(keys[i], (n, d))  # noqa: E731
    uniform = lambda i: jax.random.uniform(keys[i], (n, 3))  # noqa: E731
    of_points = _unit(normal(0, 3)), uniform(1), 0.3 + 2 * uniform(2), rotations(normal(3, 4))
    return *of_points, _unit(normal(4, 3)), normal(5, 1), uniform(6), normal(7, 3)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _cut(cloud: str, P: int, Q: int, *draw: jax.Array) -> Arrays:
    direction_p, cube_p, precision, R, direction_q, height, cube_q, step = draw
    if cloud == "volume":
        h, p, q = P ** (-1 / 3), cube_p[:P], cube_q[:Q]
    else:
        h, p = math.sqrt(4 * math.pi / P), direction_p[:P]
        q = direction_q[:Q] * (1 + {"surface": h, "far shell": 0.05}[cloud] * height[:Q])
    return q, q + 0.1 * h * step[:Q], p, precision[:P] / (2 * h) ** 2, R[:P]
