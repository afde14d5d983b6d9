"""Gaussians on the screen (Zwicker et al. 2001, Kerbl et al. 2023), in plain JAX, so that any derivative is JAX's own.

Vectors and matrices are tuples of their components, each (P,) or (): all of it is element-wise, and one loop for XLA.
No product is left to matrix units, which would round operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .reference import TILE

Components = Sequence[jax.Array]


class Camera(NamedTuple):
    """World to camera, x ↦ (rows[i]·x + shift[i])_i, and intrinsics in pixels."""

    rows: Sequence[Components]
    shift: Components
    focal: Components
    principal: Components
    centre: Components | None  # in the world


class Ellipsoids(NamedTuple):
    """Covariances Σ = Σ_k scales_k² axes_k axes_kᵀ."""

    axes: Sequence[Components]
    scales: Components

    def seen_along(self, a: Components, b: Components) -> tuple[jax.Array, ...]:
        """aᵀΣa, aᵀΣb, bᵀΣb, and what their determinant is, wᵀ adj(Σ) w with w = a × b."""
        s, w = self.scales, cross(a, b)
        along_a, along_b, across = ([dot(v, axis) for axis in self.axes] for v in (a, b, w))
        a, b = (tuple(s_k * d for s_k, d in zip(s, along, strict=True)) for along in (along_a, along_b))
        w = s[1] * s[2] * across[0], s[2] * s[0] * across[1], s[0] * s[1] * across[2]
        return dot(a, a), dot(a, b), dot(b, b), dot(w, w)


class Covariances(NamedTuple):
    """Symmetric matrices."""

    xx: jax.Array
    xy: jax.Array
    xz: jax.Array
    yy: jax.Array
    yz: jax.Array
    zz: jax.Array

    def seen_along(self, a: Components, b: Components) -> tuple[jax.Array, ...]:
        """As those of Ellipsoids."""
        xx, xy, xz, yy, yz, zz = self
        rows = (xx, xy, xz), (xy, yy, yz), (xz, yz, zz)
        adjugate = cross(rows[1], rows[2]), cross(rows[2], rows[0]), cross(rows[0], rows[1])
        w = cross(a, b)
        times_a, times_b, times_w = ([dot(row, v) for row in m] for m, v in ((rows, a), (rows, b), (adjugate, w)))
        return dot(a, times_a), dot(a, times_b), dot(b, times_b), dot(w, times_w)


class Screen(NamedTuple):
    """What the camera sees of each Gaussian, all (P,), in pixels."""

    u: jax.Array
    v: jax.Array
    xx: jax.Array  # the covariance, with eps2d
    xy: jax.Array
    yy: jax.Array
    det: jax.Array  # of this
    bare: jax.Array  # and without eps2d


def components(a: jax.Array) -> Components:
    """Of vectors (..., n). The transpose of a split is one concatenation, that of slices would be a sum of pads."""
    return tuple(part[..., 0] for part in lax.split(a, (1,) * a.shape[-1], axis=a.ndim - 1))


def dot(a: Components, b: Components) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Components, b: Components) -> Components:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def camera(viewmat: jax.Array, K: jax.Array, directions: bool) -> tuple[Camera, jax.Array]:
    """And whether it is one: finite, with focal lengths and, where directions from it are asked for, a centre."""
    counts = viewmat if directions else viewmat[:3]
    intrinsics = jnp.stack([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
    usable = jnp.isfinite(counts).all() & jnp.isfinite(intrinsics).all() & (intrinsics[:2] != 0).all()
    if directions:
        usable &= jnp.isfinite(jnp.stack(_centre(lax.stop_gradient(viewmat)))).all()
    # Another one in its place, which will show nothing: no derivative may meet NaN.
    fx, fy, cx, cy = components(jnp.where(usable, intrinsics, 1))
    viewmat = jnp.where(usable, viewmat, jnp.eye(4, dtype=viewmat.dtype))
    rows = [components(row) for row in viewmat[:3]]
    centre = _centre(viewmat) if directions else None
    return Camera(tuple(r[:3] for r in rows), tuple(r[3] for r in rows), (fx, fy), (cx, cy), centre), usable


def _centre(viewmat: jax.Array) -> Components:
    """inv(viewmat)[:3, 3]. Of ((A, b), (c, d)) that is −A⁻¹b / (d − c·A⁻¹b), a function of the last row as well."""
    (*r0, b0), (*r1, b1), (*r2, b2), (*c, d) = (components(row) for row in viewmat)
    columns = cross(r1, r2), cross(r2, r0), cross(r0, r1)  # of the adjugate
    det = dot(r0, columns[0])
    x = [dot((b0, b1, b2), row) / det for row in zip(*columns, strict=True)]
    return tuple(-a / (d - dot(c, x)) for a in x)


def ellipsoids(quats: jax.Array, scales: jax.Array) -> Ellipsoids:
    """The columns of R(q / |q|), and scales. NaN for a quaternion of zeros."""
    # R is that of any multiple, so a constant one may keep squares in range.
    w, x, y, z = components(quats / lax.stop_gradient(jnp.abs(quats).max(-1, keepdims=True)))
    s = 2 / (w * w + x * x + y * y + z * z)
    axes = (
        (1 - s * (y * y + z * z), s * (x * y + w * z), s * (x * z - w * y)),
        (s * (x * y - w * z), 1 - s * (x * x + z * z), s * (y * z + w * x)),
        (s * (x * z + w * y), s * (y * z - w * x), 1 - s * (x * x + y * y)),
    )
    return Ellipsoids(axes, components(scales))


def symmetric(covariances: jax.Array) -> Covariances:
    """(Σ + Σᵀ)/2."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = components(covariances.reshape(-1, 9))
    return Covariances(xx, (xy + yx) / 2, (xz + zx) / 2, yy, (yz + zy) / 2, zz)


