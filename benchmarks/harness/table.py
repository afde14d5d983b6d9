"""``python -m benchmarks.harness.table``: writes the tables of README and docs/performance.md from ``results/``.

``--check`` fails if one is out of date. Needs no GPU.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..knn.crossover import rule
from ..knn.floors import floors, h200_floors
from ..knn.knn_aggregate import W1
from . import measure
from .measure import OURS, number

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
#: Between ``<!-- benchmarks NAME -->`` and the next ``<!-- /benchmarks -->`` stands what TABLES[NAME] makes.
MARKS = re.compile(r"(<!-- benchmarks (\w+) -->\n).*?(<!-- /benchmarks -->\n)", re.DOTALL)

Run = dict[str, Any]
CLOUD_SIZES = (4096, 65536, 262144, 1048576, 4194304)


def _runs(suite: str) -> list[Run]:
    """GPU first."""
    return [json.loads(path.read_text()) for path in sorted(measure.RESULTS.glob(f"{suite}-*.json"), reverse=True)]


def _device(run: Run) -> str:
    env = run["environment"]
    return env["device"] + (f", {env['cpu_threads']} threads" if env["platform"] == "cpu" else "")


def _ms(times: dict[str, Any], who: str = OURS) -> str:
    return number(times[who]["median_ms"]) if who in times else "–"


def _size(n: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{number(n / unit)} {name}"
    return f"{n:.0f} B"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if not lines:
        return "Not measured yet.\n"
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) + "\n"


#: What commands of committed results are called now.
RENAMED = {"python -m benchmarks.kernels": "python -m benchmarks.knn.kernels"}


def _notes(runs: list[Run]) -> str:
    notes = []
    for run in runs:
        env = run["environment"]
        command = (env["command"] or "").strip()
        how = f"`{RENAMED.get(command, command)}`" if command else env["how"].rstrip(".")
        notes.append(f"{_device(run)}: {env['date']}, jax {env['versions']['jax']}, {how}.")
    return "\n" + "\n".join(notes) + "\n" if notes else ""


def _against_plain(suite: str, keep: Callable[[str], bool]) -> str:
    """A row per device and workload: our ms, and how many times longer plain JAX takes, where it was timed."""
    runs = _runs(suite)
    kept = [
        (run, workload, columns) for run in runs for workload, columns in run["results"]["ms"].items() if keep(workload)
    ]
    columns = list(dict.fromkeys(column for *_, of_column in kept for column in of_column))

    def cell(run: Run, workload: str, column: str, times: dict[str, Any]) -> str:
        if column not in times:
            return "–"
        faster = run["results"]["times_faster_than_plain_JAX"].get(workload, {})
        return _ms(times[column]) + (f" ({faster[column]:.1f}×)" if column in faster else "")

    rows = [[f"{_device(run)}, {name}", *(cell(run, name, c, times) for c in columns)] for run, name, times in kept]
    return _table(["ms (times faster than plain JAX)", *columns], rows) + _notes(runs)


def hash_grid() -> str:
    """A row per device and workload, with how many times longer plain JAX takes where it was measured."""
    runs = _runs("hash_grid")

    def rows() -> Iterator[list[str]]:
        for run in runs:
            against = run["results"]["against_plain_JAX"]
            for name, columns in run["results"]["ms"].items():
                faster = {c: f" ({best['times_faster']:.1f}×)" for c, best in against.get(name, {}).items()}
                yield [f"{_device(run)}, {name}", *(_ms(t) + faster.get(c, "") for c, t in columns.items())]

    columns = list(dict.fromkeys(c for run in runs for of in run["results"]["ms"].values() for c in of))
    return _table(["ms (times faster than plain JAX)", *columns], rows()) + _notes(runs)


def mlp() -> str:
    """A row per device, workload and precision."""
    runs = _runs("mlp")
    columns = list(dict.fromkeys(c for run in runs for of in run["results"]["ms"].values() for c in of))

    def rows() -> Iterator[list[str]]:
        for run in runs:
            for name, of in run["results"]["ms"].items():
                against = run["results"]["against_plain_JAX"][name]
                for precision in dict.fromkeys(p for found in against.values() for p in found):
                    cells = [
                        f"{_ms(of[c], f'{OURS}, {precision}')} ({against[c][precision]['times_faster']:.2f}×)"
                        if precision in against.get(c, {})
                        else "–"
                        for c in columns
                    ]
                    yield [f"{_device(run)}, {name}", precision, *cells]

    return _table(["ms (times faster than plain JAX)", "precision", *columns], rows()) + _notes(runs)


def scale() -> str:
    """The README's: a row per device and cloud."""
    runs = _runs("scale")

    def rows() -> Iterator[list[str]]:
        for run in runs:
            for cloud, of_size in run["results"]["ms"].items():
                at = [of_size.get(str(n), {}) for n in CLOUD_SIZES]
                cells = [f"{_ms(times)} ({_ms(times, 'ready index')})" if times else "–" for times in at]
                yield [f"{_device(run)}, {cloud}", *cells]

    head = ["ms, index built in the call (ready)", *(f"P=Q={n:,}" for n in CLOUD_SIZES)]
    return _table(head, rows()) + _notes(runs)


