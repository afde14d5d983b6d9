"""The distortion loss against its O(N²) sum in float64, in NumPy for values and in JAX for derivatives.

``x`` is (w, m, interval). "dense" rays have equal lengths; "flat" ones lie one after another, with empty rays first, in
the middle and last, and samples outside all rays at either end.
"""

import collections
import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

import jax_knn_aggregate as jka

# ---- Oracle


def one_ray(w, m, interval):
    """By index and not by |m_i − m_j|, which has no derivative where positions are equal."""
    pairs = 2 * jnp.tril(w[:, None] * w[None] * (m[:, None] - m[None]), -1)
    return (interval * w * w).sum() / 3 + pairs.sum()


def formula(x, ids=None, n_rays=None):
    """(rays,) losses."""
    w, m, interval = x
    if ids is None:
        return jax.vmap(one_ray)(w, m, jnp.broadcast_to(interval, w.shape))
    before = (ids[:, None] == ids[None]) & np.tri(len(ids), k=-1, dtype=bool)
    terms = interval * w * w / 3 + jnp.where(before, 2 * w[:, None] * w[None] * (m[:, None] - m[None]), 0.0).sum(1)
    inside = (ids >= 0) & (ids < n_rays)
    return jnp.zeros(n_rays + 1).at[jnp.where(inside, ids, n_rays)].add(jnp.where(inside, terms, 0.0))[:-1]


def numpy_losses(w, m, interval):
    """(rays,) losses of dense rays, float64, from the definition."""
    w, m, interval = (np.asarray(a, np.float64) for a in (w, m, interval))
    pairs = w[..., :, None] * w[..., None, :] * np.abs(m[..., :, None] - m[..., None, :])
    return (interval * w * w).sum(-1) / 3 + pairs.sum((-2, -1))


def loss(x, ids=None, n_rays=None, **options):
    options = {"reduction": "none", **options}
    if ids is None:
        return jka.distortion_loss(*x, **options)
    return jka.flatten_distortion_loss(*x, ids, n_rays, **options)


def derivatives(fn, x, ct, v):
    """Value, first order, second order in every mix, forward mode, forward over reverse."""

    def first(x, ct):
        return jax.vjp(fn, x)[1](ct)[0]

    def second(x, ct):
        return helpers.product(first(x, ct), v)

    return {
        "value": fn(x),
        "first": first(x, ct),
        "second": jax.grad(second, (0, 1))(x, ct),
        "jvp": jax.jvp(fn, (x,), (v,))[1],
        "jvp of first": jax.jvp(first, (x, ct), (v, ct - 0.3))[1],
    }


# ---- Inputs


def dense(rng, B, N, shared=False, ties=False):
    m = np.sort(rng.integers(0, 4, (B, N)).astype(float) if ties else rng.random((B, N)), -1)
    return rng.normal(size=(B, N)), m, rng.random(() if shared else (B, N))


def flat(rng, lengths, shared=False, outside=(0, 0)):
    """Rays of these lengths, and as many samples before and behind them."""
    ids = np.repeat(np.arange(-1, len(lengths) + 1), [outside[0], *lengths, outside[1]])
    m = rng.random(len(ids))
    m = m[np.lexsort((m, ids))]
    return (rng.normal(size=len(ids)), m, rng.random(() if shared else len(ids))), ids.astype(np.int32)


def spiked(rng, B, N):
    """Weights of 1e-6 but for one of 1."""
    w = np.full((B, N), 1e-6) * rng.random((B, N))
    w[np.arange(B), rng.integers(0, N, B)] = 1
    return w


# ---- Values and derivatives

SIZES = [(3, 1, {}), (2, 5, {"ties": True}), (3, 130, {"shared": True}), (2, 601, {})]
RAGGED = [
    ([0, 3, 1, 0, 0, 140, 2, 0], {"outside": (2, 3)}),
    ([5, 300, 0, 7], {"shared": True, "outside": (0, 70)}),
]


def assert_derivatives(implementation, x, rays, rng):
    x = helpers.tree(x)
    n = x[0].shape[0] if not rays else rays[1]
    ct, v = jnp.asarray(rng.normal(size=n)), helpers.tree(tuple(rng.normal(size=a.shape) for a in x))
    ours = functools.partial(derivatives, lambda x: loss(x, *rays, implementation=implementation))
    oracle = helpers.oracle_jit(functools.partial(derivatives, lambda x: formula(x, *rays)))
    helpers.assert_trees_close(helpers.quick_jit(ours)(x, ct, v), oracle(x, ct, v), 1e-11)


