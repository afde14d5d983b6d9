"""Values and derivatives of the hash grid against closed forms in NumPy float64, and against tiny-cuda-nn."""

import collections
import functools
import json
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_knn_aggregate import HashGrid, hash_grid

GRIDS = {
    "2d linear": HashGrid(2, 5, 4, log2_hashmap_size=5, base_resolution=3, per_level_scale=1.7),
    "3d smoothstep": HashGrid(3, 4, 2, 6, 4, 1.5, "smoothstep"),
    "4d smoothstep": HashGrid(4, 3, 1, 7, 2, 2.0, "smoothstep"),
    "4d linear": HashGrid(4, 2, 8, 30, 3, 1.4, kind="dense"),
    "3d tiled": HashGrid(3, 4, 8, 19, 2, 2.2, "smoothstep", "tiled"),
    "2d dense": HashGrid(2, 3, 1, 19, 5, 1.3, "smoothstep", "dense"),
    "nearest": HashGrid(3, 4, 2, 5, 4, 1.6, "nearest"),
    "nearest 2d": HashGrid(2, 2, 4, 5, 3, 1.6, "nearest", "tiled"),
    "8 rows, all collide": HashGrid(3, 3, 2, 3, 9, 1.9, "smoothstep"),
    "a few rows": HashGrid(3, 3, 2, 5, 2, 3.0, "smoothstep", "tiled"),
    "scales of 0 and below": HashGrid(3, 3, 1, 5, 1, 0.7, "smoothstep"),
    "one level": HashGrid(3, 1, 4, 10, 7, 0.01),
}
#: So many that the default tier sees each derivative of the reference once.
XLA = ["2d linear", "nearest"]
THOROUGH = [name for name in GRIDS if name not in XLA]


def problem(rng, grid, N, dtype=np.float64, table_dtype=None):
    """x, table; a cotangent; tangents v, u of x and table, w of the cotangent; x reaches beyond the unit cube."""
    wide = {"x": rng.uniform(-0.5, 1.5, (N, grid.dim)), "v": rng.normal(size=(N, grid.dim))}
    narrow = {n: rng.normal(size=(grid.rows, grid.features)) for n in ("table", "u")}
    narrow |= {n: rng.normal(size=(N, grid.outputs)) for n in ("ct", "w")}
    d = {n: jnp.asarray(a, dtype) for n, a in wide.items()}
    return d | {n: jnp.asarray(a, table_dtype or dtype) for n, a in narrow.items()}


def derivatives(fn, x, table, ct, v, u, w):
    """Of all orders that have kernels, in every nesting."""

    def first(x, table, ct):
        return jax.vjp(fn, x, table)[1](ct)

    def jvp(x, table):
        return jax.jvp(fn, (x, table), (v, u))[1]

    every = (x, table, ct)
    return {
        "value": fn(x, table),
        "first": first(*every),
        "jvp": jvp(x, table),
        "reverse over reverse": jax.grad(lambda *z: helpers.product(first(*z), (v, u)), (0, 1, 2))(*every),
        "reverse over forward": jax.grad(lambda x, table, ct: helpers.product(jvp(x, table), ct), (0, 1, 2))(*every),
        "forward over reverse": jax.jvp(first, every, (v, u, w))[1],
    }


def expected(grid, d, max_level=None):
    o = oracle.Oracle(grid, d["x"], max_level)
    table, ct, v, u, w = (np.asarray(d[n], np.float64) for n in ("table", "ct", "v", "u", "w"))
    second = o.second(table, ct, v, u)
    return {
        "value": o.value(table),
        "first": o.first(table, ct),
        "jvp": o.jvp(table, v, u),
        "reverse over reverse": second,
        "reverse over forward": second,
        "forward over reverse": o.jvp_of_first(table, ct, v, u, w),
    }


