"""``python -m benchmarks.kernels``: what each CUDA kernel of an Eikonal step at W1 takes, and what binds it, by ncu.

Writes results/kernels-cuda.json and the table of docs/performance.md; with ``--table`` the table alone, from the JSON.
The least that a kernel must do is counted here (``FLOORS``), and set against what an H200 can do.
"""

from __future__ import annotations

import csv
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

from . import knn_aggregate, measure

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "performance.md"
MARKS = "<!-- kernels -->\n", "<!-- /kernels -->"
METRICS = {
    "us": "gpu__time_duration.sum",
    "instructions": "sm__instruction_throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "L1": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
#: Kernels by name, in the order of an Eikonal step; the n-th QueryKernel is of the n-th role.
QUERY_ROLES = ("value", "vjp for q", "vjp_vjp, queries", "vjp, queries")
POINT_ROLES = ("vjp_vjp, points", "vjp, points")
GROUPS = {
    "search": "FindExtents|Prepare|FilterKernel",
    "grouping": "CountTile|SumCounts|PlaceTile",
}

#: What an H200 does in a second: bytes of memory (measured, a copy), bytes of L2 (lts__t_bytes at 100 %), and products
#: of halves on tensor cores.
MEMORY, L2, TENSOR = 4.27e12, 5.5e12, 494e12


def floors() -> dict[str, tuple[float, str]]:
    """Seconds below which no version of a kernel gets, and of what."""
    B, Q, P, F, K = (knn_aggregate.W1[k] for k in "BQPFK")
    pairs = B * Q * K
    rows = 4 * F * pairs  # of f, or of the cotangent, one for each pair
    results = 4 * B * P * (15 + F)
    return {
        "search": (2 * 32 * B * Q * P / TENSOR, "two products of inner dimension 32"),
        "grouping": (pairs * (4 + 4 + 4) / MEMORY, "indices read twice, written once"),
        "value": (rows / L2 + 4 * B * Q * F / MEMORY, "rows of f from L2, f_out"),
        "vjp for q": (rows / L2, "rows of f from L2"),
        "vjp_vjp, queries": (rows / L2 + 4 * B * Q * F / MEMORY, "rows of f from L2, the gradient in the cotangent"),
        "vjp_vjp, points": (rows / L2 + results / MEMORY, "rows of the cotangent from L2, gradients of points"),
        "vjp, queries": (rows / L2, "rows of f from L2"),
        "vjp, points": (rows / L2 + results / MEMORY, "rows of the cotangent from L2, gradients of points"),
    }


def profile(cloud: str) -> list[dict[str, Any]]:
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
        "-k",
        "regex:Extents|Prepare|Kernel|Tile|Counts",
    ]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, "-m", "benchmarks.profile", "eikonal", cloud]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    header, _, *rows = csv.reader(line for line in out.splitlines() if line.startswith('"'))
    at = {name: i for i, name in enumerate(header)}
    ours = [r for r in rows if "knn::" in r[at["Kernel Name"]]]
    last = max(i for i, r in enumerate(ours) if "FindExtents" in r[at["Kernel Name"]])  # of the last step
    kernels: list[dict[str, Any]] = []
    queries, points = iter(QUERY_ROLES), iter(POINT_ROLES)
    for row in ours[last:]:
        found = re.search(r"(\w+)(?=<|\()", row[at["Kernel Name"]].replace("<unnamed>::", ""))
        name = found.group(1) if found else row[at["Kernel Name"]]
        role = next((g for g, names in GROUPS.items() if re.fullmatch(names, name)), None)
        if role is None and name == "QueryKernel":
            role = next(queries)
        elif role is None and name == "PieceKernel":
            role = next(points)
        elif role is None:  # JoinKernel belongs to the pieces before it
            role = kernels[-1]["role"]
        values = {k: float(row[at[m]].replace(",", "")) for k, m in METRICS.items()}
        values["us"] /= 1e3
        kernels.append({"role": role, "kernel": name, **values})
    return kernels


def table(results: dict[str, Any]) -> str:
    lines = ["| | kernels, µs | floor, µs: of what | time over floor | busiest |", "|---|---|---|---|---|"]
    kernels = results["results"]["sphere"]
    for role, (seconds, what) in floors().items():
        mine = [k for k in kernels if k["role"] == role]
        total, longest = sum(k["us"] for k in mine), max(mine, key=lambda k: k["us"])
        parts = " + ".join(f"{k['us']:.0f}" for k in mine) if len(mine) > 1 else ""
        busy = sorted(((longest[k], k) for k in METRICS if k not in ("us", "warps")), reverse=True)[:2]
        text = ", ".join(f"{k} {v:.0f} %" for v, k in busy) + f"; {longest['warps']:.0f} % of the warps"
        sum_text = f"{total:.0f}" + (f" ({parts})" if parts else "")
        lines.append(f"| {role} | {sum_text} | {1e6 * seconds:.0f}: {what} | {total / seconds / 1e6:.1f} | {text} |")
    env = results["environment"]
    return "\n".join(lines) + f"\n\n{env['device']}: {env['date']}, `{env['command'].strip()}`, W1 sphere.\n"


def main() -> None:
    if "--table" not in sys.argv:
        measure.write("kernels", {cloud: profile(cloud) for cloud in ("sphere", "uniform")})
    path = measure.RESULTS / "kernels-cuda.json"
    text = table(json.loads(path.read_text()))
    print(text)
    if PAGE.exists() and MARKS[0] in PAGE.read_text():
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
