"""A search on your own images with your own changes to the method: copy this file and edit the three marked places.

    python -m experiments.search_own_data                        the example as it stands, 2 cores: a few minutes
    python -m experiments.search_own_data --scale smoke          under a minute, its result means nothing

The example takes the digits of scikit-learn as if they were yours. The result is WORKDIR/genotype.json, with
diagrams in WORKDIR/plots and WORKDIR/report.html; the same command again resumes or reports it. There is no expected
figure for your data: watch `val_accuracy` rise above chance, and compare seeds with `prdarts report WORKDIR...`.

Images that lie in files need no program: `prdarts search --data npz:FILE` or `--data folder:DIR`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import optax

import prdarts_jax
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.data.sources import Dataset, from_arrays
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.prdarts import prdarts
from prdarts_jax.strategy import Strategy

# Scale and augmentation, by config path (`prdarts search --preset digits --print-config` lists all of them).
SCALES = {
    "smoke": {
        "space.cells": 3,
        "space.channels": 4,
        "space.nodes": 1,
        "space.ops": "none,skip_connect,sep_conv_3x3",
        "epochs": 2,
        "batch_size": 64,
    },
    "cpu": {"space.cells": 5, "space.channels": 8, "epochs": 20, "batch_size": 32},
}


def load_images() -> Dataset:
    """EDIT 1: your images, uint8 [N,H,W,C] or [N,H,W], and labels 0..K-1. Test images are never seen by a search."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images / 16 * 255).astype(np.uint8)
    return from_arrays("my digits", images, bunch.target)


def strategy(*, space: Space) -> Strategy:
    """EDIT 2: the method. Here PR-DARTS with a temperature that falls geometrically instead of linearly.

    A strategy is a NamedTuple of functions: `_replace` changes one and keeps the others.
    """
    base, high, low = prdarts(space=space), 10.0, 0.1

    def schedule(epoch: int, epochs: int) -> dict[str, float]:
        tau = high * (low / high) ** (epoch / max(epochs - 1, 1))
        return base.schedule(epoch, epochs) | {"tau": tau}

    return base._replace(schedule=schedule)


def weight_transform(config: SearchConfig) -> optax.GradientTransformation:
    """EDIT 3: the optimizer of the weights, any optax transformation. Here AdamW in place of SGD."""
    return optax.chain(optax.clip_by_global_norm(config.weights.clip_norm), optax.adamw(2e-3, weight_decay=1e-4))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the search; returns the exit status."""
    parser = argparse.ArgumentParser(
        "search_own_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", default="all", help="N | all")
    parser.add_argument("--workdir", default="runs/search-own-data")
    parser.add_argument("--overwrite", action="store_true", help="start again in a workdir that holds a search")
    args = parser.parse_args(argv)

    flags = {**SCALES[args.scale], "seed": args.seed, "run.devices": args.devices, "run.overwrite": args.overwrite}
    config = prdarts_jax.resolve("digits", flags=flags).config
    try:
        result = prdarts_jax.search(
            config, args.workdir, data=load_images(), strategy=strategy, weight_tx=weight_transform
        )
    except prdarts_jax.UserError as error:
        print(f"search_own_data: error: {error}", file=sys.stderr)
        return 2
    except prdarts_jax.RunError as error:
        print(f"search_own_data: error: {error}", file=sys.stderr)
        return 1
    if result.genotype is None:  # Ctrl-C, SIGTERM: everything is saved
        print(f"stopped, and saved in {result.workdir}; the same command goes on")
        return 128 + (result.signum or 0)
    print(result.genotype.to_json())
    print(f"report: {result.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
