"""The search primitive: the K nearest points of each query, by a metric of each point's own or by Euclidean distance.

It returns indices alone and has no derivative: distances are recomputed from the indices by the aggregate family
(``aggregate.py``), so no derivative ever searches again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import ffi
from ...core.batch import Shape, batch_shape, known, over_batch, over_merged_batch, size
from ...core.primitive import bind, make_primitive, piecewise_constant
from . import index as knn_index
from .metric import ANISOTROPIC, ISOTROPIC, Metric

# The reference computes at most this many distances at a time (64 MiB in float32).
_CHUNK = 1 << 24
# And this many queries, where jax.export does not say how many there are.
_SYMBOLIC_CHUNK = 256
_CUDA_MAX_K, _CUDA_FILTER_MAX_K = ffi.number("cuda.search_max_K"), ffi.number("cuda.filter_max_K")
# On CPUs, sorting a point into an index takes as long as its distances to so many queries.
_CPU_FEW_QUERIES = 400


def search(
    metric: Metric,
    q: jax.Array,
    p: jax.Array,
    parameters: Sequence[jax.Array],
    lengths: jax.Array,
    K: int,
    implementation: str | None,
    index: knn_index.KnnIndex | None = None,
    warm: jax.Array | None = None,
) -> jax.Array:
    """The indices of the K nearest points, int32, −1 where there are fewer than K.

    Args:
      q: (..., Q, 3). p: (..., P, 3). parameters: of ``metric``, as its search takes them.
      lengths: (...,) int32 in [0, P]: points from that index on do not exist.
      index: of these points, or None. warm: (..., Q, W) int32, or None: guesses, of which those in [0, P) count.
      All leading axes are batch axes of size n or 1.

    Returns:
      (..., Q, K), ordered by (distance, index), where +inf comes after every other number, then NaN, then −1.
    """
    operands = [q, p, *parameters, lengths, *(index.arrays if index else ()), *(() if warm is None else (warm,))]
    params = {"K": K, "indexed": index is not None, "warm": warm is not None}
    return bind(_PRIMITIVES[metric], *operands, **params, implementation=implementation)[0]


def _core_ndims(metric: Metric, indexed: bool, warm: bool) -> tuple[int, ...]:
    return (2, 2, *metric.search_ndims, 0, *(knn_index.NDIMS if indexed else ()), *((2,) if warm else ()))


def _cores(metric: Metric, *, K: int, indexed: bool, warm: bool) -> tuple[list[str], list[str]]:
    ndims = _core_ndims(metric, indexed, False)
    return ["q.", *("." * n for n in ndims[1:]), *(["q."] if warm else [])], ["q."]


def _outputs(metric: Metric, *avals: Any, K: int, indexed: bool, warm: bool) -> list[jax.ShapeDtypeStruct]:
    batch = batch_shape(avals, _core_ndims(metric, indexed, warm))
    return [jax.ShapeDtypeStruct((*batch, avals[0].shape[-2], K), jnp.int32)]


def _kernel(
    metric: Metric, platform: str, *operands: jax.Array, K: int, indexed: bool, warm: bool
) -> list[jax.Array] | None:
    if not ffi.available(f"{metric.name}_search", platform) or (platform == "cuda" and K > _CUDA_MAX_K):
        return None
    call = functools.partial(_call, metric, platform, K, indexed, warm)
    outputs = _outputs(metric, *operands, K=K, indexed=indexed, warm=warm)
    return over_merged_batch(call, operands, operands[0].ndim - 2, outputs)


def _call(
    metric: Metric,
    platform: str,
    K: int,
    indexed: bool,
    warm: bool,
    operands: Sequence[jax.Array],
    results: list[jax.ShapeDtypeStruct],
    full: Shape,
) -> Sequence[jax.Array]:
    Q, P, dtype = operands[0].shape[-2], operands[1].shape[-2], operands[0].dtype
    after_cloud = 3 + len(metric.search_ndims)
    cloud = operands[1:after_cloud]
    clouds = size(batch_shape(cloud, _core_ndims(metric, False, False)[1:]))
    queries = known(size(full) * Q, math.inf)
    if not indexed and (platform == "cpu" or _cuda_index_pays(queries, P, K, dtype)):
        # XLA merges equal calls: searches of one cloud share one index.
        arrays = knn_index.emit(metric, platform, *cloud, plain=queries < _CPU_FEW_QUERIES * known(clouds, 1))
        assert arrays is not None
        operands, indexed = (*operands[:after_cloud], *arrays, *operands[after_cloud:]), True
    if platform == "cuda":
        if indexed:
            scratch = size(full) * Q * ffi.number("cuda.search_bytes_of_query") + ffi.number("cuda.sort_bytes")
        else:
            of_cloud = P * ffi.number("cuda.filter_bytes_of_point") + ffi.number("cuda.filter_bytes_of_cloud")
            scratch = clouds * of_cloud
        results = [*results, jax.ShapeDtypeStruct((scratch,), jnp.uint8)]
    attributes = {"indexed": np.int32(indexed), "warm": np.int32(warm)}
    return ffi.call(f"{metric.name}_search", results)(*operands, **attributes)[:1]


def _cuda_index_pays(queries: float, P: int, K: int, dtype: Any) -> bool:
    """Whether building an index and searching through it beats comparing all pairs, as measured on an H200.

    Where tensor cores compare all pairs, a query through the index takes as long as 8,000 points do, and 25,000 with
    K > 32, for which the index keeps a second row of neighbours; building takes about as long as 2e8 pairs; and fewer
    than 8,000 queries leave the GPU idle and take as long. Where they do not, an index takes as long as 2,000 points,
    and 5e7 pairs to build; long lists are kept so slowly that it pays from 4,000 points on. benchmarks/knn/crossover.py
    measures both.
    """
    if dtype == jnp.float32 and K <= _CUDA_FILTER_MAX_K:
        return max(queries, 8192) * (P - (8192 if K <= 32 else 24576)) > 200_000_000
    return queries * (P - 2048) > 50_000_000 or (K > _CUDA_FILTER_MAX_K and P >= 4096)


def _reference(metric: Metric, *operands: jax.Array, K: int, indexed: bool, warm: bool) -> list[jax.Array]:
    (out,) = _outputs(metric, *operands, K=K, indexed=indexed, warm=warm)
    ndims = _core_ndims(metric, False, False)
    operands = operands[: len(ndims)]  # neither an index nor guesses change the result
    Q, P = operands[0].shape[-2], operands[1].shape[-2]
    scenes = max(1, known(size(batch_shape(operands, ndims)), 1))
    chunk = max(1, min(known(Q, _SYMBOLIC_CHUNK), _CHUNK // max(1, P * scenes)))
    filled = known(Q, -(-Q // chunk) * chunk)  # lax.map takes an unknown number of queries in whole chunks alone

    def one(q: jax.Array, p: jax.Array, *rest: jax.Array) -> jax.Array:
        *parameters, length = rest
        exists = jnp.arange(P, dtype=jnp.int32) < length

        def nearest(x: jax.Array) -> jax.Array:
            _, idxs = lax.top_k(-_key(metric.distance(x[None, :] - p, *parameters), exists), K)
            # Rank the K chosen by the distances that the caller will see: XLA may round the same formula differently
            # in a differently fused loop.
            dists = metric.distance(x[None, :] - p[idxs], *(a[idxs] for a in parameters))
            return ordered(dists, jnp.where(exists[idxs], idxs, jnp.int32(-1)))

        if filled != Q:
            q = jnp.pad(q, [(0, filled - Q), (0, 0)])
        return lax.map(nearest, q, batch_size=chunk)[:Q]

    # Batch axes that an index or guesses alone have in full.
    return [jnp.broadcast_to(over_batch(one, operands, ndims), out.shape)]


def ordered(dists: jax.Array, idxs: jax.Array) -> jax.Array:
    """Indices (..., L) by (distance, index): numbers, then +inf, NaN, and −1 for what is missing. −0 equals +0."""
    number, nan, missing = np.int32(0), np.int32(1), np.int32(2)
    kind = jnp.where(idxs < 0, missing, jnp.where(jnp.isnan(dists), nan, number))
    dists = jnp.where((kind != number) | (dists == 0), jnp.zeros_like(dists), dists)
    return lax.sort((kind, dists, idxs), num_keys=3)[2]


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
        cores=functools.partial(_cores, metric),
        kernel=functools.partial(_kernel, metric),
    )
    piecewise_constant(p)
    return p


_PRIMITIVES = {metric: _make(metric) for metric in (ANISOTROPIC, ISOTROPIC)}
