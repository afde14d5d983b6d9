"""Blending projected Gaussians front to back. Shapes and dtypes are right when this is called."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ...core.batch import known
from .kernels import family
from .tiles import tile_count, tiles

#: Without a ``capacity``: so many pairs a Gaussian, and so many a tile.
PAIRS_OF_GAUSSIAN, PAIRS_OF_TILE = 2, 384


def blend(
    means2d: jax.Array,
    conics: jax.Array,
    opacities: jax.Array,
    channels: jax.Array,
    background: jax.Array,
    depths: jax.Array,
    reach: jax.Array | None,
    *,
    width: int,
    height: int,
    capacity: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """An image of Gaussians in the plane, and how much of each pixel they cover; differentiable in the first five.

    With d = mean − the centre of a pixel, and (a, b, c) the conic, q = −½ (a dx² + c dy²) − b dx dy, a Gaussian covers
    α = min(0.99, opacity·e^q) of what those in front of it leave of the pixel, unless α < 1/255 or q > 0. A pixel stops
    before the Gaussian that would leave less than 1e-4.

    Args:
      means2d: (P, 2) in pixels: pixel (i, j) has its centre at (i + ½, j + ½).
      conics: (P, 3), finite. opacities: (P,), 0 where a Gaussian is not drawn.
      channels: (P, C), background: (C,), with C ≥ 1.
      depths: (P,), by which Gaussians are ordered once rounded to float32, ties by index; not differentiated.
      reach: (P, 4) int32, x0, x1, y0, y1: a Gaussian counts in the tiles of 16 × 16 pixels in columns [x0, x1) and rows
        [y0, y1) alone. None: everywhere.
      width, height: of the image.
      capacity: how many pairs of a tile and a Gaussian that may count in it are listed, for speed alone: with more of
        them, every tile goes through all Gaussians. None: 2 for each Gaussian and 384 for each tile.

    Returns:
      image (height, width, C), Σ weight·channels + final transmittance·background; alpha (height, width), 1 − final
      transmittance.
    """
    if capacity is None:
        capacity = default_capacity(known(means2d.shape[0], 2**20), width, height)
    depths = lax.stop_gradient(depths).astype(jnp.float32)
    reaches = [] if reach is None else [reach]
    lists = tiles(
        *map(lax.stop_gradient, (means2d, conics, opacities)),
        depths,
        *reaches,
        width=width,
        height=height,
        capacity=capacity,
        implementation=implementation,
    )
    x = means2d, conics, opacities, channels, background
    image, alpha = family(width, height, reach is not None)(*x, *lists, *reaches, implementation=implementation)
    return image, alpha


def default_capacity(P: int, width: int, height: int) -> int:
    return min(PAIRS_OF_GAUSSIAN * P + PAIRS_OF_TILE * tile_count(width, height), 2**30)
