"""Values of every entry point, against the float64 oracle."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

# (batch, Q, P, F, K)
SIZES = [
    ((), 5, 7, 3, 5),
    ((2,), 70, 130, 8, 16),
    ((1,), 1, 300, 64, 33),
    ((), 70, 64, 33, 2),
    ((3,), 5, 1, 1, 1),
    ((), 9, 400, 130, 256),
]
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}


def check(metric, out, x, idxs, tolerance, what=""):
    """``out`` against the oracle for the neighbours that it names."""
    assert isinstance(out, jka.KnnAggregate)
    assert out._fields == ("f_out", "w_out", "dists", "idxs")
    assert out.idxs.dtype == jnp.int32
    np.testing.assert_array_equal(out.idxs, idxs, err_msg=f"{what}: idxs")
    for name, want in zip(helpers.OUTPUTS, helpers.oracle_values(metric, helpers.wide(x), idxs), strict=True):
        got = getattr(out, name)
        assert got.dtype == x[2 if name == "f_out" else 0].dtype, f"{what}: {name} is {got.dtype}"
        helpers.assert_close(got, want, tolerance, f"{what}: {name}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla", dtype=np.float32)
@pytest.mark.thorough_if(implementation="xla", size=[SIZES[0], *SIZES[2:]])
@pytest.mark.thorough_if(dtype=np.float64, size=SIZES[2:])
def test_aggregate(metric, size, dtype, implementation, rng):
    batch, Q, P, F, K = size
    for kind in ("plain", "signed"):
        x = helpers.cloud(rng, metric, Q, P, F, batch=batch, dtype=dtype, kind=kind)
        out = helpers.jitted(metric, K, implementation)(x)
        want = helpers.oracle_search(metric, x, K)
        idxs = np.asarray(out.idxs)
        for b in range(batch[0]) if batch else [...]:
            helpers.assert_neighbours(metric, [a[b] for a in x], idxs[b], want[b], kind)
        check(metric, out, x, idxs, TOLERANCE[dtype], kind)


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_eager_numpy_and_keywords(metric, implementation, rng):
    x = helpers.cloud(rng, metric, 5, 7, 3)
    idxs = helpers.oracle_search(metric, x, 4)
    names = (*helpers.ARGUMENTS[metric], "K")
    op = jka.knn_aggregate_aniso if metric == "aniso" else jka.knn_aggregate
    eager = op(**dict(zip(names, (*x, 4), strict=True)), implementation=implementation)
    check(metric, eager, x, idxs, 1e-12)
    assert all(isinstance(a, jax.Array) for a in eager)
    check(metric, op(*helpers.tree(x), np.int64(4), implementation=implementation), x, idxs, 1e-12)


def test_no_implementation_given_is_as_good(rng):
    """implementation=None: what users get, on whichever path."""
    x = helpers.cloud(rng, "aniso", 5, 7, 3)
    idxs = helpers.oracle_search("aniso", x, 4)
    check("aniso", jka.knn_aggregate_aniso(*x, 4), x, idxs, 1e-12)
    check("aniso", jka.knn_aggregate_aniso_precomputed(*x, idxs), x, idxs, 1e-12)
    y = (*x[:3], x[3][:, :1])
    check("iso", jka.knn_aggregate_precomputed(*y, idxs), y, idxs, 1e-12)
    np.testing.assert_array_equal(jka.knn_search_aniso(x[0], x[1], x[3], x[4], 4).idxs, idxs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_precomputed(metric, batch, dtype, implementation, rng):
    Q, P, F, K = 20, 30, 5, 6
    x = helpers.cloud(rng, metric, Q, P, F, batch=batch, dtype=dtype)
    idxs = rng.integers(-1, P, (*batch, Q, K))  # some rows name a point twice, some slots are empty
    idxs[..., 0, :] = 3
    idxs[..., 1, :] = -1
    out = helpers.precomputed(metric, x, idxs, implementation=implementation)
    check(metric, out, x, idxs, TOLERANCE[dtype])
    np.testing.assert_array_equal(out.f_out[..., 1, :], 0)
    # More slots than points.
    wide = rng.integers(0, P, (*batch, Q, P + 5))
    out = helpers.precomputed(metric, x, wide, implementation=implementation)
    check(metric, out, x, wide, TOLERANCE[dtype], "K > P")


@pytest.mark.parametrize("shared", [False, True], ids=["own table", "shared table"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.thorough_if(implementation="xla")
def test_lookup(batch, shared, implementation, rng):
    Q, P, F, K, width = 30, 40, 5, 6, 9
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=batch)
    table = rng.integers(-1, P, ((P, width) if shared else (*batch, P, width)))
    out = jka.knn_aggregate_aniso_lookup(*x, table, K, implementation=implementation)

    def rows(nearest):
        if not batch:
            return table[nearest]
        return np.stack([(table if shared else table[b])[nearest[b]] for b in range(batch[0])])

    want = rows(helpers.oracle_search("iso", x, 1)[..., 0])
    check("aniso", out, x, want[..., :K], 1e-12)

    # Points from the length on do not exist: neither as the nearest point nor in its row.
    lengths = np.array([P, 11][: batch[0]]) if batch else np.int32(11)
    out = jka.knn_aggregate_aniso_lookup(*x, table, K, p_lengths=lengths, implementation=implementation)
    want = rows(helpers.oracle_search("iso", x, 1, lengths)[..., 0])
    want = np.where(want < np.reshape(lengths, (*batch, 1, 1)), want, -1)
    check("aniso", out, x, want[..., :K], 1e-12, "with lengths")


@pytest.mark.thorough_if(implementation="xla")
def test_lookup_with_a_table_of_its_own_points(implementation, rng):
    """The intended use: with all points in the table, the answer holds the same neighbours as the search."""
    x = helpers.cloud(rng, "aniso", 20, 12, 4)
    table = jka.build_knn_table(x[1], 12, implementation=implementation)
    looked_up = jka.knn_aggregate_aniso_lookup(*x, table, 12, implementation=implementation)
    searched = jka.knn_aggregate_aniso(*x, 12, implementation=implementation)
    np.testing.assert_array_equal(np.sort(looked_up.idxs), np.sort(searched.idxs))
    helpers.assert_close(looked_up.f_out, searched.f_out, 1e-12, "f_out")


@pytest.mark.thorough_if()
def test_implementations_agree(kernels, rng):
    for metric in helpers.METRICS:
        for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
            x = helpers.cloud(rng, metric, 70, 300, 8, batch=(2,), dtype=dtype)
            want = helpers.jitted(metric, 16, "xla")(x)
            for implementation in ("ffi", None):
                got = helpers.jitted(metric, 16, implementation)(x)
                same = np.asarray(got.idxs) == np.asarray(want.idxs)
                assert same.mean() > 0.99, f"{metric}: {1 - same.mean():.1%} of the neighbours differ"
                for name in ("w_out", "dists"):
                    a, b = (np.where(same, getattr(o, name), 0) for o in (got, want))
                    helpers.assert_close(a, b, tolerance, f"{metric}, {name}")


@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
def test_no_overflow_on_the_way_to_a_finite_distance(metric, implementation):
    """Displacements whose squares overflow float32 while sigma brings the distance back, and the other way round."""
    big, small = np.float32(1e25), np.float32(1e-25)
    q = np.zeros((1, 3), np.float32)
    p = np.array([[big, 0, 0], [0, 2 * big, 0], [0, 0, small]], np.float32)
    f = np.eye(3, dtype=np.float32)
    R = np.broadcast_to(np.eye(3, dtype=np.float32), (3, 3, 3))
    sigma = np.full((3, 3), 1e-37, np.float32)
    sigma[2] = 1e37
    if metric == "iso":  # d² overflows and that is the distance: +inf, weight 0, in order of index
        out = jka.knn_aggregate(q, p, f, sigma[:, :1], 3, implementation=implementation)
        np.testing.assert_array_equal(out.idxs, [[2, 0, 1]])
        np.testing.assert_array_equal(out.dists[0, 1:], np.inf)
        np.testing.assert_array_equal(out.w_out[0, 1:], 0)
        return
    out = jka.knn_aggregate_aniso(q, p, f, sigma, R, 3, implementation=implementation)
    np.testing.assert_array_equal(out.idxs, [[2, 0, 1]])
    want = helpers.oracle_values("aniso", helpers.wide((q, p, f, sigma, R)), np.array([[2, 0, 1]]))
    helpers.assert_close(out.dists, want[2], 1e-5, "dists")
    helpers.assert_close(out.f_out, want[0], 1e-5, "f_out")