@pytest.mark.parametrize(("B", "N", "kind"), SIZES)
@pytest.mark.thorough_if(implementation="xla", N=[1, 130, 601])
def test_dense_derivatives(B, N, kind, implementation, rng):
    assert_derivatives(implementation, dense(rng, B, N, **kind), (), rng)


@pytest.mark.parametrize(("lengths", "kind"), RAGGED)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(lengths=[RAGGED[1][0]])
def test_flat_derivatives(lengths, kind, implementation, rng):
    x, ids = flat(rng, lengths, **kind)
    assert_derivatives(implementation, x, (ids, len(lengths)), rng)


@pytest.mark.thorough_if(implementation="xla")
def test_nothing(implementation, rng):
    """No samples, no rays, neither."""
    for shape in ((3, 0), (0, 4), (0, 0)):
        x = helpers.tree(dense(rng, *shape))
        value, bars = jax.value_and_grad(lambda x: jka.distortion_loss(*x, implementation=implementation))(x)
        assert value == 0 and all(b.shape == a.shape and not b.any() for a, b in zip(x, bars, strict=True))
    for lengths, outside in (([0, 0], (0, 0)), ([], (0, 0)), ([], (2, 3))):
        x, ids = flat(rng, lengths, outside=outside)
        x, rays = helpers.tree(x), (ids, len(lengths))
        value, bars = jax.value_and_grad(
            lambda x, rays=rays: loss(x, *rays, reduction="mean", implementation=implementation)
        )(x)
        assert value == 0 and all(not b.any() for b in bars)
        assert loss(x, *rays, implementation=implementation).shape == (len(lengths),)


@pytest.mark.parametrize("name", ["dense", "flat"])
@pytest.mark.thorough_if(implementation="xla")
def test_a_ray_without_samples_adds_nothing(name, implementation):
    """To the gradient of an interval that it shares with others, even if its cotangent is NaN."""
    w, m = (jnp.ones(2), jnp.arange(2.0)) if name == "flat" else (jnp.ones((2, 0)), jnp.ones((2, 0)))

    def losses(interval):
        options = {"reduction": "none", "implementation": implementation}
        if name == "flat":
            return jka.flatten_distortion_loss(w, m, interval, np.zeros(2, int), 2, **options)
        return jka.distortion_loss(w, m, interval, **options)

    (got,) = jax.vjp(losses, jnp.asarray(0.1))[1](jnp.array([1.0, jnp.nan]))
    np.testing.assert_allclose(got, 2 / 3 if name == "flat" else 0)


@pytest.mark.thorough_if(implementation="xla")
def test_third_order(implementation, rng):
    x, v = helpers.tree(dense(rng, 2, 6)), helpers.tree(dense(rng, 2, 6))

    def third(fn, x):
        first = jax.grad(lambda x: jnp.sin(fn(x)).sum())
        second = jax.grad(lambda x: helpers.product(first(x), v))
        return jax.grad(lambda x: helpers.product(second(x), v))(x)

    def ours(x, implementation=implementation):
        return third(lambda x: loss(x, implementation=implementation), x)

    if implementation == "ffi":
        with pytest.raises(NotImplementedError, match="no kernels for derivatives beyond the second order"):
            ours(x)
        ours = functools.partial(ours, implementation=None)
    oracle = helpers.oracle_jit(functools.partial(third, formula))
    helpers.assert_trees_close(helpers.quick_jit(ours)(x), oracle(x), 1e-10)


# ---- float32


