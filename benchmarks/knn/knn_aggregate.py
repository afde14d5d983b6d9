"""The aggregate op against plain JAX at W1: value, gradient, Eikonal step; what is hard for scatters and batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_knn_aggregate as jka

from ..harness.measure import OURS, Case, Program, Session
from . import inputs
from .ckdtree import ckdtree

#: The workload that the original op was published with.
W1 = {"B": 2, "Q": 12288, "P": 4096, "F": 64, "K": 16}
#: Many scenes, and one scene of as many queries of as many points.
SCENES = {"B": 64, "Q": 2048, "P": 1024, "F": 64, "K": 16}

Op = Callable[..., jax.Array]


def elementwise(q: jax.Array, p: jax.Array, sigma: jax.Array, R: jax.Array) -> jax.Array:
    """All distances (B, Q, P)."""
    d = q[:, :, None] - p[:, None]
    u = [sum(R[:, None, :, i, c] * d[..., c] for c in range(3)) for i in range(3)]
    return sum(sigma[:, None, :, i] * u[i] * u[i] for i in range(3))


def einsum(q: jax.Array, p: jax.Array, sigma: jax.Array, R: jax.Array) -> jax.Array:
    """All distances (B, Q, P)."""
    M = jnp.einsum("bpki,bpk,bpkj->bpij", R, sigma, R)
    d = q[:, :, None] - p[:, None]
    return jnp.einsum("bqpi,bpij,bqpj->bqp", d, M, d)


def nearest(all_distances: Op, K: int, q: Any, p: Any, sigma: Any, R: Any) -> jax.Array:
    return jax.lax.top_k(-jax.lax.stop_gradient(all_distances(q, p, sigma, R)), K)[1]


def gathered(idxs: jax.Array, q: Any, p: Any, f: Any, sigma: Any, R: Any) -> jax.Array:
    take = jax.vmap(lambda a, i: a[i])
    d = q[:, :, None] - take(p, idxs)
    u = jnp.einsum("bqkij,bqkj->bqki", take(R, idxs), d)
    w = jnp.exp(-(take(sigma, idxs) * u * u).sum(-1))
    return jnp.einsum("bqk,bqkf->bqf", w, take(f, idxs).astype(w.dtype)).astype(f.dtype)


def plain(all_distances: Op, K: int) -> Op:
    """What one writes without this package: search without gradient, then differentiate the K gathered."""
    return lambda q, p, f, sigma, R: gathered(nearest(all_distances, K, q, p, sigma, R), q, p, f, sigma, R)


def ours(K: int, **options: Any) -> Op:
    return lambda *x: jka.knn_aggregate_aniso(*x, K, **options).f_out


def eikonal(op: Op, x: inputs.Arrays, lin: jax.Array) -> jax.Array:
    """mean((|∇_q y| − 1)²) + mean(y²), y = tanh(f_out) @ lin."""

    def sdf(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.tanh(op(q, *x[1:]).astype(q.dtype)) @ lin
        return y.sum(), y

    gradient, y = jax.grad(sdf, has_aux=True)(x[0])
    return ((jnp.linalg.norm(gradient, axis=-1) - 1) ** 2).mean() + (y**2).mean()


def head(F: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=F), jnp.float32)


def steps(op: Op, x: inputs.Arrays) -> dict[str, Program]:
    """Programs on fixed inputs q, p, f, sigma, R. Gradients are to all five, if nothing else is said.

    gradient: of sum(f_out · g), g random. eikonal: of ``eikonal``. eikonal, head alone: the gradient of that in lin,
    the inputs of the op being frozen.
    """
    g = jax.random.normal(jax.random.key(1), (*x[0].shape[:-1], x[2].shape[-1]))
    lin = head(x[2].shape[-1])
    loss = functools.partial(eikonal, op)
    return {
        "forward": Program(op, *x),
        "gradient": Program(jax.grad(lambda x, g: (op(*x) * g).sum()), x, g),
        "eikonal": Program(jax.grad(loss), x, lin),
        "eikonal, head alone": Program(jax.grad(loss, 1), x, lin),
    }


def _cases(workload: str, x: inputs.Arrays, contestants: dict[str, Op], columns: list[str]) -> list[Case]:
    programs = {who: steps(op, x) for who, op in contestants.items()}
    return [Case((workload, column), {who: p[column] for who, p in programs.items()}) for column in columns]


def run(session: Session) -> dict[str, Any]:
    """Milliseconds, ratios of plain JAX's to ours, and queries per millisecond of the batch of scenes.

    Both forms of plain JAX run on the first workload; the one whose forward pass was faster runs on the others.
    """
    w1 = {"B": 2, "Q": 256, "P": 128, "F": 8, "K": 4} if session.quick else W1
    scenes = {"B": 8, "Q": 64, "P": 32, "F": 8, "K": 4} if session.quick else SCENES
    K, sizes = w1["K"], [w1[k] for k in "BQPF"]
    sphere, uniform = inputs.sphere(*sizes), inputs.uniform(*sizes)
    forms = {"plain JAX, elementwise": plain(elementwise, K), "plain JAX, einsum": plain(einsum, K)}
    columns = ["forward", "gradient", "eikonal"]
    everything = [*columns, "eikonal, head alone"]
    forward, *others = _cases("sphere", sphere, {OURS: ours(K), **forms}, everything)
    tree = {} if session.large else ckdtree(*sphere[:2], K)
    ms = session.measure([Case(forward.keys, {**forward.contestants, **tree}), *others])
    form = min(forms, key=lambda who: ms["sphere"]["forward"][who]["median_ms"])
    contestants = {OURS: ours(K), form: forms[form]}

    idxs = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (w1["B"], w1["Q"], K))
    given = {
        OURS: lambda *x: jka.knn_aggregate_aniso_precomputed(*x, idxs).f_out,
        form: functools.partial(gathered, idxs),
    }
    q, p, f, *metric = sphere
    B, Q, P, F = (scenes[k] for k in "BQPF")
    many, one = f"{B} scenes of {Q} queries, {P} points", f"1 scene of {B * Q} queries, {P} points"
    cases = [
        *_cases("uniform", uniform, contestants, everything),
        *_cases("the same K points for all queries", sphere, given, columns),
        *_cases("sphere, bfloat16 features", (q, p, f.astype(jnp.bfloat16), *metric), contestants, columns),
        *_cases(many, inputs.sphere(B, Q, P, F), contestants, ["forward", "eikonal"]),
        *_cases(one, inputs.sphere(1, B * Q, P, F), contestants, ["forward", "eikonal"]),
    ]
    ms |= session.measure(cases)
    faster = {
        workload: {column: _plain_ms(times) / times[OURS]["median_ms"] for column, times in of_column.items()}
        for workload, of_column in ms.items()
    }
    queries_per_ms = {
        workload: {column: B * Q / times[OURS]["median_ms"] for column, times in ms[workload].items()}
        for workload in (many, one)
    }
    return {
        "workload": w1,
        "scenes": scenes,
        "ms": ms,
        "times_faster_than_plain_JAX": faster,
        "queries_per_ms": queries_per_ms,
    }


def _plain_ms(times: dict[str, dict[str, float]]) -> float:
    return min(t["median_ms"] for who, t in times.items() if who.startswith("plain JAX"))
