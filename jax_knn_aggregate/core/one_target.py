"""Kernels of a family of which one FFI target serves all roles: C++ written once over numbers and dual numbers.

Such a target computes y and Jᵀ ct, and with dual numbers (csrc/common/dual.h) the derivatives of both along tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import ffi
from .batch import Shape, fit
from .ffi import bits, present

Group = tuple[Any, ...]  # arrays or shapes, None for what is not there
Kernel = Callable[..., list[jax.Array] | None]


def one_target(
    target: str,
    *,
    x: int,
    y: int,
    attributes: Callable[[Group, Group], Mapping[str, Any]] = lambda x, aux: {},
    parts: Callable[[Group, Group], Mapping[int, Shape]] = lambda x, aux: {},
    sums: Collection[int] = (),
    scratch: Callable[
        [str, Shape, Group, Group], Sequence[jax.ShapeDtypeStruct]
    ] = lambda platform, batch, x, results: (),
) -> dict[str, Kernel]:
    """The ``kernels`` of a ``Family`` with ``x`` differentiable operands and ``y`` results.

    The target gets x and aux, then those operands that its attribute ``given`` names, an int64 bit mask: tangents of x,
    cotangents of y (where gradients are wanted), tangents of these. Its results are those that ``want`` names:
    gradients in x, then y. If a tangent is given they are derivatives along the tangents, of which missing ones are
    zero. Results have all batch axes in full; sums over those along which an operand is shared are taken here.

    Args:
      attributes: ``attributes(x, aux)``, further attributes of a call.
      parts: ``parts(x, aux)``, core shapes of those results that the target gives in parts, by position: along an axis
        where the result has size 1, it is the sum of these.
      sums: positions of those results that the target itself sums over batch axes along which all of them that are
        wanted have size 1.
      scratch: ``scratch(platform, batch, x, results)``, what the target wants to write to behind its results.
    """
    no_x, no_y = (None,) * x, (None,) * y

    def call(
        at: Group, results: Group, *, v: Group = no_x, ct: Group = no_y, v_ct: Group = no_y
    ) -> list[jax.Array] | None:
        platform, batch, *operands = at
        if not ffi.available(target, platform):
            return None
        ct = ct if present(results[:x]) else no_y
        in_parts = parts(*operands)
        depth = len(batch)
        summed = [s.shape[:depth] for i, s in enumerate(results) if s is not None and i in sums]
        together = jnp.broadcast_shapes(*summed)
        full = [
            jax.ShapeDtypeStruct(
                (*(together if i in sums else batch), *in_parts.get(i, s.shape[depth:])),
                s.dtype,
            )
            for i, s in enumerate(results)
            if s is not None
        ]
        masks = {"given": bits((*v, *ct, *v_ct)), "want": bits(results)}
        full += scratch(platform, batch, operands[0], results)
        got = ffi.call(target, full)(*present(*operands, v, ct, v_ct), **masks, **attributes(*operands))
        return [fit(a, s.shape) for a, s in zip(got, present(results), strict=False)]

    def value(p: str, b: Shape, x: Group, aux: Group, y: Group) -> Any:
        return call((p, b, x, aux), (*no_x, *y))

    def jvp(p: str, b: Shape, x: Group, aux: Group, dx: Group, dy: Group) -> Any:
        return call((p, b, x, aux), (*no_x, *dy), v=dx)

    def vjp(p: str, b: Shape, x: Group, aux: Group, ct: Group, x_bar: Group) -> Any:
        return call((p, b, x, aux), (*x_bar, *no_y), ct=ct)

    def vjp_vjp(p: str, b: Shape, x: Group, aux: Group, ct: Group, v: Group, bars: Group) -> Any:
        return call((p, b, x, aux), bars, v=v, ct=ct)

    def vjp_jvp(p: str, b: Shape, x: Group, aux: Group, ct: Group, dx: Group, dct: Group, x_bar: Group) -> Any:
        return call((p, b, x, aux), (*x_bar, *no_y), v=dx, ct=ct, v_ct=dct)

    return {"value": value, "jvp": jvp, "vjp": vjp, "vjp_vjp": vjp_vjp, "vjp_jvp": vjp_jvp}
