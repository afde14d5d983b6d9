"""Projection and harmonics by kernels, in every role, against the definition in NumPy and against plain JAX."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splat_oracle
import splat_scenes
from splat_scenes import HEIGHT, SIZE, WIDTH

from jax_knn_aggregate.ops.splat import projection
from jax_knn_aggregate.ops.splat.project import Kind, Lens, project

LENS = Lens(WIDTH, HEIGHT, near=0.01, far=np.inf, eps2d=0.3, antialiased=False, reach=True)
#: Every kind of Gaussians, and every option, between them.
CASES = {
    "degree 3": (LENS._replace(antialiased=True), Kind(False, True, 3)),
    "degree 2": (LENS._replace(reach=False, near=0.3, far=4.0), Kind(False, False, 2)),
    "degree 1": (LENS._replace(eps2d=0.1), Kind(True, True, 1)),
    "degree 0": (LENS, Kind(False, True, 0)),
    "covariances": (LENS._replace(antialiased=True), Kind(True, True, None)),
}
FULL = CASES["degree 3"]
Y = ("means2d", "conics", "opacities", "channels")
CAMERA = ("viewmat", "K")
ROLES = ("y", "jvp", "vjp", "vjp_jvp", "vjp_vjp")


def arrays(rng, kind, scene="plain", P=33, more=0):
    """Arguments of ``render_gaussians`` by name, with ``more`` harmonics than count."""
    M = 1 if kind.sh_degree is None else (kind.sh_degree + 1) ** 2 + more
    made = splat_scenes.gaussians(rng, scene, P=P, coefficients=M)
    if kind.covariances:
        made |= {"covariances": splat_scenes.with_covariances(rng, made, 3)["covariances"]}
    return {n: made[n] for n in (*kind.names(), *CAMERA)}


def directions(rng, given, sh_degree, batch=()):
    """Tangents of arrays; cotangents of y, and tangents of these."""
    P = given["means"].shape[-2]
    shapes = dict(zip(Y, ((P, 2), (P, 3), (P,), (P,) if sh_degree is None else (P, 4)), strict=True))
    v = {n: rng.normal(size=a.shape) for n, a in given.items()}
    return v, *({n: rng.normal(size=(*batch, *s)) for n, s in shapes.items()} for _ in range(2))


def every_role(lens, kind, implementation, mapped):
    """Of given, v, ct, v_ct, by name: what value, jvp, vjp, vjp_jvp and vjp_vjp make of them."""

    def one(given):
        camera, usable = projection.camera(given["viewmat"], given["K"], kind.sh_degree is not None)
        seen = project(lens, given, kind.sh_degree, camera, usable, implementation)
        return {n: getattr(seen, n) for n in Y}, {n: getattr(seen, n) for n in ("depths", "radii", "reach")}

    def all_of(given):
        axes = {n: 0 if n in mapped else None for n in given}
        return jax.vmap(one, in_axes=(axes,))(given) if mapped else one(given)

    def fn(given, v, ct, v_ct):
        def y_of(given):
            return all_of(given)[0]

        def first(given, ct):
            return jax.vjp(y_of, given)[1](ct)[0]

        def along(given, ct):
            dy = jax.jvp(y_of, (given,), (v,))[1]
            return sum((dy[n] * ct[n]).sum() for n in Y)

        y, beside = all_of(given)
        return {
            "y": y,
            "beside": beside,
            "jvp": jax.jvp(y_of, (given,), (v,))[1],
            "vjp": first(given, ct),
            "vjp_jvp": jax.jvp(first, (given, ct), (v, v_ct))[1],
            "vjp_vjp": jax.grad(along, (0, 1))(given, ct),
        }

    return fn


@functools.cache
def compiled(lens, kind, implementation, mapped=()):
    return helpers.quick_jit(every_role(lens, kind, implementation, mapped))


def tree(args, dtype=np.float64):
    return [splat_scenes.tree(a, dtype) for a in args]


def from_numpy(lens, kind, given, v, ct, v_ct):
    """The same by the oracle, but for what has no derivative; and the oracle."""
    options = {"near": lens.near, "far": lens.far, "eps2d": lens.eps2d, "antialiased": lens.antialiased}
    options |= SIZE | {"sh_degree": kind.sh_degree}

    def oracle(step):
        moved = {n: a + step * v[n] for n, a in given.items()}
        if kind.sh_degree is None:
            moved["colors"] = np.zeros((len(given["means"]), 3))
        else:
            moved["colors"] = moved["colors"][:, : (kind.sh_degree + 1) ** 2]
        return splat_oracle.Oracle(moved, **options)

    def of_x(gradients):
        got = {n: gradients[n] for n in given}
        if kind.sh_degree is not None:
            rest = given["colors"].shape[1] - got["colors"].shape[1]
            got["colors"] = np.pad(got["colors"], [(0, 0), (0, rest), (0, 0)])
        return got

    def columns(ct):
        return {n: a.reshape(len(a), -1) for n, a in ct.items()}

    def moved_by(oracle, ct):
        return of_x({n: a.imag / splat_oracle.STEP for n, a in oracle.first_of_projected(ct).items()})

    step = 1j * splat_oracle.STEP
    still, moving, ct, v_ct = oracle(0), oracle(step), columns(ct), columns(v_ct)
    dy = {n: a.imag / splat_oracle.STEP for n, a in moving.values_of_projected().items()}
    return still, {
        "y": still.values_of_projected(),
        "jvp": dy,
        "vjp": of_x(still.first_of_projected(ct)),
        "vjp_jvp": moved_by(moving, {n: a + step * v_ct[n] for n, a in ct.items()}),
        "vjp_vjp": (moved_by(moving, ct), dy),
    }


@pytest.mark.parametrize("scene", ["wide", "near"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(case=["degree 2", "degree 1", "degree 0"], scene="near")
def test_roles(case, scene, implementation, rng):
    """In float64, against complex steps of the definition."""
    lens, kind = CASES[case]
    given = arrays(rng, kind, scene, more=3 if case == "degree 2" else 0)
    args = given, *directions(rng, given, kind.sh_degree)
    got = compiled(lens, kind, implementation)(*tree(args))
    oracle, want = from_numpy(lens, kind, *args)
    assert oracle.drawn.sum() > 5
    assert oracle.limited_count > 5 if scene == "wide" else oracle.drawn.sum() < 30
    for role in ROLES:
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got[role]), jax.tree.leaves(want[role]), strict=True
        ):
            helpers.assert_close(np.reshape(a, b.shape), b, 1e-9, f"{role}{jax.tree_util.keystr(path)}")
    beside = got["beside"]
    np.testing.assert_array_equal(beside["radii"], oracle.radii)
    if lens.reach:
        np.testing.assert_array_equal(beside["reach"], np.where(oracle.drawn[:, None], oracle.tiles, 0))
    depths = np.asarray(got["y"]["channels"], np.float32).reshape(33, -1)[:, -1]
    np.testing.assert_array_equal(beside["depths"], depths)


def test_float32(kernels, rng):
    lens, kind = FULL
    given = arrays(rng, kind)
    args = [
        jax.tree.map(lambda a: a.astype(np.float32).astype(np.float64), a)
        for a in (given, *directions(rng, given, kind.sh_degree))
    ]
    got = compiled(lens, kind, "ffi")(*tree(args, np.float32))
    _, want = from_numpy(lens, kind, *args)
    for role, tolerance in zip(ROLES, (1e-5, 1e-4, 1e-4, 5e-4, 5e-4), strict=True):
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(got[role]))
        for a, b in zip(jax.tree.leaves(got[role]), jax.tree.leaves(want[role]), strict=True):
            helpers.assert_close(np.reshape(a, b.shape), b, tolerance, role)


@pytest.mark.parametrize("case", ["degree 3", "covariances"])
@pytest.mark.thorough_if(case="covariances")
def test_not_finite(case, kernels, rng):
    """What is not drawn is exactly 0 in every role, whatever it consists of, and leaves all others their bits."""
    lens, kind = CASES[case]
    given = arrays(rng, kind)
    args = given, *directions(rng, given, kind.sh_degree)
    clean = compiled(lens, kind, "ffi")(*tree(args))
    lost = np.zeros(33, bool)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        for j, name in enumerate(kind.names()):
            at = 3 * j + i
            row = given[name].reshape(33, -1)
            row[at, rng.integers(row.shape[1])] = value
            lost[at] = True
    if not kind.covariances:
        given["quats"][20], lost[20] = 0, True
    got = compiled(lens, kind, "ffi")(*tree(args))
    of_camera = 0
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(clean), strict=True):
        if path[-1].key in CAMERA:
            assert np.isfinite(a).all() and np.asarray(a).any()
            of_camera += 1
            continue
        name, a, b = jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)
        assert not a[lost].any(), name
        np.testing.assert_array_equal(a[~lost], b[~lost], name)
    assert of_camera == 6


@pytest.mark.parametrize("P", [0, 1, 40])
@pytest.mark.thorough_if(P=1)
def test_sizes(P, kernels, rng):
    """As many Gaussians of 33, or once more of them."""
    lens, kind = FULL
    given = arrays(rng, kind)
    args = given, *directions(rng, given, kind.sh_degree)
    whole = compiled(lens, kind, "ffi")(*tree(args))

    def some(tree):
        return {n: a if n in CAMERA else a[np.arange(P) % 33] for n, a in tree.items()}

    got = compiled(lens, kind, "ffi")(*tree(map(some, args)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(whole), strict=True):
        if path[-1].key not in CAMERA:
            np.testing.assert_array_equal(a, np.asarray(b)[np.arange(P) % 33], jax.tree_util.keystr(path))
        elif P == 0:
            assert not np.asarray(a).any()


@pytest.mark.parametrize("mapped", [("viewmat",), ("K", "opacities"), ("means", "colors"), "all"], ids=str)
@pytest.mark.thorough_if(mapped=[("K", "opacities"), ("means", "colors"), "all"])
def test_batch(mapped, kernels, rng):
    """Mapped over some arrays; gradients in all others are sums."""
    lens, kind = FULL
    given = arrays(rng, kind)
    mapped = tuple(given) if mapped == "all" else mapped
    for name in mapped:  # near enough to see something
        noise = 0.05 * rng.normal(size=(3, *given[name].shape))
        if name == "viewmat":
            noise[:, 3] = 0
        given[name] = given[name] + noise
    args = given, *directions(rng, given, kind.sh_degree, (3,))
    got = compiled(lens, kind, "ffi", mapped)(*tree(args))

    def entry(i):
        x, v, *cts = args
        of_x = ({n: a[i] if n in mapped else a for n, a in t.items()} for t in (x, v))
        return compiled(lens, kind, "ffi")(*tree([*of_x, *({n: a[i] for n, a in t.items()} for t in cts)]))

    each = [jax.tree.leaves(entry(i)) for i in range(3)]
    for (path, a), *parts in zip(jax.tree_util.tree_leaves_with_path(got), *each, strict=True):
        want = np.stack(parts)
        want = want if want.shape == a.shape else want.sum(0)
        helpers.assert_close(a, want, 1e-12, jax.tree_util.keystr(path))


def test_one_call_forward(kernels, rng):
    """Radii and depths come from the call that projects."""
    options = SIZE | {"sh_degree": 1, "extent": "3sigma"}
    scene = splat_scenes.tree(splat_scenes.gaussians(rng, coefficients=4))
    ct, _ = splat_scenes.directions(rng, scene)

    def calls(fn):
        text = helpers.quick_jit(fn).lower(scene).compile().as_text()
        return re.findall(r'custom_call_target="jax_knn_aggregate\.(splat_project)"', text)

    assert len(calls(lambda scene: splat_scenes.render(scene, options))) == 1
    value_and_grad = jax.value_and_grad(lambda scene: splat_scenes.loss(scene, ct, options))
    assert len(calls(value_and_grad)) == 2
