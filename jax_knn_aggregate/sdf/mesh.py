"""From a trained field to a closed mesh, and what both are worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import trimesh
from scipy.ndimage import zoom
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from .model import SignedDistance, value_and_gradient
from .scan import Scan, closest_of
from .train import bounds

Field = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


_compiled = eqx.filter_jit(value_and_gradient)


def evaluator(model: SignedDistance, chunk: int = 8192) -> Field:
    """x (M,3) -> distances (M,) and gradients (M,3), in chunks of one shape so that XLA compiles once."""

    def field(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.concatenate([x, np.repeat(x[:1], -len(x) % chunk, axis=0)]).astype(np.float32)
        parts = [_compiled(model, jnp.asarray(part)) for part in padded.reshape(-1, chunk, 3)]
        value, gradient = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
        return value[: len(x)], gradient[: len(x)]

    return field


def extract(field: Field, scan: Scan, cells: int) -> trimesh.Trimesh:
    """Closed mesh of the zero level, about `cells` grid cells along the longest side. Raises ValueError if none."""
    low, high = bounds(scan)
    levels = max(0, int(np.log2(cells / 32)))  # double until the grid is as fine as asked
    step = float((high - low).max()) / cells * 2**levels
    shape = np.ceil((high - low) / step).astype(int) + 1
    corners = low + step * np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    value = field(corners.reshape(-1, 3))[0].reshape(shape)
    for _ in range(levels):
        # The field is close to a distance, so only nodes within two old cells can be on either side of the surface.
        # The others keep an interpolated value, which has the sign of the nodes around it.
        step /= 2
        value = zoom(value, [(2 * n - 1) / n for n in value.shape], order=1, grid_mode=False)
        node = np.argwhere(np.abs(value) < 4 * step)
        value[tuple(node.T)] = field(low + step * node)[0]
    # Closed at the border, and no vertex on a grid node, where triangles would degenerate.
    value = np.pad(value, 1, constant_values=step)
    value = np.where(np.abs(value) < 1e-3 * step, np.copysign(1e-3 * step, value), value)
    if not (value < 0).any():
        raise ValueError("the field is nowhere negative: nothing to extract")
    vertices, faces, _, _ = marching_cubes(value, 0.0, gradient_direction="descent")
    vertices = low + step * (vertices.astype(np.float64) - 1)
    return _without_strays(trimesh.Trimesh(vertices, faces, process=False), scan)


def _without_strays(mesh: trimesh.Trimesh, scan: Scan) -> trimesh.Trimesh:
    """The mesh without closed components that are nearest to no scan point: bubbles of the coarse field."""
    parts = trimesh.graph.connected_components(mesh.face_adjacency, nodes=np.arange(len(mesh.faces)))
    seen = np.zeros(len(mesh.faces), bool)
    seen[cKDTree(mesh.triangles_center).query(scan.points)[1]] = True
    kept = [part for part in parts if seen[part].any()]
    used, faces = np.unique(mesh.faces[np.concatenate(kept)], return_inverse=True)
    return trimesh.Trimesh(mesh.vertices[used], faces.reshape(-1, 3), process=False)


def write_ply(mesh: trimesh.Trimesh, path: Path) -> None:
    """Binary .ply in double precision: trimesh writes floats, which fold a mesh far from the origin onto itself."""
    faces = np.zeros(len(mesh.faces), [("count", "u1"), ("index", "<i4", (3,))])
    faces["count"], faces["index"] = 3, mesh.faces
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(mesh.vertices)}\n"
        "property double x\nproperty double y\nproperty double z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    path.write_bytes(header.encode() + np.asarray(mesh.vertices, "<f8").tobytes() + faces.tobytes())


DEFINITIONS = {
    "unit": "lengths are in per cent of the input's bounding box diagonal (_pct_diag)",
    "chamfer_pct_diag": "mean of the two mean distances, mesh samples to true surface and true samples to mesh",
    "f_score_1pct": "harmonic mean of the shares of either surface's samples within 1 % of the diagonal of the other",
    "normal_consistency": "mean |cosine| between normals at samples and at their closest points, over both directions",
    "points_to_surface_mean_pct_diag": "mean distance of the input points to the mesh",
    "eikonal_error_near": "mean | |grad sdf| - 1 | at surface points moved by normal noise of 1 % of the diagonal",
    "eikonal_error_box": "the same, uniform in the bounding box with its margin",
    "sdf_error_near_pct_diag": "mean |sdf - exact sdf| at the positions of eikonal_error_near",
    "sdf_error_box_pct_diag": "the same, at the positions of eikonal_error_box",
    "vertex_error_mean_pct_diag": "mean exact distance of the mesh vertices from the true surface",
    "vertex_error_max_pct_diag": "largest exact distance of a mesh vertex from the true surface",
}


def evaluate(
    mesh: trimesh.Trimesh, field: Field, scan: Scan, rng: np.random.Generator, count: int = 50_000
) -> dict[str, Any]:
    """Metrics of a fit, in normalised units; see DEFINITIONS."""
    result: dict[str, Any] = {
        "watertight": bool(mesh.is_watertight),
        "components": len(trimesh.graph.connected_components(mesh.face_adjacency, nodes=np.arange(len(mesh.faces)))),
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
    }
    to_mesh = _mesh_distance(mesh)
    result["points_to_surface_mean_pct_diag"] = 100 * to_mesh(scan.points[:count])[0].mean()
    if scan.truth:
        ours, face = trimesh.sample.sample_surface(mesh, count, seed=rng)
        theirs, normals = scan.truth.sample(count, rng)
        accuracy, true_normals = scan.truth.distance(ours)
        completeness, mesh_normals = to_mesh(theirs)
        precision, recall = (accuracy < 0.01).mean(), (completeness < 0.01).mean()
        cosines = (mesh.face_normals[face] * true_normals).sum(axis=1), (mesh_normals * normals).sum(axis=1)
        result["chamfer_pct_diag"] = 50 * (accuracy.mean() + completeness.mean())
        result["f_score_1pct"] = 2 * precision * recall / max(precision + recall, 1e-12)
        result["normal_consistency"] = 0.5 * sum(np.abs(cosine).mean() for cosine in cosines)
    low, high = bounds(scan)
    near = scan.points[rng.integers(len(scan.points), size=count // 2)]
    positions = {
        "near": near + rng.normal(0, 0.01, near.shape),
        "box": rng.uniform(low, high, (count // 2, 3)),
    }
    for name, x in positions.items():
        value, gradient = field(x)
        result[f"eikonal_error_{name}"] = np.abs(np.linalg.norm(gradient, axis=1) - 1).mean()
        if scan.truth and scan.truth.sdf:
            result[f"sdf_error_{name}_pct_diag"] = 100 * np.abs(value - scan.truth.sdf(x)).mean()
    if scan.truth and scan.truth.sdf:
        error = np.abs(scan.truth.sdf(np.asarray(mesh.vertices)))
        result["vertex_error_mean_pct_diag"] = 100 * error.mean()
        result["vertex_error_max_pct_diag"] = 100 * error.max()
    return {name: number if isinstance(number, (bool, int)) else float(number) for name, number in result.items()}


def _mesh_distance(mesh: trimesh.Trimesh, candidates: int = 12) -> Field:
    """x (M,3) -> distances (M,) to a mesh of small even triangles, and the normals of the closest ones."""
    tree = cKDTree(mesh.triangles_center)

    def distance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return closest_of(mesh, tree.query(x, k=min(candidates, len(mesh.faces)))[1], x)

    return distance
