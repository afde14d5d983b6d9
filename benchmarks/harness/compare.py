"""``python -m benchmarks.harness.compare BEFORE AFTER [NAME ...]``: two builds of this package, call by call in turn.

Of all calls, or of those whose names have one of NAME in them. Two builds that are the same show what noise is.

BEFORE and AFTER are folders that ``pip install --no-deps --target`` has filled. Each has a process of its own; they
take turns, so that a device whose speed drifts is fair to both. Prints medians, in milliseconds, and the ratio after /
before of each turn's pair: its median, and how far it went either way.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROUNDS, CHAIN_SECONDS = 15, 0.05


def _hessian_times_vector(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Forward over reverse in all of the first argument: of a nonlinear scalar, so that cotangents move as well."""
    import jax

    def product(x: Any, *rest: Any) -> Any:
        gradient = jax.grad(lambda x: jax.numpy.sin(fn(x, *rest)).sum())
        return jax.jvp(gradient, (x,), (x,))[1]

    return product


def calls(some: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """What is compared: the operations that users wait for."""
    import jax

    import jax_knn_aggregate as jka

    from ..distortion import distortion
    from ..knn import inputs, knn_aggregate
    from .measure import Program, on_device

    large = jax.devices()[0].platform != "cpu"
    w1 = knn_aggregate.W1 if large else {**knn_aggregate.W1, "B": 1, "Q": 4096}
    programs = {}
    for name in ("sphere", "uniform"):
        x = getattr(inputs, name)(*(w1[k] for k in "BQPF"))
        op = knn_aggregate.ours(w1["K"])
        programs |= {f"W1 {name}, {step}": p for step, p in knn_aggregate.steps(op, x).items()}
        of_all = _hessian_times_vector(lambda x, op=op: op(*x))
        programs[f"W1 {name}, Hessian times vector"] = Program(of_all, x)
        narrow = (*x[:2], x[2].astype(jax.numpy.bfloat16), *x[3:])
        programs |= {f"W1 {name}, bfloat16, {step}": p for step, p in knn_aggregate.steps(op, narrow).items()}
    sizes = (65_536, 1_048_576) if large else (65_536,)
    clouds = inputs.Clouds(max(sizes))
    for P in sizes:
        for cloud in inputs.CLOUDS:
            q, _, p, sigma, R = clouds(cloud, P, P)
            search = lambda *x: jka.knn_search_aniso(*x, 16).idxs  # noqa: E731
            programs[f"search, {P} {cloud}"] = Program(search, q, p, sigma, R)
    for workload, arrays, losses in distortion.workloads(large):
        loss = losses["jax_knn_aggregate"]
        programs |= {f"distortion, {workload}, {step}": p for step, p in distortion.steps(loss, arrays).items()}
        (w, m), rest = arrays[:2], arrays[2:]
        of_both = _hessian_times_vector(lambda x, *rest, loss=loss: loss(*x, *rest))
        programs[f"distortion, {workload}, Hessian times vector"] = Program(of_both, (w, m), *rest)
    kept = {name: p for name, p in programs.items() if not some or any(part in name for part in some)}
    return {name: on_device(program) if large else program for name, program in kept.items()}


def serve(*some: str) -> None:
    """Compiles everything, says so, and then answers each line, the name of a call, with its milliseconds."""
    import jax

    answers, sys.stdout = sys.stdout, sys.stderr
    all_calls, chain = calls(some), {}
    for name, call in all_calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        chain[name] = max(1, round(CHAIN_SECONDS / (time.perf_counter() - start)))
    print(*all_calls, sep="\t", file=answers, flush=True)
    for line in sys.stdin:
        name = line.rstrip("\n")
        start = time.perf_counter()
        for _ in range(chain[name]):
            out = all_calls[name]()
        jax.block_until_ready(out)
        ms = (time.perf_counter() - start) / chain[name] / getattr(all_calls[name], "calls", 1) * 1e3
        print(ms, file=answers, flush=True)


class Build:
    def __init__(self, folder: str, some: Sequence[str]):
        env = os.environ | {"PYTHONPATH": str(pathlib.Path(folder).resolve()), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "benchmarks.harness.compare", "--serve", *some]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return line.rstrip("\n")

    def ms(self, name: str) -> float:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.read())


def main(before: str, after: str, *some: str) -> None:
    builds = Build(before, some), Build(after, some)
    names, other = (build.read().split("\t") for build in builds)
    assert names == other
    print(f"{'ms':72} {'before':>9} {'after':>9}   after / before, least and most")
    for name in names:
        turns = [[build.ms(name) for build in builds] for _ in range(ROUNDS)]
        ratios = [b / a for a, b in turns]
        a, b = (statistics.median(t) for t in zip(*turns, strict=True))
        print(
            f"{name:64} {a:9.4f} {b:9.4f}   {statistics.median(ratios):.3f}  {min(ratios):.3f} {max(ratios):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main(*sys.argv[1:])
