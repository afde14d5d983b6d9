"""The hash grid against plain JAX: features, gradients, second order, and what a step with an Eikonal loss needs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_knn_aggregate as jka

from ..harness.measure import OURS, Case, Program, Session

Encode = Callable[[jax.Array, jax.Array], jax.Array]

#: Workload H1, but for the number of points.
H1 = jka.HashGrid(
    dim=3,
    levels=16,
    features=2,
    log2_hashmap_size=19,
    base_resolution=16,
    per_level_scale=1.3819,
    interpolation="smoothstep",
)


# What one writes without this package. JAX has no best way to write a gather for all devices and orders.


def _cells(x: jax.Array, grid: jka.HashGrid, levels: slice) -> tuple[jax.Array, jax.Array]:
    """Cell and weight of the upper side, (N, levels, dim)."""
    position = x[:, None] * jnp.asarray(grid.scales[levels])[None, :, None] + 0.5
    cell = jnp.floor(position)
    f = position - jax.lax.stop_gradient(cell)
    upper = f * f * (3 - 2 * f) if grid.interpolation == "smoothstep" else f
    return cell.astype(jnp.int32).astype(jnp.uint32), upper


def _corner(
    cell: jax.Array, upper: jax.Array, grid: jka.HashGrid, levels: slice, bits: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Row in the table and weight of one corner, (N, levels)."""
    primes = (1, 2654435761, 805459861, 3674653429)
    at = [cell[..., d] + jnp.uint32(b) for d, b in enumerate(bits)]
    number = sum(a * jnp.asarray(grid.strides[levels, d])[None] for d, a in enumerate(at))
    mixed = at[0] * jnp.uint32(primes[0])
    for a, prime in zip(at[1:], primes[1:], strict=False):
        mixed = mixed ^ (a * jnp.uint32(prime))
    rows = jnp.asarray(np.diff(grid.level_rows)[levels], jnp.uint32)[None]
    row = jnp.where(jnp.asarray(grid.hashed[levels])[None], mixed, number) % rows
    weight = math.prod(upper[..., d] if b else 1 - upper[..., d] for d, b in enumerate(bits))
    return row.astype(jnp.int32) + jnp.asarray(grid.level_rows[:-1][levels], jnp.int32)[None], weight


def _one_gather(x: jax.Array, table: jax.Array, grid: jka.HashGrid, levels: slice = slice(None)) -> jax.Array:
    cell, upper = _cells(x, grid, levels)
    corners = [_corner(cell, upper, grid, levels, bits) for bits in itertools.product((0, 1), repeat=grid.dim)]
    row, weight = (jnp.stack(a, -1) for a in zip(*corners, strict=True))
    return (weight[..., None].astype(table.dtype) * table[row]).sum(2).reshape(x.shape[0], -1)


def _gather_a_level(x: jax.Array, table: jax.Array, grid: jka.HashGrid) -> jax.Array:
    return jnp.concatenate([_one_gather(x, table, grid, slice(level, level + 1)) for level in range(grid.levels)], 1)


def _gather_a_corner(x: jax.Array, table: jax.Array, grid: jka.HashGrid) -> jax.Array:
    cell, upper = _cells(x, grid, slice(None))
    y = jnp.zeros((x.shape[0], grid.levels, grid.features), table.dtype)
    for bits in itertools.product((0, 1), repeat=grid.dim):
        row, weight = _corner(cell, upper, grid, slice(None), bits)
        y = y + weight[..., None].astype(table.dtype) * table[row]
    return y.reshape(x.shape[0], -1)


def _gather_a_feature(x: jax.Array, table: jax.Array, grid: jka.HashGrid) -> jax.Array:
    features = [_one_gather(x, table[:, k : k + 1], grid) for k in range(grid.features)]
    return jnp.stack(features, -1).reshape(x.shape[0], -1)


PLAIN = {
    "plain JAX, one gather": _one_gather,
    "plain JAX, a gather a level": _gather_a_level,
    "plain JAX, a gather a corner": _gather_a_corner,
    "plain JAX, a gather a feature": _gather_a_feature,
}


