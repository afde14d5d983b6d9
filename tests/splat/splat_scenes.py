"""Small scenes of Gaussians that differ in what acts on them, for the tests and the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import splat_oracle

from jax_knn_aggregate import render_gaussians

KINDS = ("plain", "opaque", "wide", "near", "principal point")
WIDTH, HEIGHT = 40, 33
SIZE = {"width": WIDTH, "height": HEIGHT}
OUTPUTS = ("image", "alpha", "depth")


def pose(rng):
    """World to camera: a rotation, and a translation."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    viewmat = np.eye(4)
    viewmat[:3, :3] = q * np.linalg.det(q)
    viewmat[:3, 3] = rng.normal(size=3)
    return viewmat


def gaussians(rng, kind="plain", P=30, coefficients=16):
    """Arguments by name, of Gaussians of which many are in view."""
    viewmat, K = pose(rng), np.array([[31.0, 0, 19], [0, 29, 17.5], [0, 0, 1]])
    z = rng.uniform(2, 6, P)
    across = rng.uniform(-1, 1, (P, 2))
    scales, opacities = 0.25 * np.exp(0.5 * rng.normal(size=(P, 3))), rng.uniform(0.1, 0.95, P)
    if kind == "opaque":
        scales, opacities = 2 * scales, rng.uniform(0.9, 3, P)
    if kind == "wide":
        across, scales = np.sign(across) * rng.uniform(0.7, 2.2, (P, 2)), 3 * scales
    if kind == "near":
        z = rng.uniform(-0.6, 1.2, P)
    if kind == "principal point":
        K[0, 2], K[1, 2] = -3, 41
    positions = np.stack([across[:, 0] * z * 0.7, across[:, 1] * z * 0.6, z], -1)
    return {
        "means": (positions - viewmat[:3, 3]) @ viewmat[:3, :3],
        "quats": rng.normal(size=(P, 4)) * rng.uniform(0.2, 3, (P, 1)),
        "scales": scales,
        "opacities": opacities,
        "colors": 0.6 * rng.normal(size=(P, coefficients, 3)),
        "viewmat": viewmat,
        "K": K,
        "background": rng.uniform(size=3),
        "means2d_offset": rng.normal(size=(P, 2)),
    }


def with_covariances(rng, scene, C):
    """Given as matrices, which are not symmetric, with C channels of colour."""
    P = len(scene["means"])
    M, noise = rng.normal(size=(P, 3, 3)) * scene["scales"][:, None], rng.normal(size=(P, 3, 3))
    matrices = M @ M.swapaxes(1, 2) + noise - noise.swapaxes(1, 2)
    matrices[:1] = np.diag([0.1, -0.2, 0.1])  # which counts only where its exponent is not positive
    return scene | {
        "quats": None,
        "scales": None,
        "covariances": matrices,
        "colors": rng.normal(size=(P, C)),
        "background": rng.normal(size=C),
    }


def away_from_thresholds(make, options, margin=3e-5):
    """A scene nothing of which comes so near to a threshold that rounding could take it to the other side; its oracle.

    3e-5: some float32 roundings of q. Most scenes keep away, of opaque ones one in ten.
    """
    for _ in range(400):
        scene = make()
        oracle = splat_oracle.Oracle(scene, **options)
        if oracle.margin > margin:
            return scene, oracle
    raise AssertionError("no scene keeps away from thresholds")


def render(scene, options, implementation=None):
    arguments = {"quats": None, "scales": None} | scene
    return render_gaussians(**arguments, **options, implementation=implementation)


def outputs(scene, options, implementation=None):
    r = render(scene, options, implementation)
    return {"image": r.image, "alpha": r.alpha, "depth": r.depth}


def loss(scene, ct, options, implementation=None):
    y = outputs(scene, options, implementation)
    return sum((ct[n] * y[n]).sum() for n in OUTPUTS)


def directions(rng, scene, C=3):
    """Cotangents of outputs, and tangents of arrays."""
    shape = (HEIGHT, WIDTH)
    ct = {n: rng.normal(size=(*shape, C) if n == "image" else shape) for n in OUTPUTS}
    return ct, {n: rng.normal(size=a.shape) for n, a in scene.items() if a is not None}


def tree(scene, dtype=np.float64):
    """JAX arrays of those that are given."""
    return {n: jnp.asarray(a, dtype) for n, a in scene.items() if a is not None}


def every_order(options, implementation=None):
    """Of scene, ct, v: outputs and radii, tangents, gradients, the Hessian of Σ ct·output times v."""

    def fn(scene, ct, v):
        def first(scene):
            return jax.grad(loss)(scene, ct, options, implementation)

        r = render(scene, options, implementation)
        tangents = jax.jvp(lambda scene: outputs(scene, options, implementation), (scene,), (v,))[1]
        return r, tangents, *jax.jvp(first, (scene,), (v,))

    return fn