def search() -> str:
    """All contestants at all sizes."""
    out = []
    for run in _runs("scale"):
        for cloud, of_size in run["results"]["ms"].items():
            who = list(dict.fromkeys(name for times in of_size.values() for name in times))
            rows = [[name, *(_ms(times, name) for times in of_size.values())] for name in who]
            out.append(_table([f"{_device(run)}, {cloud}, ms", *(f"{int(n):,}" for n in of_size)], rows))
    return "\n".join(out)


def steps() -> str:
    def rows() -> Iterator[list[str]]:
        for run in _runs("scale"):
            for name, columns in run["results"]["steps_ms"].items():
                for column, times in columns.items():
                    others = ", ".join(f"{who}: {_ms(times, who)}" for who in times if who != OURS)
                    yield [_device(run), f"{column}, {name}", _ms(times), others or "–"]

    return _table(["", "step", "ms", "others, ms"], rows())


def scenes() -> str:
    def rows() -> Iterator[list[str]]:
        for run in _runs("knn_aggregate"):
            for name, columns in run["results"].get("queries_per_ms", {}).items():
                yield [f"{_device(run)}, {name}", *(f"{columns[c]:,.0f}" for c in ("forward", "eikonal"))]

    return _table(["queries per ms", "forward", "eikonal"], rows())


def parts() -> str:
    """Parts of an Eikonal step beside what they must move and compute."""
    card = json.loads((measure.RESULTS / "rivals-cuda.json").read_text())["results"]["card"]
    rates = card["bytes_per_second"], card["fp32_instructions_per_second"]
    out = []
    for run in _runs("breakdown"):
        gpu = run["environment"]["platform"] == "cuda"
        for name, size in run["results"]["sizes"].items():
            ms, count = run["results"]["parts_ms"][name], floors(1, **size)
            rows = []
            for part, floor in count.items():
                least = [f"{floor.ms(*rates):.2g}"] if gpu else []
                counts = [_size(floor.bytes), _size(floor.gathered), f"{floor.instructions / 1e6:,.0f} M"]
                rows.append([part, number(ms[part]), *least, *counts])
            empty = [""] * (4 if gpu else 3)
            rows += [[part, number(ms[key]), *empty] for part, key in (("rest", "rest"), ("whole step", "step"))]
            head = [f"{_device(run)}, {name}", "ms", *(["floor, ms"] if gpu else [])]
            out.append(_table([*head, "bytes", "gathered", "instructions"], rows))
    return "\n".join(out)


def distortion_floor() -> str:
    """Value and gradient read w and m and write the gradient in w: 12 bytes a sample."""
    rate = json.loads((measure.RESULTS / "rivals-cuda.json").read_text())["results"]["card"]["bytes_per_second"]

    def rows() -> Iterator[list[str]]:
        for run in _runs("distortion"):
            gpu = run["environment"]["platform"] == "cuda"
            for name, samples in run["results"].get("samples", {}).items():
                floor = f"{1e3 * 12 * samples / rate:.2g}" if gpu else "–"
                ms = _ms(run["results"]["ms"][name]["value and gradient"])
                yield [f"{_device(run)}, {name}", ms, floor, _size(12 * samples)]

    return _table(["value and gradient in w", "ms", "floor, ms", "bytes"], rows())


def card() -> str:
    run = json.loads((measure.RESULTS / "rivals-cuda.json").read_text())
    rates = run["results"]["card"]
    return (
        f"{run['environment']['device']}, measured: {rates['bytes_per_second'] / 1e12:.3g} TB/s, "
        f"{rates['fp32_instructions_per_second'] / 1e12:.3g}·10¹² float32 instructions per second.\n"
    )


def kernels() -> str:
    """CUDA kernels of an Eikonal step at W1, by ncu."""
    runs = _runs("kernels")
    floor_of = h200_floors(*(W1[k] for k in "BPQFK"))

    def rows() -> Iterator[list[str]]:
        for run in runs:
            of_cloud = [(cloud, role) for cloud in run["results"] for role in floor_of]
            for cloud, role in of_cloud:
                seconds, what = floor_of[role]
                mine = [k for k in run["results"][cloud] if k["role"] == role]
                total, longest = sum(k["us"] for k in mine), max(mine, key=lambda k: k["us"])
                each = " + ".join(f"{k['us']:.0f}" for k in mine)
                parts = f" ({each})" if len(mine) > 1 else ""
                shares = {k: longest[k] for k in ("instructions", "tensor", "L1", "L2", "memory")}
                busiest = sorted(shares, key=lambda k: -shares[k])[:2]
                text = ", ".join(f"{k} {shares[k]:.0f} %" for k in busiest) + f"; warps {longest['warps']:.0f} %"
                floor = f"{1e6 * seconds:.0f}: {what}"
                yield [f"{cloud}, {role}", f"{total:.0f}{parts}", floor, f"{total / seconds / 1e6:.1f}", text]

    head = ["", "kernels, µs", "floor, µs: of what", "time over floor", "busiest, of the longest kernel"]
    return _table(head, rows()) + _notes(runs)


