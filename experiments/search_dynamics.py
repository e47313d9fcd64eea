"""Whether the regularizers act during a search, by the schedule of the temperature, and which cells come out.

    python -m experiments.search_dynamics --scale smoke     minutes: tiny searches on digits, the figures mean nothing
    python -m experiments.search_dynamics --scale cpu       2 cores, an hour: digits, 3 seeds of 4 schedules (not run)
    python -m experiments.search_dynamics --scale paper     GPUs: CIFAR-10, 3 seeds, 600 epochs of retraining (not run)

With tau from 10 the probability of a gate is 1 up to rounding for most of the search, so that the penalties have no
slope (docs/fidelity.md). Four settings: the paper's; those of the released program; the paper's with tau from 1; and
`alive`, tau from 1 to 0.5, where the slope of P is 0.08 or more all along and at the end fewer edges pass no gradient
(59 % for 94 %). Kept of each epoch: the mean P, the shares of executed gates and of edges without a gradient, and the
norms of the gradients of the penalties and of the cross-entropy. Each cell is trained from scratch.

Expected: under `paper` the penalty gradients are below a hundredth of that of the cross-entropy for most epochs. Which
schedule gives the better cells is not known; a setting becomes a preset only if its cells differ by more than the
spread.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import frame, trainings
from prdarts_jax import presets

ALIVE = {"method.options.tau_max": 1.0, "method.options.tau_min": 0.5}
RELEASED = {
    **{f"method.options.{name}": value for name, value in presets.PRESETS["released"].options.items()},
    **presets.PRESETS["released"].method_settings,
}
SETTINGS: dict[str, Mapping[str, Any]] = {
    "paper": {},
    "released": RELEASED,
    "tau from 1": {"method.options.tau_max": 1.0},
    "alive": ALIVE,
}
KEPT = {
    "tau": "progress/tau",
    "p_skip": "mean_p/skip",
    "p_conv": "mean_p/conv",
    "executed": "gates/saturated_executed",
    "edges": "gates/edges_without_gradient",
    "cross_entropy": "gradient_norm/cross_entropy",
    "skip": "gradient_norm/skip",
    "path": "gradient_norm/path",
    "skips": "normal_skips",
    "depth": "normal_depth",
}


def units(scale: str) -> list[dict[str, Any]]:
    """Every seed of every setting."""
    return trainings.units(scale, "setting", SETTINGS)


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """Searches, trains what was found, and keeps what the search logged."""
    name = trainings.folder("dynamics", unit["search"], unit["setting"], unit["seed"], *unit["changes"].values())
    flags = {**SETTINGS[unit["setting"]], **unit["changes"]}
    args = (unit["search"], unit["train"], unit["seed"], name)
    figures = trainings.found(*args, flags=flags, train_flags=unit["train_changes"])
    rows = trainings.epochs(f"{name}/search")
    return frame.short({**figures, "log": {short: [row[key] for row in rows] for short, key in KEPT.items()}})


def inert(row: frame.Row) -> float:
    """Percent of the epochs in which both penalty gradients are below a hundredth of that of the cross-entropy."""
    log = {name: np.array(row["log"][name]) for name in ("cross_entropy", "skip", "path")}
    return float(100 * np.mean(np.maximum(log["skip"], log["path"]) < 0.01 * log["cross_entropy"]))


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """By setting: how long the penalties were inert, what was starved at the end, the cell, its error."""
    lines = []
    for setting in SETTINGS:
        some = [row for row in rows if row["setting"] == setting]
        if some:
            lines.append(
                (
                    setting,
                    len(some),
                    frame.spread([inert(row) for row in some], 0),
                    frame.spread([100 * row["log"]["edges"][-1] for row in some], 0),
                    *(frame.spread([float(row[name]) for row in some], 1) for name in ("skips", "depth")),
                    frame.spread([row["test_error"] for row in some], 2),
                )
            )
    header = (
        "setting",
        "seeds",
        "epochs with penalty gradients below 1 % of the loss gradient, %",
        "edges without a gradient, last epoch, %",
        "skips, normal cell",
        "depth, normal cell",
        "test error after training, %",
    )
    return [f"Searches with preset `{rows[0]['search']}`.", "", *frame.table(header, lines)]


def picture(rows: Sequence[frame.Row]) -> Figure:
    """P of skips, edges without a gradient, and the penalty gradients against that of the loss, over the epochs."""
    figure, axes = frame.panels(3, width=2.6)
    for setting in SETTINGS:
        logs = [row["log"] for row in rows if row["setting"] == setting]
        if not logs:
            continue
        mean = {name: np.mean([log[name] for log in logs], axis=0) for name in KEPT}
        x = np.arange(1, len(mean["tau"]) + 1)
        axes[0].plot(x, mean["p_skip"], lw=1.3, label=setting)
        axes[1].plot(x, mean["edges"], lw=1.3)
        axes[2].semilogy(x, np.maximum(mean["path"] / mean["cross_entropy"], 1e-12), lw=1.3)
    for panel, title in zip(
        axes, ("P(skip), mean", "edges without a gradient", "path gradient / loss gradient"), strict=True
    ):
        panel.set(title=title, xlabel="epoch")
    axes[0].legend(fontsize=6.5, frameon=False)
    return figure


EXPERIMENT = frame.Experiment(
    name="search_dynamics",
    title="When the regularizers act",
    claim="tau goes from 10 to 0.1 over 200 epochs, while three regularizers on P(g != 0) keep skips few and the "
    "cell deep.",
    units=units,
    measure=measure,
    findings=findings,
    picture=picture,
    caption="Mean probability of a skip, edges without a gradient, path gradient against loss gradient, over the "
    "epochs",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
