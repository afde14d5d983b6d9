"""The aggregate op against plain JAX at W1: value, gradient, Eikonal step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_knn_aggregate as jka

from . import inputs, measure

#: The workload that the original op was published with.
W1 = {"B": 2, "Q": 12288, "P": 4096, "F": 64, "K": 16}


def _elementwise(q: jax.Array, p: jax.Array, sigma: jax.Array, R: jax.Array) -> jax.Array:
    d = q[:, :, None] - p[:, None]
    u = [sum(R[:, None, :, i, c] * d[..., c] for c in range(3)) for i in range(3)]
    return sum(sigma[:, None, :, i] * u[i] * u[i] for i in range(3))


def _einsum(q: jax.Array, p: jax.Array, sigma: jax.Array, R: jax.Array) -> jax.Array:
    M = jnp.einsum("bpki,bpk,bpkj->bpij", R, sigma, R)
    d = q[:, :, None] - p[:, None]
    return jnp.einsum("bqpi,bpij,bqpj->bqp", d, M, d)


def plain(all_distances: Callable[..., jax.Array], q: Any, p: Any, f: Any, sigma: Any, R: Any, K: int) -> jax.Array:
    """What one writes without this package: search without gradient, then differentiate the K gathered."""
    _, idxs = jax.lax.top_k(-jax.lax.stop_gradient(all_distances(q, p, sigma, R)), K)
    take = jax.vmap(lambda a, i: a[i])
    d = q[:, :, None] - take(p, idxs)
    u = jnp.einsum("bqkij,bqkj->bqki", take(R, idxs), d)
    w = jnp.exp(-(take(sigma, idxs) * u * u).sum(-1))
    return jnp.einsum("bqk,bqkf->bqf", w, take(f, idxs))


def steps(op: Callable[..., jax.Array], x: inputs.Arrays, K: int) -> dict[str, Callable[[], Any]]:
    """Jitted calls on fixed inputs. Gradients are to all five inputs.

    gradient: of sum(f_out · g), g random. eikonal: of mean((|∇_q y| − 1)²) + mean(y²), y = tanh(f_out) @ lin.
    """
    rng = np.random.default_rng(1)
    B, Q, F = x[0].shape[0], x[0].shape[1], x[2].shape[2]
    g, lin = jnp.asarray(rng.normal(size=(B, Q, F)), jnp.float32), jnp.asarray(rng.normal(size=F), jnp.float32)

    def eikonal(x: inputs.Arrays) -> jax.Array:
        def sdf(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jnp.tanh(op(q, *x[1:], K)) @ lin
            return y.sum(), y

        gradient, y = jax.grad(sdf, has_aux=True)(x[0])
        return ((jnp.linalg.norm(gradient, axis=-1) - 1) ** 2).mean() + (y**2).mean()

    forward = jax.jit(lambda x: op(*x, K))
    gradient = jax.jit(jax.grad(lambda x: (op(*x, K) * g).sum()))
    step = jax.jit(jax.grad(eikonal))
    return {"forward": lambda: forward(x), "gradient": lambda: gradient(x), "eikonal": lambda: step(x)}


def run(rounds: int) -> dict[str, Any]:
    """W1 on both kinds of input: milliseconds, and ratios of the faster plain form to ours."""
    K = W1["K"]
    chain = 1 if jax.devices()[0].platform == "cpu" else 20
    contestants = {
        "jax_knn_aggregate": lambda *x: jka.knn_aggregate_aniso(*x).f_out,
        "plain JAX, elementwise": functools.partial(plain, _elementwise),
        "plain JAX, einsum": functools.partial(plain, _einsum),
    }
    out: dict[str, Any] = {"workload": W1, "ms": {}, "times_faster_than_plain_JAX": {}}
    for name, make in (("sphere", inputs.sphere), ("uniform", inputs.uniform)):
        x = make(*(W1[k] for k in "BQPF"))
        calls = {who: steps(op, x, K) for who, op in contestants.items()}
        out["ms"][name], out["times_faster_than_plain_JAX"][name] = {}, {}
        for column in ("forward", "gradient", "eikonal"):
            times = measure.medians({who: c[column] for who, c in calls.items()}, rounds, chain)
            ours, *rest = (times[who]["median_ms"] for who in contestants)
            out["ms"][name][column] = times
            out["times_faster_than_plain_JAX"][name][column] = min(rest) / ours
            text = f"{ours:9.3f} ms   plain JAX {min(rest):9.3f} ms   {min(rest) / ours:6.1f} times"
            print(f"W1 {name:8} {column:9} {text}", flush=True)
    return out
