"""Colours of Gaussians by the direction in which they are seen: real spherical harmonics of degree 0 to 3."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .projection import parts


def colors(sh: jax.Array, directions: jax.Array, degree: int) -> tuple[jax.Array, jax.Array]:
    """Of coefficients (P, (degree+1)², 3) along unit vectors (3, P): max(0, ½ + Σ sh·basis), (P, 3); which are finite.

    Coefficients that are not finite count as 0, so that where the second result is False nothing is NaN.
    """
    good = jnp.isfinite(sh)
    x, y, z = parts(directions)
    basis = jnp.stack(_basis(x, y, z, degree), -1)
    total = 0.5 + (basis[:, :, None] * jnp.where(good, sh, 0)).sum(1)
    finite = good.all(1) & jnp.isfinite(total)
    return jnp.where(finite & (total > 0), total, 0), finite.all(-1)


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
