"""Extreme inputs, kinks, NaN, and what is refused."""

import functools

import helpers
import jax
import jax.numpy as jnp
import mlp_oracle
import numpy as np
import pytest

from jax_knn_aggregate import LeakyReLU, Sine, Softplus, Squareplus, mlp
from jax_knn_aggregate.ops.mlp import activations


def orders(activation, p, most=3):
    """The activation's value and derivatives at p, element by element, through the public function."""

    def one(p):
        return mlp(p[None, None], (jnp.ones((1, 1), p.dtype),), output_activation=activation)[0, 0]

    fns = [one]
    for _ in range(most):
        fns.append(jax.grad(fns[-1]))
    return helpers.quick_jit(lambda p: [jax.vmap(fn)(p) for fn in fns])(p)


def softplus_orders(p, beta):
    """In float64, from exp(−|beta·p|) alone, so that nothing overflows or cancels."""
    p = np.asarray(p, np.float64)
    with np.errstate(under="ignore"):
        e = np.exp(-np.abs(beta * p))
    s, t = np.where(p >= 0, 1, e) / (1 + e), np.where(p >= 0, e, 1) / (1 + e)  # sigmoid(±beta·p)
    return np.maximum(p, 0) + np.log1p(e) / beta, s, beta * s * t, beta**2 * s * t * (t - s)


