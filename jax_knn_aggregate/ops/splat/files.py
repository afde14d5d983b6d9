"""Gaussians in .ply files, as 3D Gaussian splatting writes them (Kerbl et al. 2023), and most viewers read them.

A vertex is a Gaussian: x, y, z; f_dc_0 to 2, the coefficients of degree 0; f_rest_k, the others, those of a colour
behind each other; opacity, of which the sigmoid is meant; scale_0 to 2, of which the exponential is meant; rot_0 to 3,
scalar first. Other properties, such as normals, are left out in reading and 0 in writing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...core.checks import Array

_POSITION, _NORMAL = ("x", "y", "z"), ("nx", "ny", "nz")
_SCALE, _ROTATION = tuple(f"scale_{i}" for i in range(3)), tuple(f"rot_{i}" for i in range(4))
_FIRST = tuple(f"f_dc_{i}" for i in range(3))


class Gaussians(NamedTuple):
    """The first arguments of ``render_gaussians``, in its order; a pytree.

    Attributes:
      means: (P, 3). quats: (P, 4), scalar first, of any length. scales: (P, 3). opacities: (P,), 0 to 1.
      colors: (P, M, 3), coefficients of spherical harmonics, M = (sh_degree + 1)².
    """

    means: jax.Array
    quats: jax.Array
    scales: jax.Array
    opacities: jax.Array
    colors: jax.Array

    @property
    def sh_degree(self) -> int:
        """0 to 3: what M holds."""
        return round(self.colors.shape[1] ** 0.5) - 1


def load_gaussians(path: str | os.PathLike[str]) -> Gaussians:
    """Gaussians from a .ply file, text or binary: float32. Needs ``pip install "jax_knn_aggregate[gaussians]"``.

    Raises:
      ValueError: where the file is not of this kind, in a line that names it and says what is missing.
      OSError: where it cannot be read.
    """
    plyfile = _plyfile()
    try:
        vertices = plyfile.PlyData.read(os.fspath(path))["vertex"].data
    except (plyfile.PlyParseError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no PLY file with vertices: {error}.") from error
    names = vertices.dtype.names or ()
    rest = [name for name in names if name.startswith("f_rest_")]
    counts = {3 * (n * n - 1) for n in (1, 2, 3, 4)}
    if len(rest) not in counts:
        raise ValueError(f"{path} has {len(rest)} properties f_rest_k, expected one of {sorted(counts)}.")
    order = [f"f_rest_{k}" for k in range(len(rest))]
    missing = [n for n in (*_POSITION, *_FIRST, *order, "opacity", *_SCALE, *_ROTATION) if n not in names]
    if missing:
        raise ValueError(f"{path} has vertices without {', '.join(missing)}, expected Gaussians as 3DGS writes them.")

    def columns(wanted: Sequence[str]) -> np.ndarray:
        none = np.empty((len(vertices), 0), np.float32)
        return np.stack([np.asarray(vertices[n], np.float32) for n in wanted], -1) if wanted else none

    others = columns(order).reshape(len(vertices), 3, len(rest) // 3).swapaxes(1, 2)
    logits = jnp.asarray(np.asarray(vertices["opacity"], np.float32))
    return Gaussians(
        means=jnp.asarray(columns(_POSITION)),
        quats=jnp.asarray(columns(_ROTATION)),
        scales=jnp.exp(jnp.asarray(columns(_SCALE))),
        opacities=jax.nn.sigmoid(logits),
        colors=jnp.asarray(np.concatenate([columns(_FIRST)[:, None], others], 1)),
    )


def save_gaussians(
    path: str | os.PathLike[str], means: Array, quats: Array, scales: Array, opacities: Array, colors: Array
) -> None:
    """Writes Gaussians to a binary .ply file, in float32: ``save_gaussians(path, *gaussians)``.

    Needs ``pip install "jax_knn_aggregate[gaussians]"``.

    Args:
      means: (P, 3). quats: (P, 4). scales: (P, 3), at least 0. opacities: (P,), 0 to 1.
      colors: (P, M, 3), M = 1, 4, 9 or 16 coefficients of spherical harmonics.

    Raises:
      ValueError: for shapes, and for scales and opacities outside of these ranges. OSError: where it cannot be written.
    """
    plyfile = _plyfile()
    given = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
    arrays = {name: np.asarray(a, np.float32) for name, a in given.items()}
    P = len(arrays["means"]) if arrays["means"].ndim else 0
    M = arrays["colors"].shape[1] if arrays["colors"].ndim == 3 else 0
    if M not in (1, 4, 9, 16):
        raise ValueError(f"colors has shape {arrays['colors'].shape}, expected ({P}, M, 3) with M one of 1, 4, 9, 16.")
    expected = {"means": (P, 3), "quats": (P, 4), "scales": (P, 3), "opacities": (P,), "colors": (P, M, 3)}
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, expected {shape}.")
    for name, least, most in (("scales", 0, np.inf), ("opacities", 0, 1)):
        if not ((arrays[name] >= least) & (arrays[name] <= most)).all():
            raise ValueError(f"{name} has values outside of {least} to {most}, or NaN, which the file cannot hold.")

    with np.errstate(divide="ignore"):  # of 0 and 1: infinity, which is read as 0 and 1 again
        logits = np.log(arrays["opacities"]) - np.log1p(-arrays["opacities"])
        logs = np.log(arrays["scales"])
    others = arrays["colors"][:, 1:].swapaxes(1, 2).reshape(P, 3 * (M - 1))
    rest = tuple(f"f_rest_{k}" for k in range(others.shape[1]))
    blocks: list[tuple[tuple[str, ...], Any]] = [
        (_POSITION, arrays["means"]),
        (_NORMAL, np.zeros((P, 3))),
        (_FIRST, arrays["colors"][:, 0]),
        (rest, others),
        (("opacity",), logits[:, None]),
        (_SCALE, logs),
        (_ROTATION, arrays["quats"]),
    ]
    vertices = np.empty(P, [(name, "<f4") for names, _ in blocks for name in names])
    for names, values in blocks:
        for i, name in enumerate(names):
            vertices[name] = values[:, i]
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(os.fspath(path))


def _plyfile() -> Any:
    try:
        import plyfile
    except ImportError as error:
        raise ImportError('.ply files need the package plyfile: pip install "jax_knn_aggregate[gaussians]"') from error
    return plyfile