@pytest.mark.parametrize(("N", "tolerance"), [(128, 1e-6), (1024, 3e-6)])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(N=1024)
def test_accuracy_of_each_ray(N, tolerance, implementation, rng):
    """Wherever the origin of m, and however uneven the weights; also for the same rays in flat arrays, misaligned."""
    B = 6
    ids = np.repeat(np.arange(-1, B), [1] + [N] * B).astype(np.int32)

    @helpers.user_jit
    def values_and_gradients(w, m, interval):
        def padded(x):
            return loss(tuple(jnp.pad(a.ravel(), (1, 0)) for a in x), ids, B, implementation=implementation)

        fns = {"dense": lambda x: loss(x, implementation=implementation), "flat": padded}
        return {
            k: (f((w, m, interval)), jax.vjp(f, (w, m, interval))[1](jnp.ones(B, w.dtype))[0]) for k, f in fns.items()
        }

    oracle = helpers.oracle_jit(lambda *x: jax.grad(lambda x: formula(x).sum())(x))
    interval = rng.random((B, N)) / N
    for origin in (0.0, 1000.0):
        for name, w in (("flat", rng.random((B, N))), ("equal", np.full((B, N), 0.1)), ("spiked", spiked(rng, B, N))):
            m = np.sort(origin + rng.random((B, N)), -1)
            x = tuple(jnp.asarray(a, jnp.float32) for a in (w, m, interval))
            want, bars = numpy_losses(*x), oracle(*helpers.wide(x))
            for kind, (got, got_bars) in values_and_gradients(*x).items():
                what = f"{kind}, {name} weights at {origin}"
                assert got.dtype == jnp.float32
                error = np.max(np.abs(np.asarray(got, np.float64) - want) / want)
                assert error <= tolerance, f"{what}: {error:.1e}"
                for argument, a, b in zip(("w", "m", "interval"), got_bars, bars, strict=True):
                    off = np.linalg.norm(np.asarray(a, np.float64) - b, axis=-1) / np.linalg.norm(b, axis=-1)
                    # 2 w (C − C') cancels at a spike halfway: rounding C and C' alone is 1e-6 of a ray's gradient in m.
                    assert off.max() <= 3e-6, f"{what}: gradient in {argument} off by {off.max():.1e}"


@pytest.mark.parametrize("which", [(0,), (0, 1, 2)])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(which=[(0,)])
def test_long_rays(which, implementation, rng):
    """Rays of several tiles, in first and second order, of gradients in w alone and in all."""
    lengths = [0, 2500, 1, 1030, 700, 513, 1024]
    x, ids = flat(rng, lengths, outside=(3, 5))
    x = (abs(x[0]), *x[1:])
    v = tuple(rng.random(a.shape) for a in x)

    def derivatives(fn, x, v):
        chosen = [x[i] for i in which]

        def first(*chosen):
            full = list(x)
            for i, a in zip(which, chosen, strict=True):
                full[i] = a
            return fn(full)

        every = tuple(range(len(which)))
        gradient = jax.grad(first, every)
        second = jax.grad(lambda *c: helpers.product(gradient(*c), tuple(v[i] for i in which)), every)
        return gradient(*chosen), second(*chosen)

    oracle = helpers.oracle_jit(functools.partial(derivatives, lambda x: one_ray(*x)))
    ours = helpers.user_jit(
        functools.partial(
            derivatives, lambda x: loss(x, ids, len(lengths), reduction="sum", implementation=implementation)
        )
    )
    narrow = tuple(jnp.asarray(a, jnp.float32) for a in x)
    results = ours(narrow, tuple(jnp.asarray(a, jnp.float32) for a in v))
    for r in range(len(lengths)):
        ray = np.flatnonzero(ids == r)
        if not len(ray):
            continue
        want = oracle(tuple(np.asarray(a, np.float64)[ray] for a in narrow), tuple(a[ray] for a in v))
        for order, (got, bars) in enumerate(zip(results, want, strict=True), 1):
            for i, a, b in zip(which, got, bars, strict=True):
                off = np.linalg.norm(np.asarray(a, np.float64)[ray] - b) / max(np.linalg.norm(b), 1e-30)
                assert off <= 3e-6 * order, f"ray of {len(ray)}, order {order}, operand {i}: {off:.1e}"
    assert all(not np.asarray(a)[(ids < 0) | (ids >= len(lengths))].any() for got in results for a in got)


