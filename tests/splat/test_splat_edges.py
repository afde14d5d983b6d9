"""What is not drawn, what is seen from nowhere, extremes, and what is refused."""

import functools

import helpers
import jax
import numpy as np
import pytest
import splat_oracle
import splat_scenes
from splat_scenes import SIZE
from test_splat import FULL, check_values, compiled

from jax_knn_aggregate import render_gaussians


def without(scene, lost):
    """The scene with Gaussians left out."""
    kept = ("viewmat", "K", "background")
    return {n: a if a is None or n in kept else a[~lost] for n, a in scene.items()}


def plain(rng):
    """A scene with colours as they are."""
    scene = splat_scenes.gaussians(rng)
    return scene | {"colors": scene["colors"][:, 0]}


def check_all(scene, lost, implementation, rng, options=FULL):
    """Every order of derivative, against the oracle of what is left; of what is lost, exactly 0."""
    oracle = splat_oracle.Oracle(without(scene, lost), **options)
    ct, v = splat_scenes.directions(rng, scene)
    every = compiled(implementation, "every", **options)
    rendering, tangents, first, second = every(*map(splat_scenes.tree, (scene, ct, v)))
    assert not np.asarray(rendering.radii)[lost].any()
    check_values(rendering._replace(radii=rendering.radii[~lost]), oracle, 1e-10)
    v = without(v, lost)
    helpers.assert_trees_close(tangents, splat_oracle.tangents(without(scene, lost), v, options), 1e-8, "tangents")
    hessian = splat_oracle.second(without(scene, lost), v, ct, options)
    for got, want, tolerance in ((first, oracle.first(ct), 1e-8), (second, hessian, 1e-7)):
        got = {n: np.asarray(a) for n, a in got.items()}
        for n, a in got.items():
            assert n in ("viewmat", "K", "background") or not a[lost].any(), n
        helpers.assert_trees_close(without(got, lost), want, tolerance)


@pytest.mark.thorough_if(implementation="xla")
def test_not_finite(implementation, rng):
    """NaN and infinities in each array, and a quaternion of zeros: no trace in any order of derivative."""
    names = ("means", "quats", "scales", "opacities", "colors", "means2d_offset")
    scene, _ = splat_scenes.away_from_thresholds(functools.partial(splat_scenes.gaussians, rng), FULL, margin=1e-9)
    lost = np.zeros(30, bool)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        for j, name in enumerate(names):
            at = 3 * j + i
            scene[name][at].flat[rng.integers(scene[name][at].size)] = value if scene[name].ndim > 1 else 0
            if scene[name].ndim == 1:
                scene[name][at] = value
            lost[at] = True
    scene["quats"][18], lost[18] = 0, True
    check_all(scene, lost, implementation, rng)


@pytest.mark.parametrize("name", ["viewmat", "K"])
@pytest.mark.thorough_if(implementation="xla")
def test_cameras_that_are_not_finite(name, implementation, rng):
    """See the background alone, and derivatives are 0."""
    scene = splat_scenes.gaussians(rng)
    ct, v = map(splat_scenes.tree, splat_scenes.directions(rng, scene))
    for value in (np.nan, np.inf):
        scene[name][0, 2] = value
        rendering, _, first, second = compiled(implementation, "every", **FULL)(splat_scenes.tree(scene), ct, v)
        np.testing.assert_allclose(rendering.image, np.broadcast_to(scene["background"], rendering.image.shape))
        assert not rendering.alpha.any() and not rendering.depth.any() and not rendering.radii.any()
        for n, a in first.items():
            assert n == "background" or not np.asarray(a).any(), n
        assert not any(np.asarray(a).any() for a in second.values())


@pytest.mark.thorough_if(implementation="xla")
def test_behind_the_camera(implementation, rng):
    """All Gaussians, some of them at its centre, where x/z and directions are 0/0."""
    scene = splat_scenes.gaussians(rng)
    V = scene["viewmat"]
    positions = scene["means"] @ V[:3, :3].T + V[:3, 3]
    positions[:, 2] *= -1
    positions[:5] = 0
    scene["means"] = (positions - V[:3, 3]) @ V[:3, :3]
    scene["means"][:5] = np.linalg.inv(V)[:3, 3]
    check_all(scene, np.ones(30, bool), implementation, rng)


