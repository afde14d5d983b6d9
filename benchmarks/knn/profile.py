"""Runs a step a few times, for a profiler to watch: ``ncu ... python -m benchmarks.knn.profile eikonal uniform``."""

import sys

import jax

from . import inputs
from .knn_aggregate import W1, ours, steps


def main(step: str = "eikonal", cloud: str = "sphere") -> None:
    call = steps(ours(W1["K"]), getattr(inputs, cloud)(*(W1[k] for k in "BQPF")))[step]
    for _ in range(3):
        jax.block_until_ready(call())


if __name__ == "__main__":
    main(*sys.argv[1:])
