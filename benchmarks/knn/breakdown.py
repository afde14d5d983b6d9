"""What an Eikonal step consists of: each part as a program of its own, and the whole step.

The step launches search, value, the vjp for q alone, vjp_vjp and vjp, and once the grouping of pairs by point, which
the last two share. Programs of vjp_vjp and vjp alone group too: that time is taken off theirs. The rest of the whole
step is what XLA does: tanh, the head, norms, sums of gradients.
"""

from __future__ import annotations

from typing import Any

import jax

import jax_knn_aggregate as jka
from jax_knn_aggregate.ops.knn import aggregate

from ..harness.measure import Case, Program, Session
from .inputs import Arrays, Clouds
from .knn_aggregate import W1, ours, steps
from .scale import STEP


def programs(x: Arrays, K: int) -> dict[str, Program]:
    """x: q, p, f, sigma, R, without batch axis."""
    q, p, f, *metric = x
    idxs = jax.jit(lambda: jka.knn_search_aniso(q, p, *metric, K).idxs)()
    keys = jax.random.split(jax.random.key(3))
    g, v = jax.random.normal(keys[0], (q.shape[0], f.shape[1])), jax.random.normal(keys[1], q.shape)
    platform = {"gpu": "cuda"}.get(jax.devices()[0].platform, "cpu")

    def value(idxs: jax.Array, *x: jax.Array) -> jax.Array:
        return jka.knn_aggregate_aniso_precomputed(*x, idxs).f_out

    def vjp(idxs: jax.Array, x: Arrays, g: jax.Array) -> Any:
        return jax.vjp(lambda *x: value(idxs, *x), *x)[1](g)

    def vjp_q(idxs: jax.Array, x: Arrays, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda q: value(idxs, q, *x[1:]), x[0])[1](g)[0]

    def vjp_vjp(idxs: jax.Array, x: Arrays, g: jax.Array, v: jax.Array) -> Any:
        return jax.vjp(lambda x, g: vjp_q(idxs, x, g), x, g)[1](v)

    return {
        "search": Program(lambda *x: jka.knn_search_aniso(*x, K).idxs, q, p, *metric),
        "grouping": Program(lambda idxs: aggregate.invert(platform, idxs, p.shape[0], ()), idxs),
        "value": Program(value, idxs, *x),
        "vjp for q": Program(vjp_q, idxs, x, g),
        "vjp_vjp": Program(vjp_vjp, idxs, x, g, v),
        "vjp": Program(vjp, idxs, x, g),
        "step": steps(ours(K), x)["eikonal"],
    }


def run(session: Session) -> dict[str, Any]:
    """Milliseconds of each part at the size of W1 in one scene, and of a large cloud."""
    w1 = {"P": W1["P"], "Q": W1["B"] * W1["Q"], "F": W1["F"], "K": W1["K"]}
    sizes = {"far shell": w1, "surface": STEP}
    if session.quick:
        sizes = {"far shell": {"P": 64, "Q": 128, "F": 8, "K": 4}}
    clouds = Clouds(max(max(s["P"], s["Q"]) for s in sizes.values()))
    cases, names = [], {}
    for cloud, size in sizes.items():
        q, _, p, *metric = clouds(cloud, size["P"], size["Q"])
        f = jax.random.normal(jax.random.key(2), (size["P"], size["F"]))
        name = f"{cloud}, P={size['P']:,}, Q={size['Q']:,}, K={size['K']}, F={size['F']}"
        names[name] = size
        # As contestants of one case they take turns, so that the sum of the parts can be compared with the whole.
        cases.append(Case((name,), programs((q, p, f, *metric), size["K"])))
    measured = session.measure(cases)
    parts = {}
    for name, times in measured.items():
        ms = {part: t["median_ms"] for part, t in times.items()}
        for part in ("vjp_vjp", "vjp"):
            ms[part] -= ms["grouping"]
        whole = ms.pop("step")
        parts[name] = {**ms, "rest": whole - sum(ms.values()), "step": whole}
    return {"sizes": names, "ms": measured, "parts_ms": parts}
