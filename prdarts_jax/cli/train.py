"""`prdarts train` and `prdarts evaluate`: parse, call, print."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prdarts_jax.cli import distributed as cli_distributed
from prdarts_jax.cli.flags import (
    COMMON,
    Command,
    Parser,
    compilation_cache,
    help_text,
    interrupted,
    print_config,
    split_flags,
    to_go_on,
)
from prdarts_jax.config import schema
from prdarts_jax.config.train import TrainConfig, TrainRunConfig
from prdarts_jax.devices import launch
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.presets import train as train_presets

if TYPE_CHECKING:
    from prdarts_jax.training.evaluation import Evaluation

TRAIN = Command(
    name="train",
    kind=TrainConfig,
    aliases={"channels": "network.channels", "cells": "network.cells", "workers": "run.workers", **COMMON},
    own={
        "--genotype NAME": "of the zoo | FILE | WORKDIR of a search",
        "--preset NAME": " | ".join(train_presets.PRESETS) + " (default: cifar10)",
        "--seeds A..B": "several seeds (or A,B,C), each in WORKDIR/seed<N>; mean and standard deviation at the end",
        "--print-config": "print every value and its source, and stop",
        "--json": "with --print-config: as JSON",
        **cli_distributed.FLAGS,
    },
    intro="usage: prdarts train --genotype NAME|FILE|WORKDIR [--preset NAME] [--FIELD VALUE ...]\n\n"
    "Trains a genotype from scratch. The same command again resumes; --flag, --no-flag and --flag=false set a switch.",
    presets=train_presets.PRESETS,
)
_MOST_SEEDS = 1000


def parse_seeds(text: str) -> list[int]:
    """Seeds from `A..B` (both included) or `A,B,C`.

    Raises:
      UserError: neither, or a seed twice.

    >>> parse_seeds("0..2"), parse_seeds("7,3")
    ([0, 1, 2], [7, 3])
    """
    if match := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text):
        first, last = int(match[1]), int(match[2])
        found = list(range(first, last + 1)) if last - first < _MOST_SEEDS else []
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        found = [int(word) for word in text.split(",")]
    else:
        found = []
    if not found or len(set(found)) < len(found):
        raise UserError(f"seeds: {text!r} is not possible; allowed: A..B with A <= B, or different seeds A,B,C")
    return found


def train(words: list[str]) -> int:
    """`prdarts train`; returns the exit status."""
    if "--help" in words or "-h" in words:
        print(help_text(TRAIN))
        return 0
    flags, rest = split_flags(words, TRAIN)
    parser = Parser("prdarts train", add_help=False)
    parser.add_argument("--genotype")
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--seeds")
    parser.add_argument("--print-config", "--print_config", action="store_true")
    parser.add_argument("--json", action="store_true")
    cli_distributed.add_flags(parser)
    args = parser.parse_args(rest)
    cluster = cli_distributed.cluster(args)
    if args.json and not args.print_config:
        raise UserError("flag: --json goes with --print-config")
    if args.preset not in train_presets.PRESETS:
        raise unknown("preset", args.preset, train_presets.PRESETS)
    if args.seeds is not None and "seed" in flags:
        raise UserError("flag: --seed and --seeds exclude each other")
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    resolved = train_presets.resolve(args.preset, flags)
    config = resolved.config
    if not config.run.workdir:
        name = f"runs/train-{args.preset}" + (f"-seed{config.seed}" if seeds is None else "")
        config = schema.replace(config, {"run.workdir": name})
        resolved = dataclasses.replace(resolved, config=config)
    if args.print_config:
        print_config(train_presets.table(resolved), args.json)
        return 0
    if args.genotype is None:
        raise UserError("--genotype: none is given; allowed: a name of the zoo (prdarts zoo) | FILE | WORKDIR")
    compilation_cache()  # before JAX is imported

    def work() -> int:
        from prdarts_jax.training import loop as train_loop

        workdir = Path(config.run.workdir)
        command = shlex.join(["prdarts", "train", *to_go_on(words, TRAIN)])
        if seeds is None:
            result: Any = train_loop.train(config, args.genotype, workdir, sources=resolved.sources)
            return _finish(result, workdir, command, _headline(result.metrics))
        result = train_loop.train_seeds(config, args.genotype, workdir, seeds, sources=resolved.sources)
        return _finish(result, workdir, command, _over_seeds(seeds, result))

    return launch.run(cluster, "train", words, work)


def _finish(result: Any, workdir: Path, command: str, lines: Sequence[str]) -> int:
    """The last lines of a training, and its exit status."""
    if (status := interrupted(result, workdir, command)) is not None:
        return status
    if result.status == "time-limit":
        return 0
    if result.status == "already-finished":
        print(f"this training is finished already; --overwrite starts it again: {command} --overwrite")
    for line in lines:
        print(line)
    if result.report:
        print(f"report: {result.report}")
    return 0


def _headline(row: Any) -> list[str]:
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
    lines = [
        f"seed {seed}: test error {_error(one.metrics['test_accuracy'])}"
        for seed, one in zip(seeds, result.runs, strict=False)
        if "test_accuracy" in one.metrics
    ]
    if "test_accuracy" not in result.metrics:
        return lines
    mean, spread = result.metrics["test_accuracy"], result.metrics["test_accuracy_std"]
    over = f"± {100 * spread:.2f} (n = {len(lines)})"
    lines.append(f"test error after the last epoch: {_error(mean)} {over}")
    if "ema_test_accuracy" in result.metrics:
        mean, spread = result.metrics["ema_test_accuracy"], result.metrics["ema_test_accuracy_std"]
        lines.append(f"of the averaged weights: {_error(mean)} ± {100 * spread:.2f}")
    return lines


def _error(accuracy: float) -> str:
    return f"{100 * (1 - accuracy):.2f} %"


def evaluate(words: list[str]) -> int:
    """`prdarts evaluate`; returns the exit status."""
    parser = Parser("prdarts evaluate", description="How good the newest checkpoint of a training is on test images.")
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--data", metavar="SOURCE", help="default: the data it was trained on")
    parser.add_argument("--data-dir", "--data_dir", metavar="DIR", help="TFDS data directory")
    parser.add_argument("--batch-size", "--batch_size", metavar="B", help="global; default: that of the training")
    parser.add_argument("--devices", metavar="N", default="all", help="N | all")
    parser.add_argument("--workers", metavar="N", default="auto", help="auto | processes that decode streamed images")
    args = parser.parse_args(words)
    if not Path(args.workdir).is_dir():
        raise UserError(f"WORKDIR: no directory {args.workdir!r}")
    batch_size = None if args.batch_size is None else schema.convert_scalar(int, args.batch_size, "batch_size")
    TrainRunConfig(devices=args.devices, workers=args.workers)  # refuses what is neither a number nor all, or auto
    compilation_cache()
    from prdarts_jax.training import evaluation

    found = evaluation.evaluate(
        args.workdir,
        source=args.data,
        data_dir=args.data_dir,
        batch_size=batch_size,
        devices=args.devices,
        workers=args.workers,
    )
    print("\n".join(table(found)))
    print(f"written: {found.workdir / 'evaluation.json'}")
    return 0


def table(found: Evaluation) -> list[str]:
    """The lines of an evaluation as a table; a second column for averaged weights."""
    columns = [found.figures] + ([found.ema] if found.ema else [])
    names = found.class_names
    width = max(20, *(len(name) + 8 for name in names))

    def line(name: str, *values: str) -> str:
        return f"{name:<{width}}" + "".join(f"{value:>12}" for value in values)

    trained = "" if found.epoch is None else f", after epoch {found.epoch} (step {found.step})"
    lines = [f"{found.images} images of {found.source}{trained}"]
    lines += [line("", "weights", "averaged")] if found.ema else []
    lines += [
        line("top-1 accuracy", *(f"{100 * c.accuracy:.2f} %" for c in columns)),
        line("top-5 accuracy", *(f"{100 * c.top5:.2f} %" for c in columns)),
        line("loss", *(f"{c.loss:.4f}" for c in columns)),
        line("calibration error", *(f"{100 * c.calibration_error:.2f} %" for c in columns)),
    ]
    for k, name in enumerate(names):
        if found.figures.class_images[k]:
            lines.append(line(f"class {name}", *(f"{100 * c.class_accuracy[k]:.2f} %" for c in columns)))
    return lines
