"""Where rows lie, what is refused, and how a grid and its table are made."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_knn_aggregate import HashGrid, hash_grid

# ---- Layout


def test_by_hand():
    """base·s^l − 1 cells, one corner more than cells rounded up, rows rounded up to 8 and no more than are allowed."""
    grid = HashGrid(2, 4, 1, 7, 4, 1.5)
    np.testing.assert_array_equal(grid.scales, np.array([3, 5, 8, 12.5], np.float32))
    assert grid.resolutions.tolist() == [4, 6, 9, 14]
    assert np.diff(grid.level_rows).tolist() == [16, 40, 88, 128]  # 16, 36, 81, 196 corners
    assert grid.level_rows.tolist() == [0, 16, 56, 144, 272] and grid.rows == 272 and grid.outputs == 4
    assert dataclasses.replace(grid, kind="dense").level_rows.tolist() == [0, 16, 56, 144, 344]
    assert dataclasses.replace(grid, kind="tiled").level_rows.tolist() == [0, 16, 32, 48, 64]
    assert HashGrid(3, 1, base_resolution=2**10, log2_hashmap_size=30, features=1).rows == 2**30


@pytest.mark.parametrize("kind", ["hash", "dense", "tiled"])
def test_against_the_oracle(kind):
    for dim, base, growth in ((2, 16, 1.3819), (3, 4, 2.0), (4, 2, 1.5), (3, 1, 1.1), (2, 7, 0.8)):
        grid = HashGrid(dim, 8, 1, 11, base, growth, kind=kind)
        np.testing.assert_array_equal(grid.scales, oracle.scales(grid))
        assert grid.scales.dtype == np.float32
        assert grid.resolutions.tolist() == oracle.resolutions(grid)
        assert np.diff(grid.level_rows).tolist() == oracle.level_sizes(grid)


def test_scales_are_rounded_as_in_float32():
    """8·1.5^l − 1 is whole for l up to 3; with a logarithm that is rounded otherwise, resolutions would be one more."""
    grid = HashGrid(base_resolution=8, per_level_scale=1.5, levels=4)
    assert grid.scales.tolist() == [7, 11, 17, 26] and grid.resolutions.tolist() == [8, 12, 18, 27]


def test_numbers_and_hashes_of_corners(implementation):
    """A table that counts its rows, seen through "nearest", at corners whose numbers are known."""
    dense = HashGrid(3, 1, 1, 19, 5, 1.0, "nearest", "dense")  # scale 4, 5 corners along an axis
    hashed = dataclasses.replace(dense, kind="hash", log2_hashmap_size=6)
    x = jnp.array([[0, 0, 0], [0.25, 0, 0], [0, 0.25, 0], [0, 0, 0.25], [1.0, 0.5, 0.75], [-0.25, 0, 0]])
    numbers = [0, 1, 5, 25, 4 + 2 * 5 + 3 * 25, (2**32 - 1) % 128]
    primes = 1, 2654435761, 805459861
    hashes = [0, *(p % 64 for p in primes), (4 ^ 2 * primes[1] ^ 3 * primes[2]) % 64, (2**32 - 1) % 64]
    for grid, want in ((dense, numbers), (hashed, hashes)):
        table = jnp.arange(grid.rows, dtype=x.dtype)[:, None]
        got = hash_grid(x, table, grid, implementation=implementation)
        np.testing.assert_array_equal(got[:, 0], want)


# ---- A grid is static


def test_repr_shows_what_follows():
    grid = HashGrid(2, 2, 4, 10, 4, 1.5, "smoothstep", "tiled")
    text = repr(grid)
    for part in ("dim=2", "levels=2", "features=4", "per_level_scale=1.5", "'smoothstep'", "'tiled'"):
        assert part in text
    assert "rows=32" in text and "resolutions=[4, 6]" in text


def test_static_and_hashable(rng):
    grid = HashGrid(2, 2, 1, 4, 3)
    same = HashGrid(np.int64(2), 2, 1, 4, 3, np.float32(2))
    assert grid == same and hash(grid) == hash(same) and grid != dataclasses.replace(grid, kind="dense")
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.dim = 3
    with pytest.raises(ValueError, match="read-only"):
        grid.scales[0] = 1
    traced = []

    @functools.partial(jax.jit, static_argnames="grid")
    def fn(x, table, grid):
        traced.append(grid)
        return hash_grid(x, table, grid)

    x, table = jnp.asarray(rng.random((3, 2))), grid.init(jax.random.key(0), jnp.float64)
    helpers.assert_close(fn(x, table, grid), fn(x, table, same), 0)
    assert len(traced) == 1


def test_init():
    grid = HashGrid(3, 2, 4, 12)
    for dtype in (None, jnp.float64, jnp.bfloat16):
        table = grid.init(jax.random.key(1), *([dtype] if dtype else []))
        assert table.shape == (grid.rows, 4) and table.dtype == (dtype or jnp.float32)
        table = np.asarray(table, np.float64)
        assert 0.99e-4 < abs(table).max() <= 1.01e-4 and abs(table.mean()) < 2e-6
        np.testing.assert_allclose(table.std(), 1e-4 / np.sqrt(3), rtol=0.02)


# ---- Errors

LARGE = {"levels": 2, "log2_hashmap_size": 30, "base_resolution": 1024, "per_level_scale": 1.0}


@pytest.mark.parametrize(
    ("error", "match", "fields"),
    [
        (ValueError, r"dim is 1, expected one of \(2, 3, 4\)", {"dim": 1}),
        (ValueError, "dim is 5", {"dim": 5}),
        (ValueError, "levels is 0, expected 1 to 64", {"levels": 0}),
        (ValueError, "levels is 65", {"levels": 65, "per_level_scale": 1.0}),
        (ValueError, r"features is 3, expected one of \(1, 2, 4, 8\)", {"features": 3}),
        (ValueError, "log2_hashmap_size is 2, expected 3 to 30", {"log2_hashmap_size": 2}),
        (ValueError, "log2_hashmap_size is 31", {"log2_hashmap_size": 31}),
        (ValueError, "base_resolution is 0, expected 1 to", {"base_resolution": 0}),
        (ValueError, "interpolation is 'cubic', expected one of 'linear'", {"interpolation": "cubic"}),
        (ValueError, "kind is 'Hash', expected one of 'hash', 'dense', 'tiled'", {"kind": "Hash"}),
        (ValueError, "per_level_scale is 0.0, expected a positive", {"per_level_scale": 0.0}),
        (ValueError, "per_level_scale is -1.5", {"per_level_scale": -1.5}),
        (ValueError, "per_level_scale is nan", {"per_level_scale": float("nan")}),
        (ValueError, "per_level_scale is inf", {"per_level_scale": float("inf")}),
        (ValueError, r"per_level_scale is 1e\+39", {"per_level_scale": 1e39}),
        (ValueError, "per_level_scale is 1e-60", {"per_level_scale": 1e-60}),
        (ValueError, "finest level has scale .*Use fewer levels", {"levels": 64}),
        (ValueError, "table has 2147483648 rows, .*Use fewer levels", LARGE),
        (ValueError, "table has .* rows", {"kind": "dense"}),
        (TypeError, "levels is 4.0, expected a Python integer", {"levels": 4.0}),
        (TypeError, "features is True", {"features": True}),
        (TypeError, "per_level_scale is '2', expected a Python number", {"per_level_scale": "2"}),
        (TypeError, "per_level_scale is True", {"per_level_scale": True}),
    ],
)  # fmt: skip
def test_bad_grids(error, match, fields):
    with pytest.raises(error, match=match):
        HashGrid(**fields)


def test_traced_fields():
    with pytest.raises(TypeError, match=r"levels is .*static_argnames='levels'"):
        jax.jit(lambda n: HashGrid(levels=n).init(jax.random.key(0)))(4)
    with pytest.raises(TypeError, match=r"per_level_scale is .*expected a Python number"):
        jax.jit(lambda s: HashGrid(per_level_scale=s).init(jax.random.key(0)))(2.0)


def test_bad_calls(rng):
    grid = HashGrid(3, 2, 2, 5, 3)
    x, table = rng.random((4, 3)), rng.random((grid.rows, 2))
    half, single, narrow = jnp.asarray(table, jnp.bfloat16), table.astype(np.float32), x.astype(np.float32)
    one = {"max_level": np.ones(1)}
    cases = [
        (ValueError, r"x has shape \(4, 2\), expected \(\.\.\., N, 3\)", (x[:, :2], table, grid), {}),
        (ValueError, r"x has shape \(3,\), expected", (x[0], table, grid), {}),
        (ValueError, rf"table has shape \({grid.rows}, 1\), expected \({grid.rows}, 2\)", (x, table[:, :1], grid), {}),
        (ValueError, "table has shape .*rows and features of HashGrid", (x, table[1:], grid), {}),
        (ValueError, r"table has shape \(1, ", (x, table[None], grid), {}),
        (TypeError, "x has dtype int64, expected float32 or float64", (x.astype(int), table, grid), {}),
        (TypeError, "x has dtype float16", (x.astype(np.float16), table, grid), {}),
        (TypeError, "table has dtype float32, expected float64 for x in float64", (x, single, grid), {}),
        (TypeError, "table has dtype float64, expected float32 or bfloat16 or float16", (narrow, table, grid), {}),
        (TypeError, "table has dtype bfloat16, expected float64", (x, half, grid), {}),
        (TypeError, "x is a list, expected a JAX or NumPy array", ([[0.0, 0, 0]], table, grid), {}),
        (TypeError, "grid is a dict, expected a HashGrid", (x, table, {}), {}),
        (ValueError, "implementation is 'cuda', expected one of", (x, table, grid), {"implementation": "cuda"}),
        (TypeError, r"max_level is .*expected a number, or an array of shape \(\)", (x, table, grid), one),
        (TypeError, "max_level is True", (x, table, grid), {"max_level": True}),
        (TypeError, "max_level is 1j", (x, table, grid), {"max_level": 1j}),
        (TypeError, "max_level is '2'", (x, table, grid), {"max_level": "2"}),
        (TypeError, r"max_level is \[1\]", (x, table, grid), {"max_level": [1]}),
    ]  # fmt: skip
    for error, match, args, options in cases:
        with pytest.raises(error, match=match):
            hash_grid(*args, **options)
