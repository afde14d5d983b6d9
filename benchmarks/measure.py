"""Timing, and what a result file says of the machine it comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def medians(contestants: Mapping[str, Callable[[], Any]], rounds: int, chain: int) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each contestant: median, minimum and maximum over ``rounds``.

    Contestants take turns, so that a machine whose speed drifts is fair to all. Each turn is ``chain`` calls with one
    wait at the end: where a call takes the device longer than the host needs to launch it, that is device time.
    """
    for call in contestants.values():
        jax.block_until_ready(call())
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(chain):
                out = call()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / chain * 1e3)
    return {
        name: {"median_ms": statistics.median(ts), "min_ms": min(ts), "max_ms": max(ts)} for name, ts in times.items()
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Machine, versions, date and command of this run."""
    from jax_knn_aggregate import _ffi

    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "jax_knn_aggregate", "numpy", "scipy", "jax-cuda13-plugin", "jax-cuda12-plugin")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        revision = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "revision": revision,
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": {"gpu": "cuda"}.get(device.platform, device.platform),
        "cpu_threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "build": _ffi.build_info(),
    }


def write(name: str, results: Any) -> pathlib.Path:
    """Writes ``results/<name>-<platform>.json``, replacing an older run on the same kind of device."""
    RESULTS.mkdir(exist_ok=True)
    env = environment()
    path = RESULTS / f"{name}-{env['platform']}.json"
    path.write_text(json.dumps({"environment": env, "results": results}, indent=1) + "\n")
    return path
