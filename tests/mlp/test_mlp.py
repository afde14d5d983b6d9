"""Values and derivatives of the perceptron against its definition in NumPy."""

import functools
import itertools
import re

import helpers
import jax
import jax.numpy as jnp
import mlp_oracle
import numpy as np
import pytest

from jax_knn_aggregate import LeakyReLU, Sine, Softplus, Squareplus, mlp
from jax_knn_aggregate.core import ffi

NAMES = list(mlp_oracle.ACTIVATIONS)
PARAMETRIC = [
    (LeakyReLU(-0.3), mlp_oracle.leaky_relu(-0.3)),
    (Softplus(5.0), mlp_oracle.softplus(5.0)),
    (Sine(3.0), mlp_oracle.sine(3.0)),
    (Squareplus(10.0), mlp_oracle.squareplus(10.0)),
]


def problem(rng, widths=(3, 7, 5, 2), N=6, bias=True, dtype=np.float64):
    """(x, weights, biases), a cotangent of y, and tangents as the first."""

    def arrays():
        weights = tuple(rng.normal(size=(m, n)) / n**0.5 for n, m in itertools.pairwise(widths))
        biases = tuple(0.3 * rng.normal(size=m) for m in widths[1:]) if bias else None
        return rng.normal(size=(N, widths[0])), weights, biases

    z, ct, v = arrays(), rng.normal(size=(N, widths[-1])), arrays()
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (z, ct, v))


def only_single(implementation):
    """Whether kernels are asked for where there are none of float64."""
    return implementation == "ffi" and jax.default_backend() != "cpu"


def derivatives(fn, z, ct, v):
    """Value, tangent, gradients; gradients of ⟨v, gradients⟩ in z and ct, and the same forward over reverse, in z."""
    y, tangent = jax.jvp(fn, z, v)

    def first(z, ct):
        return jax.vjp(fn, *z)[1](ct)

    second = jax.grad(lambda z, ct: helpers.product(first(z, ct), v), (0, 1))(z, ct)
    return y, tangent, first(z, ct), second, jax.jvp(lambda z: first(z, ct), (z,), (v,))[1]


def in_numpy(z, ct, v, activation, output_activation):
    z, ct, v = helpers.wide((z, ct, v))
    o = mlp_oracle.Oracle(*z, activation, output_activation)
    *in_z, in_ct = o.second(ct, v)
    return o.y, o.tangent(v), o.first(ct), (tuple(in_z), in_ct), tuple(in_z)


# ---- The oracle itself


@pytest.mark.parametrize("name", [n for n in NAMES if "relu" not in n])
def test_oracle_of_activations(name, rng):
    """Each written derivative is that of the one before, by complex steps."""
    fn, p = mlp_oracle.ACTIVATIONS[name], rng.uniform(-4, 4, 100)
    value, slope, bend = fn(p)
    stepped = fn(p + 1e-30j)
    np.testing.assert_allclose(stepped[0].imag / 1e-30, slope, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(stepped[1].imag / 1e-30, bend, rtol=1e-9, atol=1e-12)
    assert np.ptp(value) > 0


def test_oracle_of_networks(rng):
    """Gradients by complex steps of values, and second order by complex steps of gradients, along any direction."""
    (x, W, b), ct, v = helpers.wide(problem(rng))
    direction, functions = helpers.wide(problem(rng)[2]), [mlp_oracle.ACTIVATIONS[n] for n in ("gelu", "sigmoid")]
    o = mlp_oracle.Oracle(x, W, b, *functions)

    def moved(a, t):
        return jax.tree.map(lambda a, t: a + 1e-30j * t, a, t)

    step = mlp_oracle.Oracle(*(moved(a, t) for a, t in zip((x, W, b), direction, strict=True)), *functions)

    def along(gradients):
        return sum((g * t).sum() for g, t in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))

    np.testing.assert_allclose((ct * step.y).sum().imag / 1e-30, along(o.first(ct)), rtol=1e-11)
    *in_z, in_ct = o.second(ct, v)
    pairs = zip(jax.tree.leaves(step.first(ct)), jax.tree.leaves(v), strict=True)
    np.testing.assert_allclose(sum((g * t).sum() for g, t in pairs).imag / 1e-30, along(in_z), rtol=1e-11)
    np.testing.assert_allclose(in_ct, o.tangent(v), rtol=1e-11)


