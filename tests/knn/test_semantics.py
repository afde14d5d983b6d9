"""Order, ties, empty slots, NaN and infinity, integer dtypes, empty arrays: the same on every implementation."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


def stacked(clouds):
    return tuple(np.stack(a) for a in zip(*clouds, strict=True))


# ---- Order


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_ties_go_to_the_smaller_index(metric, dtype, implementation, rng):
    """On integers every implementation computes the same distances, so the neighbours must be exactly the oracle's."""
    for P, K in ((64, 33), (7, 7)):
        clouds = [
            helpers.integer_cloud(rng, metric, 20, P, 2, dtype=dtype, copies=c, flat=f)
            for c, f in ((False, False), (True, False), (False, True))
        ]
        clouds.append(tuple(np.broadcast_to(a[..., :1, :] if i == 1 else a, a.shape) for i, a in enumerate(clouds[0])))
        x = stacked(clouds)  # any, duplicates, coplanar, all points at one place
        lengths = np.array([P, P, P - 1, P // 2])
        got = helpers.jitted(metric, K, implementation, True)(x, lengths)
        want = helpers.oracle(metric, x, K, lengths)
        np.testing.assert_array_equal(got.idxs, want[3])
        np.testing.assert_array_equal(got.dists, want[2])
        found = helpers.jitted_search(metric, K, implementation, True)(x, lengths)
        np.testing.assert_array_equal(found.idxs, want[3])
        np.testing.assert_array_equal(found.dists, want[2])


@pytest.mark.thorough_if(implementation="xla")
def test_negative_zero_ties_with_zero(implementation):
    """Distances 0 and −0 are equal, so the index decides."""
    P = 6
    q, p = np.ones((1, 3), np.float32), np.zeros((P, 3), np.float32)
    sigma = np.array([0.0, -0.0, 0.0, -0.0, -0.0, 0.0], np.float32)[:, None] * np.ones(3, np.float32)
    R = np.broadcast_to(np.eye(3, dtype=np.float32), (P, 3, 3))
    for K in (1, 4, P):
        out = jka.knn_search_aniso(q, p, sigma, R, K, implementation=implementation)
        np.testing.assert_array_equal(out.idxs, [np.arange(K)])


@pytest.mark.thorough_if(implementation="xla")
def test_negative_distances_come_first(implementation, rng):
    x = helpers.integer_cloud(rng, "aniso", 10, 40, 1)
    x[3][:] = -np.abs(x[3])
    out = jka.knn_aggregate_aniso(*x, 40, implementation=implementation)
    want = helpers.oracle("aniso", x, 40)
    assert (np.asarray(out.dists) < 0).any()
    np.testing.assert_array_equal(out.idxs, want[3])
    helpers.assert_close(out.w_out, want[1], 1e-12, "w_out")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_overflowing_distances_tie(metric, implementation, rng):
    """At coordinates of 1e18 and more, float32 distances are huge or +inf; +inf ties, and index decides."""
    P, K = 40, 40
    x = helpers.integer_cloud(rng, metric, 8, P, 2, dtype=np.float32)
    x = (x[0], x[1].copy(), *x[2:])
    x[1][::2] *= np.float32(2**70)  # squares beyond float32
    x[1][1::4] *= np.float32(2**62)  # squares within
    if metric == "aniso":
        x[3][:] = np.maximum(x[3], 1)
        x[4][:] = np.eye(3)
    out = helpers.search(metric, x, K, implementation=implementation)
    assert np.isinf(out.dists).any() and np.isfinite(out.dists).any()
    want = helpers.oracle_search(metric, x, K)
    dists = np.take_along_axis(helpers.pair_distances(metric, helpers.wide(x)), want, -1)
    np.testing.assert_array_equal(np.isinf(out.dists), dists > np.finfo(np.float32).max)
    for row, wanted, dists in zip(np.asarray(out.idxs), want, np.asarray(out.dists), strict=True):
        np.testing.assert_array_equal(row[np.isinf(dists)], wanted[np.isinf(dists)], err_msg="+inf is not by index")
        np.testing.assert_array_equal(np.sort(row), np.arange(P))


@pytest.mark.thorough_if(implementation="xla")
def test_infinity_before_nan_before_empty(implementation):
    """One query, points at distances 1, +inf, NaN and some that do not exist, in shuffled order."""
    q = np.zeros((1, 3))
    x0 = np.array([np.nan, np.inf, 2.0, 1.0, np.nan, -np.inf, 1.0, 7.0, 8.0])
    p = np.zeros((9, 3))
    p[:, 0] = x0
    want = [[3, 6, 2, 1, 5, 0, 4, -1, -1]]
    f, sigma, R = np.ones((9, 2)), np.ones((9, 3)), np.ones((9, 3, 3))
    out = jka.knn_search(q, p, 9, p_lengths=np.int32(7), implementation=implementation)
    np.testing.assert_array_equal(out.idxs, want)
    dists = [[1, 1, 4, np.inf, np.inf, np.nan, np.nan, np.inf, np.inf]]
    np.testing.assert_array_equal(out.dists, dists)
    out = jka.knn_aggregate(q, p, f, sigma[:, :1], 9, p_lengths=np.int32(7), implementation=implementation)
    np.testing.assert_array_equal(out.idxs, want)
    np.testing.assert_allclose(out.w_out, np.exp(-np.where(np.isinf(dists), 800, dists)), atol=1e-300)
    np.testing.assert_array_equal(out.w_out[0, -2:], 0)
    out = jka.knn_aggregate_aniso(q, p, f, sigma, R, 9, p_lengths=np.int32(7), implementation=implementation)
    np.testing.assert_array_equal(out.idxs, want)
    np.testing.assert_array_equal(np.isnan(out.dists), np.isnan(dists))
    assert np.isnan(out.f_out).all()
    # Whoever comes last gets in last.
    for K in range(1, 9):
        out = jka.knn_search(q, p, K, p_lengths=np.int32(7), implementation=implementation)
        np.testing.assert_array_equal(out.idxs, [want[0][:K]], err_msg=f"K = {K}")


@pytest.mark.thorough_if(implementation="xla")
def test_largest_finite_distances_come_before_infinity(implementation):
    """Near the largest float32, where a search that marks +inf or NaN by large numbers would mix them up."""
    top = np.finfo(np.float32).max
    steps = np.array([top, np.inf, np.nan, 1.0, top], np.float32)
    sigma = np.zeros((5, 3), np.float32)
    sigma[:, 0] = steps
    q, p = np.array([[1, 0, 0]], np.float32), np.zeros((5, 3), np.float32)
    R = np.broadcast_to(np.eye(3, dtype=np.float32), (5, 3, 3))
    want = [3, 0, 4, 1, 2]
    for K in range(1, 6):
        out = jka.knn_search_aniso(q, p, sigma, R, K, implementation=implementation)
        np.testing.assert_array_equal(out.idxs, [want[:K]], err_msg=f"K = {K}")
        np.testing.assert_array_equal(out.dists, steps[want[:K]][None], err_msg=f"K = {K}")


# ---- Points that do not exist


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla", metric="aniso")
def test_lengths(metric, implementation, rng):
    P, K = 6, 5
    lengths = np.array([-3, 0, 1, 4, 6, 1000])
    x = helpers.cloud(rng, metric, 7, P, 3, batch=(6,))
    got = helpers.jitted(metric, K, implementation, True)(x, lengths)
    want = helpers.oracle(metric, x, K, lengths)
    np.testing.assert_array_equal(got.idxs, want[3])
    for name, w in zip(helpers.OUTPUTS, want, strict=False):
        helpers.assert_close(getattr(got, name), w, 1e-12, name)
    empty = np.asarray(got.idxs) == -1
    np.testing.assert_array_equal(empty.sum((1, 2)), 7 * np.maximum(K - np.clip(lengths, 0, P), 0))
    np.testing.assert_array_equal(np.asarray(got.dists)[empty], np.inf)
    np.testing.assert_array_equal(np.asarray(got.w_out)[empty], 0)
    # Without batch axis: a scalar; a Python integer too.
    for b in range(6):
        one = helpers.aggregate(metric, [a[b] for a in x], K, p_lengths=int(lengths[b]), implementation=implementation)
        np.testing.assert_array_equal(one.idxs, got.idxs[b])
    for length, b in ((-(2**70), 0), (2**70, 5)):  # of any size
        one = helpers.aggregate(metric, [a[b] for a in x], K, p_lengths=length, implementation=implementation)
        np.testing.assert_array_equal(one.idxs, got.idxs[b])


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_empty_slots_have_zero_derivatives(metric, implementation, rng):
    """NaN behind the length, cotangents for every slot: nothing of it may reach a derivative."""
    P, K, n = 9, 6, 4
    x = helpers.cloud(rng, metric, 5, P, 3)
    for a in x[1:]:
        a[n:] = np.nan
    x = helpers.tree(x)
    ct, v = helpers.tree(helpers.cotangents(rng, metric, x, K))
    short = (x[0], *(a[:n] for a in x[1:]))
    idxs = np.concatenate([helpers.oracle_search(metric, short, n), np.full((5, K - n), -1)], -1)
    short_v = {name: a if name == "q" else a[:n] for name, a in v.items()}

    _, got, second, moved = helpers.jitted_derivatives(metric, K, implementation, p_lengths=n)(x, ct, v)
    want = helpers.oracle_first(metric, short, idxs, ct)
    for name in helpers.ARGUMENTS[metric]:
        bar = np.asarray(got[name])
        helpers.assert_close(bar if name == "q" else bar[:n], want[name], 1e-10, name)
        if name != "q":
            np.testing.assert_array_equal(bar[n:], 0, err_msg=f"{name} of points that do not exist")
    got = second
    want = helpers.oracle_second(metric, short, idxs, ct, short_v)
    for name in (*helpers.ARGUMENTS[metric], *helpers.OUTPUTS):
        bar = np.asarray(got[name])
        ours = bar if name in ("q", *helpers.OUTPUTS) else bar[:n]
        helpers.assert_close(ours, want[name], 1e-9, f"second order, {name}")
        if len(bar) == P:
            np.testing.assert_array_equal(bar[n:], 0, err_msg=f"second order, {name} of points that do not exist")
    for name in ("w_out", "dists"):
        np.testing.assert_array_equal(np.asarray(got[name])[:, n:], 0, err_msg=f"second order, empty slots of {name}")
    want = helpers.oracle_moving(metric, short, idxs, ct, short_v, helpers.turned(ct))
    for name, bar in moved.items():
        bar = np.asarray(bar)
        helpers.assert_close(bar if name == "q" else bar[:n], want[name], 1e-9, f"forward over reverse, {name}")
        if name != "q":
            np.testing.assert_array_equal(bar[n:], 0, err_msg=f"forward over reverse, {name} that do not exist")


@pytest.mark.thorough_if(implementation="xla")
def test_empty_slots_name_no_point(implementation, rng):
    """Points that no slot names may be NaN: the first and the last, to which −1 or a large index could be clipped."""
    P, K = 6, 3
    x = helpers.cloud(rng, "aniso", 4, P, 2)
    for a in x[1:]:
        a[[0, P - 1]] = np.nan
    idxs = rng.integers(1, P - 1, (4, K))
    idxs[:, 1] = [-1, P, -1, 10**6]
    idxs[3] = -1
    x = helpers.tree(x)
    ct, v = helpers.tree(helpers.cotangents(rng, "aniso", x, K))

    def op(*x):
        return jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation)[:3]

    def every(x, ct, v):
        return (
            helpers.first("aniso", op, x, ct),
            helpers.second("aniso", op, x, ct, v),
            jax.jvp(op, x, tuple(v[n] for n in helpers.ARGUMENTS["aniso"])),
        )

    first, second, forward = helpers.quick_jit(every)(x, ct, v)
    inner = (x[0], *(a[1:-1] for a in x[1:]))
    inner_v = {n: a if n == "q" else a[1:-1] for n, a in v.items()}
    inner_idxs = np.where((idxs >= 0) & (idxs < P), idxs - 1, -1)
    wants = (
        helpers.oracle_first("aniso", inner, inner_idxs, ct),
        helpers.oracle_second("aniso", inner, inner_idxs, ct, inner_v),
    )
    for got, want in zip((first, second), wants, strict=True):
        for name, bar in got.items():
            own = name in ("q", *helpers.OUTPUTS)
            helpers.assert_close(bar if own else bar[1:-1], want[name], 1e-9, name)
            if not own:
                np.testing.assert_array_equal(bar[jnp.array([0, P - 1])], 0, err_msg=name)
    for part in forward:
        assert not any(np.isnan(a).any() for a in part), "NaN in forward mode"
    np.testing.assert_array_equal(
        np.asarray(forward[1][2])[inner_idxs < 0], 0, err_msg="tangents of empty slots' dists"
    )
    np.testing.assert_array_equal(
        np.asarray(forward[1][1])[inner_idxs < 0], 0, err_msg="tangents of empty slots' w_out"
    )


@pytest.mark.thorough_if(implementation="xla")
def test_all_slots_empty(implementation, rng):
    x = helpers.tree(helpers.cloud(rng, "aniso", 3, 4, 2))
    out = jka.knn_aggregate_aniso(*x, 4, p_lengths=0, implementation=implementation)
    np.testing.assert_array_equal(out.idxs, -1)
    np.testing.assert_array_equal(out.f_out, 0)
    table = np.zeros((4, 2), np.int32)
    out = jka.knn_aggregate_aniso_lookup(*x, table, 2, p_lengths=0, implementation=implementation)
    np.testing.assert_array_equal(out.idxs, -1)
    op = helpers.outputs("aniso", 4, implementation, p_lengths=0)
    for bar in jax.grad(lambda *x: helpers.total(op(*x)), range(5))(*x):
        np.testing.assert_array_equal(bar, 0)


# ---- NaN and infinity


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_nan_query(metric, implementation, rng):
    """Values: NaN in its own rows alone. Gradients: NaN for it and for the points it chose, for no others."""
    Q, P, K = 6, 20, 3
    clean = helpers.cloud(rng, metric, Q, P, 2)
    # Points 10 and up are near no query but the NaN one, which takes the points of least index.
    bad = 2
    x = (clean[0].copy(), *clean[1:])
    x[0][bad, rng.integers(3)] = np.nan
    op = helpers.jitted(metric, K, implementation)
    got, want = op(x), op(clean)
    others = np.arange(Q) != bad
    for g, w, name in zip(got, want, got._fields, strict=True):
        np.testing.assert_array_equal(np.asarray(g)[others], np.asarray(w)[others], err_msg=f"other queries' {name}")
        if name != "idxs":
            assert np.isnan(g[bad]).all(), f"{name} of the NaN query is {g[bad]}"
    chosen = np.asarray(got.idxs[bad])
    np.testing.assert_array_equal(chosen, np.arange(K), err_msg="NaN distances tie")

    ct, _ = helpers.cotangents(rng, metric, x, K)
    op = helpers.outputs(metric, K, implementation)
    for some in (ct, {"w_out": ct["w_out"]}):
        bars = helpers.quick_jit(lambda x, some: helpers.first(metric, op, x, some))(
            helpers.tree(x), helpers.tree(some)
        )
        for name, bar in bars.items():
            want = np.isin(np.arange(len(bar)), bad if name == "q" else chosen)
            has = np.isnan(np.asarray(bar)).reshape(len(bar), -1).any(1)
            if name == "f" and "f_out" not in some:  # NaN·0 or nothing at all
                assert not has[~want].any(), "NaN in the features' gradient of points that were not chosen"
                continue
            np.testing.assert_array_equal(has, want, err_msg=f"rows of {name} with NaN, cotangents {list(some)}")


@pytest.mark.parametrize("what", ["p", "sigma", "R"])
@pytest.mark.thorough_if(implementation="xla")
def test_nan_point(what, implementation, rng):
    """Chosen only after every point with a number, whichever of its arrays the NaN is in."""
    Q, P = 6, 12
    x = list(helpers.cloud(rng, "aniso", Q, P, 2))
    at = helpers.ARGUMENTS["aniso"].index(what)
    x[at][[2, 5]] = np.nan
    want = helpers.oracle("aniso", x, P)
    for K in (P - 2, P - 1, P):
        out = jka.knn_aggregate_aniso(*x, K, implementation=implementation)
        np.testing.assert_array_equal(out.idxs, want[3][:, :K])
        assert np.isnan(out.dists).sum() == Q * (K - P + 2)
        assert np.isnan(out.f_out).all() == (K > P - 2)
        assert np.isnan(out.f_out).any() == (K > P - 2)
    np.testing.assert_array_equal(out.idxs[:, -2:], np.broadcast_to([2, 5], (Q, 2)))

    # Where it is not chosen, it leaves no trace in derivatives.
    bars = jax.grad(
        lambda *x: helpers.total(helpers.aggregate("aniso", x, P - 2, implementation=implementation)), range(5)
    )(*helpers.tree(x))
    for name, bar in zip(helpers.ARGUMENTS["aniso"], bars, strict=True):
        assert np.isfinite(bar).all(), f"gradient of {name}"


@pytest.mark.thorough_if(implementation="xla")
def test_nan_feature_stays_where_it_is(implementation, rng):
    x = helpers.cloud(rng, "aniso", 6, 12, 3)
    x[2][4, 1] = np.nan
    out = jka.knn_aggregate_aniso(*x, 5, implementation=implementation)
    uses = (np.asarray(out.idxs) == 4).any(-1)
    assert np.isfinite(out.w_out).all() and np.isfinite(out.dists).all()
    want = np.zeros((6, 3), bool)
    want[uses, 1] = True
    np.testing.assert_array_equal(np.isnan(out.f_out), want)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_infinite_coordinates(metric, implementation, rng):
    """IEEE arithmetic says which distances are ±inf and which NaN; other queries do not notice."""
    clean = helpers.cloud(rng, metric, 6, 12, 2)
    x = tuple(a.copy() for a in clean)
    x[0][1] = np.inf
    x[0][3, 1] = -np.inf
    x[1][7] = np.inf
    if metric == "aniso":
        x[4][2] = np.eye(3)
        x[3][8] = [-1, 2, 3]
        x[3][9, 1] = np.inf
    want = helpers.oracle(metric, x, 12)
    got = helpers.jitted(metric, 12, implementation)(x)
    np.testing.assert_array_equal(got.idxs, want[3])
    for name, w in zip(helpers.OUTPUTS, want, strict=False):
        helpers.assert_close(getattr(got, name), w, 1e-12, name)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_a_neighbour_at_infinity_is_none(metric, implementation, rng):
    """Whatever its parameters and features are: as if its slot were empty, at every order."""
    implementation = None if implementation == "ffi" else implementation  # third order has no kernels of its own
    P, K = 8, 3
    x = helpers.cloud(rng, metric, 4, P, 2)
    far = {"p": np.inf, "f": np.nan, "sigma": np.inf, "R": np.inf}
    for name, a in zip(helpers.ARGUMENTS[metric], x, strict=True):
        a[:2] = far.get(name, a[:2])
    x[1][0] = 3e200  # squares overflow
    idxs = rng.integers(2, P, (4, K))
    idxs[:, 1] = [0, 1, 0, 1]
    ct, v = helpers.cotangents(rng, metric, x, K)
    ct["f_out"][3] = np.inf  # reaches the features of neighbours that are there
    x, ct, v = helpers.tree((x, ct, v))

    def every(x, idxs, ct, v):
        op = lambda *x: helpers.precomputed(metric, x, idxs, implementation=implementation)[:3]  # noqa: E731
        second = lambda x: helpers.second(metric, op, x, ct, v)  # noqa: E731
        third = jax.grad(lambda x: helpers.product(second(x), {**v, **ct}))
        moved = helpers.moving(metric, op, x, ct, v, helpers.turned(ct))
        return op(*x), helpers.first(metric, op, x, ct), second(x), moved, third(x)

    run = helpers.quick_jit(every)
    got, want = run(x, idxs, ct, v), run(x, np.where(idxs < 2, -1, idxs), ct, v)
    kernels = 0 if implementation else len(got) - 1  # GPUs sum what XLA scatters in no order
    for order, (a, b) in enumerate(zip(got[:kernels], want[:kernels], strict=True)):
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=f"{order}"), a, b)
    helpers.assert_trees_close(got[kernels:], want[kernels:], 1e-13)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(metric="aniso")