def assert_orders(got, want, tolerances, what=""):
    """Tolerances of value, first and second order."""
    value, first, second = tolerances
    for name, tolerance in (("value", value), ("jvp", first), ("first", first)):
        helpers.assert_trees_close(got[name], want[name], tolerance, f"{what}{name}")
    for name in ("reverse over reverse", "reverse over forward", "forward over reverse"):
        helpers.assert_trees_close(got[name], want[name], second, f"{what}{name}")


EXACT = 1e-12, 1e-10, 1e-9


def compiled(implementation, rounding=False):
    """As users do, kernels always; the reference, which takes XLA long, in thorough tests of rounding."""
    return helpers.user_jit if implementation == "ffi" else jax.jit if rounding else helpers.quick_jit


def run(grid, d, implementation, **options):
    def fn(x, table):
        return hash_grid(x, table, grid, implementation=implementation, **options)

    return compiled(implementation, d["x"].dtype == np.float32)(functools.partial(derivatives, fn))(**d)


# ---- The oracle itself


@pytest.mark.parametrize("name", ["2d linear", "4d smoothstep", "nearest"])
def test_oracle(name, rng):
    """Weights by differences within a cell, of each order from the one before; sums, as transposes of each other."""
    grid, N, h = GRIDS[name], 6, 1e-5
    d = problem(rng, grid, N)
    x, v, p, e = (np.asarray(a) for a in (d["x"], d["v"], rng.normal(size=d["x"].shape), rng.normal(size=d["x"].shape)))
    position = x[..., None] * oracle.scales(grid).astype(float) + 0.5
    x = x[(abs(position - position.round()) > 1e-3).all((1, 2))]
    v, p, e = v[: len(x)], p[: len(x)], e[: len(x)]
    at, after, before = (oracle.Oracle(grid, x + step * e) for step in (0, h, -h))
    assert np.array_equal(after.cell, before.cell)
    for directions in ((), (v,), (v, p)):
        slope = (after.weights(directions) - before.weights(directions)) / (2 * h)
        helpers.assert_close(at.weights((*directions, e)), slope, 1e-6)
        axes = sum(e[:, d, None, None] * at.weights(directions, (d,)) for d in range(grid.dim))
        helpers.assert_close(axes, at.weights((*directions, e)), 1e-13)
        table, ct = np.asarray(d["table"]), np.asarray(d["ct"])[: len(x)]
        np.testing.assert_allclose((at.table_bar(directions, ct) * table).sum(), (ct * at.y(directions, table)).sum())
        along = (at.x_bar(directions, table, ct) * e).sum()
        np.testing.assert_allclose(along, (ct * at.y((*directions, e), table)).sum(), atol=1e-12)


# ---- tiny-cuda-nn

