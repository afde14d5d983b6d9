"""Where a CUDA search should build an index: both ways at many sizes, against what ``_cuda_index_pays`` says."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax.numpy as jnp

import jax_knn_aggregate as jka
from jax_knn_aggregate.ops.knn import search

from ..harness.measure import Case, Program, Session
from .inputs import Clouds

ALL, INDEX = "all pairs", "index"


def run(session: Session) -> dict[str, Any]:
    """Milliseconds both ways."""
    points, queries = [4096, 8192, 16384, 32768, 65536], [1024, 16384, 131072]
    if session.quick:
        points, queries = [64, 256], [128]
    clouds = Clouds(max(*points, *queries))
    cases = []
    for K in (4, 8) if session.quick else (16, 64, 128):  # tensor cores serve K up to 64
        for P in points:
            for Q in queries:
                q, _, *cloud = clouds("surface", P, Q)

                def all_pairs(*x: Any, K: int = K) -> Any:
                    return jka.knn_search_aniso(*x, K).idxs

                def indexed(*x: Any, K: int = K) -> Any:
                    return jka.knn_search_aniso(*x, K, index=jka.build_index(*x[1:])).idxs

                contestants = {ALL: Program(all_pairs, q, *cloud), INDEX: Program(indexed, q, *cloud)}
                cases.append(Case((str(K), str(P), str(Q)), contestants))
    with mock.patch.object(search, "_cuda_index_pays", lambda *_: False):
        return {"ms": session.measure(cases)}


def rule(ms: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each size, what the package picks, and how many times longer that takes than the better way."""
    rows = []
    for K, of_points in ms.items():
        for P, of_queries in of_points.items():
            for Q, ways in of_queries.items():
                times = {way: t["median_ms"] for way, t in ways.items()}
                sizes = {"K": int(K), "P": int(P), "Q": int(Q)}
                picked = INDEX if search._cuda_index_pays(sizes["Q"], sizes["P"], sizes["K"], jnp.float32) else ALL
                rows.append({**sizes, "picked": picked, "longer": times[picked] / min(times.values())})
    return rows
