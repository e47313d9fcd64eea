"""Table 2 of the paper, ImageNet: every published cell, counted by this library, beside what is reported.

    python -m experiments.table2_imagenet --scale smoke     seconds: three cells counted
    python -m experiments.table2_imagenet --scale cpu       a minute: every cell counted
    python -m experiments.table2_imagenet --scale paper     GPUs: 250 epochs on ImageNet, 3 cells (not run)

Parameters and multiply-adds are those of the network of 14 cells and 48 channels on 224 pixels, without the auxiliary
head. The paper scale reads imagenet2012 from the TFDS directory that the environment variable TFDS_DATA_DIR names.

Expected: for the cell of PR-DARTS 4.98 M parameters and 543 M multiply-adds, as the paper reports.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import frame, published, trainings
from prdarts_jax.network.counts import profile
from prdarts_jax.space.genotype import Genotype, names

TRAINED = ("PRDARTS", "DARTS_V2", "PC_DARTS_image")
# scale -> (cells counted, cells trained)
SCALES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "smoke": (("DARTS_V2", "PDARTS", "PRDARTS"), ()),
    "cpu": (names(), ()),
    "paper": (names(), TRAINED),
}


def units(scale: str) -> list[dict[str, Any]]:
    """Counts of every cell, and the trainings."""
    counted, trained = SCALES[scale]
    found: list[dict[str, Any]] = [{"what": "counts", "cell": name} for name in counted]
    return found + [{"what": "trained", "cell": name, "preset": "imagenet", "seed": 0} for name in trained]


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """One count or one training."""
    if unit["what"] == "counts":
        found = profile(Genotype.named(unit["cell"]), "imagenet")
        return {"params": found.params, "macs": found.macs}
    name = f"table2-{unit['cell']}-seed{unit['seed']}"
    return frame.short(trainings.trained(unit["cell"], unit["preset"], unit["seed"], {}, name))


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """The table."""
    errors = {row["cell"]: f"{row['test_error']:.1f}" for row in rows if row["what"] == "trained"}
    lines: list[Sequence[Any]] = [
        (name, c.imagenet, "-", f"{c.params} (cited)", f"{c.macs} (cited)", f"arXiv {c.source}")
        for name, c in published.MANUAL_IMAGENET.items()
    ]
    for row in rows:
        if row["what"] == "counts":
            cited = published.CELLS.get(row["cell"], published.Cited("-"))
            lines.append(
                (
                    f"`{row['cell']}`",
                    cited.imagenet or "-",
                    errors.get(row["cell"], "-"),
                    f"{row['params'] / 1e6:.2f}",
                    f"{row['macs'] / 1e6:.1f}",
                    f"arXiv {cited.source.partition(',')[0]}" if cited.source != "-" else "-",
                )
            )
    header = (
        "cell",
        "top-1 / top-5 error, %, cited",
        "top-1 error, %, ours",
        "parameters, M, counted",
        "multiply-adds, M, counted",
        "source",
    )
    text = [published.NOTE, "", *frame.table(header, lines)]
    [ours] = [row for row in rows if row["what"] == "counts" and row["cell"] == "PRDARTS"] or [None]
    if ours is not None:
        text.append(
            f"The cell of PR-DARTS: {ours['params']:,} parameters and {ours['macs']:,} multiply-adds counted, 4.98 M "
            "and 543 M reported. No error here is ours unless its column says so."
        )
    return text


EXPERIMENT = frame.Experiment(
    name="table2_imagenet",
    title="Table 2: ImageNet",
    claim="the cell of PR-DARTS has 24.1 % top-1 and 7.3 % top-5 error on ImageNet with 4.98 M parameters and 543 M "
    "multiply-adds.",
    units=units,
    measure=measure,
    findings=findings,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
