"""`prdarts search`: one search, or with `--sweep` and `--population` one for each of several values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdarts_jax import presets
from prdarts_jax.cli import runs
from prdarts_jax.cli.flags import Argument, Command
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.errors import UserError
from prdarts_jax.searching import sweep as sweeps

SEARCH = Command(
    name="search",
    kind=SearchConfig,
    aliases={
        "strategy": "method.strategy",
        "with": "method.transforms",
        "channels": "space.channels",
        "cells": "space.cells",
        "arch-tx": "arch.transform",
        "lowering": "run.lowering",
        **runs.ALIASES,
    },
    own=(
        Argument("--preset", metavar="NAME", default="paper", help=" | ".join(presets.PRESETS) + " (default: paper)"),
        Argument(
            "--sweep",
            metavar="NAME=VALUES",
            action="append",
            default=[],
            help="a search for each value, A,B,C or A..B; several --sweep: for each combination",
        ),
        Argument("--population", metavar="N", help="a search for each of the seeds S..S+N-1, S that of --seed"),
        *runs.OWN,
    ),
    intro="usage: prdarts search [--preset NAME] [--FIELD VALUE ...]\n\n"
    "Searches a cell. The same command again resumes; --flag, --no-flag and --flag=false set a switch.",
    presets=presets.PRESETS,
)


def search(words: Sequence[str]) -> int:
    """`prdarts search`; returns the exit status."""
    return runs.run(SEARCH, words, _plan)


def _plan(args: argparse.Namespace, flags: Mapping[str, Any]) -> runs.Plan:
    if (args.sweep or args.population) and (args.distributed or args.coordinator):
        raise UserError("flag: --sweep and --population are for one process, with its devices")
    resolved = presets.resolve(args.preset, flags=flags)
    sweep = _sweep(args, flags, resolved.config)
    if args.print_config:
        from prdarts_jax.searching import inputs

        inputs.check_method(resolved.config)

    def start(config: SearchConfig, workdir: Path) -> runs.Ending:
        if sweep:
            return _population(config, workdir, sweep, resolved.sources)
        from prdarts_jax.searching import loop
        from prdarts_jax.space.genotype import CELLS

        result = loop.search(config, workdir, sources=resolved.sources)
        genotype = result.genotype
        lines = [] if genotype is None else [genotype.to_json()]
        for kind in CELLS:
            if genotype is not None and not any(genotype.cell(kind)[0]):
                note = f"prdarts: note: the {kind} cell has no operation: no network can be trained of it"
                print(note, file=sys.stderr)
        lines += [f"diagram: {path}" for path in sorted((workdir / "plots").glob("genotype*"))]
        return runs.Ending(result, "this search is finished already; --overwrite starts it again", lines)

    folder = f"population-{args.preset}" if sweep else f"search-{args.preset}-seed{resolved.config.seed}"
    return runs.Plan(resolved, folder, start, sweep)


def _sweep(args: argparse.Namespace, flags: Mapping[str, Any], config: SearchConfig) -> dict[str, list[str]]:
    """What is swept: dotted config path -> values; empty without a sweep.

    Args:
      args: the own flags.
      flags: dotted config path -> value, of the others.
      config: what they make.

    Raises:
      UserError: a sweep that is not possible, or one of a field that has a flag of its own.
    """
    sweep, known = sweeps.parse(args.sweep), sweeps.sweepable(config)
    paths = {known[sweeps.find(name, config)]: name for name in sweep}
    for path, name in paths.items():
        if path in flags:
            raise UserError(f"flag: --sweep {name} and --{path} exclude each other")
    if args.population is not None:
        if "seed" in paths:
            raise UserError("flag: --sweep seed and --population exclude each other")
        number = schema.convert_scalar(int, args.population, "population")
        schema.require(1 <= number <= sweeps.MOST, "population", number, f"1..{sweeps.MOST}")
        sweep["seed"] = [str(config.seed + i) for i in range(number)]
        paths["seed"] = "seed"
    if sweep:
        sweeps.members(config, sweep, Path())  # refuses what is not possible before anything is shown or computed
    return {path: sweep[name] for path, name in paths.items()}


def _population(
    config: SearchConfig, workdir: Path, sweep: Mapping[str, Sequence[str]], sources: Mapping[str, str]
) -> runs.Ending:
    from prdarts_jax.report import data
    from prdarts_jax.report import sweep as tables
    from prdarts_jax.searching import population

    result = population.search_population(config, workdir, sweep, sources=sources)
    lines: list[str] = []
    if result.report and (found := data.population(workdir)):
        lines = tables.lines(tables.settings([data.read(folder) for folder in found.folders], found.swept))
    failure = ""
    if result.failures:
        (name, why), *more = result.failures.items()
        failure = f"population: {name} failed: {why}" + (f" (and {len(more)} more)" if more else "")
    already = f"all {len(result.members)} searches are finished already; --overwrite starts them again"
    return runs.Ending(result, already, lines, failure)