@pytest.mark.thorough_if(implementation="xla")
def test_no_shape(implementation, rng):
    """Without eps2d a point, a line and a disc seen from its edge have determinant 0."""
    options = SIZE | {"eps2d": 0.0}
    scene, _ = splat_scenes.away_from_thresholds(functools.partial(plain, rng), options, margin=1e-9)
    lost = np.arange(30) < 2
    scene["scales"][0] = 0
    scene["scales"][1, 1:] = 0
    oracle = splat_oracle.Oracle(without(scene, lost), **options)
    ct, _ = splat_scenes.directions(rng, scene)
    rendering, first = compiled(implementation, "first", **options)(*map(splat_scenes.tree, (scene, ct)))
    check_values(rendering._replace(radii=rendering.radii[~lost]), oracle, 1e-10)
    first = {n: np.asarray(a) for n, a in first.items()}
    helpers.assert_trees_close(without(first, lost), oracle.first(ct), 1e-8)
    assert not any(first[n][lost].any() for n in ("means", "quats", "scales", "opacities", "colors"))


@pytest.mark.thorough_if(implementation="xla")
def test_order(implementation, rng):
    """By z rounded to float32, then by index: here all z are one float32 number, and none are in order in float64."""
    V = np.eye(4)

    def make():
        scene = splat_scenes.gaussians(rng, "plain") | {"viewmat": V}
        scene["means"][:, :2] = rng.uniform(-1, 1, (30, 2))
        scene["means"][:, 2] = 3 - 1e-9 * np.arange(30)
        return scene

    scene, oracle = splat_scenes.away_from_thresholds(make, FULL, margin=1e-9)
    ct, v = map(splat_scenes.tree, splat_scenes.directions(rng, scene))
    rendering, _, first, _ = compiled(implementation, "every", **FULL)(splat_scenes.tree(scene), ct, v)
    check_values(rendering, oracle, 1e-10)
    helpers.assert_trees_close(first, oracle.first(helpers.wide(ct)), 1e-8)
    reverse = scene | {n: scene[n][::-1] for n in ("means", "quats", "scales", "opacities", "colors", "means2d_offset")}
    assert np.abs(splat_oracle.Oracle(reverse, **FULL).image - oracle.image).max() > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(dtype=np.float64)
def test_covering_everything(dtype, implementation, rng):
    """Gaussians so large that squares of the determinant overflow float32; their derivatives do not vanish."""
    scale = {np.float32: 3e4, np.float64: 3e8}[dtype]

    def make():
        scene = plain(rng)
        scene["scales"][:3] *= scale
        scene["opacities"][:3] = 0.3
        return {n: a.astype(dtype).astype(np.float64) for n, a in scene.items()}

    scene, oracle = splat_scenes.away_from_thresholds(make, SIZE)
    ct, _ = splat_scenes.directions(rng, scene)
    first = compiled(implementation, "first", **SIZE)
    rendering, gradients = first(*(splat_scenes.tree(a, dtype) for a in (scene, ct)))
    helpers.assert_close(rendering.image, oracle.image, 2e-5)
    want = oracle.first(ct)
    helpers.assert_trees_close(gradients, want, 5e-4)
    helpers.assert_close(gradients["scales"][:3], want["scales"][:3], 5e-4)


