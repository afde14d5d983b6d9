"""Scenes, queries and points split over 1, 2, 4, ... devices of this host: strong and weak scaling, and what moves.

Strong: the whole workload on n devices. Weak: on n of N devices, n/N of it. Efficiency is t(1) / (n·t(n)) and
t(1) / t(n). Scenes and queries are split by ``jax.jit`` over sharded arrays, points by ``points_axis``.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

import jax_knn_aggregate as jka

from ..harness.measure import Session
from .inputs import rotations

#: B scenes of Q queries and P points with F features. ``split`` is the size that is divided in weak scaling.
WORKLOADS = {
    "scenes": {"B": 16, "Q": 12288, "P": 4096, "F": 64, "K": 16, "split": "B"},
    "queries": {"B": 1, "Q": 2_097_152, "P": 1_048_576, "F": 64, "K": 16, "split": "Q"},
    "points": {"B": 1, "Q": 131_072, "P": 8_388_608, "F": 64, "K": 16, "split": "P"},
}
#: The same on a machine that is there to run the code, not to be measured.
TINY = {
    "scenes": {"B": 8, "Q": 256, "P": 128, "F": 8, "K": 8, "split": "B"},
    "queries": {"B": 1, "Q": 2048, "P": 512, "F": 8, "K": 8, "split": "Q"},
    "points": {"B": 1, "Q": 512, "P": 2048, "F": 8, "K": 8, "split": "P"},
}
SPECS = {
    "scenes": (S("devices"), S("devices")),
    "queries": (S(None, "devices"), S()),
    # Each device has queries of its own and points of its own.
    "points": (S(None, "devices"), S(None, "devices")),
}
SECONDS = 1.0  # for the repetitions of one program, of which there is at least one
CHAIN_SECONDS = 0.05  # of calls with one wait at the end, so that launching them is hidden by the devices' work


def cloud(size: dict[str, int]) -> tuple[jax.Array, ...]:
    """q, p, f, sigma, R: points on the unit sphere with queries near them, as ``inputs.sphere``, made on devices."""
    B, Q, P, F = (size[k] for k in "BQPF")
    keys = jax.random.split(jax.random.key(0), 6)
    normal = jax.random.normal

    def unit(a: jax.Array) -> jax.Array:
        return a / jnp.linalg.norm(a, axis=-1, keepdims=True)

    p = unit(normal(keys[0], (B, P, 3)))
    q = unit(normal(keys[1], (B, Q, 3))) * (1 + 0.05 * normal(keys[2], (B, Q, 1)))
    h = math.sqrt(4 * math.pi / P)
    sigma = (0.3 + 2 * jax.random.uniform(keys[3], (B, P, 3))) / (2 * h) ** 2
    R = rotations(normal(keys[4], (B, P, 4)))
    return q, p, normal(keys[5], (B, P, F)), sigma, R


def eikonal(op: Callable[..., jax.Array], *x: jax.Array) -> jax.Array:
    """sum((|∇_q y| − 1)²) + sum(y²) over the queries, y = tanh(f_out).sum(-1)."""

    def sdf(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.tanh(op(q, *x[1:])).sum(-1)
        return y.sum(), y

    gradient, y = jax.grad(sdf, has_aux=True)(x[0])
    return ((jnp.sqrt((gradient**2).sum(-1) + 1e-12) - 1) ** 2).sum() + (y**2).sum()


@dataclasses.dataclass(frozen=True)
class Program:
    """One workload, of one size, on n devices."""

    workload: str
    step: str  # "forward", "eikonal"; of points also "forward, own part alone"
    devices: int
    size: tuple[tuple[str, Any], ...]

    def mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()[: self.devices]), ("devices",))

    def shardings(self) -> tuple[NamedSharding, ...]:
        q, points = SPECS[self.workload]
        if self.step.endswith("alone"):  # every device searches its points for all queries, as it does for points_axis
            q = S()
        return tuple(NamedSharding(self.mesh(), s) for s in (q, *[points] * 4))

    def inputs(self) -> Callable[[], tuple[jax.Array, ...]]:
        return jax.jit(functools.partial(cloud, dict(self.size)), out_shardings=self.shardings())

    def fn(self) -> Callable[..., Any]:
        K = dict(self.size)["K"]
        split = self.workload == "points" and not self.step.endswith("alone")

        def op(*x: jax.Array) -> jax.Array:
            return jka.knn_aggregate_aniso(*x, K, points_axis="devices" if split else None).f_out

        if self.workload != "points":
            return op if self.step == "forward" else jax.grad(functools.partial(eikonal, op), range(5))
        specs = tuple(s.spec for s in self.shardings())
        over = functools.partial(jax.shard_map, mesh=self.mesh(), in_specs=specs)
        if self.step.startswith("forward"):
            return over(op, out_specs=S(None, "devices"))
        loss = over(lambda *x: jax.lax.psum(eikonal(op, *x), "devices"), out_specs=S())
        return jax.grad(loss, range(5))

    def compile(self) -> Any:
        make = self.inputs()
        x = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
            for a, s in zip(jax.eval_shape(make), self.shardings(), strict=True)
        ]
        return jax.jit(self.fn()).lower(*x).compile(), make.lower().compile()


_WIDTH = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8}


def moved(compiled: Any, devices: int) -> dict[str, int]:
    """Bytes that a device sends in one run, by kind of collective, as ring algorithms send them.

    Counted from the sizes of results: of n devices' share, an all-gather and an all-to-all send (n − 1)/n of the
    result, an all-reduce twice that, a reduce-scatter (n − 1) times its result.
    """
    factor = {
        "all-gather": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "all-reduce": 2 * (devices - 1) / devices,
        "reduce-scatter": devices - 1,
        "collective-permute": 1,
    }
    out: dict[str, int] = {}
    # Of an asynchronous collective, "-done" has the type of the result; that of "-start" has operands in it too.
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(factor)})(?:-done)?\(", compiled.as_text()):
        sizes = [
            _WIDTH[t] * math.prod(int(d) for d in dims.split(",") if d)
            for t, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        ]
        out[kind] = out.get(kind, 0) + round(sum(sizes) * factor[kind])
    return out


def _time(compiled: Any, x: tuple[jax.Array, ...], rounds: int) -> dict[str, Any]:
    jax.block_until_ready(compiled(*x))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*x))
    chain = max(1, min(50, math.ceil(CHAIN_SECONDS / (time.perf_counter() - start))))
    times: list[float] = []
    while len(times) < rounds and (not times or sum(times) * chain < SECONDS):
        start = time.perf_counter()
        for _ in range(chain):
            out = compiled(*x)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / chain)
    ms = [1e3 * t for t in times]
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms), "rounds": len(ms)}


def _programs(counts: list[int], workloads: dict[str, dict[str, Any]]) -> list[Program]:
    """Without repetition: the strong and the weak workload of all devices are the same."""
    most, out = counts[-1], []
    for name, full in workloads.items():
        for n in counts:
            part = {**full, full["split"]: full[full["split"]] * n // most}
            steps = ["forward", "eikonal"] + (["forward, own part alone"] if name == "points" else [])
            out += [Program(name, step, n, tuple(full.items())) for step in steps]
            out += [Program(name, step, n, tuple(part.items())) for step in ("forward", "eikonal")]
    return list(dict.fromkeys(out))


def run(session: Session) -> dict[str, Any]:
    workloads = WORKLOADS if session.large and not session.quick else TINY
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= jax.local_device_count()]
    programs = _programs(counts, workloads)
    ms: dict[Program, dict[str, Any]] = {}
    bytes_sent: dict[Program, dict[str, int]] = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        everything = list(pool.map(Program.compile, programs))
    for program, (compiled, make) in zip(programs, everything, strict=True):
        ms[program] = _time(compiled, make(), session.rounds)
        bytes_sent[program] = moved(compiled, program.devices)
        size = dict(program.size)
        what = f"{program.workload}, {program.step}, {size['split']}={size[size['split']]}"
        print(f"{program.devices} devices: {ms[program]['median_ms']:9.2f} ms   {what}", flush=True)

    out: dict[str, Any] = {"workloads": workloads, "devices": counts, "scaling": {}}
    for name, full in workloads.items():
        for kind in ("strong", "weak"):
            for step in ("forward", "eikonal", "forward, own part alone"):
                chosen = []
                for n in counts:
                    share = full[full["split"]] * n // counts[-1] if kind == "weak" else full[full["split"]]
                    program = Program(name, step, n, tuple({**full, full["split"]: share}.items()))
                    if program in ms:
                        chosen.append(program)
                if len(chosen) < len(counts):
                    continue
                times = [ms[c]["median_ms"] for c in chosen]
                work = [n if kind == "strong" else 1 for n in counts]
                out["scaling"].setdefault(name, {}).setdefault(kind, {})[step] = {
                    "ms": {str(c.devices): ms[c] for c in chosen},
                    "efficiency": {str(n): times[0] / (w * t) for n, w, t in zip(counts, work, times, strict=True)},
                    "bytes_sent_per_device": {str(c.devices): bytes_sent[c] for c in chosen},
                }
    return out
