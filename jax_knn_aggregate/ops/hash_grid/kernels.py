"""The families of hash grids, one for each grid, and what their kernels are called with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import ffi
from ...core.batch import Shape, known, size
from ...core.family import Family, Structs
from ...core.one_target import Group, one_target
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


def _scratch(grid: HashGrid, platform: str, batch: Shape, x: Group, results: Group) -> list[jax.ShapeDtypeStruct]:
    """On CUDA: what groups of levels add to the gradient in x, and whole numbers that sum the table's gradient.

    Numbers take 8 bytes for each 4 of what is computed in, and are kept for some levels at a time, or for one.
    """
    scratch: list[jax.ShapeDtypeStruct] = []
    if platform != "cuda":
        return scratch
    x_bar, table_bar, _ = results
    dtype, points = x[0].dtype, size(batch) * x[0].shape[-2]
    levels = ffi.number("cuda.pairs_of_thread") // -(-grid.features // 2)
    groups = -(-grid.levels // levels)
    if x_bar is not None and groups > 1:
        scratch.append(jax.ShapeDtypeStruct((groups, points, grid.dim), dtype))
    if table_bar is not None:
        tables, row = size(table_bar.shape[:-2]), 2 * dtype.itemsize * grid.features
        most = max(ffi.number("cuda.grid_sum_bytes"), int(np.diff(grid.level_rows).max()) * row)
        most = min(most, known(tables, most) * grid.rows * row)
        scratch.append(
            jax.ShapeDtypeStruct((most + tables * grid.levels * ffi.number("cuda.grid_unit_bytes"),), jnp.uint8)
        )
    return scratch


@functools.cache
def family(grid: HashGrid) -> Family:
    """x = (positions (N, dim), table (rows, features)), aux = (weights of levels,), y = (N, levels·features)."""

    def outputs(x: Structs, aux: Structs) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((x[0].shape[0], grid.outputs), x[1].dtype)]

    attributes = _attributes(grid)
    return Family(
        "hash_grid",
        reference=functools.partial(reference, grid),
        outputs=outputs,
        x_ndims=(2, 2),
        aux_ndims=(1,),
        y_ndims=(2,),
        items=((0,), (), (0,)),
        kernels=one_target(
            "hash_grid",
            x=2,
            y=1,
            attributes=lambda x, aux: attributes,
            sums=(1,),
            scratch=functools.partial(_scratch, grid),
        ),
    )
