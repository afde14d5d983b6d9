"""The distortion loss in pure JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from ...core.family import Operands


def _terms(w: jax.Array, m: jax.Array, interval: jax.Array, gap: jax.Array, before: Any, after: Any) -> jax.Array:
    """What each sample adds to L: gap is that to the sample before it, before and after the masses on either side.

    The gap in front of sample i lies between all samples before i and all from i on, whence Σ_i gap_i before_i (w_i +
    after_i) is half the second sum of L. Its derivative in m would be a difference of two such products, and inexact.
    But L is linear in m as long as the order stays: the derivative that belongs there is added with the value 0.
    """
    fixed = lax.stop_gradient
    pairs = fixed(gap) * before * (w + after) + (m - fixed(m)) * w * (before - after)
    return interval * w * w / 3 + 2 * pairs


def dense_reference(x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
    """w (N,), m (N,), interval (N,) or (1,) -> L ()."""
    w, m, interval = x
    before = jnp.cumsum(jnp.pad(w, (1, 0))[:-1])
    after = jnp.cumsum(jnp.pad(w, (0, 1))[:0:-1])[::-1]
    return (_terms(w, m, interval, jnp.diff(m, prepend=m[:1]), before, after).sum(),)


def flat_reference(x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
    """w (N,), m (N,), interval (N,) or (1,), offsets (R + 1,) -> L (R,)."""
    (w, m, interval), (offsets,) = x, aux
    N, R = w.shape[0], offsets.shape[0] - 1
    index = jnp.arange(N, dtype=jnp.int32)
    ray = jnp.searchsorted(offsets, index, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    inside = (ray >= 0) & (ray < R)
    w, m = (jnp.where(inside, a, jnp.zeros_like(a)) for a in (w, m))  # a NaN outside stays there
    bounds = jnp.concatenate([offsets[:1] * 0, offsets, offsets[:1] * 0 + N])
    begin, end = bounds[ray + 1], bounds[ray + 2]
    gap = jnp.where(index > begin, m - jnp.pad(m, (1, 0))[:-1], jnp.zeros_like(m))
    before = _sums_before(w, begin)
    after = _sums_before(w[::-1], N - end[::-1])[::-1]
    terms = _terms(w, m, interval, gap, before, after)
    return (jnp.zeros(R + 1, w.dtype).at[jnp.where(inside, ray, R)].add(terms)[:R],)


def _sums_before(x: jax.Array, begin: jax.Array) -> jax.Array:
    """Σ of x[j] over begin[i] <= j < i, for each i, by doubling: no ray's sums meet those of another."""
    N = x.shape[0]
    index = jnp.arange(N, dtype=jnp.int32)

    def back(a: jax.Array, step: Any) -> jax.Array:
        reached = index - step >= begin
        moved = jnp.roll(a, step) if is_symbolic_dim(N) else jnp.pad(a, (step, 0))[:N]
        return jnp.where(reached, moved, jnp.zeros_like(a))

    sums, step = back(x, 1), 1
    if is_symbolic_dim(N):  # as often as the largest N needs
        return lax.fori_loop(0, 31, lambda i, sums: sums + back(sums, jnp.int32(1) << i.astype(jnp.int32)), sums)
    while step < N:
        sums, step = sums + back(sums, step), 2 * step
    return sums
