"""Benchmarks. ``python -m benchmarks`` runs them on the device at hand and writes JSON under ``results/``.

harness/ measures, draws and tabulates; what is measured is in the room of its op.
"""

import pathlib
import sys

# ``python -m`` puts the working directory first on the path, where the package's sources lie without their extension
# module. What is installed is what is measured.
_root = pathlib.Path(__file__).resolve().parent.parent
if not list((_root / "jax_knn_aggregate").glob("_ext*.so")):
    sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != _root]
