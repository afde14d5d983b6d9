"""The tiles primitive: Gaussians front to back, and for each 16 × 16 tile those that may count in it.

What its results hold is told in ``csrc/splat/splat.h``. They say nothing that the operands do not: the blend without
kernels needs the order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from ...core import ffi
from ...core.batch import Shape, batch_shape, over_batch, over_merged_batch
from ...core.primitive import bind, make_primitive, piecewise_constant
from .reference import TILE, depth_order

Struct = jax.ShapeDtypeStruct
#: Core axes of order, offsets, owners, slots, ends.
NDIMS = (1, 1, 1, 1, 1)
_TARGET = "splat_tiles"
#: More pairs than any list holds.
_TOO_MANY = 2**31 - 1


class Tiles(NamedTuple):
    """Attributes: order (P,), offsets (P + 1,), owners (capacity,), slots (capacity,), ends (tiles,), all int32."""

    order: jax.Array
    offsets: jax.Array
    owners: jax.Array
    slots: jax.Array
    ends: jax.Array


def tiles(*operands: jax.Array, width: int, height: int, capacity: int, implementation: str | None) -> Tiles:
    """Of means2d (P, 2), conics (P, 3), opacities (P,), depths (P,) float32, reach (P, 4) int32 or nothing.

    Leading axes of the arrays are batch axes of size n or 1.
    """
    static = {"width": width, "height": height, "capacity": capacity, "reach": len(operands) > 4}
    return Tiles(*bind(_PRIMITIVE, *operands, **static, implementation=implementation))


def tile_count(width: int, height: int) -> int:
    return -(-width // TILE) * -(-height // TILE)


def larger(a: int, b: int) -> int:
    """The larger; of sizes of which one is symbolic, the sum, which is no smaller."""
    return a + b if is_symbolic_dim(a) or is_symbolic_dim(b) else max(a, b)


def _ndims(reach: bool) -> tuple[int, ...]:
    return (2, 2, 1, 1, 2) if reach else (2, 2, 1, 1)


def _outputs(*avals: Any, width: int, height: int, capacity: int, reach: bool) -> list[Struct]:
    batch, P = batch_shape(avals, _ndims(reach)), avals[0].shape[-2]
    sizes = (P, P + 1, capacity, capacity, tile_count(width, height))
    return [Struct((*batch, n), jnp.int32) for n in sizes]


def _cores(*, reach: bool, **size: int) -> tuple[list[str], list[str]]:
    return ["." * n for n in _ndims(reach)], ["." * n for n in NDIMS]


def _reference(*operands: jax.Array, **static: Any) -> list[jax.Array]:
    """The order, and lists that say of themselves that they hold too little."""
    outputs = _outputs(*operands, **static)
    order = over_batch(depth_order, operands[3:4], (1,))
    empty = [jnp.full(s.shape, _TOO_MANY, s.dtype) for s in outputs[1:]]
    return [jnp.broadcast_to(order, outputs[0].shape), *empty]


def _kernel(platform: str, *operands: jax.Array, **static: Any) -> list[jax.Array] | None:
    if not ffi.available(_TARGET, platform):
        return None

    def call(operands: Sequence[jax.Array], results: list[Struct], full: Shape) -> Sequence[jax.Array]:
        scratch = []
        if platform == "cuda":
            items = larger(operands[0].shape[-2], static["capacity"])
            size = items * ffi.number("cuda.tiles_bytes_of_item") + ffi.number("cuda.sort_bytes")
            scratch = [Struct((size,), jnp.uint8)]
        attributes = {name: np.int32(static[name]) for name in ("width", "height", "reach")}
        return ffi.call(_TARGET, [*results, *scratch])(*operands, **attributes)[: len(results)]

    return over_merged_batch(call, operands, operands[0].ndim - 2, _outputs(*operands, **static))


def _make() -> Any:
    p = make_primitive(_TARGET, reference=_reference, outputs=_outputs, cores=_cores, kernel=_kernel)
    piecewise_constant(p)
    return p


_PRIMITIVE = _make()