@pytest.mark.thorough_if(implementation="xla")
def test_many_rays(implementation, rng):
    """So many short rays that threads have several, and some that are a hundred times as long."""
    lengths = rng.integers(0, 12, 40_000)
    long = rng.choice(len(lengths), 20, replace=False)
    lengths[long] = rng.integers(300, 900, len(long))
    x, ids = flat(rng, lengths, outside=(3, 5))
    x = tuple(a.astype(np.float32) for a in x)
    w, m, interval = (a.astype(np.float64) for a in x)
    fn = jax.grad(lambda x: loss(x, ids, len(lengths), reduction="sum", implementation=implementation))
    bars = helpers.quick_jit(fn)(x)

    want = [2 / 3 * interval * w, np.zeros_like(w), w * w / 3]  # and what the other samples of the ray add
    scale = abs(want[0])
    inside = (ids >= 0) & (ids < len(lengths))
    for shift in range(1, lengths.max()):
        a, b = np.arange(len(w) - shift), np.arange(shift, len(w))
        same = (ids[a] == ids[b]) & inside[a]
        a, b = a[same], b[same]
        for i, j, sign in ((a, b, -1), (b, a, 1)):
            want[0][i] += 2 * w[j] * (m[b] - m[a])
            want[1][i] += 2 * w[i] * w[j] * sign
            scale[i] += 2 * abs(w[j]) * (m[b] - m[a])
    for name, got, expected in zip(("w", "m", "interval"), bars, want, strict=True):
        got = np.asarray(got, np.float64)
        assert not got[~inside].any()
        tolerance = 3e-6 * (scale if name == "w" else lengths[ids.clip(0, len(lengths) - 1)] * abs(w).max() ** 2)
        assert (abs(got - expected) <= tolerance + 1e-7)[inside].all(), name


@pytest.mark.thorough_if(implementation="xla")
def test_long_rays_without_gradients_of_samples(implementation, rng):
    """Second order in the interval and the cotangent alone: no sample's gradient is wanted, only sums over the ray."""
    x, v = helpers.tree(dense(rng, 2, 1500, shared=True)), helpers.tree(dense(rng, 2, 1500, shared=True))
    ct = jnp.asarray(rng.normal(size=2))

    def derivatives(fn, interval, ct):
        def second(interval, ct):
            return helpers.product(jax.vjp(fn, (*x[:2], interval))[1](ct)[0][:2], v[:2])

        return jax.grad(second, (0, 1))(interval, ct)

    ours = helpers.quick_jit(functools.partial(derivatives, lambda x: loss(x, implementation=implementation)))
    oracle = helpers.oracle_jit(functools.partial(derivatives, formula))
    helpers.assert_trees_close(ours(x[2], ct), oracle(x[2], ct), 1e-11)


@pytest.mark.thorough_if(implementation="xla")
def test_never_negative(implementation, rng):
    """A million rays: uneven weights, narrow and far from the origin."""
    B, N = 250_000, 9
    fn = helpers.user_jit(lambda w, m: loss((w, m, 0.0), implementation=implementation))
    for origin, width in ((0, 1), (1000, 1), (1000, 1e-3), (-5e4, 0.1)):
        w = np.exp(rng.normal(-4, 4, (B, N))).astype(np.float32)
        m = np.sort((origin + width * rng.random((B, N))).astype(np.float32), -1)
        assert fn(w, m).min() >= 0


@pytest.mark.thorough_if(implementation="xla")
def test_half_precision_is_computed_in_float32(implementation, rng):
    w, m, interval = (jnp.asarray(a, jnp.bfloat16) for a in dense(rng, 3, 20))
    w = abs(w)  # of both signs they might cancel
    fn = jax.value_and_grad(lambda w, m: jka.distortion_loss(w, m, interval, implementation=implementation))
    value, bar = fn(w, m)
    want, want_bar = jax.value_and_grad(jka.distortion_loss)(*(a.astype(jnp.float32) for a in (w, m, interval)))
    assert value.dtype == jnp.float32 and bar.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, want, rtol=2e-6)
    helpers.assert_close(bar.astype(jnp.float32), want_bar, 4e-3)
    mixed = jka.distortion_loss(w, m.astype(jnp.float32), 0.1, implementation=implementation)
    assert mixed.dtype == jnp.float32


# ---- Reductions, names, options


