"""Gaussians on the screen (Zwicker et al. 2001, Kerbl et al. 2023), in plain JAX, so that any derivative is JAX's own.

What depends on the camera alone is always computed so; the rest where ``project.py`` has no kernels.

Inside, arrays have their last axis over Gaussians: vectors (3, P), matrices (3, 3, P). Their products are written as
sums of products: matrix units would round operands, and libraries are no help where matrices are three by three.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .reference import TILE


class Camera(NamedTuple):
    """World to camera, x ↦ rotation x + translation, and intrinsics in pixels."""

    rotation: jax.Array  # (3, 3, 1)
    translation: jax.Array  # (3, 1)
    focal: jax.Array  # (2, 1)
    principal: jax.Array  # (2, 1)
    centre: jax.Array | None  # (3, 1) in the world


class Screen(NamedTuple):
    """What the camera sees of each Gaussian, in pixels, all (P,)."""

    u: jax.Array
    v: jax.Array
    xx: jax.Array  # the covariance, with eps2d
    xy: jax.Array
    yy: jax.Array
    det: jax.Array  # of this
    bare: jax.Array  # and without eps2d


class Shape(Protocol):
    def seen_along(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        """Of vectors a and b, and covariances Σ: aᵀΣa, aᵀΣb, bᵀΣb, and wᵀ adj(Σ) w with w = a × b, all (P,).

        That is the determinant of the others, by Cauchy and Binet.
        """
        ...


class Ellipsoids(NamedTuple):
    """Covariances Σ_k scales_k² axes_k axes_kᵀ."""

    axes: jax.Array
    scales: jax.Array

    def seen_along(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        s, w = self.scales, cross(a, b)
        a, b, w = s * times(self.axes, a), s * times(self.axes, b), rolled(s, 1) * rolled(s, 2) * times(self.axes, w)
        return dot(a, a), dot(a, b), dot(b, b), dot(w, w)


class Covariances(NamedTuple):
    """Symmetric matrices."""

    matrices: jax.Array

    def seen_along(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        m, w = self.matrices, cross(a, b)
        adjugate = cross(rolled(m, 1, axis=1), rolled(m, 2, axis=1))  # as symmetric as they are
        of_b = times(m, b)
        return dot(a, times(m, a)), dot(a, of_b), dot(b, of_b), dot(w, times(adjugate, w))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(0)


def times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return (matrix * vector[None]).sum(1)


def cross(a: jax.Array, b: jax.Array) -> jax.Array:
    return rolled(a, 1) * rolled(b, 2) - rolled(a, 2) * rolled(b, 1)


def rolled(a: jax.Array, by: int, axis: int = 0) -> jax.Array:
    """a[by:] and then a[:by], by a split, whose transpose is one concatenation. That of slices is a sum of pads."""
    return jnp.concatenate(lax.split(a, (by, a.shape[axis] - by), axis)[::-1], axis)


def parts(a: jax.Array) -> list[jax.Array]:
    """Along the first axis; likewise."""
    return [part[0] for part in lax.split(a, (1,) * a.shape[0], 0)]


#: How many numbers make a camera, without its centre and with it.
CAMERA_SIZE, CAMERA_SIZE_WITH_CENTRE = 16, 19


def camera(viewmat: jax.Array, K: jax.Array, directions: bool) -> tuple[jax.Array, jax.Array]:
    """The parts of a ``Camera`` in a row; and whether it is one: finite, with focal lengths and, where directions from
    it are asked for, a centre."""
    counts = viewmat if directions else viewmat[:3]
    intrinsics = jnp.stack([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
    usable = jnp.isfinite(counts).all() & jnp.isfinite(intrinsics).all() & (intrinsics[:2] != 0).all()
    if directions:
        usable &= jnp.isfinite(_centre(lax.stop_gradient(viewmat))).all()
    # Another one in its place, which will show nothing: no derivative may meet NaN.
    viewmat = jnp.where(usable, viewmat, jnp.eye(4, dtype=viewmat.dtype))
    parts = [viewmat[:3, :3].ravel(), viewmat[:3, 3], jnp.where(usable, intrinsics, 1)]
    return jnp.concatenate([*parts, _centre(viewmat)] if directions else parts), usable


def camera_of(row: jax.Array) -> Camera:
    """The other way."""
    rotation, *rest = lax.split(row[:, None], (9, 3, 2, 2, *([3] if len(row) > CAMERA_SIZE else [])), 0)
    return Camera(rotation.reshape(3, 3, 1), *rest, *([] if len(row) > CAMERA_SIZE else [None]))


def _centre(viewmat: jax.Array) -> jax.Array:
    """inv(viewmat)[:3, 3]. Of ((A, b), (c, d)) that is −A⁻¹b / (d − c·A⁻¹b), a function of the last row as well."""
    x = times(_inverse(viewmat[:3, :3]), viewmat[:3, 3])
    return -x / (viewmat[3, 3] - dot(viewmat[3, :3], x))


@jax.custom_jvp
def _inverse(A: jax.Array) -> jax.Array:
    """Of a matrix (3, 3). That of jnp.linalg would take a GPU longer than all the rest here."""
    adjugate = cross(rolled(A, 1).T, rolled(A, 2).T)
    return adjugate / dot(A[0], adjugate[:, 0])


@_inverse.defjvp
def _inverse_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """d(A⁻¹) = −A⁻¹ dA A⁻¹, with an inverse that is differentiated likewise: right in every order."""
    inverse = _inverse(*primals)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a[:, :, None] * b[None]).sum(1)

    return inverse, -product(product(inverse, tangents[0]), inverse)


def ellipsoids(quats: jax.Array, scales: jax.Array) -> Ellipsoids:
    """Of quaternions (P, 4), of any length but 0, which makes NaN, and scales (P, 3)."""
    # The rotation is that of any multiple, so a constant one may keep squares in range.
    q = (quats / lax.stop_gradient(jnp.abs(quats).max(-1, keepdims=True))).T
    return Ellipsoids(axes(q, 2 / dot(q, q)), scales.T)


def axes(q: jax.Array, s: jax.Array | float) -> jax.Array:
    """Of quaternions (4, P) the columns of 1 + s·(products of two components), rotations if s is 2/|q|²: (3, 3, P)."""
    w, x, y, z = parts(q)
    columns = (
        *(1 - s * (y * y + z * z), s * (x * y + w * z), s * (x * z - w * y)),
        *(s * (x * y - w * z), 1 - s * (x * x + z * z), s * (y * z + w * x)),
        *(s * (x * z + w * y), s * (y * z - w * x), 1 - s * (x * x + y * y)),
    )
    return jnp.stack(columns).reshape(3, 3, -1)


def covariances(matrices: jax.Array) -> Covariances:
    """The symmetric part of matrices (P, 3, 3)."""
    m = matrices.transpose(1, 2, 0)
    return Covariances((m + m.swapaxes(0, 1)) / 2)


def to_camera(camera: Camera, means: jax.Array) -> jax.Array:
    """Of means (P, 3)."""
    return times(camera.rotation, means.T) + camera.translation


def project(camera: Camera, position: jax.Array, shape: Shape, eps2d: float, width: int, height: int) -> Screen:
    """Of Gaussians at ``position`` in the camera's frame.

    With W the camera's rotation and J the derivative of the projection, M = J W has rows (f/z)(W_0 − x̂ W_2) and
    (f/z)(W_1 − ŷ W_2), where x̂ = x/z and ŷ = y/z are limited to 1.3 times half the field of view. The covariance on the
    screen is M Σ Mᵀ + eps2d. The determinant of M Σ Mᵀ is a sum of squares, to whose last digits it is right, where
    xx·yy − xy² would lose as many as the ellipse is long.
    """
    across, z = lax.split(position, (2, 1), 0)
    slopes, magnification = across / z, camera.focal / z
    u, v = parts(camera.focal * slopes + camera.principal)
    sizes = zip((width, height), lax.split(camera.focal, (1, 1), 0), strict=True)
    most = jnp.concatenate([1.3 / 2 * size / focal for size, focal in sizes])
    slopes = jnp.where(slopes > most, most, jnp.where(slopes < -most, -most, slopes))
    right, down, forward = parts(camera.rotation)
    tx, ty = parts(slopes)
    xx, xy, yy, bare = shape.seen_along(right - tx[None] * forward, down - ty[None] * forward)
    sx, sy = parts(magnification)
    xx, xy, yy, bare = sx * sx * xx, sx * sy * xy, sy * sy * yy, sx * sy * (sx * sy * bare)
    det = bare + eps2d * (xx + yy) + eps2d * eps2d
    return Screen(u, v, xx + eps2d, xy, yy + eps2d, det, bare)


def conics(screen: Screen) -> tuple[jax.Array, jax.Array]:
    """The inverse of the covariance, (P, 3), and what eps2d leaves of its determinant: det without / det."""
    # In units of a constant, so that 1/det² is in range where 1/det is. No division by it: XLA merges divisions.
    largest = jnp.maximum(jnp.abs(screen.xx), jnp.abs(screen.yy))
    unit = jnp.exp2(-jnp.floor(jnp.log2(lax.stop_gradient(largest))))
    det, bare = screen.det * unit * unit, screen.bare * unit * unit
    adjugate = jnp.stack([screen.yy, -screen.xy, screen.xx]) * unit[None]
    return (adjugate / det[None] * unit[None]).T, bare / det


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
