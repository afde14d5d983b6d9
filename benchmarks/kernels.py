"""``python -m benchmarks.kernels``: what each CUDA kernel of an Eikonal step at W1 takes, and what binds it, by ncu.

Needs ncu, of Nsight Compute. Writes results/kernels-cuda.json.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from typing import Any

from . import measure

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


def main() -> None:
    start = time.perf_counter()
    results = {cloud: profile(cloud) for cloud in ("sphere", "uniform")}
    print(measure.write("kernels", results, time.perf_counter() - start))


if __name__ == "__main__":
    main()