def fresh() -> str:
    """Compilation and memory."""

    def compiling() -> Iterator[list[str]]:
        for run in _runs("scale"):
            c = run["results"]["compiling"]
            yield [_device(run), f"{c['trace_s']:.2f}", f"{c['compile_s']:.2f}", str(c["recompilations"])]

    def memory() -> Iterator[list[str]]:
        for run in _runs("scale"):
            m = run["results"]["memory"]
            size = ", ".join(f"{k}={n:,}" for k, n in m["size"].items())
            for step, b in m["bytes"].items():
                each = [_size(b[k]) for k in ("arguments", "results", "temporaries", "planned_peak")]
                yield [f"{_device(run)}, {size}: {step}", *each, _size(b["peak_in_use"]) if "peak_in_use" in b else "–"]

    head = ["Eikonal step, in a new process", "trace, s", "compile, s", "compilations for other values"]
    return (
        _table(head, compiling())
        + "\n"
        + _table(
            ["", "arguments", "results", "temporaries", "sum", "most in use, as the GPU's allocator says"], memory()
        )
    )


def crossover() -> str:
    """How well the rule picks."""
    runs = _runs("crossover")
    rows = []
    for run in runs:
        picks = rule(run["results"]["ms"])
        for K in dict.fromkeys(r["K"] for r in picks):
            longer = [r for r in picks if r["K"] == K]
            worst = max(longer, key=lambda r: r["longer"])
            better = sum(r["longer"] == 1 for r in longer)
            where = f"{worst['longer']:.2f} at P={worst['P']:,}, Q={worst['Q']:,}"
            rows.append([f"{_device(run)}, K={K}", f"{better} of {len(longer)}", where])
    return _table(["", "the better way picked", "worst time, relative to the better way"], rows) + _notes(runs)


def rivals() -> str:
    """What others take, from measurements that this repository's commands do not repeat."""
    (run,) = _runs("rivals")

    def rows() -> Iterator[list[str]]:
        kinds = (("ms", "W1"), ("search_ms", "search, K=16"), ("distortion_ms", "distortion, value and gradient"))
        for kind, name in kinds:
            for key, inner in run["results"][kind].items():
                if kind == "distortion_ms":
                    inner = {"": inner}
                for column, times in inner.items():
                    at = f"P=Q={int(column):,}" if column.isdigit() else column
                    what = ", ".join(part for part in (name, key, at) if part)
                    yield [what, ", ".join(f"{who}: {number(ms)}" for who, ms in times.items())]

    return _table(["", "ms"], rows()) + _how(run)


def _how(run: Run) -> str:
    env = run["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if name != "jax")
    return f"\n{env['device']}: {env['date']}, {versions}. {env['how']}\n"


def rasterizers() -> str:
    """The same of rasterizers."""
    (run,) = _runs("rasterizers")
    rows = [[name, *(number(ms) for ms in times.values())] for name, times in run["results"]["ms"].items()]
    return _table(["ms", *next(iter(run["results"]["ms"].values()))], rows) + _how(run)


def sources() -> str:
    suites = ("knn_aggregate", "distortion", "hash_grid", "mlp", "splat", "scale", "sweep", "breakdown", "crossover")

    def rows() -> Iterator[list[str]]:
        for suite in suites:
            for run in _runs(suite):
                env = run["environment"]
                seconds = f"{env['seconds']:.0f}" if "seconds" in env else "–"
                versions = f"jax {env['versions']['jax']}, Python {env['python']}"
                yield [suite, _device(run), env["date"], versions, f"`{env['command'].strip()}`", seconds]

    return _table(["suite", "device", "date", "versions", "command", "s"], rows())


TABLES: dict[str, Callable[[], str]] = {
    "knn_aggregate": lambda: _against_plain("knn_aggregate", lambda name: name in ("sphere", "uniform")),
    "workloads": lambda: _against_plain("knn_aggregate", lambda name: True),
    "distortion": lambda: _against_plain("distortion", lambda name: True),
    "splat": lambda: _against_plain("splat", lambda name: True),
    **{
        f.__name__: f
        for f in (
            hash_grid,
            mlp,
            scale,
            search,
            steps,
            scenes,
            parts,
            kernels,
            distortion_floor,
            card,
            fresh,
            crossover,
            rivals,
            rasterizers,
            sources,
        )
    },
}


def main() -> int:
    stale = []
    for page in PAGES:
        text = page.read_text()
        new = MARKS.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)
        if new != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in sys.argv:
                page.write_text(new)
    if "--check" in sys.argv and stale:
        print(f"{', '.join(map(str, stale))}: tables are out of date, run python -m benchmarks.harness.table")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
