"""Timing, progress, and what a result file says of the machine it comes from."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent.parent / "results"
OURS = "jax_knn_aggregate"

Times = dict[str, float]


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, for all contestants alike.

    Else one that needs much memory makes the next one fetch its own anew from the kernel, page by page.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


class Program:
    """A call of ``fn`` on fixed arrays, compiled once: beforehand by ``compile``, or else in the first call."""

    calls = 1

    def __init__(self, fn: Callable[..., Any], *args: Any):
        self.fn, self.args = fn, args
        self._compiled: Any = None

    def in_a_row(self, calls: int) -> Program:
        """As many calls, none of which XLA can share with another: each has parameters and results of its own."""
        n = len(self.args)
        program = Program(lambda *x: [self.fn(*x[i * n : (i + 1) * n]) for i in range(calls)], *self.args * calls)
        program.calls = calls
        return program

    def compile(self) -> Any:
        if self._compiled is None:
            self._compiled = jax.jit(self.fn).lower(*self.args).compile()
        return self._compiled

    def __call__(self) -> Any:
        return self.compile()(*self.args)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compared with each other, and the keys under which the times go into the results."""

    keys: tuple[str, ...]
    contestants: Mapping[str, Callable[[], Any]]


@dataclasses.dataclass
class Session:
    """A run of one suite.

    Attributes:
      name: of the suite, for the progress bar.
      rounds: at most so many turns of each contestant.
      quick: tiny sizes, to see that everything runs.
      large: the device is made for large sizes: a GPU.
    """

    name: str
    rounds: int = 11
    quick: bool = False
    large: bool = dataclasses.field(default_factory=lambda: jax.devices()[0].platform != "cpu")

    def measure(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Compiles everything, on all cores, and then times case by case. Milliseconds, nested by the cases' keys."""
        self._compile(cases)
        if self.large:
            cases = [
                dataclasses.replace(case, contestants={who: on_device(c) for who, c in case.contestants.items()})
                for case in bar(f"{self.name}: trying", cases, len(cases))
            ]
            self._compile(cases)
        out: dict[str, Any] = {}
        # A GPU's clock does not drift as a shared CPU does, and launching is what a short chain would measure.
        chain_seconds, most_seconds = (0.01, 0.4) if self.large else (0.0, 1.5)
        for case in bar(self.name, cases, len(cases)):
            times = medians(case.contestants, self.rounds, chain_seconds, most_seconds)
            *place, last = case.keys
            inner = out
            for key in place:
                inner = inner.setdefault(key, {})
            inner[last] = times
            each = ", ".join(f"{who}: {number(t['median_ms'])}" for who, t in times.items())
            say(f"{', '.join(case.keys)}, ms: {each}")
        return out

    def _compile(self, cases: Sequence[Case]) -> None:
        programs = [c for case in cases for c in case.contestants.values() if isinstance(c, Program)]
        with concurrent.futures.ThreadPoolExecutor(min(16, threads())) as pool:
            compiling = [pool.submit(program.compile) for program in programs]
            finished = concurrent.futures.as_completed(compiling)
            for future in bar(f"{self.name}: compiling", finished, len(programs)):
                future.result()


CALLS = 8


def on_device(call: Callable[[], Any]) -> Callable[[], Any]:
    """What to time on a GPU. Of a short program, the time to launch it would be measured: several calls make one."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return call.in_a_row(CALLS) if isinstance(call, Program) and time.perf_counter() - start < 1e-3 else call


def medians(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, chain_seconds: float, most_seconds: float
) -> dict[str, Times]:
    """Milliseconds per call of each contestant: median, minimum and maximum over its turns.

    Contestants take turns, so that a machine whose speed drifts is fair to all. Each turn is a chain of calls with one
    wait at the end, about ``chain_seconds`` long: where a call takes the device longer than the host needs to launch
    it, that is device time. A program of several calls counts as so many. A contestant leaves after ``rounds`` turns,
    or three or more that took ``most_seconds``.
    """
    calls = {name: getattr(call, "calls", 1) for name, call in contestants.items()}
    chain = {}
    for name, call in contestants.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        chain[name] = max(1, min(50, math.ceil(chain_seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            if len(times[name]) >= 3 and sum(times[name]) * chain[name] * calls[name] > 1e3 * most_seconds:
                continue
            start = time.perf_counter()
            for _ in range(chain[name]):
                out = call()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / chain[name] / calls[name] * 1e3)
    return {
        name: {
            "median_ms": statistics.median(ts),
            "min_ms": min(ts),
            "max_ms": max(ts),
            "turns": len(ts),
            "calls_per_program": calls[name],
        }
        for name, ts in times.items()
    }


def bar(label: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """The items, while a line on stderr, if that is a terminal, shows how many are done."""
    start = time.perf_counter()
    for done, item in enumerate(items):
        if sys.stderr.isatty():
            drawn = "█" * (24 * done // total)
            text = f"{label:24} {drawn:·<24} {done}/{total}  {time.perf_counter() - start:.0f} s"
            print("\r\033[K" + text, end="", file=sys.stderr, flush=True)
        yield item
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def number(x: float) -> str:
    """With three digits, or all those before the point."""
    return f"{x:,.0f}" if x >= 999.5 else f"{x:.3g}"


def say(text: str) -> None:
    """Prints a line in place of the progress bar, which the next step draws again below."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text, flush=True)


def threads() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec.name if spec else "benchmarks").removesuffix(".__main__")


def environment() -> dict[str, Any]:
    """Machine, versions, date and command of this run."""
    from jax_knn_aggregate.core import ffi

    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "jax_knn_aggregate", "numpy", "scipy", "jax-cuda13-plugin", "jax-cuda12-plugin")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True)
        revision = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "revision": revision,
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": {"gpu": "cuda"}.get(device.platform, device.platform),
        "cpu_threads": threads(),
        "python": platform.python_version(),
        "versions": versions,
        "build": ffi.build_info(),
    }


def write(name: str, results: Any, seconds: float, folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Writes ``<name>-<platform>.json``, replacing an older run on the same kind of device. seconds: the run took."""
    folder.mkdir(parents=True, exist_ok=True)
    env = environment() | {"seconds": round(seconds, 1)}
    path = folder / f"{name}-{env['platform']}.json"
    path.write_text(json.dumps({"environment": env, "results": results}, indent=1) + "\n")
    return path
