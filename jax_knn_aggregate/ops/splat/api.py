"""Images of 3D Gaussians: the public function."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ...core import checks
from ...core.batch import known
from ...core.checks import Array, Implementation
from . import projection
from .blend import blend
from .project import Lens, project

Extent = Literal["exact", "3sigma"]


class Rendering(NamedTuple):
    """What a camera sees of Gaussians.

    Attributes:
      image: (H, W, C), colours in front of the background.
      alpha: (H, W), 1 − transmittance behind the last Gaussian.
      depth: (H, W), Σ weight·z, with the weights that colours have in image: divided by alpha it is their mean depth.
      radii: (P,) int32, ⌈3 standard deviations⌉ on the screen along the ellipse's longer axis, in pixels; 0 where the
        Gaussian is not in front of the camera or that far from the image.
    """

    image: jax.Array
    alpha: jax.Array
    depth: jax.Array
    radii: jax.Array


def render_gaussians(
    means: Array,
    quats: Array | None,
    scales: Array | None,
    opacities: Array,
    colors: Array,
    viewmat: Array,
    K: Array,
    width: int,
    height: int,
    *,
    sh_degree: int | None = None,
    background: Array | None = None,
    covariances: Array | None = None,
    near: float = 0.01,
    far: float = math.inf,
    eps2d: float = 0.3,
    antialiased: bool = False,
    extent: Extent = "exact",
    means2d_offset: Array | None = None,
    capacity: int | None = None,
    implementation: Implementation = None,
) -> Rendering:
    """An image of 3D Gaussians, with its alpha and depth (Kerbl et al. 2023, "3D Gaussian splatting").

    Differentiable in every float array, the camera included, to any order, in forward and reverse mode; gradients are
    the derivatives of the formulas below, exactly, with the thresholds in them held. In float64, float32 is only the
    order of depths. For several cameras use ``jax.vmap``: what they share is not copied and gets the summed gradient.

    A Gaussian is projected with the derivative of the projection at its mean, where in this alone x/z is limited to
    ±1.3·width/(2 f_x) and y/z to ±1.3·height/(2 f_y). With d from the pixel's centre to its projected mean, its opacity
    there is α = min(0.99, opacity·exp(−½ dᵀ(Σ₂ + eps2d)⁻¹d)), 0 if that is below 1/255. From front to back, in the
    order of z rounded to float32 and then of the index, a Gaussian weighs α·T, and T, which begins as 1, goes to
    (1 − α)·T; the first that would make T less than 10⁻⁴, and all behind it, do not count.

    Args:
      means: (P, 3) in the world, float32 or float64, the dtype of all arrays here.
      quats: (P, 4) rotations from the Gaussian's axes to the world, scalar first, of any length but 0.
      scales: (P, 3) standard deviations along these axes.
      opacities: (P,).
      colors: (P, C), or with ``sh_degree`` (P, M, 3) coefficients of spherical harmonics, M >= (sh_degree + 1)²,
        of which the first (sh_degree + 1)² count: a colour is max(0, ½ + Σ coefficient·basis(direction)), in the
        direction from the camera's centre, inv(viewmat)[:3, 3], to the mean.
      viewmat: (4, 4), world to camera: x to the right, y down, z forward; its last row is (0, 0, 0, 1).
      K: (3, 3) intrinsics in pixels, of which f_x, f_y, c_x, c_y count; pixel (i, j), in column i and row j, has its
        centre at (i + ½, j + ½).
      width, height: of the image, static.
      sh_degree: 0 to 3, static; None for colours as they are.
      background: (C,), or None for 0.
      covariances: (P, 3, 3) in the world, of which the symmetric part counts, instead of quats and scales, which are
        None then.
      near, far: only Gaussians with near < z < far are drawn.
      eps2d: pixels², added to both variances on the screen.
      antialiased: whether to multiply opacities by the square root of what eps2d makes of det Σ₂, as if wider
        Gaussians had to be fainter: √max(2.5·10⁻⁵, det Σ₂ / det(Σ₂ + eps2d)).
      extent: "exact": a Gaussian counts wherever α >= 1/255. "3sigma": only in tiles of 16 × 16 pixels that the square
        of half-width ``radii`` around it meets, in columns trunc((u − r)/16) to trunc((u + r + 15)/16) − 1, with
        u = x − ½ of its pixel position, and rows likewise: as in Kerbl et al.
      means2d_offset: (P, 2) pixels added to projected means before all else, such as zeros, whose gradient is that on
        the screen, which densification asks for.
      capacity: how many pairs of a tile of 16 × 16 pixels and a Gaussian in it kernels list, static; None: 2 for each
        Gaussian and 384 for each tile, at most 2³⁰. Where there are more, every tile goes through all Gaussians: the
        result is the same, and comes later.
      implementation: None uses kernels where they exist, "xla" the pure-JAX reference; "ffi" raises
        NotImplementedError where the platform has no kernel.

    Returns:
      A Rendering. Gaussians of which something that counts is not finite, whose quaternion is 0, or whose covariance on
      the screen has determinant 0, also by underflow or overflow, are not drawn: no pixel, and no derivative, sees
      them, and the gradient in them is 0. With a viewmat or K that is not finite, none are.

    Raises:
      ValueError: for shapes, sizes and unknown options. TypeError: for dtypes and types.
    """
    checks.implementation(implementation)
    width, height = (_at_least(1, n, checks.static_integer(n, v)) for n, v in (("width", width), ("height", height)))
    if width * height >= 2**31:
        raise ValueError(
            f"width and height are {width} and {height}, expected fewer than 2**31 pixels. Split the image."
        )
    near, far, eps2d = _limits(near, far, eps2d)
    if extent not in get_args(Extent):
        raise ValueError(f"extent is {extent!r}, expected one of {', '.join(map(repr, get_args(Extent)))}.")
    if not isinstance(antialiased, bool | np.bool_):
        raise TypeError(f"antialiased is {antialiased!r}, expected True or False.")
    if capacity is not None:
        capacity = _at_least(1, "capacity", checks.static_integer("capacity", capacity))
    if sh_degree is not None:
        sh_degree = checks.static_integer("sh_degree", sh_degree)
        if not 0 <= sh_degree <= 3:
            raise ValueError(f"sh_degree is {sh_degree}, expected 0, 1, 2, 3, or None for colours as they are.")
    given = _arrays(
        means=means,
        quats=quats,
        scales=scales,
        covariances=covariances,
        opacities=opacities,
        colors=colors,
        viewmat=viewmat,
        K=K,
        background=background,
        means2d_offset=means2d_offset,
    )
    _check_shapes(given, sh_degree)
    means, colors = given["means"], given["colors"]

    camera, usable = projection.camera(given["viewmat"], given["K"], directions=sh_degree is not None)
    lens = Lens(width, height, near, far, eps2d, bool(antialiased), extent == "3sigma")
    seen = project(lens, given, sh_degree, camera, usable, implementation)
    opacities, channels, radii = seen.opacities, seen.channels, seen.radii
    if sh_degree is None:
        finite = jnp.isfinite(colors).all(-1)
        opacities, radii = (jnp.where(finite, a, jnp.zeros_like(a)) for a in (opacities, radii))
        channels = jnp.concatenate([jnp.where(finite[:, None], colors, 0), channels[:, None]], -1)

    C = channels.shape[-1] - 1
    behind = given.get("background", jnp.zeros(C, means.dtype))
    image, alpha = blend(
        seen.means2d,
        seen.conics,
        opacities,
        channels,
        jnp.concatenate([behind, jnp.zeros(1, means.dtype)]),
        seen.depths,
        seen.reach,
        width=width,
        height=height,
        capacity=capacity,
        implementation=implementation,
    )
    return Rendering(image[..., :C], alpha, image[..., C], radii)


# Arguments.


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}.")
    return value


def _limits(near: Any, far: Any, eps2d: Any) -> tuple[float, float, float]:
    for name, value in (("near", near), ("far", far), ("eps2d", eps2d)):
        if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected a Python number: it is static.")
    if not 0 <= near < math.inf:
        raise ValueError(f"near is {near}, expected 0 <= near: behind the camera nothing is seen.")
    if not near < far:
        raise ValueError(f"far is {far}, expected more than near, which is {near}.")
    if not 0 <= eps2d < math.inf:
        raise ValueError(f"eps2d is {eps2d}, expected 0 <= eps2d, in pixels².")
    return float(near), float(far), float(eps2d)


def _arrays(**given: Any) -> dict[str, jax.Array]:
    """Those that are given, all of one float dtype, by name."""
    if given["covariances"] is None:
        for name, other in (("quats", "scales"), ("scales", "quats")):
            if given[name] is None:
                raise ValueError(f"{name} is None, expected an array, as {other} is: or else pass covariances instead.")
    else:
        for name in ("quats", "scales"):
            if given[name] is not None:
                raise ValueError(f"{name} is given beside covariances, expected None: the shape would be given twice.")
    return checks.floats(**{name: a for name, a in given.items() if not (a is None and name in _OPTIONAL)})


_OPTIONAL = ("quats", "scales", "covariances", "background", "means2d_offset")


def _check_shapes(given: dict[str, jax.Array], sh_degree: int | None) -> None:
    means, colors = given["means"], given["colors"]
    if means.ndim != 2 or means.shape[1] != 3:
        raise ValueError(f"means has shape {means.shape}, expected (P, 3). For several scenes use jax.vmap.")
    P = means.shape[0]
    if known(P, 0) >= 2**31:
        raise ValueError(f"means has P = {P} points, expected fewer than 2**31. Split it.")
    if sh_degree is None:
        if colors.ndim != 2 or colors.shape[0] != P:
            hint = " With coefficients of spherical harmonics, pass sh_degree." if colors.ndim == 3 else ""
            raise ValueError(f"colors has shape {colors.shape}, expected ({P}, C).{hint}")
        C = colors.shape[1]
    else:
        least = (sh_degree + 1) ** 2
        if colors.ndim != 3 or (colors.shape[0], colors.shape[2]) != (P, 3) or colors.shape[1] < least:
            raise ValueError(
                f"colors has shape {colors.shape}, expected ({P}, M, 3) with M >= {least}, as sh_degree is {sh_degree}."
            )
        C = 3
    expected = {
        "quats": (P, 4),
        "scales": (P, 3),
        "covariances": (P, 3, 3),
        "opacities": (P,),
        "viewmat": (4, 4),
        "K": (3, 3),
        "background": (C,),
        "means2d_offset": (P, 2),
    }
    for name, shape in expected.items():
        if name in given and given[name].shape != shape:
            several = " For several cameras use jax.vmap." if name in ("viewmat", "K") else ""
            raise ValueError(f"{name} has shape {given[name].shape}, expected {shape}.{several}")
