"""Every Python block of README and docs runs as it stands, a file's blocks one after another; nothing shown is missing.

A block under ``<!-- from FILE -->`` is a part of that file.
"""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_BLOCKS = ("performance.md", "sdf.md")
DEFAULT = ("README.md", "building.md", *WITHOUT_BLOCKS)  # the other pages' blocks are run by thorough tests


@pytest.fixture(autouse=True)
def _readers_settings():
    """JAX as a reader has it, not as conftest sets it."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_pictures_are_shown():
    shown = {(p.parent / name).resolve() for p in FILES for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", p.read_text())}
    assert shown == set((ROOT / "docs").glob("*.png"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_linked_files_are_there(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#\s]+)", text)
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_quotes_are_exact(path):
    quotes = re.findall(r"^<!-- from (\S+) -->\n```\w+\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    assert len(quotes) == path.read_text().count("<!-- from ")
    for name, block in quotes:
        assert block in (ROOT / name).read_text(), f"{path.name} does not quote {name} as it is:\n{block}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
@pytest.mark.thorough_if(path=[path for path in FILES if path.name not in DEFAULT])
def test_python_blocks_run(path):
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    assert bool(blocks) == (path.name not in WITHOUT_BLOCKS)
