"""``python -m benchmarks.harness.plots``: draws the plots of docs/ from ``results/``. Needs matplotlib and no GPU.

A plot whose results are missing is not drawn; the one there stays as it is.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from ..knn.crossover import rule
from . import measure
from .measure import OURS, number

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PLATFORMS = ("cuda", "cpu")
#: The same contestant has the same colour everywhere.
COLOURS = {
    OURS: "#1f4e9c",
    "ready index": "#4a90d9",
    "ready index, warm": "#8fc1ee",
    "Euclidean": "#2a9d6f",
    "index alone": "#9aa5b1",
    "plain JAX, elementwise": "#c0392b",
    "plain JAX, einsum": "#e08e79",
    "plain JAX, cumsum": "#c0392b",
    "SciPy cKDTree, Euclidean": "#8e6bb5",
}
LABELS = {OURS: "this package, index built in the call", "index alone": "building the index alone"}
PARTS = {
    "search": "#1f4e9c",
    "grouping": "#9aa5b1",
    "value": "#4a90d9",
    "vjp for q": "#2a9d6f",
    "vjp_vjp": "#e0a030",
    "vjp": "#c0392b",
    "rest": "#d9d9d9",
}


def load(folder: pathlib.Path, suite: str) -> dict[str, dict[str, Any]]:
    """What there is of a suite, by platform."""
    paths = {platform: folder / f"{suite}-{platform}.json" for platform in PLATFORMS}
    return {platform: json.loads(path.read_text()) for platform, path in paths.items() if path.exists()}


def device(run: dict[str, Any]) -> str:
    env = run["environment"]
    return env["device"] + (f", {env['cpu_threads']} threads" if env["platform"] == "cpu" else "")


def _grid(rows: int, columns: int, width: float, height: float) -> Any:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained")
    for panel in panels.flat:
        panel.grid(True, which="major", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels


def _log(panel: Any) -> None:
    """A logarithmic axis of plain numbers, which labels 2 and 5 too where decades are few."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")


def _sizes(axis: Any, sizes: list[int]) -> None:
    from matplotlib.ticker import NullLocator

    def short(n: int) -> str:
        return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" if n >= 1 << 10 else str(n)

    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [short(n) for n in sizes])
    axis.xaxis.set_minor_locator(NullLocator())


