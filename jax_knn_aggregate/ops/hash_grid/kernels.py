"""The families of hash grids, one for each grid, and what their kernels are called with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core.family import Family, Structs
from ...core.one_target import one_target
from .grid import HashGrid
from .reference import reference


def _attributes(grid: HashGrid) -> dict[str, Any]:
    """A level is a row of each: csrc/hash_grid/hash_grid.h says what kernels do with it."""
    return {
        "features": np.int32(grid.features),
        "interpolation": np.int32(("nearest", "linear", "smoothstep").index(grid.interpolation)),
        "scales": grid.scales,
        "level_rows": grid.level_rows,
        "strides": grid.strides.astype(np.int64).ravel(),
        "hashed": grid.hashed.astype(np.int32),
    }


@functools.cache
def family(grid: HashGrid) -> Family:
    """x = (positions (N, dim), table (rows, features)), aux = (weights of levels,), y = (N, levels·features)."""

    def outputs(x: Structs, aux: Structs) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((x[0].shape[0], grid.outputs), x[1].dtype)]

    return Family(
        "hash_grid",
        reference=functools.partial(reference, grid),
        outputs=outputs,
        x_ndims=(2, 2),
        aux_ndims=(1,),
        y_ndims=(2,),
        items=((0,), (), (0,)),
        kernels=one_target("hash_grid", x=2, y=1, attributes=_attributes(grid), sums=(1,)),
    )
