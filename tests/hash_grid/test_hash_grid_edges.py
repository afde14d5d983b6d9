"""The hash grid where cells end, where numbers do, and where there is nothing."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_hash_grid import EXACT, GRIDS, assert_orders, compiled, derivatives, expected, problem, run

from jax_knn_aggregate import HashGrid, hash_grid

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)

# ---- Where a point lies


def hard_points(rng, grid, dtype):
    """Borders of cells and their neighbours among the numbers, of all levels; and numbers of any size."""
    found = [0.0, -0.0, 0.25, 0.5, 1.0, -1.0, 1e-30, np.finfo(dtype).tiny, 0.5 / 3, 1e3, -1e6, 3e7, 1e9, 1e15, 1e30]
    for scale in grid.scales:
        # Positions −3 to 3, next to 1, where float32 and where int32 ends.
        for border in (
            *range(-3, 4),
            scale,
            scale + 1,
            2**22 - 1,
            2**23 - 1,
            2**23,
            2**31 - 1,
            2**31,
            -(2**31),
            -(2**32),
        ):
            if scale:
                found.append((border - 0.5) / float(scale))
    found = np.concatenate([found, rng.normal(size=20) * 10.0 ** rng.integers(-5, 8, 20)]).astype(dtype)
    return np.concatenate([found, np.nextafter(found, dtype(np.inf)), np.nextafter(found, dtype(-np.inf))])


@DTYPES
@pytest.mark.parametrize("kind", ["hash", "dense", "tiled"])
@pytest.mark.thorough_if(implementation="xla", kind=["dense", "tiled"])
@pytest.mark.thorough_if(implementation="xla", dtype=np.float64)
def test_cells_are_those_of_one_rounding(kind, dtype, implementation, rng):
    """Whose number a table that counts its rows shows, exactly, also next to borders and beyond the range of int32."""
    grid = HashGrid(2, 6, 1, 9, 3, 1.7, "nearest", kind)
    x = hard_points(rng, grid, dtype)
    x = np.stack([x, rng.permutation(x)], -1)
    table = jnp.arange(grid.rows, dtype=dtype)[:, None]
    fn = functools.partial(hash_grid, grid=grid, implementation=implementation)
    got = compiled(implementation, rounding=True)(fn)(x, table)
    np.testing.assert_array_equal(got, oracle.Oracle(grid, x).value(table))


@DTYPES
@pytest.mark.thorough_if(implementation="xla")
def test_derivatives_at_borders(dtype, implementation, rng):
    """Those of the cell that the point is in, whichever digits its position lost."""
    grid = HashGrid(2, 3, 2, 6, 4, 1.5, "linear")
    x = hard_points(rng, grid, dtype)
    x = x[abs(x) < 1e9]  # of which rounding would overrule the rest of a norm
    d = problem(rng, grid, len(x), dtype) | {"x": jnp.asarray(np.stack([x, rng.permutation(x)], -1))}
    tolerances = EXACT if dtype == np.float64 else (1e-6, 2e-6, 5e-6)
    assert_orders(run(grid, d, implementation), expected(grid, d), tolerances)


@pytest.mark.thorough_if(implementation="xla")
def test_fractions_of_large_positions(implementation, rng):
    """Exact up to 2^23, and 0 from there on, where every float32 is whole."""
    grid = HashGrid(2, 1, 1, 8, 4, 1.0)  # scale 3
    table = jnp.asarray(rng.normal(size=(grid.rows, 1)), jnp.float32)
    x = np.array([2**20 / 3 + 0.1, 2**22 / 3 + 0.1, 2**23 / 3 + 1, 2**24, 3e15, 1e30], np.float32)
    x = np.stack([x, -x], -1)
    got = hash_grid(x, table, grid, implementation=implementation)
    o = oracle.Oracle(grid, x)
    assert o.fraction[:2].all() and not o.fraction[2:].any()
    helpers.assert_close(got, o.value(table), 1e-6)


# ---- What is not finite


@DTYPES
@pytest.mark.thorough_if(implementation="xla")
def test_points_that_are_not_finite(dtype, implementation, rng):
    """NaN in their own rows, of value and gradient in x; nothing else hears of them. So if their position overflows."""
    grid = HashGrid(2, 4, 2, 5, 4, 1.7, "smoothstep")
    d = problem(rng, grid, 12, dtype)
    most = float(np.finfo(dtype).max)
    x = np.array(d["x"])
    for point, bad in enumerate([np.nan, np.inf, -np.inf, most, -most, most / 8], start=2):
        x[point, point % 2] = bad
    x[9, 1] = most / 1e4  # in reach of all levels
    got = run(grid, d | {"x": jnp.asarray(x)}, implementation)
    want = expected(grid, d | {"x": x})
    lost = np.isnan(want["value"]).all(-1)
    assert lost.tolist() == [2 <= point < 8 for point in range(12)]
    y, (x_bar, table_bar) = got["value"], got["first"]
    tolerance = 2e-6 if dtype == np.float32 else 1e-10
    for a, b in ((y, want["value"]), (x_bar, want["first"][0]), (table_bar, want["first"][1])):
        helpers.assert_close(a, b, tolerance)
    # Second order as well: NaN at these points, and what the others have is right.
    for name in ("reverse over reverse", "reverse over forward", "forward over reverse"):
        for a, b in zip(got[name], want[name], strict=True):
            helpers.assert_close(a, b, 5e-6 if dtype == np.float32 else 1e-9, name)
    helpers.assert_close(got["jvp"], want["jvp"], tolerance)


def touched(grid, x, points):
    """(rows, levels): rows at the corners of these points' cells, one of each level's kind."""
    o = oracle.Oracle(grid, x)
    found = np.zeros((grid.rows, grid.levels), bool)
    for point in points:
        for level in range(grid.levels):
            found[o.rows[point, level], level] = True
    return found


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep", "nearest"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(bad=[np.inf, -np.inf], interpolation=["linear", "nearest"])
def test_cotangents_that_are_not_finite(interpolation, bad, implementation, rng):
    """Reach their feature in the rows of all corners, those of weight 0 too, and their point's gradient; no more."""
    grid = HashGrid(2, 3, 2, 6, 5, 1.5, interpolation)
    x = rng.uniform(-0.5, 1.5, (9, 2))
    x[4] = 0.125  # position 1 of level 0: the upper corners weigh 0
    d = problem(rng, grid, 9) | {"x": jnp.asarray(x)}
    poisoned = {(4, 0, 1), (7, 2, 0)}  # points, levels, features
    ct = np.array(d["ct"]).reshape(9, 3, 2)
    for at in poisoned:
        ct[at] = bad
    ct = jnp.asarray(ct.reshape(9, 6))

    def fn(x, table):
        return hash_grid(x, table, grid, implementation=implementation)

    x_bar, table_bar = jax.vjp(fn, d["x"], d["table"])[1](ct)
    hit = np.zeros(table_bar.shape, bool)
    for point, level, feature in poisoned:
        hit[touched(grid, x, [point])[:, level], feature] = True
    np.testing.assert_array_equal(~np.isfinite(table_bar), hit)
    if implementation == "ffi":
        assert np.isnan(np.asarray(table_bar)[hit]).all()
    want = oracle.Oracle(grid, x).first(d["table"], np.where(np.isfinite(ct), ct, 0))
    helpers.assert_close(np.where(hit, 0, table_bar), np.where(hit, 0, want[1]), 1e-12)
    clean = [point for point in range(9) if point not in (4, 7)]
    helpers.assert_close(x_bar[jnp.array(clean)], want[0][clean], 1e-12)
    if interpolation == "nearest":
        assert not x_bar.any()
    else:
        assert not np.isfinite(np.asarray(x_bar)[[4, 7]]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.thorough_if(implementation="xla")
def test_tables_that_are_not_finite(bad, implementation, rng):
    """Reach points that have the row at a corner, in that feature; gradients in the table do not depend on it."""
    grid = HashGrid(2, 2, 2, 6, 5, 1.5, "smoothstep")
    d = problem(rng, grid, 40)
    row = int(oracle.Oracle(grid, d["x"]).rows[3, 1, 2])
    table = d["table"].at[row, 1].set(bad)

    def fn(x, table):
        return hash_grid(x, table, grid, implementation=implementation)

    y, vjp = jax.vjp(fn, d["x"], table)
    x_bar, table_bar = vjp(d["ct"])
    hit = (oracle.Oracle(grid, d["x"]).rows == row).any(-1)  # (points, levels)
    assert hit[3, 1] and not hit.all()
    features = np.stack([np.zeros_like(hit), hit], -1).reshape(40, 4)
    np.testing.assert_array_equal(np.isfinite(y), ~features)
    np.testing.assert_array_equal(np.isfinite(x_bar).all(-1), ~hit.any(-1))
    want = oracle.Oracle(grid, d["x"]).first(d["table"], d["ct"])
    helpers.assert_close(table_bar, want[1], 1e-12)
    helpers.assert_close(np.asarray(x_bar)[~hit.any(-1)], want[0][~hit.any(-1)], 1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nearest_where_something_is_not_finite(bad, implementation, rng):
    """Linear in the table, and in cotangents; constant in x: no derivative meets what it does not depend on."""
    grid = HashGrid(2, 3, 2, 5, 4, 1.5, "nearest")
    d = problem(rng, grid, 20)
    rows = oracle.Oracle(grid, d["x"]).rows[:, :, 0]
    d["table"] = d["table"].at[int(rows[3, 1]), 1].set(bad)
    d["ct"] = d["ct"].at[7, 2].set(bad)
    table, ct, u, w = (np.asarray(d[n]) for n in ("table", "ct", "u", "w"))

    def taken(rows_of):
        return rows_of[rows].reshape(20, grid.outputs)

    def summed(parts):
        sums = np.zeros(table.shape)
        np.add.at(sums, rows, parts.reshape(20, grid.levels, grid.features))
        return sums

    nothing = np.zeros(d["x"].shape)
    second = nothing, 0 * u, taken(u)
    want = {
        "value": taken(table),
        "first": (nothing, summed(ct)),
        "jvp": taken(u),
        "reverse over reverse": second,
        "reverse over forward": second,
        "forward over reverse": (nothing, summed(w)),
    }
    got = run(grid, d, implementation)
    for name, wanted in want.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(wanted), strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(np.isfinite(a), finite, name)
            helpers.assert_close(np.where(finite, a, 0), np.where(finite, b, 0), 1e-12, name)
    assert not np.isfinite(want["value"]).all() and not np.isfinite(want["first"][1]).all()


# ---- Levels


@pytest.mark.thorough_if(implementation="xla")
def test_max_level(implementation, rng):
    """Counts level l clip(max_level − l, 0, 1) times, static or traced; None counts all."""
    grid = GRIDS["3d smoothstep"]
    d = problem(rng, grid, 9)

    @compiled(implementation)
    def traced(max_level):
        return derivatives(lambda *z: hash_grid(*z, grid, max_level=max_level, implementation=implementation), **d)

    numbers = [0, -1, 1, 3, grid.levels, 10**9, 0.25, 2.5, float("inf"), -float("inf")]
    for max_level in numbers:
        want = expected(grid, d, max_level)
        assert_orders(traced(jnp.asarray(max_level)), want, EXACT, f"{max_level}: ")
        static = hash_grid(d["x"], d["table"], grid, max_level=max_level, implementation=implementation)
        helpers.assert_close(static, want["value"], 1e-12)
    for max_level in (np.float32(1.5), np.int8(2), jnp.bfloat16(1.5), jnp.uint8(3)):
        got = hash_grid(d["x"], d["table"], grid, max_level=max_level, implementation=implementation)
        helpers.assert_close(got, oracle.Oracle(grid, d["x"], float(max_level)).value(d["table"]), 1e-12)


@pytest.mark.thorough_if(implementation="xla")
def test_max_level_under_transformations(implementation, rng):
    """vmap maps it, its derivative is 0, and in scan it changes from step to step."""
    grid = GRIDS["2d linear"]
    d = problem(rng, grid, 7)
    levels = jnp.array([0.0, 1.5, 3.0, 9.0])

    def loss(max_level, x, table):
        return (hash_grid(x, table, grid, max_level=max_level, implementation=implementation) * d["ct"]).sum()

    grads = jax.grad(loss, (0, 1, 2))
    mapped = helpers.quick_jit(jax.vmap(grads, (0, None, None)))(levels, d["x"], d["table"])
    _, scanned = helpers.quick_jit(lambda *z: jax.lax.scan(lambda carry, level: (carry, grads(level, *z)), 0, levels))(
        d["x"], d["table"]
    )
    table, ct = np.asarray(d["table"]), np.asarray(d["ct"])
    want = [oracle.Oracle(grid, d["x"], float(level)).first(table, ct) for level in levels]
    for of_level, x_bar, table_bar in (mapped, scanned):
        assert not of_level.any()
        helpers.assert_close(x_bar, np.stack([a for a, _ in want]), 1e-12)
        helpers.assert_close(table_bar, np.stack([b for _, b in want]), 1e-12)
    of_level, tangent = jax.jvp(lambda level: loss(level, d["x"], d["table"]), (levels[1],), (jnp.ones(()),))
    assert of_level != 0 and tangent == 0


# ---- Shapes


@pytest.mark.parametrize("lead", [(0,), (1,), (2, 3, 4), (0, 5), (2, 0), (1, 1, 7)], ids=str)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(lead=[(1,), (2, 0), (1, 1, 7)])
def test_shapes(lead, implementation, rng):
    """Any leading axes, of any size; points that are not there leave no trace in the table's gradient."""
    grid = HashGrid(3, 3, 2, 5, 3, 1.5, "smoothstep")
    N = int(np.prod(lead))
    d = problem(rng, grid, N)
    x, ct, v = (d[n].reshape(*lead, -1) if N else jnp.zeros((*lead, m)) for n, m in (("x", 3), ("ct", 6), ("v", 3)))

    def first(x, table, ct):
        y, vjp = jax.vjp(lambda *z: hash_grid(*z, grid, implementation=implementation), x, table)
        return y, *vjp(ct)

    def second(x, table, ct):
        return (first(x, table, ct)[1] * v).sum()

    y, x_bar, table_bar = first(x, d["table"], ct)
    bars = jax.grad(second, (0, 1, 2))(x, d["table"], ct)
    assert y.shape == (*lead, 6) and x_bar.shape == x.shape and table_bar.shape == d["table"].shape
    assert [b.shape for b in bars] == [x.shape, d["table"].shape, ct.shape]
    o = oracle.Oracle(grid, d["x"])
    table, ct = np.asarray(d["table"]), np.asarray(d["ct"])
    helpers.assert_close(y.reshape(N, 6), o.value(table), 1e-12)
    want = o.first(table, ct)
    helpers.assert_trees_close((x_bar.reshape(N, 3), table_bar), want, 1e-12)
    want = o.second(table, ct, np.asarray(d["v"]), 0 * table)
    helpers.assert_trees_close((bars[0].reshape(N, 3), bars[1], bars[2].reshape(N, 6)), want, 1e-11)
