"""``python -m benchmarks.table``: writes README's table from ``results/``; ``--check`` fails if it is out of date."""

from __future__ import annotations

import json
import pathlib
import sys

from . import measure

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->"


def table() -> str:
    """A row per device and kind of input, from the committed results."""
    lines = ["| ms (times faster than plain JAX) | forward | gradient | Eikonal |", "|---|---|---|---|"]
    notes = []
    for path in sorted(measure.RESULTS.glob("knn_aggregate-*.json"), reverse=True):
        run = json.loads(path.read_text())
        env, results = run["environment"], run["results"]
        device = env["device"] + (f", {env['cpu_threads']} threads" if env["platform"] == "cpu" else "")
        for cloud, columns in results["ms"].items():
            cells = []
            for column, times in columns.items():
                ours = times["jax_knn_aggregate"]["median_ms"]
                cells.append(f"{ours:.3g} ({results['times_faster_than_plain_JAX'][cloud][column]:.1f}×)")
            lines.append(f"| {device}, {cloud} | {' | '.join(cells)} |")
        notes.append(f"{device}: {env['date']}, jax {env['versions']['jax']}, `{env['command'].strip()}`.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def main() -> int:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = before + BEGIN + table() + END + after
    if "--check" in sys.argv:
        if new != text:
            print("README's benchmark table is out of date: run python -m benchmarks.table")
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
