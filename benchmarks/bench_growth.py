"""How a step grows: seconds, memory and compilation against batch, channels, cells, K, devices, population, shut gates.

One number is changed at a time from a base case; each point is a process of its own, with a cold compilation. A row a
point: {axis, value, seconds, seconds_min, seconds_max, trace_s, compile_s, memory_gb, others}. Memory is the peak of
the whole process and has the compiler's in it. Devices are forced ones of the CPU, which share its cores.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import FEW, SearchCase
from benchmarks.comparisons import Options, Row
from benchmarks.race import Others, Side, Worker


class Axis(NamedTuple):
    """What is changed: a field of the case, its values, and what else differs from the base."""

    field: str
    values: tuple[Any, ...]
    fixed: Mapping[str, Any]
    says: str  # for the page


BASE = {
    "smoke": SearchCase(cells=3, channels=4, ops=FEW, side=8, batch=4),
    "full": SearchCase(cells=6, channels=16, batch=32),
}
AXES = {
    "full": {
        "batch": Axis("batch", (8, 16, 32, 64), {}, "images in a batch"),
        "channels": Axis("channels", (8, 16, 32), {}, "channels C of the first cell"),
        "cells": Axis("cells", (5, 8, 11, 14, 20), {}, "cells of the network, two of them reductions"),
        "K": Axis("executed", (1, 2, 4, 8), {}, "executed operations K an edge"),
        "closed": Axis(
            "closed", (0.0, 0.25, 0.5, 0.75, 1.0), {}, "share of the edges whose gates are exactly 0 (K = 2)"
        ),
        "temperature": Axis(
            "tau", (10.0, 1.0, 0.1), {"subsample": "all"}, "temperature, all operations: P(gate = 0) is 0, .08, .44"
        ),
        "devices": Axis("devices", (1, 2, 4), {}, "forced devices that share the cores and the batch"),
        "population": Axis("members", (1, 2, 4, 8), {}, "searches that share a compiled step (a step of each)"),
    },
    "smoke": {
        "closed": Axis("closed", (0.0, 1.0), {}, "share of the edges whose gates are exactly 0"),
        "devices": Axis("devices", (2,), {}, "forced devices"),
        "population": Axis("members", (2,), {}, "searches that share a compiled step"),
    },
}


def rows(options: Options) -> Iterator[Row]:
    """All points of all axes (--cases names axes)."""
    base, full = BASE[options.scale], options.scale == "full"
    for name, axis in AXES[options.scale].items():
        for value in axis.values:
            case = base._replace(**axis.fixed, **{axis.field: value})
            if options.wants(name, case.batch, ""):
                yield {"axis": name, "value": value, "batch": case.batch, **_point(case, full)}


def _point(case: SearchCase, full: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        cold = Path(folder) if full else None  # at the smoke scale what is compiled already may be used
        with Worker(Side("benchmarks.ours:search", case._asdict()), cold, case.devices) as worker:
            worker.seconds(1)
            others = Others(worker)
            seconds = [worker.seconds(6 if full else 1) for _ in range(5 if full else 2)]
            share, stages = others.share(), worker.stages
            return {
                "seconds": round(statistics.median(seconds), 5),
                "seconds_min": round(min(seconds), 5),
                "seconds_max": round(max(seconds), 5),
                "trace_s": round(stages["trace_s"], 2),
                "compile_s": round(stages["compile_s"], 2),
                "memory_gb": round(worker.memory(), 2),
                "others": share,
            }


def plot(rows: list[Row], path: Path) -> None:
    """Step time, compilation and memory against each axis, an axis a column; bars span the blocks."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    axes = [name for name in AXES["full"] if any(row["axis"] == name for row in rows)]
    measures = {"seconds": "step, s", "trace_s": "tracing, s", "compile_s": "compilation, s", "memory_gb": "peak, GB"}
    with plt.rc_context({"svg.hashsalt": "growth", "font.size": 8}):
        figure, grid = plt.subplots(len(measures), len(axes), figsize=(2.3 * len(axes), 6.5), squeeze=False)
        for column, name in enumerate(axes):
            points = sorted((row for row in rows if row["axis"] == name), key=lambda row: row["value"])
            for line, (measure, label) in enumerate(measures.items()):
                panel = grid[line][column]
                values, found = [p["value"] for p in points], [p[measure] for p in points]
                panel.plot(values, found, "o-", ms=3, lw=1)
                if measure == "seconds":
                    panel.vlines(values, [p["seconds_min"] for p in points], [p["seconds_max"] for p in points], lw=1)
                top = max([*found, *(p["seconds_max"] for p in points if measure == "seconds")])
                panel.set_ylim(0, 1.15 * top)
                if name != "temperature":
                    panel.set_xlim(left=0)
                else:
                    panel.set_xscale("log")
                if line == len(measures) - 1:
                    panel.set_xlabel(name)
                if column == 0:
                    panel.set_ylabel(label)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
