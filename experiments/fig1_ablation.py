"""Figure 1(e): what the gates and the path term of PR-DARTS each change in the cell that is found.

    python -m experiments.fig1_ablation --scale smoke     minutes: tiny searches on digits, the figures mean nothing
    python -m experiments.fig1_ablation --scale cpu       2 cores, about 50 minutes: digits, 3 seeds (not run)
    python -m experiments.fig1_ablation --scale paper     GPUs: CIFAR-10, 3 seeds, 600 epochs of retraining (not run)

Four methods: DARTS as published; DARTS with the path term, its probabilities being the softmax weights; PR-DARTS with
its three coefficients at 0 (gates only); PR-DARTS. Each found cell is trained from scratch. The paper scale reads
CIFAR-10 from the TFDS directory that the environment variable TFDS_DATA_DIR names. A stopped start goes on where it
was.

Expected: in the paper DARTS has the most skip connections and the shallowest cell, PR-DARTS few skips and the deepest,
and each part alone lies between.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import frame, trainings
from prdarts_jax.strategies import registry

DARTS = next(row.settings for row in registry.rows() if row.name == "darts")
OFF = {"method.options.lambda1": 0.0, "method.options.lambda2": 0.0, "method.options.lambda3": 0.0}
# method -> (strategy, what it changes)
METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "DARTS": ("darts", {}),
    "path term only": (str(frame.ROOT / "experiments" / "path_term.py") + ":darts_with_path", DARTS),
    "gates only": ("prdarts", OFF),
    "gates and path term": ("prdarts", {}),
}


def units(scale: str) -> list[dict[str, Any]]:
    """Every seed of every method."""
    return trainings.units(scale, "method", METHODS)


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """Searches, and trains what was found."""
    strategy, own = METHODS[unit["method"]]
    name = trainings.folder("fig1", unit["search"], unit["method"], unit["seed"], *unit["changes"].values())
    flags = {**own, **unit["changes"]}
    args = (unit["search"], unit["train"], unit["seed"], name)
    return frame.short(trainings.found(*args, strategy=strategy, flags=flags, train_flags=unit["train_changes"]))


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """Skips, depth and error by method."""
    lines = []
    for method in METHODS:
        some = [row for row in rows if row["method"] == method]
        if some:
            figures = (
                frame.spread([float(row[name]) for row in some], 2 if name == "test_error" else 1)
                for name in ("skips", "depth", "test_error")
            )
            lines.append((method, len(some), *figures))
    header = ("method", "seeds", "skips, normal cell", "depth, normal cell", "test error after training, %")
    return [
        f"Searches with preset `{rows[0]['search']}`, trainings with `{rows[0]['train']}`.",
        "",
        *frame.table(header, lines),
    ]


def picture(rows: Sequence[frame.Row]) -> Figure:
    """Skips, depth and error, a point a seed."""
    figure, axes = frame.panels(3, width=2.5)
    for panel, (name, says) in zip(
        axes, {"skips": "skips", "depth": "depth", "test_error": "test error, %"}.items(), strict=True
    ):
        for place, method in enumerate(METHODS):
            some = [row[name] for row in rows if row["method"] == method]
            panel.plot([place + 0.1 * (i - len(some) / 2) for i in range(len(some))], some, "o", ms=4)
        panel.set_xticks(
            range(len(METHODS)), [m.replace(" and ", "\nand ").replace(" only", "\nonly") for m in METHODS]
        )
        panel.set_xlim(-0.5, len(METHODS) - 0.5)
        panel.tick_params(axis="x", labelsize=6)
        panel.set_title(f"Normal cell: {says}" if name != "test_error" else "After training: test error, %")
    return figure


EXPERIMENT = frame.Experiment(
    name="fig1_ablation",
    title="Figure 1(e): the parts of PR-DARTS",
    claim="independent gates and the path term each reduce the skip connections of the normal cell and deepen it, "
    "and both together give the best cell after training.",
    units=units,
    measure=measure,
    findings=findings,
    picture=picture,
    caption="Skips and depth of the normal cell and the error of the trained cell, by method, a point a seed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
