"""The first task of CONTRIBUTING.md, done as it is written there, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _blocks() -> list[str]:
    page = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def _commands() -> list[list[str]]:
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A first task")[2].partition("\n## ")[0]
    )
    return [shlex.split(line) for line in re.findall(r"^ {7}(\S.*)$", section, re.MULTILINE)]


@pytest.mark.slow
def test_the_first_task_can_be_done(tmp_path: Path) -> None:
    """Steps 1 to 4: the method is found by its name, searches, passes the common tests, and the docs want it named."""
    for name in ("prdarts_jax", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    methods = tmp_path / "prdarts_jax" / "strategies"
    method, row = _blocks()[0], next(block for block in _blocks() if "row = Row(" in block)
    (methods / "one_hot.py").write_text(method, encoding="utf-8")
    table = (methods / "rows.py").read_text(encoding="utf-8")
    assert table.endswith("\n)\n")
    expression = row[row.index("Row(") :].strip()
    (methods / "rows.py").write_text(f"{table[:-2]}    {expression},\n)\n", encoding="utf-8")

    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    said = []
    for words in _commands():
        if words[0] == "make":
            argument = words[2].removeprefix("ARGS=")
            words = ["pytest", "-q", "-p", "no:cacheprovider", *shlex.split(argument)]
        command = [sys.executable, "-m", *(["prdarts_jax", *words[1:]] if words[0] == "prdarts" else words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        said.append((done.returncode, done.stdout + done.stderr))

    listed, searched, common, docs = said
    assert listed[0] == 0 and "\none_hot" in listed[1]
    assert searched[0] == 0 and '"schema_version"' in searched[1], searched[1]
    assert (tmp_path / "runs" / "one-hot" / "genotype.json").is_file()
    assert common[0] == 0 and re.search(r"\d+ passed", common[1]), common[1]
    assert docs[0] == 1 and "1 failed" in docs[1] and "one_hot" in docs[1], docs[1]
