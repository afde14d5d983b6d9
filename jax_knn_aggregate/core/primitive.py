"""One factory for every primitive of the package: evaluation, shapes, vmap, sharding, kernel or reference.

The derivative rules of families are not here: ``family.py`` adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from . import sharding

IMPLEMENTATIONS = (None, "xla", "ffi")
PLATFORMS = ("cpu", "cuda")

#: For each primitive, the labels of its axes by operands and parameters.
_AXES: dict[Primitive, Callable[..., sharding.Axes]] = {}


class Kernel(Protocol):
    """The kernel path of a primitive, as a JAX-traceable function that makes FFI calls.

    Returns None where no kernel of that platform can serve these operands; the reference then does.
    """

    def __call__(self, platform: str, *operands: jax.Array, **params: Any) -> Sequence[jax.Array] | None: ...


def make_primitive(
    name: str,
    *,
    reference: Callable[..., Sequence[jax.Array]],
    outputs: Callable[..., Sequence[jax.ShapeDtypeStruct]],
    cores: Callable[..., tuple[Sequence[str], Sequence[str]]],
    kernel: Kernel | None = None,
    pays: Callable[..., bool] = lambda platform, *operands, **params: True,
    add_batch_axis: Callable[[dict[str, Any]], dict[str, Any]] = lambda params: params,
) -> Primitive:
    """Makes a primitive whose operands and results all have leading batch axes of size n or 1 (see ``batch.py``).

    Args:
      name: what a jaxpr shows.
      reference: the computation in pure JAX, ``reference(*operands, **params)``.
      outputs: shapes and dtypes of the results, ``outputs(*avals, **params)``.
      cores: the core axes of operands and results, ``cores(**params)``, a character each: "." for an axis that every
        device needs whole, a letter for one that may be split (see ``sharding.py``).
      kernel: the same computation through FFI calls.
      pays: ``pays(platform, *operands, **params)``, whether the kernel is faster. Where it is not, it runs if
        ``implementation`` is "ffi" alone.
      add_batch_axis: what ``params`` become when vmap puts one more batch axis in front.

    All bind parameters are static; ``implementation`` is one of them and picks the lowering.
    """
    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(functools.partial(xla.apply_primitive, p))

    def axes(*avals: Any, implementation: str | None, **params: Any) -> sharding.Axes:
        return sharding.axes(avals, outputs(*avals, **params), cores(**params))

    _AXES[p] = axes

    def abstract_eval(*avals: Any, implementation: str | None, **params: Any) -> list[Any]:
        results = outputs(*avals, **params)
        shardings = sharding.result_shardings(name, avals, results, cores(**params))
        # From an operand's aval, so that what else it carries (varying manual axes) is kept; bind() made them agree.
        return [
            avals[0].update(shape=o.shape, dtype=o.dtype, weak_type=False, sharding=s)
            for o, s in zip(results, shardings, strict=True)
        ]

    p.def_abstract_eval(abstract_eval)

    def lower(platform: str | None, *operands: jax.Array, implementation: str | None, **params: Any) -> list[jax.Array]:
        if kernel is not None and platform is not None and implementation != "xla":
            pay = implementation == "ffi" or pays(platform, *operands, **params)
            results = kernel(platform, *operands, **params) if pay else None
            if results is not None:
                return list(results)
        if implementation == "ffi":
            raise NotImplementedError(
                f"{name}: implementation='ffi' was asked for, but there is no kernel for these operands on "
                f"{platform or 'this platform'}. Kernels run on {' and '.join(PLATFORMS)} where they were built "
                "(`jax-knn-aggregate doctor` shows which were); implementation=None uses pure JAX elsewhere."
            )
        return list(reference(*operands, **params))

    def rule(platform: str | None, ctx: Any, *values: Any, **params: Any) -> Any:
        fn = functools.partial(lower, platform, **params)
        # Inside shard_map the context counts no devices.
        devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
        spread = sharding.spread(name, fn, lambda: axes(*ctx.avals_in, **params), ctx.avals_in, devices)
        return mlir.lower_fun(spread, multiple_results=True)(ctx, *values)

    mlir.register_lowering(p, functools.partial(rule, None))
    for platform in PLATFORMS:
        mlir.register_lowering(p, functools.partial(rule, platform), platform=platform)
    # custom_partitioning, which the rule may use, wants to know the devices, and JAX looks for it before lowering.
    prim_requires_devices_during_lowering.add(p)

    def batch(operands: Sequence[Any], dims: Sequence[int | None], **params: Any) -> tuple[list[Any], list[int]]:
        moved = [
            jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True)
        ]
        results = bind(p, *moved, **add_batch_axis(params))
        return results, [0] * len(results)

    batching.primitive_batchers[p] = batch
    return p


def piecewise_constant(p: Primitive) -> None:
    """Gives ``p`` derivatives that are zero, whatever its operands are."""

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        results = bind(p, *primals, **params)
        return results, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in results]

    ad.primitive_jvps[p] = jvp


def bind(p: Primitive, *operands: Any, **params: Any) -> list[Any]:
    """Binds ``p`` with all operands varying over the same manual mesh axes, and split alike over Explicit ones.

    Under ``shard_map(check_vma=True)`` the transpose of marking an operand as varying is the psum that a replicated
    operand's gradient needs; without it the gradient would silently be that of one shard.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in operands]
    union = frozenset().union(*varying)
    marked = [
        a if v == union else jax.lax.pcast(a, tuple(sorted(union - v)), to="varying")
        for a, v in zip(operands, varying, strict=True)
    ]
    avals = [jax.typeof(a) for a in marked]
    if sharding.typed(avals):
        marked = sharding.agree(p.name, marked, _AXES[p](*avals, **params).operands)
    return p.bind(*marked, **params)
