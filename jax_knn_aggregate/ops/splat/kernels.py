"""The families of the blend, one for each size of image, and what their kernels are called with.

Backward starts from what forward leaves behind an image: final transmittances, and where pixels end. It is no operand
of derivatives: their kernel functions emit the call of forward again, which XLA merges with that of the value.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import ffi
from ...core.batch import Shape, batch_shape, fit
from ...core.family import Family, Structs
from ...core.ffi import bits, present
from ...core.one_target import Group, Kernel
from .reference import reference
from .tiles import NDIMS, larger, tile_count

Struct = jax.ShapeDtypeStruct
_X_NDIMS = (2, 2, 1, 2, 1)
_NO_X, _NO_Y = (None,) * len(_X_NDIMS), (None,) * 2


@functools.cache
def family(width: int, height: int, reach: bool) -> Family:
    """x = (means2d, conics, opacities, channels, background), aux = what ``tiles`` gives, then reach if there is one;
    y = (image (height, width, C), alpha (height, width))."""

    def of_operands(x: tuple[jax.Array, ...], aux: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return reference(width, height, x, (aux[0], *aux[len(NDIMS) :]))

    def outputs(x: Structs, aux: Structs) -> list[Struct]:
        shapes = (height, width, x[3].shape[-1]), (height, width)
        return [Struct(shape, x[0].dtype) for shape in shapes]

    return Family(
        "splat",
        reference=of_operands,
        outputs=outputs,
        x_ndims=_X_NDIMS,
        aux_ndims=(*NDIMS, *([2] if reach else [])),
        y_ndims=(3, 2),
        kernels=_kernels(width, height, reach),
    )


def _kernels(width: int, height: int, reach: bool) -> dict[str, Kernel]:
    attributes = {"width": np.int32(width), "height": np.int32(height), "reach": np.int32(reach)}
    ndims = (*_X_NDIMS, *NDIMS, *([2] if reach else []))

    def forward(x: Group, aux: Group, v: Group = _NO_X) -> list[Any]:
        """Image, alpha, final transmittance, where pixels end; tangents of the first two where x moves."""
        moves = [(t, n) for t, n in zip(v, _X_NDIMS, strict=True) if t is not None]
        operands = [*x, *aux, *(t for t, _ in moves)]
        batch = batch_shape(operands, [*ndims, *(n for _, n in moves)])
        shapes = (height, width, x[3].shape[-1]), (height, width), (2 if moves else 1, height, width)
        results = [Struct((*batch, *shape), x[0].dtype) for shape in shapes]
        results.append(Struct((*batch, height, width), jnp.int32))
        return list(ffi.call("splat_forward", results)(*operands, given=bits(v), **attributes))

    def backward(
        platform: str,
        batch: Shape,
        x: Group,
        aux: Group,
        left: Group,
        ct: Group,
        results: Group,
        *,
        v: Group = _NO_X,
        v_ct: Group = _NO_Y,
    ) -> list[Any]:
        """Gradients in x that ``results`` asks for, from what forward left; their derivatives where anything moves."""
        full = [Struct((*batch, *s.shape[len(batch) :]), s.dtype) for s in present(results)]
        masks = {"given": bits((*v, *ct, *v_ct)), "want": bits(results)}
        if platform == "cuda":
            full.append(_scratch(width, height, x, aux, results, moves=bool(present(v, v_ct))))
        call = ffi.call("splat_backward", full)
        got = call(*x, *aux, *present(v), *left, *present(ct, v_ct), **masks, **attributes)
        return [fit(a, s.shape) for a, s in zip(got, present(results), strict=False)]

    def value(platform: str, batch: Shape, x: Group, aux: Group, y: Group) -> Any:
        return _there(platform) and forward(x, aux)[:2]

    def jvp(platform: str, batch: Shape, x: Group, aux: Group, dx: Group, dy: Group) -> Any:
        return _there(platform) and forward(x, aux, dx)[:2]

    def vjp(platform: str, batch: Shape, x: Group, aux: Group, ct: Group, x_bar: Group) -> Any:
        return _there(platform) and backward(platform, batch, x, aux, tuple(forward(x, aux)[2:]), ct, x_bar)

    def vjp_vjp(platform: str, batch: Shape, x: Group, aux: Group, ct: Group, v: Group, bars: Group) -> Any:
        if not _there(platform):
            return None
        x_bar, ct_bar = bars[: len(x)], bars[len(x) :]
        *dy, through, last = forward(x, aux, v)
        of_x = backward(platform, batch, x, aux, (through, last), ct, x_bar, v=v) if present(x_bar) else []
        return of_x + [fit(a, s.shape) for a, s in zip(dy, ct_bar, strict=True) if s is not None]

    def vjp_jvp(
        platform: str, batch: Shape, x: Group, aux: Group, ct: Group, dx: Group, dct: Group, x_bar: Group
    ) -> Any:
        return _there(platform) and backward(
            platform, batch, x, aux, tuple(forward(x, aux, dx)[2:]), ct, x_bar, v=dx, v_ct=dct
        )

    return {"value": value, "jvp": jvp, "vjp": vjp, "vjp_vjp": vjp_vjp, "vjp_jvp": vjp_jvp}


def _scratch(width: int, height: int, x: Group, aux: Group, results: Group, *, moves: bool) -> Struct:
    """As csrc/splat/cuda.h says."""
    P, C, item, capacity = x[3].shape[-2], x[3].shape[-1], x[0].dtype.itemsize, aux[2].shape[-1]
    row = (12 if moves else 6) + (C if results[3] is not None else 0)
    of_pairs = row * larger(capacity * item, P * (item + 8))
    return Struct((of_pairs + 256 + tile_count(width, height) * C * item,), jnp.uint8)


def _there(platform: str) -> bool | None:
    return ffi.available("splat_forward", platform) or None
