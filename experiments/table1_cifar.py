"""Table 1 of the paper, CIFAR-10 and CIFAR-100: every published cell, counted by this library, beside what is reported.

    python -m experiments.table1_cifar --scale smoke     minutes: three cells counted, one trained on digits
    python -m experiments.table1_cifar --scale cpu       minutes for the counts; 12 trainings take some 90 minutes more
    python -m experiments.table1_cifar --scale paper     GPUs: 600 epochs, 3 seeds, both sets, every cell (not run)

The cpu and paper scales read CIFAR from the TFDS directory that the environment variable TFDS_DATA_DIR names. A
stopped start goes on where it was. Parameters and multiply-adds are those of the network of 20 cells and 36 channels,
without the auxiliary head. At scale cpu four cells are trained with the preset cifar10-small (8 channels, 5 cells,
10,000 images, 20 epochs): these errors compare with one another, not with the published ones. The search cost is a
projection: the seconds of a measured step on the CPU times the steps of a search.

Expected: for the cell of PR-DARTS 3.44 M parameters (the paper: 3.4 M) and 529.8 M multiply-adds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import frame, published, trainings
from prdarts_jax.network.counts import profile
from prdarts_jax.space.genotype import Genotype, names

DATASETS = ("cifar10", "cifar100")
TRAINED = ("PRDARTS", "DARTS_V2", "PDARTS", "PC_DARTS_cifar")
TINY = {"network.cells": 3, "network.channels": 4, "epochs": 1}
# scale -> (cells counted, cells trained, preset and data set of a training, seeds, changes)
SCALES: dict[str, tuple[Sequence[str], Sequence[str], Sequence[tuple[str, str]], range, dict[str, Any]]] = {
    "smoke": (("DARTS_V2", "PDARTS", "PRDARTS"), ("PRDARTS",), (("digits", "digits"),), range(1), TINY),
    "cpu": (names(), TRAINED, (("cifar10-small", "cifar10"),), range(3), {}),
    "paper": (names(), names(), (("cifar10", "cifar10"), ("cifar100", "cifar100")), range(3), {}),
}
STEPS, EPOCHS, BATCH = 195, 200, 128  # of a search with the paper's settings


def units(scale: str) -> list[dict[str, Any]]:
    """Counts of every cell, the cost of a search, and the trainings."""
    counted, trained, presets, seeds, changes = SCALES[scale]
    found: list[dict[str, Any]] = [
        {"what": "counts", "cell": name, "data": data} for name in counted for data in DATASETS
    ]
    found.append({"what": "cost", "case": "prdarts-8", "batch": 64})
    found += [
        {"what": "trained", "cell": name, "preset": preset, "data": data, "seed": seed, **changes}
        for name in trained
        for preset, data in presets
        for seed in seeds
    ]
    return found


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """One count, one projection or one training."""
    if unit["what"] == "counts":
        found = profile(Genotype.named(unit["cell"]), unit["data"])
        return {"params": found.params, "macs": found.macs}
    if unit["what"] == "cost":
        return projected_cost(unit)
    flags = {name: value for name, value in unit.items() if name in TINY}
    name = trainings.folder("table1", unit["preset"], unit["data"], unit["cell"], unit["seed"])
    return frame.short(trainings.trained(unit["cell"], unit["preset"], unit["seed"], flags, name))


def projected_cost(unit: frame.Unit) -> dict[str, Any]:
    """Days of a search on the machine of benchmarks/results: the fastest measurement of a step, scaled to the batch."""
    lines = (frame.ROOT / "benchmarks" / "results" / "search_step.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    step = min(r["seconds_ours"] for r in rows if (r["case"], r["batch"]) == (unit["case"], unit["batch"]))
    days = step * BATCH / unit["batch"] * STEPS * EPOCHS / 86400
    return {"step_seconds": step, "days": round(days, 2), "on": rows[0]["device"]}


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """The table, and the errors of our own trainings."""
    counts = {(row["cell"], row["data"]): row for row in rows if row["what"] == "counts"}
    trained = [row for row in rows if row["what"] == "trained"]
    lines: list[Sequence[Any]] = [
        (name, c.cifar10, c.cifar100, f"{c.params} (cited)", "-", "-", f"arXiv {c.source}")
        for name, c in published.MANUAL_CIFAR.items()
    ]
    for name in dict.fromkeys(cell for cell, _ in counts):
        cited = published.CELLS.get(name, published.Cited("-"))
        ten = counts[name, "cifar10"]
        hundred = counts.get((name, "cifar100"), ten)
        lines.append(
            (
                f"`{name}`",
                cited.cifar10 or "-",
                cited.cifar100 or "-",
                f"{ten['params'] / 1e6:.2f} ({hundred['params'] / 1e6:.2f})",
                f"{ten['macs'] / 1e6:.1f}",
                cited.cost or "-",
                f"arXiv {cited.source}" if cited.source != "-" else "-",
            )
        )
    header = (
        "cell",
        "CIFAR-10 error, %, cited",
        "CIFAR-100 error, %, cited",
        "parameters, M, counted (CIFAR-100)",
        "multiply-adds, M, counted",
        "search, GPU-days, cited",
        "source",
    )
    text = [published.NOTE, "", *frame.table(header, lines)]
    for row in rows:
        if row["what"] == "cost":
            text += [
                f"A search with the paper's settings is projected to {row['days']:g} days on {row['on']}: a step of "
                f"{row['step_seconds']:.2f} s at batch 64, taken twice for 128, times {STEPS} steps and {EPOCHS} "
                "epochs. Our cost on a GPU was not measured.",
                "",
            ]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in trained:
        groups.setdefault((row["cell"], row["preset"], row["data"]), []).append(row["test_error"])
    if groups:
        text += frame.table(
            ("cell", "preset", "data", "seeds", "test error, %, ours"),
            [(f"`{c}`", f"`{p}`", d, len(v), frame.spread(v, 2)) for (c, p, d), v in groups.items()],
        )
    else:
        text.append(
            "None of our own trainings of this table has been run with this program yet; the errors are the cited ones."
        )
    return text


EXPERIMENT = frame.Experiment(
    name="table1_cifar",
    title="Table 1: CIFAR-10 and CIFAR-100",
    claim="the cell that PR-DARTS finds has 2.32 % test error on CIFAR-10 and 16.45 % on CIFAR-100 with 3.4 M "
    "parameters, after a search of 0.17 GPU-days.",
    units=units,
    measure=measure,
    findings=findings,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
