"""The house: imports run down the floors of docs/design.md, names do not collide, old paths stay importable."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import prdarts_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prdarts_jax"
# Public paths of 0.1.0 that a user's program may import.
PATHS = (
    "gates",
    "regularizers",
    "schedules",
    "bilevel",
    "space",
    "network",
    "data",
    "strategies",
    "strategies.base",
    "export",
    "presets",
    "train_presets",
)


def _modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def _room(module: str) -> str:
    """The folder or root module that a module is in."""
    return ".".join(module.split(".")[1:2]) or "__init__"


def _imports(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "prdarts_jax":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}: a relative import"
    return found - {module}


def _ladder() -> dict[str, int]:
    """Room -> floor, from the lines `1. errors, schedules` of docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("## Floors")[2].partition("\n## ")[0]
    floors = re.findall(r"^(\d+)\. (.+)$", section, re.MULTILINE)
    assert [int(number) for number, _ in floors] == list(range(1, len(floors) + 1))
    rooms = [(room.strip().strip("`"), int(number)) for number, line in floors for room in line.split(",")]
    assert len(dict(rooms)) == len(rooms), "a room stands on two floors"
    return dict(rooms)


MODULES = _modules()
GRAPH = {name: _imports(name, path, MODULES) for name, path in MODULES.items()}


def test_every_room_has_its_floor():
    assert set(_ladder()) == {_room(name) for name in MODULES}


def test_imports_run_down():
    ladder = _ladder()
    up = [
        f"{name} (floor {ladder[_room(name)]}) imports {other} (floor {ladder[_room(other)]})"
        for name, others in GRAPH.items()
        for other in sorted(others)
        if _room(name) != _room(other) and ladder[_room(name)] <= ladder[_room(other)]
    ]
    assert up == []


def test_no_import_runs_in_a_circle():
    """Within a room too: the modules can be sorted so that each imports earlier ones only."""
    left = {name: {other for other in others if other in MODULES} for name, others in GRAPH.items()}
    while ready := [name for name, others in left.items() if not others]:
        left = {name: others.difference(ready) for name, others in left.items() if name not in ready}
    assert left == {}


def test_no_module_has_the_name_of_what_its_package_exports():
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            exported = getattr(importlib.import_module(name), "__all__", ())
            own = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
            assert own.isdisjoint(exported), name


@pytest.mark.parametrize("path", PATHS)
def test_old_paths_stay_importable(path):
    assert importlib.import_module(f"prdarts_jax.{path}")


def test_old_names_are_where_they_were():
    from prdarts_jax import export, presets, train_presets
    from prdarts_jax.network import DerivedNetwork, profile
    from prdarts_jax.strategies import base, get

    assert prdarts_jax.resolve is presets.resolve
    assert callable(get) and callable(profile) and callable(DerivedNetwork)
    assert callable(export.stablehlo) and callable(train_presets.resolve)
    assert "init" in base.Strategy._fields and base.Stop._fields == ("genotype", "reason")
    assert callable(base.derive_pairs) and callable(base.init_normal)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_is_one_idea(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert "utils" not in MODULES[name].stem
    assert ast.get_docstring(ast.parse(text)), "its first line says what it is"
