"""The perceptron in pure JAX."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .activations import Activation


def reference(
    x: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    biases: Sequence[jax.Array] | None,
    activation: Activation,
    output_activation: Activation,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Parts of x (..., N, any), of I columns together; weights (out, in), biases (out,) -> (..., N, O).

    With h_0 = x: p_l = W_l h_{l−1} + b_l and h_l = σ_l(p_l). Of bfloat16 and float16, p_l and σ_l are float32, and h_l
    is rounded.
    """
    dtype = weights[0].dtype
    wide = jnp.float32 if dtype.itemsize < 4 else dtype
    h = tuple(x)
    for layer, weight in enumerate(weights):
        columns = jnp.split(weight, np.cumsum([part.shape[-1] for part in h])[:-1], axis=1)
        p = functools.reduce(jnp.add, [_product(a, w, precision, wide) for a, w in zip(h, columns, strict=True)])
        if biases is not None:
            p = p + lax.broadcast_in_dim(biases[layer].astype(wide), p.shape, (p.ndim - 1,))
        sigma = output_activation if layer == len(weights) - 1 else activation
        h = (sigma(p).astype(dtype),)
    return h[0]


def _product(a: jax.Array, weight: jax.Array, precision: lax.PrecisionLike, wide: jnp.dtype) -> jax.Array:
    """a (..., n), weight (m, n) -> (..., m)."""
    contracted = (((a.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(a, weight, contracted, precision=precision, preferred_element_type=wide)
