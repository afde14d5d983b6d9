"""A picture of a mesh: orthographic, two views side by side, shaded from its normals and its depth."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from scipy.ndimage import gaussian_filter

BASE = np.array([0.93, 0.71, 0.45])  # linear-light colour of the surface, a warm clay
SKY = np.array([0.75, 0.85, 1.0])


def _view(azimuth: float, elevation: float, up: int) -> np.ndarray:
    """Rows right, up and towards the viewer, in degrees around the axis `up`."""
    a, e = np.radians([azimuth, elevation])
    towards = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    return np.roll(np.stack([right, np.cross(towards, right), towards]), up - 2, axis=1)


def _hits(corners: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Front triangle (size,size), -1 where there is none, its barycentrics (size,size,3), and depth (size,size).

    corners: (T,3,3) in pixels, the last axis being right, down, towards the viewer.
    """
    edges = corners[:, 1:, :2] - corners[:, :1, :2]
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    first = np.floor(corners[:, :, :2].min(axis=1)).astype(int)
    extent = np.floor(corners[:, :, :2].max(axis=1)).astype(int) - first
    found = []
    # Back faces of a closed mesh are hidden. The triangles that are left span few pixels: loop over the pixels of
    # a box, vectorised over the triangles.
    live = np.flatnonzero(area < -1e-12)
    for i in range(extent[live, 0].max() + 1):
        live = live[extent[live, 0] >= i]
        tall = live
        for j in range(extent[live, 1].max() + 1):
            t = tall = tall[extent[tall, 1] >= j]
            pixel = first[t] + (i, j)
            d = pixel + 0.5 - corners[t, 0, :2]
            b = (d[:, 0] * edges[t, 1, 1] - d[:, 1] * edges[t, 1, 0]) / area[t]
            c = (d[:, 1] * edges[t, 0, 0] - d[:, 0] * edges[t, 0, 1]) / area[t]
            keep = (b >= 0) & (c >= 0) & (b + c <= 1) & ((pixel >= 0) & (pixel < size)).all(axis=1)
            weights = np.stack([1 - b - c, b, c], axis=1)[keep]
            found.append((t[keep], pixel[keep], weights, (weights * corners[t[keep], :, 2]).sum(axis=1)))
    t, pixel, weights, depth = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(depth, kind="stable")  # the last assignment to a pixel wins: the nearest
    at = (pixel[order, 1], pixel[order, 0])
    front, bary, depths = np.full((size, size), -1), np.zeros((size, size, 3)), np.zeros((size, size))
    front[at], bary[at], depths[at] = t[order], weights[order], depth[order]
    return front, bary, depths


def _shade(mesh: trimesh.Trimesh, normals: np.ndarray, view: np.ndarray, size: int) -> np.ndarray:
    """One view as (size,size,3) in linear light, on white."""
    flat = mesh.vertices @ view.T
    low, high = flat.min(axis=0), flat.max(axis=0)
    scale = 0.9 * size / (high - low)[:2].max()
    screen = (flat - 0.5 * (low + high)) * scale * (1, -1, 1) + (size / 2, size / 2, 0)
    front, bary, depth = _hits(screen[mesh.faces], size)
    covered = front >= 0
    normal = (normals[mesh.faces[front[covered]]] * bary[covered][:, :, None]).sum(axis=1) @ view.T
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    key, fill = (np.array(light) / np.linalg.norm(light) for light in ((-0.5, 0.7, 0.8), (0.9, 0.1, 0.4)))
    half = key + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    light = 0.85 * np.maximum(normal @ key, 0)[:, None] + 0.18 * np.maximum(normal @ fill, 0)[:, None] * SKY
    light = light + 0.16 + 0.10 * normal[:, 1:2] * SKY
    # Hollows are darker: the depth there is behind its surroundings'.
    blur = partial(gaussian_filter, sigma=size / 60, truncate=2.0)
    around = blur(depth * covered) / np.maximum(blur(covered * 1.0), 1e-6)
    hollow = np.clip((around - depth)[covered] / (size / 40), 0, 1)[:, None]
    image = np.ones((size, size, 3))
    image[covered] = BASE * light * (1 - 0.45 * hollow) + 0.12 * (np.maximum(normal @ half, 0) ** 40)[:, None]
    return image


def render(
    mesh: trimesh.Trimesh, normals: np.ndarray, path: Path, up: int = 1, size: int = 720, oversample: int = 2
) -> None:
    """Writes a PNG of 2·size by size pixels: the mesh from the front and from behind; axis `up` is up.

    normals: (V,3) at the vertices, of any length: the field's gradients, as faces a pixel wide have poor ones.
    """
    panels = [_shade(mesh, normals, _view(azimuth, 25, up), size * oversample) for azimuth in (30, 210)]
    image = np.clip(np.concatenate(panels, axis=1), 0, 1)
    image = image.reshape(size, oversample, 2 * size, oversample, 3).mean(axis=(1, 3))
    Image.fromarray((255 * image ** (1 / 2.2) + 0.5).astype(np.uint8)).save(path)
