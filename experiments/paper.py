"""The paper as programs: measures what is missing at a scale, writes docs/results.md and its pictures from the rows.

    python -m experiments.paper --scale smoke     minutes, anywhere; the page goes to runs/experiments, it means nothing
    python -m experiments.paper --scale cpu       two cores: the theory in 20 minutes, the rest in hours
    python -m experiments.paper --scale paper     GPUs
    python -m experiments.paper --write           measures nothing: page and pictures from the rows in the repository

`make paper SCALE=cpu` is the same. `--only NAME` (repeatable) leaves out the other experiments. What is already in
experiments/results is not measured again. Of an experiment the page shows the largest scale that has rows. The part of
the page about searches and trainings is docs/results_notes.md, written by hand.

Expected: with the rows of the repository, `--write` changes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import frame
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run.workdir import atomic_write_text

NAMES = (
    "theorem1_rate",
    "theorem2_gates",
    "theorem3_gates",
    "theorem4_depth",
    "table1_cifar",
    "table2_imagenet",
    "fig1_ablation",
    "fig2_skip_convergence",
    "search_dynamics",
)
DOCS = frame.ROOT / "docs"
NOTES = DOCS / "results_notes.md"


def experiments(names: Sequence[str] = NAMES) -> list[frame.Experiment]:
    """The experiments, in the order of the page."""
    return [importlib.import_module(f"experiments.{name}").EXPERIMENT for name in names]


def largest(experiment: frame.Experiment, folder: Path, scales: Sequence[str]) -> tuple[str, list[frame.Row]]:
    """The largest scale of an experiment whose rows are complete, and these; else the scale that lacks the least."""
    found = {scale: list(frame.rows(experiment, scale, folder)) for scale in reversed(scales)}
    share = {scale: len(rows) / len(experiment.units(scale)) for scale, rows in found.items()}
    best = next((scale for scale in share if share[scale] == 1), max(scales, key=lambda scale: share[scale]))
    return best, found[best]


def page(folder: Path = frame.RESULTS, scales: Sequence[str] = ("cpu", "paper"), pictures: str = "pictures") -> str:
    """docs/results.md as text."""
    parts = [
        "# Results",
        "",
        'Only figures that were measured with this code stand here. "not measured yet" means just that.',
        "Written by `python -m experiments.paper --write` from the rows in `experiments/results` and from",
        "[results_notes.md](results_notes.md); do not edit it. `make paper SCALE=cpu` measures what is missing.",
        "",
        "## The claims of the paper",
        "",
    ]
    for experiment in experiments():
        scale, found = largest(experiment, folder, scales)
        parts += frame.section(experiment, scale, found, f"{pictures}/{experiment.name}.svg")
    return "\n".join([*parts, NOTES.read_text(encoding="utf-8").strip()]).rstrip() + "\n"


def write(folder: Path, scales: Sequence[str], target: Path, pictures: Path) -> None:
    """The page and its pictures."""
    for experiment in experiments():
        _, found = largest(experiment, folder, scales)
        if experiment.picture is not None and found:
            pictures.mkdir(parents=True, exist_ok=True)
            frame.draw(experiment, found, pictures / f"{experiment.name}.svg")
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, page(folder, scales))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    parser = argparse.ArgumentParser(
        "paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scale", choices=frame.SCALES, default="smoke")
    parser.add_argument("--only", choices=NAMES, action="append", default=None)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.write:
            write(frame.RESULTS, ("cpu", "paper"), DOCS / "results.md", DOCS / "pictures")
            return 0
        folder = frame.default_folder(args.scale)
        for experiment in experiments(args.only or NAMES):
            frame.complete(experiment, args.scale, folder, lambda line: print(line, flush=True))
        if args.scale == "smoke":
            write(folder, ("smoke",), folder / "results.md", folder / "pictures")
        else:
            write(folder, ("cpu", "paper"), DOCS / "results.md", DOCS / "pictures")
    except (UserError, RunError) as error:
        print(f"paper: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
