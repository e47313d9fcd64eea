"""Everything about a GPU in one unattended run of less than nine minutes: `make bench-gpu`.

    python -m benchmarks.bench_gpu [--platform gpu|cpu] [--scale full|smoke] [--budget SECONDS] [--out DIR] [--anew]
                                   [--lowering A,B]

Needs jax with its GPU plugin, flax, optax, chex and orbax-checkpoint; the piece of a search tqdm besides; the peers run
where torch sees the GPU. First comes whether the device computes what the CPU does; then one cell and a step of the
search in each lowering of the cell (--lowering) and each precision, whole epochs, a piece of a search; then the rest.
The sections come in the order of their worth; each is a process with a limit, so one that fails or hangs costs its own
numbers only, and one for which too little time is left is left out with a line. With --out, the same command goes on
with what is missing: a section that is in the file, whole and of the same commit and GPU, is not run again. The exit
status is 1 if a lowering computes something else than the CPU, or if that could not be found out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rows as kept
from benchmarks.cases import FEW, SearchCase, TrainCase
from benchmarks.gpu_sections import PRECISIONS
from benchmarks.race import ROOT, environment, has_torch

Row = dict[str, Any]
BUDGET = 510.0  # seconds
NO_GRAPHS, ALL_GRAPHS = "", "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE"
_TINY = SearchCase(cells=3, channels=4, ops=FEW, side=8, batch=4)


class Section(NamedTuple):
    """A process: a function of `gpu_sections`, its arguments, and its times."""

    name: str
    given: Mapping[str, Any]
    least: float  # seconds that must be left to start it
    limit: float  # seconds after which it is ended
    xla_flags: str = ""

    @property
    def mark(self) -> str:
        """What tells it from other sections and from itself with other arguments."""
        words = json.dumps([self.name, self.given, self.xla_flags], sort_keys=True)
        return f"{self.name} {hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _full(lowerings: Sequence[str] = ("auto",)) -> list[Section]:
    first = lowerings[0]
    paper = SearchCase(cells=8, batch=128, lowering=first)
    case, few = paper._asdict(), {"steps": 20}
    derived = TrainCase(batch=96)._asdict()
    shapes = [[3, 1, 1], [5, 1, 1], [3, 2, 1], [5, 2, 2], [3, 1, 2]]
    timed = {"scale": "full", "batch": 128, "steps": 200, "precisions": list(PRECISIONS), "megabytes": 1024}

    def graphs(kinds: str, label: str) -> Section:
        given = {"case": case, "lowering": "library", "precision": "tf32", "label": f", {label}", **few}
        return Section("search", given, 45, 100, f"--xla_gpu_enable_command_buffer={kinds}")

    def step(lowering: str, precision: str, cell: str = first) -> Section:
        one = paper._replace(lowering=cell)._asdict()
        return Section("search", {"case": one, "lowering": lowering, "precision": precision, **few}, 45, 120)

    def epochs(precision: str) -> Section:
        return Section("epochs", {"case": case, "precision": precision, "steps": 195, "project": True}, 60, 140)

    cells = {"kinds": ["normal"], "lowerings": list(lowerings), "precisions": list(PRECISIONS), "steps": 50}
    begun = {"precision": "tf32", "images": 50_000, "dispatch": 195, "minutes": 1.0}

    def torch(kind: str, precision: str, **options: Any) -> Section:
        given = {"kind": kind, "precision": precision, "options": options, "platform": "gpu", "steps": 10}
        least, limit = (60, 240) if options else (30, 60)  # a compilation of the peer takes minutes
        return Section("peer", {**given, "case": case if kind == "search" else derived}, least, limit)

    return [
        *(
            Section("step-correctness", {"case": paper._replace(cells=3, batch=8, lowering=cell)._asdict()}, 40, 100)
            for cell in lowerings
        ),
        Section("cell", {"case": case, **cells}, 40, 120),
        *(step("library", "tf32", cell) for cell in lowerings),
        epochs("tf32"),
        Section("piece", {"case": case, **begun}, 100, 160),
        *(step("library", precision, cell) for precision in ("bfloat16", "float32") for cell in lowerings),
        epochs("bfloat16"),
        Section("bandwidth", {"megabytes": 1024, "steps": 20}, 15, 40),
        Section("correctness", {"side": 16, "channels": 16, "shapes": shapes[:3]}, 20, 60),
        torch("search", "tf32"),
        step("shifts", "tf32"),
        step("diagonal", "tf32"),
        graphs(ALL_GRAPHS, "conditionals in graphs"),
        Section("depthwise", timed, 30, 60),
        torch("search", "bfloat16"),
        Section("train", {"case": derived, "precision": "tf32", **few}, 45, 100),
        torch("train", "tf32"),
        step("shifts", "bfloat16"),
        step("diagonal", "bfloat16"),
        Section("train", {"case": derived, "precision": "bfloat16", **few}, 45, 100),
        torch("train", "bfloat16"),
        torch("train", "tf32", compiled=True),
        torch("search", "tf32", compiled=True),
        step("shifts", "float32"),
        step("diagonal", "float32"),
        graphs(NO_GRAPHS, "no graphs"),
        Section(
            "search", {**dict(step("library", "tf32").given), "case": paper._replace(executed=8)._asdict()}, 45, 120
        ),
        Section("correctness", {"side": 15, "channels": 16, "shapes": shapes[3:]}, 20, 60),
    ]


def _smoke(platform: str, lowerings: Sequence[str] = ("auto",)) -> list[Section]:
    """Each kind of section once, without haste: a loaded machine is no failure."""
    case, steps = _TINY._replace(lowering=lowerings[0])._asdict(), {"steps": 1}
    cells = {"kinds": ["normal"], "lowerings": list(lowerings), "precisions": ["tf32"], **steps}
    derived = TrainCase(cells=3, channels=4, batch=4)._asdict()
    given: list[tuple[str, dict[str, Any]]] = [
        ("bandwidth", {"megabytes": 4, "steps": 2}),
        ("correctness", {"side": 8, "channels": 4, "shapes": [[3, 2, 1]]}),
        ("step-correctness", {"case": case}),
        ("depthwise", {"scale": "smoke", "batch": 2, "precisions": ["tf32"], "megabytes": 4, **steps}),
        ("cell", {"case": case, **cells}),
        ("search", {"case": case, "lowering": "shifts", "precision": "bfloat16", **steps}),
        ("train", {"case": derived, "precision": "bfloat16", **steps}),
        ("epochs", {"case": case, "precision": "tf32", "steps": 4, "project": True}),
        ("piece", {"case": case, "precision": "tf32", "images": 32, "dispatch": 4, "minutes": 1e-3}),
        ("peer", {"kind": "search", "precision": "bfloat16", "platform": platform, "case": case, **steps}),
        ("peer", {"kind": "train", "precision": "bfloat16", "platform": platform, "case": derived, **steps}),
    ]
    return [Section(name, one, 1, 900) for name, one in given]


def rows(
    platform: str,
    scale: str,
    budget: float,
    note: Callable[[str], None],
    done: Container[str] = (),
    lowerings: Sequence[str] = ("auto",),
) -> Iterator[Row]:
    """Every number of every section that there is time for, but of those that are `done`.

    After those of a section comes a row {what: "section " and its mark, value: its seconds}, with `failure` if any.
    """
    began = time.monotonic()
    for section in _smoke(platform, lowerings) if scale == "smoke" else _full(lowerings):
        says = f"{section.name} {json.dumps(section.given.get('precision', ''))}".strip()
        left = budget - (time.monotonic() - began)
        if section.mark in done:
            note(f"{says}: is there already")
        elif section.name == "peer" and not has_torch():
            note(f"{says}: left out, torch is not installed")
        elif left < section.least:
            note(f"{says}: left out, {left:.0f} s of {budget:.0f} s are left and it needs {section.least:.0f} s")
        else:
            yield from _run(section, platform, min(section.limit, left), note)


def _run(section: Section, platform: str, limit: float, note: Callable[[str], None]) -> Iterator[Row]:
    settings = environment()
    settings["JAX_PLATFORMS"] = "cpu" if platform == "cpu" else "cuda,cpu"
    settings["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch, and the next process, find the memory free
    if section.xla_flags:
        settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {section.xla_flags}".strip()
    command = [sys.executable, "-m", "benchmarks.gpu_sections", section.name, json.dumps(section.given)]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=limit)
        said, failure = done.stdout, done.returncode and f"status {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as ended:  # what it had found by then counts
        said = ended.stdout.decode() if isinstance(ended.stdout, bytes) else ended.stdout or ""
        failure = f"ended after {limit:.0f} s"
    for line in said.splitlines():
        if line.startswith("{") and line.endswith("}"):
            row = json.loads(line)
            if "failure" in row:
                note(f"{section.name}, {row['what']}: {row['failure']}")
                failure = failure or "some of its numbers are missing"
            yield row
    end: Row = {"section": section.name, "what": f"section {section.mark}", "unit": "s"}
    if failure:
        note(f"{section.name} {section.given.get('precision', '')}: {failure}")
        end["failure"] = failure
    yield {**end, "value": round(time.monotonic() - began, 1)}


def gpu_name() -> str | None:
    """The kind of GPU that jax sees, asked in a process of its own, which gives it back; None without one."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    settings = {**environment(), "JAX_PLATFORMS": "cuda,cpu"}
    command = [sys.executable, "-c", ask]
    try:
        done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=ROOT, timeout=120)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return None
    platform, _, name = done.stdout.strip().partition(" ")
    return name if platform in ("gpu", "cuda") else None


