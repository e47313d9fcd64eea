"""`prdarts search`: parse, call, print."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdarts_jax import presets
from prdarts_jax.cli import distributed as cli_distributed
from prdarts_jax.cli import flags as cli_flags
from prdarts_jax.cli import population as cli_population
from prdarts_jax.cli.flags import COMMON, Command, Parser, compilation_cache, help_text, print_config
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.devices import launch
from prdarts_jax.errors import UserError, unknown

ALIASES: Mapping[str, str] = {
    "strategy": "method.strategy",
    "channels": "space.channels",
    "cells": "space.cells",
    "arch-tx": "arch.transform",
    **COMMON,
}


SEARCH = Command(
    name="search",
    kind=SearchConfig,
    aliases=ALIASES,
    own={
        "--preset NAME": " | ".join(presets.PRESETS) + " (default: paper)",
        **cli_population.FLAGS,
        "--print-config": "print every value and its source, and stop",
        "--json": "with --print-config: as JSON",
        **cli_distributed.FLAGS,
    },
    intro="usage: prdarts search [--preset NAME] [--FIELD VALUE ...]\n\n"
    "Searches a cell. The same command again resumes; --flag, --no-flag and --flag=false set a switch.",
    presets=presets.PRESETS,
)


def split_flags(words: Sequence[str], command: Command = SEARCH) -> tuple[dict[str, Any], list[str]]:
    """Takes the flags of config fields out of a command line, see `cli_flags.split_flags`.

    >>> split_flags(["--space.head-norm=false", "--cells", "5", "--no-data.flip", "--preset", "digits"])
    ({'space.head_norm': 'false', 'space.cells': '5', 'data.flip': False}, ['--preset', 'digits'])
    """
    return cli_flags.split_flags(words, command)


def search(words: list[str]) -> int:
    """`prdarts search`; returns the exit status."""
    if "--help" in words or "-h" in words:
        print(help_text(SEARCH))
        return 0
    flags, rest = split_flags(words)
    parser = Parser("prdarts search", add_help=False)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--population")
    parser.add_argument("--print-config", "--print_config", action="store_true")
    parser.add_argument("--json", action="store_true")
    cli_distributed.add_flags(parser)
    args = parser.parse_args(rest)
    cluster = cli_distributed.cluster(args)
    if cluster is not None and (args.sweep or args.population):
        raise UserError("flag: --sweep and --population are for one process, with its devices")
    if args.json and not args.print_config:
        raise UserError("flag: --json goes with --print-config")
    if args.preset not in presets.PRESETS:
        raise unknown("preset", args.preset, presets.PRESETS)
    compilation_cache()  # before a strategy's module imports JAX
    resolved = presets.resolve(args.preset, flags.pop("method.strategy", None), flags)
    config = resolved.config
    sweep = cli_population.sweep_of(args.sweep, args.population, flags, config)
    if not config.run.workdir:
        name = f"population-{args.preset}" if sweep else f"search-{args.preset}-seed{config.seed}"
        config = schema.replace(config, {"run.workdir": f"runs/{name}"})
        resolved = dataclasses.replace(resolved, config=config)
    if args.print_config:
        from prdarts_jax.searching import inputs as search_inputs

        search_inputs.check_method(config)
        print_config(cli_population.table(presets.table(resolved), sweep, resolved), args.json)
        return 0
    again = shlex.join(["prdarts", "search", *cli_flags.to_go_on(words, SEARCH)])

    def work() -> int:
        workdir = Path(config.run.workdir)
        if sweep:
            from prdarts_jax.searching import population

            found = population.search_population(config, workdir, sweep, sources=resolved.sources)
            return cli_population.finish(found, again)
        from prdarts_jax.searching import loop as search_loop

        return _finish(search_loop.search(config, workdir, sources=resolved.sources), workdir, again)

    return launch.run(cluster, "search", words, work)


def _finish(result: Any, workdir: Path, command: str) -> int:
    """The last lines of a search, and its exit status."""
    if (status := cli_flags.interrupted(result, workdir, command)) is not None:
        return status
    if result.status == "already-finished":
        print(f"this search is finished already; --overwrite starts it again: {command} --overwrite")
    if result.genotype is not None:
        print(result.genotype.to_json())
    for diagram in sorted((workdir / "plots").glob("genotype*")):
        print(f"diagram: {diagram}")
    if result.report:
        print(f"report: {result.report}")
    return 0
