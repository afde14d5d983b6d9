"""Checks of what users pass to any op. Every error says what was got, what was expected and what to do."""

from __future__ import annotations

import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .primitive import IMPLEMENTATIONS

Array = jax.Array | np.ndarray  # what users may pass
Implementation = Literal[None, "xla", "ffi"]


def as_array(name: str, a: Any) -> jax.Array:
    if not isinstance(a, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name} is a {type(a).__name__}, expected a JAX or NumPy array. Convert it with jnp.asarray.")
    return jnp.asarray(a)


def floats(**given: Any) -> dict[str, jax.Array]:
    """Arrays by name, all float32 or all float64."""
    arrays = {name: as_array(name, a) for name, a in given.items()}
    first, dtype = next((name, a.dtype) for name, a in arrays.items())
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{first} has dtype {dtype}, expected float32 or float64. Convert it with astype.")
    for name, a in arrays.items():
        if a.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {a.dtype}, expected {dtype}, that of {first}. Convert one of them with astype."
            )
    return arrays


def static_integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, jax.errors.ConcretizationTypeError):
        raise TypeError(
            f"{name} is {value!r}, expected a Python integer: it sets the shapes of the results. Under jit, mark it "
            f"static (static_argnames={name!r})."
        ) from None


def implementation(value: Any) -> Implementation:
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {value!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}.")
    return value


def integers(name: str, a: Any) -> np.ndarray | jax.Array:
    if not isinstance(a, jax.Array | np.ndarray | np.generic | int) or isinstance(a, bool):
        raise TypeError(f"{name} is a {type(a).__name__}, expected an integer array. Convert it with jnp.asarray.")
    if isinstance(a, int):
        a = np.int64(min(max(a, -(2**63)), 2**63 - 1))  # out of range before and after
    # NumPy's 64-bit integers stay in NumPy until they are known to be in range: jnp.asarray would cut them to 32 bits.
    a = a if isinstance(a, jax.Array) else np.asarray(a)
    if not jnp.issubdtype(a.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {a.dtype}, expected an integer dtype. Convert it with astype.")
    return a if a.dtype.itemsize >= 4 else a.astype(np.int32)


def narrowed(a: np.ndarray | jax.Array, limit: int, above: int) -> jax.Array:
    """As int32, with −1 for what is negative and ``above`` for what is not below ``limit``."""
    xp = np if isinstance(a, np.ndarray) else jnp
    inside = (a >= 0) & (a < limit)
    narrow = xp.where(inside, a, xp.zeros_like(a)).astype(np.int32)
    return jnp.asarray(xp.where(inside, narrow, xp.where(a < 0, np.int32(-1), np.int32(above))))
