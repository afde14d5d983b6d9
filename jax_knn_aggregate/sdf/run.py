"""One run of `jax-knn-aggregate fit`: read, train, extract, measure, write."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import equinox
import jax
import numpy as np
import optax
from tqdm import tqdm

from .. import __version__
from .mesh import DEFINITIONS, evaluate, evaluator, extract, write_ply
from .render import render
from .scan import ScanError, read_scan
from .shapes import shape_scan
from .train import Config, fit


def run(arguments: argparse.Namespace) -> None:
    """Fits arguments.scan, or the built-in arguments.shape, and writes the results to arguments.out.

    Raises ScanError for input that cannot be used, before anything is written, and OSError for output that cannot.
    """
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ScanError(f"{out}: exists and is not a directory")
    start = time.perf_counter()
    rng = np.random.default_rng(arguments.seed)
    config = Config(
        steps=arguments.steps,
        points=arguments.points,
        neighbours=arguments.neighbours,
        batch=arguments.batch,
        seed=arguments.seed,
        implementation=arguments.implementation,
    )
    if arguments.scan is None:
        scan = shape_scan(arguments.shape, config.samples, rng)
    else:
        scan = read_scan(arguments.scan, config.samples, rng)
    for note in scan.notes:
        print(f"{scan.name}: {note}", file=sys.stderr)

    bars: dict[str, tqdm] = {}

    def report(phase: str, step: int, parts: dict[str, float]) -> None:
        if phase not in bars:
            bars[phase] = tqdm(total=config.steps, desc=f"{scan.name}: {phase}", unit="step")
        bars[phase].set_postfix({name: f"{part:.2g}" for name, part in parts.items()}, refresh=False)
        bars[phase].update(step - bars[phase].n)
        if step == config.steps:
            bars[phase].close()

    model = fit(scan, config, report)
    trained = time.perf_counter()
    field = evaluator(model)
    try:
        mesh = extract(field, scan, arguments.cells)
    except ValueError as error:
        raise ScanError(f"{scan.name}: no surface after {config.steps} steps: {error}") from None
    meshed = time.perf_counter()
    metrics = evaluate(mesh, field, scan, rng)
    evaluated = time.perf_counter()
    normals = field(np.asarray(mesh.vertices))[1]
    # Back to the user's coordinates, now that everything has been measured.
    mesh.vertices = scan.centre + scan.diagonal * mesh.vertices

    # Written aside and moved: a run that fails leaves nothing half done.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        write_ply(mesh, Path(aside, "mesh.ply"))
        render(mesh, normals, Path(aside, "picture.png"), up="xyz".index(arguments.up))
        document = {
            "input": {
                "name": scan.name,
                "kind": scan.kind,
                "points": len(scan.points),
                "diagonal_user_units": scan.diagonal,
            },
            "metrics": metrics,
            "seconds": {
                "train": trained - start,
                "mesh": meshed - trained,
                "evaluate": evaluated - meshed,
                "total": time.perf_counter() - start,
            },
            "settings": {**dataclasses.asdict(config), "cells": arguments.cells},
            "versions": {
                "jax_knn_aggregate": __version__,
                "jax": jax.__version__,
                "equinox": equinox.__version__,
                "optax": optax.__version__,
                "platform": jax.default_backend(),
            },
            "definitions": DEFINITIONS,
        }
        Path(aside, "metrics.json").write_text(json.dumps(document, indent=2) + "\n")
        out.mkdir(exist_ok=True)
        for name in ("mesh.ply", "picture.png", "metrics.json"):
            os.replace(Path(aside, name), out / name)
    print(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
