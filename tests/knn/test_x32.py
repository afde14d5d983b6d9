"""Without jax_enable_x64, as most users run: float32 and int32 throughout, and 64-bit integers of NumPy still right."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

Q, P, F, K = 6, 9, 3, 4


@pytest.fixture(autouse=True)
def _without_x64(_strict):
    with jax.enable_x64(False):
        yield


@pytest.fixture
def x(rng):
    return helpers.cloud(rng, "aniso", Q, P, F, dtype=np.float32)


def with_x64(fn, *args):
    with jax.enable_x64(True):
        return fn(*args)


@pytest.mark.thorough_if(implementation="xla")
def test_values(x, implementation):
    idxs = helpers.oracle_search("aniso", x, K)
    want = helpers.oracle_values("aniso", helpers.wide(x), idxs)
    for given in (x, helpers.wide(x)):  # NumPy's float64 arrays become float32
        out = jka.knn_aggregate_aniso(*given, K, implementation=implementation)
        assert [a.dtype for a in out] == [jnp.float32] * 3 + [jnp.int32]
        np.testing.assert_array_equal(out.idxs, idxs)
        for name, w in zip(helpers.OUTPUTS, want, strict=True):
            helpers.assert_close(getattr(out, name), w, 1e-5, name)


@pytest.mark.thorough_if(implementation="xla")
def test_derivatives(x, implementation, rng):
    ct, v = helpers.cotangents(rng, "aniso", x, K)
    x, ct, v = helpers.tree((x, ct, v))
    op = helpers.outputs("aniso", K, implementation)
    along = tuple(v[n] for n in helpers.ARGUMENTS["aniso"])

    def every(x, ct, v, along):
        first, second = helpers.first("aniso", op, x, ct), helpers.second("aniso", op, x, ct, v)
        return first, second, jax.jvp(op, x, along)[1], jax.grad(helpers.eikonal(op), range(5))(*x)

    first, second, forward, eikonal = helpers.quick_jit(every)(x, ct, v, along)
    assert {a.dtype for a in jax.tree.leaves((first, second, forward, eikonal))} == {np.dtype(np.float32)}
    idxs = helpers.oracle_search("aniso", x, K)
    want = with_x64(helpers.oracle_first, "aniso", x, idxs, ct)
    for name in first:
        helpers.assert_close(first[name], want[name], 1e-4, name)
    want = with_x64(helpers.oracle_second, "aniso", x, idxs, ct, v)
    for name in second:
        helpers.assert_close(second[name], want[name], 2e-4, f"second order, {name}")
    plain = helpers.formula("aniso", idxs)
    wide = helpers.wide((x, along))
    want = with_x64(helpers.oracle_jit(lambda x, v: jax.jvp(plain, x, v)[1]), *wide)
    helpers.assert_trees_close(forward, want, 1e-4, "forward")
    want = with_x64(helpers.oracle_jit(jax.grad(helpers.eikonal(plain), range(5))), *helpers.wide(x))
    helpers.assert_trees_close(eikonal, want, 1e-3, "Eikonal")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64], ids=["int64", "uint64"])
@pytest.mark.thorough_if(implementation="xla")
def test_wide_integers_are_not_cut(x, dtype, implementation):
    """jnp.asarray would make 2**32 + 1 a 1, a neighbour that nobody named."""
    big = [2**32, 2**32 + 1, 2**40 + 3, 2**62, 2**63 - 1]
    idxs = np.zeros((Q, K), dtype)
    idxs.flat[: len(big)] = big
    want = np.where(idxs < P, idxs, 0).astype(int)
    want = np.where(idxs.astype(object) == want, want, -1)
    out = jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation)
    assert out.idxs.dtype == jnp.int32
    np.testing.assert_array_equal(out.idxs, want)

    table = np.resize(idxs, (P, K))
    clean = np.resize(want, (P, K))
    out = jka.knn_aggregate_aniso_lookup(*x, table, K, implementation=implementation)
    np.testing.assert_array_equal(out.idxs, clean[helpers.oracle_search("iso", x, 1)[:, 0]])

    for length in (dtype(2**32), dtype(2**33 + 2), 2**35):
        out = jka.knn_search(x[0], x[1], K, p_lengths=length, implementation=implementation)
        np.testing.assert_array_equal(out.idxs, helpers.oracle_search("iso", x, K))
    if dtype == np.int64:
        out = jka.knn_search(x[0], x[1], K, p_lengths=dtype(-(2**32) + 3), implementation=implementation)
        np.testing.assert_array_equal(out.idxs, -1)


@pytest.mark.thorough_if(implementation="xla")
def test_vmap_and_table(x, implementation):
    table = jka.build_knn_table(x[1], K, implementation=implementation)
    assert table.dtype == jnp.int32
    out = jax.vmap(lambda q: jka.knn_aggregate_aniso(q, *x[1:], K, implementation=implementation))(
        np.stack([x[0], x[0] + 1])
    )
    np.testing.assert_array_equal(out.idxs[0], helpers.oracle_search("aniso", x, K))


def test_float64_is_refused_or_cut_as_jax_does(x):
    """A float64 array cannot exist here; a mix of NumPy dtypes is float32 all the same."""
    mixed = (x[0].astype(np.float64), *x[1:])
    assert jka.knn_aggregate_aniso(*mixed, K).f_out.dtype == jnp.float32
