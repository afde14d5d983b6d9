"""Colours of Gaussians by the direction in which they are seen: real spherical harmonics of degree 0 to 3."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .projection import Components


def colors(sh: jax.Array, direction: Components, degree: int) -> tuple[jax.Array, jax.Array]:
    """Of coefficients (P, (degree+1)², 3) along unit vectors: max(0, ½ + Σ sh·basis), (P, 3); and which are finite.

    Coefficients that are not finite count as 0, so that where the second result is False nothing is NaN.
    """
    x, y, z = direction
    total, finite = jnp.full_like(sh[:, 0], 0.5), jnp.ones(sh[:, 0].shape, bool)
    for basis, part in zip(_basis(x, y, z, degree), _split(sh), strict=True):
        good = jnp.isfinite(part)
        total, finite = total + basis[:, None] * jnp.where(good, part, 0), finite & good
    finite &= jnp.isfinite(total)
    return jnp.where(finite & (total > 0), total, 0), finite.all(-1)


def _split(sh: jax.Array) -> list[jax.Array]:
    """(P, 3) by coefficient. The transpose of a split is one concatenation, that of slices would be a sum of pads."""
    return [part[:, 0] for part in lax.split(sh, (1,) * sh.shape[1], axis=1)]


def _basis(x: jax.Array, y: jax.Array, z: jax.Array, degree: int) -> list[jax.Array]:
    """The first (degree+1)² functions, each (P,), in the order and with the signs of Gaussian splatting."""
    basis = [jnp.full_like(x, 0.28209479177387814)]
    if degree > 0:
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree > 1:
        xx, yy, zz = x * x, y * y, z * z
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ]
    if degree > 2:
        basis += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return basis
