"""Fitting the signed distance field: samples, losses and the optax loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.spatial import cKDTree

from ..core.checks import Implementation
from .model import Coarse, SignedDistance, farthest_points, value_and_gradient
from .scan import Scan

Report = Callable[[str, int, dict[str, float]], None]  # phase, step, parts of the loss
Model = TypeVar("Model", bound=eqx.Module)
Loss = Callable[[Model, "Samples", "Config", jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
MARGIN = 0.08  # free space around the bounding box, in diagonals


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and weights of a fit. `batch` is queries on the surface a step; half as many lie near it, half in space.

    On CPU a larger batch costs more than its share: from 32 MB on, each step's temporary memory comes fresh from the
    operating system.
    """

    steps: int = 1200
    points: int = 4000
    neighbours: int = 12
    features: int = 16
    width: int = 48
    depth: int = 2
    batch: int = 1024
    samples: int = 100_000
    learning_rate: float = 1e-2
    seed: int = 0
    implementation: Implementation = None
    surface_weight: float = 30.0
    normal_weight: float = 1.0
    free_weight: float = 10.0
    eikonal_weight: float = 1.0


class Samples(eqx.Module):
    """What the losses draw from: points (N,3) with normals (N,3), and free space (M,3) with signed distances (M,)."""

    points: jax.Array
    normals: jax.Array
    free: jax.Array
    free_distance: jax.Array


def bounds(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Corners (3,), (3,) of the box a fit covers: the points' bounding box and a margin."""
    return scan.points.min(axis=0) - MARGIN, scan.points.max(axis=0) + MARGIN


def draw_samples(scan: Scan, count: int, rng: np.random.Generator) -> Samples:
    """Training samples, with `count` or fewer of them in free space.

    In free space the distance is that to the nearest point, which is right to a few per cent from two sample spacings
    on; the sign is that of the tangent planes, and positions where the nearest planes disagree are left out.
    """
    low, high = bounds(scan)
    tree = cKDTree(scan.points)
    spacing = float(np.median(tree.query(scan.points[:: max(1, len(scan.points) // 2000)], k=2)[0][:, 1]))
    shell = scan.points[rng.integers(len(scan.points), size=count // 2)] + rng.normal(0, 0.03, (count // 2, 3))
    x = np.concatenate([rng.uniform(low, high, (count - count // 2, 3)), np.clip(shell, low, high)])
    gap, near = tree.query(x, k=min(8, len(scan.points)))
    side = np.sign(((x[:, None] - scan.points[near]) * scan.normals[near]).sum(axis=-1))
    clear = (side == side[:, :1]).all(axis=1) & (side[:, 0] != 0) & (gap[:, 0] > 2 * spacing)
    arrays = scan.points, scan.normals, x[clear], (side[:, 0] * gap[:, 0])[clear]
    return Samples(*(jnp.asarray(array, jnp.float32) for array in arrays))


def losses(model: SignedDistance, samples: Samples, config: Config, key: jax.Array) -> tuple[jax.Array, dict]:
    """Weighted loss () and its parts, on a random batch."""
    n = config.batch
    pick, move, space = jax.random.split(key, 3)
    i = jax.random.randint(pick, (n,), 0, len(samples.points))
    j = jax.random.randint(space, (n // 2,), 0, len(samples.free))
    x = samples.points[i]
    near = x[: n // 2] + model.spacing * jax.random.normal(move, (n // 2, 3), jnp.float32)
    value, gradient = value_and_gradient(model, jnp.concatenate([x, near, samples.free[j]]))
    parts = {
        "surface": jnp.abs(value[:n]).mean(),
        "normal": _length(gradient[:n] - samples.normals[i]).mean(),
        "free": jnp.abs(value[n + n // 2 :] - samples.free_distance[j]).mean(),
        "eikonal": ((_length(gradient) - 1) ** 2).mean(),
    }
    total = (
        config.surface_weight * parts["surface"]
        + config.normal_weight * parts["normal"]
        + config.free_weight * parts["free"]
        + config.eikonal_weight * parts["eikonal"]
    )
    return total, {"loss": total, **parts}


def _coarse_losses(space: Coarse, samples: Samples, config: Config, key: jax.Array) -> tuple[jax.Array, dict]:
    j = jax.random.randint(key, (config.batch // 2,), 0, len(samples.free))
    value, gradient = value_and_gradient(space, samples.free[j])
    parts = {
        "free": jnp.abs(value - samples.free_distance[j]).mean(),
        "eikonal": ((_length(gradient) - 1) ** 2).mean(),
    }
    total = config.free_weight * parts["free"] + config.eikonal_weight * parts["eikonal"]
    return total, {"loss": total, **parts}


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x * x).sum(axis=-1) + 1e-12)  # with a derivative at zero


def _optimiser(config: Config) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01))


@eqx.filter_jit(donate="all-except-first")
def _update(
    samples: Samples, model: Model, state: optax.OptState, key: jax.Array, loss: Loss[Model], config: Config
) -> tuple[Model, optax.OptState, dict[str, jax.Array]]:
    (_, parts), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, samples, config, key)
    updates, state = _optimiser(config).update(grads, state)
    return eqx.apply_updates(model, updates), state, parts


def _descend(
    phase: str, model: Model, loss: Loss[Model], samples: Samples, config: Config, key: jax.Array, report: Report
) -> Model:
    """Adam, config.steps long."""
    state = _optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    for step, step_key in enumerate(jax.random.split(key, config.steps), start=1):
        model, state, parts = _update(samples, model, state, step_key, loss, config)
        if step % 10 == 0 or step == config.steps:
            report(phase, step, {name: float(part) for name, part in parts.items()})
    return model


def fit(scan: Scan, config: Config, report: Report) -> SignedDistance:
    """Trains a field on the scan. `report` is called now and then, and after the last step of each phase."""
    rng = np.random.default_rng(config.seed)
    init_key, space_key, key = jax.random.split(jax.random.key(config.seed), 3)
    subset = rng.permutation(len(scan.points))[:20_000]
    start = subset[farthest_points(scan.points[subset], min(config.points, max(len(subset) // 2, 16)))]
    model = SignedDistance(
        scan.points[start],
        scan.normals[start],
        features=config.features,
        neighbours=config.neighbours,
        width=config.width,
        depth=config.depth,
        implementation=config.implementation,
        key=init_key,
    )
    samples = draw_samples(scan, config.samples, rng)
    # The coarse field first: far from right, it would bend the features towards it where the two meet.
    space = _descend("space", model.space, _coarse_losses, samples, config, space_key, report)
    model = eqx.tree_at(lambda model: model.space, model, space)
    return _descend("surface", model, losses, samples, config, key, report)
