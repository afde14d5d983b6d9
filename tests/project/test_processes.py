"""Two processes under ``jax.distributed``: what they compute is in processes.py."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.thorough_if()
def test_two_processes_on_the_cpu():
    script = pathlib.Path(__file__).with_name("processes.py")
    # The script finds the package where this process does.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, "--launch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    for i in range(2):
        assert f"process {i} of 2, 4 devices: ok" in done.stdout
