"""Searches through an index, and with guesses: exactly what comparing all pairs gives, whatever the cloud."""

import dataclasses
import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

PARAMETERS = {"aniso": ("sigma", "R"), "iso": ()}


def rotations(rng, n):
    return np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]


def clouds(rng, P):
    """p, sigma, R (float64) by name; each a way for bounds to go wrong."""
    spacing = P ** (-1 / 3)
    sigma = lambda h=spacing: (0.3 + 2 * rng.random((P, 3))) / (2 * h) ** 2  # noqa: E731
    R = rotations(rng, P)
    uniform = rng.random((P, 3))
    centres = rng.random((P // 50 + 1, 3))
    clustered = centres[rng.integers(0, len(centres), P)] + 1e-3 * rng.normal(size=(P, 3))
    coplanar, collinear = uniform.copy(), uniform.copy()
    coplanar[:, 2] = 0.25
    collinear[:, 1:] = 0.5
    copies = uniform[rng.integers(0, max(1, P // 20), P)]
    grid = np.round(uniform * 8) / 8
    flat = sigma() * np.array([1e4, 1.0, 1.0])
    indefinite = sigma()
    indefinite[: min(5, P)] *= [-1, 1, 1]
    mixed = 10 ** rng.uniform(-3, 0, (P, 1))
    singular = R.copy()
    singular[::3, 2] = singular[::3, 0]
    zero = sigma()
    zero[::4, 1] = 0
    broken = uniform.copy()
    broken[:3] = [[np.nan, 0, 0], [np.inf, 0, 0], [0, -np.inf, 0]]
    negative = sigma()
    negative[:6] *= -1
    negative[3, 0], negative[4, 1] = -np.inf, np.nan
    straight = R.copy()
    straight[5] = np.diag([np.inf, 1, 1])
    return {
        "uniform": (uniform, sigma(), R),
        "clustered": (clustered, sigma(1e-3), R),
        "coplanar": (coplanar, sigma(), R),
        "collinear": (collinear, sigma(), R),
        "copies": (copies, np.full((P, 3), 2.0), np.broadcast_to(np.eye(3), (P, 3, 3)).copy()),
        "grid": (grid, np.full((P, 3), 1.0), np.broadcast_to(np.eye(3), (P, 3, 3)).copy()),
        "all equal": (np.full((P, 3), 0.5), np.full((P, 3), 1.0), np.broadcast_to(np.eye(3), (P, 3, 3)).copy()),
        "anisotropy 1e4": (uniform, flat, R),
        "partly indefinite": (uniform, indefinite, R),
        "mixed scales": (uniform * mixed, sigma() / mixed**2, R),
        "general R": (uniform, rng.random((P, 3)), rng.random((P, 3, 3))),
        "singular R": (uniform, sigma(), singular),
        "zero sigma": (uniform, zero, R),
        "far away": (uniform + 1e3, sigma(), R),
        "huge": (uniform * 1e18, sigma(), R),
        "tiny": (uniform * 1e-18, sigma(), R),
        "not finite": (broken, sigma(), R),
        "not finite, negative": (broken, negative, straight),
    }


@functools.cache
def searches(metric, K):
    """By name: all pairs in pure JAX, and through kernels in every way; idxs of q, p, parameters, lengths, guesses."""

    def plain(implementation, q, p, m, n, warm):
        return helpers.search(metric, (q, p, None, *m), K, p_lengths=n, implementation=implementation).idxs

    def with_index(warmed, builder, q, p, m, n, warm):
        index = jka.build_index(p, *(m if metric == "aniso" else ()), p_lengths=n, implementation=builder)
        options = {"p_lengths": n, "index": index} | ({"warm_idxs": warm} if warmed else {})
        return helpers.search(metric, (q, p, None, *m), K, **options).idxs

    def warmed(q, p, m, n, warm):
        return helpers.search(metric, (q, p, None, *m), K, p_lengths=n, warm_idxs=warm).idxs

    ways = {
        "reference": functools.partial(plain, "xla"),
        "by itself": functools.partial(plain, None),
        "index": functools.partial(with_index, False, None),
        "index, guesses": functools.partial(with_index, True, None),
        "the reference's index": functools.partial(with_index, False, "xla"),
        "guesses": warmed,
    }
    return {name: jax.jit(way) for name, way in ways.items()}


def computed_distances(metric, q, p, m, idxs):
    """In the dtype of the inputs, as the package returns them."""
    x = (q, p, jnp.zeros((len(p), 0), p.dtype), *(m if metric == "aniso" else (jnp.zeros((len(p), 3), p.dtype), None)))
    if metric == "iso":
        d = q[:, None] - p[idxs]
        return (d * d).sum(-1)
    return np.asarray(jka.knn_aggregate_aniso_precomputed(*x, idxs).dists)


def assert_same(metric, q, p, m, got, want, what):
    """The same neighbours, but for pairs whose distances implementations round to either side of each other."""
    got, want = np.asarray(got), np.asarray(want)
    if (got == want).all():
        return
    rows = (got != want).any(-1)
    assert ((got < 0) == (want < 0)).all(), what
    q = np.asarray(q)[rows]
    a, b = (np.asarray(computed_distances(metric, q, p, m, jnp.asarray(i[rows]))) for i in (got, want))
    scale = np.abs(b).max(-1, keepdims=True, where=np.isfinite(b), initial=0)
    tolerance = 64 * np.finfo(a.dtype).eps
    with np.errstate(invalid="ignore"):  # two infinities of the same sign are equal
        close = np.isclose(a, b, rtol=tolerance, atol=0) | (np.abs(a - b) <= tolerance * scale) | (a == b)
    assert (close | (np.isnan(a) & np.isnan(b))).all(), f"{what}: {got[rows][0]} against {want[rows][0]}"
    assert rows.mean() < 0.3, f"{what}: {rows.mean():.0%} of the rows differ"


# Few points and many neighbours: no more than K exist, or hardly more than the groups by which tensor cores search.
@pytest.mark.parametrize("P, K", [(3000, 16), (3000, 48), (64, 64), (131, 33), (300, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(dtype=np.float64)
@pytest.mark.thorough_if(metric="aniso", K=48)
@pytest.mark.thorough_if(P=[64, 300])
@pytest.mark.thorough_if(metric="iso", K=[16, 33])
def test_every_cloud(metric, dtype, P, K, kernels, rng):
    """Kernels in every way give bit for bit the same neighbours, and those of the reference but for rounding."""
    Q = 200
    length = jnp.int32(P - P // 30)
    for name, (p, sigma, R) in clouds(rng, P).items():
        centre, size = (0.0, 1.0) if name.startswith("not finite") else (p.mean(0), np.abs(p - p.mean(0)).max() or 1.0)
        q = np.concatenate([p[rng.integers(0, P, Q // 2)], centre + size * rng.normal(size=(Q // 2, 3))])
        p, q, sigma, R = (jnp.asarray(a, dtype) for a in (p, q, sigma, R))
        m = (sigma, R) if metric == "aniso" else (sigma[:, :1],)
        found = {}
        warm = jnp.zeros((Q, K), jnp.int32)
        for way, search in searches(metric, K).items():
            found[way] = np.asarray(search(q, p, m, length, warm))
            if way == "by itself":
                guesses = np.where(rng.random((Q, K)) < 0.8, found[way], rng.integers(-9, P + 9, (Q, K)))
                warm = jnp.asarray(guesses, jnp.int32)
        for way in ("index", "index, guesses", "the reference's index", "guesses"):
            np.testing.assert_array_equal(found[way], found["by itself"], err_msg=f"{name}, {way}")
        if name in ("huge", "tiny", "far away", "anisotropy 1e4", "singular R"):
            continue  # rounding there decides more than a few rows; the kernels' own brute force is compared below
        assert_same(metric, q, p, m, found["by itself"], found["reference"], f"{name}")


@pytest.mark.parametrize("P", [1, 31, 32, 33, 1024, 1025, 40_000])
@pytest.mark.thorough_if(P=[31, 1024, 40_000])
def test_every_size(P, kernels, rng):
    """Leaves and groups that are full, or by one not; and a cloud large enough for an index of its own."""
    Q = 60 if P < 10_000 else 7000
    K = min(P, 9)
    p, q = (jnp.asarray(rng.random((n, 3)), jnp.float32) for n in (P, Q))
    sigma = jnp.asarray((0.3 + 2 * rng.random((P, 3))) * P ** (2 / 3), jnp.float32)
    R = jnp.asarray(rotations(rng, P), jnp.float32)
    index = jka.build_index(p, sigma, R)
    got = jka.knn_search_aniso(q, p, sigma, R, K, index=index).idxs
    by_itself = jka.knn_search_aniso(q, p, sigma, R, K).idxs
    np.testing.assert_array_equal(got, by_itself)
    some = np.arange(0, Q, max(1, Q // 60))
    want = helpers.oracle_search("aniso", [np.asarray(a) for a in (q[some], p, p, sigma, R)], K)
    helpers.assert_neighbours("aniso", [q[some], p, p[:, :0], sigma, R], got[some], want)


@pytest.mark.parametrize("K", [1, 2, 17, 32, 33, 64, 65, 100, 256, 300])
@pytest.mark.thorough_if(K=[2, 17, 32, 64, 65, 100, 300])
def test_every_K(K, kernels, rng):
    Q, P = 40, 2000
    p, q = (jnp.asarray(rng.random((n, 3)), jnp.float32) for n in (P, Q))
    index = jka.build_index(p)
    want = jka.knn_search(q, p, K, implementation="xla").idxs
    warm = jnp.asarray(np.roll(want, 1, 0))
    for options in ({}, {"index": index}, {"index": index, "warm_idxs": warm}, {"warm_idxs": warm}):
        got = jka.knn_search(q, p, K, **options).idxs
        assert_same("iso", q, p, (), got, want, f"{sorted(options)}")


@pytest.mark.thorough_if(implementation="xla")
def test_batches_and_vmap(implementation, rng):
    B, Q, P, K = 3, 40, 500, 8
    x = [jnp.asarray(a) for a in helpers.cloud(rng, "aniso", Q, P, 2, batch=(B,), dtype=np.float32)]
    lengths = jnp.asarray([P, 37, 5])
    options = {"implementation": implementation}
    want = jka.knn_aggregate_aniso(*x, K, p_lengths=lengths, **options)
    build = functools.partial(jka.build_index, **options)
    index = build(x[1], x[3], x[4], p_lengths=lengths)
    got = jka.knn_aggregate_aniso(*x, K, p_lengths=lengths, index=index, warm_idxs=want.idxs, **options)
    np.testing.assert_array_equal(got.idxs, want.idxs)

    def one(q, p, f, sigma, R, n):
        index = build(p, sigma, R, p_lengths=n)
        return jka.knn_aggregate_aniso(q, p, f, sigma, R, K, p_lengths=n, index=index, **options).idxs

    np.testing.assert_array_equal(jax.vmap(one)(*x, lengths), want.idxs)
    # One cloud, and one index of it, for all scenes.
    q, (p, _, sigma, R) = x[0], (a[0] for a in x[1:])
    shared = jax.vmap(lambda q, index: jka.knn_search_aniso(q, p, sigma, R, K, index=index, **options).idxs, (0, None))
    want = [jka.knn_search_aniso(a, p, sigma, R, K, **options).idxs for a in q]
    np.testing.assert_array_equal(shared(q, build(p, sigma, R)), want)


@pytest.mark.thorough_if(implementation="xla")
def test_many_clouds(implementation, rng):
    """More than a sort key has bits for beside a place on the curve."""
    B, Q, P, K = 1025, 2, 40, 5
    q, p = (jnp.asarray(rng.random((B, n, 3)), jnp.float32) for n in (Q, P))
    lengths = jnp.asarray(rng.integers(0, P + 1, B), jnp.int32)
    index = jka.build_index(p, p_lengths=lengths, implementation=implementation)
    got = jka.knn_search(q, p, K, p_lengths=lengths, index=index, implementation=implementation).idxs
    reference = helpers.user_jit(lambda q, p, n: jka.knn_search(q, p, K, p_lengths=n, implementation="xla").idxs)
    np.testing.assert_array_equal(got, reference(q, p, lengths))


@pytest.mark.parametrize("P", [7, 3000])
@pytest.mark.thorough_if(implementation="xla")
def test_an_index_of_a_longer_cloud(P, implementation, rng):
    """Points that only the index knows to exist are not found."""
    q, p, _, sigma, R = (jnp.asarray(a) for a in helpers.cloud(rng, "aniso", 50, P, 0, dtype=np.float32))
    index = jka.build_index(p, sigma, R, implementation=implementation)
    for length in (0, 5, P - 2):
        options = {"p_lengths": length, "implementation": implementation}
        got = jka.knn_search_aniso(q, p, sigma, R, 7, index=index, **options).idxs
        np.testing.assert_array_equal(got, jka.knn_search_aniso(q, p, sigma, R, 7, **options).idxs)


@pytest.mark.thorough_if(implementation="xla")
def test_an_index_has_no_nan_of_its_own(implementation, rng):
    """Its empty places would stop a program under jax_debug_nans."""
    p, _, _, sigma, R = (jnp.asarray(a) for a in helpers.cloud(rng, "aniso", 33, 33, 0, dtype=np.float32))
    with jax.debug_nans(True):
        jka.build_index(p, p_lengths=20, implementation=implementation)
        jka.build_index(p, sigma, R, implementation=implementation)


@pytest.mark.thorough_if(implementation="xla")
def test_entry_points_take_an_index(implementation, rng):
    q, p, f, sigma, R = (jnp.asarray(a) for a in helpers.cloud(rng, "aniso", 20, 90, 3, dtype=np.float32))
    options = {"implementation": implementation}
    iso, aniso = jka.build_index(p, **options), jka.build_index(p, sigma, R, **options)
    table = jka.build_knn_table(p, 6, **options)
    for call, index in {
        lambda **o: jka.knn_search(q, p, 6, **o).idxs: iso,
        lambda **o: jka.knn_search_aniso(q, p, sigma, R, 6, **o).idxs: aniso,
        lambda **o: jka.knn_aggregate(q, p, f, sigma[:, :1], 6, **o).idxs: iso,
        lambda **o: jka.knn_aggregate_aniso(q, p, f, sigma, R, 6, **o).idxs: aniso,
        lambda **o: jka.knn_aggregate_aniso_lookup(q, p, f, sigma, R, table, 6, **o).idxs: iso,
        lambda **o: jka.build_knn_table(p, 6, **o): iso,
    }.items():
        np.testing.assert_array_equal(call(index=index, **options), call(**options))


def test_searches_of_one_cloud_share_its_index(kernels, rng):
    """In one program, that of two searches is built once: XLA merges equal calls."""
    P = 40_000
    p, *q = (jnp.asarray(rng.random((n, 3)), jnp.float32) for n in (P, 9000, 8000))

    def both(p, q, r):
        return jka.knn_search(q, p, 4).idxs, jka.knn_search(r, p, 7).idxs

    compiled = jax.jit(both).lower(p, *q).compile()
    builds = re.findall(r'custom_call_target="jax_knn_aggregate\.iso_index"', compiled.as_text())
    assert len(builds) == 1
    for got, x, K in zip(compiled(p, *q), q, (4, 7), strict=True):
        np.testing.assert_array_equal(got, jka.knn_search(x, p, K).idxs)


@pytest.mark.thorough_if(implementation="xla")
def test_no_tangent_flows_through_an_index(implementation, rng):
    x = tuple(jnp.asarray(a) for a in helpers.cloud(rng, "aniso", 10, 40, 3))

    def total(x, indexed):
        index = jka.build_index(x[1], x[3], x[4], implementation=implementation) if indexed else None
        out = jka.knn_aggregate_aniso(*x, 4, index=index, implementation=implementation)
        return out.f_out.sum() + out.dists.sum()

    got, want = (jax.jit(jax.grad(functools.partial(total, indexed=i)))(x) for i in (True, False))
    for a, b in zip(got, want, strict=True):
        helpers.assert_close(a, b, 1e-12, "gradient")


def test_what_can_be_seen_of_a_wrong_index_raises(rng):
    q, p, _, sigma, R = (jnp.asarray(a) for a in helpers.cloud(rng, "aniso", 5, 40, 0, dtype=np.float32))
    index = jka.build_index(p, sigma, R)
    with pytest.raises(ValueError, match=r"from build_index\(p, sigma, R\), expected one from build_index\(p\)"):
        jka.knn_search(q, p, 3, index=index)
    with pytest.raises(ValueError, match=r"index was built for points of shape \(40, 3\) and dtype float32, but p has"):
        jka.knn_search_aniso(q, p[:30], sigma[:30], R[:30], 3, index=index)
    with pytest.raises(ValueError, match="dtype float64"):
        jka.knn_search_aniso(*(a.astype(np.float64) for a in (q, p, sigma, R)), 3, index=index)
    with pytest.raises(ValueError, match=r"\(1, 40, 3\)"):
        jka.knn_search_aniso(q[None], p[None], sigma[None], R[None], 3, index=index)
    halved = jax.tree.map(lambda a: a[:, :16], index)
    with pytest.raises(ValueError, match=r"index holds \['float32\[2, 15, 32\]', 'int32\[2, 16\]'.*expected"):
        jka.knn_search_aniso(q, p, sigma, R, 3, index=dataclasses.replace(index, order=halved.order))
    with pytest.raises(TypeError, match="index is a tuple, expected what build_index returns"):
        jka.knn_search_aniso(q, p, sigma, R, 3, index=(1, 2))
    with pytest.raises(ValueError, match="only one of sigma and R"):
        jka.build_index(p, sigma)
    with pytest.raises(ValueError, match=r"warm_idxs has shape \(4, 3\), expected \(5, W\)"):
        jka.knn_search_aniso(q, p, sigma, R, 3, warm_idxs=np.zeros((4, 3), int))
    with pytest.raises(TypeError, match="warm_idxs has dtype float32, expected an integer dtype"):
        jka.knn_search_aniso(q, p, sigma, R, 3, warm_idxs=np.zeros((5, 3), np.float32))


def test_stale_index_and_foreign_values(kernels, rng):
    """An index of other points gives their neighbours; guesses of any value change no result, with any index."""
    q, p, _, sigma, R = (jnp.asarray(a) for a in helpers.cloud(rng, "aniso", 30, 300, 0, dtype=np.float32))
    search = functools.partial(jka.knn_search_aniso, q, p, sigma, R, 5)
    index = jka.build_index(p[::-1], sigma[::-1], R[::-1])
    stale = search(index=index).idxs
    np.testing.assert_array_equal(stale, jka.knn_search_aniso(q, p[::-1], sigma[::-1], R[::-1], 5).idxs)
    extreme = rng.choice(np.array([-(2**63), -1, 0, 299, 300, 2**31 - 1, 2**63 - 1]), (30, 9))
    want = search().idxs
    np.testing.assert_array_equal(search(warm_idxs=extreme).idxs, want)
    for guesses in (extreme, want):  # to the points as they are now, the latter bound distances that the index has not
        np.testing.assert_array_equal(search(index=index, warm_idxs=guesses).idxs, stale)
    # All points at the queries' place now: there, guesses are at distance 0.
    shrunk = functools.partial(jka.knn_search_aniso, q, 1e-6 * p + q[:1], sigma, R, 5, index=index)
    np.testing.assert_array_equal(shrunk(warm_idxs=want).idxs, shrunk().idxs)


def garbage(rng, index):
    """Indexes that no builder made, of the shapes of ``index``."""

    def bits(a):
        return np.frombuffer(rng.bytes(a.nbytes), a.dtype).reshape(a.shape)

    def spoilt(a):
        special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0, -1], a.dtype) if a.dtype.kind == "f" else bits(a)
        return np.where(rng.random(a.shape) < 0.1, rng.choice(special.ravel(), a.shape), a)

    index = jax.tree.map(np.asarray, index)
    yield "zeros", jax.tree.map(np.zeros_like, index)
    yield "bits", jax.tree.map(bits, index)
    yield (
        "least base everywhere",
        jax.tree.map(lambda a: np.full_like(a, -1 if a.dtype.kind == "i" else -np.inf), index),
    )
    for _ in range(3):
        yield "spoilt", jax.tree.map(spoilt, index)


@pytest.mark.parametrize("P, K", [(33, 4), (1025, 40), (40_000, 4)])
@pytest.mark.parametrize("metric, dtype", [("iso", np.float32), ("aniso", np.float32), ("aniso", np.float64)])
@pytest.mark.thorough_if(dtype=np.float64)
@pytest.mark.thorough_if(P=40_000)
def test_whatever_an_index_holds(metric, dtype, P, K, kernels, rng):
    """Found are points that exist, or none; nothing outside the arrays is read (which sanitized builds see)."""
    q, p, _, *m = (jnp.asarray(a) for a in helpers.cloud(rng, metric, 500, P, 0, dtype=dtype))
    build = functools.partial(jka.build_index, p, *(m if metric == "aniso" else ()))
    length = P - 3

    @jax.jit
    def search(index, warm):
        options = {"index": index, "p_lengths": length}
        x = (q, p, None, *m)
        return helpers.search(metric, x, K, **options).idxs, helpers.search(
            metric, x, K, warm_idxs=warm, **options
        ).idxs

    warm = search(build(), jnp.zeros((500, K), jnp.int32))[0]
    for name, index in garbage(rng, build()):
        for found in map(np.asarray, search(index, warm)):
            assert found.min() >= -1 and found.max() < length, f"{name}: indices from {found.min()} to {found.max()}"


@pytest.mark.thorough_if(implementation="xla")
def test_an_index_may_be_built_later(implementation, rng):
    """A program carries zeros until the first refresh; from there on, neighbours are the cloud's."""
    q, p, *_ = (jnp.asarray(a) for a in helpers.cloud(rng, "iso", 50, 1200, 0, dtype=np.float32))
    options = {"implementation": implementation}
    build = functools.partial(jka.build_index, p, **options)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(build))

    def step(index, t):
        found = jka.knn_search(q, p, 4, index=index, **options).idxs
        return jax.lax.cond(t == 1, build, lambda: index), found

    found = np.asarray(jax.lax.scan(step, nothing, jnp.arange(4))[1])
    assert found.min() >= -1 and found.max() < 1200
    np.testing.assert_array_equal(found[2:], np.stack([jka.knn_search(q, p, 4, **options).idxs] * 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.thorough_if(dtype=np.float64)
def test_underflow(dtype, kernels, rng):
    """Where terms of distances underflow, and threads flush them, an index misses nothing that all pairs have.

    Few queries are compared with all points, many go through an index.
    """
    P, Q, K = 512, 2048, 8
    least, most = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
    search = jax.jit(lambda q, p, sigma, R: jka.knn_search_aniso(q, p, sigma, R, K).idxs)
    index = jax.jit(
        lambda q, p, sigma, R: jka.knn_search_aniso(q, p, sigma, R, K, index=jka.build_index(p, sigma, R)).idxs
    )

    def turned(a, b):
        """A rotation, or reflection, of the unit vector a to b."""
        A, B = (np.linalg.qr(np.column_stack([x, rng.normal(size=(3, 2))]))[0] for x in (a, b))
        A[:, 0], B[:, 0] = a, b
        return B @ A.T

    for turn in range(40):
        # Between two clouds, nearly as far from both: all of one's distance is along an axis of its metric, and that of
        # the other is a sum of three terms, more of which is lost. Usual precisions, tiny and huge ones.
        scale = [1.0, least * 2**20, most / 2**8, 2.0 ** rng.integers(-90, 90)][turn % 4]
        h = np.sqrt(least / scale) * 2 ** rng.uniform(-0.5, 3)
        way = rng.normal(size=3)
        way /= np.linalg.norm(way)
        other = rng.random((P, 1)) < 0.5
        p = h * (np.where(other, way, -rng.uniform(0.7, 1) * way) + 1e-3 * rng.normal(size=(P, 3)))
        q = h * 1e-3 * rng.normal(size=(Q, 3))
        R = np.where(other[:, None], turned(way, np.full(3, 3**-0.5)), turned(way, np.eye(3)[0]))
        sigma = scale * rng.choice([1.0, 0.0, least], (P, 3), p=[1, 0, 0] if turn % 8 else [0.98, 0.01, 0.01])
        x = [jnp.asarray(a, dtype) for a in (q, p, sigma, R)]
        want = np.concatenate([search(x[0][i : i + 256], *x[1:]) for i in range(0, Q, 256)])
        np.testing.assert_array_equal(index(*x), want, err_msg=f"turn {turn}, scale {scale}, h {h}")