def test_reductions_and_names(implementation, rng):
    x = helpers.tree(dense(rng, 6, 7))
    each = numpy_losses(*x)
    options = {"implementation": implementation}
    shaped = tuple(a.reshape(2, 3, 7) for a in x)
    np.testing.assert_allclose(jka.distortion_loss(*shaped, reduction="none", **options), each.reshape(2, 3))
    np.testing.assert_allclose(jka.distortion_loss(*shaped, **options), each.mean())
    np.testing.assert_allclose(jka.distortion_loss(*x, reduction="sum", **options), each.sum())
    np.testing.assert_allclose(jka.distortion_loss(*(a[0] for a in x), **options), each[0])
    for interval in (0.25, np.float32(0.25), jnp.asarray(0.25)):
        np.testing.assert_allclose(jka.eff_distloss(*x[:2], interval), numpy_losses(*x[:2], 0.25).mean())
    np.testing.assert_allclose(jka.eff_distloss_native(*x), each.mean())
    ids = np.repeat([1, 2, 4, 5, 6, 8], 7)  # rays 0, 3, 7 and 9 are empty
    flattened = tuple(a.ravel() for a in x)
    for dtype in (np.int8, np.int32, np.int64, np.uint64):
        np.testing.assert_allclose(jka.flatten_eff_distloss(*flattened, ids.astype(dtype), 10), each.sum() / 10)
    wide = ids + 2**32 * (ids == 8)  # not ray 8 modulo 2³²
    for some in (wide, jnp.asarray(wide)):
        np.testing.assert_allclose(jka.flatten_distortion_loss(*flattened, some, 10), each[:-1].sum() / 10)


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_take_the_dtype_of_w(x64, rng):
    """Also where they have become tracers, which have dtypes of their own."""
    w, m, _ = (np.abs(a).astype(np.float32) for a in dense(rng, 3, 5))
    ids = np.zeros(5, np.int32)
    with jax.enable_x64(x64):
        weakly_typed = 4 / 128, 1, jnp.asarray(0.25), jnp.full(w.shape, 0.25)
        for interval in (*weakly_typed, np.float64(0.25), np.array(0.25), np.array(2)):
            jits = (lambda f: f, jax.jit) if any(interval is a for a in weakly_typed) else (lambda f: f,)
            for jit in jits:
                got = jit(jka.distortion_loss)(w, m, interval)
                assert got.dtype == jnp.float32
                np.testing.assert_allclose(got, numpy_losses(w, m, interval).mean(), rtol=1e-5)
        for jit in (lambda f: f, jax.jit):
            value, bar = jit(jax.value_and_grad(jka.distortion_loss, 2))(w, m, 0.1)
            np.testing.assert_allclose(value, numpy_losses(w, m, 0.1).mean(), rtol=1e-5)
            np.testing.assert_allclose(bar, np.square(w, dtype=float).sum() / 9, rtol=1e-5)
            flattened = jit(lambda w, m, i: jka.flatten_distortion_loss(w, m, i, ids, 1))(w[0], m[0], 0.1)
            np.testing.assert_allclose(flattened, numpy_losses(w[0], m[0], 0.1), rtol=1e-5)


@pytest.mark.thorough_if(implementation="xla")
def test_sort_and_check(implementation, rng):
    options = {"implementation": implementation, "reduction": "none"}
    w, m, interval = helpers.tree(dense(rng, 3, 9))
    shuffled = m[:, ::-1]
    sort = jax.jit(jax.grad(lambda *x: jka.distortion_loss(*x, sort=True, **options).sum(), (0, 1, 2)))
    ascending = jax.jit(jax.grad(lambda *x: jka.distortion_loss(*x, **options).sum(), (0, 1, 2)))
    want = ascending(w[:, ::-1], m, interval[:, ::-1])
    helpers.assert_trees_close(sort(w, shuffled, interval), tuple(a[:, ::-1] for a in want), 1e-12)

    ids = np.repeat(np.arange(3), 9)
    order = rng.permutation(27)
    x = tuple(a.ravel()[order] for a in (w, m, interval))
    got = jka.flatten_distortion_loss(*x, ids[order], 3, sort=True, **options)
    np.testing.assert_allclose(got, numpy_losses(w, m, interval))

    jka.distortion_loss(w, m, interval, check=True, **options)
    jka.flatten_distortion_loss(w.ravel(), m.ravel(), 0.1, ids, 3, check=True, **options)  # m falls between rays
    with pytest.raises(Exception, match="m must ascend"):
        jka.distortion_loss(w, shuffled, interval, check=True, **options)
    # A ray of one sample has nothing to ascend to; an infinite last position ascends.
    for bad in (m.at[1, 4].set(jnp.nan), m[:, :1].at[1].set(jnp.nan), m.at[2, -1].set(jnp.inf)):
        with pytest.raises(Exception, match="m must be finite"):
            jka.distortion_loss(w[:, : bad.shape[1]], bad, 0.1, check=True, **options)
    with pytest.raises(Exception, match="m must ascend within"):
        jka.flatten_distortion_loss(w.ravel(), shuffled.ravel(), 0.1, ids, 3, check=True, **options)
    with pytest.raises(Exception, match="ray_id must not decrease"):
        jka.flatten_distortion_loss(w.ravel(), m.ravel(), 0.1, ids[::-1], 3, check=True, **options)
    padded, at_the_end = jnp.array([0.0, 1.0, jnp.nan, jnp.nan, 0.5]), np.array([0, 1, 2, 2, 2])
    jka.flatten_distortion_loss(w[0, :5], padded, 0.1, at_the_end, 2, check=True, **options)
    with pytest.raises(Exception, match="m must be finite"):
        jka.flatten_distortion_loss(w[0, :5], padded, 0.1, at_the_end, 3, check=True, **options)
    with pytest.raises(Exception, match="ray_id must not decrease"):
        jka.flatten_distortion_loss(w[0, :3], m[0, :3], 0.1, np.array([0, 1, -1]), 2, check=True, **options)
    checked = jax.jit(checkify.checkify(jax.grad(lambda w, m: jka.distortion_loss(w, m, 0.1, check=True))))
    assert checked(w, m)[0].get() is None and "m must ascend" in checked(w, shuffled)[0].get()


