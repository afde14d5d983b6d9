"""Where a CUDA search should build an index: both ways at many sizes, against what ``_cuda_index_pays`` says."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax.numpy as jnp

import jax_knn_aggregate as jka
from jax_knn_aggregate import _search

from .inputs import Clouds
from .measure import Case, Program, Session

ALL, INDEX = "all pairs", "index"


def run(session: Session) -> dict[str, Any]:
    """Milliseconds both ways, what the rule picks, and how much longer that takes than the better way."""
    points, queries = [4096, 8192, 16384, 32768, 65536], [1024, 16384, 131072]
    if session.quick:
        points, queries = [64, 256], [128]
    clouds = Clouds(max(*points, *queries))
    cases, sizes = [], []
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
                sizes.append((K, P, Q))
    with mock.patch.object(_search, "_cuda_index_pays", lambda *_: False):
        ms = session.measure(cases)
    rule = []
    for K, P, Q in sizes:
        times = {way: t["median_ms"] for way, t in ms[str(K)][str(P)][str(Q)].items()}
        picked = INDEX if _search._cuda_index_pays(Q, P, K, jnp.float32) else ALL
        rule.append({"K": K, "P": P, "Q": Q, "picked": picked, "longer": times[picked] / min(times.values())})
    return {"ms": ms, "rule": rule}
