"""Forward pass and Eikonal step against the number of neighbours and of features, at the other sizes of W1."""

from __future__ import annotations

from typing import Any

from ..harness.measure import OURS, Case, Session
from . import inputs
from .knn_aggregate import W1, elementwise, ours, plain, steps

NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEATURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Plain JAX runs at these, and on GPUs alone: on two cores each call would take a second.
PLAIN = (1, 4, 16, 64, 256)


def run(session: Session) -> dict[str, Any]:
    w1 = {"B": 2, "Q": 128, "P": 64, "F": 8, "K": 4} if session.quick else W1
    points = [("K", K) for K in NEIGHBOURS] + [("F", F) for F in FEATURES]
    if session.quick:
        points = [("K", 1), ("K", 8), ("F", 1), ("F", 8)]
    cases = []
    for axis, n in points:
        size = w1 | {axis: n}
        x = inputs.sphere(*(size[k] for k in "BQPF"))
        contestants = {OURS: steps(ours(size["K"]), x)}
        if session.quick or (session.large and n in PLAIN):
            contestants["plain JAX, elementwise"] = steps(plain(elementwise, size["K"]), x)
        for column in ("forward", "eikonal"):
            programs = {who: of_step[column] for who, of_step in contestants.items()}
            cases.append(Case((axis, str(n), column), programs))
    return {"workload": w1, "ms": session.measure(cases)}
