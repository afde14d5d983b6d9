"""Checks of clouds, of indices into them, of K, and of indexes of them.

Every error says what was got, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from ...core.checks import as_array, integers, narrowed, static_integer
from . import index as knn_index
from .index import KnnIndex
from .metric import Metric

_HALF = (jnp.bfloat16, jnp.float16)

#: Shapes without the batch axis, by argument name. Letters stand for sizes that must agree.
_SHAPES: dict[str, tuple[str | int, ...]] = {
    "q": ("Q", 3),
    "p": ("P", 3),
    "f": ("P", "F"),
    "sigma": ("P", 3),
    "R": ("P", 3, 3),
}


def arrays(isotropic: bool = False, /, **named: Any) -> tuple[list[jax.Array], tuple[int, ...]]:
    """Converts float arguments to JAX arrays and checks them against one another.

    Returns the arrays in the order given, and the batch shape: () or (B,).
    """
    values = {name: as_array(name, a) for name, a in named.items()}
    shapes = {**_SHAPES, "sigma": ("P", 1)} if isotropic else _SHAPES
    first = next(iter(values))
    batched = values[first].ndim == len(shapes[first]) + 1
    sizes: dict[str | int, tuple[int, str]] = {}
    for name, a in values.items():
        core, with_batch = shapes[name], ("B", *shapes[name])
        expected, otherwise = (with_batch, core) if batched else (core, with_batch)
        got = f"{name} has shape {a.shape}, expected {_text(expected)}"
        if a.ndim != len(expected):
            if name == first:
                raise ValueError(f"{got} or {_text(otherwise)}.")
            if _fits(a.shape, otherwise, sizes):
                raise ValueError(
                    f"{got}, because {first} has shape {values[first].shape}, {'with' if batched else 'without'} a "
                    "batch axis. Pass all arrays with a batch axis or none; to share one cloud between scenes, use "
                    "jax.vmap with in_axes=None for it."
                )
            hint = f" Add the last axis: {name}[{':, ' * a.ndim}None]." if _fits((*a.shape, 1), expected, sizes) else ""
            raise ValueError(f"{got}.{hint}")
        for axis, (n, want) in enumerate(zip(a.shape, expected, strict=True)):
            if isinstance(want, int):
                if n != want:
                    raise ValueError(f"{got}: axis {axis} must have size {want}.")
            elif sizes.setdefault(want, (n, name))[0] != n:
                m, other = sizes[want]
                raise ValueError(
                    f"{got}, but {want} = {m} in {other}, whose shape is {values[other].shape}. Give both the same "
                    f"{want}."
                )
    points(values["p"].shape[-2])
    _check_dtypes(values)
    return list(values.values()), (values[first].shape[0],) if batched else ()


def _fits(shape: tuple[int, ...], expected: tuple[str | int, ...], sizes: dict[str | int, tuple[int, str]]) -> bool:
    """Whether an array of this shape may be what is expected, given the sizes of letters so far."""
    return len(shape) == len(expected) and all(
        n == (want if isinstance(want, int) else sizes.get(want, (n, ""))[0])
        for n, want in zip(shape, expected, strict=True)
    )


def _text(shape: tuple[str | int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _check_dtypes(values: dict[str, jax.Array]) -> None:
    first = next(iter(values))
    dtype = values[first].dtype
    for name, a in values.items():
        if a.dtype not in (jnp.float32, jnp.float64) and not (name == "f" and a.dtype in _HALF):
            more = ", bfloat16 or float16" if name == "f" else ""
            raise TypeError(f"{name} has dtype {a.dtype}, expected float32 or float64{more}. Convert it with astype.")
        if a.dtype != dtype and not (name == "f" and a.dtype in _HALF and dtype == jnp.float32):
            more = " (f alone may also be bfloat16 or float16, with the rest float32)" if name == "f" else ""
            raise TypeError(
                f"{name} has dtype {a.dtype}, expected {dtype} like {first}{more}. Convert one of them with astype."
            )


def neighbours(K: Any, limit: int, of: str) -> int:
    """Checks K, a static integer from 1 to ``limit``."""
    K = static_integer("K", K)
    if is_symbolic_dim(limit):
        raise ValueError(f"K is {K}, expected K <= {limit}, {of}, which is symbolic. Export with a fixed one.")
    if not 1 <= K <= limit:
        raise ValueError(f"K is {K}, expected 1 <= K <= {limit}, {of}.")
    return K


def indices(
    name: str, a: Any, P: int, batch: tuple[int, ...], core: tuple[int | str, ...], *, may_share: bool = False
) -> jax.Array:
    """int32 indices in [0, P), or −1. Range-checked before narrowing, whatever the integer dtype.

    Their shape is the batch shape, which indices that may be shared can leave out, and ``core``, with a letter for any
    size.
    """
    a = integers(name, a)
    expected = [(*b, *core) for b in dict.fromkeys((batch, ()) if may_share else (batch,))]
    if not any(_fits(a.shape, shape, {}) for shape in expected):
        raise ValueError(f"{name} has shape {a.shape}, expected {' or '.join(map(_text, expected))}.")
    return narrowed(a, P, above=-1)


def lengths(p_lengths: Any, batch: tuple[int, ...], P: int) -> jax.Array:
    """int32 lengths in [0, P] of shape ``batch``, or of size 1 along it where every cloud is whole."""
    if p_lengths is None:
        return jnp.full((1,) * len(batch), P, jnp.int32)
    a = integers("p_lengths", p_lengths)
    if a.shape != batch:
        expected = f"({batch[0]},), one length for each cloud" if batch else "(), a scalar, as p has no batch axis"
        raise ValueError(f"p_lengths has shape {a.shape}, expected {expected}.")
    xp = np if isinstance(a, np.ndarray) else jnp
    low = xp.where(a < 0, xp.zeros_like(a), a)
    return jnp.asarray(xp.where(low > P, xp.full_like(low, P), low).astype(np.int32))


def index(value: Any, metric: Metric, p: jax.Array, batch: tuple[int, ...]) -> KnnIndex | None:
    """Checks what can be seen of an index without its numbers: that it was built for such points and such a search."""
    if value is None:
        return None
    if not isinstance(value, KnnIndex):
        raise TypeError(f"index is a {type(value).__name__}, expected what build_index returns.")
    wanted = {"aniso": "build_index(p, sigma, R)", "iso": "build_index(p)"}
    if value.metric != metric.name:
        raise ValueError(
            f"index comes from {wanted[value.metric]}, expected one from {wanted[metric.name]} for this call."
        )
    got = (value.leaves.shape[: value.leaves.ndim - 3], value.P, value.leaves.dtype)
    if got != (batch, p.shape[-2], p.dtype):
        raise ValueError(
            f"index was built for points of shape {(*got[0], got[1], 3)} and dtype {got[2]}, but p has shape {p.shape} "
            f"and dtype {p.dtype}. Build it from this p."
        )
    made = knn_index.structs(metric, batch, value.P, p.dtype)
    arrays, expected = ([f"{a.dtype}{list(a.shape)}" for a in some] for some in (value.arrays, made))
    if arrays != expected:
        raise ValueError(f"index holds {arrays}, expected {expected}, as build_index makes them for these points.")
    return value


def points(P: int) -> None:
    """Checks the number of points, those of all devices together."""
    if is_symbolic_dim(P):
        raise ValueError(
            f"p has P = {P} points, which is symbolic, expected a fixed number: the size and layout of an index, and "
            "whether K <= P, depend on it. Export with a fixed P, pad clouds to it, and pass p_lengths."
        )
    if P == 0:
        raise ValueError("p has no points, expected at least one. For an empty cloud, give one point and p_lengths 0.")
    if P >= 2**31:
        raise ValueError(f"p has P = {P} points, expected fewer than 2**31: indices are int32.")
