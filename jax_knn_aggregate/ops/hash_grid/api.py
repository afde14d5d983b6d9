"""The hash grid encoding: the public function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import checks
from ...core.batch import known
from ...core.checks import Array, Implementation
from .grid import HashGrid
from .kernels import family


def hash_grid(
    x: Array,
    table: Array,
    grid: HashGrid,
    *,
    max_level: Array | float | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Features of points: of each level, the table's rows at the corners of the point's cell, interpolated.

    (Müller et al. 2022, "Instant neural graphics primitives".) Differentiable in x and table, to any order, in forward
    and reverse mode; derivatives are those inside cells, at a border those of the cell above. Gradients have the same
    bits from run to run.

    Args:
      x: (..., N, dim) positions, float32 or float64; the unit cube holds each level once, and beyond it rows repeat.
        Where a coordinate is not finite, or times the finest scale overflows, the point's features and the gradient in
        it are NaN, and no row of the table is touched.
      table: (rows, features), in the dtype of x; or bfloat16 or float16 with x in float32, which sums are taken in.
      grid: what the table is, static under jit.
      max_level: a number, which may be traced: level l counts clip(max_level − l, 0, 1) times, in features and
        gradients. Whole numbers leave finer levels out, fractions blend the next one in, for training from coarse to
        fine. Its own derivative is 0. None: all levels.
      implementation: None uses kernels where they exist, "xla" the pure-JAX reference; "ffi" raises
        NotImplementedError where the platform has no kernel.

    Returns:
      (..., N, levels·features), in the dtype of table: level after level, features of a level together.

    Raises:
      ValueError: for shapes. TypeError: for dtypes, or a grid that is none.
    """
    checks.implementation(implementation)
    if not isinstance(grid, HashGrid):
        raise TypeError(f"grid is a {type(grid).__name__}, expected a HashGrid.")
    x, table = checks.as_array("x", x), checks.as_array("table", table)
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"x has dtype {x.dtype}, expected float32 or float64. Convert it with astype.")
    fitting = [x.dtype, *([jnp.bfloat16, jnp.float16] if x.dtype == jnp.float32 else [])]
    if table.dtype not in fitting:
        expected = " or ".join(str(jnp.dtype(d)) for d in fitting)
        raise TypeError(f"table has dtype {table.dtype}, expected {expected} for x in {x.dtype}. Convert one of them.")
    if x.ndim < 2 or x.shape[-1] != grid.dim:
        raise ValueError(f"x has shape {x.shape}, expected (..., N, {grid.dim}), as dim is {grid.dim}.")
    if table.shape != (grid.rows, grid.features):
        raise ValueError(
            f"table has shape {table.shape}, expected {(grid.rows, grid.features)}, rows and features of {grid}."
        )
    if known(x.shape[-2], 0) >= 2**31:
        raise ValueError(f"x has N = {x.shape[-2]} points, expected fewer than 2**31. Split it.")
    shared = (1,) * (x.ndim - 2)
    weights = _weights(max_level, grid, x.dtype).reshape(*shared, grid.levels)
    table = table.reshape(*shared, *table.shape)
    return family(grid)(x, table, weights, implementation=implementation)[0]


def _weights(max_level: Any, grid: HashGrid, dtype: Any) -> jax.Array:
    """(levels,): how much each level counts."""
    if max_level is None:
        return jnp.ones(grid.levels, dtype)
    number = isinstance(max_level, int | float) and not isinstance(max_level, bool)
    if isinstance(max_level, jax.Array | np.ndarray | np.generic):
        number = max_level.ndim == 0 and jnp.isdtype(max_level.dtype, ("integral", "real floating"))
    if not number:
        raise TypeError(f"max_level is {max_level!r}, expected a number, or an array of shape ().")
    last = lax.stop_gradient(jnp.asarray(max_level).astype(dtype))
    return jnp.clip(last - jnp.asarray(np.arange(grid.levels), dtype), 0, 1)
