"""Searches for the nearest points, and aggregates over them: the public functions."""

from .api import (
    KnnAggregate,
    KnnSearch,
    build_index,
    build_knn_table,
    knn_aggregate,
    knn_aggregate_aniso,
    knn_aggregate_aniso_lookup,
    knn_aggregate_aniso_precomputed,
    knn_aggregate_precomputed,
    knn_search,
    knn_search_aniso,
)
from .index import KnnIndex

__all__ = [
    "KnnAggregate",
    "KnnIndex",
    "KnnSearch",
    "build_index",
    "build_knn_table",
    "knn_aggregate",
    "knn_aggregate_aniso",
    "knn_aggregate_aniso_lookup",
    "knn_aggregate_aniso_precomputed",
    "knn_aggregate_precomputed",
    "knn_search",
    "knn_search_aniso",
]
