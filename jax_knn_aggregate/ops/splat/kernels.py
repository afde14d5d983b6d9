"""The families of the blend, one for each size of image, and what their kernels are called with."""

from __future__ import annotations

import functools

import jax

from ...core.family import Family, Structs
from .reference import reference
from .tiles import NDIMS


@functools.cache
def family(width: int, height: int, reach: bool) -> Family:
    """x = (means2d, conics, opacities, channels, background), aux = what ``tiles`` gives, then reach if there is one;
    y = (image (height, width, C), alpha (height, width))."""

    def of_operands(x: tuple[jax.Array, ...], aux: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return reference(width, height, x, (aux[0], *aux[len(NDIMS) :]))

    def outputs(x: Structs, aux: Structs) -> list[jax.ShapeDtypeStruct]:
        shapes = (height, width, x[3].shape[-1]), (height, width)
        return [jax.ShapeDtypeStruct(shape, x[0].dtype) for shape in shapes]

    return Family(
        "splat",
        reference=of_operands,
        outputs=outputs,
        x_ndims=(2, 2, 1, 2, 1),
        aux_ndims=(*NDIMS, *([2] if reach else [])),
        y_ndims=(3, 2),
        kernels={},
    )