def test_kernels_and_reference_agree_on_what_is_not_finite(metric, kernels, rng):
    """Infinities and NaN anywhere: the same entries of every result are finite, to third order, and the same."""
    Q, P, F, K = 4, 6, 3, 3

    def every(implementation, x, idxs, ct, v, dct):
        op = lambda *x: helpers.precomputed(metric, x, idxs, implementation=implementation)[:3]  # noqa: E731
        second = lambda x: helpers.second(metric, op, x, ct, v)  # noqa: E731
        third = jax.grad(lambda x: helpers.product(second(x), {**v, **ct}))
        forward = jax.jvp(op, x, tuple(v[name] for name in helpers.ARGUMENTS[metric]))
        # Without other cotangents, factors of 0 meet infinite parameters.
        some = [helpers.first(metric, op, x, {name: ct[name]}) for name in helpers.OUTPUTS]
        some_moved = [helpers.moving(metric, op, x, ct, v, {name: dct[name]}) for name in helpers.OUTPUTS]
        moved = helpers.moving(metric, op, x, ct, v, dct), some_moved
        return forward, some, helpers.first(metric, op, x, ct), second(x), moved, third(x)

    ours, reference = (helpers.quick_jit(functools.partial(every, i)) for i in (None, "xla"))
    for _ in range(100):
        x = helpers.cloud(rng, metric, Q, P, F)
        ct, v = helpers.cotangents(rng, metric, x, K)
        dct, _ = helpers.cotangents(rng, metric, x, K)
        arrays = jax.tree.leaves((x, ct, v, dct))
        spoilt = []
        for _ in range(rng.integers(1, 4)):
            n = rng.integers(len(arrays))
            at = tuple(rng.integers(0, arrays[n].shape))
            arrays[n][at] = rng.choice([np.inf, -np.inf, np.nan, 0.0])
            spoilt.append((int(n), arrays[n][at]))
        args = helpers.tree((x, rng.integers(-1, P, (Q, K)), ct, v, dct))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours(*args)), jax.tree.leaves(reference(*args)), strict=True
        ):
            what = f"{jax.tree_util.keystr(path)}, with {spoilt}"
            finite = np.isfinite(b)
            np.testing.assert_array_equal(np.isfinite(a), finite, err_msg=f"{what}: not finite elsewhere")
            helpers.assert_close(np.where(finite, a, 0), np.where(finite, b, 0), 1e-6, what)


