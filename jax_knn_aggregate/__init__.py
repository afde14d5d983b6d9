"""Feature aggregation from the K nearest points under per-point metrics, for JAX, differentiable to any order."""

from ._api import (
    KnnAggregate,
    KnnSearch,
    build_knn_table,
    knn_aggregate,
    knn_aggregate_aniso,
    knn_aggregate_aniso_lookup,
    knn_aggregate_aniso_precomputed,
    knn_search,
    knn_search_aniso,
)
from ._ffi import FFI_TARGETS

__version__ = "0.1.0"

__all__ = [
    "FFI_TARGETS",
    "KnnAggregate",
    "KnnSearch",
    "build_knn_table",
    "knn_aggregate",
    "knn_aggregate_aniso",
    "knn_aggregate_aniso_lookup",
    "knn_aggregate_aniso_precomputed",
    "knn_search",
    "knn_search_aniso",
]
