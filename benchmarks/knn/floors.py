"""The least that each kernel of a step must move and compute, counted, in float32, and the time that it takes an H200.

N queries in all scenes, P points in all scenes, F features, K neighbours; NK pairs.
"""

from __future__ import annotations

import dataclasses

#: Numbers of a point's metric and place: p, sigma, R.
POINT = 15


@dataclasses.dataclass(frozen=True)
class Floor:
    """bytes: each operand read once, each result written once, of which caches can spare nothing. gathered: bytes of
    rows that pairs read, mostly from caches. instructions: multiply-adds of features, and those of the metric."""

    bytes: int
    gathered: int
    instructions: int

    def ms(self, bytes_per_second: float, instructions_per_second: float) -> float:
        return 1e3 * max(self.bytes / bytes_per_second, self.instructions / instructions_per_second)


def floors(B: int, P: int, Q: int, F: int, K: int) -> dict[str, Floor]:
    """Of B scenes of P points and Q queries each.

    Of the metric, a pair takes 3 instructions for d, 9 for R d, 3 for sigma R d, 3 for dist and one to use it; Rᵀ of a
    vector takes 9 more, outer products with d 9 more. Search: all pairs of queries and points, by these instructions;
    tensor cores and the index stay below.
    """
    N, P = B * Q, B * P
    pairs = N * K
    q, cloud, f, idxs = 12 * N, 4 * POINT * P, 4 * P * F, 4 * pairs
    factors = 2 * 16 * pairs  # what the half of a kernel that goes over queries leaves for the half over points
    x, rows, of_points = q + cloud + f + idxs, 4 * pairs * (F + POINT), cloud + f
    return {
        "search": Floor(q + cloud + idxs, 0, 19 * B * Q * (P // B)),
        "grouping": Floor(2 * idxs + 4 * P, 0, 0),
        "value": Floor(x + 4 * N * (F + 2 * K), rows, pairs * (F + 19)),
        "vjp for q": Floor(x + 4 * N * F + 12 * N, rows, pairs * (F + 28)),
        "vjp_vjp": Floor(
            x + 4 * N * F + 12 * N + idxs + factors + 12 * N + 4 * N * F + of_points,
            rows + 4 * pairs * (F + 3),
            pairs * (3 * F + 2 * (28 + 9)),
        ),
        "vjp": Floor(
            x + 4 * N * F + idxs + factors + 12 * N + of_points, rows + 4 * pairs * (F + 3), pairs * (2 * F + 28 + 9)
        ),
    }


#: What an H200 does in a second: bytes of memory (measured, a copy), bytes of L2 (lts__t_bytes at 100 %), products of
#: halves on tensor cores.
MEMORY, L2, TENSOR = 4.27e12, 5.5e12, 494e12


def h200_floors(B: int, P: int, Q: int, F: int, K: int) -> dict[str, tuple[float, str]]:
    """Seconds below which no version of a kernel gets on a cloud that fits into L2, and of what."""
    pairs = B * Q * K
    rows = 4 * F * pairs  # of f, or of the cotangent, one for each pair
    of_points = 4 * B * P * (POINT + F)
    of_queries = 4 * B * Q * F
    return {
        "search": (2 * 32 * B * Q * P / TENSOR, "two products of inner dimension 32"),
        "grouping": (pairs * (4 + 4 + 4) / MEMORY, "indices read twice, written once"),
        "value": (rows / L2 + of_queries / MEMORY, "rows of f from L2, f_out"),
        "vjp for q": (rows / L2, "rows of f from L2"),
        "vjp_vjp, queries": (rows / L2 + of_queries / MEMORY, "rows of f from L2, the gradient in the cotangent"),
        "vjp_vjp, points": (rows / L2 + of_points / MEMORY, "rows of the cotangent from L2, gradients of points"),
        "vjp, queries": (rows / L2, "rows of f from L2"),
        "vjp, points": (rows / L2 + of_points / MEMORY, "rows of the cotangent from L2, gradients of points"),
    }
