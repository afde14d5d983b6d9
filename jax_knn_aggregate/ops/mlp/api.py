"""The multilayer perceptron: the public function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...core import checks
from ...core.checks import Array, Implementation
from .activations import Activation, resolve
from .kernels import Layout, family

_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)


def mlp(
    x: Array | Sequence[Array],
    weights: Sequence[Array],
    biases: Sequence[Array] | None = None,
    *,
    activation: str | Activation = "relu",
    output_activation: str | Activation = "none",
    precision: lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> jax.Array:
    """A multilayer perceptron: h_0 = x; h_l = activation(W_l h_{l−1} + b_l), and output_activation in the last layer.

    Differentiable in x, every weight and every bias, to any order, in forward and reverse mode. On CPUs, kernels
    compute values and derivatives of first and second order: nothing of size (N, width) goes through memory, and
    gradients in parameters have the same bits from run to run. They serve networks of up to 16 layers, up to 512 wide,
    with x in up to 4 parts; others, other platforms, and higher orders run as plain JAX.

    Args:
      x: (..., N, I); or several such arrays, whose widths add up to I, that stand side by side without being
        concatenated, as in ``mlp((x, hash_grid(x, table, grid)), weights)``. float32, float64, bfloat16 or float16.
      weights: as many as there are layers, at least one, each (out, in) in the dtype of x: the first has in = I, each
        other the out of the one before, and the last out = O. For small networks of the same shape, side by side, use
        ``jax.vmap``.
      biases: as many, each (out,) in the dtype of x; or None.
      activation: of all layers but the last: "none", "relu", "leaky_relu", "softplus", "sine", "silu", "tanh",
        "sigmoid", "exponential", "squareplus", "gelu" or "gelu_exact" (as ``jax.nn.gelu`` with approximate=True or
        False); or an object with its parameter: ``LeakyReLU(slope=0.01)``, ``Softplus(beta=1.0)``,
        ``Sine(omega=1.0)``, ``Squareplus(beta=1.0)``. At 0, the derivative of relu is 0, that of leaky_relu 1.
      output_activation: of the last layer, likewise.
      precision: of matrix products, as in ``jax.numpy.dot``: None follows ``jax.default_matmul_precision``. On CPUs
        float32 is float32. Where it is none of lax.Precision's three, plain JAX runs.
      implementation: None uses kernels where they exist, "xla" the pure-JAX reference; "ffi" raises
        NotImplementedError where no kernel serves.

    Returns:
      (..., N, O), in the dtype of x. bfloat16 and float16 accumulate in float32, apply activations in it, and are
      rounded once a layer. A NaN in a row of x is in that row of the result alone.

    Raises:
      ValueError: for shapes, unknown activations or precisions. TypeError: for dtypes and types.
    """
    checks.implementation(implementation)
    parts = _arrays("x", x) if isinstance(x, tuple | list) else [checks.as_array("x", x)]
    w = _arrays("weights", weights)
    b = None if biases is None else _arrays("biases", biases)
    _check_dtypes(parts, w, b)
    _check_shapes(parts, w, b)
    hidden, last = resolve("activation", activation), resolve("output_activation", output_activation)
    layout = Layout(len(parts), len(w), b is not None, hidden, last, _precision(precision))
    shared = (1,) * (parts[0].ndim - 2)
    parameters = [a.reshape(*shared, *a.shape) for a in (*w, *(b or ()))]
    return family(layout)(*parts, *parameters, implementation=implementation)[0]


def _precision(value: lax.PrecisionLike) -> Any:
    """A lax.Precision, where it is one by any name; else as it is, if it is one of JAX's."""
    value = jax.config.jax_default_matmul_precision if value is None else value  # type: ignore[attr-defined]
    with contextlib.suppress(ValueError):
        return lax.Precision("default" if value is None else value)
    one = jnp.ones((1, 1), jnp.float32)
    jax.eval_shape(functools.partial(lax.dot, precision=value), one, one)
    return value


def _arrays(name: str, some: Any) -> list[jax.Array]:
    if not isinstance(some, tuple | list):
        hint = f" For one layer, pass ({name},)." if isinstance(some, Array) else ""
        raise TypeError(f"{name} is a {type(some).__name__}, expected a tuple of arrays.{hint}")
    if not some:
        raise ValueError(f"{name} is empty, expected at least one array.")
    return [checks.as_array(f"{name}[{i}]", a) for i, a in enumerate(some)]


def _named(name: str, arrays: Sequence[jax.Array]) -> list[tuple[str, jax.Array]]:
    return [(f"{name}[{i}]", a) for i, a in enumerate(arrays)]


def _check_dtypes(x: Sequence[jax.Array], weights: Sequence[jax.Array], biases: Sequence[jax.Array] | None) -> None:
    (first, a), *others = [*_named("x", x), *_named("weights", weights), *_named("biases", biases or ())]
    if len(x) == 1:
        first = "x"
    if a.dtype not in _DTYPES:
        expected = ", ".join(str(jnp.dtype(d)) for d in _DTYPES)
        raise TypeError(f"{first} has dtype {a.dtype}, expected one of {expected}. Convert it with astype.")
    for name, other in others:
        if other.dtype != a.dtype:
            raise TypeError(
                f"{name} has dtype {other.dtype}, expected {a.dtype}, that of {first}. Convert one of them with astype."
            )


def _check_shapes(x: Sequence[jax.Array], weights: Sequence[jax.Array], biases: Sequence[jax.Array] | None) -> None:
    for name, part in _named("x", x) if len(x) > 1 else [("x", x[0])]:
        if part.ndim < 2:
            raise ValueError(f"{name} has shape {part.shape}, expected (..., N, I). A single row is x[None].")
        if part.shape[:-1] != x[0].shape[:-1]:
            raise ValueError(
                f"{name} has shape {part.shape}, expected (..., N, width) with (..., N) = {x[0].shape[:-1]}, that of "
                "x[0]. Broadcast one of them."
            )
    width, source = sum(part.shape[-1] for part in x), "x has"
    for (name, weight), layer in zip(_named("weights", weights), range(len(weights)), strict=True):
        if weight.ndim != 2 or weight.shape[1] != width or 0 in weight.shape:
            hint = " Transpose it." if weight.ndim == 2 and weight.shape[0] == width else ""
            raise ValueError(
                f"{name} has shape {weight.shape}, expected (out, {width}), as {source} width {width}.{hint}"
            )
        width, source = weight.shape[0], f"layer {layer} has"
    if biases is None:
        return
    if len(biases) != len(weights):
        raise ValueError(f"there are {len(biases)} biases, expected {len(weights)}, one for each of weights; or None.")
    for (name, bias), weight in zip(_named("biases", biases), weights, strict=True):
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {bias.shape}, expected {weight.shape[:1]}, as its layer's weight has.")