def squareplus_orders(p, beta):
    p = np.asarray(p, np.longdouble)
    c = 2 / np.longdouble(beta)
    h = np.sqrt(p * p + c * c)
    value = np.where(p >= 0, (p + h) / 2, c * c / 2 / (h + abs(p)))
    return [a.astype(np.float64) for a in (value, value / h, (c / h) ** 2 / h / 2, -1.5 * (c / h) ** 2 * p / h**3)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("beta", [100.0, 1.0, 1e-3])
@pytest.mark.parametrize(("activation", "exact"), [(Softplus, softplus_orders), (Squareplus, squareplus_orders)])
@pytest.mark.thorough_if(dtype=np.float64)
@pytest.mark.thorough_if(beta=1.0)
def test_never_overflows(activation, exact, beta, dtype):
    """To their last digits, far into both tails; of third order, to those of its largest value."""
    sizes = np.array([1e-30, 1e-4, 0.01, 0.1, 0.3, 1, 3, 10, 30, 88, 89, 100, 710, 1e4, 1e9, 1e18, 1e30, 1e38])
    p = np.concatenate([-sizes[::-1], [0], sizes]).astype(dtype)
    got = orders(activation(beta), jnp.asarray(p))
    least, eps = np.finfo(dtype).tiny, np.finfo(dtype).eps
    for order, (g, want) in enumerate(zip(got, exact(p, beta), strict=True)):
        # exp(−z) has the relative error z·eps/2 of its argument, and z is 88 or 709 at most where it is not 0.
        relative = 8 * eps if exact is squareplus_orders else 100 * eps if dtype == np.float32 else 800 * eps
        floor = 8 * eps * np.abs(want).max() if order > 2 else 2 * least * max(beta, 1 / beta)
        np.testing.assert_allclose(np.asarray(g, np.float64), want, rtol=relative, atol=floor, err_msg=f"order {order}")


@pytest.mark.parametrize("name", ["sigmoid", "silu", "tanh", "gelu", "gelu_exact"])
@pytest.mark.thorough_if(name=["sigmoid", "tanh"])
def test_tails_are_finite(name):
    p = jnp.array([-1e4, -100.0, 0.0, 100.0, 1e4], jnp.float32)
    value, *derivatives = orders(name, p)
    assert jnp.isfinite(value).all() and all(jnp.isfinite(d).all() for d in derivatives)
    ends = {"sigmoid": (0, 1), "tanh": (-1, 1)}.get(name, (0, 1e4))
    np.testing.assert_allclose([value[0], value[-1]], ends, rtol=1e-6)


def test_beta_of_any_size():
    for beta in (1e-30, 1e30):
        p = jnp.array([-2.0, 0.0, 3.0], jnp.float32)
        for activation, exact in ((Softplus, softplus_orders), (Squareplus, squareplus_orders)):
            value, slope = orders(activation(beta), p, 1)
            want = exact(p, beta)
            np.testing.assert_allclose(value, want[0], rtol=1e-5, atol=1e-30)
            np.testing.assert_allclose(slope, want[1], rtol=1e-5, atol=1e-30)


def test_names_are_the_objects_with_their_defaults():
    pairs = {"leaky_relu": LeakyReLU(), "sine": Sine(), "softplus": Softplus(), "squareplus": Squareplus()}
    assert {name: activations.resolve("activation", name) for name in pairs} == pairs
    assert activations.resolve("activation", Softplus(3)) == Softplus(3.0) != Softplus()
    assert repr(Softplus(2)) == "Softplus(beta=2.0)" and hash(Sine(1)) == hash(Sine(1.0))


def test_as_jax_has_them(rng):
    """The definitions that are JAX's, at any p, and at kinks."""
    p = jnp.asarray(np.concatenate([[0.0, -0.0], rng.normal(size=50)]))
    theirs = {
        "relu": jax.nn.relu,
        "leaky_relu": jax.nn.leaky_relu,
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=True),
        "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    }
    names = list(theirs)
    want = helpers.quick_jit(lambda p: [(theirs[n](p), jax.vmap(jax.grad(theirs[n]))(p)) for n in names])(p)
    for name, (value, slope) in zip(names, want, strict=True):
        got = orders(name, p, 1)
        np.testing.assert_allclose(got[0], value, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(got[1], slope, rtol=1e-12, atol=1e-13)
    assert not orders("relu", p, 1)[1][:2].any()


# ---- NaN


@pytest.mark.parametrize("name", list(mlp_oracle.ACTIVATIONS))
@pytest.mark.thorough_if(
    name=["none", "leaky_relu", "sine", "silu", "tanh", "sigmoid", "exponential", "gelu", "gelu_exact"]
)
@pytest.mark.thorough_if(implementation="xla")
def test_nan_stays_in_its_row(name, implementation, rng):
    """Of values, of gradients in x, and of the gradient of a function of these."""
    x, W = rng.normal(size=(5, 3)), [jnp.asarray(rng.normal(size=s)) for s in ((4, 3), (2, 4))]

    def field(x):
        return mlp(x, W, activation=name, output_activation="sine", implementation=implementation)

    def both(x):
        slope = jax.grad(lambda x: field(x).sum())
        return field(x), slope(x), jax.grad(lambda x: jnp.square(slope(x)).sum())(x)

    both = helpers.quick_jit(both)
    clean, dirty = both(jnp.asarray(x)), both(jnp.asarray(x).at[2, 1].set(jnp.nan))
    assert jnp.isnan(dirty[0][2]).all()
    for a, b in zip(clean, dirty, strict=True):
        helpers.assert_close(np.delete(b, 2, 0), np.delete(a, 2, 0), 1e-14)


# ---- Errors


def test_bad_calls(rng):
    x, W = rng.random((5, 3)), (rng.random((4, 3)), rng.random((2, 4)))
    b, single = (rng.random(4), rng.random(2)), x.astype(np.float32)
    cases = [
        (TypeError, "x is a float, expected a JAX or NumPy array", (1.0, W), {}),
        (TypeError, r"x\[1\] is a list", ((x, [1.0]), W), {}),
        (ValueError, "x is empty", ((), W), {}),
        (ValueError, r"x has shape \(3,\), expected \(\.\.\., N, I\).*x\[None\]", (x[0], W), {}),
        (ValueError, r"x\[1\] has shape \(4, 3\), expected .*\(5,\), that of x\[0\]", ((x, x[:4]), W), {}),
        (TypeError, "x has dtype int64, expected one of float32, float64, bfloat16, float16", (x.astype(int), W), {}),
        (TypeError, "x has dtype complex", (x.astype(complex), W), {}),
        (TypeError, r"weights\[0\] has dtype float64, expected float32, that of x\. Convert", (single, W), {}),
        (TypeError, r"x\[1\] has dtype float32, expected float64, that of x\[0\]", ((x, single), W), {}),
        (TypeError, r"biases\[1\] has dtype float32", (x, W, (b[0], b[1].astype(np.float32))), {}),
        (TypeError, r"weights is a ndarray, expected a tuple of arrays.*pass \(weights,\)", (x, W[0]), {}),
        (TypeError, "weights is a dict, expected a tuple of arrays", (x, {}), {}),
        (ValueError, "weights is empty", (x, ()), {}),
        (ValueError, r"weights\[0\] has .* \(3, 4\), expected \(out, 3\), as x has .* 3\. Transp", (x, (W[0].T,)), {}),
        (ValueError, r"weights\[0\] has shape \(4, 3\), expected \(out, 6\), as x has width 6", ((x, x), W), {}),
        (ValueError, r"weights\[1\] has shape \(4, 3\), expected \(out, 4\), as layer 0 has", (x, (W[0], W[0])), {}),
        (ValueError, r"weights\[0\] has shape \(3,\)", (x, (W[0][0],)), {}),
        (ValueError, r"weights\[0\] has shape \(0, 3\)", (x, (W[0][:0],)), {}),
        (TypeError, "biases is a ndarray", (x, W[:1], b[0]), {}),
        (ValueError, "there are 1 biases, expected 2, one for each of weights; or None", (x, W, b[:1]), {}),
        (ValueError, r"biases\[0\] has shape \(2,\), expected \(4,\)", (x, W, b[::-1]), {}),
        (ValueError, "activation is 'Relu', expected one of 'exp.*, 'relu'.*Softplus", (x, W), {"activation": "Relu"}),
        (ValueError, "output_activation is None, expected one of .*'none'", (x, W), {"output_activation": None}),
        (ValueError, "activation is <class .*Softplus'>", (x, W), {"activation": Softplus}),
        (ValueError, "implementation is 'cuda', expected one of", (x, W), {"implementation": "cuda"}),
    ]  # fmt: skip
    for error, match, args, options in cases:
        with pytest.raises(error, match=match):
            mlp(*args, **options)


def test_bad_parameters():
    for make, match in (
        (lambda: Softplus(0.0), "beta of Softplus is 0.0, expected a number from 1e-30 to 1e30"),
        (lambda: Squareplus(-1), "beta of Squareplus is -1, expected"),
        (lambda: Softplus(float("inf")), "beta of Softplus is inf"),
        (lambda: Sine(float("nan")), "omega of Sine is nan, expected a number from -1e"),
        (lambda: LeakyReLU(1e31), "slope of LeakyReLU is 1e"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    for value in ("2", True, None, [1.0]):
        with pytest.raises(TypeError, match=r"beta of Softplus is .*expected a Python number"):
            Softplus(value)
    with pytest.raises(TypeError, match="expected a Python number: activations are static"):
        jax.jit(lambda beta: Softplus(beta)(jnp.ones(2)))(2.0)
