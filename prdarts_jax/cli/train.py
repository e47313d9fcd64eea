"""`prdarts train` and `prdarts evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prdarts_jax.cli import runs
from prdarts_jax.cli.flags import Argument, Command, command, existing_folder
from prdarts_jax.config import schema
from prdarts_jax.config.schema import parse_seeds
from prdarts_jax.config.train import TrainConfig, TrainRunConfig
from prdarts_jax.errors import UserError
from prdarts_jax.presets import train as presets

if TYPE_CHECKING:
    from prdarts_jax.training.evaluation import Evaluation

TRAIN = Command(
    name="train",
    kind=TrainConfig,
    aliases={"channels": "network.channels", "cells": "network.cells", "workers": "run.workers", **runs.ALIASES},
    own=(
        Argument(
            "--genotype",
            metavar="NAME",
            help="of the zoo | FILE | FILE:NAME of several | WORKDIR of a search | the text",
        ),
        Argument(
            "--preset", metavar="NAME", default="cifar10", help=" | ".join(presets.PRESETS) + " (default: cifar10)"
        ),
        Argument(
            "--seeds",
            metavar="A..B",
            help="several seeds (or A,B,C), each in WORKDIR/seed<N>; mean and standard deviation at the end",
        ),
        *runs.OWN,
    ),
    intro="usage: prdarts train --genotype NAME|FILE|WORKDIR [--preset NAME] [--FIELD VALUE ...]\n\n"
    "Trains a genotype from scratch. The same command again resumes; --flag, --no-flag and --flag=false set a switch.",
    presets=presets.PRESETS,
)


def train(words: Sequence[str]) -> int:
    """`prdarts train`; returns the exit status."""
    return runs.run(TRAIN, words, _plan)


def _plan(args: argparse.Namespace, flags: Mapping[str, Any]) -> runs.Plan:
    if args.seeds is not None and "seed" in flags:
        raise UserError("flag: --seed and --seeds exclude each other")
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    resolved = presets.resolve(args.preset, flags)
    if args.genotype is None and not args.print_config:
        raise UserError("--genotype: none is given; allowed: a name of the zoo (prdarts zoo) | FILE | WORKDIR")

    def start(config: TrainConfig, workdir: Path) -> runs.Ending:
        from prdarts_jax.training import loop

        result: Any
        if seeds is None:
            result = loop.train(config, args.genotype, workdir, sources=resolved.sources)
            lines = _headline(result.metrics)
        else:
            result = loop.train_seeds(config, args.genotype, workdir, seeds, sources=resolved.sources)
            lines = _over_seeds(seeds, result)
        if result.status == "time-limit":  # what there is so far is no result
            lines = []
        return runs.Ending(result, "this training is finished already; --overwrite starts it again", lines)

    folder = f"train-{args.preset}" + (f"-seed{resolved.config.seed}" if seeds is None else "")
    return runs.Plan(resolved, folder, start)


def _headline(row: Mapping[str, Any]) -> list[str]:
    """The last lines of a training."""
    if "test_accuracy" not in row:
        return []
    lines = [f"test error after the last epoch: {_error(row['test_accuracy'])} (top-5: {_error(row['test_top5'])})"]
    if "ema_test_accuracy" in row:
        lines.append(f"of the averaged weights: {_error(row['ema_test_accuracy'])}")
    if "best_epoch" in row:
        best, epoch = _error(row["best_test_accuracy"]), row["best_epoch"] + 1
        lines.append(f"a side note: the best epoch's is {best} (epoch {epoch})")
    return lines


def _over_seeds(seeds: Sequence[int], result: Any) -> list[str]:
    """The last lines of the trainings of several seeds: each one's error, mean and standard deviation."""
    lines = [
        f"seed {seed}: test error {_error(run.metrics['test_accuracy'])}"
        for seed, run in zip(seeds, result.runs, strict=False)
        if "test_accuracy" in run.metrics
    ]
    for name, said, count in (
        ("test_accuracy", "test error after the last epoch", f" (n = {len(lines)})"),
        ("ema_test_accuracy", "of the averaged weights", ""),
    ):
        if name in result.metrics:
            spread = 100 * result.metrics[f"{name}_std"]
            lines.append(f"{said}: {_error(result.metrics[name])} ± {spread:.2f}{count}")
    return lines


def _error(accuracy: float) -> str:
    return f"{100 * (1 - accuracy):.2f} %"


@command(
    "evaluate",
    "How good the newest checkpoint of a training is on test images.",
    Argument("workdir", metavar="WORKDIR"),
    Argument("--part", metavar="PART", default="test", help="test | holdout (the images of data.holdout)"),
    Argument("--data", metavar="SOURCE", help="default: the data it was trained on"),
    Argument("--data-dir", "--data_dir", metavar="DIR", help="TFDS data directory"),
    Argument("--batch-size", "--batch_size", metavar="B", help="global; default: that of the training"),
    Argument("--devices", metavar="N", default="all", help="N | all"),
    Argument("--workers", metavar="N", default="auto", help="auto | processes that decode streamed images"),
)
def evaluate(args: argparse.Namespace) -> int:
    """`prdarts evaluate`; returns the exit status."""
    existing_folder(args.workdir)
    batch_size = None if args.batch_size is None else schema.convert_scalar(int, args.batch_size, "batch_size")
    TrainRunConfig(devices=args.devices, workers=args.workers)  # refuses what is neither a number nor all, or auto
    runs.compilation_cache()
    from prdarts_jax.training import evaluation

    evaluated = evaluation.evaluate(
        args.workdir,
        part=args.part,
        source=args.data,
        data_dir=args.data_dir,
        batch_size=batch_size,
        devices=args.devices,
        workers=args.workers,
    )
    print("\n".join(table(evaluated)))
    print(f"written: {evaluated.workdir / 'evaluation.json'}")
    return 0


def table(evaluated: Evaluation) -> list[str]:
    """The lines of an evaluation as a table; a second column for averaged weights."""
    columns = [evaluated.figures] + ([evaluated.ema] if evaluated.ema else [])
    trained = "" if evaluated.epoch is None else f", after epoch {evaluated.epoch} (step {evaluated.step})"
    rows = [["", "weights", "averaged"]] if evaluated.ema else []
    rows += [
        ["top-1 accuracy", *(f"{100 * c.accuracy:.2f} %" for c in columns)],
        ["top-5 accuracy", *(f"{100 * c.top5:.2f} %" for c in columns)],
        ["loss", *(f"{c.loss:.4f}" for c in columns)],
        ["calibration error", *(f"{100 * c.calibration_error:.2f} %" for c in columns)],
    ]
    rows += [
        [f"class {name}", *(f"{100 * c.class_accuracy[k]:.2f} %" for c in columns)]
        for k, name in enumerate(evaluated.class_names)
        if evaluated.figures.class_images[k]
    ]
    width = max(20, *(len(name) + 8 for name in evaluated.class_names))
    lines = [f"{name:<{width}}" + "".join(f"{value:>12}" for value in values) for name, *values in rows]
    held_out = " held out of" if evaluated.part == "holdout" else " of"
    return [f"{evaluated.images} images{held_out} {evaluated.source}{trained}", *lines]