# ---- Every derivative


def check(rng, implementation, pair, output_pair, bias=True, tolerance=1e-10, jit=helpers.quick_jit, **shape):
    if only_single(implementation):
        shape, tolerance = {"dtype": np.float32} | shape, max(tolerance, 1e-4)
    z, ct, v = problem(rng, bias=bias, **shape)
    fn = functools.partial(mlp, activation=pair[0], output_activation=output_pair[0], implementation=implementation)
    with jax.default_matmul_precision("highest"):
        got = jit(functools.partial(derivatives, fn))(z, ct, v)
    helpers.assert_trees_close(got, in_numpy(z, ct, v, pair[1], output_pair[1]), tolerance)


PAIRS = {str(a): (a, fn) for a, fn in [*mlp_oracle.ACTIVATIONS.items(), *PARAMETRIC]}
#: Each activation once, in hidden layers or in the last.
FEW = [(a, b, i % 2 == 0) for i, (a, b) in enumerate(zip(list(PAIRS)[:8], list(PAIRS)[8:], strict=True))]


@pytest.mark.parametrize(("activation", "output_activation", "bias"), FEW)
def test_derivatives(activation, output_activation, bias, implementation, rng):
    check(rng, implementation, PAIRS[activation], PAIRS[output_activation], bias, widths=(3, 5, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("output_activation", NAMES)
@pytest.mark.parametrize("activation", PAIRS)
@pytest.mark.thorough_if()
def test_every_pair(activation, output_activation, bias, implementation, rng):
    check(rng, implementation, PAIRS[activation], PAIRS[output_activation], bias, widths=(3, 5, 2))


@pytest.mark.parametrize(
    ("widths", "N"),
    [
        ((1, 1), 2),
        ((5, 3), 4),
        ((3, 17, 33, 1), 150),
        ((2, 3, 3, 3, 3, 3, 4), 1),
        ((4, 60, 2), 0),
        ((40, 41, 7), 2500),
    ],
)
@pytest.mark.thorough_if(implementation="xla")
def test_shapes(widths, N, implementation, rng):
    """One layer and many, odd widths, no row, one, some that fill no tile, so many that sums come in pieces."""
    check(rng, implementation, PAIRS["softplus"], PAIRS["tanh"], widths=widths, N=N)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float32, 5e-6), (jnp.bfloat16, 0.03), (np.float16, 4e-3)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.thorough_if(dtype=np.float16, implementation="xla")
def test_dtypes(dtype, tolerance, implementation, rng):
    """Second order too; of bfloat16 and float16, what is lost is about what rounding the layers loses."""
    pairs = PAIRS["silu"], PAIRS["sine"]
    check(rng, implementation, *pairs, tolerance=tolerance, dtype=dtype, widths=(3, 32, 32, 4), N=64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", PAIRS)
@pytest.mark.thorough_if(dtype=np.float64, activation=["none", "relu", "leaky_relu", "exponential", "sigmoid"])
def test_accuracy_of_activations(activation, dtype, tolerance, kernels, rng):
    """σ, σ' and σ'' each, near 0 and far from it."""
    if kernels == "cuda" and dtype == np.float64:
        pytest.skip("CUDA kernels are not of float64")
    fn = functools.partial(
        mlp, activation="none", output_activation=PAIRS[activation][0], precision="highest", implementation="ffi"
    )
    slope = jax.grad(lambda p, one: fn(p, (one, one)).sum())
    bend = jax.grad(lambda p, one: slope(p, one).sum())
    every = helpers.quick_jit(lambda p, one: (fn(p, (one, one)), slope(p, one), bend(p, one)))
    for size in (1e-3, 1.0, 20.0):
        p = rng.uniform(-size, size, (200, 1)).astype(dtype)
        got = every(jnp.asarray(p), jnp.ones((1, 1), dtype))
        # On CUDA the product with 1 is one of matrices as well; its error moves a wave's argument.
        slack = 2 if kernels == "cuda" and "Sine" in activation else 1
        helpers.assert_trees_close(got, PAIRS[activation][1](helpers.wide(p)), slack * tolerance, f"{size}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.thorough_if(implementation="xla")
def test_narrow_sums_are_wide(dtype, implementation):
    """1 + 511 times 2⁻¹² is nearly 1.125; summed in float16 or bfloat16 it stays 1. So are gradients' sums."""
    if only_single(implementation):
        pytest.skip("wider than CUDA kernels take")
    small, one = np.full((1, 512), 2.0**-12), np.ones((1, 512))
    small[0, 0] = 1
    # Biases and activations see the sum before it is rounded: 256.5 is no bfloat16, and 2048.5 no float16.
    large = 256 if dtype == jnp.bfloat16 else 2048
    row, two, bias = np.array([[large, 0.5]]), np.ones((1, 2)), np.full(1, -large)

    fn = functools.partial(mlp, implementation=implementation)

    def every(small, one, row, two, bias):
        in_weight = jax.grad(lambda w: fn(small.T, (w,))[:, 0].sum())(one[:, :1])
        return fn(small, (one,)), in_weight, fn(row, (two,), (bias,)), fn(row, (two,), output_activation="sine")

    got = helpers.quick_jit(every)(*(jnp.asarray(a, dtype) for a in (small, one, row, two, bias)))
    for a, want, tolerance in zip(got, (1.125, 1.125, 0.5, np.sin(large + 0.5)), (0.01, 0.01, 0, 0.01), strict=True):
        assert a.dtype == dtype and abs(float(a[0, 0]) - want) <= tolerance


@pytest.mark.parametrize("name", [n for n in NAMES if "relu" not in n])
@pytest.mark.thorough_if(name=["none", "silu", "tanh", "sigmoid", "exponential", "gelu_exact"])
def test_third_order(name, rng):
    """Against complex steps through the second order in NumPy."""
    (x, W, b), ct, v = problem(rng, widths=(2, 4, 1), N=3)
    pairs = [mlp_oracle.ACTIVATIONS[name]] * 2
    step = mlp_oracle.Oracle(
        *jax.tree.map(lambda a, t: a + 1e-30j * t, helpers.wide((x, W, b)), helpers.wide(v)), *pairs
    )
    want = jax.tree.map(lambda a: a.imag / 1e-30, step.second(np.asarray(ct), helpers.wide(v))[:3])

    def hessian_times_v(x, W, b):
        fn = functools.partial(mlp, activation=name, output_activation=name)
        return jax.grad(lambda z: helpers.product(jax.vjp(fn, *z)[1](ct), v))((x, W, b))

    got = helpers.quick_jit(lambda z: jax.jvp(hessian_times_v, z, v)[1])((x, W, b))
    helpers.assert_trees_close(got, want, 1e-9)


# ---- What x may be


@pytest.mark.thorough_if(implementation="xla")
def test_parts_stand_side_by_side(implementation, rng):
    """As their concatenation, in value and in every derivative; a part may have no columns."""
    single = only_single(implementation)
    (x, W, b), ct, v = problem(rng, widths=(6, 7, 2), dtype=np.float32 if single else np.float64)
    parts = x[:, :1], x[:, 1:1], x[:, 1:4], x[:, 4:]

    def of_parts(parts, W, b):
        return mlp(parts, W, b, activation="sine", implementation=implementation)

    split = functools.partial(jnp.split, indices_or_sections=[1, 1, 4], axis=1)
    with jax.default_matmul_precision("highest"):
        every = helpers.quick_jit(functools.partial(derivatives, of_parts))
        got = every((parts, W, b), ct, (tuple(split(v[0])), *v[1:]))
    y, tangent, first, second, along = in_numpy(
        (x, W, b), ct, v, *(mlp_oracle.ACTIVATIONS[n] for n in ("sine", "none"))
    )

    def as_parts(z):
        return (tuple(split(z[0])), *z[1:])

    want = y, tangent, as_parts(first), (as_parts(second[0]), second[1]), as_parts(along)
    helpers.assert_trees_close(got, want, 2e-5 if single else 1e-10)


def test_leading_axes(implementation, rng):
    single = only_single(implementation)
    (x, W, b), *_ = problem(rng, N=12, dtype=np.float32 if single else np.float64)
    shapes = (3, 4), (2, 1, 6), (0, 4)

    def every(x):
        some = [x[: np.prod(shape, dtype=int)].reshape(*shape, 3) for shape in shapes]
        options = {"activation": "tanh", "implementation": implementation}
        return [mlp((a[..., :2], a[..., 2:]), list(W), list(b), **options) for a in some]

    flat = mlp_oracle.Oracle(*helpers.wide((x, W, b)), *(mlp_oracle.ACTIVATIONS[n] for n in ("tanh", "none"))).y
    with jax.default_matmul_precision("highest"):
        got = helpers.quick_jit(every)(x)
    for shape, y in zip(shapes, got, strict=True):
        helpers.assert_close(y, flat[: np.prod(shape, dtype=int)].reshape(*shape, 2), 5e-6 if single else 1e-13)


# ---- Precision


def test_precision_is_that_of_jax(rng):
    """As it is given or, without, as jax.default_matmul_precision says, in every product, forward and backward."""
    (x, W, b), *_ = problem(rng, dtype=np.float32)

    def precisions(**options):
        def loss(W):
            return mlp(x, W, b, activation="tanh", implementation="xla", **options).sum()

        return set(re.findall(r"precision = \[(\w+), \1\]", jax.jit(jax.grad(loss)).lower(W).as_text()))

    assert precisions() == {"DEFAULT"} and precisions(precision="highest") == {"HIGHEST"}
    with jax.default_matmul_precision("tensorfloat32"):
        assert precisions() == {"HIGH"} and precisions(precision=jax.lax.Precision.HIGHEST) == {"HIGHEST"}
    with pytest.raises(ValueError, match="best"):
        mlp(x, W, b, precision="best")
    exact = jax.lax.DotAlgorithmPreset.F32_F32_F32  # which no kernel knows
    helpers.assert_close(mlp(x, W, b, precision=exact), mlp(x, W, b, precision="highest"), 1e-6)
    with pytest.raises(NotImplementedError, match="no kernel"):
        mlp(x, W, b, precision=exact, implementation="ffi")


# ---- What kernels do not serve


@pytest.mark.parametrize("what", ["width", "depth", "parts"])
def test_beyond_kernels(what, kernels, rng):
    """The reference runs, and "ffi" says so."""
    widths = {"width": (2, ffi.number(f"{kernels}.mlp_max_width") + 1, 1), "depth": (2,) * 18, "parts": (5, 1)}[what]
    (x, W, _), *_ = problem(rng, widths=widths, N=3, bias=False)
    parts = tuple(jnp.split(x, 5, 1)) if what == "parts" else x
    fns = [mlp_oracle.ACTIVATIONS[n] for n in ("relu", "none")]
    helpers.assert_close(mlp(parts, W), mlp_oracle.Oracle(*helpers.wide((x, W)), None, *fns).y, 1e-12)
    with pytest.raises(NotImplementedError, match=r"mlp_value: implementation='ffi' .*no kernel for these operands"):
        mlp(parts, W, implementation="ffi")