@pytest.mark.thorough_if(implementation="xla")
def test_the_weight_at_infinity_is_zero_whatever_sigma(implementation, rng):
    """exp(-sigma·inf) would be NaN where sigma is 0, and infinite where it is negative."""
    x = helpers.cloud(rng, "iso", 3, 6, 2, dtype=np.float32)
    x[1][1:5, 0] = [1e30, np.inf, -1e30, -np.inf]
    x[3][1:5, 0] = [0, 0, -1, 1]
    got = helpers.jitted("iso", 6, implementation)(x)
    far = np.isin(got.idxs, [1, 2, 3, 4])
    np.testing.assert_array_equal(np.isposinf(got.dists), far)
    np.testing.assert_array_equal(np.asarray(got.w_out)[far], 0)
    near = (x[0][:, None] - x[1][[0, 5]]).astype(np.float64)
    w = np.exp(-x[3][[0, 5], 0] * (near**2).sum(-1))
    helpers.assert_close(got.f_out, w @ x[2][[0, 5]].astype(np.float64), 1e-5, "f_out")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_a_far_neighbour_does_not_spoil_gradients(metric, implementation, rng):
    """A neighbour whose float32 distance overflows has weight 0, and so no part in the gradient of f_out or w_out."""
    Q, P, K = 5, 6, 6
    x = helpers.cloud(rng, metric, Q, P, 2, dtype=np.float32)
    x[1][[1, 4]] *= np.float32(1e22)
    got = helpers.jitted(metric, K, implementation)(x)
    assert (np.isposinf(got.dists).sum(-1) == 2).all()
    ct, v = helpers.cotangents(rng, metric, x, K)
    ct = {n: ct[n] for n in ("f_out", "w_out")}
    op = helpers.outputs(metric, K, implementation)
    first, second = helpers.quick_jit(
        lambda x, ct, v: (helpers.first(metric, op, x, ct), helpers.second(metric, op, x, ct, v))
    )(x, ct, v)
    want = helpers.oracle_first(metric, x, np.asarray(got.idxs), ct)
    for name in first:
        helpers.assert_close(first[name], want[name], 1e-4, name)
    want = helpers.oracle_second(metric, x, np.asarray(got.idxs), ct, v)
    for name in second:
        helpers.assert_close(second[name], want[name], 2e-4, f"second order, {name}")


