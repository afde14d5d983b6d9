"""What a hash grid is made of: its levels' scales and resolutions, and where each level's rows lie in the table."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ...core import checks, ffi

Interpolation = Literal["linear", "smoothstep", "nearest"]
Kind = Literal["hash", "dense", "tiled"]


@dataclasses.dataclass(frozen=True, repr=False)
class HashGrid:
    """A multiresolution hash grid (Müller et al. 2022), laid out as tiny-cuda-nn does: tables trained there fit.

    Frozen and hashable: a static argument of jitted functions. Level l is a grid of cells of width 1/scale_l over the
    unit cube, and repeats beyond it. Each corner of a cell has a row of the level's part of the table: numbered in
    order where the level has a row for each, else by a hash (kind "hash"), or by the number modulo the level's rows.

    Attributes:
      dim: of positions; 2, 3 or 4.
      levels: how many, 1 to 64.
      features: of a level; 1, 2, 4 or 8.
      log2_hashmap_size: a level of kind "hash" has at most 2**log2_hashmap_size rows; 3 to 30.
      base_resolution: of level 0.
      per_level_scale: by how much finer each level is than the one before.
      interpolation: between a cell's corners: "linear"; "smoothstep", whose first derivatives are continuous; or
        "nearest", the corner at the lower end of each axis, without derivatives in x.
      kind: "hash"; "dense", a row for each corner of each level; or "tiled", at most base_resolution**dim rows a level.

    Raises:
      ValueError: for values out of range, or 2**31 rows or more. TypeError: for other types.
    """

    dim: int = 3
    levels: int = 16
    features: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 2.0
    interpolation: Interpolation = "linear"
    kind: Kind = "hash"

    def __post_init__(self) -> None:
        allowed = {
            "dim": (2, 3, 4),
            "levels": range(1, ffi.number("hash_grid.max_levels") + 1),
            "features": (1, 2, 4, 8),
            "log2_hashmap_size": range(3, 31),
            "base_resolution": range(1, 2**31),
        }
        for name, values in allowed.items():
            value = checks.static_integer(name, getattr(self, name))
            if value not in values:
                expected = f"{values[0]} to {values[-1]}" if isinstance(values, range) else f"one of {values}"
                raise ValueError(f"{name} is {value}, expected {expected}.")
            object.__setattr__(self, name, value)
        for name, choices in (("interpolation", get_args(Interpolation)), ("kind", get_args(Kind))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, choices))}.")
        scale = self.per_level_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float | np.integer | np.floating):
            raise TypeError(f"per_level_scale is {scale!r}, expected a Python number: it sets the shape of the table.")
        with np.errstate(over="ignore"):
            single = np.float32(scale)
        if not (np.isfinite(single) and single > 0):
            raise ValueError(f"per_level_scale is {scale!r}, expected a positive, finite float32.")
        object.__setattr__(self, "per_level_scale", float(scale))
        if not np.isfinite(self.scales).all() or self.scales.max() >= 2**31:
            raise ValueError(f"the finest level has scale {self.scales.max()}, expected less than 2**31. {self._less}")
        if self.rows >= 2**31:
            raise ValueError(f"the table has {self.rows} rows, expected fewer than 2**31. {self._less}")

    _less = "Use fewer levels, a smaller per_level_scale, base_resolution or log2_hashmap_size."

    @functools.cached_property
    def scales(self) -> np.ndarray:
        """float32 (levels,): 2**(l·log2(per_level_scale))·base_resolution − 1, cells per unit of length.

        Each operation is rounded to float32, log2 and exp2 correctly: an error in the last place moves cells' borders
        away from where tiny-cuda-nn, and x = 1, have them.
        """
        one, wide = np.float32, np.float64
        step = one(np.log2(wide(one(self.per_level_scale))))
        exponents = np.arange(self.levels, dtype=one) * step
        with np.errstate(over="ignore"):
            return _frozen(np.exp2(exponents.astype(wide)).astype(one) * one(self.base_resolution) - one(1))

    @functools.cached_property
    def resolutions(self) -> np.ndarray:
        """int64 (levels,): corners along an axis of the unit cube."""
        return _frozen(np.ceil(self.scales).astype(np.int64) + 1)

    @functools.cached_property
    def level_rows(self) -> np.ndarray:
        """int64 (levels + 1,): level l has the rows from level_rows[l] to level_rows[l + 1]."""
        counts = [self._rows_of(int(resolution)) for resolution in self.resolutions]
        return _frozen(np.cumsum([0, *[min(n, 2**31) for n in counts]], dtype=np.int64))

    @property
    def rows(self) -> int:
        """How many rows the table has, of all levels."""
        return int(self.level_rows[-1])

    @functools.cached_property
    def hashed(self) -> np.ndarray:
        """bool (levels,): whether rows are found by the hash."""
        counts = np.diff(self.level_rows)
        corners = [int(resolution) ** self.dim for resolution in self.resolutions]
        return _frozen(np.array([self.kind == "hash" and n < m for n, m in zip(counts, corners, strict=True)]))

    @functools.cached_property
    def strides(self) -> np.ndarray:
        """uint32 (levels, dim): by how much a corner's number grows along each axis, modulo 2**32."""
        powers = [[pow(int(r), d, 2**32) for d in range(self.dim)] for r in self.resolutions]
        return _frozen(np.array(powers, np.uint32))

    def _rows_of(self, resolution: int) -> int:
        rows = -(-(resolution**self.dim) // 8) * 8
        if self.kind == "hash":
            return min(rows, 2**self.log2_hashmap_size)
        return min(rows, self.base_resolution**self.dim) if self.kind == "tiled" else rows

    @property
    def outputs(self) -> int:
        """How many features a point has, of all levels."""
        return self.levels * self.features

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """A table (rows, features) of ``dtype``, uniform in ±1e-4, as tiny-cuda-nn starts with."""
        return jax.random.uniform(key, (self.rows, self.features), dtype, -1e-4, 1e-4)

    def __repr__(self) -> str:
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"HashGrid({fields}; rows={self.rows}, resolutions={self.resolutions.tolist()})"


def _frozen(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a