#: Its float32 outputs and gradients on a GPU, of small grids whose x has 0, 1, and numbers beyond: NAME/about says of
#: what configuration; y, gradients of Σ y·dy (dparams, dx), and of Σ c·dx (d2params, d2x, d2dy).
TCNN = pathlib.Path(__file__).with_name("tcnn_reference.npz")
CONFIGURATIONS = ["dense3d_smooth_l3", "hash2d_linear_f4", "hash3d_nearest", "hash3d_smooth", "tiled3d_linear"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.thorough_if(implementation="xla")
def test_agrees_with_tiny_cuda_nn(name, implementation):
    with np.load(TCNN) as file:
        theirs = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    about = json.loads(str(theirs["about"]))
    config = about["config"]
    grid = HashGrid(
        dim=about["inputs"],
        levels=config["n_levels"],
        features=config["n_features_per_level"],
        log2_hashmap_size=config["log2_hashmap_size"],
        base_resolution=config["base_resolution"],
        per_level_scale=config["per_level_scale"],
        interpolation=config["interpolation"].lower(),
        kind=config["otype"].removesuffix("Grid").lower(),
    )
    assert grid.rows * grid.features == about["parameters"] and grid.outputs == about["outputs"]
    x, c, dy = (jnp.asarray(theirs[n]) for n in ("x", "c", "dy"))
    table = jnp.asarray(theirs["params"]).reshape(grid.rows, grid.features)

    def both(x, table, dy):
        def first(x, table, dy):
            y, vjp = jax.vjp(lambda x, table: hash_grid(x, table, grid, implementation=implementation), x, table)
            return y, *vjp(dy)

        return first(x, table, dy), jax.grad(lambda *z: (c * first(*z)[1]).sum(), (0, 1, 2))(x, table, dy)

    (y, dx, dtable), (d2x, d2table, d2dy) = compiled(implementation)(both)(x, table, dy)
    flat = {"dparams": dtable.ravel(), "d2params": d2table.ravel(), "y": y, "dx": dx, "d2x": d2x, "d2dy": d2dy}
    for key, got in flat.items():
        tolerance = 1e-5 if key == "y" else 1e-4 if key.startswith("d2") else 5e-5
        helpers.assert_close(got, theirs[key], tolerance, key)


# ---- Every derivative


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.thorough_if(implementation="xla", name=THOROUGH)
def test_derivatives(name, implementation, rng):
    grid = GRIDS[name]
    d = problem(rng, grid, 33)
    assert_orders(run(grid, d, implementation), expected(grid, d), EXACT)


@pytest.mark.thorough_if(implementation="xla")
def test_one_row_a_level(implementation, rng):
    """Nothing to interpolate between: features are the rows, and do not depend on x."""
    grid = HashGrid(2, 3, 2, 5, 1, 2.0, "smoothstep", "tiled")
    assert grid.rows == 3
    d = problem(rng, grid, 9)
    got = run(grid, d, implementation)
    np.testing.assert_allclose(got["value"], np.tile(np.asarray(d["table"]).ravel(), (9, 1)))
    np.testing.assert_allclose(got["first"][0], 0, atol=1e-13)
    np.testing.assert_allclose(got["first"][1].ravel(), d["ct"].sum(0))


@pytest.mark.parametrize("interpolation", ["smoothstep", "nearest"])
@pytest.mark.thorough_if(implementation="xla")
def test_what_moves_and_what_is_wanted(interpolation, implementation, rng):
    """First order in x, the table, or both; of its product with tangents of some, second order in some."""
    grid = HashGrid(3, 3, 2, 5, 3, 1.7, interpolation)
    d = problem(rng, grid, 17)
    o, names = oracle.Oracle(grid, d["x"]), {"x": "v", "table": "u"}
    some = [("x",), ("table",), ("x", "table")]

    def all_of_it(d):
        def first(wrt, moving, ct):
            def fn(*moving):
                given = d | dict(zip(wrt, moving, strict=True))
                return hash_grid(given["x"], given["table"], grid, implementation=implementation)

            return jax.vjp(fn, *moving)[1](ct)

        found = {}
        for inner in some:
            found[inner] = first(inner, [d[n] for n in inner], d["ct"])
            for outer in (*some, ("ct",), ("x", "ct")):

                def second(moving, inner=inner):
                    d_moving = d | moving

                    def fn(*z):
                        given = d_moving | dict(zip(inner, z, strict=True))
                        return hash_grid(given["x"], given["table"], grid, implementation=implementation)

                    bars = jax.vjp(fn, *(d_moving[n] for n in inner))[1](d_moving["ct"])
                    return helpers.product(bars, tuple(d[names[n]] for n in inner))

                found[inner, outer] = jax.grad(second)({n: d[n] for n in outer})
        return found

    got = compiled(implementation)(lambda d: list(all_of_it(d).values()))(d)
    keys = [key for inner in some for key in (inner, *((inner, outer) for outer in (*some, ("ct",), ("x", "ct"))))]
    table, ct, v, u = (np.asarray(d[n]) for n in ("table", "ct", "v", "u"))
    bars = dict(zip(("x", "table"), o.first(table, ct), strict=True))
    for key, bar in zip(keys, got, strict=True):
        if isinstance(key[0], str):
            helpers.assert_trees_close(bar, tuple(bars[n] for n in key), 1e-10, f"{key}")
            continue
        inner, outer = key
        seconds = o.second(table, ct, v if "x" in inner else 0 * v, u if "table" in inner else 0 * u)
        seconds = dict(zip(("x", "table", "ct"), seconds, strict=True))
        helpers.assert_trees_close(bar, {n: seconds[n] for n in outer}, 1e-9, f"{inner}, {outer}")


@pytest.mark.parametrize("name", ["2d dense", "3d smoothstep", "2d linear"])
@pytest.mark.thorough_if(name=["3d smoothstep", "2d linear"])
def test_third_order(name, kernels, rng):
    """Has no kernels, and neither has forward over forward: the reference runs."""
    grid = GRIDS[name]
    d = problem(rng, grid, 9)
    p, q = jnp.asarray(rng.normal(size=d["x"].shape)), jnp.asarray(rng.normal(size=d["table"].shape))

    def third(x, table, ct, implementation=None):
        def along(fn, *tangents):
            return lambda x, table, ct: helpers.product(jax.grad(fn, (0, 1))(x, table, ct), tangents)

        def zeroth(x, table, ct):
            return helpers.product(hash_grid(x, table, grid, implementation=implementation), ct)

        return jax.grad(along(along(zeroth, d["v"], d["u"]), p, q), (0, 1, 2))(x, table, ct)

    operands = d["x"], d["table"], d["ct"]
    with pytest.raises(NotImplementedError, match="no kernels for derivatives beyond the second order"):
        third(*operands, implementation="ffi")
    table, ct, v, u = (np.asarray(d[n]) for n in ("table", "ct", "v", "u"))
    want = oracle.Oracle(grid, d["x"]).third(table, ct, v, u, np.asarray(p), np.asarray(q))
    helpers.assert_trees_close(helpers.quick_jit(third)(*operands), want, 1e-9)

    def forward(x, table):
        return jax.jvp(lambda *z: hash_grid(*z, grid), (x, table), (d["v"], d["u"]))[1]

    along = helpers.quick_jit(lambda *z: jax.jvp(forward, z, (p, q))[1])(*operands[:2])
    helpers.assert_close(along, want[2], 1e-9)


# ---- float32 and narrower


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(interpolation="linear", dim=[2, 4])
def test_accuracy_in_float32(dim, interpolation, implementation, rng):
    """With fine levels, where position − ⌊position⌋ has lost 3e-4 of a cell."""
    grid = HashGrid(dim, 10, 2, 11, 16, 2.0, interpolation)
    x = rng.uniform(-0.5, 1.5, (150, dim)).astype(np.float32)
    x = x[~oracle.by_a_border(grid, x)]
    assert len(x) > 50
    d = problem(rng, grid, len(x), np.float32) | {"x": jnp.asarray(x)}
    got = run(grid, d, implementation)
    assert {a.dtype for a in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert_orders(got, expected(grid, d), (1e-6, 2e-6, 5e-6))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.thorough_if(implementation="xla")
def test_tables_of_half_precision(dtype, implementation, rng):
    """Sums are float32, rounded once, though hundreds of points meet in one row."""
    grid = HashGrid(2, 3, 2, 3, 4, 1.6, "smoothstep")
    d = problem(rng, grid, 400, np.float32, dtype)
    d["x"] = d["x"][~oracle.by_a_border(grid, np.asarray(d["x"]))]
    n = len(d["x"])
    d = {name: a if name in ("table", "u") else a[:n] for name, a in d.items()}

    def each(d):
        def fn(x, table):
            return hash_grid(x, table, grid, implementation=implementation)

        x, table, ct, v, u = (d[n] for n in ("x", "table", "ct", "v", "u"))
        dx = lambda table, ct: jax.vjp(lambda x: fn(x, table), x)[1](ct)[0]  # noqa: E731
        return {
            "value": fn(x, table),
            "first": jax.vjp(fn, x, table)[1](ct),
            "jvp": jax.jvp(fn, (x, table), (v, u))[1],
            "second": jax.grad(lambda table, ct: (dx(table, ct) * v).sum(), (0, 1))(table, ct),
        }

    got = compiled(implementation)(each)(d)
    table, ct, v, u = (np.asarray(d[n], np.float64) for n in ("table", "ct", "v", "u"))
    o = oracle.Oracle(grid, d["x"])
    _, *second = o.second(table, ct, v, 0 * u)
    want = {"value": o.value(table), "first": o.first(table, ct), "jvp": o.jvp(table, v, u), "second": tuple(second)}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        what = jax.tree_util.keystr(path)
        assert a.dtype == (jnp.float32 if what == "['first'][0]" else dtype), what
        allowed = float(jnp.finfo(a.dtype).eps) / 2 * abs(b) + 3e-6 * abs(b).max()
        assert (abs(np.asarray(a, np.float64) - b) <= allowed).all(), what


# ---- Kernels and their results


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep", "nearest"])
def test_what_runs(interpolation, kernels, rng):
    """One kernel for each of value, gradients and Eikonal's second order, and no gather or scatter beside them."""
    grid = HashGrid(3, 4, 2, 6, 4, 1.5, interpolation)
    d = problem(rng, grid, 5, np.float32)
    x, table = d["x"], d["table"]

    def run(fn):
        text = jax.jit(fn).lower(x, table).compile().as_text()
        assert not re.findall(r" = \S+ (gather|scatter|while)\(", text)
        return collections.Counter(re.findall(r'custom_call_target="jax_knn_aggregate\.(\w+)"', text))

    def field(x, table):
        return jnp.tanh(hash_grid(x, table, grid)).sum()

    def eikonal(x, table):
        slope = jax.grad(field)(x, table)
        return jnp.square(jnp.sqrt(jnp.square(slope).sum(-1) + 1) - 1).sum()

    assert run(lambda x, table: hash_grid(x, table, grid)) == {"hash_grid": 1}
    assert run(lambda x, table: jax.vjp(lambda *z: hash_grid(*z, grid), x, table)[1](d["ct"])) == {"hash_grid": 1}
    assert run(jax.value_and_grad(field, (0, 1))) == {"hash_grid": 2}
    assert run(lambda *z: jax.jvp(field, z, z)) == {"hash_grid": 2}
    # Value, its gradient in x; then second order, and the first order that tanh's second derivative asks for.
    assert run(jax.grad(eikonal, 1)) == {"hash_grid": 4}


def test_same_bits_each_time(kernels, rng):
    grid = HashGrid(3, 4, 2, 8, 8, 1.7, "smoothstep")
    d = problem(rng, grid, 20_000, np.float32)
    fn = helpers.user_jit(functools.partial(derivatives, lambda *z: hash_grid(*z, grid, implementation="ffi")))
    want = fn(**d)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, fn(**d), want)


@pytest.mark.thorough_if()
def test_what_the_reference_takes():
    """2^18 points, 16 levels, second order: at most 3 GB beside inputs and outputs."""
    grid, N = HashGrid(per_level_scale=1.3819, interpolation="smoothstep"), 2**18

    def second(x, table, ct, c):
        def inner(x, table, ct):
            fn = lambda x: hash_grid(x, table, grid, implementation="xla")  # noqa: E731
            return (c * jax.vjp(fn, x)[1](ct)[0]).sum()

        return jax.grad(inner, (0, 1, 2))(x, table, ct)

    shapes = (N, 3), (grid.rows, 2), (N, grid.outputs), (N, 3)
    program = helpers.quick_jit(second).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3e9
