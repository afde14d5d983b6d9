"""The commands that fill in tables and draw plots work from the committed results alone."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*command):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_tables_are_up_to_date():
    _run("benchmarks.harness.table", "--check")
    _run("benchmarks.harness.scaling", "--check")


@pytest.mark.thorough_if()
def test_plots_draw_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")  # the test extra has it; machines that only lend a GPU may not
    assert _run("benchmarks.harness.plots", "--results", str(tmp_path), "--out", str(tmp_path)) == ""  # no results
    drawn = [pathlib.Path(line) for line in _run("benchmarks.harness.plots", "--out", str(tmp_path)).splitlines()]
    assert {path.name for path in drawn} >= {"benchmark_rivals.png", "benchmark_scale.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