@pytest.mark.thorough_if(implementation="xla")
def test_samples_outside_stay_outside(implementation, rng):
    """NaN in padding reaches nothing, and has gradient 0; ids in no order touch no foreign memory and leave no gap."""
    x, ids = flat(rng, [3, 0, 5], outside=(2, 4))
    x = helpers.tree(x)
    poisoned = tuple(jnp.where((ids >= 0) & (ids < 3), a, jnp.nan) for a in x)
    fn = helpers.quick_jit(jax.value_and_grad(lambda x, ids: loss(x, ids, 3, implementation=implementation).sum()))
    got, want = fn(poisoned, ids), fn(x, ids)
    helpers.assert_trees_close(got, want, 1e-14)
    assert all(not b[:2].any() and not b[-4:].any() and b[2:-4].all() for b in got[1])
    for _ in range(5):
        wild = rng.choice(np.array([-(2**31), -1, 0, 1, 2, 3, 2**31 - 1], np.int32), len(ids))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(fn(x, wild)))


# ---- Transformations and what they run


@pytest.mark.thorough_if(implementation="xla")
def test_vmap(implementation, rng):
    """Over any subset, first and second order; what is not mapped gets the sum, or under vmap of grad one each."""
    n = 3
    w, m, _ = helpers.tree(dense(rng, n, 5))
    x = (w, m[0], jnp.asarray(rng.random()))

    def fn(w, m, interval):
        def each(w):
            return jnp.tanh(loss((w, m, interval), implementation=implementation))

        return each(w).sum() + jnp.square(jax.grad(lambda w: each(w).sum())(w)).sum()

    single = helpers.quick_jit(jax.value_and_grad(fn, (0, 1, 2)))
    rows = [single(w[i], *x[1:]) for i in range(n)]
    values, bars = jax.tree.map(lambda *a: np.stack(a), *rows)
    got = helpers.quick_jit(jax.vmap(jax.value_and_grad(fn, (0, 1, 2)), (0, None, None)))(*x)
    helpers.assert_trees_close(got, (values, bars), 1e-11)
    total = helpers.quick_jit(jax.grad(lambda *x: jax.vmap(fn, (0, None, None))(*x).sum(), (0, 1, 2)))(*x)
    helpers.assert_trees_close(total, (bars[0], bars[1].sum(0), bars[2].sum(0)), 1e-11)

    (w, m, interval), ids = flat(rng, [2, 0, 4])
    others = np.stack([ids, ids[::-1].copy() * 0, np.minimum(ids, 1)])
    fn = jax.value_and_grad(lambda w, ids: loss((w, m, interval), ids, 3, implementation=implementation).sum())
    single = helpers.quick_jit(fn)
    w = jnp.asarray(rng.normal(size=(n, 6)))
    for axes, args in (((0, None), (w, ids)), ((None, 0), (w[0], others)), ((0, 0), (w, others))):
        got = helpers.quick_jit(jax.vmap(fn, axes))(*args)
        want = [single(*(a[i] if d == 0 else a for a, d in zip(args, axes, strict=True))) for i in range(n)]
        helpers.assert_trees_close(got, jax.tree.map(lambda *a: np.stack(a), *want), 1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
def test_shard_map(check_vma, cpu_implementation, cpu_devices, rng):
    """Rays sharded, positions shared by all: their gradient, and the interval's, is the sum over shards."""
    mesh = Mesh(np.array(cpu_devices), ("shard",))
    w, m, _ = dense(rng, 8, 5)
    x = (w, m[0], np.asarray(0.3))

    def total(w, m, interval):
        each = loss((w, jnp.broadcast_to(m, w.shape), interval), implementation=cpu_implementation)
        ids = jnp.repeat(jnp.arange(w.shape[0], dtype=jnp.int32), w.shape[1])
        m = jnp.tile(m, w.shape[0])
        flattened = loss((w.ravel(), m, interval), ids, w.shape[0], sort=True, implementation=cpu_implementation)
        return (jnp.sin(each) * flattened).sum()

    specs = (S("shard"), S(), S())
    sharded = jax.shard_map(
        lambda *x: jax.lax.psum(total(*x), "shard"), mesh=mesh, in_specs=specs, out_specs=S(), check_vma=check_vma
    )
    got = helpers.quick_jit(jax.value_and_grad(sharded, (0, 1, 2)))(*x)
    want = helpers.oracle_jit(jax.value_and_grad(total, (0, 1, 2)))(*x)
    helpers.assert_trees_close(got, want, 1e-11)


@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(mesh=AxisType.Explicit)
def test_jit_of_split_rays(cpu_implementation, mesh, rng):
    """Nothing moves before the mean, and gradients stay where their samples are; only numbers are summed."""
    B, N, rays = 16, 5, S("a", "b")
    w, m, interval = (a.reshape(8, 2, N) for a in dense(rng, B, N))
    for x, specs in (((w, m, interval), (rays, rays, rays)), ((w, m, rng.random()), (rays, rays, S()))):
        placed = helpers.place(mesh, x, specs)
        each = helpers.quick_jit(lambda *x: loss(x, implementation=cpu_implementation))
        assert not helpers.collectives(each, *placed)
        got = each(*placed)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, rays), 2)
        helpers.assert_close(got, numpy_losses(*x), 1e-12)

        def second(*x):
            fn = jax.grad(lambda *x: loss(x, reduction="mean", implementation=cpu_implementation), (0, 1, 2))
            return sum(jnp.sin(B * a).mean() for a in fn(*x))

        for order in (lambda *x: loss(x, reduction="mean", implementation=cpu_implementation), second):
            step = helpers.quick_jit(jax.value_and_grad(order, (0, 1, 2)))
            found = helpers.collectives(step, *placed)
            assert {kind for kind, _ in found} == {"all-reduce"}
            assert all(np.prod(shape, dtype=int) == 1 for _, shapes in found for shape in shapes)
            got = step(*placed)
            helpers.assert_trees_close(got, helpers.oracle_jit(jax.value_and_grad(order, (0, 1, 2)))(*x), 1e-11)
            for a, spec in zip(got[1], specs, strict=True):
                assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)


