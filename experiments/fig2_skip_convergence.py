"""Figure 2: networks with more skip connections in the place of convolutions train faster.

    python -m experiments.fig2_skip_convergence --scale smoke     minutes: tiny networks on digits, mean nothing
    python -m experiments.fig2_skip_convergence --scale cpu       2 cores, an hour: 10,000 CIFAR-10 images (not run)
    python -m experiments.fig2_skip_convergence --scale paper     GPUs: CIFAR-10, 36 channels, 5 seeds (not run)

Networks of 8 cells whose 8 operations are all sep_conv_3x3, of which 0, 3 or 5 (0, 37.5, 62.5 %) are replaced by
skip_connect, in places drawn by the seed; the wiring of a cell is that of the published cell of PR-DARTS. Plain 3x3
convolutions in the place of separable ones are not offered. The cpu and paper scales read CIFAR-10 from the TFDS
directory that the environment variable TFDS_DATA_DIR names.

Expected: the paper's curves of the training loss fall faster the more skips there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import frame, trainings
from prdarts_jax.space.genotype import Genotype

REPLACED = (0, 3, 5)
# scale -> (preset, seeds, changes)
SCALES: dict[str, tuple[str, range, dict[str, Any]]] = {
    "smoke": ("digits", range(1), {"network.cells": 3, "network.channels": 4, "epochs": 2}),
    "cpu": ("cifar10-small", range(3), {"network.cells": 8, "epochs": 10}),
    "paper": ("cifar10", range(5), {"network.cells": 8, "network.auxiliary": False, "drop_path": 0.0, "epochs": 100}),
}


def units(scale: str) -> list[dict[str, Any]]:
    """Every seed and number of skips."""
    preset, seeds, changes = SCALES[scale]
    return [{"replaced": n, "seed": seed, "preset": preset, "changes": changes} for seed in seeds for n in REPLACED]


def replaced(number: int, seed: int) -> Genotype:
    """The wiring of PR-DARTS' cell, all operations 3x3 convolutions but for so many skips in places drawn by the seed.

    >>> [replaced(n, 0).skips("reduce") for n in REPLACED]
    [0, 3, 5]
    """
    base = json.loads(Genotype.named("PRDARTS").to_json())
    rng = np.random.default_rng(seed)
    for kind in ("normal", "reduce"):
        places = [(i, j) for i, node in enumerate(base[kind]) for j in range(len(node))]
        skips = {places[place] for place in rng.permutation(len(places))[:number]}
        for i, j in places:
            base[kind][i][j][0] = "skip_connect" if (i, j) in skips else "sep_conv_3x3"
    return Genotype.from_json(base)


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """One training, and its loss epoch by epoch."""
    name = trainings.folder("fig2", unit["preset"], unit["replaced"], unit["seed"], *unit["changes"].values())
    genotype = replaced(unit["replaced"], unit["seed"])
    error = trainings.trained(genotype, unit["preset"], unit["seed"], unit["changes"], name)
    return frame.short({"train_loss": [row["train_loss"] for row in trainings.epochs(name)], **error})


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """The training loss by number of skips."""
    epochs = len(rows[0]["train_loss"])
    marks = sorted({0, epochs // 2, epochs - 1})
    lines = []
    for number in REPLACED:
        some = [row for row in rows if row["replaced"] == number]
        if some:
            losses = [frame.spread([row["train_loss"][epoch] for row in some], 3) for epoch in marks]
            error = frame.spread([row["test_error"] for row in some], 2)
            lines.append((f"{100 * number / 8:g} %", len(some), *losses, error))
    header = ("skips", "seeds", *(f"training loss, epoch {epoch + 1}" for epoch in marks), "test error, %")
    return [
        f"Preset `{rows[0]['preset']}`, {rows[0]['changes']['network.cells']} cells.",
        "",
        *frame.table(header, lines),
    ]


def picture(rows: Sequence[frame.Row]) -> Figure:
    """Training loss against epochs, mean and standard deviation over seeds."""
    figure, [axes] = frame.panels(1, width=3.6, height=2.6)
    for number in REPLACED:
        losses = np.array([row["train_loss"] for row in rows if row["replaced"] == number])
        if len(losses):
            x = np.arange(1, losses.shape[1] + 1)
            [line] = axes.plot(x, losses.mean(axis=0), lw=1.5, label=f"{100 * number / 8:g} % skips")
            low, high = losses.mean(axis=0) - losses.std(axis=0), losses.mean(axis=0) + losses.std(axis=0)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend(fontsize=7, frameon=False)
    return figure


EXPERIMENT = frame.Experiment(
    name="fig2_skip_convergence",
    title="Figure 2: skip connections and the speed of training",
    claim="of networks of 8 cells of 3x3 convolutions, those with more of them replaced by skip connections (0, "
    "37.5, 62.5 %) lower their training loss faster.",
    units=units,
    measure=measure,
    findings=findings,
    picture=picture,
    caption="Training loss by the share of skips, mean over seeds, standard deviation shaded",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
