"""Blending in pure JAX: what runs where there is no kernel, and what orders beyond the second differentiate."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...core.batch import known
from ...core.family import Operands

#: Side of the square tiles in which ``reach`` counts (kTile of csrc/splat/splat.h).
TILE = 16
#: The most that a Gaussian covers, the least at which it counts, and the transmittance at which a pixel stops.
MOST_ALPHA, LEAST_ALPHA, LEAST_TRANSMITTANCE = 0.99, 1 / 255, 1e-4
#: Pairs of pixel and Gaussian that are looked at at a time: bounds what derivatives keep in memory.
_PAIRS = 2**19


def reference(width: int, height: int, x: Operands, aux: Operands) -> tuple[jax.Array, jax.Array]:
    """means2d (P, 2), conics (P, 3), opacities (P,), channels (P, C), background (C,); order (P,), reach (P, 4) or
    nothing -> image (height, width, C), alpha (height, width).

    Every pixel meets every Gaussian, in chunks front to back, so that no lists are needed. Derivatives compute chunks
    again: what they keep is a state for each chunk of some pixels.
    """
    *gaussians, background = x
    order, *reach = aux
    P, C = known(order.shape[0], 2**17), background.shape[0]
    chunk = min(max(16, 2 ** math.ceil(math.log2(max(P, 1)) / 2)), 512)
    block = min(_PAIRS // chunk, width * height)
    chunks, blocks = -(-order.shape[0] // chunk), -(-width * height // block)

    def in_chunks(a: jax.Array) -> jax.Array:
        """Front to back, with Gaussians of opacity 0 behind all."""
        padded = jnp.pad(a[order], [(0, chunks * chunk - a.shape[0])] + [(0, 0)] * (a.ndim - 1))
        return padded.reshape(chunks, chunk, *a.shape[1:])

    walked = [in_chunks(a) for a in (*gaussians, *reach)]

    @jax.checkpoint
    def blend(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = pixels % width, pixels // width
        start = [jnp.zeros(shape, background.dtype) for shape in ((block,), (block, C), (block,))]
        (_, image, alpha), _ = lax.scan(
            lambda state, some: (_blend_chunk(place, state, *some), None), _varying_as(background, start), walked
        )
        return image + (1 - alpha)[:, None] * background[None], alpha

    image, alpha = lax.map(blend, jnp.arange(blocks * block, dtype=jnp.int32).reshape(blocks, block))
    whole = [a.reshape(blocks * block, *a.shape[2:])[: width * height] for a in (image, alpha)]
    return whole[0].reshape(height, width, -1), whole[1].reshape(height, width)


def _varying_as(like: jax.Array, arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Inside shard_map, what a loop carries must vary over devices from the start."""
    varying = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
    return tuple(lax.pcast(a, varying, to="varying") if varying else a for a in arrays)


@jax.checkpoint
def _blend_chunk(
    place: tuple[jax.Array, jax.Array],
    state: tuple[jax.Array, jax.Array, jax.Array],
    means: jax.Array,
    conics: jax.Array,
    opacities: jax.Array,
    channels: jax.Array,
    *reach: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """State of each pixel: logarithm of the transmittance as if it never stopped, image, alpha."""
    through, image, covered = state
    alpha = _alpha(place, means, conics, opacities, *reach)  # (chunk, block)
    rest = jnp.log1p(-alpha)
    after = through[None] + _running_sum(rest)
    # Transmittance never grows: behind the first Gaussian that would bring it under the limit, all would.
    weights = jnp.where(after >= math.log(LEAST_TRANSMITTANCE), alpha * jnp.exp(after - rest), jnp.zeros_like(alpha))
    seen = jnp.einsum("gp,gc->pc", weights, channels, precision=lax.Precision.HIGHEST)
    return after[-1], image + seen, covered + weights.sum(0)


def _running_sum(a: jax.Array) -> jax.Array:
    """Along axis 0, whose size is a power of two: of groups by a triangular matrix, and of what is before each group.

    That is a small program with small derivatives, which lax.cumsum is not.
    """
    group = 2 ** (a.shape[0].bit_length() // 2)
    groups = a.reshape(-1, group, a.shape[1])

    def before(n: int, itself: bool) -> jax.Array:
        return jnp.tri(n, k=0 if itself else -1, dtype=a.dtype)

    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    within = dot("ij,gjp->gip", before(group, True), groups)
    return (within + dot("gh,hp->gp", before(len(groups), False), within[:, -1])[:, None]).reshape(a.shape)


def _alpha(
    place: tuple[jax.Array, jax.Array],
    means: jax.Array,
    conics: jax.Array,
    opacities: jax.Array,
    reach: jax.Array | None = None,
) -> jax.Array:
    """(Gaussians, pixels): how much each Gaussian covers of each pixel, 0 where it does not count."""

    def offset(axis: int, counts: jax.Array | None = None) -> jax.Array:
        d = means[:, axis, None] - (place[axis].astype(means.dtype) + 0.5)[None]
        return d if counts is None else jnp.where(counts, d, jnp.zeros_like(d))

    def exponent(dx: jax.Array, dy: jax.Array) -> jax.Array:
        a, b, c = (conics[:, i, None] for i in range(3))
        return -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy

    # What does not count is found first, so that derivatives of the rest never meet what overflows there.
    q = exponent(offset(0), offset(1))
    counts = lax.stop_gradient((q <= 0) & (opacities[:, None] * jnp.exp(q) >= LEAST_ALPHA))
    if reach is not None:
        (column, row), (x0, x1, y0, y1) = place, (reach[:, i, None] for i in range(4))
        counts &= (x0 * TILE <= column[None]) & (column[None] < x1 * TILE)
        counts &= (y0 * TILE <= row[None]) & (row[None] < y1 * TILE)
    alpha = opacities[:, None] * jnp.exp(exponent(offset(0, counts), offset(1, counts)))
    alpha = jnp.where(alpha < MOST_ALPHA, alpha, jnp.asarray(MOST_ALPHA, alpha.dtype))
    return jnp.where(counts, alpha, jnp.zeros_like(alpha))


def depth_order(depths: jax.Array) -> jax.Array:
    """int32 (P,): indices front to back, ties by index, NaN last."""
    number: Any = jnp.where(depths == 0, jnp.zeros_like(depths), depths)  # sorts tell zeros apart
    return jnp.argsort(number, stable=True).astype(jnp.int32)
