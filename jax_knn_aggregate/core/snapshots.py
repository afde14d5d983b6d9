"""Arguments that are saved before a function runs, and kept where it fails: for finding out afterwards what went wrong.

``saving`` makes a function of arrays, which differentiates once in reverse mode, of one that is differentiable. On the
host, arguments are written to a file before the function starts, and the file is removed when all results are finite,
or arguments are not. Else it stays, as it does where a kernel fails, and the error names it.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = Sequence[jax.Array]


class Saved(NamedTuple):
    """Static: ``fn(*arrays) -> (result, no gradient goes through these...)`` of arrays by name, and two file names."""

    fn: Callable[..., tuple[jax.Array, ...]]
    names: tuple[str, ...]
    forward: str
    backward: str
    static: tuple[tuple[str, Any], ...]  # what ``fn`` knows beside the arrays, by name: numbers


def saving(saved: Saved, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """``saved.fn`` of the arrays, all of one float dtype.

    Raises:
      ValueError: under vmap, shard_map, forward mode and in second order, all when that is seen.
    """
    if jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        raise _cannot("shard_map")
    return tuple(_value.bind(*arrays, saved=saved))


def _cannot(what: str) -> ValueError:
    return ValueError(f"Arguments are not saved under {what}, expected one call, in first-order reverse mode at most.")


def _finite(arrays: Arrays) -> jax.Array:
    return functools.reduce(jnp.logical_and, [jnp.isfinite(a).all() for a in arrays])


def _watched(run: Callable[..., Arrays], names: Sequence[str], file: str, saved: Saved, arrays: Arrays) -> list[Any]:
    """What ``run(*arrays)`` returns, between two calls of the host.

    Each returns a one, which what comes after it is multiplied by: XLA keeps their order, and calls them at all.
    """
    one = jax.ShapeDtypeStruct((), np.int8)
    static: dict[str, Any] = dict(saved.static)

    def save(*values: Any) -> np.ndarray:
        whole = (np.ascontiguousarray(v).view(a.dtype)[..., 0] for v, a in zip(values, arrays, strict=True))
        by_name: dict[str, Any] = dict(zip(names, whole, strict=True))
        np.savez(file, **by_name, **static)
        return np.array(1, np.int8)

    def look(failed: Any) -> np.ndarray:
        if failed:
            raise FloatingPointError(f"Results are not finite, of finite arguments: those are in {_place(file)}.")
        os.remove(file)
        return np.array(1, np.int8)

    # As bytes: in the callback's thread float64 may not be enabled.
    is_saved = jax.pure_callback(save, one, *(lax.bitcast_convert_type(a, jnp.uint8) for a in arrays))
    results = run(*(a * is_saved.astype(a.dtype) for a in arrays))
    floats = [a for a in results if jnp.issubdtype(a.dtype, jnp.inexact)]
    is_seen = jax.pure_callback(look, one, _finite(arrays) & ~_finite(floats))
    return [a * is_seen.astype(a.dtype) for a in results]


def _place(file: str) -> pathlib.Path:
    return pathlib.Path(file).resolve()


def _run_forward(*arrays: jax.Array, saved: Saved) -> list[Any]:
    return _watched(saved.fn, saved.names, saved.forward, saved, arrays)


def _run_backward(*arrays: jax.Array, saved: Saved) -> list[Any]:
    def run(*arrays: jax.Array) -> Arrays:
        *x, ct = arrays
        return jax.vjp(lambda *x: saved.fn(*x)[0], *x)[1](ct)

    return _watched(run, (*saved.names, "cotangent"), saved.backward, saved, arrays)


def _primitive(name: str, run: Callable[..., list[Any]], outputs: Callable[..., list[Any]]) -> Any:
    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(lambda *arrays, saved: jax.jit(functools.partial(run, saved=saved))(*arrays))

    @p.def_abstract_eval
    def _(*avals: Any, saved: Saved) -> list[Any]:
        results = outputs(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals), saved=saved)
        return [avals[0].update(shape=r.shape, dtype=r.dtype, weak_type=False) for r in results]

    def batched(*_: Any, **__: Any) -> Any:
        raise _cannot("vmap")

    batching.primitive_batchers[p] = batched
    mlir.register_lowering(p, mlir.lower_fun(run, multiple_results=True))
    return p


def _no_forward_mode(*_: Any, saved: Saved) -> list[Any]:
    raise _cannot("forward mode")


_value = _primitive("saving", _run_forward, lambda *x, saved: list(jax.eval_shape(saved.fn, *x)))
_tangent = _primitive(
    "saving_jvp", _no_forward_mode, lambda *x, saved: [jax.eval_shape(saved.fn, *x[: len(x) // 2])[0]]
)
_gradient = _primitive("saving_vjp", _run_backward, lambda *x, saved: list(x[:-1]))


def _value_jvp(primals: Arrays, tangents: Sequence[Any], *, saved: Saved) -> tuple[Any, Any]:
    results = _value.bind(*primals, saved=saved)
    moved = [ad.instantiate_zeros(t) for t in tangents]
    (first,) = _tangent.bind(*primals, *moved, saved=saved)
    return results, [first, *(ad.Zero(jax.typeof(a).to_tangent_aval()) for a in results[1:])]


def _tangent_transpose(cts: Sequence[Any], *operands: Any, saved: Saved) -> list[Any]:
    x, tangents = operands[: len(operands) // 2], operands[len(operands) // 2 :]
    if type(cts[0]) is ad.Zero:
        return [None] * len(operands)
    bars = _gradient.bind(*x, cts[0], saved=saved)
    return [None] * len(x) + [b if ad.is_undefined_primal(t) else None for b, t in zip(bars, tangents, strict=True)]


def _no_second_order(*_: Any, **__: Any) -> Any:
    raise _cannot("second order")


ad.primitive_jvps[_value] = _value_jvp
ad.primitive_jvps[_tangent] = _no_second_order
ad.primitive_jvps[_gradient] = _no_second_order
ad.primitive_transposes[_tangent] = _tangent_transpose
