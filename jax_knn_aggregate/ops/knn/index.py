"""The index primitive: a cloud's points in an order and with bounds that let a search skip most of them.

What an index holds, and why a search through it is exact, is told in ``csrc/knn/index/index.h``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import ffi
from ...core.batch import batch_shape, over_batch, over_merged_batch, size
from ...core.primitive import bind, make_primitive, piecewise_constant
from .metric import ANISOTROPIC, ISOTROPIC, Metric

Struct = jax.ShapeDtypeStruct

_LEAF, _FAN_OUT, _NODE_ROWS, _BASE = (ffi.number(f"index.{n}") for n in ("leaf", "fan_out", "node_rows", "base"))
#: Core axes of leaves, order, nodes.
NDIMS = (3, 2, 3)


@dataclasses.dataclass(frozen=True)
class KnnIndex:
    """An index of a cloud, as ``build_index`` makes it. A pytree of three arrays, which mean nothing to users.

    Attributes:
      metric: "aniso" or "iso", for searches by this metric.
      P: the number of points.
    """

    leaves: jax.Array
    order: jax.Array
    nodes: jax.Array
    metric: str
    P: int

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.leaves, self.order, self.nodes


jax.tree_util.register_dataclass(KnnIndex, data_fields=["leaves", "order", "nodes"], meta_fields=["metric", "P"])


def build(
    metric: Metric, p: jax.Array, parameters: Sequence[jax.Array], lengths: jax.Array, implementation: str | None
) -> KnnIndex:
    """Arguments as those of ``search.search``. Leading axes of the arrays are batch axes of size n or 1."""
    leaves, order, nodes = bind(_PRIMITIVES[metric], p, *parameters, lengths, implementation=implementation)
    return KnnIndex(leaves, order, nodes, metric.name, p.shape[-2])


def _nodes(P: int) -> list[int]:
    """How many nodes there are on each level, leaves first."""
    nodes = [math.ceil(P / _LEAF)]
    while nodes[-1] > _FAN_OUT:
        nodes.append(math.ceil(nodes[-1] / _FAN_OUT))
    return nodes


def _rows(metric: Metric) -> int:
    return 3 + sum(3 ** (n - 1) for n in metric.search_ndims)  # p, then sigma and R


def shapes(metric: Metric, P: int) -> tuple[tuple[int, ...], ...]:
    """Core shapes of leaves, order and nodes."""
    nodes = _nodes(P)
    groups = sum(math.ceil(n / _FAN_OUT) for n in nodes)
    return (nodes[0], _rows(metric), _LEAF), (nodes[0], _LEAF), (groups, _NODE_ROWS, _FAN_OUT)


def structs(metric: Metric, batch: tuple[int, ...], P: int, dtype: Any) -> list[Struct]:
    """Leaves, order and nodes, for points of this dtype."""
    return [Struct(batch + s, d) for s, d in zip(shapes(metric, P), (dtype, jnp.int32, dtype), strict=True)]


def _core_ndims(metric: Metric) -> tuple[int, ...]:
    return (2, *metric.search_ndims, 0)


def _cores(metric: Metric) -> tuple[list[str], list[str]]:
    return ["." * n for n in _core_ndims(metric)], ["." * n for n in NDIMS]


def _outputs(metric: Metric, *avals: Any) -> list[Struct]:
    return structs(metric, batch_shape(avals, _core_ndims(metric)), avals[0].shape[-2], avals[0].dtype)


def emit(metric: Metric, platform: str, *operands: jax.Array, plain: bool = False) -> list[jax.Array] | None:
    """Calls the builder for operands of at most MAX_BATCH_AXES batch axes; None where there is none.

    plain: on CPUs, whether to leave points as they come and to rule nothing out.
    """
    target = f"{metric.name}_index"
    if not ffi.available(target, platform):
        return None
    results = _outputs(metric, *operands)
    if platform == "cpu":
        return list(ffi.call(target, results, plain=np.int32(plain))(*operands))
    clouds, P = size(batch_shape(operands, _core_ndims(metric))), operands[0].shape[-2]
    of_cloud = P * ffi.number("cuda.index_bytes_of_point") + ffi.number("cuda.index_bytes_of_cloud")
    scratch = Struct((clouds * of_cloud + ffi.number("cuda.sort_bytes"),), jnp.uint8)
    return list(ffi.call(target, [*results, scratch])(*operands)[:3])


def _kernel(metric: Metric, platform: str, *operands: jax.Array) -> list[jax.Array] | None:
    depth = operands[0].ndim - 2
    return over_merged_batch(
        lambda operands, *_: emit(metric, platform, *operands), operands, depth, _outputs(metric, *operands)
    )


def _reference(metric: Metric, *operands: jax.Array) -> list[jax.Array]:
    """A valid index that rules nothing out: points as they come, and no bounds."""
    P, dtype = operands[0].shape[-2], operands[0].dtype
    leaves_shape, order_shape, nodes_shape = shapes(metric, P)
    spare = math.prod(order_shape) - P
    inf, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype)
    # Computed, and no constants: custom_partitioning takes no function that has one.
    missing = jnp.where(jnp.arange(leaves_shape[1], dtype=jnp.int32) < 3, inf, zero)  # p at +inf
    nodes_exist = [jnp.arange(math.ceil(n / _FAN_OUT) * _FAN_OUT, dtype=jnp.int32) < n for n in _nodes(P)]
    base = jnp.where(jnp.concatenate(nodes_exist), -inf, inf)
    nodes = jnp.zeros(nodes_shape, dtype).at[:, _BASE].set(base.reshape(-1, _FAN_OUT))

    def one(*operands: jax.Array) -> list[jax.Array]:
        *points, length = operands
        rows = jnp.concatenate([a.reshape(P, -1) for a in points], -1)
        reachable = jnp.isfinite(rows).all(-1)
        if len(points) > 1:  # a negative sigma may make distances of −inf
            reachable |= (points[1] < 0).any(-1)
        order = jnp.arange(P + spare, dtype=jnp.int32)
        exists = (order < length) & jnp.pad(reachable, (0, spare))
        rows = jnp.where(exists[:, None], jnp.pad(rows, [(0, spare), (0, 0)]), missing[None])
        return [
            jnp.swapaxes(rows.reshape(order_shape + leaves_shape[1:2]), 1, 2),
            jnp.where(exists, order, jnp.int32(-1)).reshape(order_shape),
            nodes,
        ]

    return list(over_batch(one, operands, _core_ndims(metric)))


def _make(metric: Metric) -> Any:
    p = make_primitive(
        f"{metric.name}_index",
        reference=functools.partial(_reference, metric),
        outputs=functools.partial(_outputs, metric),
        cores=functools.partial(_cores, metric),
        kernel=functools.partial(_kernel, metric),
    )
    piecewise_constant(p)
    return p


_PRIMITIVES = {metric: _make(metric) for metric in (ANISOTROPIC, ISOTROPIC)}
