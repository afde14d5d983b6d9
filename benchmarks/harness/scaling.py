"""``python -m benchmarks.harness.scaling``: draws docs/scaling.png and fills in docs/sharding.md from ``results/``.

``--check`` fails if docs/sharding.md is out of date. The plot needs matplotlib.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from . import measure

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "sharding.md"
MEASURED = "<!-- measured -->\n", "<!-- /measured -->"
PLANNED = "<!-- planned -->\n", "<!-- /planned -->"

#: Bytes per second that a GPU can send: NVLink of an H200 in one direction; one 400 Gb/s network card for each GPU.
NVLINK, NETWORK = 450e9, 50e9
GPUS_PER_HOST = 4


def _results() -> list[dict[str, Any]]:
    """All runs on GPUs, that on most of them first: of other machines, sharding-cuda-*.json beside the last run."""
    runs = [json.loads(path.read_text()) for path in measure.RESULTS.glob("sharding-cuda*.json")]
    return sorted(runs, key=lambda run: -len(run["results"]["devices"]))


def gradient_bytes(P: int, F: int) -> int:
    """What each of many devices sends in an Eikonal step for summing the gradients of P points (p, f, sigma, R).

    They are summed over devices by an all-reduce, which sends twice their size. (That after vjp_vjp and that after vjp
    are added up, and XLA makes one of the two.)
    """
    return 2 * 4 * P * (3 + F + 3 + 9)


def merge_bytes(Q: int, F: int, K: int) -> int:
    """What a device sends in an Eikonal step on a split cloud for the Q queries of its group, for many devices.

    Gathered: q (12), the merged indices (4K), two cotangents of f_out (4F each), one of ∇_q (12). Exchanged: lists of
    distance and index (8K). Scattered sums: f_out and its derivative (4F each), gradients of q twice (12 each).
    """
    return Q * (48 + 12 * K + 16 * F)


def measured(run: dict[str, Any]) -> str:
    results, env = run["results"], run["environment"]
    counts = [str(n) for n in results["devices"]]
    head = " | ".join(f"{n} GPU{'s' if n != '1' else ''}" for n in counts)
    lines = [f"| ms (efficiency; MB sent by a GPU) | {head} |", "|---|" + "---|" * len(counts)]
    for workload, kinds in results["scaling"].items():
        for kind, steps in kinds.items():
            for step, s in steps.items():
                cells = []
                for n in counts:
                    sent = sum(s["bytes_sent_per_device"][n].values()) / 1e6
                    cells.append(f"{s['ms'][n]['median_ms']:.4g} ({s['efficiency'][n]:.0%}; {sent:.3g})")
                lines.append(f"| {workload}, {kind}: {step} | {' | '.join(cells)} |")
    note = f"{env['device']}: {env['date']}, jax {env['versions']['jax']}, `{env['command'].strip()}`."
    return "\n".join(lines) + f"\n\n{note}\n"


def planned(run: dict[str, Any], hosts: int = 64) -> str:
    """Per Eikonal step on 1 and on ``hosts`` hosts: compute from one device's time, transfers from bytes."""
    results = run["results"]
    lines = [
        "| Eikonal step of | GPUs | compute each, ms | sent by each, MB | at NVLink, ms | at network, ms | time lost |",
        "|---|---|---|---|---|---|---|",
    ]
    stops = []
    for name, size in results["workloads"].items():
        if name == "scenes":
            continue
        one = results["scaling"][name]["strong"]["eikonal"]["ms"]["1"]["median_ms"]
        P, Q, F, K = (size[k] for k in "PQFK")
        sent = gradient_bytes(P, F) if name == "queries" else merge_bytes(Q, F, K)
        for n in (GPUS_PER_HOST, hosts * GPUS_PER_HOST):
            compute, fast, slow = one / n, 1e3 * sent / NVLINK, 1e3 * sent / NETWORK
            lost = (fast if n == GPUS_PER_HOST else slow) / compute
            lines.append(
                f"| {name} | {n} | {compute:.3g} | {sent / 1e6:.3g} | {fast:.3g} | {slow:.3g} | {lost:.0%} of compute |"
            )
        stops.append(
            f"With {name} split, transfers take as long as the computation on {one / (1e3 * sent / NVLINK):.3g} GPUs "
            f"linked by NVLink, and on {one / (1e3 * sent / NETWORK):.3g} linked by the network."
        )
    return "\n".join(lines) + "\n\n" + "\n".join(stops) + "\n"


def plot(run: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = run["results"]
    counts = results["devices"]
    figure, panels = pyplot.subplots(1, len(results["scaling"]), figsize=(10, 3.4), sharey=True, layout="constrained")
    for panel, (workload, kinds) in zip(panels, results["scaling"].items(), strict=True):
        for kind, steps in kinds.items():
            for step, s in steps.items():
                if "alone" in step:
                    continue
                times = [s["ms"][str(n)]["median_ms"] for n in counts]
                # Work done per second, in units of one device.
                speed = [times[0] / t * (n if kind == "weak" else 1) for n, t in zip(counts, times, strict=True)]
                marks = {"marker": "o" if kind == "strong" else "s", "linestyle": "-" if kind == "strong" else "--"}
                panel.plot(counts, speed, label=f"{kind}, {step}", **marks)
        panel.plot(counts, counts, color="0.7", zorder=0, label="ideal")
        size = results["workloads"][workload]
        panel.set_title(f"{workload} split\nB={size['B']:,} Q={size['Q']:,} P={size['P']:,}", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(counts, counts)
        panel.set_yticks(counts, counts)
        panel.set_xlabel("devices")
        panel.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("speed, in devices")
    figure.suptitle(run["environment"]["device"], fontsize=9)
    figure.savefig(path, dpi=150)


def _filled(text: str, marks: tuple[str, str], block: str) -> str:
    before, rest = text.split(marks[0])
    return before + marks[0] + block + marks[1] + rest.split(marks[1])[1]


def main() -> int:
    runs, text = _results(), PAGE.read_text()
    new = _filled(_filled(text, MEASURED, "\n".join(map(measured, runs))), PLANNED, planned(runs[0]))
    if "--check" in sys.argv:
        if new != text:
            print("docs/sharding.md is out of date: run python -m benchmarks.harness.scaling")
        return int(new != text)
    PAGE.write_text(new)
    plot(runs[0], DOCS / "scaling.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
