"""The public functions: what they take, what they return, and nothing of how it is computed.

The distance of query q to point k is ``dist = Σ_i sigma_ki (R_k (q − p_k))_i²`` and its weight ``w = exp(−dist)``:
sigma multiplies a squared length, so it is a precision, in 1 / length²; there is no ½ and no normalisation. R maps
world to local and need not be orthonormal; sigma may be any real number. The maths is that of the CUDA extension
*CUDA-kNN-Aniso-Gaussian-Feature-Aggregation* (2024), with every derivative filled in.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...core import checks as core_checks
from ...core.checks import Array, Implementation
from ...core.sharding import extended, left_to_partitioner
from . import checks, points
from . import index as knn_index
from .aggregate import featureless
from .index import KnnIndex
from .metric import ANISOTROPIC, ISOTROPIC, Metric
from .search import search


class KnnAggregate(NamedTuple):
    """What the aggregate calls return. Without a batch axis in the arguments there is none here.

    Attributes:
      f_out: (B, Q, F), in the dtype of f: Σ_k w_k f_k over the K neighbours.
      w_out: (B, Q, K): exp(−dist) (isotropic: exp(−sigma·dist)), 0 in empty slots.
      dists: (B, Q, K): the metric's (squared) distance, +inf in empty slots.
      idxs: (B, Q, K) int32: indices of the neighbours, −1 in empty slots. No tangent (float0).
    """

    f_out: jax.Array
    w_out: jax.Array
    dists: jax.Array
    idxs: jax.Array


class KnnSearch(NamedTuple):
    """What the searches return. Without a batch axis in the arguments there is none here.

    Attributes:
      dists: (B, Q, K) ascending, +inf in empty slots. Differentiable.
      idxs: (B, Q, K) int32, −1 in empty slots. No tangent (float0).
    """

    dists: jax.Array
    idxs: jax.Array


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the searching calls have in common, as users gave it."""

    K: int
    p_lengths: Array | int | None
    index: KnnIndex | None
    warm_idxs: Array | None
    points_axis: str | None
    implementation: Implementation


def knn_aggregate_aniso(
    q: Array,
    p: Array,
    f: Array,
    sigma: Array,
    R: Array,
    K: int,
    *,
    p_lengths: Array | int | None = None,
    index: KnnIndex | None = None,
    warm_idxs: Array | None = None,
    points_axis: str | None = None,
    implementation: Implementation = None,
) -> KnnAggregate:
    """Sums features of the K nearest points, each point measuring distance in its own metric.

    All arrays may also come without the batch axis B. f_out, w_out and dists are differentiable in q, p, f, sigma and
    R, to any order, in forward and reverse mode; neighbours are held fixed, as they are almost everywhere.

    Args:
      q: (B, Q, 3) queries, in units of length.
      p: (B, P, 3) points.
      f: (B, P, F) features; float32 calls also take bfloat16 or float16 here, summed in float32.
      sigma: (B, P, 3) precisions along the local axes, 1 / length²; any real number.
      R: (B, P, 3, 3) maps world to local, row i being local axis i; need not be orthonormal.
      K: number of neighbours, a Python integer, 1 <= K <= P.
      p_lengths: (B,) integers, clipped to [0, P]; points from that index on do not exist. Without batch axis a scalar.
      index: of this cloud, from ``build_index(p, sigma, R)`` (isotropic: ``build_index(p)``) with the same p_lengths;
        spares this call to look for structure itself. It is not compared with the points: after these have moved,
        kernels find neighbours in the cloud for which it was built, without a warning, and the reference, which makes
        no use of an index, in the one given. One that was never built, such as the zeros that a scan carries until the
        first refresh, gives neighbours of its own: points that exist, maybe one of them several times, or none.
      warm_idxs: (B, Q, W) integers, likely neighbours, such as idxs of an earlier step. They may make the search faster
        and never change its result, also where the index is of an earlier cloud; those outside [0, P) are ignored.
      points_axis: inside ``jax.shard_map``, the mesh axis over which the cloud is split: p, f, sigma, R and p_lengths
        are those of this device's P points, and neighbours are found among all devices' points, point j of device r
        having the index r·P + j. ``index`` is of this device's points. K may be up to P times the number of devices.
        Queries are the same on all devices of the axis, and so are the results; or they vary over it, and each device
        gets the results of its own.
      implementation: None uses kernels where they exist, "xla" the pure-JAX reference; "ffi" raises
        NotImplementedError where there is no kernel: for the platform, this K, or derivatives by forward over forward
        mode and of third and higher order, which run the reference otherwise.

    Returns:
      KnnAggregate. Neighbours are the K smallest distances as computed in the input dtype, in ascending order, equal
      ones by index; +inf comes after all numbers, NaN after +inf, empty slots last.

    Raises:
      ValueError: for shapes or K out of range. TypeError: for dtypes.
    """
    options = _Options(K, p_lengths, index, warm_idxs, points_axis, implementation)
    return _aggregate(ANISOTROPIC, q, p, f, {"sigma": sigma, "R": R}, options)


