"""The two metrics: how far a point is from a query, and what weight it has there. The formulas of the reference path.

The kernels' copy, with the derivatives written out, is ``csrc/knn/metric.h``; the tests hold the two together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric. Displacements are d = q − p, (..., 3); parameters belong to the point, with the same leading axes.

    Attributes:
      name: prefix of FFI targets and primitives.
      search_ndims: core axes of the parameters on which ``distance`` depends.
      parameter_ndims: core axes of all parameters.
      distance: ``distance(d, *search parameters)``, (...,).
      exponent: ``exponent(dist, *parameters)``, (...,); the weight is exp(−exponent).
    """

    name: str
    search_ndims: tuple[int, ...]
    parameter_ndims: tuple[int, ...]
    distance: Callable[..., jax.Array]
    exponent: Callable[..., jax.Array]


def _anisotropic_distance(d: jax.Array, sigma: jax.Array, R: jax.Array) -> jax.Array:
    """Σ_i sigma_i (R d)_i². R d first: multiplying out Rᵀ diag(sigma) R would lose digits as the anisotropy grows."""
    # Written out elementwise: a matrix product would round to tf32 on some GPUs and keep XLA from fusing the rest.
    u = [R[..., i, 0] * d[..., 0] + R[..., i, 1] * d[..., 1] + R[..., i, 2] * d[..., 2] for i in range(3)]
    return sigma[..., 0] * u[0] * u[0] + sigma[..., 1] * u[1] * u[1] + sigma[..., 2] * u[2] * u[2]


def _squared_norm(d: jax.Array) -> jax.Array:
    return d[..., 0] * d[..., 0] + d[..., 1] * d[..., 1] + d[..., 2] * d[..., 2]


ANISOTROPIC = Metric(
    name="aniso",
    search_ndims=(2, 3),
    parameter_ndims=(2, 3),
    distance=_anisotropic_distance,
    exponent=lambda dist, sigma, R: dist,
)
ISOTROPIC = Metric(
    name="iso",
    search_ndims=(),
    parameter_ndims=(2,),
    distance=_squared_norm,
    exponent=lambda dist, sigma: sigma[..., 0] * dist,
)
