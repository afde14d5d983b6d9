"""The distortion loss against plain JAX: value, gradient in w, both, and second order, of equal and of ragged rays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_knn_aggregate as jka

from ..harness.measure import OURS, Case, Program, Session

Loss = Callable[..., jax.Array]


def _plain(w: jax.Array, m: jax.Array, interval: float) -> jax.Array:
    """What one writes without this package: 2 Σ_i w_i (m_i W_i − M_i), with W and M sums over the samples before."""
    W, M = jnp.cumsum(w, -1) - w, jnp.cumsum(w * m, -1) - w * m
    return ((interval / 3 * w * w) + 2 * w * (m * W - M)).sum(-1).mean()


def _plain_flat(w: jax.Array, m: jax.Array, interval: float, ray_id: jax.Array, n_rays: int) -> jax.Array:
    """The same with sums over all rays, from which those at the ray's begin are taken off."""
    begin = jnp.searchsorted(ray_id, jnp.arange(n_rays, dtype=ray_id.dtype))[ray_id]
    W, M = jnp.cumsum(w) - w, jnp.cumsum(w * m) - w * m
    terms = (interval / 3 * w * w) + 2 * w * (m * (W - W[begin]) - (M - M[begin]))
    return jax.ops.segment_sum(terms, ray_id, n_rays, indices_are_sorted=True).mean()


def steps(loss: Loss, x: tuple[jax.Array, ...]) -> dict[str, Program]:
    """Programs on fixed inputs, w first. second order: the gradient in w of |gradient in w|²."""
    fns = {
        "forward": loss,
        "gradient": jax.grad(loss),
        "value and gradient": jax.value_and_grad(loss),
        "second order": jax.grad(lambda *x: jnp.square(jax.grad(loss)(*x)).sum()),
    }
    return {name: Program(fn, *x) for name, fn in fns.items()}


def _workload(lengths: np.ndarray, ragged: bool) -> tuple[str, tuple[jax.Array, ...], dict[str, Loss]]:
    """Rays of these lengths: a name, (w, m) or (w, m, ray_id), and the loss as each contestant has it. float32."""
    rng = np.random.default_rng(0)
    ray_id = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    w = rng.random(len(ray_id), dtype=np.float32)
    # Ascending within each ray: one more for each sample, some way of it for chance.
    index = np.arange(len(ray_id)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    m = ((index + rng.random(len(ray_id))) / np.repeat(lengths, lengths)).astype(np.float32)
    n, interval = len(lengths), 1 / 128
    if ragged:
        name = f"{n} rays of 1 to {lengths.max()}, {len(ray_id) / 1e6:.1f} M samples"
        losses: dict[str, Loss] = {
            "jax_knn_aggregate": lambda w, m, ids: jka.flatten_distortion_loss(w, m, interval, ids, n),
            "plain JAX, cumsum": lambda w, m, ids: _plain_flat(w, m, interval, ids, n),
        }
        return name, (jnp.asarray(w), jnp.asarray(m), jnp.asarray(ray_id)), losses
    losses = {
        "jax_knn_aggregate": lambda w, m: jka.distortion_loss(w, m, interval),
        "plain JAX, cumsum": lambda w, m: _plain(w, m, interval),
    }
    return f"{n} rays of {lengths[0]}", (jnp.asarray(w.reshape(n, -1)), jnp.asarray(m.reshape(n, -1))), losses


def workloads(large: bool, quick: bool = False) -> list[tuple[str, tuple[jax.Array, ...], dict[str, Loss]]]:
    """Equal rays and ragged ones. The large workloads are for GPUs."""
    rays, longest, ragged = (65536, 512, 65536) if large else (8192, 128, 2048)
    if quick:
        rays, longest, ragged = 64, 8, 64
    lengths = np.random.default_rng(1).integers(1, 2 * longest + 1 if quick else 1025, ragged)
    equal = {(min(rays, 8192), min(longest, 128)), (rays, longest)}
    return [
        *(_workload(np.full(n, length), ragged=False) for n, length in sorted(equal)),
        _workload(lengths, ragged=True),
    ]


def run(session: Session) -> dict[str, Any]:
    """Milliseconds, and ratios of plain JAX's to ours."""
    cases, samples = [], {}
    for name, arrays, losses in workloads(session.large, session.quick):
        samples[name] = arrays[0].size
        programs = {who: steps(loss, arrays) for who, loss in losses.items()}
        cases += [Case((name, column), {who: p[column] for who, p in programs.items()}) for column in programs[OURS]]
    ms = session.measure(cases)
    faster = {
        name: {c: t["plain JAX, cumsum"]["median_ms"] / t[OURS]["median_ms"] for c, t in columns.items()}
        for name, columns in ms.items()
    }
    return {"samples": samples, "ms": ms, "times_faster_than_plain_JAX": faster}
