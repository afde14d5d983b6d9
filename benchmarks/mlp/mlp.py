"""The perceptron against plain JAX: values, gradients, second order, and an Eikonal step of hash grid and network."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_knn_aggregate as jka

from ..harness.measure import OURS, Case, Program, Session
from ..hash_grid import hash_grid

Parameters = tuple[list[jax.Array], list[jax.Array]]  # weights, biases
Network = Callable[[Any, Parameters], jax.Array]  # of x, or a tuple of its parts

PLAIN_ACTIVATIONS = {"softplus": jax.nn.softplus, "relu": jax.nn.relu}
PRECISIONS = ("highest", "default")
#: The ways to write a hash grid of which one has been fastest in an Eikonal step; others take minutes to compile.
PLAIN_GRIDS = ("plain JAX, one gather", "plain JAX, a gather a corner")


# What one writes without this package: rows times matrices, or matrices times columns.


def _rows(x: Any, parameters: Parameters, *, activation: str, precision: str) -> jax.Array:
    h = jnp.concatenate(x, 1) if isinstance(x, tuple) else x
    for layer, (W, b) in enumerate(zip(*parameters, strict=True)):
        p = jnp.matmul(h, W.T, precision=precision) + b
        h = p if layer == len(parameters[0]) - 1 else PLAIN_ACTIVATIONS[activation](p)
    return h


def _columns(x: Any, parameters: Parameters, *, activation: str, precision: str) -> jax.Array:
    h = (jnp.concatenate(x, 1) if isinstance(x, tuple) else x).T
    for layer, (W, b) in enumerate(zip(*parameters, strict=True)):
        p = jnp.matmul(W, h, precision=precision) + b[:, None]
        h = p if layer == len(parameters[0]) - 1 else PLAIN_ACTIVATIONS[activation](p)
    return h.T


PLAIN = {"plain JAX, rows": _rows, "plain JAX, columns": _columns}


def initial(widths: Sequence[int], dtype: Any = jnp.float32) -> Parameters:
    keys = jax.random.split(jax.random.key(1), len(widths) - 1)
    W = [
        jax.random.normal(key, (m, n), dtype) * (2 / n) ** 0.5
        for key, (n, m) in zip(keys, itertools.pairwise(widths), strict=True)
    ]
    return W, [jnp.full(m, 0.1, dtype) for m in widths[1:]]


def steps(network: Network, x: jax.Array, parameters: Parameters) -> dict[str, Program]:
    """Programs on fixed inputs; the second order is the gradient of a function of the gradient in x."""
    y = jax.eval_shape(network, x, parameters)
    key_ct, key_v = jax.random.split(jax.random.key(2))
    ct, v = jax.random.normal(key_ct, y.shape, y.dtype), jax.random.normal(key_v, x.shape, x.dtype)

    def loss(x: jax.Array, parameters: Parameters, ct: jax.Array) -> jax.Array:
        return (ct * network(x, parameters)).sum()

    def along(x: jax.Array, parameters: Parameters, ct: jax.Array) -> jax.Array:
        return (v * jax.grad(loss)(x, parameters, ct)).sum()

    fns = {
        "forward": lambda x, parameters, ct: network(x, parameters),
        "forward + backward": jax.value_and_grad(loss, (0, 1)),
        "second order": jax.grad(along, (0, 1, 2)),
    }
    return {name: Program(fn, x, parameters, ct) for name, fn in fns.items()}


def eikonal_step(encode: hash_grid.Encode, network: Network, x: jax.Array, table: jax.Array, p: Parameters) -> Program:
    """Of a signed distance from features of a hash grid and the position: its gradient to all parameters."""

    def loss(table: jax.Array, parameters: Parameters, x: jax.Array) -> jax.Array:
        def distance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = network((x, encode(x, table)), parameters)
            return y.sum(), y

        slope, y = jax.grad(distance, has_aux=True)(x)
        return jnp.square(jnp.linalg.norm(slope, axis=-1) - 1).mean() + jnp.square(y).mean()

    return Program(jax.grad(loss, (0, 1)), table, p, x)


def ours(activation: str, precision: str) -> Network:
    return lambda x, parameters: jka.mlp(x, *parameters, activation=activation, precision=precision)


def contestants(activation: str, plain: dict[str, Any]) -> dict[str, Network]:
    each: dict[str, Network] = {}
    for precision in PRECISIONS:
        each[f"{OURS}, {precision}"] = ours(activation, precision)
        for who, fn in plain.items():
            each[f"{who}, {precision}"] = functools.partial(fn, activation=activation, precision=precision)
    return each


def _networks(session: Session) -> list[Case]:
    """The main workload with both activations; others that differ from it in one respect."""
    N = 2**6 if session.quick else 2**18 if session.large else 2**15
    main = [32, 64, 64, 64, 1]
    sizes = [("softplus", N, main), ("relu", N, main)]
    if session.large or session.quick:
        sizes += [("softplus", N, [32, *[width] * 3, 1]) for width in (16, 32)]
        sizes += [("softplus", N, [32, *[64] * (depth - 1), 1]) for depth in (2, 6)]
    if session.large:
        sizes += [("softplus", 2**log, main) for log in (12, 16, 20)]
    cases = []
    for number, (activation, n, widths) in enumerate(sizes[: 1 if session.quick else None]):
        name = f"{activation}, {' → '.join(map(str, widths))}, N = {n}"
        plain = PLAIN if number < 2 else dict([next(iter(PLAIN.items()))])
        x, parameters = jax.random.normal(jax.random.key(0), (n, widths[0])), initial(widths)
        programs = {who: steps(network, x, parameters) for who, network in contestants(activation, plain).items()}
        narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, parameters))
        if session.large:
            programs[f"{OURS}, bfloat16"] = steps(ours(activation, "default"), *narrow)
            in_rows = functools.partial(_rows, activation=activation, precision="default")
            programs["plain JAX, rows, bfloat16"] = steps(in_rows, *narrow)
        columns = ("forward", "forward + backward", "second order")
        cases += [Case((name, column), {who: p[column] for who, p in programs.items()}) for column in columns]
    return cases


def _sdf(session: Session) -> Case:
    N = 2**6 if session.quick else 2**18 if session.large else 2**15
    grid = dataclasses.replace(hash_grid.H1, levels=3, log2_hashmap_size=10) if session.quick else hash_grid.H1
    x, table = jax.random.uniform(jax.random.key(0), (N, 3)), grid.init(jax.random.key(1))
    parameters = initial([3 + grid.outputs, 64, 64, 64, 1])
    programs = {}
    for precision in PRECISIONS:
        network = ours("softplus", precision)
        programs[f"{OURS}, {precision}"] = eikonal_step(
            lambda x, t: jka.hash_grid(x, t, grid), network, x, table, parameters
        )
        for who in PLAIN_GRIDS[: 1 if session.quick else None]:
            encode = hash_grid.PLAIN[who]
            plain = functools.partial(_rows, activation="softplus", precision=precision)
            programs[f"{who}, {precision}"] = eikonal_step(
                lambda x, t, encode=encode: encode(x, t, grid), plain, x, table, parameters
            )
    return Case((f"hash grid and softplus, 35 → 64 → 64 → 64 → 1, N = {N}", "Eikonal step"), programs)


def run(session: Session) -> dict[str, Any]:
    """Milliseconds, and ratios of the fastest plain JAX's of a precision to ours."""
    ms = session.measure([*_networks(session), _sdf(session)])
    best: dict[str, Any] = {}
    for name, columns in ms.items():
        for column, times in columns.items():
            for precision in (*PRECISIONS, "bfloat16"):
                of = {who: t["median_ms"] for who, t in times.items() if who.endswith(f", {precision}")}
                mine = of.pop(f"{OURS}, {precision}", None)
                if mine is None or not of:
                    continue
                who = min(of, key=of.__getitem__)
                found = {"fastest_plain": who, "times_faster": of[who] / mine}
                best.setdefault(name, {}).setdefault(column, {})[precision] = found
    return {"ms": ms, "against_plain_JAX": best}