def finished(rows: Sequence[Row]) -> set[str]:
    """The marks of the sections that these rows have whole."""
    return {
        row["what"].removeprefix("section ")
        for row in rows
        if row["what"].startswith("section ") and "failure" not in row
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu", description=__doc__)
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--scale", choices=("smoke", "full"), default="full")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all sections together")
    parser.add_argument("--out", type=Path, help="folder of gpu.jsonl, where rows replace older ones")
    parser.add_argument("--anew", action="store_true", help="measure again what --out has already")
    parser.add_argument(
        "--lowering",
        default="scan,waves",
        help="of the mixed cell: those to compare, the first one for the other sections",
    )
    args = parser.parse_args(argv)
    if args.out and args.scale == "smoke" and args.out.resolve() == kept.RESULTS:
        parser.error("--out: rows of the smoke scale measure nothing and stay out of benchmarks/results")

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    began = time.monotonic()
    device = gpu_name() if args.platform == "gpu" else "cpu"
    if device is None:
        note(f"the jax of {sys.executable} sees no GPU: nothing is measured. PYTHON_GPU=... of make takes another")
        note("Python; --platform cpu --scale smoke shows that everything runs")
        return 1
    path, facts = args.out / "gpu.jsonl" if args.out else None, kept.facts()
    same = [r for r in kept.read(path) if (r["commit"], r["device"]) == (facts["commit"], device)] if path else []
    old: list[Row] = [] if args.anew else same
    wrong = [row["what"] for row in old if row.get("ok") is False]
    left = args.budget - (time.monotonic() - began)
    for row in rows(args.platform, args.scale, left, note, finished(old), args.lowering.split(",")):
        row = {**facts, **row, "device": device}
        print(json.dumps(row), flush=True)
        if row.get("ok") is False or ("failure" in row and row["section"].endswith("correctness")):
            wrong.append(row["what"])
        if path and (row["what"].startswith("section ") or "failure" not in row):
            kept.keep(path, [row])
    for what in wrong:
        note(f"wrong: {what}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