@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(mesh=AxisType.Explicit)
def test_sort_of_split_rays(cpu_implementation, mesh, rng):
    """Positions that all devices have, of rays that are split: each device takes those of its own rays."""
    w, m, _ = dense(rng, 8, 5)
    m, interval = m[:, ::-1], np.asarray(0.3)
    fn = jax.value_and_grad(
        lambda *x: loss(x, sort=True, reduction="sum", implementation=cpu_implementation), (0, 1, 2)
    )
    want = helpers.oracle_jit(fn)(w, m, interval)
    np.testing.assert_allclose(want[0], numpy_losses(w, m, interval).sum())
    for specs in ((S("a"), S(), S()), (S("a"), S("a"), S()), (S(), S(("a", "b")), S())):
        got = helpers.quick_jit(fn)(*helpers.place(mesh, (w, m, interval), specs))
        helpers.assert_trees_close(got, want, 1e-12)


@pytest.mark.parametrize("sort", [False, True])
def test_split_samples(sort, mesh, rng):
    """Every device needs a ray whole: Auto meshes gather, on Explicit ones it is an error."""
    w, m, interval = dense(rng, 2, 8)
    ids = np.repeat(np.arange(2, dtype=np.int32), 8)
    for fn, args, spec in (
        (lambda *x: loss(x, sort=sort), (w, m, interval), S(None, "a")),
        (lambda *x: loss(x, ids, 2, sort=sort), (w.ravel(), m.ravel(), interval.ravel()), S("a")),
    ):
        placed = helpers.place(mesh, args, [spec] * 3)
        if AxisType.Explicit in mesh.axis_types:
            with pytest.raises(ValueError, match="which every device needs whole"):
                jax.jit(fn)(*placed)
        else:
            helpers.assert_close(jax.jit(fn)(*placed), numpy_losses(w, m, interval), 1e-12)