def to_camera(camera: Camera, means: Components) -> Components:
    return [dot(row, means) + s for row, s in zip(camera.rows, camera.shift, strict=True)]


def project(
    camera: Camera,
    position: Components,
    shape: Ellipsoids | Covariances,
    eps2d: float,
    width: int,
    height: int,
) -> Screen:
    """Of Gaussians at ``position`` in the camera's frame.

    With W the camera's rotation and J the derivative of the projection, M = J W has rows (f/z)(W_0 − x̂ W_2) and
    (f/z)(W_1 − ŷ W_2), where x̂ = x/z and ŷ = y/z are limited to 1.3 times half the field of view. The covariance on the
    screen is M Σ Mᵀ + eps2d. By Cauchy and Binet, det(M Σ Mᵀ) = wᵀ adj(Σ) w with w = M_0 × M_1: a sum of squares, to
    whose last digits it is right, where xx·yy − xy² would lose as many as the ellipse is long.
    """
    (fx, fy), (cx, cy) = camera.focal, camera.principal
    x, y, z = position
    tx, ty = x / z, y / z
    u, v = fx * tx + cx, fy * ty + cy
    right, down, forward = camera.rows
    tx, ty = _limited(tx, 1.3 * width / (2 * fx)), _limited(ty, 1.3 * height / (2 * fy))
    k0 = tuple(r - tx * f for r, f in zip(right, forward, strict=True))
    k1 = tuple(d - ty * f for d, f in zip(down, forward, strict=True))
    sx, sy = fx / z, fy / z
    xx, xy, yy, bare = shape.seen_along(k0, k1)
    xx, xy, yy, bare = sx * sx * xx, sx * sy * xy, sy * sy * yy, sx * sy * (sx * sy * bare)
    det = bare + eps2d * (xx + yy) + eps2d * eps2d
    return Screen(u, v, xx + eps2d, xy, yy + eps2d, det, bare)


def _limited(t: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(t > limit, limit, jnp.where(t < -limit, -limit, t))


def conics(screen: Screen) -> tuple[Components, jax.Array]:
    """The inverse of the covariance, (xx, xy, yy), and what eps2d leaves of its determinant: det without / det."""
    # A constant factor, so that 1/det² is in range where 1/det is.
    n = lax.stop_gradient(jnp.maximum(jnp.abs(screen.xx), jnp.abs(screen.yy)))
    xx, xy, yy, det, bare = screen.xx / n, screen.xy / n, screen.yy / n, screen.det / n / n, screen.bare / n / n
    return (yy / det / n, -xy / det / n, xx / det / n), bare / det


def reach(screen: Screen, width: int, height: int) -> tuple[jax.Array, jax.Array]:
    """⌈3 √λmax⌉, (P,) int32; and the tiles within as many pixels, (P, 4) int32: columns [x0, x1), rows [y0, y1)."""
    gap = jnp.square((screen.xx - screen.yy) / 2) + screen.xy * screen.xy  # mid² − det
    largest = (screen.xx + screen.yy) / 2 + jnp.sqrt(jnp.maximum(gap, 0.1))
    r = jnp.ceil(3 * jnp.sqrt(jnp.maximum(largest, 0)))

    def tiles(a: jax.Array, size: int) -> jax.Array:
        return jnp.clip(jnp.trunc(a / TILE), 0, -(-size // TILE)).astype(jnp.int32)

    u, v = screen.u - 0.5, screen.v - 0.5
    bounds = tiles(u - r, width), tiles(u + r + 15, width), tiles(v - r, height), tiles(v + r + 15, height)
    return jnp.minimum(r, 2.0**30).astype(jnp.int32), jnp.stack(bounds, -1)
