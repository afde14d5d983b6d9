"""Runs every kernel on small inputs and compares with the reference; for runs under compute-sanitizer."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:] = [p for p in sys.path if p not in ("", ".")]

import jax_knn_aggregate as jka  # noqa: E402


def main() -> int:
    rng = np.random.default_rng(0)
    worst = 0.0
    for Q, P, F, K in ((37, 300, 64, 16), (5, 70, 7, 40), (3, 130, 1, 130)):
        x = tuple(jnp.asarray(rng.random(s), jnp.float32) for s in ((2, Q, 3), (P, 3), (P, F), (P, 3), (P, 3, 3)))

        def loss(x, implementation, K=K):
            def sdf(q):
                op = jax.vmap(lambda q: jka.knn_aggregate_aniso(q, *x[1:], K, implementation=implementation))
                f_out, w_out, dists, _ = op(q)
                return jnp.sin(f_out).sum() + (w_out * dists).sum()

            return jnp.square(jax.grad(sdf)(x[0])).mean()

        ours, reference = (jax.jit(jax.grad(loss), static_argnums=1)(x, i) for i in (None, "xla"))
        for a, b in zip(ours, reference, strict=True):
            worst = max(worst, float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
        iso = jka.knn_aggregate(x[0][0], x[1], x[2], x[3][:, :1], K)
        worst = max(worst, float(jnp.abs(iso.dists[:, 0] - jka.knn_search(x[0][0], x[1], 1).dists[:, 0]).max()))
    w, d, v = (jnp.asarray(a, jnp.float32) for a in rng.random((3, 700)))
    m = jnp.linspace(0, 1, 700)
    ids = jnp.sort(jnp.asarray(rng.integers(-1, 6, 700), jnp.int32))
    losses = {
        "dense": lambda x, i: jka.distortion_loss(*x, implementation=i),
        "flat": lambda x, i: jka.flatten_distortion_loss(*x, ids, 5, implementation=i),
    }
    for loss in losses.values():

        def twice(x, i, loss=loss):
            value, gradient = jax.value_and_grad(loss)(x, i)
            return value + sum((a * v).sum() for a in gradient)

        ours, reference = (jax.jit(jax.grad(twice), static_argnums=1)((w, m, d), i) for i in (None, "xla"))
        for a, b in zip(ours, reference, strict=True):
            worst = max(worst, float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
    for interpolation in ("linear", "smoothstep"):
        grid = jka.HashGrid(levels=6, log2_hashmap_size=10, per_level_scale=1.5, interpolation=interpolation)
        x, c = (jnp.asarray(rng.random(s), jnp.float32) for s in ((700, 3), (700, grid.outputs)))

        def bent(x, i, grid=grid):
            def features(x):
                return jka.hash_grid(x[0], x[1], grid, implementation=i)

            slope = jax.grad(lambda p: (features((p, *x[1:])) * x[2]).sum())(x[0])
            return jnp.square(slope).mean() + jnp.square(features(x)).mean()

        x = (x, jnp.asarray(rng.random((grid.rows, grid.features)), jnp.float32), c)
        ours, reference = (jax.jit(jax.grad(bent), static_argnums=1)(x, i) for i in (None, "xla"))
        for a, b in zip(ours, reference, strict=True):
            worst = max(worst, float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
    print("largest relative error", worst)
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
