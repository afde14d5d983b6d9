"""``python -m benchmarks [SUITE ...]``: times the ops on the device at hand, against plain JAX in the same run.

Without names all suites run that have something to say about this device. Each writes a file into
``benchmarks/results/``; then the plots of the documentation are drawn, where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import time

import jax

from .distortion import distortion
from .harness import measure
from .hash_grid import hash_grid
from .knn import breakdown, crossover, knn_aggregate, scale, sharding, sweep
from .mlp import mlp
from .splat import splat

SUITES = {
    module.__name__.rpartition(".")[2]: module
    for module in (knn_aggregate, distortion, hash_grid, mlp, splat, scale, sweep, breakdown, crossover, sharding)
}
_ROOT = pathlib.Path(__file__).resolve().parent.parent


def for_this_device() -> list[str]:
    return [
        name
        for name in SUITES
        if not (name == "crossover" and jax.devices()[0].platform == "cpu")
        and not (name == "sharding" and jax.local_device_count() == 1)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results and plots go to build/benchmarks")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    results = _ROOT / "build" / "benchmarks" if args.quick else measure.RESULTS
    if jax.default_backend() == "cpu":
        measure.keep_freed_memory()
    start = time.perf_counter()
    for name in args.suites or for_this_device():
        begun = time.perf_counter()
        measured = SUITES[name].run(measure.Session(name, 1 if args.quick else args.rounds, args.quick))
        print(measure.write(name, measured, time.perf_counter() - begun, results), flush=True)
    if importlib.util.find_spec("matplotlib") is None:
        print("No plots: matplotlib is not installed. Draw them anywhere: python -m benchmarks.harness.plots")
    else:
        from .harness import plots

        for path in plots.draw(results, results if args.quick else plots.DOCS):
            print(path)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
