"""`prdarts check`: whether the programs of a preset fit devices that are not here, and what a step of them does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdarts_jax import presets
from prdarts_jax.accelerators import targets
from prdarts_jax.cli.flags import Argument, Command, Parser, help_text, split
from prdarts_jax.cli.search import SEARCH
from prdarts_jax.config.places import expanded
from prdarts_jax.config.schema import require_names
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.presets import train as train_presets

PROGRAMS = ("search", "train")
# Flags that are those of the training too; the rest of its config is that of its preset.
_SHARED = ("batch_size", "dtype", "precision", "local_batch_norm", "run.steps_per_dispatch", "run.data_dir")
_TRAINING = "cifar10"  # the preset of the training, where there is none of the search's name

CHECK = Command(
    name="check",
    kind=SearchConfig,
    aliases=SEARCH.aliases,
    own=(
        Argument("--preset", metavar="NAME", default="paper", help=" | ".join(presets.PRESETS) + " (default: paper)"),
        Argument(
            "--target",
            metavar="PLATFORM:KIND[:TOPOLOGY]",
            action="append",
            default=[],
            help=f"devices to compile for ({targets.KNOWN}); several --target: one after the other",
        ),
        Argument("--program", metavar="NAME", default="all", help="search | train | all (default: all)"),
        Argument(
            "--genotype",
            metavar="NAME",
            default="PRDARTS",
            help="of the training, as prdarts train takes it (default: PRDARTS)",
        ),
        Argument("--json", metavar="FILE", help="the rows, as JSON"),
    ),
    intro="usage: prdarts check --target PLATFORM:KIND[:TOPOLOGY] [--preset NAME] [--FIELD VALUE ...]\n\n"
    "Compiles the programs of a search and of a training for devices that are not here: whether they fit, and what a\n"
    "step of them does. The fields are those of the search; the training is that of the preset of the same name, else\n"
    "cifar10, and has the search's batch, dtype, precision and local batch normalisation if they are given.",
    presets=presets.PRESETS,
)


def check(words: Sequence[str]) -> int:
    """`prdarts check`; returns the exit status.

    Raises:
      UserError: bad usage, or a compiler that is not installed.
      RunError: a program that does not fit.
    """
    if "--help" in words or "-h" in words:
        print(help_text(CHECK))
        return 0
    line = split(words, CHECK)
    args = Parser(CHECK.name, CHECK.own, add_help=False).parse_args(line.rest)
    if not args.target:
        raise UserError(f"--target: none is given; allowed: {targets.KNOWN}")
    chosen = [targets.parse(text) for text in args.target]
    require_names("--program", [args.program], (*PROGRAMS, "all"))
    if "run.devices" in line.fields:
        raise UserError("run.devices: the devices of a check are those of --target")
    out = None if args.json is None else expanded(args.json, "--json")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json: no directory {str(out.parent)!r}; allowed: a file in a directory that is there")
    targets.before_jax()
    rows: list[dict[str, Any]] = []
    for made in _rows(chosen, PROGRAMS if args.program == "all" else (args.program,), args, line.fields):
        rows.append(made)
        print(_line(made), flush=True)
        if out is not None:
            _write(out, rows)
    if large := [f"{row['target']} {row['program']}" for row in rows if not row["fits"]]:
        raise RunError(f"check: {', '.join(large)} cannot be run with this batch")
    return 0


def _rows(chosen: Sequence[targets.Target], programs: Sequence[str], args: Any, flags: Mapping[str, Any]) -> Any:
    """The row of each program for each target, as it is made."""
    config = presets.resolve(args.preset, flags=flags).config
    named = args.preset if args.preset in train_presets.PRESETS else _TRAINING
    shared = {path: value for path, value in flags.items() if path in _SHARED}
    training = train_presets.resolve(named, shared).config
    from prdarts_jax.accelerators import check
    from prdarts_jax.space.genotype import Genotype

    # A mistake is said before the first of them is compiled, which takes minutes.
    genotype = Genotype.load(args.genotype)
    data, own = (check.stand_in(one.data.source, one.run.data_dir or None) for one in (config, training))
    for target in chosen:
        targets.devices(target)
    for target in chosen:
        for program in programs:
            if program == "search":
                row = check.search_row(target, config, data)
            else:
                row = check.train_row(target, training, genotype, own)
            yield row | {"fits": check.fits(row)}


def _line(row: Mapping[str, Any]) -> str:
    """A row in words."""
    head = f"{row['target']}, {row['program']}, batch {row['batch']}, {row['dtype']}: "
    if "failure" in row:
        return f"{head}XLA does not compile it: {row['failure']}"
    room = f"{row['memory_mib']:,.0f} of {row['device_mib']:,} MiB a device"
    counts = [
        f"{row['launches_per_step']:,} launches",
        f"{row['conditionals_per_step']:,} conditionals",
        f"{row['all_reduces_per_step']:,} all-reduces",
        f"{row['bytes_per_step'] / 1e9:,.1f} GB",
    ]
    if row["cycles_per_step"] is not None:
        counts.append(f"{row['cycles_per_step'] / 1e6:,.1f} M cycles")
    verdict = "fits" if row["fits"] else "does not fit"
    return f"{head}{verdict}, {room}; compiled in {row['compile_s']:.0f} s; a step: {', '.join(counts)}"


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from prdarts_jax.run.workdir import atomic_write_text

    atomic_write_text(path, json.dumps(rows, indent=1) + "\n")
