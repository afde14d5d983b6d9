"""``python -m benchmarks``: times the ops on the device at hand, against plain JAX in the same run."""

from __future__ import annotations

import argparse

from . import knn_aggregate, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant (default %(default)s)")
    args = parser.parse_args()
    print(measure.write("knn_aggregate", knn_aggregate.run(args.rounds)))


if __name__ == "__main__":
    main()