# ---- Integers


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.thorough_if(implementation="xla")
def test_indices_of_every_dtype(xp, implementation, rng):
    """Each dtype with its smallest and largest values: out of range means no neighbour."""
    Q, P, K = 4, 300, 5
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, 2))
    op = helpers.quick_jit(lambda idxs: jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation))
    for dtype in INTEGERS:
        info = np.iinfo(dtype)
        special = [0, 1, P - 1, P, info.min, info.max, info.max - 1, -1, 2**32, 2**32 + 1, 2**63 + 5, -(2**31)]
        special = [n for n in special if info.min <= n <= info.max]
        values = [int(n) for n in rng.integers(0, min(info.max, P - 1), Q * K - len(special))] + special
        idxs = np.array(values, dtype).reshape(Q, K)
        want = np.array([n if 0 <= n < P else -1 for n in values]).reshape(Q, K)
        given = jka.knn_aggregate_aniso_precomputed(*x, xp.asarray(idxs), implementation=implementation)
        np.testing.assert_array_equal(given.idxs, want, err_msg=f"{np.dtype(dtype)}")
        assert given.idxs.dtype == jnp.int32
        np.testing.assert_array_equal(given.dists == np.inf, want == -1, err_msg=f"{np.dtype(dtype)}")
        if xp is jnp:
            np.testing.assert_array_equal(op(xp.asarray(idxs)).idxs, want, err_msg=f"{np.dtype(dtype)} under jit")


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda d: np.dtype(d).name)
def test_tables_and_lengths_of_every_dtype(dtype, rng):
    P, K = 6, 3
    x = helpers.cloud(rng, "aniso", 5, P, 2, batch=(3,))
    info = np.iinfo(dtype)
    table = rng.integers(0, P, (P, K)).astype(dtype)
    table[2] = [info.min, info.max, P]
    out = jka.knn_aggregate_aniso_lookup(*x, table, K)
    nearest = helpers.oracle_search("iso", x, 1)[..., 0]
    clean = np.where((table.astype(object) >= 0) & (table.astype(object) < P), table, dtype(0)).astype(int)
    clean = np.where(table.astype(object) == clean, clean, -1)
    np.testing.assert_array_equal(out.idxs, clean[nearest])

    lengths = np.array([info.min, 2, info.max], dtype)
    for given in (lengths, jnp.asarray(lengths)):
        out = jka.knn_search(x[0], x[1], K, p_lengths=given)
        want = helpers.oracle_search("iso", x, K, [min(max(int(n), 0), P) for n in lengths])
        np.testing.assert_array_equal(out.idxs, want)


