"""The names and conventions of diff-gaussian-rasterization (Kerbl et al. 2023), on ``render_gaussians``.

What an image is, is the original's: matrices that act on rows, pixels whose centres are whole numbers, a near plane at
0.2, quaternions as they are, tiles that the square of three standard deviations meets. Gradients are the derivatives of
that, in the settings' arrays as well, where some of the original's are not; docs/splat.md lists where.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .core import checks
from .core.checks import Array, Implementation
from .core.snapshots import Saved, saving
from .ops.splat import harmonics, projection, render_gaussians

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer", "load_snapshot", "rasterize_gaussians"]

_NEAR = 0.2
_OF_SETTINGS = "raster_settings."
_OPTIONAL = ("means2D", "sh", "colors_precomp", "scales", "rotations", "cov3Ds_precomp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianRasterizationSettings:
    """A camera and how to draw. A pytree: functions of it can be jitted and differentiated.

    Attributes:
      image_height, image_width: of the image, static.
      tanfovx, tanfovy: tangents of half the field of view, which covariances on the screen are made with.
      bg: (3,), the background.
      scale_modifier: multiplies scales.
      viewmatrix: (4, 4), the transpose of world to camera: x to the right, y down, z forward.
      projmatrix: (4, 4), the transpose of world to clip space, which pixel positions are made with.
      sh_degree: 0 to 3, static.
      campos: (3,), the camera's place, from which directions for spherical harmonics are taken.
      prefiltered, debug: static. The first changes nothing. With the second, arguments are saved where something fails,
        see ``load_snapshot``.
      antialiasing: whether opacities make up for what is added to covariances on the screen, static.
    """

    image_height: int = dataclasses.field(metadata={"static": True})
    image_width: int = dataclasses.field(metadata={"static": True})
    tanfovx: float | Array
    tanfovy: float | Array
    bg: Array
    scale_modifier: float | Array
    viewmatrix: Array
    projmatrix: Array
    sh_degree: int = dataclasses.field(metadata={"static": True})
    campos: Array
    prefiltered: bool = dataclasses.field(metadata={"static": True})
    debug: bool = dataclasses.field(metadata={"static": True})
    antialiasing: bool = dataclasses.field(default=False, metadata={"static": True})


_STATIC = [f.name for f in dataclasses.fields(GaussianRasterizationSettings) if f.metadata.get("static")]


@dataclasses.dataclass(frozen=True)
class GaussianRasterizer:
    """``rasterize_gaussians`` with settings; called with keywords as the original is."""

    raster_settings: GaussianRasterizationSettings

    def __call__(
        self,
        means3D: Array,
        means2D: Array,
        opacities: Array,
        shs: Array | None = None,
        colors_precomp: Array | None = None,
        scales: Array | None = None,
        rotations: Array | None = None,
        cov3D_precomp: Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See ``rasterize_gaussians``.

        Raises:
          ValueError: unless exactly one of shs and colors_precomp is given, and exactly one of scales with rotations
            and cov3D_precomp.
        """
        return rasterize_gaussians(
            means3D,
            means2D,
            shs,
            colors_precomp,
            opacities,
            scales,
            rotations,
            cov3D_precomp,
            self.raster_settings,
        )

    def mark_visible(self, positions: Array) -> jax.Array:
        """Which of the positions (P, 3) lie behind the near plane, as the camera looks: (P,) bool."""
        viewmat = jnp.asarray(self.raster_settings.viewmatrix)
        return _rows_times(jnp.asarray(positions), viewmat)[:, 2] > _NEAR

    markVisible = mark_visible


