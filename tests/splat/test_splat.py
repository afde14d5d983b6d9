"""Images of Gaussians and their derivatives against the definition in NumPy."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splat_oracle
import splat_scenes
from splat_scenes import KINDS, OUTPUTS, SIZE

#: What most tests compile: everything at once.
FULL = SIZE | {"sh_degree": 3, "antialiased": True}


@functools.cache
def compiled(implementation, order, **options):
    """One program for all scenes: they differ in numbers alone."""
    options = dict(options)
    if order == "every":
        return helpers.quick_jit(splat_scenes.every_order(options, implementation))

    def first(scene, ct):
        gradients = jax.grad(splat_scenes.loss)(scene, ct, options, implementation)
        return splat_scenes.render(scene, options, implementation), gradients

    return (helpers.user_jit if order == "first as users" else helpers.quick_jit)(first)


def check_values(rendering, oracle, tolerance):
    for name in OUTPUTS:
        helpers.assert_close(getattr(rendering, name), getattr(oracle, name), tolerance, name)
    np.testing.assert_array_equal(np.asarray(rendering.radii), oracle.radii)
    assert rendering.radii.dtype == jnp.int32


# ---- The oracle itself


@pytest.mark.parametrize("kind", ["opaque", "wide"])
def test_oracle(kind, rng):
    """Gradients on its tape, by complex steps of values; and of a Hessian, its symmetry."""
    scene = splat_scenes.gaussians(rng, kind, P=8)
    (ct, v), (_, w) = (splat_scenes.directions(rng, scene) for _ in range(2))
    gradients = splat_oracle.Oracle(scene, **FULL).first(ct)
    assert all(np.abs(g).max() > 0 for g in gradients.values())
    tangents = splat_oracle.tangents(scene, v, FULL)
    along = sum((ct[n] * tangents[n]).sum() for n in OUTPUTS)
    np.testing.assert_allclose(sum((gradients[n] * v[n]).sum() for n in v), along, rtol=1e-9)
    (a, b) = (splat_oracle.second(scene, t, ct, FULL) for t in (v, w))
    np.testing.assert_allclose(*(sum((h[n] * t[n]).sum() for n in v) for h, t in ((a, w), (b, v))), rtol=1e-9)


def test_oracle_by_differences(rng):
    """Of the camera, far coarser, but without a complex number."""
    scene = splat_scenes.gaussians(rng, "principal point", P=8)
    ct, _ = splat_scenes.directions(rng, scene)
    gradients = splat_oracle.Oracle(scene, **FULL).first(ct)

    def value(name, at, step):
        moved = scene[name].copy()
        moved[at] += step
        o = splat_oracle.Oracle(scene | {name: moved}, **FULL)
        return sum((ct[n] * getattr(o, n)).sum() for n in OUTPUTS)

    for name, some in (("viewmat", [(0, 1), (2, 3), (3, 0)]), ("K", [(0, 0), (1, 1), (0, 2), (1, 2)])):
        for at in some:
            differences = [(value(name, at, h) - value(name, at, -h)) / (2 * h) for h in (1e-6, 2e-6, 4e-6)]
            assert np.isclose(differences, gradients[name][at], rtol=1e-4, atol=1e-3).any()  # no threshold in between


# ---- Every derivative


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thorough_if(implementation="xla")
def test_derivatives(kind, implementation, rng):
    """Values, tangents, gradients, and Hessians times vectors, in every array and the camera, in float64."""
    scene, oracle = splat_scenes.away_from_thresholds(
        functools.partial(splat_scenes.gaussians, rng, kind), FULL, margin=1e-9
    )
    drawn = int((oracle.radii > 0).sum())
    assert drawn > 5 and (kind != "near" or drawn < 30)
    assert kind != "opaque" or oracle.saturated > 20
    assert kind != "wide" or oracle.limited_count > 10
    ct, v = splat_scenes.directions(rng, scene)
    every = compiled(implementation, "every", **FULL)
    rendering, tangents, first, second = every(*map(splat_scenes.tree, (scene, ct, v)))
    check_values(rendering, oracle, 1e-10)
    helpers.assert_trees_close(tangents, splat_oracle.tangents(scene, v, FULL), 1e-8, "tangents")
    helpers.assert_trees_close(first, oracle.first(ct), 1e-8, "gradients")
    helpers.assert_trees_close(second, splat_oracle.second(scene, v, ct, FULL), 1e-7, "second order")


@pytest.mark.thorough_if(implementation="xla")
def test_float32(implementation, rng):
    """Of float32 numbers, computed in float32, against float64."""
    for kind in KINDS:

        def make(kind=kind):
            scene = splat_scenes.gaussians(rng, kind)
            return {n: a.astype(np.float32).astype(np.float64) for n, a in scene.items()}

        scene, oracle = splat_scenes.away_from_thresholds(make, FULL)
        ct, _ = splat_scenes.directions(rng, scene)
        ct = {n: a.astype(np.float32).astype(np.float64) for n, a in ct.items()}
        first = compiled(implementation, "first", **FULL)
        rendering, gradients = first(*(splat_scenes.tree(a, np.float32) for a in (scene, ct)))
        assert all(g.dtype == jnp.float32 for g in gradients.values())
        for name in OUTPUTS:
            helpers.assert_close(getattr(rendering, name), getattr(oracle, name), 2e-5, f"{kind}, {name}")
        helpers.assert_trees_close(gradients, oracle.first(ct), 5e-4, kind)


@pytest.mark.parametrize("eps2d", [0.3, 0.0])
@pytest.mark.parametrize("extent", ["exact", "3sigma"])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(extent="exact")
@pytest.mark.thorough_if(eps2d=0.3)
def test_covariances_and_channels(extent, eps2d, implementation, rng):
    """Gaussians as matrices, whose symmetric part counts, with five channels, no antialiasing, near and far."""
    options = SIZE | {"extent": extent, "eps2d": eps2d, "near": 2.2, "far": 5.8}

    def make():
        return splat_scenes.with_covariances(rng, splat_scenes.gaussians(rng), 5)

    scene, oracle = splat_scenes.away_from_thresholds(make, options, margin=1e-9)
    ct, _ = splat_scenes.directions(rng, scene, 5)
    first = compiled(implementation, "first", **options)
    rendering, gradients = first(*map(splat_scenes.tree, (scene, ct)))
    check_values(rendering, oracle, 1e-10)
    helpers.assert_trees_close(gradients, oracle.first(ct), 1e-8)
    z = scene["means"] @ scene["viewmat"][2, :3] + scene["viewmat"][2, 3]
    outside = (z < 2.2) | (z > 5.8)
    assert not np.asarray(gradients["means"])[outside].any() and not np.asarray(rendering.radii)[outside].any()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.thorough_if()
def test_degrees(degree, rng):
    """Coefficients beyond the degree do not count, even where they are NaN; degree 0 looks in no direction."""
    options = SIZE | {"sh_degree": degree}
    scene = splat_scenes.gaussians(rng, coefficients=12 if degree < 3 else 16)
    count = (degree + 1) ** 2
    oracle = splat_oracle.Oracle(scene | {"colors": scene["colors"][:, :count]}, **options)
    ct, _ = splat_scenes.directions(rng, scene)
    scene["colors"][:, count:] = np.nan
    rendering, gradients = compiled(None, "first", **options)(*map(splat_scenes.tree, (scene, ct)))
    check_values(rendering, oracle, 1e-10)
    want = oracle.first(ct)
    want["colors"] = np.pad(want["colors"], [(0, 0), (0, scene["colors"].shape[1] - count), (0, 0)])
    helpers.assert_trees_close(gradients, want, 1e-8)


@pytest.mark.thorough_if(implementation="xla")
def test_camera_by_differences(implementation, rng):
    """Pose and intrinsics, by differences of our own images."""
    scene, _ = splat_scenes.away_from_thresholds(functools.partial(splat_scenes.gaussians, rng), FULL)
    ct, v = splat_scenes.directions(rng, scene)
    every = compiled(implementation, "every", **FULL)
    x, y = (splat_scenes.tree(a) for a in (scene, ct))
    gradients = every(x, y, splat_scenes.tree(v))[2]
    spin, h = rng.normal(size=(3, 3)), 1e-7
    twist = np.zeros((4, 4))
    twist[:3, :3], twist[:3, 3] = spin - spin.T, rng.normal(size=3)
    moves = {"viewmat": twist @ scene["viewmat"], "K": np.array([[2.0, 0, 1], [0, -1, 3], [0, 0, 0]])}
    for name, move in moves.items():

        def value(step, name=name, move=move):
            r = every(x | {name: jnp.asarray(scene[name] + step * move)}, y, splat_scenes.tree(v))[0]
            return sum(float((ct[n] * np.asarray(getattr(r, n))).sum()) for n in OUTPUTS)

        difference = (value(h) - value(-h)) / (2 * h)
        np.testing.assert_allclose((np.asarray(gradients[name]) * move).sum(), difference, rtol=1e-5, err_msg=name)


@pytest.mark.thorough_if()
def test_third_order(rng):
    """Of the camera's pose, against differences of the second."""
    scene, _ = splat_scenes.away_from_thresholds(functools.partial(splat_scenes.gaussians, rng, P=6), FULL)
    ct, v = splat_scenes.directions(rng, scene)
    x, y, v = map(splat_scenes.tree, (scene, ct, v))

    def second(viewmat):
        def one(viewmat):
            return splat_scenes.loss(x | {"viewmat": viewmat}, y, FULL)

        return jax.jvp(jax.grad(one), (viewmat,), (v["viewmat"],))[1]

    program, h = helpers.quick_jit(second), 1e-7
    third = helpers.quick_jit(lambda m: jax.jvp(second, (m,), (v["viewmat"],))[1])(x["viewmat"])
    steps = [program(x["viewmat"] + step * v["viewmat"]) for step in (h, -h)]
    helpers.assert_close(third, (np.asarray(steps[0]) - np.asarray(steps[1])) / (2 * h), 1e-4)
