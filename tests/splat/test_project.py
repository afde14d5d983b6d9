"""Projection and harmonics by kernels, in every role, against plain JAX and the definition in NumPy."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splat_oracle
import splat_scenes
from splat_scenes import HEIGHT, WIDTH

from jax_knn_aggregate.ops.splat import projection
from jax_knn_aggregate.ops.splat.project import Kind, Lens, family, project

LENS = Lens(WIDTH, HEIGHT, near=0.01, far=np.inf, eps2d=0.3, antialiased=False, reach=False)
Y = ("means2d", "conics", "opacities", "channels")

#: Every kind of Gaussians, and every option, between them.
CASES = {
    "degree 3": (LENS._replace(antialiased=True), Kind(False, True, 3)),
    "degree 2": (LENS._replace(reach=True, near=2.5, far=5.5), Kind(False, False, 2)),
    "degree 1": (LENS._replace(eps2d=0.1), Kind(True, True, 1)),
    "degree 0": (LENS, Kind(False, True, 0)),
    "covariances": (LENS._replace(antialiased=True, reach=True), Kind(True, True, None)),
}


def arrays(rng, kind, P=33, scene="plain", M=None):
    """Arguments of ``render_gaussians`` by name, with M harmonics."""
    M = M or (1 if kind.sh_degree is None else (kind.sh_degree + 1) ** 2)
    made = splat_scenes.gaussians(rng, scene, P=P, coefficients=M)
    if kind.covariances:
        made = splat_scenes.with_covariances(rng, made, 3) | {"colors": made["colors"]}
    return {n: made[n] for n in [*kind.names(), "viewmat", "K"]}


def seen(lens, kind, implementation):
    """Of arrays by name: y by name, and what has no derivative."""

    def fn(given):
        camera, usable = projection.camera(given["viewmat"], given["K"], kind.sh_degree is not None)
        got = project(lens, given, kind.sh_degree, camera, usable, implementation)
        return {n: getattr(got, n) for n in Y}, (got.depths, got.radii, got.reach)

    return fn


def every_role(lens, kind, implementation, map_over=None):
    """Of given, v, ct, v_ct, by name: what value, jvp, vjp, vjp_jvp and vjp_vjp make of them."""
    one = seen(lens, kind, implementation)
    if map_over is not None:
        one = jax.vmap(one, in_axes=(map_over,))

    def fn(given, v, ct, v_ct):
        def y_of(given):
            return one(given)[0]

        def first(given, ct):
            return jax.vjp(y_of, given)[1](ct)[0]

        def along(given, ct):
            return helpers_dot(jax.jvp(y_of, (given,), (v,))[1], ct)

        y, beside = one(given)
        return {
            "y": y,
            "beside": beside,
            "jvp": jax.jvp(y_of, (given,), (v,))[1],
            "vjp": first(given, ct),
            "vjp_jvp": jax.jvp(first, (given, ct), (v, v_ct))[1],
            "vjp_vjp": jax.grad(along, (0, 1))(given, ct),
        }

    return fn


def helpers_dot(a, b):
    return sum((a[n] * b[n]).sum() for n in Y)


@functools.cache
def compiled(lens, kind, implementation, map_over=None):
    return helpers.quick_jit(every_role(lens, kind, implementation, None if map_over is None else dict(map_over)))


def directions(rng, given, y):
    """Tangents of arrays, cotangents and their tangents."""
    v = {n: rng.normal(size=a.shape) for n, a in given.items()}
    ct, v_ct = ({n: rng.normal(size=a.shape) for n, a in y.items()} for _ in range(2))
    return v, ct, v_ct


def check(rng, lens, kind, given, map_over=None, dtype=np.float64, tolerance=1e-10):
    """Kernels against the reference; returns what kernels give."""
    shapes = jax.eval_shape(every_role(lens, kind, "xla", map_over), *both(given, given, {}, {}))["y"] if False else None
    one = seen(lens, kind, "xla")
    one = one if map_over is None else jax.vmap(one, in_axes=(map_over,))
    shapes = jax.eval_shape(one, splat_scenes.tree(given, dtype))[0]
    args = [splat_scenes.tree(a, dtype) for a in (given, *directions(rng, given, shapes))]
    key = None if map_over is None else tuple(sorted(map_over.items()))
    got, want = (compiled(lens, kind, i, key)(*args) for i in ("ffi", "xla"))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        if a.dtype == jnp.int32:
            np.testing.assert_array_equal(a, b, name)
        else:
            helpers.assert_close(a, b, tolerance, name)
    return args, got
