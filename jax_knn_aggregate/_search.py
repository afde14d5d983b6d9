"""The search primitive: the K nearest points of each query, by a metric of each point's own or by Euclidean distance.

It returns indices alone and has no derivative: distances are recomputed from the indices by the aggregate family
(``_aggregate.py``), so no derivative ever searches again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from . import _ffi
from ._batch import MAX_BATCH_AXES, batch_shape, merged, over_batch, size
from ._metric import ANISOTROPIC, ISOTROPIC, Metric
from ._primitive import bind, make_primitive

# The reference computes at most this many distances at a time (64 MiB in float32).
_CHUNK = 1 << 24
_CUDA_MAX_K = 256


def search(
    metric: Metric,
    q: jax.Array,
    p: jax.Array,
    parameters: Sequence[jax.Array],
    lengths: jax.Array,
    K: int,
    implementation: str | None,
) -> jax.Array:
    """The indices of the K nearest points, int32, −1 where there are fewer than K.

    Args:
      q: (..., Q, 3). p: (..., P, 3). parameters: of ``metric``, as its search takes them.
      lengths: (...,) int32 in [0, P]: points from that index on do not exist.
      All leading axes are batch axes of size n or 1.

    Returns:
      (..., Q, K), ordered by (distance, index), where +inf comes after every other number, then NaN, then −1.
    """
    return bind(_PRIMITIVES[metric], q, p, *parameters, lengths, K=K, implementation=implementation)[0]


def _core_ndims(metric: Metric) -> tuple[int, ...]:
    return (2, 2, *metric.search_ndims, 0)


def _outputs(metric: Metric, *avals: Any, K: int) -> list[jax.ShapeDtypeStruct]:
    q = avals[0]
    return [jax.ShapeDtypeStruct((*batch_shape(avals, _core_ndims(metric)), q.shape[-2], K), jnp.int32)]


def _kernel(metric: Metric, platform: str, *operands: jax.Array, K: int) -> list[jax.Array] | None:
    target = f"{metric.name}_search"
    if not _ffi.available(target, platform) or (platform == "cuda" and K > _CUDA_MAX_K):
        return None
    (out,) = _outputs(metric, *operands, K=K)
    ndims = _core_ndims(metric)
    batches, full = merged([a.shape[: a.ndim - n] for a, n in zip(operands, ndims, strict=True)])
    if len(full) > MAX_BATCH_AXES:
        return None
    operands = tuple(a.reshape(b + a.shape[a.ndim - n :]) for a, b, n in zip(operands, batches, ndims, strict=True))
    (idxs,) = _ffi.call(target, [jax.ShapeDtypeStruct(full + out.shape[-2:], jnp.int32)])(*operands)
    return [idxs.reshape(out.shape)]


def _reference(metric: Metric, *operands: jax.Array, K: int) -> list[jax.Array]:
    ndims = _core_ndims(metric)
    Q, P = operands[0].shape[-2], operands[1].shape[-2]
    scenes = max(1, size(batch_shape(operands, ndims)))
    chunk = max(1, min(Q, _CHUNK // max(1, P * scenes)))

    def one(q: jax.Array, p: jax.Array, *rest: jax.Array) -> jax.Array:
        *parameters, length = rest
        exists = jnp.arange(P, dtype=jnp.int32) < length

        def nearest(x: jax.Array) -> jax.Array:
            _, idxs = lax.top_k(-_key(metric.distance(x[None, :] - p, *parameters), exists), K)
            # Rank the K chosen by the distances that the caller will see: XLA may round the same formula differently
            # in a differently fused loop.
            dists = metric.distance(x[None, :] - p[idxs], *(a[idxs] for a in parameters))
            kind = jnp.where(exists[idxs], jnp.where(jnp.isnan(dists), _NAN, _NUMBER), _MISSING)
            dists = jnp.where((kind != _NUMBER) | (dists == 0), jnp.zeros_like(dists), dists)
            kind, _, idxs = lax.sort((kind, dists, idxs), num_keys=3)
            return jnp.where(kind == _MISSING, jnp.int32(-1), idxs)

        return lax.map(nearest, q, batch_size=chunk)

    return [over_batch(one, operands, ndims)]


_NUMBER, _NAN, _MISSING = np.int32(0), np.int32(1), np.int32(2)


def _key(dists: jax.Array, exists: jax.Array) -> jax.Array:
    """Orders distances as numbers, +inf, NaN, missing, with −0 equal to +0: ``top_k`` would tell zeros apart and put
    NaN first.

    The two largest finite numbers stand for +inf and NaN. Distances as large as that are rounded to the third largest,
    by less than the tolerance within which implementations may differ.
    """
    nan = np.finfo(dists.dtype).max
    inf = np.nextafter(nan, np.zeros_like(nan))
    largest = np.nextafter(inf, np.zeros_like(inf))
    key = jnp.where(dists == 0, jnp.zeros_like(dists), jnp.minimum(dists, largest))
    key = jnp.where(dists == jnp.inf, inf, key)
    key = jnp.where(jnp.isnan(dists), nan, key)
    return jnp.where(exists, key, jnp.full_like(key, jnp.inf))


def _make(metric: Metric) -> Any:
    p = make_primitive(
        f"{metric.name}_search",
        reference=functools.partial(_reference, metric),
        outputs=functools.partial(_outputs, metric),
        kernel=functools.partial(_kernel, metric),
    )

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:  # piecewise constant
        (idxs,) = bind(p, *primals, **params)
        return [idxs], [ad.Zero(jax.typeof(idxs).to_tangent_aval())]

    ad.primitive_jvps[p] = jvp
    return p


_PRIMITIVES = {metric: _make(metric) for metric in (ANISOTROPIC, ISOTROPIC)}
