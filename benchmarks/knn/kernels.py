"""``python -m benchmarks.knn.kernels [sphere] [uniform]``: what CUDA kernels of an Eikonal step at W1 take, by ncu.

Needs ncu, of Nsight Compute. Writes results/kernels-cuda.json.
"""

from __future__ import annotations

import csv
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from ..harness import measure

METRICS = {
    "us": "gpu__time_duration.sum",
    "instructions": "sm__instruction_throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "L1": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
ATTEMPTS = 3
#: Kernels by name, in the order of an Eikonal step; the n-th QueryKernel is of the n-th role.
QUERY_ROLES = ("value", "vjp for q", "vjp_vjp, queries", "vjp, queries")
POINT_ROLES = ("vjp_vjp, points", "vjp, points")
GROUPS = {
    "search": "FindExtents|Prepare|FilterKernel",
    "grouping": "CountTile|SumCounts|PlaceTile",
}


def profile(cloud: str) -> str:
    """ncu's table, as CSV."""
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["-k", "regex:Extents|Prepare|Kernel|Tile|Counts", "--metrics", ",".join(METRICS.values())]
    with tempfile.TemporaryDirectory() as folder:
        table = pathlib.Path(folder) / "ncu.csv"
        for _ in range(ATTEMPTS):  # under ncu JAX sometimes hangs or crashes
            try:
                subprocess.run(
                    [*command, "--log-file", table, sys.executable, "-m", "benchmarks.knn.profile", "eikonal", cloud],
                    check=True,
                    timeout=90,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                print(f"ncu: {error}", file=sys.stderr)
            else:
                return table.read_text()
    raise RuntimeError(f"ncu failed {ATTEMPTS} times.")


def kernels_of_step(table: str) -> list[dict[str, Any]]:
    """The kernels of the last Eikonal step in ncu's table."""
    header, _, *rows = csv.reader(line for line in table.splitlines() if line.startswith('"'))
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
    results = {cloud: kernels_of_step(profile(cloud)) for cloud in sys.argv[1:] or ("sphere", "uniform")}
    print(measure.write("kernels", results, time.perf_counter() - start))


if __name__ == "__main__":
    main()