def test_what_runs(kernels, rng):
    """jax.grad to w is one kernel; flat rays need where they begin, once."""
    equal, (flattened, ids) = dense(rng, 2, 5), flat(rng, [2, 3])

    def run(fn, *args):
        text = jax.jit(fn).lower(*args).compile().as_text()
        return collections.Counter(re.findall(r'custom_call_target="jax_knn_aggregate\.(\w+)"', text))

    for args, rays, name, more in (
        (equal, (), "distortion", {}),
        (flattened, (ids, 2), "flat_distortion", {"ray_offsets": 1}),
    ):
        x = helpers.tree(args)

        def fn(*x, rays=rays):
            return loss(x, *rays, reduction="mean")

        def second(w, fn=fn, x=x):
            return jnp.sin(jax.grad(fn)(w, *x[1:])).sum()

        assert run(jax.grad(fn), *x) == {name: 1, **more}
        assert run(jax.value_and_grad(fn), *x) == {name: 2, **more}
        assert run(jax.grad(second), x[0]) == {name: 2, **more}
        assert run(lambda *x, fn=fn: jax.jvp(fn, x, x), *x) == {name: 2, **more}


def test_gradients_repeat_bitwise(kernels, rng):
    x, ids = flat(rng, rng.integers(0, 900, 200))
    x = tuple(jnp.asarray(a, jnp.float32) for a in x)
    fn = helpers.user_jit(jax.grad(lambda x: loss(x, ids, 200, implementation="ffi").sum()))
    want = fn(x)
    for _ in range(3):
        assert all(np.array_equal(a, b) for a, b in zip(fn(x), want, strict=True))


# ---- Errors


def test_errors(rng):
    w, m, interval = dense(rng, 3, 4)
    cases = [
        (ValueError, r"m has shape \(3, 3\), expected \(3, 4\)", (w, m[:, :3], interval), {}),
        (ValueError, r"interval has shape \(4,\)", (w, m, interval[0]), {}),
        (ValueError, r"w has shape \(\)", (w[0, 0], m[0, 0], 1.0), {}),
        (ValueError, "reduction is 'max'", (w, m, interval), {"reduction": "max"}),
        (ValueError, "implementation is 'fast'", (w, m, interval), {"implementation": "fast"}),
        (TypeError, "m has dtype float32, expected float64", (w, m.astype(np.float32), interval), {}),
        (TypeError, "w has dtype int64", (w.astype(int), m, interval), {}),
        (TypeError, "w is a list", ([1.0], m, interval), {}),
        (TypeError, "interval is a bool", (w, m, True), {}),
    ]
    for error, match, args, options in cases:
        with pytest.raises(error, match=match):
            jka.distortion_loss(*args, **options)
    ids = np.zeros(4, int)
    cases = [
        (ValueError, r"w has shape \(3, 4\), expected \(N,\)", (w, m, interval, ids, 1)),
        (ValueError, r"ray_id has shape \(3,\), expected \(4,\)", (w[0], m[0], 1.0, ids[:3], 1)),
        (TypeError, "ray_id has dtype float64", (w[0], m[0], 1.0, w[0], 1)),
        (ValueError, "n_rays is -1", (w[0], m[0], 1.0, ids, -1)),
        (TypeError, "n_rays is 1.5, expected a Python integer", (w[0], m[0], 1.0, ids, 1.5)),
    ]
    for error, match, args in cases:
        with pytest.raises(error, match=match):
            jka.flatten_distortion_loss(*args)
    with pytest.raises(TypeError, match="static_argnames='n_rays'"):
        jax.jit(jka.flatten_distortion_loss)(w[0], m[0], 1.0, ids, 1)
