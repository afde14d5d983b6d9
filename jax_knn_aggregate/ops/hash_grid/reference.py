"""The hash grid in pure JAX: what runs where there is no kernel, and what orders beyond the second differentiate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core.batch import known
from ...core.family import Operands
from .grid import HashGrid

_PRIMES = (1, 2654435761, 805459861, 3674653429)
#: Corners of so many points at a time: bounds what derivatives keep in memory.
_MOST_CORNERS = 2**22


def reference(grid: HashGrid, x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
    """positions (N, dim), table (rows, features); weights of levels (levels,) -> (N, levels·features)."""
    (positions, table), (weights,) = x, aux
    N, most = positions.shape[0], max(1, _MOST_CORNERS // (grid.levels * _corners(grid)))
    wide = table.astype(positions.dtype)  # so that sums of gradients are wide as well
    some = functools.partial(_encode, grid, wide, weights)
    if known(N, 0) <= most:
        y = some(positions)
    else:
        pieces = -(-N // most)
        padded = jnp.pad(positions, ((0, pieces * most - N), (0, 0))).reshape(pieces, most, grid.dim)
        y = lax.map(jax.checkpoint(some), padded).reshape(pieces * most, grid.outputs)[:N]
    return (y.astype(table.dtype),)


def _corners(grid: HashGrid) -> int:
    return 1 if grid.interpolation == "nearest" else 2**grid.dim


def _encode(grid: HashGrid, table: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
    """x (N, dim), table (rows, features), weights (levels,), all of one dtype -> (N, levels·features)."""
    cell, fraction, finite = _locate(grid, x)
    if grid.interpolation == "nearest":
        weight = jnp.ones((1, 1, 1), x.dtype)
    else:
        upper = fraction if grid.interpolation == "linear" else fraction * fraction * (3 - 2 * fraction)
        weight = _at_corners(jnp.multiply, jnp.stack([1 - upper, upper], axis=-1))
    # A point that is not finite touches no row: out of bounds, which the gather fills with zeros and its transpose
    # drops.
    rows = jnp.where(finite[:, None, None], _rows(grid, cell), table.shape[0])
    features = table.at[rows].get(mode="fill", fill_value=0)  # (N, levels, corners, features)
    y = (weight[..., None] * features).sum(2) * weights[None, :, None]
    return y.reshape(x.shape[0], grid.outputs) + _nan_unless(finite, x)[:, None]


def _at_corners(combine: Callable[[jax.Array, jax.Array], jax.Array], sides: jax.Array) -> jax.Array:
    """What the sides of a cell along each axis (N, levels, dim, 2) make at its corners (N, levels, 2**dim).

    Axis 0 varies fastest. One operation an axis rather than one a corner: much less to differentiate and to compile.
    """
    N, levels, dim, count = sides.shape
    shapes = [[count if axis == d else 1 for axis in reversed(range(dim))] for d in range(dim)]
    along = [sides[:, :, d].reshape(N, levels, *shape) for d, shape in enumerate(shapes)]
    return functools.reduce(combine, along).reshape(N, levels, count**dim)


def _locate(grid: HashGrid, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cell (N, levels, dim) as floats, place within it, and whether a point is finite and in reach of all cells."""
    dtype = x.dtype
    scale = _constant(grid.scales, dtype)[None, :, None]
    fixed = lax.stop_gradient(x)[:, None, :]
    finite = jnp.isfinite(fixed * jnp.abs(scale).max()).all((1, 2))
    inside = jnp.where(finite[:, None, None], fixed, jnp.zeros((), dtype))
    # scale·x + ½ as a sum of terms that are exact, since factors are cut into halves of few digits. Nothing is rounded
    # but sums: where a compiler contracts products and sums, the bits stay the same.
    half = jnp.asarray(0.5, dtype)
    (x_high, x_low), (s_high, s_low) = _halves(inside), _halves(scale)
    large, lost_1 = _two_sum(x_high * s_high, half)
    small, lost_2 = _two_sum(x_high * s_low, x_low * s_high)
    total, lost_3 = _two_sum(large, small)
    rest = ((lost_1 + lost_3) + lost_2) + x_low * s_low
    position = total + rest  # rounded once
    cell = jnp.floor(position)
    near = (total - cell) + rest
    fraction = jnp.where(jnp.abs(position) >= 2.0 ** (23 if dtype == jnp.float32 else 52), jnp.zeros_like(near), near)
    # Its derivative is the scale, whatever the digits.
    moving = jnp.where(finite[:, None, None], x[:, None, :], jnp.zeros((), dtype))
    return cell, lax.stop_gradient(fraction) + scale * (moving - lax.stop_gradient(moving)), finite


def _constant(values: np.ndarray, dtype: Any) -> jax.Array:
    """From its elements: a whole array would be a constant beside the jaxpr, and custom_partitioning takes none."""
    elements = values.astype(jnp.dtype(dtype)).ravel()
    return jnp.concatenate([lax.full((1,), element) for element in elements]).reshape(values.shape)


def _halves(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers whose sum is a, such that products of halves are exact; of float64, where one factor is a float32."""
    bits, low = (jnp.uint32, 12) if a.dtype == jnp.float32 else (jnp.uint64, 27)
    mask = jnp.asarray((2 ** (8 * a.dtype.itemsize) - 1) ^ (2**low - 1), bits)
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(a, bits) & mask, a.dtype)
    return high, a - high


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b rounded, and what that lost."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _rows(grid: HashGrid, cell: jax.Array) -> jax.Array:
    """int32 (N, levels, corners): the rows of the cells' corners in the table."""
    least, most = -(2**31), 2**31 - 1
    whole = jnp.where(cell >= 2.0**31, most, jnp.where(cell < -(2.0**31), least, cell.astype(jnp.int32)))
    lower = lax.bitcast_convert_type(whole.astype(jnp.int32), jnp.uint32)
    counts, hashed = _constant(np.diff(grid.level_rows), jnp.uint32)[None], _constant(grid.hashed, bool)[None]
    strides = _constant(grid.strides, jnp.uint32)[None]
    sides = 1 if grid.interpolation == "nearest" else 2
    at = lower[..., None] + lax.broadcasted_iota(jnp.uint32, (1, 1, 1, sides), 3)
    number = _at_corners(jnp.add, at * strides[..., None])
    if grid.hashed.any():
        primes = _constant(np.array(_PRIMES[: grid.dim]), jnp.uint32)[None, None, :, None]
        number = jnp.where(hashed[..., None], _at_corners(jnp.bitwise_xor, at * primes), number)
    return (number % counts[..., None]).astype(jnp.int32) + _constant(grid.level_rows[:-1], jnp.int32)[None, :, None]


def _nan_unless(finite: jax.Array, x: jax.Array) -> jax.Array:
    """(N,): 0 where finite; elsewhere NaN, as its derivatives in x are, of every order (exp may lose it on CPUs)."""
    zero = jnp.zeros((), x.dtype)
    bad = jnp.where(finite, zero, jnp.asarray(jnp.nan, x.dtype))[:, None]
    return (1 / (1 + bad * jnp.where(finite[:, None], zero, x)) - 1).sum(-1)
