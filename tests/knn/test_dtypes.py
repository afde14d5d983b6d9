"""Accuracy per dtype: norms over whole arrays, against float64 arithmetic on the same inputs."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

SIZE = dict(Q=70, P=130, F=8)
K = 16
#: values, first, second derivatives
TOLERANCES = {np.float32: (1e-5, 1e-4, 2e-4), np.float64: (1e-12, 1e-10, 1e-9)}
KINDS = {"aniso": ("plain", "rotation", "general", "shifted", "signed"), "iso": ("plain", "shifted", "signed")}


def check(metric, x, ct, v, implementation, tolerances, what):
    out, first, second, moved = helpers.jitted_derivatives(metric, K, implementation, helpers.user_jit)(x, ct, v)
    idxs = np.asarray(out.idxs)
    values = helpers.oracle_values(metric, helpers.wide(x), idxs)
    dominant = values[2][values[1] >= 0.1 * values[1].max(-1, keepdims=True)]
    exponent = np.abs(dominant) if metric == "aniso" else np.abs(np.log(values[1][values[1] > 0.1]))
    assert exponent.max() <= 20, "the cloud is not one that the tolerances are stated for"
    for name, got, want in zip(helpers.OUTPUTS, out, values, strict=False):
        assert got.dtype == x[0].dtype, f"{name} is {got.dtype}"
        helpers.assert_close(got, want, tolerances[0], f"{what}: {name}")
    want = helpers.oracle_first(metric, x, idxs, ct)
    for name in first:
        assert first[name].dtype == x[0].dtype, f"gradient of {name} is {first[name].dtype}"
        helpers.assert_close(first[name], want[name], tolerances[1], f"{what}: first derivative, {name}")
    want = helpers.oracle_second(metric, x, idxs, ct, v)
    for name in second:
        helpers.assert_close(second[name], want[name], tolerances[2], f"{what}: second derivative, {name}")
    want = helpers.oracle_moving(metric, x, idxs, ct, v, helpers.turned(ct))
    for name in moved:
        helpers.assert_close(moved[name], want[name], tolerances[2], f"{what}: forward over reverse, {name}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(dtype=np.float64)
def test_accuracy(metric, dtype, implementation, rng):
    for kind in KINDS[metric]:
        x = helpers.cloud(rng, metric, **SIZE, dtype=dtype, kind=kind)
        ct, v = helpers.cotangents(rng, metric, x, K)
        check(metric, x, ct, v, implementation, TOLERANCES[dtype], kind)


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("metric", helpers.METRICS)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(metric="aniso", half=jnp.float16)
@pytest.mark.thorough_if(metric="iso", half=jnp.bfloat16)
def test_half_precision_features(metric, half, implementation, rng):
    """Weights and sums in float32: f_out is the rounded exact sum, however many terms; other derivatives stay exact."""
    n = 64
    x = helpers.cloud(rng, metric, 40, n, 3, dtype=np.float32)
    x = (*x[:2], np.asarray(x[2] + 2).astype(half), x[3] * np.float32(0.01), *x[4:])
    ct, v = helpers.cotangents(rng, metric, x, n)
    out, first, second, moved = helpers.jitted_derivatives(metric, n, implementation, helpers.user_jit)(x, ct, v)
    eps = float(jnp.finfo(half).eps)
    assert out.f_out.dtype == half
    assert out.w_out.dtype == out.dists.dtype == jnp.float32
    idxs = np.asarray(out.idxs)
    f_out, w_out, dists = helpers.oracle_values(metric, helpers.wide(x), idxs)
    helpers.assert_close(out.w_out, w_out, 1e-5, "w_out")
    helpers.assert_close(out.dists, dists, 1e-5, "dists")
    assert (np.abs(f_out) > 20).mean() > 0.5  # far above the terms: a half precision accumulator would stall
    error = np.abs(np.asarray(out.f_out, np.float64) - f_out)
    assert (error <= 0.51 * eps * np.abs(f_out) + 1e-3 * eps).all(), f"{(error / np.abs(f_out)).max() / eps} eps"

    want = helpers.oracle_first(metric, x, idxs, ct)
    for name, bar in first.items():
        assert bar.dtype == (half if name == "f" else jnp.float32), f"gradient of {name} is {bar.dtype}"
        helpers.assert_close(bar, want[name], 0.51 * eps if name == "f" else 1e-4, f"first derivative, {name}")
    want = helpers.oracle_second(metric, x, idxs, ct, v)
    for name, bar in second.items():
        assert bar.dtype == (half if name in ("f", "f_out") else jnp.float32), f"second, {name} is {bar.dtype}"
        # The gradient of f is half precision, and a second derivative passes through it.
        helpers.assert_close(bar, want[name], 4 * eps, f"second derivative, {name}")
    want = helpers.oracle_moving(metric, x, idxs, ct, v, helpers.turned(ct))
    for name, bar in moved.items():
        assert bar.dtype == (half if name == "f" else jnp.float32), f"forward over reverse, {name} is {bar.dtype}"
        helpers.assert_close(bar, want[name], eps if name == "f" else 2e-4, f"forward over reverse, {name}")


@pytest.mark.thorough_if(implementation="xla")
def test_every_finite_half_is_read_and_written_exactly(implementation):
    """Subnormals too, although XLA's threads read subnormal floats as 0."""
    f = np.arange(2**16, dtype=np.uint16).view(np.float16)
    f = f[np.isfinite(f)].reshape(-1, 64)
    zeros = np.zeros((len(f), 3), np.float32)
    x = (zeros, zeros, f, zeros, np.zeros((len(f), 3, 3), np.float32))  # weights are 1
    own = np.arange(len(f), dtype=np.int32)[:, None]
    out = jka.knn_aggregate_aniso_precomputed(*helpers.tree(x), own, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(out.f_out), f)


@pytest.mark.thorough_if(implementation="xla")
def test_half_precision_features_elsewhere(implementation, rng):
    x = helpers.cloud(rng, "aniso", 6, 9, 3, dtype=np.float32)
    x = (*x[:2], x[2].astype(jnp.bfloat16), *x[3:])
    idxs = helpers.oracle_search("aniso", x, 4)
    want = helpers.oracle_values("aniso", helpers.wide(x), idxs)[0]
    table = jka.build_knn_table(x[1], 4, implementation=implementation)
    for out in (
        jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation),
        jka.knn_aggregate_aniso(*x, 4, implementation=implementation),
    ):
        assert out.f_out.dtype == jnp.bfloat16
        helpers.assert_close(out.f_out, want, 2**-8, "f_out")
    assert jka.knn_aggregate_aniso_lookup(*x, table, 4, implementation=implementation).f_out.dtype == jnp.bfloat16
    loss = helpers.eikonal(lambda *x: [a.astype(jnp.float32) for a in helpers.outputs("aniso", 4, implementation)(*x)])
    bars = helpers.quick_jit(jax.grad(loss, range(5)))(*x)
    assert [b.dtype for b in bars] == [a.dtype for a in x]
    plain = helpers.eikonal(helpers.formula("aniso", idxs))
    want = helpers.oracle_jit(jax.grad(plain, range(5)))(*helpers.wide(x))
    for name, bar, w in zip(helpers.ARGUMENTS["aniso"], bars, want, strict=True):
        helpers.assert_close(bar, w, 0.05, f"Eikonal, {name}")  # a wrong or missing term is far larger
