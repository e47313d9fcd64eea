"""`prdarts pipeline`: searches, the choice of a cell, its full trainings and their test, with one report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdarts_jax.cli import runs
from prdarts_jax.cli.flags import Argument, Command
from prdarts_jax.config.pipeline import PipelineConfig
from prdarts_jax.errors import UserError
from prdarts_jax.presets import pipeline as presets

_COMMON = {alias: path for alias, path in runs.ALIASES.items() if path.startswith("run.")}

PIPELINE = Command(
    name="pipeline",
    kind=PipelineConfig,
    aliases={
        "strategy": "search.method.strategy",
        "with": "search.method.transforms",
        "workers": "run.workers",
        **_COMMON,
    },
    own=(
        Argument("--preset", metavar="NAME", default="paper", help=" | ".join(presets.PRESETS) + " (default: paper)"),
        Argument("--data", metavar="SOURCE", help="of all stages: digits | tfds:NAME | npz:FILE | folder:DIR"),
        Argument("--holdout", metavar="SHARE", help="training images by which a cell is chosen: a share, or how many"),
        *runs.OWN,
    ),
    intro="usage: prdarts pipeline [--preset NAME] [--search.FIELD VALUE ...] [--short.FIELD VALUE ...]\n"
    "                        [--full.FIELD VALUE ...]\n\n"
    "Searches with several seeds, trains each cell for a while, chooses one by its accuracy on held-out images,\n"
    "trains it in full with several seeds and tests it. The same command again goes on. Seeds are A..B or A,B,C.",
    presets=presets.PRESETS,
)


def pipeline(words: Sequence[str]) -> int:
    """`prdarts pipeline`; returns the exit status."""
    return runs.run(PIPELINE, words, _plan)


def _plan(args: argparse.Namespace, flags: Mapping[str, Any]) -> runs.Plan:
    if args.distributed or args.coordinator:
        raise UserError("flag: pipeline is for one process, with its devices")
    shared = {name: value for name in ("data", "holdout") if (value := getattr(args, name)) is not None}
    resolved = presets.resolve(args.preset, {**shared, **flags})
    if args.print_config:
        from prdarts_jax.searching import inputs

        inputs.check_method(resolved.config.search)

    def start(config: PipelineConfig, workdir: Path) -> runs.Ending:
        from prdarts_jax import protocol
        from prdarts_jax.report import pipeline as report

        result = protocol.run_pipeline(config, workdir, sources=resolved.sources)
        lines = report.lines(result.summary) if result.summary else []
        if result.genotype is not None:
            lines = [result.genotype.to_json(), *lines]
        return runs.Ending(result, "this pipeline is finished already; --overwrite starts it again", lines)

    return runs.Plan(resolved, f"pipeline-{args.preset}", start)
