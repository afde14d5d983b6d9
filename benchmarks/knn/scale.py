"""Search from 4 thousand to 4 million points; time, memory and compilation of a step of a large cloud."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

import jax_knn_aggregate as jka

from ..harness import measure
from ..harness.measure import OURS, Case, Program, Session
from .ckdtree import ckdtree
from .inputs import CLOUDS, Arrays, Clouds
from .knn_aggregate import elementwise, nearest, ours, steps

K = 16
READY, WARM, INDEX, EUCLIDEAN = "ready index", "ready index, warm", "index alone", "Euclidean"
PLAIN = "plain JAX, elementwise"
#: Whole steps on the surface: P points, Q queries, F features, K neighbours.
STEP = {"P": 1_000_000, "Q": 262_144, "F": 32, "K": 8}
#: The step whose memory is counted.
MEMORY = {"P": 1_048_576, "Q": 1_048_576, "F": 32, "K": 16}


def search(q: Any, p: Any, sigma: Any, R: Any, **options: Any) -> jax.Array:
    return jka.knn_search_aniso(q, p, sigma, R, K, **options).idxs


def _plain(*x: jax.Array) -> jax.Array:
    """In chunks of queries whose distances take at most a gigabyte."""
    q, *cloud = x
    of_chunk = functools.partial(nearest, elementwise, K)
    chunk = max(1, min(q.shape[0], (1 << 28) // cloud[0].shape[0]))
    return jax.lax.map(lambda q: of_chunk(q[None], *(a[None] for a in cloud))[0], q.reshape(-1, chunk, 3))


def _searches(session: Session, x: Arrays, plain: bool) -> dict[str, Callable[[], Any]]:
    """x: as ``Clouds`` gives it."""
    q, earlier, *cloud = x
    index = jax.jit(jka.build_index)(*cloud)
    warm = jax.jit(search)(earlier, *cloud)
    contestants: dict[str, Callable[[], Any]] = {
        OURS: Program(search, q, *cloud),
        READY: Program(lambda q, p, s, R, index: search(q, p, s, R, index=index), q, *cloud, index),
        WARM: Program(lambda q, p, s, R, i, w: search(q, p, s, R, index=i, warm_idxs=w), q, *cloud, index, warm),
        INDEX: Program(jka.build_index, *cloud),
        EUCLIDEAN: Program(lambda q, p: jka.knn_search(q, p, K).idxs, q, cloud[0]),
    }
    if plain:
        contestants[PLAIN] = Program(_plain, q, *cloud)
    return contestants | ({} if session.large else ckdtree(q, cloud[0], K))


def _steps(session: Session, clouds: Clouds, sizes: list[int]) -> list[Case]:
    size = {"P": sizes[0], "Q": sizes[0], "F": 8, "K": 4} if session.quick else STEP
    P, Q, F, k = (size[n] for n in "PQFK")
    q, _, *cloud = clouds("surface", P, Q)
    features = jax.random.normal(jax.random.key(2), (P, F))
    of_step = steps(ours(k), (q, cloud[0], features, *cloud[1:]))
    name = f"P={P:,}, Q={Q:,}, K={k}, F={F}, surface"
    cases = [Case(("steps", name, column), {OURS: of_step[column]}) for column in ("forward", "eikonal")]
    if session.large:
        return cases
    n, F = sizes[-1], 32
    q, _, *cloud = clouds("volume", n, n)
    features = jax.random.normal(jax.random.key(2), (n, F))
    forward: dict[str, Callable[[], Any]] = {OURS: steps(ours(K), (q, cloud[0], features, *cloud[1:]))["forward"]}
    name = f"P=Q={n:,}, K={K}, F={F}, volume"
    return [*cases, Case(("steps", name, "forward"), forward | ckdtree(q, cloud[0], K))]


def run(session: Session) -> dict[str, Any]:
    """Milliseconds of searches by cloud and size and of steps; compilation and memory from a process of its own."""
    sizes = [4**i for i in range(6, 12 if session.large else 10)]  # 4,096 to 4,194,304 or 262,144
    if session.quick:
        sizes = [256, 1024]
    most_plain = 65_536 if session.large else 16_384
    size = {"P": 1024, "Q": 1024, "F": 8, "K": 4} if session.quick else MEMORY
    arguments = [f"{name}={n}" for name, n in size.items()]
    fresh = subprocess.run(
        [sys.executable, "-m", "benchmarks.knn.fresh", *arguments], check=True, capture_output=True, text=True
    )
    clouds = Clouds(max(*sizes, 0 if session.quick else STEP["P"]))

    def case(at: tuple[str, int]) -> Case:
        cloud, n = at
        return Case(("search", cloud, str(n)), _searches(session, clouds(cloud, n, n), n <= most_plain))

    with concurrent.futures.ThreadPoolExecutor(measure.threads()) as pool:  # indices are built, and that is compiled
        cases = list(pool.map(case, itertools.product(CLOUDS, sizes)))
    ms = session.measure([*cases, *_steps(session, clouds, sizes)])
    return {"K": K, "ms": ms["search"], "steps_ms": ms["steps"], **json.loads(fresh.stdout.splitlines()[-1])}
