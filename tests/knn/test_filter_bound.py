"""The error bound by which tensor cores rule points out (csrc/knn/search/cuda_filter.cu), on a NumPy model of them.

A bound that is too small loses neighbours where no other test may look: once in millions of queries.
"""

import numpy as np
import pytest

from jax_knn_aggregate.core import ffi

f16, f32, f64 = np.float16, np.float32, np.float64


def halves(x):
    """x as the sum of two halves, each rounded from float32 as the kernel does."""
    high = x.astype(f32).astype(f16)
    return high, (x - high.astype(f64)).astype(f32).astype(f16)


def rounded_up(x):
    y = x.astype(f16)
    return np.where(y.astype(f64) < x, np.nextafter(y, f16(np.inf)), y).astype(f64)


def truncated(x, exponent):
    """Towards zero, to 24 bits below 2^(exponent + 1)."""
    step = np.ldexp(1.0, exponent - 23)
    return np.trunc(x / step) * step


def exponent(x):
    return np.frexp(x)[1] - 1


def added_one_by_one(sum_, terms):
    for t in range(terms.shape[-1]):
        sum_ = sum_ + terms[..., t]
        sum_ = truncated(sum_, exponent(sum_))
    return sum_


def added_together(sum_, terms):
    """All aligned with the largest and truncated there."""
    terms = np.concatenate([sum_[..., None], terms], -1)
    total = truncated(terms, exponent(np.abs(terms).max(-1))[..., None]).sum(-1)
    return truncated(total, exponent(total))


def form(p, sigma, R):
    """Of each point: the coefficients of dᵀMd in the nine monomials of q, the constant, and the metric's magnitude."""
    M = np.einsum("pi,pia,pib->pab", sigma, R, R)
    Mp = np.einsum("pab,pb->pa", M, p)
    of_q = [*(-2 * Mp.T), M[:, 0, 0], M[:, 1, 1], M[:, 2, 2], 2 * M[:, 0, 1], 2 * M[:, 0, 2], 2 * M[:, 1, 2]]
    return np.stack(of_q, -1), (p * Mp).sum(-1), (np.abs(sigma) * np.abs(R).sum(-1) ** 2).sum(-1)


def filtered(q, p, sigma, R, add):
    """(Q, P): the product of tensor cores, and its error bound, in units of the distance."""
    low, high = p.min(0), p.max(0)
    centre = (low / 2 + high / 2).astype(f32)
    log_size = exponent(max((high.astype(f64) - centre).max(), (centre - low.astype(f64)).max())) + 1
    coefficients, constant, magnitude = form((p.astype(f64) - centre) / 2.0**log_size, sigma.astype(f64), R.astype(f64))
    unit = 2.0 ** (exponent(magnitude.astype(f32).max()) + 1 - 7)
    at = np.ldexp((q - centre).astype(f32), -log_size)
    reach = np.abs(at).max(-1)
    monomials = np.stack([*at.T, *(at * at).T, at[:, 0] * at[:, 1], at[:, 0] * at[:, 2], at[:, 1] * at[:, 2]], -1)

    a, b = np.zeros((len(q), 32), f16), np.zeros((len(p), 32), f16)
    b_high, b_low = halves(coefficients / unit)
    a_high, a_low = halves(monomials.astype(f64))
    for i, (x, y) in enumerate(((a_high, b_high), (a_high, b_low), (a_low, b_high))):
        a[:, i:27:3], b[:, i:27:3] = x, y
    a[:, 27:29], (b[:, 27], b[:, 28]) = 1, halves(constant / unit)
    products = a[:, None].astype(f64) * b[None].astype(f64)
    total = np.zeros(products.shape[:2])
    for half in (products[..., :16], products[..., 16:]):
        total = add(total, half)

    relative, absolute = ffi.filter_error()
    bound = rounded_up(((1 + reach) * (1 + reach)).astype(f64))[:, None] * rounded_up(
        relative * magnitude / unit + absolute
    )
    return total * unit * 4.0**log_size, bound * unit * 4.0**log_size


def distances(q, p, sigma, R):
    """In float32, each product that is added rounded together with its sum, as the kernels do."""

    def fma(a, b, c):
        return (a.astype(f64) * b.astype(f64) + c.astype(f64)).astype(f32)

    d = q[:, None] - p[None]
    dist = np.zeros(d.shape[:2], f32)
    for i in range(3):
        u = np.zeros_like(dist)
        for a in range(3):
            u = fma(R[None, :, i, a], d[..., a], u)
        dist = fma(sigma[None, :, i] * u, u, dist)
    return dist.astype(f64)


def clouds(rng, n=64):
    """q, p, sigma, R in float32: where much cancels, where nothing does, and where halves underflow."""
    rotation, general = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0], rng.normal(size=(n, 3, 3))
    p, step = rng.normal(size=(n, 3)), 10 ** rng.uniform(-4, 1.5) * rng.normal(size=(n, 3))
    ones, spread = np.ones((n, 3)), 10 ** rng.uniform(-2, 2, (n, 3))
    yield "rotations", (p + step, p, spread, rotation)
    yield "general R", (p + step, p, spread, general)
    yield "far from the centre", (100 * p + step, 100 * p, spread, rotation)
    yield "signed", (p + step, p, spread * rng.choice([-1, 1], (n, 3)), rotation)
    yield "one sign", (-np.abs(p) - np.abs(step), np.abs(p), ones, np.ones((n, 3, 3)))
    yield "small beside large", (p + step, p, 10 ** rng.uniform(-9, 2, (n, 1)) * ones, general)


@pytest.mark.parametrize("add", [added_one_by_one, added_together])
def test_the_bound_holds(add, rng):
    largest = 0.0
    for _ in range(30):
        for name, x in clouds(rng):
            x = [a.astype(f32) for a in x]
            product, bound = filtered(*x, add)
            ratio = np.abs(product - distances(*x)) / bound
            assert ratio.max() <= 1, f"{name}: {ratio.max()} times the bound"
            largest = max(largest, ratio.max())
    assert largest > 1 / 64, "the model has hardly an error: it does not test the bound"
