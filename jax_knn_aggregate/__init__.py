"""Feature aggregation from the K nearest points under per-point metrics, for JAX, differentiable to any order."""

from . import tcnn
from .core.ffi import FFI_TARGETS
from .ops.distortion import (
    distortion_loss,
    eff_distloss,
    eff_distloss_native,
    flatten_distortion_loss,
    flatten_eff_distloss,
)
from .ops.hash_grid import HashGrid, hash_grid
from .ops.knn import (
    KnnAggregate,
    KnnIndex,
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
from .ops.mlp import LeakyReLU, Sine, Softplus, Squareplus, mlp
from .ops.splat import Gaussians, Rendering, load_gaussians, render_gaussians, save_gaussians

__version__ = "0.1.0"

__all__ = [
    "FFI_TARGETS",
    "Gaussians",
    "HashGrid",
    "KnnAggregate",
    "KnnIndex",
    "KnnSearch",
    "LeakyReLU",
    "Rendering",
    "Sine",
    "Softplus",
    "Squareplus",
    "build_index",
    "build_knn_table",
    "distortion_loss",
    "eff_distloss",
    "eff_distloss_native",
    "flatten_distortion_loss",
    "flatten_eff_distloss",
    "hash_grid",
    "knn_aggregate",
    "knn_aggregate_aniso",
    "knn_aggregate_aniso_lookup",
    "knn_aggregate_aniso_precomputed",
    "knn_aggregate_precomputed",
    "knn_search",
    "knn_search_aniso",
    "load_gaussians",
    "mlp",
    "render_gaussians",
    "save_gaussians",
    "tcnn",
]
