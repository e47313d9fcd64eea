"""What the package says of itself: one version, pins that agree, a site that has every page, forms that can be read."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import prdarts_jax
from prdarts_jax import cli
from website import hooks

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", re.sub(r"\[.*\]", "", package)).lower(): version for package, version in pairs}


def test_the_version_stands_in_one_place() -> None:
    """And where a file cannot read it, it is the same."""
    assert "version" not in PROJECT["project"] and "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "prdarts_jax.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == prdarts_jax.__version__


def test_every_dependency_is_pinned_and_the_pins_agree() -> None:
    direct, every = _pins("requirements.txt"), _pins("constraints.txt")
    needed = {re.split(r"[^\w-]", name)[0].lower() for name in PROJECT["project"]["dependencies"]}
    assert needed <= set(direct)
    for pins in (direct, _pins("requirements-dev.txt"), _pins("requirements-docs.txt")):
        assert {name: every[name] for name in pins} == pins


def test_the_package_data_of_the_wheel_are_there() -> None:
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["prdarts_jax"]:
        assert list((ROOT / "prdarts_jax").glob(pattern)), pattern


def test_every_page_stands_in_the_nav_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(items: list) -> list[str]:
        found = []
        for item in items:
            inner = [item] if isinstance(item, str) else next(iter(item.values()))
            found += [inner] if isinstance(inner, str) else inner if isinstance(item, str) else pages(inner)
        return found

    placed = pages(hooks.expanded(nav, sorted(hooks.sources())))
    assert sorted(placed) == sorted(hooks.sources())


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.ipynb")))
def test_notebooks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One cell of settings, code that compiles, commands that parse (`make notebooks` executes them)."""
    cells = json.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells) == 1
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            compile(text, name, "exec")
        for command in re.findall(r"^ {4}prdarts (.*)$", text, re.MULTILINE) if cell["cell_type"] == "markdown" else ():
            assert cli.main([*shlex.split(command), "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    if name == "config.yml":
        return
    assert form["name"] and form["description"] and form["body"]
    assert all(part["attributes"]["label"] for part in form["body"])
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)


def test_the_workflow_runs_the_whole_check_before_a_release() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert [step["run"] for step in jobs["checks"]["steps"] if "run" in step] == [".ci/run"]
    assert jobs["release"]["needs"] == "checks" and "refs/tags/v" in jobs["release"]["if"]
    check = (ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}\n" in check for target in ("lint", "docs", "notebooks", "package"))
