"""Leading batch axes, each of size n or 1.

Every operand of a primitive has the same number of leading *batch axes* before its *core* axes. Along a batch axis an
operand has the full size n or the size 1; size 1 means shared by the whole axis and is never copied. This is NumPy
broadcasting restricted to the leading axes, and the C++ side reads it as a stride of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from . import ffi

Shape = tuple[int, ...]
T = TypeVar("T")

#: Kernels take up to this many merged axes (kMaxBatchAxes of csrc/common/batch.h).
MAX_BATCH_AXES = ffi.number("batch_axes")


def batch_shape(operands: Sequence[Any], core_ndims: Sequence[int]) -> Shape:
    """The full size of every batch axis: the one size that is not 1."""
    return jnp.broadcast_shapes(*(a.shape[: len(a.shape) - n] for a, n in zip(operands, core_ndims, strict=True)))


def over_batch(fn: Callable[..., Any], operands: Sequence[jax.Array], core_ndims: Sequence[int]) -> Any:
    """Maps ``fn``, written for core axes alone, over the batch axes, without copying shared operands."""
    batch = batch_shape(operands, core_ndims)
    if not batch:
        return fn(*operands)
    shared = [a.shape[0] != batch[0] for a in operands]
    operands = [a.squeeze(0) if s else a for a, s in zip(operands, shared, strict=True)]
    return jax.vmap(lambda *inner: over_batch(fn, inner, core_ndims), in_axes=[None if s else 0 for s in shared])(
        *operands
    )


def fit(a: jax.Array, shape: Shape) -> jax.Array:
    """Broadcasts ``a`` where it has size 1 and ``shape`` has not; sums it where it is the other way round."""
    shared = tuple(i for i, (have, want) in enumerate(zip(a.shape, shape, strict=True)) if have != 1 and want == 1)
    if shared:
        a = a.sum(shared, keepdims=True)
    return jnp.broadcast_to(a, shape)


def merged(batches: Sequence[Shape]) -> tuple[list[Shape], Shape]:
    """Merges neighbouring batch axes along which the same operands are shared, and drops axes of size 1.

    Takes the batch shapes of all operands and results, returns the shorter ones in the same order, and their common
    full shape. Kernels then see two or three axes however deeply vmaps are nested.
    """
    full = jnp.broadcast_shapes(*batches)
    groups: list[tuple[tuple[bool, ...], int]] = []
    for axis, size in enumerate(full):
        if size == 1:
            continue
        mask = tuple(b[axis] == size for b in batches)
        if groups and groups[-1][0] == mask:
            groups[-1] = (mask, groups[-1][1] * size)
        else:
            groups.append((mask, size))
    shapes = [tuple(size if mask[i] else 1 for mask, size in groups) for i in range(len(batches))]
    return shapes, tuple(size for _, size in groups)


def over_merged_batch(
    kernel: Callable[..., Sequence[jax.Array] | None],
    operands: Sequence[jax.Array],
    depth: int,
    outputs: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array] | None:
    """``kernel(operands, results, full)`` with the first ``depth`` axes, the batch axes, merged as ``merged`` does.

    Args:
      kernel: gets operands with merged axes, shapes and dtypes of results with such axes, and the merged axes' full
        shape. It returns as many arrays, or None where it cannot serve.
      outputs: shapes and dtypes of the results.

    Returns:
      The results, with axes as in ``outputs``; None where the kernel cannot serve, or would get too many axes.
    """
    before = [a.shape for a in operands] + [o.shape for o in outputs]
    batches, full = merged([shape[:depth] for shape in before])
    if len(full) > MAX_BATCH_AXES:
        return None
    after = iter(b + shape[depth:] for b, shape in zip(batches, before, strict=True))
    merged_operands = [a.reshape(next(after)) for a in operands]
    got = kernel(merged_operands, [jax.ShapeDtypeStruct(next(after), o.dtype) for o in outputs], full)
    return None if got is None else [a.reshape(o.shape) for a, o in zip(got, outputs, strict=True)]


def size(shape: Shape) -> int:
    return math.prod(shape)


def known(n: int, otherwise: T) -> int | T:
    """The size n, or ``otherwise`` where it is symbolic: ``jax.export`` then leaves it to each call of the artifact.

    For what must be decided before. Equality needs no such care: symbolic sizes are equal where they always are.
    """
    return otherwise if is_symbolic_dim(n) else n
