"""Reading oriented points: a mesh (.ply .obj .off) or a point file (.xyz, or .ply without faces)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import trimesh
from scipy.spatial import cKDTree

SUFFIXES = (".ply", ".obj", ".off", ".xyz")
ORIENTED = ("x", "y", "z", "nx", "ny", "nz")
MIN_POINTS = 16


class ScanError(ValueError):
    """The input cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """A surface known beyond its samples: what a fit is measured against.

    sample(count, rng) -> points (N,3) and outward unit normals (N,3), uniform by area.
    distance(x (M,3)) -> unsigned distance (M,) to the surface and its unit normal (M,3) at the closest point.
    sdf(x (M,3)) -> exact signed distance (M,), negative inside; None when only the surface is known.
    """

    sample: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    distance: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    sdf: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Scan:
    """Oriented points (N,3), unit normals (N,3) that point outwards, in units of the bounding box diagonal.

    user = centre + diagonal * ours. `notes` are lines worth telling the user. `truth` is in our units.
    """

    name: str
    kind: str
    points: np.ndarray
    normals: np.ndarray
    centre: np.ndarray
    diagonal: float
    truth: Truth | None = None
    notes: tuple[str, ...] = ()


def read_scan(path: Path, count: int, rng: np.random.Generator) -> Scan:
    """Reads an oriented point file, or samples `count` oriented points from a mesh.

    Raises ScanError, with a one-line message, for whatever cannot be fitted.
    """
    if path.is_dir():
        raise ScanError(f"{path}: is a directory, not a file")
    if path.suffix.lower() not in SUFFIXES:
        raise ScanError(f"{path}: unknown type {path.suffix!r}, expected one of {' '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ScanError(f"{path}: no such file") from None
    except OSError as error:
        raise ScanError(f"{path}: {error.strerror}") from None
    if not data.strip():
        raise ScanError(f"{path}: the file is empty")
    try:
        if path.suffix.lower() == ".xyz":
            return _from_points(path.name, *_read_xyz(data))
        if path.suffix.lower() == ".ply":
            ply = _Ply(data)
            if not ply.count("face"):
                return _from_points(path.name, *ply.oriented_points())
        if path.suffix.lower() == ".off":
            _check_off(data)
        return _from_geometry(path, _load(path), count, rng)
    except ScanError as error:
        raise ScanError(f"{path}: {error}") from None


def normalisation(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (3,) and diagonal of the bounding box of points (N,3). Raises ScanError where there is no usable one."""
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        raise ScanError(f"{bad.sum()} of {len(bad)} points have NaN or infinite coordinates (first: {bad.argmax()})")
    low, high = points.min(axis=0), points.max(axis=0)
    with np.errstate(over="ignore"):
        diagonal = float(np.linalg.norm(high - low))
    if not np.isfinite(diagonal):
        raise ScanError("the bounding box is too large for floating point numbers")
    # Below this the coordinates are one point and its rounding errors.
    if diagonal <= 1e-12 * np.abs(points).max() or diagonal < 1e-150:
        raise ScanError("all points coincide")
    return low + 0.5 * (high - low), diagonal


def _from_points(name: str, points: np.ndarray, normals: np.ndarray) -> Scan:
    if len(points) < MIN_POINTS:
        raise ScanError(f"{len(points)} points, at least {MIN_POINTS} are needed")
    centre, diagonal = normalisation(points)
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(normals, axis=1)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        raise ScanError(f"{bad.sum()} of {len(bad)} normals are zero, NaN or infinite (first: {bad.argmax()})")
    points, normals = (points - centre) / diagonal, normals / lengths[:, None]
    distinct = len(np.unique(points, axis=0))
    if distinct < MIN_POINTS:
        raise ScanError(f"only {distinct} distinct points, at least {MIN_POINTS} are needed")
    notes: tuple[str, ...] = ()
    # The volume is the integral of x·n / 3 over the surface, so its sign tells inside from outside.
    if (points * normals).sum() < 0:
        normals, notes = -normals, ("the normals point inwards: flipped",)
    return Scan(name, "points", points, normals, centre, diagonal, notes=notes)


def _from_geometry(path: Path, geometry: Any, count: int, rng: np.random.Generator) -> Scan:
    if not len(getattr(geometry, "faces", ())):
        raise ScanError("no faces, and points without normals")
    faces = np.asarray(geometry.faces)
    vertices = np.asarray(geometry.vertices, dtype=np.float64)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ScanError(f"a face refers to vertex {faces.max()}, but there are {len(vertices)}")
    used = np.unique(faces)  # a stray vertex must not stretch the bounding box
    centre, diagonal = normalisation(vertices[used])
    mesh = trimesh.Trimesh((vertices[used] - centre) / diagonal, np.searchsorted(used, faces), process=True)
    if not mesh.area > 1e-9:
        raise ScanError("the faces have no area")
    notes = []
    if not (mesh.is_watertight and mesh.is_winding_consistent):
        notes.append("the mesh is not closed and consistently oriented: the surface is completed where it is open")
    a, b, c = np.moveaxis(np.asarray(mesh.triangles), 1, 0)
    if (a * np.cross(b, c)).sum() < 0:  # six volumes; trimesh's own divides by it, and a sheet has none
        mesh.invert()
        notes.append("the faces point inwards: flipped")
    truth = mesh_truth(mesh, rng)
    return Scan(path.name, "mesh", *truth.sample(count, rng), centre, diagonal, truth, tuple(notes))


def mesh_truth(mesh: trimesh.Trimesh, rng: np.random.Generator, samples: int = 200_000, candidates: int = 8) -> Truth:
    """Truth of a mesh. Its distances are exact point-triangle ones, to the triangles of the closest surface samples."""

    def sample(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        points, face = trimesh.sample.sample_surface(mesh, count, seed=rng)
        return np.asarray(points), mesh.face_normals[face]

    points, face = trimesh.sample.sample_surface(mesh, samples, seed=rng)
    tree = cKDTree(points)

    def distance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return closest_of(mesh, face[tree.query(x, k=candidates)[1]], x)

    return Truth(sample, distance)


def closest_of(mesh: trimesh.Trimesh, faces: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances (M,) of x (M,3) to the closest of its candidate faces (M,C), and that face's normals (M,3)."""
    closest = trimesh.triangles.closest_point(mesh.triangles[faces.ravel()], np.repeat(x, faces.shape[1], axis=0))
    gaps = np.linalg.norm(closest.reshape(*faces.shape, 3) - x[:, None], axis=-1)
    best = gaps.argmin(axis=1)[:, None]
    return np.take_along_axis(gaps, best, 1)[:, 0], mesh.face_normals[np.take_along_axis(faces, best, 1)[:, 0]]


def _read_xyz(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    # Not trimesh: it reads a 6-column .xyz as points with colours.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a file of comments only; refused below
            table = np.loadtxt(data.decode("utf-8-sig").splitlines(), dtype=np.float64, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise ScanError(f"malformed: {str(error).splitlines()[0]}") from None
    if table.shape[0] == 0:
        raise ScanError("no points")
    if table.shape[1] == 3:
        raise ScanError("points without normals: expected six columns x y z nx ny nz")
    if table.shape[1] != 6:
        raise ScanError(f"{table.shape[1]} columns, expected six: x y z nx ny nz")
    return table[:, :3], table[:, 3:]


def _load(path: Path) -> Any:
    """The file as trimesh's mesh or point cloud."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is checked on the result
            scene = trimesh.load(path, process=False)
            if not isinstance(scene, trimesh.Scene):
                return scene
            return scene.to_geometry() if hasattr(scene, "to_geometry") else scene.dump(concatenate=True)
    except Exception as error:  # trimesh raises whatever its parsers stumble over
        raise ScanError(f"malformed: {' '.join(str(error).split()) or type(error).__name__}") from None


def _check_off(data: bytes) -> None:
    """Refuses an .off whose header promises more vertices or faces than follow: trimesh would read what is there."""
    lines = (line.split(b"#")[0].split() for line in data.splitlines())
    tokens = [line for line in lines if line]
    if not tokens or not tokens[0][0].upper().endswith(b"OFF"):
        raise ScanError("malformed: the header does not start with OFF")
    body = ([tokens[0][1:]] if tokens[0][1:] else []) + tokens[1:]  # the counts may stand beside OFF
    try:
        vertices, faces = (int(count) for count in body[0][:2])
    except (IndexError, ValueError):
        raise ScanError("malformed: no vertex and face counts in the header") from None
    if len(body) - 1 < vertices + faces:
        raise ScanError(
            f"truncated: the header promises {vertices} vertices and {faces} faces, {len(body) - 1} lines follow"
        )
    for number, line in enumerate(body[1 + vertices : 1 + vertices + faces]):
        if not line[0].isdigit() or len(line) < 1 + int(line[0]):
            raise ScanError(f"malformed: face {number} does not list the vertices it announces")


_PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
              "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
              "float32": "f4", "float64": "f8"}  # fmt: skip


class _Ply:
    """Header of a .ply, checked against what follows: trimesh reads a truncated file as a small cloud without an error.

    Faces are left to trimesh; points come from here, as trimesh keeps their normals in no public place.
    """

    def __init__(self, data: bytes):
        head, mark, rest = data.partition(b"end_header")
        if not data.startswith(b"ply") or not mark:
            raise ScanError("malformed: no complete ply header")
        self.body = rest.partition(b"\n")[2]
        self.encoding = ""
        # Elements: (name, count, [(property, type)] or [(property, type of the length, type of an entry)]).
        self.elements: list[tuple[str, int, list[tuple[str, ...]]]] = []
        line = ""
        try:
            for line in head.decode("ascii", "replace").splitlines():
                words = line.split()
                if words[:1] == ["format"]:
                    self.encoding = words[1]
                elif words[:1] == ["element"]:
                    self.elements.append((words[1], int(words[2]), []))
                elif words[:1] == ["property"]:
                    types = words[2:4] if words[1] == "list" else words[1:2]
                    self.elements[-1][2].append((words[-1], *(_PLY_TYPES[word] for word in types)))
        except (IndexError, KeyError, ValueError):
            raise ScanError(f"malformed: bad line in the ply header: {line.strip()!r}") from None
        orders = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
        if self.encoding not in orders:
            raise ScanError(f"malformed: unknown ply format {self.encoding!r}")
        self.order = orders[self.encoding]
        self._check_length()

    def count(self, name: str) -> int:
        return sum(count for element, count, _ in self.elements if element == name)

    def oriented_points(self) -> tuple[np.ndarray, np.ndarray]:
        at = 0
        for name, count, properties in self.elements:
            if name == "vertex":
                break
            at += count if self.encoding == "ascii" else self._size(at, count, properties)
        else:
            raise ScanError("no vertices")
        names = [property[0] for property in properties]
        missing = [column for column in ORIENTED if column not in names]
        if missing:
            raise ScanError(f"points without normals (no faces, and no vertex property {' '.join(missing)})")
        if any(len(property) > 2 for property in properties):
            raise ScanError("vertices with list properties are not supported")
        if self.encoding == "ascii":
            lines = [line for line in self.body.decode("ascii", "replace").splitlines() if line.strip()]
            try:
                values = np.loadtxt(lines[at : at + count], dtype=np.float64, ndmin=2, usecols=range(len(names)))
            except ValueError as error:
                raise ScanError(f"malformed: {str(error).splitlines()[0]}") from None
            columns = dict(zip(names, values.T, strict=True))
        else:
            record = np.dtype([(name, self.order + code) for name, code in properties])
            records = np.frombuffer(self.body, record, count, at)
            columns = {name: records[name].astype(np.float64) for name in names}
        table = np.stack([columns[name] for name in ORIENTED], axis=1)
        return table[:, :3], table[:, 3:]

    def _check_length(self) -> None:
        if self.encoding == "ascii":
            promised = sum(count for _, count, _ in self.elements)
            found = sum(1 for line in self.body.splitlines() if line.strip())
            if found < promised:
                raise ScanError(f"truncated: the header promises {promised} elements, {found} lines follow")
            return
        at = 0
        for name, count, properties in self.elements:
            at += self._size(at, count, properties)
            if at > len(self.body):
                raise ScanError(f"truncated: the header promises {count} of {name}, the file ends before")

    def _size(self, at: int, count: int, properties: list[tuple[str, ...]]) -> int:
        """Bytes of `count` elements that start at `at`; more than there are if the file ends within them."""
        if all(len(property) == 2 for property in properties):
            return count * sum(int(code[1:]) for _, code in properties)
        start = at
        for _ in range(count):
            for _, *codes in properties:
                length = 1
                if len(codes) == 2:
                    width = int(codes[0][1:])
                    order: Literal["little", "big"] = "big" if self.order == ">" else "little"
                    length = int.from_bytes(self.body[at : at + width], order)
                    at += width
                at += length * int(codes[-1][1:])
            if at > len(self.body):
                break
        return at - start
