"""The K nearest points: against the float64 oracle, and each implementation against the other."""

import math
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka
from jax_knn_aggregate.ops.knn import search

# (batch, Q, P, K): one of each, all of P, more than any tile, odd sizes.
SIZES = [
    ((), 5, 7, 7),
    ((2,), 5, 64, 2),
    ((1,), 1, 1, 1),
    ((), 70, 130, 33),
    ((3,), 70, 300, 16),
    ((), 300, 1100, 5),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla", dtype=np.float64)
@pytest.mark.thorough_if(implementation="xla", size=[SIZES[0], *SIZES[2:]])
@pytest.mark.thorough_if(dtype=np.float64, size=SIZES[2:])
def test_against_oracle(metric, size, dtype, implementation, rng):
    batch, Q, P, K = size
    kinds = ["plain", "shifted", "signed"] + (["rotation", "general"] if metric == "aniso" else [])
    for kind in kinds:
        x = helpers.cloud(rng, metric, Q, P, 0, batch=batch, dtype=dtype, kind=kind)
        dists, idxs = helpers.jitted_search(metric, K, implementation)(x)
        assert dists.dtype == dtype
        assert dists.shape == idxs.shape == (*batch, Q, K)
        want = helpers.oracle_search(metric, x, K)
        for b in range(batch[0]) if batch else [...]:
            helpers.assert_neighbours(metric, [a[b] for a in x], idxs[b], want[b], kind)
        steps = np.diff(np.asarray(dists), axis=-1)
        assert (steps >= 0).all(), f"{kind}: dists descend by {-steps.min()} at {np.argwhere(steps < 0)[0]}"


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(metric="aniso")
def test_implementations_agree(metric, kernels, rng):
    for dtype in (np.float32, np.float64):
        x = helpers.cloud(rng, metric, 70, 300, 0, dtype=dtype)
        got, want = (helpers.jitted_search(metric, 16, i)(x) for i in ("ffi", "xla"))
        helpers.assert_neighbours(metric, x, got.idxs, want.idxs)
        helpers.assert_close(got.dists, want.dists, 1e-5 if dtype == np.float32 else 1e-12, "dists")


@pytest.fixture
def ties(rng):
    """Points on spheres around the queries, as arguments of either metric."""
    q = rng.uniform(-1, 1, (8, 3))
    direction = rng.normal(size=(8, 40, 3))
    p = (q[:, None] + direction / np.linalg.norm(direction, axis=-1, keepdims=True)).reshape(-1, 3)
    n = len(p)
    R = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    return {
        "aniso": (q, p, np.zeros((n, 0)), np.full((n, 3), 1.3), R),
        "iso": (q, p, np.zeros((n, 0)), np.full((n, 1), 1.3)),
    }


def assert_ascending(out, what):
    dists, idxs = np.asarray(out.dists), np.asarray(out.idxs)
    steps = np.diff(dists, axis=-1)
    assert (steps >= 0).all(), f"{what}: dists descend by {-steps.min()}"
    ties = (steps == 0) & (np.diff(idxs, axis=-1) < 0)
    assert not ties.any(), f"{what}: equal dists not by index at {np.argwhere(ties)[0]}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_dists_ascend_where_distances_differ_by_rounding(metric, dtype, implementation, ties):
    """dists are recomputed from indices and must not disagree with the order."""
    x = tuple(a.astype(dtype) for a in ties[metric])
    assert_ascending(helpers.jitted_search(metric, 33, implementation)(x), "search")
    assert_ascending(helpers.jitted(metric, 33, implementation)(x), "aggregate")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")  # its bits are those of a user's compilation alone
def test_dists_ascend_outside_jit(metric, dtype, implementation, ties):
    x = tuple(a.astype(dtype) for a in ties[metric])
    assert_ascending(helpers.aggregate(metric, x, 33, implementation=implementation), "eager")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_search_and_aggregate_agree(metric, implementation, rng):
    x = helpers.cloud(rng, metric, 70, 130, 3, batch=(2,), dtype=np.float32)
    out = helpers.jitted(metric, 5, implementation)(x)
    found = helpers.jitted_search(metric, 5, implementation)(x)
    np.testing.assert_array_equal(out.idxs, found.idxs)
    helpers.assert_close(out.dists, found.dists, 1e-6, "dists")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_dists_of_search_are_differentiable(metric, implementation, rng):
    K = 5
    x = helpers.tree(helpers.cloud(rng, metric, 6, 20, 0))
    ct, v = helpers.tree(helpers.cotangents(rng, metric, x, K))
    ct = {"dists": ct["dists"]}

    def op(*x):
        dists, _ = helpers.search(metric, x, K, implementation=implementation)
        return jnp.zeros((6, 0)), jnp.zeros_like(dists), dists

    searched = {"aniso": ("q", "p", "sigma", "R"), "iso": ("q", "p")}[metric]
    v = {n: v[n] for n in searched}
    idxs = helpers.oracle_search(metric, x, K)
    got, second = helpers.quick_jit(
        lambda x, ct, v: (helpers.first(metric, op, x, ct, searched), helpers.second(metric, op, x, ct, v, searched))
    )(x, ct, v)
    want = helpers.oracle_first(metric, x, idxs, ct)
    for name in searched:
        helpers.assert_close(got[name], want[name], 1e-10, name)
    want = helpers.oracle_second(metric, x, idxs, ct, v)
    for name in (*searched, "dists"):
        helpers.assert_close(second[name], want[name], 1e-9, f"second order, {name}")


@pytest.mark.thorough_if(implementation="xla")
def test_knn_table(implementation, rng):
    x = helpers.integer_cloud(rng, "iso", 0, 64, 0, copies=True)
    p = x[1]
    want = helpers.oracle_search("iso", (p, p, *x[2:]), 5)
    got = jka.build_knn_table(p, 5, implementation=implementation)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)  # exact duplicates: the smaller index first

    p = rng.normal(size=(2, 30, 3))
    got = np.asarray(jka.build_knn_table(p, 4, implementation=implementation))
    assert got.shape == (2, 30, 4)
    np.testing.assert_array_equal(got[..., 0], np.broadcast_to(np.arange(30), (2, 30)), err_msg="itself first")

    lengths = np.array([30, 3])
    got = np.asarray(jka.build_knn_table(p, 4, p_lengths=lengths, implementation=implementation))
    np.testing.assert_array_equal(got[1, 3:], -1, err_msg="rows of points that do not exist")
    np.testing.assert_array_equal(got[1, :3, 3], -1, err_msg="slots of points that do not exist")
    for b in range(2):
        y = (p[b], p[b], np.zeros((30, 0)), np.zeros((30, 1)))
        n = lengths[b]
        np.testing.assert_array_equal(got[b, :n], helpers.oracle_search("iso", y, 4, n)[:n])


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(metric="aniso")
def test_reference_in_chunks(metric, rng, monkeypatch):
    x = helpers.cloud(rng, metric, 23, 30, 0, batch=(2,), dtype=np.float32)
    want = helpers.jitted_search(metric, 7, "xla")(x)
    monkeypatch.setattr(search, "_CHUNK", 5 * 30 * 2)  # 5 queries at a time, the last chunk not full
    got = helpers.user_jit(lambda x: helpers.search(metric, x, 7, implementation="xla"))(x)
    np.testing.assert_array_equal(got.idxs, want.idxs)
    monkeypatch.setattr(search, "_CHUNK", 1)  # less than a query
    got = helpers.user_jit(lambda x: helpers.search(metric, x, 7, implementation="xla"))(x)
    np.testing.assert_array_equal(got.idxs, want.idxs)


@pytest.mark.parametrize("metric", helpers.METRICS)
def test_reference_never_holds_all_distances(metric):
    Q, P, K = 200_000, 100_000, 8
    shapes = ((2, Q, 3), (2, P, 3), (2, P, 0), (2, P, 3 if metric == "aniso" else 1), (2, P, 3, 3))
    x = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes[: len(helpers.ARGUMENTS[metric])])
    text = jax.jit(lambda x: helpers.search(metric, x, K, implementation="xla")).lower(x).as_text()
    sizes = [math.prod(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)]
    assert max(sizes) <= 2 * 3 * search._CHUNK, f"an array of {max(sizes):.1e} elements; Q·P is {2 * Q * P:.1e}"