def knn_aggregate(
    q: Array,
    p: Array,
    f: Array,
    sigma: Array,
    K: int,
    *,
    p_lengths: Array | int | None = None,
    index: KnnIndex | None = None,
    warm_idxs: Array | None = None,
    points_axis: str | None = None,
    implementation: Implementation = None,
) -> KnnAggregate:
    """Sums features of the K nearest points by Euclidean distance, with weights exp(−sigma·|q − p|²).

    Args:
      sigma: (B, P, 1) precision of each point, 1 / length²; any real number.
      The others as in ``knn_aggregate_aniso``.

    Returns:
      KnnAggregate; its dists are squared Euclidean distances |q − p|², without sigma.

    Raises:
      ValueError: for shapes or K out of range. TypeError: for dtypes.
    """
    options = _Options(K, p_lengths, index, warm_idxs, points_axis, implementation)
    return _aggregate(ISOTROPIC, q, p, f, {"sigma": sigma}, options)


def knn_aggregate_aniso_lookup(
    q: Array,
    p: Array,
    f: Array,
    sigma: Array,
    R: Array,
    knn_table: Array,
    K: int,
    *,
    p_lengths: Array | int | None = None,
    index: KnnIndex | None = None,
    implementation: Implementation = None,
) -> KnnAggregate:
    """As ``knn_aggregate_aniso``, but with neighbours from a table: those of the nearest point by Euclidean distance.

    Args:
      knn_table: (P, K') or (B, P, K') integers of any dtype, K' >= K, as ``build_knn_table`` makes it; a query takes
        the first K entries of the row of its nearest point. Entries outside [0, P), or naming a point that does not
        exist, mean "no neighbour".
      index: from ``build_index(p)``, for finding the nearest point.
      The others as in ``knn_aggregate_aniso``.

    Returns:
      KnnAggregate, with neighbours in the order of the table.

    Raises:
      ValueError: for shapes or K out of range. TypeError: for dtypes.
    """
    implementation = core_checks.implementation(implementation)
    (q, p, f, sigma, R), batch = checks.arrays(q=q, p=p, f=f, sigma=sigma, R=R)
    P = p.shape[-2]
    table = checks.indices("knn_table", knn_table, P, batch, (P, "K'"), may_share=True)
    K = checks.neighbours(K, table.shape[-1], "the width of knn_table")
    table = table[..., :K]
    lengths = checks.lengths(p_lengths, batch, P)
    index = checks.index(index, ISOTROPIC, p, batch)
    nearest = search(ISOTROPIC, q, p, (), lengths, 1, implementation, index)[..., 0]

    def rows(table: jax.Array, nearest: jax.Array) -> jax.Array:
        return table.at[nearest].get(mode="fill", fill_value=-1, wrap_negative_indices=False)

    # One row for each query, split over devices as the queries are.
    sharding = extended(jax.typeof(nearest).sharding)
    idxs = left_to_partitioner(jax.vmap(rows) if table.ndim == 3 else rows, sharding)(table, nearest)
    idxs = jnp.where(idxs < lengths[..., None, None], idxs, jnp.int32(-1))
    return _result(ANISOTROPIC, (q, p, f, sigma, R), idxs, None, implementation)


