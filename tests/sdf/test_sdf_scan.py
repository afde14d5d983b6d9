"""Input that cannot be fitted: one clear line on stderr, exit code 2, nothing written."""

# ruff: noqa: E402  (the imports below need the extras)
import numpy as np
import pytest

for extra in ("equinox", "optax", "trimesh", "skimage", "scipy", "tqdm", "PIL"):
    pytest.importorskip(extra)

import trimesh

from jax_knn_aggregate.cli import main
from jax_knn_aggregate.sdf.scan import read_scan


def sphere(count=200):
    """x y z nx ny nz of points on the unit sphere, (count, 6)."""
    n = np.random.default_rng(0).normal(size=(count, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    return np.concatenate([n, n], axis=1)


def rows(table):
    return "".join(" ".join(f"{x:.9g}" for x in row) + "\n" for row in table)


def with_row(row, value):
    table = sphere()
    table[row] = value
    return table


def ply(encoding, count, names, payload, faces=0):
    header = f"ply\nformat {encoding} 1.0\nelement vertex {count}\n" + "".join(f"property float {n}\n" for n in names)
    if faces:
        header += f"element face {faces}\nproperty list uchar int vertex_indices\n"
    return (header + "end_header\n").encode() + payload


ORIENTED = ("x", "y", "z", "nx", "ny", "nz")
BINARY = "binary_little_endian"
BALL = trimesh.creation.icosphere(subdivisions=2)
BALL_PLY = BALL.export(file_type="ply")
BALL_OFF = BALL.export(file_type="off")
BALL_OFF = BALL_OFF if isinstance(BALL_OFF, bytes) else BALL_OFF.encode()
TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"

# name -> (file name, content, what the message must say)
BAD = {
    "empty xyz": ("a.xyz", b"", "empty"),
    "empty ply": ("a.ply", b"", "empty"),
    "blank xyz": ("a.xyz", b"\n \n", "empty"),
    "comments only": ("a.xyz", b"# nothing\n# here\n", "no points"),
    "words in xyz": ("a.xyz", b"hello world\n", "malformed"),
    "binary in xyz": ("a.xyz", bytes(range(256)), "malformed"),
    "ragged xyz": ("a.xyz", (rows(sphere()) + "1 2 3\n").encode(), "malformed"),
    "xyz without normals": ("a.xyz", rows(sphere()[:, :3]).encode(), "without normals"),
    "xyz of 4 columns": ("a.xyz", rows(sphere()[:, :4]).encode(), "4 columns"),
    "xyz with zero normals": ("a.xyz", rows(sphere() * (1, 1, 1, 0, 0, 0)).encode(), "normals are zero"),
    "xyz with NaN": ("a.xyz", rows(with_row(7, np.nan)).encode(), "1 of 200 points have NaN"),
    "xyz with infinity": ("a.xyz", rows(with_row(7, np.inf)).encode(), "1 of 200 points have NaN or infinite"),
    "xyz with a NaN normal": ("a.xyz", rows(with_row((7, 4), np.nan)).encode(), "1 of 200 normals"),
    "coincident xyz": ("a.xyz", rows(np.repeat(sphere(1), 200, axis=0)).encode(), "coincide"),
    "two places only": ("a.xyz", rows(np.repeat(sphere(2), 100, axis=0)).encode(), "2 distinct"),
    "too few points": ("a.xyz", rows(sphere(5)).encode(), "5 points"),
    "overflowing xyz": ("a.xyz", rows(sphere() * 1e300).encode(), "too large"),
    "ply of words": ("a.ply", b"hello\n", "header"),
    "ply cut in its header": ("a.ply", BALL_PLY[:40], "header"),
    "ply of unknown format": ("a.ply", ply("zip", 1, ORIENTED, b""), "format"),
    "ply with a bad count": ("a.ply", ply("ascii", "many", ORIENTED, b""), "bad line"),
    "ply cut in its faces": ("a.ply", BALL_PLY[:-50], "truncated"),
    "ply cut in its vertices": ("a.ply", BALL_PLY[:800], "truncated"),
    "ascii ply points cut": ("a.ply", ply("ascii", 300, ORIENTED, rows(sphere()).encode()), "truncated"),
    "binary ply points cut": ("a.ply", ply(BINARY, 300, ORIENTED, sphere().astype("<f4").tobytes()), "truncated"),
    "ply points without normals": (
        "a.ply",
        ply("ascii", 200, ORIENTED[:3], rows(sphere()[:, :3]).encode()),
        "without normals",
    ),
    "ply with words for numbers": ("a.ply", ply("ascii", 1, ORIENTED, b"a b c d e f\n"), "malformed"),
    "off of words": ("a.off", b"hello\n", "OFF"),
    "off without counts": ("a.off", b"OFF\n", "counts"),
    "off cut": ("a.off", BALL_OFF[: len(BALL_OFF) // 2], "truncated"),
    "off points only": ("a.off", ("OFF\n200 0 0\n" + rows(sphere()[:, :3])).encode(), "without normals"),
    "off with a short face": ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", "face 0"),
    "off with a wild index": ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n", ""),
    "obj of words": ("a.obj", b"hello\n", "no faces"),
    "obj points only": ("a.obj", TRIANGLE.encode(), "without normals"),
    "obj with a wild index": ("a.obj", (TRIANGLE + "f 1 2 9\n").encode(), ""),
    "obj with NaN": ("a.obj", (TRIANGLE + "v nan 0 0\nf 1 2 3\nf 1 2 4\n").encode(), "NaN"),
    "obj without area": ("a.obj", b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "no area"),
    "coincident obj": ("a.obj", b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "coincide"),
    "unknown type": ("a.stl", b"solid\n", "unknown type"),
}


def refuse(tmp_path, capsys, scan, words):
    out = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    assert main(["fit", str(scan), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jax-knn-aggregate: error: ") and captured.err.count("\n") == 1
    assert str(scan) in captured.err and words in captured.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused(tmp_path, capsys, case):
    name, content, words = BAD[case]
    scan = tmp_path / name
    scan.write_bytes(content)
    refuse(tmp_path, capsys, scan, words)


def test_missing_file_is_refused(tmp_path, capsys):
    refuse(tmp_path, capsys, tmp_path / "none.ply", "no such file")


def test_directory_is_refused(tmp_path, capsys):
    (tmp_path / "folder.ply").mkdir()
    refuse(tmp_path, capsys, tmp_path / "folder.ply", "directory")


def test_output_that_is_a_file_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["fit", "--out", str(tmp_path / "out")]) == 2
    assert "not a directory" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "option", ("--steps 0", "--points x", "--points 1", "--batch 1", "--cells 0", "--seed -1", "--shape none")
)
def test_bad_options_exit_with_2(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--out", str(tmp_path / "out"), *option.split()])
    assert stop.value.code == 2
    assert option.split()[0] in capsys.readouterr().err


def read(tmp_path, name, content, count=500):
    path = tmp_path / name
    path.write_bytes(content)
    return read_scan(path, count, np.random.default_rng(0))


@pytest.mark.parametrize("name", ("a.xyz", "ascii.ply", "little.ply", "big.ply"))
def test_oriented_points_are_read_alike(tmp_path, name):
    table = 3.0 + 2.0 * sphere()
    table[:, 3:] = sphere()[:, 3:]
    content = {
        "a.xyz": rows(table).encode(),
        "ascii.ply": ply("ascii", 200, ORIENTED, rows(table).encode()),
        "little.ply": ply(BINARY, 200, ORIENTED, table.astype("<f4").tobytes()),
        "big.ply": ply("binary_big_endian", 200, ORIENTED, table.astype(">f4").tobytes()),
    }[name]
    scan = read(tmp_path, name, content)
    assert scan.kind == "points" and scan.truth is None and scan.notes == ()
    np.testing.assert_allclose(scan.centre + scan.diagonal * scan.points, table[:, :3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scan.normals, table[:, 3:], rtol=0, atol=1e-6)
    assert np.linalg.norm(np.ptp(scan.points, axis=0)) == pytest.approx(1.0)


@pytest.mark.parametrize("suffix", ("ply", "off", "obj"))
def test_meshes_are_sampled_with_outward_normals(tmp_path, suffix):
    mesh = BALL.copy()
    mesh.apply_translation((10.0, 0.0, 0.0))
    content = mesh.export(file_type=suffix)
    scan = read(tmp_path, f"a.{suffix}", content if isinstance(content, bytes) else content.encode())
    assert scan.kind == "mesh" and scan.points.shape == (500, 3)
    # The ball fills a cube whose diagonal is 1, about the origin: its radius is 1 / sqrt(12).
    np.testing.assert_allclose(np.linalg.norm(scan.points, axis=1), 12**-0.5, rtol=0.05)
    assert ((scan.points * scan.normals).sum(axis=1) > 0.25).all()
    distance, normal = scan.truth.distance(scan.points * 1.2)
    np.testing.assert_allclose(distance, 0.2 * np.linalg.norm(scan.points, axis=1), rtol=0.1)
    assert ((normal * scan.normals).sum(axis=1) > 0.8).all()


def test_inward_orientation_is_turned_round_and_noted(tmp_path):
    scan = read(tmp_path, "a.xyz", rows(sphere() * (1, 1, 1, -1, -1, -1)).encode())
    assert (scan.points * scan.normals).sum() > 0 and "flipped" in scan.notes[0]
    mesh = BALL.copy()
    mesh.invert()
    scan = read(tmp_path, "a.ply", mesh.export(file_type="ply"))
    assert (scan.points * scan.normals).sum() > 0 and "flipped" in scan.notes[0]
