"""How much code the package is: AST statements a room, `python -m benchmarks.statements [COMMIT]`, of a commit too.

A statement is a node of `ast.stmt`: docstrings and imports count, blank lines and comments do not. Tests and C++ are
left out.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def count(files: dict[str, str]) -> Counter[str]:
    """Room (folder, or module at the root) -> statements, of sources by their path in the package.

    >>> count({"gates.py": "x = 1", "ops/layers.py": "def f():\\n    return 1"})
    Counter({'ops': 2, 'gates.py': 1})
    """
    rooms: Counter[str] = Counter()
    for name, source in files.items():
        rooms[name.partition("/")[0]] += sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source)))
    return rooms


def of_tree() -> dict[str, str]:
    """The sources of the working tree."""
    package = ROOT / "prdarts_jax"
    paths = package.rglob("*.py")
    return {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def of_commit(commit: str) -> dict[str, str]:
    """The sources of a commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    names = git("ls-tree", "-r", "--name-only", commit, "prdarts_jax").split()
    return {n.removeprefix("prdarts_jax/"): git("show", f"{commit}:{n}") for n in names if n.endswith(".py")}


def main() -> None:
    """Prints the table."""
    now = count(of_tree())
    for room, number in sorted(now.items()):
        print(f"{number:6} {room}")
    print(f"{now.total():6} in all")
    for commit in sys.argv[1:]:
        before = count(of_commit(commit)).total()
        print(f"{before:6} at {commit}: now {100 * (now.total() / before - 1):+.1f} %")


if __name__ == "__main__":
    main()
