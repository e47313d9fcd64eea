"""Rows of results: the facts each carries, and the files they are kept in."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from prdarts_jax.run.provenance import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A row replaces the one that agrees with it in these.
KEYS = ("case", "batch", "peer", "cache", "axis", "section", "what", "kind", "devices", "mode", "local_batch_norm")


def commit(*paths: str) -> str:
    """Short commit, with "+" when files of these paths, of what is measured, differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The name and the number of cores."""
    return f"{_model()}, {os.cpu_count() or 1} cores"


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts() -> dict[str, Any]:
    """What a row needs to be compared with others: commit, versions, device, how busy the machine was."""
    found = versions()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["torch"] = metadata.version("torch")
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    measured = commit("prdarts_jax", "benchmarks/*.py")
    return {"commit": measured, "versions": found, "device": processor(), "load_before": load}


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a measurement.

    >>> key({"case": "a", "batch": 2, "speedup": 1.5})[:2]
    ('a', 2)
    """
    point = row.get("value") if "axis" in row else None  # a point of an axis; elsewhere the value is what was measured
    return (*(row.get(name) for name in KEYS), point)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def keep(path: Path, new: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows into a file, each in the place of the older measurement of the same."""
    rows: dict[tuple[Any, ...], Mapping[str, Any]] = {key(row): row for row in read(path)}
    rows |= {key(row): row for row in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