def knn_aggregate_aniso_precomputed(
    q: Array,
    p: Array,
    f: Array,
    sigma: Array,
    R: Array,
    knn_idxs: Array,
    *,
    points_axis: str | None = None,
    implementation: Implementation = None,
) -> KnnAggregate:
    """As ``knn_aggregate_aniso``, but for given neighbours, in the order given.

    Args:
      knn_idxs: (B, Q, K) integers of any dtype; any outside [0, P) mean "no neighbour" and come back as −1. With
        points_axis they are indices into the points of all devices.
      The others as in ``knn_aggregate_aniso``.

    Raises:
      ValueError: for shapes. TypeError: for dtypes.
    """
    return _precomputed(ANISOTROPIC, q, p, f, {"sigma": sigma, "R": R}, knn_idxs, points_axis, implementation)


def knn_aggregate_precomputed(
    q: Array,
    p: Array,
    f: Array,
    sigma: Array,
    knn_idxs: Array,
    *,
    points_axis: str | None = None,
    implementation: Implementation = None,
) -> KnnAggregate:
    """As ``knn_aggregate``, but for given neighbours, in the order given.

    Args:
      knn_idxs: as in ``knn_aggregate_aniso_precomputed``.
      The others as in ``knn_aggregate``.

    Raises:
      ValueError: for shapes. TypeError: for dtypes.
    """
    return _precomputed(ISOTROPIC, q, p, f, {"sigma": sigma}, knn_idxs, points_axis, implementation)


def knn_search_aniso(
    q: Array,
    p: Array,
    sigma: Array,
    R: Array,
    K: int,
    *,
    p_lengths: Array | int | None = None,
    index: KnnIndex | None = None,
    warm_idxs: Array | None = None,
    points_axis: str | None = None,
    implementation: Implementation = None,
) -> KnnSearch:
    """The K nearest points, each point measuring distance in its own metric. Arguments as in ``knn_aggregate_aniso``.

    Raises:
      ValueError: for shapes or K out of range. TypeError: for dtypes.
    """
    options = _Options(K, p_lengths, index, warm_idxs, points_axis, implementation)
    return _search(ANISOTROPIC, q, p, {"sigma": sigma, "R": R}, options)


def knn_search(
    q: Array,
    p: Array,
    K: int,
    *,
    p_lengths: Array | int | None = None,
    index: KnnIndex | None = None,
    warm_idxs: Array | None = None,
    points_axis: str | None = None,
    implementation: Implementation = None,
) -> KnnSearch:
    """The K nearest points by Euclidean distance; dists are squared. Arguments as in ``knn_aggregate_aniso``.

    Raises:
      ValueError: for shapes or K out of range. TypeError: for dtypes.
    """
    options = _Options(K, p_lengths, index, warm_idxs, points_axis, implementation)
    return _search(ISOTROPIC, q, p, {}, options)


