"""``jax-knn-aggregate doctor``, as a command, and that it finds what is wrong."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_knn_aggregate import doctor
from jax_knn_aggregate.core import ffi

FAMILIES = ("knn_aggregate_aniso", "knn_aggregate", "distortion_loss", "flatten_distortion_loss", "hash_grid", "mlp")
FAMILIES += ("render_gaussians",)


def test_command():
    # One CPU device, and the package where this process finds it.
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "jax_knn_aggregate.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = "kernels" if ffi.TARGETS.get("cpu") else "pure JAX"
    for name in FAMILIES:
        (line,) = (line for line in done.stdout.splitlines() if f"cpu:0: {name}: " in line.lower())
        assert f"{name}: {kernels}, " in line and line.endswith(": ok")
    for target in ffi.TARGETS.get("cpu", ()):
        assert target in done.stdout


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.thorough_if(name=[name for name in FAMILIES if name != "distortion_loss"])
def test_wrong_kernels_are_found(name, monkeypatch, capsys):
    right = getattr(doctor, name)

    def wrong(*args, implementation, **options):
        off = 1.0 if implementation == "xla" else 1.001
        out = right(*args, implementation=implementation, **options)
        return jax.tree.map(lambda a: a if a.dtype == np.int32 else off * a, out)

    only = {family[0]: family for family in doctor._families()}[name]
    monkeypatch.setattr(doctor, name, wrong)
    monkeypatch.setattr(doctor, "_families", lambda: [only])
    monkeypatch.setattr(doctor, "_devices", lambda: jax.devices()[:1])
    assert doctor.main() == 1
    assert capsys.readouterr().out.endswith("WRONG\n")
