"""Activations: finite, with derivatives to third order, wherever these are in exact arithmetic.

Where JAX would differentiate a formula into one that overflows or cancels, the derivative is written out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


class Activation:
    """A function of each element, frozen and hashable: a static argument of jitted functions."""

    def __call__(self, p: jax.Array) -> jax.Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Softplus(Activation):
    """log(1 + exp(beta·p)) / beta, which overflows at no p; beta from 1e-30 to 1e30."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_number(self, "beta", positive=True)

    def __call__(self, p: jax.Array) -> jax.Array:
        return _softplus(p, self.beta)


@dataclasses.dataclass(frozen=True)
class Squareplus(Activation):
    """(p + √(p² + 4/beta²)) / 2 (Barron 2021), which overflows at no p; beta from 1e-30 to 1e30."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_number(self, "beta", positive=True)

    def __call__(self, p: jax.Array) -> jax.Array:
        return _squareplus(p, 2 / self.beta)


@dataclasses.dataclass(frozen=True)
class Sine(Activation):
    """sin(omega·p) (Sitzmann et al. 2020); omega within ±1e30."""

    omega: float = 1.0

    def __post_init__(self) -> None:
        _check_number(self, "omega")

    def __call__(self, p: jax.Array) -> jax.Array:
        return jnp.sin(self.omega * p)


@dataclasses.dataclass(frozen=True)
class LeakyReLU(Activation):
    """p where p >= 0, slope·p elsewhere; its derivative at 0 is 1, as jax.nn.leaky_relu's. slope within ±1e30."""

    slope: float = 0.01

    def __post_init__(self) -> None:
        _check_number(self, "slope")

    def __call__(self, p: jax.Array) -> jax.Array:
        return jnp.where(p >= 0, p, self.slope * p)


@dataclasses.dataclass(frozen=True)
class Plain(Activation):
    """One without a parameter; relu's derivative at 0 is 0."""

    name: str

    def __call__(self, p: jax.Array) -> jax.Array:
        return _PLAIN[self.name](p)


def _check_number(activation: Any, field: str, *, positive: bool = False) -> None:
    """Makes the field a float, so that equal activations have equal hashes."""
    value, name = getattr(activation, field), f"{field} of {type(activation).__name__}"
    try:
        if isinstance(value, str | bool):
            raise TypeError
        number = float(value)
    except (TypeError, jax.errors.ConcretizationTypeError):
        raise TypeError(f"{name} is {value!r}, expected a Python number: activations are static under jit.") from None
    least = 1e-30 if positive else -1e30  # beyond, float32 has no products of it with another number
    if not least <= number <= 1e30:
        raise ValueError(f"{name} is {value!r}, expected a number from {least} to 1e30.")
    object.__setattr__(activation, field, number)


@jax.custom_jvp
def sigmoid(p: jax.Array) -> jax.Array:
    """1 / (1 + exp(−p)); s(p)·s(−p), its derivative, keeps the digits that s·(1 − s) loses at large p."""
    return lax.logistic(p)


@sigmoid.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (p,), (dp,) = primals, tangents
    s = sigmoid(p)
    return s, s * sigmoid(-p) * dp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softplus(p: jax.Array, beta: float) -> jax.Array:
    return jnp.maximum(p, 0) + jnp.log1p(jnp.exp(-jnp.abs(beta * p))) / beta


@_softplus.defjvp
def _(beta: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (p,), (dp,) = primals, tangents
    return _softplus(p, beta), sigmoid(beta * p) * dp


# With c = 2/beta and h = √(p² + c²), squareplus is f = (p + h)/2, f' = f/h and f'' = c²/(2h³); h' = p/h.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _squareplus(p: jax.Array, c: float) -> jax.Array:
    larger = _hypotenuse(p, c) / 2 + jnp.abs(p) / 2
    return jnp.where(p >= 0, larger, c / 2 * (c / 2 / larger))  # (h − |p|)/2, which would cancel, is c²/4 / larger


@_squareplus.defjvp
def _(c: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (p,), (dp,) = primals, tangents
    return _squareplus(p, c), _squareplus_slope(p, c) * dp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _squareplus_slope(p: jax.Array, c: float) -> jax.Array:
    return _squareplus(p, c) / _hypotenuse(p, c)


@_squareplus_slope.defjvp
def _(c: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (p,), (dp,) = primals, tangents
    h = _hypotenuse(p, c)
    return _squareplus_slope(p, c), jnp.square(c / h) / (2 * h) * dp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _hypotenuse(p: jax.Array, c: float) -> jax.Array:
    """For c > 0, without squares that overflow."""
    size = jnp.abs(p)
    larger, smaller = jnp.maximum(size, c), jnp.minimum(size, c)
    return larger * jnp.sqrt(1 + jnp.square(smaller / larger))


@_hypotenuse.defjvp
def _(c: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (p,), (dp,) = primals, tangents
    h = _hypotenuse(p, c)
    return h, p / h * dp


_PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda p: p,
    "relu": jax.nn.relu,
    "silu": lambda p: p * sigmoid(p),
    "tanh": jnp.tanh,
    "sigmoid": sigmoid,
    "exponential": jnp.exp,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
}
#: By the name that users give.
ACTIVATIONS: dict[str, Activation] = {
    **{name: Plain(name) for name in _PLAIN},
    "leaky_relu": LeakyReLU(),
    "sine": Sine(),
    "softplus": Softplus(),
    "squareplus": Squareplus(),
}


def resolve(argument: str, value: Any) -> Activation:
    """The activation that ``value``, a user's ``argument``, names or is."""
    if isinstance(value, Activation):
        return value
    if isinstance(value, str) and value in ACTIVATIONS:
        return ACTIVATIONS[value]
    raise ValueError(
        f"{argument} is {value!r}, expected one of {', '.join(map(repr, sorted(ACTIVATIONS)))}, or an object with a "
        "parameter: LeakyReLU(slope), Sine(omega), Softplus(beta), Squareplus(beta)."
    )
