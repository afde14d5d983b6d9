"""Clouds split over devices: what the ops do with ``points_axis``, inside ``jax.shard_map``.

Each device along that mesh axis holds P of the points, with their features and metrics, which never leave it. Point j
of device r has the index r·P + j. Every device searches its own points for all queries of its group; then

    lists (Q, K) of distance and index  --all_to_all-->  the lists of Q/n queries from all n devices
    the K best of each                  --all_gather-->  their indices, (Q, K), on every device
    sums over the own among them        --psum-->        f_out, w_out, dists

so that the bytes which a device sends do not grow with n. Where the queries vary over the axis too, each device has
queries of its own: they are gathered first, and the last step is a psum_scatter, which gives them their results.

Nothing here has a rule of its own: derivatives are those of JAX's collectives and of the aggregate family, whose
gradients of points are already those of the own points, summed over all queries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import checks
from .aggregate import aggregate as aggregate_own
from .aggregate import featureless
from .index import KnnIndex
from .metric import Metric
from .search import ordered
from .search import search as search_own


def check(points_axis: Any, q: jax.Array, p: jax.Array) -> None:
    """Raises where ``points_axis`` is not an axis of an enclosing shard_map over which p is split."""
    if points_axis is None:
        return
    if not isinstance(points_axis, str):
        raise TypeError(f"points_axis is {points_axis!r}, expected the name of a mesh axis.")
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if points_axis not in manual:
        raise ValueError(
            f"points_axis is {points_axis!r}, but the axes of the enclosing jax.shard_map are {tuple(manual)}. "
            "Call this inside jax.shard_map with that axis among its axis_names."
        )
    if points_axis not in _varying(p):
        raise ValueError(
            f"p does not vary over points_axis {points_axis!r}. Split p over it (in_specs of jax.shard_map), and leave "
            "check_vma=True: without it the gradients of a sum over devices cannot be told from those of one device."
        )


def count(points_axis: str | None, p: jax.Array) -> int:
    """The number of points on all devices."""
    P = p.shape[-2] * (1 if points_axis is None else lax.axis_size(points_axis))
    checks.points(P)
    return P


def search(
    metric: Metric,
    q: jax.Array,
    p: jax.Array,
    parameters: Any,
    lengths: jax.Array,
    K: int,
    implementation: str | None,
    points_axis: str | None,
    index: KnnIndex | None = None,
    warm: jax.Array | None = None,
) -> jax.Array:
    """As ``search.search``, with indices into the points of all devices. ``index`` is of this device's points."""
    if points_axis is None:
        return search_own(metric, q, p, parameters, lengths, K, implementation, index, warm)
    q, p, *parameters = (lax.stop_gradient(a) for a in (q, p, *parameters))
    P, own_queries = p.shape[-2], points_axis in _varying(q)
    if warm is not None:
        warm = _own("warm_idxs", warm, q, P, points_axis)
    q = _of_all(q, points_axis)
    Q = q.shape[-2]
    idxs = search_own(metric, q, p, parameters, lengths, min(K, P), implementation, index, warm)
    x = featureless(q, p, tuple(parameters))
    _, _, dists = aggregate_own(metric, x, idxs, implementation)
    idxs = jnp.where(idxs < 0, jnp.int32(-1), idxs + _first(P, points_axis))

    n = lax.axis_size(points_axis)
    # A list of Q/n queries from each of n devices, one behind the other; Q is filled up to a multiple of n.
    pad = [(0, 0)] * (idxs.ndim - 2) + [(0, -Q % n), (0, 0)]

    def exchanged(a: jax.Array) -> jax.Array:
        return lax.all_to_all(jnp.pad(a, pad), points_axis, a.ndim - 2, a.ndim - 1, tiled=True)

    merged = ordered(exchanged(dists), exchanged(idxs))[..., :K]
    if own_queries:
        return merged
    everywhere = lax.all_gather(merged, points_axis, axis=merged.ndim - 2, tiled=True, to="invarying")
    return everywhere[..., :Q, :]


def aggregate(
    metric: Metric, x: tuple[jax.Array, ...], idxs: jax.Array, implementation: str | None, points_axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``aggregate.aggregate``, with indices into the points of all devices."""
    if points_axis is None:
        return aggregate_own(metric, x, idxs, implementation)
    own_queries = points_axis in _varying(x[0])
    P, exists = x[1].shape[-2], idxs >= 0
    here = _own("knn_idxs", idxs, x[0], P, points_axis)

    def total(a: jax.Array) -> jax.Array:
        if own_queries:
            return lax.psum_scatter(a, points_axis, scatter_dimension=a.ndim - 2, tiled=True)
        return lax.psum(a, points_axis)

    f_out, w, dists = aggregate_own(metric, (_of_all(x[0], points_axis), *x[1:]), here, implementation)
    # Half precision is summed over devices in the precision in which it was summed over neighbours.
    f_out = total(f_out.astype(w.dtype)).astype(f_out.dtype)
    dists = total(jnp.where(here >= 0, dists, jnp.zeros_like(dists)))
    return f_out, total(w), jnp.where(exists, dists, jnp.full_like(dists, jnp.inf))


def _varying(a: jax.Array) -> frozenset[str]:
    return jax.typeof(a).manual_axis_type.varying


def _of_all(a: jax.Array, axis: str) -> jax.Array:
    """What belongs to queries, for all queries of the devices along ``axis``."""
    return lax.all_gather(a, axis, axis=a.ndim - 2, tiled=True) if axis in _varying(a) else a


def _own(name: str, idxs: jax.Array, q: jax.Array, P: int, axis: str) -> jax.Array:
    """For all queries, indices into this device's points, −1 for those of others. ``idxs`` belong to the queries q."""
    if axis in _varying(idxs) - _varying(q):
        raise ValueError(
            f"{name} varies over points_axis {axis!r}, but q does not: each device along it would ask for other "
            "neighbours of the same queries. Split both over it (in_specs of jax.shard_map), or neither."
        )
    if axis in _varying(q) - _varying(idxs):
        idxs = lax.pcast(idxs, axis, to="varying")
    idxs = _of_all(idxs, axis)
    here = idxs - _first(P, axis)
    return jnp.where((idxs >= 0) & (here >= 0) & (here < P), here, jnp.int32(-1))


def _first(P: int, axis: str) -> jax.Array:
    """The index of this device's first point."""
    return lax.axis_index(axis).astype(jnp.int32) * jnp.int32(P)