def test_radii(rng):
    """⌈3 √λ⌉ of the longer axis, and 0 where the square meets no tile: extent="exact" draws there what it sees."""
    K, V = np.array([[100.0, 0, 20], [0, 100, 20], [0, 0, 1]]), np.eye(4)
    x, z = np.array([0.0, 0.0, 0.0, 6.0, -0.58, 0.0, -0.7]), np.array([2, 0.005, -1, 2, 2, 2, 2])
    scales = np.tile([0.1, 0.05, 0.01], (7, 1))
    scales[5] = 1e-3
    opacities = np.array([0, 0.5, 0.5, 0.5, 0, 0, 0.99])
    args = np.stack([x, 0 * x, z], -1), np.tile([1.0, 0, 0, 0], (7, 1)), scales, opacities, np.ones((7, 1)), V, K

    def both(*args):
        return [render_gaussians(*args, width=40, height=40, extent=extent) for extent in ("exact", "3sigma")]

    exact, tiled = helpers.quick_jit(both)(*args)
    # 3 √(5² + 0.3) = 15.1; of the sixth λ = 0.0025 + 0.3 + √0.1. The opacity does not matter.
    for r in (exact, tiled):
        np.testing.assert_array_equal(r.radii, [16, 0, 0, 0, 16, 3, 0])
    # The last one's mean is 15 pixels to the left of the image, so r = 16 meets no tile, but at 3.1 deviations it is
    # there with 0.99·exp(−3.1²/2).
    assert exact.image.max() > 1 / 255 and not tiled.image.any()


