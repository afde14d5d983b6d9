"""diff-gaussian-rasterization's names: what differs from ``render_gaussians`` is worked out here in NumPy."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splat_scenes

from jax_knn_aggregate import render_gaussians
from jax_knn_aggregate.diff_gaussian_rasterization import (
    GaussianRasterizationSettings,
    GaussianRasterizer,
    load_snapshot,
    rasterize_gaussians,
)

W, H = splat_scenes.WIDTH, splat_scenes.HEIGHT
TAN = np.array([0.8, 0.7])


def settings(rng, viewmat, **changes):
    """With a projmatrix that is not quite that of the field of view, so that each matrix has its own part."""
    near, far = 0.01, 100.0
    clip = np.zeros((4, 4))
    clip[0, 0], clip[1, 1], clip[3, 2] = 1.02 / TAN[0], 0.97 / TAN[1], 1
    clip[2, 2], clip[2, 3] = far / (far - near), -far * near / (far - near)
    clip[:2, 2] = 0.03, -0.05
    values = {
        "image_height": H,
        "image_width": W,
        "tanfovx": TAN[0],
        "tanfovy": TAN[1],
        "bg": jnp.asarray(rng.uniform(size=3)),
        "scale_modifier": 1.3,
        "viewmatrix": jnp.asarray(viewmat.T),
        "projmatrix": jnp.asarray((clip @ viewmat).T),
        "sh_degree": 2,
        "campos": jnp.asarray(rng.normal(size=3)),
        "prefiltered": False,
        "debug": False,
    }
    return GaussianRasterizationSettings(**values | changes)


@pytest.fixture
def problem(rng):
    scene = splat_scenes.gaussians(rng, coefficients=9)
    scene["quats"] /= np.linalg.norm(scene["quats"], axis=1, keepdims=True)
    gaussians = {
        "means3D": scene["means"],
        "means2D": np.zeros((len(scene["means"]), 3)),
        "opacities": scene["opacities"][:, None],
        "shs": scene["colors"],
        "scales": scene["scales"],
        "rotations": scene["quats"],
    }
    return splat_scenes.tree(gaussians), settings(rng, scene["viewmat"])


def as_known(g, s):
    """Arguments of render_gaussians for the same image, in NumPy: pixels by projmatrix, colours from campos."""
    g = {name: np.asarray(a) for name, a in g.items()}
    view, clip = (np.asarray(m).T for m in (s.viewmatrix, s.projmatrix))
    ones = np.concatenate([g["means3D"], np.ones((len(g["means3D"]), 1))], 1)
    seen, at = ones @ view.T, ones @ clip.T
    size, focal = np.array([W, H]), np.array([W, H]) / 2 / TAN
    pixel = ((at[:, :2] / (at[:, 3:] + 1e-7) + 1) * size - 1) / 2  # centres at whole numbers
    offset = pixel + 0.5 - (focal * seen[:, :2] / seen[:, 2:3] + size / 2)
    K = np.diag([*focal, 1])
    K[:2, 2] = size / 2
    # The same directions from a camera at the place where campos is: colours do not see anything else.
    elsewhere = np.eye(4)
    elsewhere[:3, 3] = -np.asarray(s.campos)
    d = g["means3D"] - np.asarray(s.campos)
    x, y, z = (d / np.linalg.norm(d, axis=1, keepdims=True)).T
    basis = np.stack([0.28209479177387814 + 0 * x, *(0.4886025119029199 * a for a in (-y, z, -x))])
    basis2 = [
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * z * z - x * x - y * y),
    ]
    basis2 += [-1.0925484305920792 * x * z, 0.5462742152960396 * (x * x - y * y)]
    colors = np.maximum(0.5 + np.einsum("bp,pbc->pc", np.concatenate([basis, basis2]), g["shs"]), 0)
    return {
        "means": g["means3D"],
        "quats": g["rotations"],
        "scales": 1.3 * g["scales"],
        "opacities": g["opacities"][:, 0],
        "colors": colors,
        "viewmat": view,
        "K": K,
        "background": np.asarray(s.bg),
        "means2d_offset": offset,
    }


OPTIONS = {"width": W, "height": H, "near": 0.2, "extent": "3sigma"}


@jax.jit
def drawn(s, g):
    return GaussianRasterizer(raster_settings=s)(**g)


@jax.jit
def weighted(s, g, ct):
    """⟨ct, image⟩ and its gradients in the settings and in the Gaussians."""
    return jax.value_and_grad(lambda s, g: (ct * GaussianRasterizer(s)(**g)[0]).sum(), (0, 1))(s, g)


@functools.partial(jax.jit, static_argnames="antialiased")
def rendered(known, antialiased=False):
    return render_gaussians(**known, **OPTIONS, antialiased=antialiased)


@pytest.mark.parametrize("antialiasing", [False, True])
@pytest.mark.thorough_if(antialiasing=True)
def test_image_and_radii(problem, antialiasing):
    g, s = problem
    s = dataclasses.replace(s, antialiasing=antialiasing)
    color, radii = drawn(s, g)
    want = rendered(splat_scenes.tree(as_known(g, s)), antialiased=antialiasing)
    assert color.shape == (3, H, W) and radii.dtype == jnp.int32 and (radii > 0).any()
    helpers.assert_close(color.transpose(1, 2, 0), np.asarray(want.image), 1e-11)
    np.testing.assert_array_equal(radii, want.radii)


def test_given_colors_and_covariances_and_flat_opacities(problem):
    g, s = problem
    known = as_known(g, s)
    w, x, y, z = known["quats"].T
    R = np.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ],
        -1,
    ).reshape(-1, 3, 3)
    half = R * known["scales"][:, None]
    upper = (half @ half.swapaxes(1, 2))[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    got, _ = jax.jit(rasterize_gaussians)(
        *(g["means3D"], None, None, jnp.asarray(known["colors"]), g["opacities"][:, 0], None, None),
        *(jnp.asarray(upper), s),
    )
    helpers.assert_close(got, np.asarray(drawn(s, g)[0]), 1e-11)


def test_gradients(problem, rng):
    """Along random directions in each array of the settings; of means2D, as densification wants it."""
    g, s = problem
    ct = jnp.asarray(rng.normal(size=(3, H, W)))

    def value(s, g):
        return weighted(s, g, ct)[0]

    of_s, of_g = weighted(s, g, ct)[1]
    for name in ("tanfovx", "bg", "scale_modifier", "viewmatrix", "projmatrix", "campos"):
        at = np.asarray(getattr(s, name), float)
        v = rng.normal(size=at.shape)
        if at.shape == (4, 4):
            v[:, 3] = 0  # stays what it is: the image does not see it, or through w alone
        h = 1e-8  # small: where a pixel gains or loses a Gaussian in between, the image jumps
        there, back = (value(dataclasses.replace(s, **{name: jnp.asarray(at + e * v)}), g) for e in (h, -h))
        numeric = (there - back) / (2 * h)
        np.testing.assert_allclose((np.asarray(getattr(of_s, name)) * v).sum(), numeric, rtol=2e-5, atol=1e-3)
    assert of_s.image_height == H  # static

    known = splat_scenes.tree(as_known(g, s))
    offset = known.pop("means2d_offset")
    on_screen = jax.grad(lambda o: (ct.transpose(1, 2, 0) * rendered(known | {"means2d_offset": o}).image).sum())
    want = np.asarray(on_screen(offset)) * np.array([W, H]) / 2
    helpers.assert_close(of_g["means2D"][:, :2], want, 1e-9)
    assert (of_g["means2D"][:, 2] == 0).all() and np.abs(want).max() > 0
    moved = g | {"means2D": g["means2D"] + 7}
    np.testing.assert_array_equal(value(s, moved), value(s, g))


def test_unnormalised_and_visible(problem):
    """A quaternion of zeros is the identity; the near plane is at 0.2."""
    g, s = problem
    zero = g | {"rotations": jnp.zeros_like(g["rotations"])}
    one = g | {"rotations": jnp.zeros_like(g["rotations"]).at[:, 0].set(1)}
    np.testing.assert_array_equal(drawn(s, zero)[0], drawn(s, one)[0])
    r = GaussianRasterizer(dataclasses.replace(s, viewmatrix=jnp.eye(4)))
    np.testing.assert_array_equal(
        r.markVisible(jnp.array([[9.0, 0, 0.2], [0, 9, 0.21], [0, 0, -1]])), [False, True, False]
    )


def test_not_finite(problem, rng):
    """What is not finite is not drawn and has gradient 0, and so have those behind the camera."""
    g, s = problem
    bad = {name: np.array(a) for name, a in g.items()}
    for i, name in enumerate(("means3D", "shs", "scales", "rotations", "opacities")):
        bad[name][i].flat[0] = np.nan if i % 2 else np.inf
    keep = np.arange(5, 30)
    some = {name: a[keep] for name, a in g.items()}

    ct = jnp.asarray(rng.normal(size=(3, H, W)))
    value, (of_s, of_g) = weighted(s, {n: jnp.asarray(a) for n, a in bad.items()}, ct)
    want, (want_s, want_g) = weighted(s, some, ct)
    helpers.assert_close(value, float(want), 1e-12)
    helpers.assert_trees_close(jax.tree.leaves(of_s), [np.asarray(a) for a in jax.tree.leaves(want_s)], 1e-9)
    for name, a in of_g.items():
        assert (np.asarray(a)[:5] == 0).all(), name
        helpers.assert_close(a[keep], np.asarray(want_g[name]), 1e-9)


def test_errors(problem):
    g, s = problem
    r = GaussianRasterizer(s)
    with pytest.raises(ValueError, match="exactly one of either SHs or precomputed colors"):
        r(**g, colors_precomp=jnp.zeros((30, 3)))
    with pytest.raises(ValueError, match="exactly one of either scale/rotation pair or precomputed 3D covariance"):
        r(**g, cov3D_precomp=jnp.zeros((30, 6)))
    with pytest.raises(ValueError, match="exactly one of either scale/rotation pair or precomputed 3D covariance"):
        r(**{name: a for name, a in g.items() if name != "rotations"})
    with pytest.raises(ValueError, match=r"scales has shape \(30, 2\), expected \(30, 3\)"):
        r(**g | {"scales": g["scales"][:, :2]})
    with pytest.raises(TypeError, match="opacities has dtype float32, expected float64"):
        r(**g | {"opacities": g["opacities"].astype(jnp.float32)})
    with pytest.raises(ValueError, match="sh_degree is 3"):
        GaussianRasterizer(dataclasses.replace(s, sh_degree=3))(**g)
    with pytest.raises(ValueError, match=r"bg of the settings has shape \(4,\), expected \(3,\)"):
        GaussianRasterizer(dataclasses.replace(s, bg=jnp.zeros(4)))(**g)


def test_snapshots(problem, tmp_path, monkeypatch):
    """The same image and gradients; and what is kept where these are not finite draws the image again."""
    monkeypatch.chdir(tmp_path)
    g, s = problem
    debug = dataclasses.replace(s, debug=True)

    def loss(g, s, size):
        return (size * GaussianRasterizer(s)(**g)[0]).sum()

    step = jax.jit(jax.value_and_grad(loss, allow_int=True))
    (value, bars), (want, want_bars) = (step(g, each, 1.0) for each in (debug, s))
    helpers.assert_trees_close((value, bars), (want, want_bars), 1e-12)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Exception, match=r"snapshot_bw\.npz"):
        jax.block_until_ready(step(g, debug, 1e308))
    kept = load_snapshot(tmp_path / "snapshot_bw.npz")
    assert (np.asarray(kept.pop("cotangent")) == 1e308).all()
    assert kept["raster_settings"].debug and kept["raster_settings"].sh_degree == s.sh_degree
    image, radii = rasterize_gaussians(**kept)
    helpers.assert_trees_close(image, GaussianRasterizer(s)(**g)[0], 1e-12)
    assert radii.dtype == jnp.int32
