"""Runs a jitted step a few times, for a profiler to watch: ``ncu ... python -m benchmarks.profile eikonal uniform``."""

import sys

import jax

import jax_knn_aggregate as jka

from . import inputs
from .knn_aggregate import W1, steps


def main(step: str = "eikonal", cloud: str = "sphere") -> None:
    x = getattr(inputs, cloud)(*(W1[k] for k in "BQPF"))
    call = steps(lambda *x: jka.knn_aggregate_aniso(*x).f_out, x, W1["K"])[step]
    for _ in range(3):
        jax.block_until_ready(call())


if __name__ == "__main__":
    main(*sys.argv[1:])