@pytest.mark.parametrize("size", [(1, 1), (17, 16), (16, 31)], ids=str)
@pytest.mark.thorough_if(size=[(17, 16), (16, 31)])
@pytest.mark.thorough_if(implementation="xla")
def test_sizes(size, implementation, rng):
    """One pixel, and tiles that are not full."""
    options = {"width": size[0], "height": size[1]}
    scene = splat_scenes.with_covariances(rng, splat_scenes.gaussians(rng), 2)
    scene["K"][:2, 2] = size[0] / 2, size[1] / 2
    oracle = splat_oracle.Oracle(scene, **options)
    render = helpers.quick_jit(lambda s: splat_scenes.render(s, options, implementation))
    check_values(render(splat_scenes.tree(scene)), oracle, 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_no_gaussians(implementation, rng):
    scene = without(plain(rng), np.ones(30, bool))
    ct, _ = splat_scenes.directions(rng, scene)
    rendering, gradients = compiled(implementation, "first", **SIZE)(*map(splat_scenes.tree, (scene, ct)))
    np.testing.assert_array_equal(rendering.image, np.broadcast_to(scene["background"], rendering.image.shape))
    assert not rendering.alpha.any() and not rendering.depth.any() and rendering.radii.shape == (0,)
    helpers.assert_close(gradients["background"], ct["image"].sum((0, 1)), 1e-12)
    assert gradients["means"].shape == (0, 3) and not gradients["viewmat"].any()


@pytest.mark.parametrize("capacity", [1, 7])
@pytest.mark.thorough_if(capacity=7)
@pytest.mark.thorough_if(implementation="xla")
def test_capacity_changes_nothing(capacity, implementation, rng):
    scene, oracle = splat_scenes.away_from_thresholds(functools.partial(plain, rng), SIZE, margin=1e-9)
    ct, _ = splat_scenes.directions(rng, scene)
    first = compiled(implementation, "first", **SIZE, capacity=capacity)
    rendering, gradients = first(*map(splat_scenes.tree, (scene, ct)))
    check_values(rendering, oracle, 1e-10)
    helpers.assert_trees_close(gradients, oracle.first(ct), 1e-8)


# ---- Errors


def test_bad_calls(rng):
    scene = splat_scenes.gaussians(rng, P=5) | {"background": None, "means2d_offset": None}
    scene["colors"] = scene["colors"][:, 0]
    sh = {"colors": np.zeros((5, 9, 3)), "sh_degree": 2}
    single = scene["means"].astype(np.float32)
    cases = [
        (TypeError, "means is a list, expected a JAX or NumPy array", {"means": [[0.0, 0, 1]]}),
        (ValueError, r"means has shape \(2, 5, 3\), expected \(P, 3\).*jax.vmap", {"means": np.zeros((2, 5, 3))}),
        (TypeError, "means has dtype int64, expected float32 or float64", {"means": np.zeros((5, 3), int)}),
        (TypeError, "means has dtype float16", {"means": np.zeros((5, 3), np.float16)}),
        (TypeError, "quats has dtype float64, expected float32, that of means", {"means": single}),
        (TypeError, "K has dtype int64, expected float64", {"K": np.eye(3, dtype=int)}),
        (ValueError, r"quats has shape \(5, 3\), expected \(5, 4\)", {"quats": np.zeros((5, 3))}),
        (ValueError, r"scales has shape \(4, 3\), expected \(5, 3\)", {"scales": np.zeros((4, 3))}),
        (ValueError, r"opacities has shape \(5, 1\), expected \(5,\)", {"opacities": np.zeros((5, 1))}),
        (ValueError, "scales is None, expected an array, as quats is", {"scales": None}),
        (ValueError, "quats is None", {"quats": None}),
        (ValueError, "quats is None.*covariances", {"quats": None, "scales": None}),
        (ValueError, "quats is given beside covariances", {"covariances": np.zeros((5, 3, 3))}),
        (ValueError, "scales is given beside covariances", {"covariances": np.zeros((5, 3, 3)), "quats": None}),
        (ValueError, r"covariances has shape \(5, 6\), expected \(5, 3, 3\)",
         {"covariances": np.zeros((5, 6)), "quats": None, "scales": None}),
        (ValueError, r"colors has shape \(5, 9, 3\), expected .*pass sh_degree", {"colors": sh["colors"]}),
        (ValueError, r"colors has shape \(4, 3\), expected \(5, C\)", {"colors": np.zeros((4, 3))}),
        (ValueError, r"colors has shape \(5, 9, 3\), expected \(5, M, 3\) with M >= 16", sh | {"sh_degree": 3}),
        (ValueError, r"colors has shape \(5, 3\), expected \(5, M, 3\)", {"sh_degree": 0}),
        (ValueError, "sh_degree is 4, expected 0, 1, 2, 3", sh | {"sh_degree": 4}),
        (TypeError, "sh_degree is 1.0, expected a Python integer", sh | {"sh_degree": 1.0}),
        (ValueError, r"viewmat has shape \(3, 4\), expected \(4, 4\)", {"viewmat": np.zeros((3, 4))}),
        (ValueError, r"viewmat has shape \(2, 4, 4\), .*jax.vmap", {"viewmat": np.zeros((2, 4, 4))}),
        (ValueError, r"K has shape \(4, 4\), expected \(3, 3\)", {"K": np.eye(4)}),
        (ValueError, r"background has shape \(1,\), expected \(3,\)", {"background": np.zeros(1)}),
        (ValueError, r"means2d_offset has shape \(5, 3\), expected \(5, 2\)", {"means2d_offset": np.zeros((5, 3))}),
        (ValueError, "width is 0, expected at least 1", {"width": 0}),
        (ValueError, r"width and height are 65536 and 32768, .*2\*\*31", {"width": 2**16, "height": 2**15}),
        (TypeError, "height is 8.0, expected a Python integer", {"height": 8.0}),
        (ValueError, "capacity is 0, expected at least 1", {"capacity": 0}),
        (TypeError, "capacity is 'all'", {"capacity": "all"}),
        (ValueError, "extent is '3 sigma', expected one of 'exact', '3sigma'", {"extent": "3 sigma"}),
        (TypeError, "antialiased is 1, expected True or False", {"antialiased": 1}),
        (ValueError, "near is -1, expected 0 <= near", {"near": -1}),
        (ValueError, "far is 1.0, expected more than near, which is 2.0", {"near": 2.0, "far": 1.0}),
        (ValueError, "far is nan", {"far": float("nan")}),
        (TypeError, "near is None, expected a Python number", {"near": None}),
        (ValueError, "eps2d is -0.1", {"eps2d": -0.1}),
        (ValueError, "implementation is 'cuda'", {"implementation": "cuda"}),
    ]  # fmt: skip
    for error, match, change in cases:
        with pytest.raises(error, match=match):
            jax.eval_shape(lambda change=change: render_gaussians(**(scene | SIZE | change)))
    with pytest.raises(TypeError, match=r"width is .*static_argnames='width'"):
        jax.jit(lambda width: render_gaussians(**(scene | SIZE | {"width": width})))(8)
