"""Who may import whom: core knows no op, and an op's room no other's insides."""

import ast
import pathlib

import pytest

import jax_knn_aggregate

PACKAGE = pathlib.Path(jax_knn_aggregate.__file__).parent
ROOMS = sorted(path.name for path in (PACKAGE / "ops").iterdir() if (path / "__init__.py").exists())


def imports(path):
    """The package's modules that a file imports, as dotted names."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield f"{module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


def inside(room):
    return sorted((PACKAGE / room).rglob("*.py"))


def test_core_imports_no_room():
    for path in inside("core"):
        bad = [name for name in imports(path) if name.startswith(("jax_knn_aggregate.ops", "jax_knn_aggregate.sdf"))]
        assert not bad, f"{path.name} imports {bad}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_public_names_of_others_alone(room):
    for path in inside(f"ops/{room}"):
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["jax_knn_aggregate", "ops"] and parts[2] != room:
                assert len(parts) == 4, f"{path.name} imports {name}, which is not public in {parts[2]}"


def test_the_walk_sees_imports():
    assert "jax_knn_aggregate.core.family.Family" in set(imports(PACKAGE / "ops" / "knn" / "aggregate.py"))