def scale(folder: pathlib.Path) -> Any:
    """Time of a search against the number of points, which is that of the queries."""
    runs = load(folder, "scale")
    if not runs:
        return None
    clouds = list(next(iter(runs.values()))["results"]["ms"])
    figure, panels = _grid(len(runs), len(clouds), 11, 3.6)
    for row, run in zip(panels, runs.values(), strict=True):
        for panel, cloud in zip(row, clouds, strict=True):
            of_size = run["results"]["ms"][cloud]
            sizes = [int(n) for n in of_size]
            for who, colour in COLOURS.items():
                at = [n for n in sizes if who in of_size[str(n)]]
                times = [of_size[str(n)][who]["median_ms"] for n in at]
                style = {"linestyle": "--"} if who == "index alone" else {"marker": "o", "markersize": 3.5}
                if at:
                    panel.plot(at, times, color=colour, label=LABELS.get(who, who), **style)
            ours = of_size[str(sizes[-1])][OURS]["median_ms"]
            line = [ours * n / sizes[-1] for n in sizes]
            panel.plot(sizes, line, ":", color="0.6", label="proportional to P", zorder=0)
            _log(panel)
            _sizes(panel, sizes)
            panel.set_title(f"{cloud}, {device(run)}", fontsize=9)
            panel.set_xlabel("points = queries", fontsize=8)
        row[0].set_ylabel(f"search, K={run['results']['K']}, ms", fontsize=8)
    handles = {label: h for panel in panels.flat for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return figure


def sweep(folder: pathlib.Path) -> Any:
    """Time of a forward pass and an Eikonal step against K and against F."""
    runs = load(folder, "sweep")
    if not runs:
        return None
    figure, panels = _grid(len(runs), 2, 9, 3.2)
    names = {"K": "neighbours K", "F": "features F"}
    for row, run in zip(panels, runs.values(), strict=True):
        for panel, (axis, of_size) in zip(row, run["results"]["ms"].items(), strict=True):
            for column, style in (("forward", "-"), ("eikonal", "--")):
                for who, name in ((OURS, "this package"), ("plain JAX, elementwise", "plain JAX")):
                    at = [int(n) for n in of_size if who in of_size[n][column]]
                    times = [of_size[str(n)][column][who]["median_ms"] for n in at]
                    if at:
                        look = {"color": COLOURS[who], "marker": "o", "markersize": 3.5, "label": f"{name}, {column}"}
                        panel.plot(at, times, style, **look)
            _log(panel)
            _sizes(panel, [int(n) for n in of_size])
            panel.set_xlabel(names[axis], fontsize=8)
            rest = ", ".join(f"{k}={n:,}" for k, n in run["results"]["workload"].items() if k != axis)
            panel.set_title(f"{rest}\n{device(run)}", fontsize=9)
        row[0].set_ylabel("ms", fontsize=8)
        row[0].legend(fontsize=7, frameon=False, handlelength=3)
    return figure


def breakdown(folder: pathlib.Path) -> Any:
    """Parts of an Eikonal step."""
    runs = load(folder, "breakdown")
    if not runs:
        return None
    bars = [(device(run), name, parts) for run in runs.values() for name, parts in run["results"]["parts_ms"].items()]
    figure, panels = _grid(1, 1, 9, 0.8 + 0.62 * len(bars))
    panel = panels[0, 0]
    for y, (_, _, parts) in enumerate(bars):
        whole, left = sum(max(0.0, parts.get(part, 0.0)) for part in PARTS), 0.0
        for part, colour in PARTS.items():
            share = 100 * max(0.0, parts.get(part, 0.0)) / whole
            panel.barh(y, share, left=left, color=colour, label=part if y == 0 else None, height=0.62)
            if share > 6:
                look = {"ha": "center", "va": "center", "color": "white", "fontsize": 8}
                panel.text(left + share / 2, y, number(parts[part]), **look)
            left += share
        panel.text(101, y, f"{number(parts['step'])} ms", va="center", fontsize=8)
    panel.set_yticks(range(len(bars)), [f"{where}\n{name}" for where, name, _ in bars])
    panel.invert_yaxis()
    panel.set_xlim(0, 114)
    panel.set_xticks(range(0, 101, 20), [f"{n} %" for n in range(0, 101, 20)])
    panel.grid(False)
    figure.legend(fontsize=8, frameon=False, ncols=len(PARTS), loc="outside upper center")
    return figure


def rivals(folder: pathlib.Path) -> Any:
    """Each rival's time as a multiple of ours, for each job that somebody else can do too."""
    jobs = list(_jobs(folder))
    if not jobs:
        return None
    by_device = {where: [job for job in jobs if job[0] == where] for where in dict.fromkeys(job[0] for job in jobs)}
    lines = [sum(1.5 + len(others) for *_, others in some) for some in by_device.values()]
    figure, panels = _grid(1, len(by_device), 6.5 * len(by_device), 0.8 + 0.17 * max(lines))
    for panel, (where, some) in zip(panels[0], by_device.items(), strict=True):
        y, ticks = 0.0, []
        for _, job, ours, others in some:
            ticks.append((y, f"{job}: {number(ours)} ms", "bold"))
            for who, ms in sorted(others.items(), key=lambda item: item[1]):
                y += 1
                panel.barh(y, ms / ours - 1, left=1, color=_colour(who), height=0.7)
                panel.text(
                    max(ms / ours, 1) * 1.05, y, f"{number(ms / ours)}× ({number(ms)} ms)", va="center", fontsize=7
                )
                ticks.append((y, who, "normal"))
            y += 1.5
        panel.set_yticks([at for at, *_ in ticks], [text for _, text, _ in ticks], fontsize=7)
        for label, (*_, weight) in zip(panel.get_yticklabels(), ticks, strict=True):
            label.set_fontweight(weight)
        panel.tick_params(axis="y", length=0)
        panel.set_ylim(max(lines) - 0.5, -1)
        panel.set_xscale("log")
        panel.set_xlim(right=panel.get_xlim()[1] * 4)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.axvline(1, color=COLOURS[OURS], linewidth=1.5)
        panel.grid(False, axis="y")
        panel.set_xlabel("time, as a multiple of this package's", fontsize=8)
        panel.set_title(where, fontsize=9)
    return figure


def _colour(who: str) -> str:
    return COLOURS.get(who) or ("#555555" if who.startswith("the original") else "#b58900")


def _jobs(folder: pathlib.Path) -> Iterator[tuple[str, str, float, dict[str, float]]]:
    """Device, name, our milliseconds, others' milliseconds."""
    known = load(folder, "rivals")

    def known_of(platform: str, kind: str, *keys: str) -> dict[str, float]:
        found = known.get(platform, {"results": {}})["results"].get(kind, {})
        for key in keys:
            found = found.get(key, {})
        return found

    def job(run: dict[str, Any], name: str, times: dict[str, Any], more: dict[str, float]) -> Any:
        ms = {who: t["median_ms"] for who, t in times.items()}
        others = {who: t for who, t in ms.items() if who.startswith(("plain", "SciPy"))} | more
        if others:
            yield device(run), name, ms[OURS], others

    for platform, run in load(folder, "knn_aggregate").items():
        for column, times in run["results"]["ms"].get("sphere", {}).items():
            if not column.endswith("alone"):
                yield from job(run, f"W1 sphere, {column}", times, known_of(platform, "ms", "sphere", column))
    for platform, run in load(folder, "scale").items():
        for cloud, of_size in run["results"]["ms"].items():
            for n, times in of_size.items():
                more = known_of(platform, "search_ms", cloud, n)
                if more or (n == list(of_size)[-1] and platform == "cpu"):
                    yield from job(run, f"search, {cloud}, P=Q={int(n):,}", times, more)
        for name, columns in run["results"]["steps_ms"].items():
            for column, times in columns.items():
                yield from job(run, f"{column}, {name}", times, {})
    for platform, run in load(folder, "distortion").items():
        for name, columns in run["results"]["ms"].items():
            column = "value and gradient"
            yield from job(run, f"distortion, {name}", columns[column], known_of(platform, "distortion_ms", name))


def crossover(folder: pathlib.Path) -> Any:
    """How much faster the index is than all pairs, by size."""
    runs = load(folder, "crossover")
    if not runs:
        return None
    run = next(iter(runs.values()))
    ms = run["results"]["ms"]
    picked = {(r["K"], r["P"], r["Q"]): r["picked"] for r in rule(ms)}
    figure, panels = _grid(1, len(ms), 9, 3.4)
    for panel, (K, of_points) in zip(panels[0], ms.items(), strict=True):
        for i, Q in enumerate(next(iter(of_points.values()))):
            P = [int(n) for n in of_points]
            times = [{who: t["median_ms"] for who, t in of_points[str(n)][Q].items()} for n in P]
            ratio = [t["all pairs"] / t["index"] for t in times]
            colour = ("#8fc1ee", "#4a90d9", "#1f4e9c")[i % 3]
            panel.plot(P, ratio, color=colour, label=f"Q={int(Q):,}", zorder=1)
            for n, r in zip(P, ratio, strict=True):
                filled = picked[int(K), n, int(Q)] == "index"
                panel.plot(n, r, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=6)
        panel.axhline(1, color="0.4", linewidth=1)
        _log(panel)
        _sizes(panel, P)
        panel.set_title(f"K={K}, {device(run)}", fontsize=9)
        panel.set_xlabel("points P", fontsize=8)
    panels[0, 0].set_ylabel("time of all pairs / time with index", fontsize=8)
    panels[0, 0].legend(fontsize=8, frameon=False)
    return figure


PLOTS: dict[str, Callable[[pathlib.Path], Any]] = {
    "scale": scale,
    "sweep": sweep,
    "breakdown": breakdown,
    "rivals": rivals,
    "crossover": crossover,
}


def draw(results: pathlib.Path = measure.RESULTS, docs: pathlib.Path = DOCS) -> list[pathlib.Path]:
    """Draws what there are results for; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, plot in PLOTS.items():
        figure = plot(results)
        if figure is not None:
            paths.append(docs / f"benchmark_{name}.png")
            figure.savefig(paths[-1], dpi=130)
            pyplot.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.plots")
    parser.add_argument(
        "--results", type=pathlib.Path, default=measure.RESULTS, help="JSON files (default %(default)s)"
    )
    parser.add_argument("--out", type=pathlib.Path, default=DOCS, help="where plots go (default %(default)s)")
    args = parser.parse_args()
    for path in draw(args.results, args.out):
        print(path)


if __name__ == "__main__":
    main()