def build_knn_table(
    p: Array,
    K: int,
    *,
    p_lengths: Array | int | None = None,
    index: KnnIndex | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """The K nearest points of each point by Euclidean distance: the table that ``knn_aggregate_aniso_lookup`` takes.

    Args:
      p: (B, P, 3) or (P, 3) points.
      K, p_lengths, implementation: as in ``knn_aggregate_aniso``.
      index: from ``build_index(p)``.

    Returns:
      (B, P, K) or (P, K) int32. Ties go to the smaller index, so a point comes first in its own row unless an exact
      duplicate has a smaller index. Rows of points that do not exist, and empty slots, are −1.

    Raises:
      ValueError: for shapes or K out of range. TypeError: for dtypes.
    """
    implementation = core_checks.implementation(implementation)
    (p,), batch = checks.arrays(p=p)
    P = p.shape[-2]
    K = checks.neighbours(K, P, "the number of points P")
    lengths = checks.lengths(p_lengths, batch, P)
    index = checks.index(index, ISOTROPIC, p, batch)
    idxs = search(ISOTROPIC, p, p, (), lengths, K, implementation, index)
    rows = jnp.arange(P, dtype=jnp.int32).reshape((1,) * len(batch) + (P, 1))
    exists = rows < lengths[..., None, None]
    return jnp.where(exists, idxs, jnp.int32(-1))


def build_index(
    p: Array,
    sigma: Array | None = None,
    R: Array | None = None,
    *,
    p_lengths: Array | int | None = None,
    implementation: Implementation = None,
) -> KnnIndex:
    """An index of a cloud, for the ``index`` of searches: worth keeping where a cloud stays for several calls.

    Without one, a search builds what it needs by itself in every call. No tangent flows through an index.

    Args:
      p: (B, P, 3) or (P, 3) points.
      sigma, R: as in ``knn_aggregate_aniso``, for searches by these metrics; without them, for Euclidean searches
        (isotropic calls, ``knn_search``, ``build_knn_table``, and the look-up of ``knn_aggregate_aniso_lookup``).
      p_lengths, implementation: as in ``knn_aggregate_aniso``.

    Returns:
      KnnIndex, a pytree: it can be passed through jit, vmap, scan and the rest.

    Raises:
      ValueError: for shapes, or if only one of sigma and R is given. TypeError: for dtypes.
    """
    implementation = core_checks.implementation(implementation)
    if (sigma is None) != (R is None):
        raise ValueError(
            "build_index got only one of sigma and R, expected both, for searches by the metrics that they make, or "
            "neither, for Euclidean searches."
        )
    metric = ISOTROPIC if sigma is None else ANISOTROPIC
    (p, *parameters), batch = checks.arrays(p=p, **({} if sigma is None else {"sigma": sigma, "R": R}))
    lengths = checks.lengths(p_lengths, batch, p.shape[-2])
    return knn_index.build(metric, p, parameters, lengths, implementation)


def _aggregate(
    metric: Metric, q: Array, p: Array, f: Array, parameters: dict[str, Array], options: _Options
) -> KnnAggregate:
    implementation = core_checks.implementation(options.implementation)
    x, batch = checks.arrays(metric is ISOTROPIC, q=q, p=p, f=f, **parameters)
    idxs = _neighbours(metric, x[0], x[1], x[3:], batch, options)
    return _result(metric, tuple(x), idxs, options.points_axis, implementation)


def _precomputed(
    metric: Metric,
    q: Array,
    p: Array,
    f: Array,
    parameters: dict[str, Array],
    knn_idxs: Array,
    points_axis: str | None,
    implementation: Implementation,
) -> KnnAggregate:
    implementation = core_checks.implementation(implementation)
    x, batch = checks.arrays(metric is ISOTROPIC, q=q, p=p, f=f, **parameters)
    points.check(points_axis, x[0], x[1])
    idxs = checks.indices("knn_idxs", knn_idxs, points.count(points_axis, x[1]), batch, (x[0].shape[-2], "K"))
    return _result(metric, tuple(x), idxs, points_axis, implementation)


def _result(
    metric: Metric, x: tuple[jax.Array, ...], idxs: jax.Array, points_axis: str | None, implementation: Implementation
) -> KnnAggregate:
    return KnnAggregate(*points.aggregate(metric, x, idxs, implementation, points_axis), idxs)


def _search(metric: Metric, q: Array, p: Array, parameters: dict[str, Array], options: _Options) -> KnnSearch:
    implementation = core_checks.implementation(options.implementation)
    (q, p, *given), batch = checks.arrays(q=q, p=p, **parameters)
    idxs = _neighbours(metric, q, p, given, batch, options)
    # The aggregate of no features gives distances that are differentiable; weights are not asked for.
    x = featureless(q, p, tuple(given))
    _, _, dists = points.aggregate(metric, x, idxs, implementation, options.points_axis)
    return KnnSearch(dists, idxs)


def _neighbours(
    metric: Metric,
    q: jax.Array,
    p: jax.Array,
    parameters: list[jax.Array],
    batch: tuple[int, ...],
    options: _Options,
) -> jax.Array:
    axis = options.points_axis
    points.check(axis, q, p)
    P = points.count(axis, p)
    K = checks.neighbours(options.K, P, "the number of points P" + (" of all devices" if axis else ""))
    lengths = checks.lengths(options.p_lengths, batch, p.shape[-2])
    index = checks.index(options.index, metric, p, batch)
    warm = options.warm_idxs
    if warm is not None:
        warm = checks.indices("warm_idxs", warm, P, batch, (q.shape[-2], "W"))
    parameters = parameters[: len(metric.search_ndims)]
    return points.search(metric, q, p, parameters, lengths, K, options.implementation, axis, index, warm)