def rasterize_gaussians(
    means3D: Array,
    means2D: Array | None,
    sh: Array | None,
    colors_precomp: Array | None,
    opacities: Array,
    scales: Array | None,
    rotations: Array | None,
    cov3Ds_precomp: Array | None,
    raster_settings: GaussianRasterizationSettings,
    *,
    capacity: int | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """An image of Gaussians and their radii, by the original's conventions; differentiable in all float arrays.

    Args:
      means3D: (P, 3). means2D: (P, 3) or None: its value is ignored, its gradient is that in the projected mean, in
        normalised device coordinates: the gradient in pixels times (width/2, height/2), and 0.
      sh: (P, M, 3) coefficients, or None with colors_precomp, (P, 3).
      opacities: (P, 1) or (P,).
      scales: (P, 3) and rotations: (P, 4), scalar first and not normalised, or None with cov3Ds_precomp: (P, 6), the
        entries xx, xy, xz, yy, yz, zz of covariances.
      raster_settings: the camera.
      capacity, implementation: as of ``render_gaussians``.

    Returns:
      color (3, height, width), and radii (P,) int32, as of ``render_gaussians``.

    Raises:
      ValueError: for arguments that are missing or given twice, and shapes; with ``debug`` under vmap, shard_map,
        forward mode and in second order. TypeError: for dtypes.
    """
    s = raster_settings
    if (sh is None) == (colors_precomp is None):
        raise ValueError("Please provide exactly one of either SHs or precomputed colors!")
    if [a is None for a in (scales, rotations)] != [cov3Ds_precomp is not None] * 2:
        raise ValueError("Please provide exactly one of either scale/rotation pair or precomputed 3D covariance!")
    given = _arrays(
        means3D=means3D,
        means2D=means2D,
        sh=sh,
        colors_precomp=colors_precomp,
        opacities=opacities,
        scales=scales,
        rotations=rotations,
        cov3Ds_precomp=cov3Ds_precomp,
    )
    means = given["means3D"]
    P, dtype = means.shape[0], means.dtype
    camera = {
        name: jnp.asarray(getattr(s, name), dtype)
        for name in ("tanfovx", "tanfovy", "bg", "scale_modifier", "viewmatrix", "projmatrix", "campos")
    }
    expected = {"bg": (3,), "viewmatrix": (4, 4), "projmatrix": (4, 4), "campos": (3,)}
    for name, a in camera.items():
        if a.shape != expected.get(name, ()):
            raise ValueError(f"{name} of the settings has shape {a.shape}, expected {expected.get(name, ())}.")
    if s.debug:
        arrays = given | {_OF_SETTINGS + name: a for name, a in camera.items()}
        static = tuple((name, getattr(s, name)) for name in _STATIC)
        call = _Call(tuple(arrays), static, capacity, implementation)
        files = "snapshot_fw.npz", "snapshot_bw.npz"
        saved = tuple((_OF_SETTINGS + name, value) for name, value in static)
        color, radii = saving(Saved(call, tuple(arrays), *files, saved), *arrays.values())
        return color, radii

    W, H = s.image_width, s.image_height
    size = jnp.array([W, H], dtype)
    focal = size / 2 / jnp.stack([camera["tanfovx"], camera["tanfovy"]])
    K = jnp.zeros((3, 3), dtype).at[(0, 1), (0, 1)].set(focal).at[(0, 1), (2, 2)].set(size / 2).at[2, 2].set(1)
    colors = given["colors_precomp"] if sh is None else _seen_from(camera["campos"], means, given["sh"], s.sh_degree)
    color, _, _, radii = render_gaussians(
        means,
        None,
        None,
        given["opacities"].reshape(P),
        colors,
        camera["viewmatrix"].T,
        K,
        W,
        H,
        background=camera["bg"],
        covariances=_covariances(given, camera["scale_modifier"]),
        near=_NEAR,
        antialiased=s.antialiasing,
        extent="3sigma",
        means2d_offset=_offsets(means, given.get("means2D"), camera, focal, size),
        capacity=capacity,
        implementation=implementation,
    )
    return color.transpose(2, 0, 1), radii


def load_snapshot(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved because something failed: arguments of ``rasterize_gaussians`` by name, to be called again.

    With ``debug`` in the settings, arguments are written to ``snapshot_fw.npz`` in the working directory before an
    image is drawn, and to ``snapshot_bw.npz`` before gradients are, and removed afterwards. They stay, and an error
    names the file, where results are not finite although arguments are; and they stay where a kernel fails. That of
    gradients has the image's cotangent (3, height, width) too, as "cotangent", which is to be taken out before.

    Raises:
      OSError: where the file cannot be read. KeyError: where it is no such snapshot.
    """
    with np.load(path) as saved:
        values = dict(saved)
    arrays = {name: jnp.asarray(a) for name, a in values.items() if not name.startswith(_OF_SETTINGS)}
    settings: dict[str, Any] = {
        name: values[_OF_SETTINGS + name].item() if name in _STATIC else jnp.asarray(values[_OF_SETTINGS + name])
        for name in (field.name for field in dataclasses.fields(GaussianRasterizationSettings))
    }
    missing: dict[str, Any] = dict.fromkeys(_OPTIONAL)
    return missing | arrays | {"raster_settings": GaussianRasterizationSettings(**settings)}


@dataclasses.dataclass(frozen=True)
class _Call:
    """``rasterize_gaussians`` as a function of arrays that are named."""

    names: tuple[str, ...]
    static: tuple[tuple[str, Any], ...]
    capacity: int | None
    implementation: Implementation

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        given: dict[str, Any] = dict(zip(self.names, arrays, strict=True))
        camera: dict[str, Any] = {
            name.removeprefix(_OF_SETTINGS): given.pop(name) for name in self.names if name.startswith(_OF_SETTINGS)
        }
        settings = GaussianRasterizationSettings(**camera, **dict(self.static) | {"debug": False})
        given = dict.fromkeys(_OPTIONAL) | given | {"raster_settings": settings}
        return rasterize_gaussians(**given, capacity=self.capacity, implementation=self.implementation)


def _arrays(**given: Any) -> dict[str, jax.Array]:
    """Those that are given, of one float dtype and of the right shapes."""
    some = checks.floats(**{name: a for name, a in given.items() if a is not None})
    means = some["means3D"]
    if means.ndim != 2 or means.shape[1] != 3:
        raise ValueError(f"means3D has shape {means.shape}, expected (P, 3). For several scenes use jax.vmap.")
    P = means.shape[0]
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        "means2D": ((P, 3),),
        "colors_precomp": ((P, 3),),
        "opacities": ((P, 1), (P,)),
        "scales": ((P, 3),),
        "rotations": ((P, 4),),
        "cov3Ds_precomp": ((P, 6),),
    }
    for name, a in some.items():
        if name in expected and a.shape not in expected[name]:
            raise ValueError(f"{name} has shape {a.shape}, expected {' or '.join(map(str, expected[name]))}.")
        if name == "sh" and (a.ndim != 3 or (a.shape[0], a.shape[2]) != (P, 3)):
            raise ValueError(f"sh has shape {a.shape}, expected ({P}, M, 3).")
    return some


def _rows_times(points: jax.Array, matrix: jax.Array) -> jax.Array:
    """[x, y, z, 1] matrix, by sums: matrix units would round."""
    return (points[:, :, None] * matrix[None, :3]).sum(1) + matrix[None, 3]


def _covariances(given: dict[str, jax.Array], scale_modifier: jax.Array) -> jax.Array:
    """(P, 3, 3); NaN, which is not drawn, where they are not finite."""
    if "cov3Ds_precomp" in given:
        xx, xy, xz, yy, yz, zz = given["cov3Ds_precomp"].T
        return jnp.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).reshape(-1, 3, 3)
    rotations, scales = given["rotations"], given["scales"]
    finite = jnp.isfinite(rotations).all(-1) & jnp.isfinite(scales).all(-1)
    axes = projection.axes(jnp.where(finite[None], rotations.T, 0), 2.0)
    half = axes * (scale_modifier * jnp.where(finite[None], scales.T, 0))[:, None]
    matrices = (half[:, :, None] * half[:, None]).sum(0).transpose(2, 0, 1)
    return jnp.where(finite[:, None, None], matrices, jnp.nan)


def _seen_from(campos: jax.Array, means: jax.Array, sh: jax.Array, degree: int) -> jax.Array:
    """Colours in the direction from the camera; NaN, which is not drawn, where they are not finite."""
    degree, count = checks.static_integer("sh_degree", degree), (degree + 1) ** 2
    if not 0 <= degree <= 3 or sh.shape[1] < count:
        raise ValueError(
            f"sh_degree is {degree} and sh has shape {sh.shape}, expected a degree of 0 to 3 and (degree + 1)² or more "
            "coefficients."
        )
    sight = means - campos[None]
    length = jnp.square(sight).sum(-1, keepdims=True)
    usable = jnp.isfinite(length) & (length > 0)
    sight = jnp.where(usable, sight, 1)
    directions = sight / jnp.sqrt(jnp.square(sight).sum(-1, keepdims=True))
    colors, finite = harmonics.colors(sh[:, :count], directions.T, degree)
    return jnp.where((usable[:, 0] & finite)[:, None], colors, jnp.nan)


def _offsets(
    means: jax.Array, means2D: jax.Array | None, camera: dict[str, jax.Array], focal: jax.Array, size: jax.Array
) -> jax.Array:
    """From where ``render_gaussians`` puts projected means to where projmatrix does; and means2D's slot."""
    finite = jnp.isfinite(means).all(-1, keepdims=True)
    means = jnp.where(finite, means, 0)
    seen = _rows_times(means, camera["viewmatrix"])[:, :3]
    seen = jnp.where(finite & (seen[:, 2:] > _NEAR), seen, 1)
    clip = _rows_times(means, camera["projmatrix"])
    w = clip[:, 3:] + 1e-7
    # In pixels whose centres are whole numbers and a half: half a pixel more than the original's.
    half = size[None] / 2
    position = (clip[:, :2] / jnp.where(w == 0, 1, w) + 1) * half
    offset = position - (focal[None] * seen[:, :2] / seen[:, 2:] + half)
    if means2D is None:
        return offset
    slot = jnp.where(jnp.isfinite(means2D), means2D, 0)[:, :2]
    return offset + (slot - jax.lax.stop_gradient(slot)) * half
