"""Blending of Gaussians in the plane against the oracle: every role, what is given and wanted, bits, nasty inputs."""

import functools
import re

import blend_oracle as oracle
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_knn_aggregate.core import ffi
from jax_knn_aggregate.ops.splat.blend import blend
from jax_knn_aggregate.ops.splat.tiles import tiles

WIDTH, HEIGHT = 37, 21
ALL = (0, 1, 2, 3, 4)


def of(depths, reach=None, width=WIDTH, height=HEIGHT, **options):
    """A function of the differentiable operands alone."""
    fixed = dict(width=width, height=height, **options)
    return lambda *x: blend(*x, jnp.asarray(depths), None if reach is None else jnp.asarray(reach), **fixed)


def every_role(fn, x, v, ct, dct, wrt=ALL):
    """Value, jvp, vjp, vjp along v and dct, and the gradients of ⟨ct, J v⟩ in x and ct; all for operands ``wrt``."""

    def some(*moving):
        it = iter(moving)
        return fn(*(next(it) if i in wrt else a for i, a in enumerate(x)))

    at, v = tuple(x[i] for i in wrt), tuple(v[i] for i in wrt)
    y, dy = jax.jvp(some, at, v)

    def pull(at, ct):
        return jax.vjp(some, *at)[1](ct)

    moving = jax.jvp(pull, (at, ct), (v, dct))
    second = jax.grad(lambda at, ct: helpers.product(pull(at, ct), v), (0, 1))(at, ct)
    return y, dy, *moving, *second


def cotangents(rng, x, width, height):
    ct, dct = ((rng.normal(size=(height, width, x[3].shape[1])), rng.normal(size=(height, width))) for _ in range(2))
    return tuple(rng.normal(size=a.shape) * 0.3 for a in x), ct, dct


def expected(x, v, ct, dct, depths, width, height, reach):
    where = depths, width, height
    zero = tuple(0 * c for c in ct)
    dy = oracle.jvp(x, v, *where, reach=reach)
    second = oracle.vjp_jvp(x, v, *where, ct, zero, reach)
    return (
        oracle.value(x, *where, reach=reach),
        dy,
        oracle.vjp(x, *where, ct, reach),
        oracle.vjp_jvp(x, v, *where, ct, dct, reach),
        second,
        dy,
    )


def reaches(rng, P):
    """As extent "3sigma" makes them, and some that are empty or beyond the image."""
    low = rng.integers(-1, 2, (2, P))
    high = low + rng.integers(0, 4, (2, P))
    return np.stack([low[0], high[0], low[1], high[1]], -1).astype(np.int32)


def test_oracle(rng):
    """The oracle's vjp is the transpose of its value's derivative."""
    x, depths = oracle.plane(rng, 12, 9, 7, 3)
    v, ct, _ = cotangents(rng, x, 9, 7)
    dy, bars = oracle.jvp(x, v, depths, 9, 7), oracle.vjp(x, depths, 9, 7, ct)
    left, right = (sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((dy, ct), (bars, v)))
    assert abs(left - right) <= 1e-12 * abs(left)


@pytest.mark.parametrize("capacity", [None, 1], ids=["listed", "not listed"])
@pytest.mark.parametrize(
    ("P", "size", "C", "reach"),
    [(60, (WIDTH, HEIGHT), 4, False), (70, (33, 40), 3, True), (5, (1, 1), 1, False), (40, (16, 16), 35, True)],
    ids=str,
)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(P=5)
@pytest.mark.thorough_if(P=40, capacity=1)
def test_every_role(P, size, C, reach, capacity, implementation, rng):
    x, depths = oracle.plane(rng, P, *size, C)
    depths[: P // 3] = 2.0  # ties
    where = depths, *size, reaches(rng, P) if reach else None
    v, ct, dct = cotangents(rng, x, *size)
    fn = of(depths, where[3], *size, capacity=capacity, implementation=implementation)
    got = helpers.quick_jit(functools.partial(every_role, fn))(*map(helpers.tree, (x, v, ct, dct)))
    helpers.assert_trees_close(got, expected(x, v, ct, dct, *where), 1e-10)


@pytest.mark.parametrize(
    "C", [4, pytest.param(3, marks=pytest.mark.thorough), pytest.param(35, marks=pytest.mark.thorough)]
)
def test_float32(C, kernels, rng):
    drawn = (oracle.plane(rng, 50, 40, 30, C) for _ in range(1000))
    x, depths = next((x, depths) for x, depths in drawn if oracle.margin(x, depths, 40, 30) > 2e-4)
    v, ct, dct = cotangents(rng, x, 40, 30)
    narrow = jax.tree.map(lambda a: a.astype(np.float32), (x, v, ct, dct))
    x, v, ct, dct = jax.tree.map(lambda a: a.astype(np.float64), narrow)
    fn = of(depths, None, 40, 30, implementation="ffi")
    got = helpers.user_jit(functools.partial(every_role, fn))(*helpers.tree(narrow))
    want = expected(x, v, ct, dct, depths, 40, 30, None)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(got))
    assert max(np.abs(np.asarray(a) - b).max() for a, b in zip(got[0], want[0], strict=True)) <= 2e-5
    helpers.assert_trees_close(got, want, 2e-5)


