"""How the result of a search depends on lambda1, lambda2, lambda3 (Zhou, Xiong, Socher, Hoi, NeurIPS 2020, appendix).

    python -m experiments.lambda_study --scale smoke                     anywhere, under two minutes
    python -m experiments.lambda_study --scale cpu                       2 cores, under an hour: digits, 27 searches
    python -m experiments.lambda_study --scale paper --data-dir DIR      GPUs: CIFAR-10, 45 searches

DIR is a TFDS data directory with CIFAR-10 prepared (`prdarts data prepare cifar10 --archive FILE --data-dir DIR`).
Each lambda is swept with the other two at their published values (0.01, 0.005, 0.005), over the same seeds, as one
population: one compilation, one report with mean and standard deviation a value. Several devices share its members.
`--which lambda1` does one of the three. Every other flag of `prdarts search` can be added; the same command again
resumes. A time limit counts for each of the three.

Expected: the paper's claim is that the result is stable under these coefficients. Its appendix was not available to
us, so the grid is ours: 1/5, 1/2, 1, 2 and 5 times the published value (smoke: 1 and 100 times; cpu: 1/5, 1 and 5).
What to look at is the number of skip connections and the depth of the normal cell, and whether they move by more than
they differ between seeds. The validation accuracy is that of the shared weights; a found cell is judged by training it
(`prdarts train`). At the scales smoke and cpu the figures show that the study runs; they say nothing about CIFAR-10.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from prdarts_jax import cli, presets

PUBLISHED = {name: presets.resolve("paper").config.method.options[name] for name in ("lambda1", "lambda2", "lambda3")}

TINY = {
    "space.cells": 3,
    "space.channels": 4,
    "space.nodes": 1,
    "space.ops": "none,skip_connect,sep_conv_3x3",
    "method.executed_ops": 1,
    "epochs": 2,
    "batch_size": 64,
}
# scale -> (preset, what it changes by config path, factors of the published value, seeds)
SCALES = {
    "smoke": ("digits", TINY, (1, 100), "0..1"),
    "cpu": ("digits", {}, (0.2, 1, 5), "0..2"),
    "paper": ("paper", {}, (0.2, 0.5, 1, 2, 5), "0..2"),
}


def command(which: str, scale: str, rest: Sequence[str] = ()) -> list[str]:
    """The words of `prdarts search` that sweep one lambda; flags in `rest` win.

    >>> " ".join(command("lambda1", "paper"))[:89]
    'search --preset paper --workdir=runs/lambda-study-paper/lambda1 --sweep lambda1=0.002,0.0'
    """
    preset, changes, factors, seeds = SCALES[scale]
    flags = {"workdir": f"runs/lambda-study-{scale}/{which}", **changes}
    values = ",".join(f"{PUBLISHED[which] * factor:g}" for factor in factors)
    words = ["search", "--preset", preset, *(f"--{path}={value}" for path, value in flags.items())]
    return [*words, "--sweep", f"{which}={values}", "--sweep", f"seed={seeds}", *rest]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweeps; returns the exit status of the first that does not end well."""
    parser = argparse.ArgumentParser(
        "lambda_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--which", choices=tuple(PUBLISHED), default=None)
    parser.add_argument("--scale", choices=tuple(SCALES), default="smoke")
    args, rest = parser.parse_known_args(argv)
    for which in [args.which] if args.which else PUBLISHED:
        status = cli.main(command(which, args.scale, rest))
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
