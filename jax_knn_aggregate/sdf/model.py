"""The signed distance field: oriented feature points aggregated by `knn_aggregate_aniso`, and a small MLP."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

from .. import knn_aggregate_aniso
from ..core.checks import Implementation


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` or fewer points (N,3) that spread evenly: each is the farthest from those before it."""
    chosen = [0]
    gap = ((points - points[0]) ** 2).sum(axis=1)
    while len(chosen) < count and gap.max() > 0:
        chosen.append(int(gap.argmax()))
        gap = np.minimum(gap, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return np.asarray(chosen)


def _quaternions(normals: np.ndarray) -> np.ndarray:
    """Unit quaternions (N,4), scalar first, of the shortest rotations that take normals (N,3) to the third axis."""
    x, y, z = normals.T
    q = np.stack([1 + z, y, -x, np.zeros_like(x)], axis=1)
    q[z < -0.9999] = (0, 1, 0, 0)  # half a turn: the axis is free
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def _rotations(q: jax.Array) -> jax.Array:
    """Rotation matrices (N,3,3) of quaternions (N,4) of any length but zero."""
    w, x, y, z = (q / jnp.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _bend(x: jax.Array) -> jax.Array:
    """A smooth ramp with a bend sharp enough for the creases of a distance field."""
    return jax.nn.softplus(30 * x) / 30


class Coarse(eqx.Module):
    """A coordinate network: coarse signed distance (Q,) of queries (Q,3)."""

    layers: eqx.nn.MLP

    def __init__(self, *, key: jax.Array):
        self.layers = eqx.nn.MLP(3, "scalar", 64, 3, _bend, dtype=jnp.float32, key=key)

    def __call__(self, q: jax.Array) -> jax.Array:
        return jax.vmap(self.layers)(6 * q)


@eqx.filter_jit  # one compilation instead of one a layer
def _networks(
    key: jax.Array, points: int, features: int, width: int, depth: int
) -> tuple[jax.Array, eqx.nn.MLP, Coarse]:
    head_key, space_key, feature_key = jax.random.split(key, 3)
    head = eqx.nn.MLP(features + 5, "scalar", width, depth, _bend, dtype=jnp.float32, key=head_key)
    # A silent last layer: training starts from the tangent planes.
    head = eqx.tree_at(lambda mlp: (mlp.layers[-1].weight, mlp.layers[-1].bias), head, replace_fn=jnp.zeros_like)
    return 0.1 * jax.random.normal(feature_key, (points, features), jnp.float32), head, Coarse(key=space_key)


class SignedDistance(eqx.Module):
    """Signed distance (Q,) of queries (Q,3), negative inside, lengths in bounding box diagonals.

    Each feature point has a position, a rotation whose third row is its normal, three precisions along the rotated
    axes, and a feature row. A query meets the tangent planes of its K nearest points, in the points' own metrics;
    their weighted mean is a first distance, and the MLP corrects it from the aggregated features. Everything learns.
    """

    points: jax.Array  # (P,3), in spacings: all parameters are of order 1 and share a learning rate
    quaternions: jax.Array  # (P,4)
    log_precisions: jax.Array  # (P,3), of sigma · spacing²
    features: jax.Array  # (P,F)
    head: eqx.nn.MLP  # feature and local geometry -> correction of the planes, near the points
    space: Coarse  # the distance where no point reaches
    spacing: float = eqx.field(static=True)
    neighbours: int = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)

    def __init__(
        self,
        points: np.ndarray,
        normals: np.ndarray,
        *,
        features: int,
        neighbours: int,
        width: int,
        depth: int,
        implementation: Implementation,
        key: jax.Array,
    ):
        """Starts at oriented points (P,3), (P,3), where the distance is already that to the blended tangent planes."""
        self.spacing = float(np.median(cKDTree(points).query(points, k=2)[0][:, 1]))
        self.points = jnp.asarray(points / self.spacing, jnp.float32)
        self.quaternions = jnp.asarray(_quaternions(normals), jnp.float32)
        self.log_precisions = jnp.zeros((len(points), 3), jnp.float32)
        self.features, self.head, self.space = _networks(key, len(points), features, width, depth)
        self.neighbours = min(neighbours, len(points))
        self.implementation = implementation

    def __call__(self, q: jax.Array) -> jax.Array:
        h = self.spacing
        p = h * self.points
        R = _rotations(self.quaternions)
        sigma = jnp.exp(self.log_precisions) / h**2
        near = knn_aggregate_aniso(q, p, self.features, sigma, R, self.neighbours, implementation=self.implementation)
        weight = near.w_out.sum(
            axis=-1
        )  # vanishes some spacings away, unlike the softmax, which is the same but for a factor
        feature = near.f_out / (weight[:, None] + 1e-3)
        share = jax.nn.softmax(-near.dists, axis=-1)
        d = q[:, None, :] - p[near.idxs]  # (Q,K,3)
        plane = (R[:, 2][near.idxs] * d).sum(axis=-1)  # (Q,K)
        mean = (share * plane).sum(axis=-1)
        # Where two planes meet at an edge, their maximum or minimum is mean ± spread.
        spread = jnp.sqrt((share * (plane - mean[:, None]) ** 2).sum(axis=-1) + (0.05 * h) ** 2)
        offset = (share[:, :, None] * d).sum(axis=1)  # (Q,3)
        reach = jnp.sqrt((offset * offset).sum(axis=-1) + h**2)
        local = jnp.concatenate([mean[:, None], spread[:, None], offset], axis=1) / reach[:, None]
        surface = mean + reach * jax.vmap(self.head)(jnp.concatenate([feature, local], axis=1))
        # Some spacings away the weights vanish and the nearest planes say little: the coarse field takes over.
        space = self.space(q)
        return space + weight / (weight + 0.05) * (surface - space)


def value_and_gradient(model: Callable[[jax.Array], jax.Array], q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signed distances (Q,) and their gradients (Q,3) at q (Q,3)."""

    def total(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = model(q)
        return value.sum(), value

    gradient, value = jax.grad(total, has_aux=True)(q)
    return value, gradient