# ---- Empty arrays


@pytest.mark.parametrize("size", [((), 0, 5, 3), ((2,), 4, 5, 0), ((0,), 4, 5, 3)], ids=str)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="iso")
def test_empty(metric, size, implementation, rng):
    (batch, Q, P, F), K = size, 2
    x = helpers.tree(helpers.cloud(rng, metric, Q, P, F, batch=batch))
    ct, v = helpers.tree(helpers.cotangents(rng, metric, x, K))
    out, first, second, moved = helpers.jitted_derivatives(metric, K, implementation)(x, ct, v)
    assert out.f_out.shape == (*batch, Q, F)
    assert out.w_out.shape == out.dists.shape == out.idxs.shape == (*batch, Q, K)
    idxs = np.asarray(out.idxs)
    np.testing.assert_array_equal(idxs, helpers.oracle_search(metric, x, K))
    if idxs.size:
        want_first = helpers.oracle_first(metric, x, idxs, ct)
        want_second = helpers.oracle_second(metric, x, idxs, ct, v)
        want_moved = helpers.oracle_moving(metric, x, idxs, ct, v, helpers.turned(ct))
    else:
        want_first = {n: np.zeros(a.shape) for n, a in zip(helpers.ARGUMENTS[metric], x, strict=True)}
        want_moved = want_first
        want_second = want_first | {n: np.zeros(a.shape) for n, a in ct.items()}
    for name in first:
        helpers.assert_close(first[name], want_first[name], 1e-10, name)
    for name in second:
        helpers.assert_close(second[name], want_second[name], 1e-9, f"second order, {name}")
    for name in moved:
        helpers.assert_close(moved[name], want_moved[name], 1e-9, f"forward over reverse, {name}")