def steps(encode: Encode, x: jax.Array, table: jax.Array) -> dict[str, Program]:
    """Programs on fixed inputs."""
    y = jax.eval_shape(encode, x, table)
    key_ct, key_v = jax.random.split(jax.random.key(2))
    ct, v = jax.random.normal(key_ct, y.shape, y.dtype), jax.random.normal(key_v, x.shape, x.dtype)

    def loss(x: jax.Array, table: jax.Array, ct: jax.Array) -> jax.Array:
        return (ct * encode(x, table)).astype(x.dtype).sum()

    def along(x: jax.Array, table: jax.Array, ct: jax.Array) -> jax.Array:
        return (v * jax.grad(loss)(x, table, ct)).sum()

    def eikonal(x: jax.Array, table: jax.Array, ct: jax.Array) -> jax.Array:
        def field(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = encode(x, table)
            return (ct * y).astype(x.dtype).sum(), y

        slope, y = jax.grad(field, has_aux=True)(x)
        return jnp.square(jnp.linalg.norm(slope, axis=-1) - 1).mean() + jnp.square(y.astype(x.dtype)).mean()

    fns = {
        "forward": lambda x, table, ct: encode(x, table),
        "gradient to table": jax.grad(loss, 1),
        "gradient to x": jax.grad(loss, 0),
        "second order": jax.grad(along, (0, 1, 2)),
        "Eikonal step": jax.grad(eikonal, (1, 2)),
    }
    return {name: Program(fn, x, table, ct) for name, fn in fns.items()}


def _uniform(N: int, dim: int = 3) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (N, dim))


def _along_rays(N: int) -> jax.Array:
    """64 neighbouring points a ray, from side to side of the unit cube."""
    begin, end = jax.random.uniform(jax.random.key(0), (2, N // 64, 1, 3))
    return (begin + jnp.linspace(0, 1, 64)[None, :, None] * (end - begin)).reshape(-1, 3)


Workload = tuple[str, jka.HashGrid, jax.Array, Any]  # name, grid, points, dtype of the table


def workloads(large: bool, quick: bool = False) -> list[Workload]:
    """H1 and what differs from it in one respect."""
    N = 2**6 if quick else 2**18 if large else 2**15
    grid = dataclasses.replace(H1, levels=3, log2_hashmap_size=10) if quick else H1
    one_cell = 0.5 + 1e-5 * _uniform(N)
    all_of_them: list[Workload] = [
        (f"H1, {N} points", grid, _uniform(N), jnp.float32),
        (f"{4 * N} points", grid, _uniform(4 * N), jnp.float32),
        ("linear", dataclasses.replace(grid, interpolation="linear"), _uniform(N), jnp.float32),
        ("bfloat16 table", grid, _uniform(N), jnp.bfloat16),
        ("along rays", grid, _along_rays(N), jnp.float32),
        ("all points in one cell", grid, one_cell, jnp.float32),
        ("2 dimensions", dataclasses.replace(grid, dim=2), _uniform(N, 2), jnp.float32),
        ("4 dimensions", dataclasses.replace(grid, dim=4), _uniform(N, 4), jnp.float32),
    ]
    return all_of_them if large else all_of_them[:1]


def run(session: Session) -> dict[str, Any]:
    """Milliseconds, and ratios of the fastest plain JAX's to ours. Other workloads than H1: ours alone."""
    cases = []
    for number, (name, grid, x, dtype) in enumerate(workloads(session.large, session.quick)):
        table = grid.init(jax.random.key(1), dtype)
        encoders: dict[str, Encode] = {OURS: lambda x, t, g=grid: jka.hash_grid(x, t, g)}
        if number == 0:
            encoders |= {who: lambda x, t, g=grid, f=f: f(x, t, g) for who, f in PLAIN.items()}
        programs = {who: steps(encode, x, table) for who, encode in encoders.items()}
        cases += [Case((name, column), {who: p[column] for who, p in programs.items()}) for column in programs[OURS]]
    ms = session.measure(cases)
    best: dict[str, Any] = {}
    for name, columns in ms.items():
        for column, times in columns.items():
            plain = {who: t["median_ms"] for who, t in times.items() if who != OURS}
            if plain:
                who = min(plain, key=plain.__getitem__)
                faster = plain[who] / times[OURS]["median_ms"]
                best.setdefault(name, {})[column] = {"fastest_plain": who, "times_faster": faster}
    return {"ms": ms, "against_plain_JAX": best}
