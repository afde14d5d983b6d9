"""Gaussians in .ply files."""

import numpy as np
import pytest

import jax_knn_aggregate as jka

plyfile = pytest.importorskip("plyfile")


def gaussians(rng, P=7, M=16):
    return jka.Gaussians(
        means=rng.normal(size=(P, 3)).astype(np.float32),
        quats=rng.normal(size=(P, 4)).astype(np.float32),
        scales=np.exp(rng.normal(size=(P, 3))).astype(np.float32),
        opacities=rng.uniform(size=P).astype(np.float32),
        colors=rng.normal(size=(P, M, 3)).astype(np.float32),
    )


def original(path, g, text=False):
    """A file as the original's ``save_ply`` makes it: every number by its name, coefficients of a colour in a row."""
    M = g.colors.shape[1]
    rows = []
    for i in range(len(g.means)):
        row = {**dict(zip("xyz", g.means[i], strict=True)), "nx": 0, "ny": 0, "nz": 0}
        row |= {f"f_dc_{c}": g.colors[i, 0, c] for c in range(3)}
        row |= {f"f_rest_{c * (M - 1) + m - 1}": g.colors[i, m, c] for c in range(3) for m in range(1, M)}
        row["opacity"] = np.log(g.opacities[i] / (1 - g.opacities[i]))
        row |= {f"scale_{k}": np.log(g.scales[i, k]) for k in range(3)} | {f"rot_{k}": g.quats[i, k] for k in range(4)}
        rows.append(row)
    vertices = np.array([tuple(row.values()) for row in rows], [(name, "f4") for name in rows[0]])
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")], text=text).write(path)


@pytest.mark.parametrize(("M", "degree"), [(1, 0), (4, 1), (9, 2), (16, 3)])
def test_reads_what_the_original_writes(M, degree, tmp_path, rng):
    want = gaussians(rng, M=M)
    original(tmp_path / "a.ply", want, text=M == 4)
    got = jka.load_gaussians(tmp_path / "a.ply")
    assert got.sh_degree == degree
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("P", "M"), [(7, 16), (7, 1), (0, 4)])
def test_writes_what_it_reads(P, M, tmp_path, rng):
    want = gaussians(rng, P, M)
    if P:
        want.opacities[:2] = 0, 1
        want.scales[0] = 0
    jka.save_gaussians(tmp_path / "a.ply", *want)
    for a, b in zip(jka.load_gaussians(tmp_path / "a.ply"), want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_is_what_is_rendered(tmp_path, rng):
    jka.save_gaussians(tmp_path / "a.ply", *gaussians(rng)._replace(means=rng.normal((0, 0, 5), size=(7, 3))))
    g = jka.load_gaussians(tmp_path / "a.ply")
    K = np.array([[20, 0, 8], [0, 20, 8], [0, 0, 1]], np.float32)
    alpha = jka.render_gaussians(*g, np.eye(4, dtype=np.float32), K, 16, 16, sh_degree=g.sh_degree).alpha
    assert alpha.max() > 0.1


def test_malformed_files(tmp_path, rng):
    def fails(match):
        with pytest.raises(ValueError, match=match) as error:
            jka.load_gaussians(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    path = tmp_path / "a.ply"
    path.write_bytes(b"\x89PNG and no more")
    fails("is no PLY file")
    original(path, gaussians(rng))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    fails("is no PLY file")
    path.write_bytes(whole.replace(b"property float rot_3\n", b"property float other\n"))
    fails("without rot_3")
    path.write_bytes(whole.replace(b"f_rest_44", b"g_rest_44"))
    fails("44 properties f_rest_k")
    path.write_bytes(whole.replace(b"element vertex", b"element corner"))
    fails("is no PLY file")
    with pytest.raises(OSError):
        jka.load_gaussians(tmp_path / "none.ply")


def test_what_cannot_be_saved(tmp_path, rng):
    g = gaussians(rng)
    for changed, match in (
        (g._replace(colors=g.colors[:, :5]), r"colors has shape \(7, 5, 3\)"),
        (g._replace(quats=g.quats[:, :3]), r"quats has shape \(7, 3\), expected \(7, 4\)"),
        (g._replace(opacities=g.opacities + 1), "opacities has values outside of 0 to 1"),
        (g._replace(scales=-g.scales), "scales has values outside"),
    ):
        with pytest.raises(ValueError, match=match):
            jka.save_gaussians(tmp_path / "a.ply", *changed)