@pytest.mark.parametrize("batch, Q", [((), 0), ((0,), 4), ((2,), 0)], ids=str)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(batch=[(), (2,)])
def test_empty_other_entry_points(batch, Q, implementation, rng):
    x = helpers.cloud(rng, "aniso", Q, 5, 2, batch=batch)
    out = jka.knn_aggregate_aniso_precomputed(*x, np.zeros((*batch, Q, 3), np.int32), implementation=implementation)
    assert out.f_out.shape == (*batch, Q, 2)
    out = jka.knn_aggregate_aniso_precomputed(*x, np.zeros((*batch, Q, 0), np.int32), implementation=implementation)
    assert out.w_out.shape == (*batch, Q, 0)
    np.testing.assert_array_equal(out.f_out, 0)
    y = (*x[:3], x[3][..., :1])
    out = jka.knn_aggregate_precomputed(*y, np.zeros((*batch, Q, 3), np.int32), implementation=implementation)
    assert out.f_out.shape == (*batch, Q, 2)
    table = jka.build_knn_table(x[1], 3, implementation=implementation)
    assert table.shape == (*batch, 5, 3)
    out = jka.knn_aggregate_aniso_lookup(*x, table, 2, implementation=implementation)
    assert out.dists.shape == (*batch, Q, 2)
    assert jka.knn_search(x[0], x[1], 4, implementation=implementation).idxs.shape == (*batch, Q, 4)
