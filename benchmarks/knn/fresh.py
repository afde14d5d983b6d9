"""``python -m benchmarks.knn.fresh P=... Q=... F=... K=...``: what a new process needs for its first step.

Prints JSON: seconds to compile an Eikonal step; how often JAX compiles when the step is called again with other values;
bytes that XLA plans for steps of the sizes given, and on GPUs the most that the allocator had in use after each.
``python -m benchmarks scale`` runs this in a process of its own, because other programs' memory would count too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from .inputs import Arrays, Clouds
from .knn_aggregate import eikonal, head, ours, steps


def _inputs(size: dict[str, int]) -> Arrays:
    q, _, p, sigma, R = Clouds(max(size["P"], size["Q"]))("surface", size["P"], size["Q"])
    return q, p, jax.random.normal(jax.random.key(2), (size["P"], size["F"])), sigma, R


def _compilations(count: list[str]) -> None:
    def listener(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)


def compiling() -> dict[str, Any]:
    """Of an Eikonal step at P=4096, Q=12288, F=64, K=16."""
    x, lin = _inputs({"P": 4096, "Q": 12288, "F": 64}), head(64)
    others = [jax.block_until_ready(jax.tree.map(lambda a, s=s: a * s, x)) for s in (0.5, 2.0)]
    step = jax.jit(jax.grad(lambda x, lin: eikonal(ours(16), x, lin)))
    start = time.perf_counter()
    lowered = step.lower(x, lin)
    traced = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    jax.block_until_ready(step(x, lin))
    compiled: list[str] = []
    _compilations(compiled)
    for other in others:
        jax.block_until_ready(step(other, lin))
    return {"trace_s": traced - start, "compile_s": end - traced, "recompilations": len(compiled)}


def memory(size: dict[str, int]) -> dict[str, Any]:
    """Bytes of each step, in the order in which they need more."""
    x = jax.eval_shape(lambda: _inputs(size))
    on_gpu = jax.devices()[0].platform != "cpu"
    if on_gpu:
        x = jax.block_until_ready(_inputs(size))
    out = {}
    for name in ("forward", "gradient", "eikonal"):
        program = steps(ours(size["K"]), x)[name]
        plan = program.compile().memory_analysis()
        out[name] = {
            "arguments": plan.argument_size_in_bytes,
            "results": plan.output_size_in_bytes,
            "temporaries": plan.temp_size_in_bytes,
        }
        out[name]["planned_peak"] = sum(out[name].values())
        if on_gpu:
            jax.block_until_ready(program())
            out[name]["peak_in_use"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return out


def main() -> None:
    size = {name: int(n) for name, n in (argument.split("=") for argument in sys.argv[1:])}
    print(json.dumps({"compiling": compiling(), "memory": {"size": size, "bytes": memory(size)}}))


if __name__ == "__main__":
    main()