@pytest.mark.parametrize("wrt", [(0,), (3, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["image", "alpha"])
def test_some_operands_and_results(wrt, outputs, kernels, rng):
    """What is not given and what is not wanted: the same numbers as if all were."""
    x, depths = oracle.plane(rng, 20, WIDTH, HEIGHT, 2)
    v, ct, dct = cotangents(rng, x, WIDTH, HEIGHT)
    v = tuple(a if i in wrt else 0 * a for i, a in enumerate(v))
    ct, dct = (tuple(a if i in outputs else 0 * a for i, a in enumerate(some)) for some in (ct, dct))
    whole = of(depths, implementation="ffi")

    def fn(*x):
        y = whole(*x)
        return tuple(y[i] for i in outputs)

    some_ct, some_dct = (tuple(c[i] for i in outputs) for c in (ct, dct))
    got = helpers.quick_jit(functools.partial(every_role, fn, wrt=wrt))(*map(helpers.tree, (x, v, some_ct, some_dct)))
    want = list(expected(x, v, ct, dct, depths, WIDTH, HEIGHT, None))
    for role, of_y in enumerate((True, True, False, False, False, True)):
        want[role] = tuple(want[role][i] for i in (outputs if of_y else wrt))
    helpers.assert_trees_close(got, tuple(want), 1e-10)


def test_alpha_moves_by_itself(kernels, rng):
    """A tangent of alpha's cotangent, which itself is zero."""
    x, depths = oracle.plane(rng, 10, 9, 9, 2)
    v, ct, dct = cotangents(rng, x, 9, 9)
    fn, zero = of(depths, None, 9, 9, implementation="ffi"), jnp.zeros((9, 9))

    def pull(x, a):
        return jax.vjp(lambda *x: fn(*x)[0], *x)[1](jnp.asarray(ct[0])), jax.vjp(lambda *x: fn(*x)[1], *x)[1](a)

    got = jax.jit(lambda x, v, d: jax.jvp(pull, (x, zero), (v, d))[1])(helpers.tree(x), helpers.tree(v), dct[1])
    where = depths, 9, 9
    of_image = oracle.vjp_jvp(x, v, *where, (ct[0], 0 * ct[1]), (0 * ct[0], 0 * ct[1]))
    of_alpha = oracle.vjp_jvp(x, v, *where, (0 * ct[0], 0 * ct[1]), (0 * ct[0], dct[1]))
    helpers.assert_trees_close(got, (of_image, of_alpha), 1e-10)


def nasty(rng, kind):
    """x, depths of Gaussians of the kind, with plain ones before and behind."""
    x, depths = oracle.plane(rng, 30, WIDTH, HEIGHT, 2)
    means, conics, opacities, *_ = x
    some = slice(5, 15)
    match kind:
        case "everywhere":
            conics[some] *= 1e-9
            opacities[some] = rng.uniform(0.01, 0.2, 10)
        case "opaque":
            opacities[:] = 5.0
        case "faint":
            opacities[some] = rng.uniform(0.99, 1.01, 10) / 255
        case "thin":  # half a pixel wide and thousands long
            turn = rng.uniform(0, np.pi, 10)
            axes = np.stack([np.cos(turn), np.sin(turn)], -1)
            across = np.stack([-axes[:, 1], axes[:, 0]], -1)
            m = 1e-8 * axes[:, :, None] * axes[:, None] + 3.3 * across[:, :, None] * across[:, None]
            conics[some] = np.stack([m[:, 0, 0], m[:, 0, 1], m[:, 1, 1]], -1)
        case "not definite":
            conics[5:10] = rng.normal(size=(5, 3)) * 0.05
            conics[10:12] = -conics[10:12]
            conics[12:15] = 0.0
        case "far":
            means[some] = rng.choice([-1e30, -1e4, 1e4, 1e30], (10, 2))
        case "not drawn":
            opacities[some] = 0.0
            opacities[0] = -1.0
            means[some], conics[some] = 0.0, 0.0
        case "depths":
            depths[:10], depths[10:15] = np.inf, -0.0
            depths[15:20], depths[20:25] = 0.0, np.float32(1) + np.arange(5) * 1e-9
            opacities[:] /= 4
    return x, depths


@pytest.mark.parametrize(
    "kind", ["everywhere", "opaque", "faint", "thin", "not definite", "far", "not drawn", "depths"]
)
@pytest.mark.thorough_if(implementation="xla")
def test_nasty(kind, implementation, rng):
    """With lists and without, in value and gradient."""
    x, depths = nasty(rng, kind)
    _, ct, _ = cotangents(rng, x, WIDTH, HEIGHT)
    want = oracle.value(x, depths, WIDTH, HEIGHT), oracle.vjp(x, depths, WIDTH, HEIGHT, ct)
    for capacity in (None, 1) if implementation == "ffi" else (None,):
        fn = of(depths, capacity=capacity, implementation=implementation)
        y, pull = jax.vjp(fn, *helpers.tree(x))
        helpers.assert_trees_close((y, pull(helpers.tree(ct))), want, 1e-9, f"{capacity}: ")


def test_lists_leave_out_what_does_not_count(kernels, rng):
    """Each tile lists the Gaussians that count in it, front to back, and few others."""
    P, columns = 300, -(-WIDTH // 16)
    x, depths = oracle.plane(rng, P, WIDTH, HEIGHT, 1)
    operands = *map(jnp.asarray, x[:3]), jnp.asarray(depths, jnp.float32)
    lists = tiles(*operands, width=WIDTH, height=HEIGHT, capacity=4000, implementation="ffi")
    order, offsets, owners, slots, ends = map(np.asarray, lists)
    np.testing.assert_array_equal(order, np.argsort(depths.astype(np.float32), kind="stable"))
    rank = np.argsort(order)
    assert ends[-1] == offsets[-1] <= 4000
    numbered = np.arange(P) if kernels == "cuda" else order
    np.testing.assert_array_equal(owners[: ends[-1]], np.repeat(numbered, np.diff(offsets)))
    np.testing.assert_array_equal(np.sort(slots[: ends[-1]]), np.arange(ends[-1]))
    i, j = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    dx, dy = x[0][:, 0, None, None] - i, x[0][:, 1, None, None] - j
    a, b, c = x[1].T[..., None, None]
    counts = x[2][:, None, None] * np.exp(-(a * dx * dx + c * dy * dy) / 2 - b * dx * dy) >= 1 / 255
    listed = needed = 0
    for tile, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        of_tile = owners[slots[begin:end]]
        assert (np.diff(rank[of_tile]) > 0).all()
        row, column = divmod(tile, columns)
        there = counts[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].any((1, 2))
        assert set(np.flatnonzero(there)) <= set(of_tile)
        listed, needed = listed + len(of_tile), needed + there.sum()
    assert listed <= 1.2 * needed


def test_no_gaussians(implementation, rng):
    x, depths = oracle.plane(rng, 0, 20, 17, 3)
    _, ct, _ = cotangents(rng, x, 20, 17)
    y, pull = jax.vjp(of(depths, None, 20, 17, implementation=implementation), *helpers.tree(x))
    helpers.assert_trees_close(y, oracle.value(x, depths, 20, 17), 1e-12)
    helpers.assert_trees_close(pull(helpers.tree(ct)), oracle.vjp(x, depths, 20, 17, ct), 1e-12)


def test_bits(kernels, rng):
    """The same from run to run, and values whatever the capacity; and gradients nearly so, whose sums differ."""
    x, depths = oracle.plane(rng, 2000, 100, 70, 4)
    x = helpers.tree(jax.tree.map(lambda a: a.astype(np.float32), x))
    ct = helpers.tree((rng.normal(size=(70, 100, 4)).astype(np.float32), rng.normal(size=(70, 100)).astype(np.float32)))

    def both(x, capacity):
        y, pull = jax.vjp(of(depths, None, 100, 70, capacity=capacity, implementation="ffi"), *x)
        return y, pull(ct)

    runs = {}
    for capacity in (None, 1):
        run = helpers.user_jit(functools.partial(both, capacity=capacity))
        first, *others = (run(x) for _ in range(4))
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, first, other)
        runs[capacity] = first
    jax.tree.map(np.testing.assert_array_equal, runs[None][0], runs[1][0])
    helpers.assert_trees_close(runs[1][1], runs[None][1], 1e-5)


def test_backward_starts_from_the_values_forward(kernels, rng):
    """XLA merges the calls: value and gradient walk forward once."""
    x, depths = oracle.plane(rng, 10, 20, 20, 3)
    fn = of(depths, None, 20, 20, implementation="ffi")
    both = helpers.user_jit(jax.value_and_grad(lambda x: jnp.sin(fn(*x)[0]).sum()))
    calls = re.findall(rf'custom_call_target="{ffi.PREFIX}(\w+)"', both.lower(helpers.tree(x)).compile().as_text())
    assert sorted(calls) == ["splat_backward", "splat_forward", "splat_tiles"]


@pytest.mark.thorough
def test_reference_of_a_large_scene():
    """100,000 Gaussians at 800 × 800, second order: compiled in seconds, and in a small part of 8 GB."""
    P, size = 100_000, {"width": 800, "height": 800}
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((P, 2), (P, 3), (P,), (P, 4), (4,))]

    def gradient(depths, *x):
        return jax.grad(lambda *x: jnp.sin(blend(*x, depths, None, **size, implementation="xla")[0]).sum(), ALL)(*x)

    def second(depths, *x):
        return jax.grad(lambda *x: sum(jnp.sin(a).sum() for a in gradient(depths, *x)), ALL)(*x)

    compiled = helpers.user_jit(second).lower(jax.ShapeDtypeStruct((P,), jnp.float32), *shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9
