"""The oracles themselves: the JAX one against complex steps and differences of the NumPy one."""

import helpers
import numpy as np
import pytest


@pytest.mark.parametrize("metric", helpers.METRICS)
def test_derivatives_of_the_oracle(metric, rng):
    Q, P, F, K = 4, 6, 2, 3
    x = helpers.cloud(rng, metric, Q, P, F)
    idxs = rng.integers(0, P, (Q, K))
    idxs[0, 1] = -1
    ct, v = helpers.cotangents(rng, metric, x, K)

    def scalar(x):  # ⟨ct, outputs⟩
        y = helpers.oracle_values(metric, x, idxs)
        return sum((ct[n] * np.where(np.isfinite(a), a, 0)).sum() for n, a in zip(helpers.OUTPUTS, y, strict=True))

    first = helpers.oracle_first(metric, x, idxs, ct)
    second = helpers.oracle_second(metric, x, idxs, ct, v)
    for i, name in enumerate(helpers.ARGUMENTS[metric]):
        direction = rng.normal(size=x[i].shape)
        moved = [a + (1e-30j * direction if j == i else 0) for j, a in enumerate(x)]
        np.testing.assert_allclose(
            (first[name] * direction).sum(), scalar(moved).imag / 1e-30, rtol=1e-10, err_msg=name
        )

        h = 1e-5
        ends = []
        for sign in (1, -1):
            z = [a + (sign * h * direction if j == i else 0) for j, a in enumerate(x)]
            bars = helpers.oracle_first(metric, z, idxs, ct)
            ends.append(sum((bars[n] * v[n]).sum() for n in bars))
        np.testing.assert_allclose(
            (second[name] * direction).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-5, err_msg=name
        )
    for name in helpers.OUTPUTS:  # linear in ct
        direction = rng.normal(size=ct[name].shape)
        bars = helpers.oracle_first(metric, x, idxs, {name: direction})
        want = sum((bars[n] * v[n]).sum() for n in bars)
        np.testing.assert_allclose((second[name] * direction).sum(), want, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("metric", helpers.METRICS)
def test_oracle_search_against_sorted_lists(metric, rng):
    Q, P, K = 5, 9, 9
    x = helpers.integer_cloud(rng, metric, Q, P, 1)
    x[1][3] = np.nan
    dists = helpers.pair_distances(metric, x)
    want = []
    for row in dists:
        order = sorted(range(P), key=lambda j: (j >= 7, bool(np.isnan(row[j])), 0 if np.isnan(row[j]) else row[j], j))
        want.append([j if j < 7 else -1 for j in order])
    np.testing.assert_array_equal(helpers.oracle_search(metric, x, K, 7), want)
