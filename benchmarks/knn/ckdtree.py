"""SciPy's exact nearest neighbours in the Euclidean metric, which is what there is on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

CKDTREE = "SciPy cKDTree, Euclidean"


def ckdtree(q: jax.Array, p: jax.Array, K: int) -> dict[str, Callable[[], Any]]:
    """A contestant that builds a tree for each scene and queries it, on 2 threads; none without SciPy."""
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        return {}
    scenes = list(zip(*(np.asarray(a).reshape(-1, *a.shape[-2:]) for a in (q, p)), strict=True))
    return {CKDTREE: lambda: [cKDTree(p).query(q, K, workers=2) for q, p in scenes]}
