"""The aggregate families: features, weights and distances of given neighbours, differentiable to any order.

    x = (q, p, f, *metric parameters),  aux = (idxs,),  y = (f_out, w_out, dists)

``idxs`` outside [0, P) mean "no neighbour": w 0, dist +inf, no contribution, zero derivatives. A neighbour at distance
+inf is the same, at every order and whatever its parameters and features are. The derivation of the derivatives that
the kernels compute stands in ``csrc/knn/aggregate/formulas.h``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import ffi
from ...core.batch import Shape, fit, known, size
from ...core.family import Family, Structs
from ...core.ffi import bits, present
from .metric import Metric

Struct = jax.ShapeDtypeStruct
Operands = tuple[jax.Array, ...]
Sparse = tuple[jax.Array | None, ...]
MaybeStructs = tuple[Struct | None, ...]


def _reference(metric: Metric, x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
    """q (Q,3), p (P,3), f (P,F), parameters (P,...); idxs (Q,K) -> f_out (Q,F), w (Q,K), dists (Q,K)."""
    (q, p, f, *parameters), (idxs,) = x, aux
    exists = (idxs >= 0) & (idxs < p.shape[0])
    # Out of bounds, which the gather fills with zeros and its transpose drops. A clipped index would let a NaN of the
    # point it names into the derivatives of an empty slot.
    at = jnp.where(exists, idxs, p.shape[0])

    def take(a: jax.Array) -> jax.Array:
        return a.at[at].get(mode="fill", fill_value=0)

    def or_zero(a: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(exists, tuple(range(2, a.ndim))), a, jnp.zeros((), a.dtype))

    d = or_zero(q[:, None, :] - take(p))
    # Widened before it is gathered, so that the transpose, a scatter, sums in the wider type too.
    taken = [take(a) for a in (*parameters, f.astype(q.dtype))]
    # A neighbour at distance +inf is from here on an empty slot: products of 0 and what is infinite would be NaN.
    exists = exists & (metric.distance(d, *taken[: len(metric.search_ndims)]) != jnp.inf)
    d, *parameters, f_k = (or_zero(a) for a in (d, *taken))
    dists = metric.distance(d, *parameters[: len(metric.search_ndims)])
    w = or_zero(jnp.exp(-metric.exponent(dists, *parameters)))
    f_out = jnp.einsum("qk,qkf->qf", w, f_k, precision="highest").astype(f.dtype)
    return f_out, w, jnp.where(exists, dists, jnp.full((), jnp.inf, q.dtype))


def _outputs(x: Structs, aux: Structs) -> list[Struct]:
    (q, _, f, *_), (idxs,) = x, aux
    return [Struct((q.shape[0], f.shape[1]), f.dtype), Struct(idxs.shape, q.dtype), Struct(idxs.shape, q.dtype)]


# Kernels. Operands in order: x, idxs, then cotangents and tangents that are not zero, then the inverse of idxs where a
# point's gradient is wanted. Bit masks in the attributes say which are there, and which results are wanted.


def _value_kernel(
    metric: Metric, platform: str, batch: Shape, x: Operands, aux: Operands, results: tuple[Struct, ...]
) -> Any:
    target = f"{metric.name}_value"
    return ffi.call(target, results)(*x, *aux) if ffi.available(target, platform) else None


def _jvp_kernel(
    metric: Metric, platform: str, batch: Shape, x: Operands, aux: Operands, dx: Sparse, results: tuple[Struct, ...]
) -> Any:
    target = f"{metric.name}_jvp"
    if not ffi.available(target, platform):
        return None
    return ffi.call(target, results)(*x, *aux, *present(dx), along=bits(dx))


def _vjp_kernel(
    metric: Metric, platform: str, batch: Shape, x: Operands, aux: Operands, ct: Sparse, results: MaybeStructs
) -> Any:
    target = f"{metric.name}_vjp"
    call = functools.partial(_call_with_inverse, target, platform, batch, x, aux)
    return call(present(ct), x[1:], results, (), {"outs": bits(ct), "want_x": bits(results)})


def _vjp_vjp_kernel(
    metric: Metric,
    platform: str,
    batch: Shape,
    x: Operands,
    aux: Operands,
    ct: Sparse,
    v: Sparse,
    results: MaybeStructs,
) -> Any:
    target = f"{metric.name}_vjp_vjp"
    want_x, want_ct = results[: len(x)], results[len(x) :]
    masks = {"outs": bits(ct), "along": bits(v), "want_x": bits(want_x), "want_ct": bits(want_ct)}
    call = functools.partial(_call_with_inverse, target, platform, batch, x, aux)
    return call(present(ct, v), (*x[1:], *present(v[1:])), want_x, want_ct, masks)


def _vjp_jvp_kernel(
    metric: Metric,
    platform: str,
    batch: Shape,
    x: Operands,
    aux: Operands,
    ct: Sparse,
    dx: Sparse,
    dct: Sparse,
    results: MaybeStructs,
) -> Any:
    if not present(dct):
        return None  # vjp_vjp alone does as much, with fewer factors
    target = f"{metric.name}_vjp_jvp"
    masks = {"outs": bits(ct), "along": bits(dx), "along_ct": bits(dct), "want_x": bits(results)}
    call = functools.partial(_call_with_inverse, target, platform, batch, x, aux)
    return call(present(ct, dx, dct), (*x[1:], *present(dx[1:])), results, (), masks, factors=8)


def _call_with_inverse(
    target: str,
    platform: str,
    batch: Shape,
    x: Operands,
    aux: Operands,
    more: list[jax.Array],
    of_points: Operands,
    want_x: MaybeStructs,
    want_ct: MaybeStructs,
    masks: dict[str, np.int64],
    factors: int = 4,
) -> list[jax.Array] | None:
    """Calls a kernel whose results may include gradients of points, which sum over all pairs that name the point.

    A kernel gives what belongs to queries with all batch axes in full. What belongs to points it sums over those axes
    along which nothing but queries and indices vary. Any other sum that is wanted is taken here.

    Args:
      more: the operands after idxs. masks: attributes of the call. factors: of each pair, in scratch.
      of_points: the operands that belong to points.
    """
    if not ffi.available(target, platform):
        return None
    depth, (idxs,) = len(batch), aux
    wanted = present(want_x, want_ct)
    points = present(want_x[1:])
    given = [Struct(batch + s.shape[depth:], s.dtype) for s in wanted]
    scratch = []
    if points:
        summed = tuple(
            idxs.shape[axis] == batch[axis]
            and all(s.shape[axis] == 1 for s in points)
            and all(a.shape[axis] == 1 for a in of_points)
            for axis in range(depth)
        )
        inverse = invert(platform, idxs, x[1].shape[-2], summed)
        if inverse is None:
            return None
        more = [*more, *inverse]
        kept = tuple(1 if s else n for n, s in zip(batch, summed, strict=True))
        first = sum(s is not None for s in want_x[:1])
        given[first : first + len(points)] = [Struct(kept + s.shape[depth:], s.dtype) for s in points]
        # What a query's half of the kernel finds out about each pair and the points' half needs again.
        scratch = [Struct(batch + idxs.shape[depth:] + (factors,), x[0].dtype)]
        if platform == "cuda":
            # Sums over pieces of the grouped pairs, for up to two points each: features and terms of the metric.
            pieces = -(-inverse[0].shape[-1] // ffi.number("cuda.piece_pairs"))
            scratch.append(Struct((*kept, pieces, 2, x[2].shape[-1] + ffi.number("cuda.piece_terms")), x[0].dtype))
    got = ffi.call(target, [*given, *scratch])(*x, *aux, *more, **masks)
    return [fit(a, s.shape) for a, s in zip(got[: len(wanted)], wanted, strict=True)]


def invert(platform: str, idxs: jax.Array, P: int, summed: tuple[bool, ...]) -> list[jax.Array] | None:
    """Groups the pairs (query, slot) by the point they name, in a fixed order, so that sums over them need no atomics.

    XLA merges equal calls and drops unused ones: the kernels of one step share one grouping.

    Args:
      idxs: (*batch, Q, K) int32. Values outside [0, P) belong to no group.
      summed: for each batch axis, whether pairs from all along it fall into the same groups.

    Returns:
      order: (*kept, L) int32, pair numbers ordered by (point, pair); L = (product of summed sizes)·Q·K, and a pair's
        number counts row-major over (*summed axes, Q, K). kept has size 1 along summed axes.
      offsets: (*kept, P + 1) int32; the pairs of point j are order[offsets[j]:offsets[j + 1]].
      None where numbers would not fit 32 bits.
    """
    depth = len(summed)
    kept = tuple(1 if s else n for n, s in zip(idxs.shape, summed, strict=False))
    pairs = size(idxs.shape[depth:]) * size(tuple(n for n, s in zip(idxs.shape, summed, strict=False) if s))
    if known(pairs, 0) >= 2**31 or known(size(kept), 0) * (P + 1) >= 2**31:  # symbolic ones the kernel checks
        return None
    results = [Struct((*kept, pairs), jnp.int32), Struct((*kept, P + 1), jnp.int32)]
    if platform == "cuda":
        # Few points: how many pairs each tile has for each point, and their sums. Many: a radix sort.
        most_counted = ffi.number("cuda.invert_max_counted")
        if most_counted >= P:
            nbytes = size(kept) * (-(-pairs // ffi.number("cuda.invert_tile")) + 1) * (P + 1) * 4
        else:
            nbytes = size(kept) * pairs * ffi.number("cuda.invert_bytes_of_pair") + ffi.number("cuda.sort_bytes")
        results.append(Struct((nbytes,), jnp.uint8))
    return list(ffi.call("invert", results)(idxs)[:2])


@functools.cache
def family(metric: Metric) -> Family:
    kernels: dict[str, Callable[..., Any]] = {
        "value": _value_kernel,
        "jvp": _jvp_kernel,
        "vjp": _vjp_kernel,
        "vjp_vjp": _vjp_vjp_kernel,
        "vjp_jvp": _vjp_jvp_kernel,
    }
    return Family(
        metric.name,
        reference=functools.partial(_reference, metric),
        outputs=_outputs,
        x_ndims=(2, 2, 2, *metric.parameter_ndims),
        aux_ndims=(2,),
        y_ndims=(2, 2, 2),
        items=((0,), (0,), (0, 1, 2)),
        linear=((2,), (0,)),
        kernels={role: functools.partial(kernel, metric) for role, kernel in kernels.items()},
    )


def aggregate(
    metric: Metric, x: Operands, idxs: jax.Array, implementation: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """f_out (..., Q, F), w_out (..., Q, K) and dists (..., Q, K) for x = (q, p, f, *parameters), idxs (..., Q, K)."""
    f_out, w_out, dists = family(metric)(*x, idxs, implementation=implementation)
    return f_out, w_out, dists


def featureless(q: jax.Array, p: jax.Array, search_parameters: Operands) -> Operands:
    """The operands x, with no features, of an aggregate that is wanted for its distances alone."""
    shared = (1,) * (p.ndim - 2)
    f = jnp.zeros((*shared, p.shape[-2], 0), q.dtype)
    return q, p, f, *(search_parameters or (jnp.zeros((*shared, p.shape[-2], 1), q.dtype),))
