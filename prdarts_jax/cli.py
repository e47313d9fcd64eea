"""`prdarts ...`: parse, call, print. The flags are generated from the config classes.

JAX is imported by the commands that compute, never by `--help`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import prdarts_jax
from prdarts_jax import cli_distributed, cli_export, cli_flags, cli_population, cli_train, presets
from prdarts_jax.cli_flags import COMMON, Command, compilation_cache, help_text, print_config
from prdarts_jax.cli_flags import Parser as _Parser
from prdarts_jax.cli_flags import shown as _shown
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.devices import launch
from prdarts_jax.errors import RunError, UserError, unknown
from prdarts_jax.strategies import registry

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 done, 1 the run failed, 2 bad usage or input, 130, 143.

    Args:
      argv: the words after `prdarts`; None: those of the process.

    >>> main(["strategies", "--jsn"])  # an error line on stderr
    2
    """
    return launch.leave(_status(list(sys.argv[1:] if argv is None else argv)))


def _status(words: list[str]) -> int:
    """Every mistake and failure as its exit status and its line."""
    try:
        return _dispatch(words)
    except UserError as error:
        return _fail(2, str(error))
    except RunError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(128 + signal.SIGINT, "interrupted")
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # `prdarts ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        full = " (free some space and run the same command again)" if error.errno == errno.ENOSPC else ""
        return _fail(1, f"{error.filename or 'file system'}: {error.strerror or error}{full}")
    except Exception as error:
        if os.environ.get("PRDARTS_TRACEBACK") == "1":
            traceback.print_exc()
        return _fail(1, f"internal: {type(error).__name__}: {error} (PRDARTS_TRACEBACK=1 shows where)")


def _fail(status: int, message: str) -> int:
    print(f"prdarts: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _dispatch(words: list[str]) -> int:
    if not words:
        raise UserError(f"no command; allowed: {' | '.join(_COMMANDS)} (see prdarts --help)")
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"prdarts_jax {prdarts_jax.__version__}")
        return 0
    if name not in _COMMANDS:
        raise unknown("command", name, _COMMANDS)
    return _COMMANDS[name][0](rest)


def _overview() -> str:
    lines = [f"  {name:<12} {summary}" for name, (_, summary) in _COMMANDS.items()]
    return "\n".join(["usage: prdarts COMMAND ...  (prdarts COMMAND --help)", "", *lines])


def split_flags(words: Sequence[str], command: Command = SEARCH) -> tuple[dict[str, Any], list[str]]:
    """Takes the flags of config fields out of a command line, see `cli_flags.split_flags`.

    >>> split_flags(["--space.head-norm=false", "--cells", "5", "--no-data.flip", "--preset", "digits"])
    ({'space.head_norm': 'false', 'space.cells': '5', 'data.flip': False}, ['--preset', 'digits'])
    """
    return cli_flags.split_flags(words, command)


# Commands


def _search(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(help_text(SEARCH))
        return 0
    flags, rest = split_flags(words)
    parser = _Parser("prdarts search", add_help=False)
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


def _derive(words: list[str]) -> int:
    parser = _Parser("prdarts derive", description="The genotype of a search, as JSON.")
    parser.add_argument("workdir", metavar="WORKDIR")
    workdir = Path(parser.parse_args(words).workdir)
    if not workdir.is_dir():
        raise UserError(f"WORKDIR: no directory {str(workdir)!r}")
    from prdarts_jax.space.genotype import Genotype

    if (workdir / "genotype.json").is_file():
        print(Genotype.load(workdir).to_json())
        return 0
    log = workdir / "genotypes.jsonl"
    last: dict[str, Any] | None = None
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            last = json.loads(line)
        except ValueError:  # the last line of a process that was killed while it wrote
            continue
    if last is None or "genotype" not in last:
        raise UserError(f"WORKDIR: {str(workdir)!r} holds no genotype yet (genotype.json, genotypes.jsonl)")
    print(f"prdarts: note: the search is not finished; this is epoch {last.get('epoch')}", file=sys.stderr)
    print(Genotype.from_json(last["genotype"]).to_json())
    return 0


def _report(words: list[str]) -> int:
    parser = _Parser("prdarts report", description="One self-contained HTML report of one or several searches.")
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+")
    parser.add_argument("--out", metavar="FILE", help="default: WORKDIR/report.html, or report.html")
    args = parser.parse_args(words)
    workdirs = [Path(name) for name in args.workdirs]
    for workdir in workdirs:
        if not workdir.is_dir():
            raise UserError(f"WORKDIR: no directory {str(workdir)!r}")
    from prdarts_jax.report import page as report_page

    print(f"report: {report_page.report(workdirs, args.out)}")
    return 0


def _strategies(words: list[str]) -> int:
    parser = _Parser("prdarts strategies", description="The search methods, their options and published settings.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(words)
    rows = [dataclasses.asdict(row) | {"options": registry.options(row.name)} for row in registry.rows()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['name']:<12}{row['summary']}\n{'':<12}{row['reference']}")
        options = ", ".join(f"{name}={_shown(value)}" for name, value in row["options"].items())
        print(f"{'':<12}options (--method.NAME VALUE): {options}\n")
    return 0


def _zoo(words: list[str]) -> int:
    parser = _Parser("prdarts zoo", description="The published genotypes and their costs, or the cells of one.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a published one, a file or a workdir")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--pictures", metavar="DIR", help="draw the cells of NAME into this folder, as .svg and .png")
    args = parser.parse_args(words)
    from prdarts_jax.ops.primitives import PRIMITIVES
    from prdarts_jax.space import genotype

    def costs(found: genotype.Genotype) -> dict[str, dict[str, int]]:
        from prdarts_jax.network import counts

        return {data: counts.profile(found, data)._asdict() for data in counts.SCALES}

    if args.name is None:
        if args.pictures:
            raise UserError("--pictures: of which genotype? allowed: NAME and --pictures DIR")
        names = genotype.names()
        rows = [{"name": name, **costs(genotype.Genotype.named(name))} for name in names]
        print(json.dumps(rows, indent=1) if args.json else "\n".join(_zoo_table(rows)))
        return 0
    found = genotype.Genotype.load(args.name)
    pictures = _pictures(found, Path(args.pictures)) if args.pictures else []
    if args.json:
        print(found.to_json())
        return 0
    for kind in genotype.CELLS:
        nodes, concat = found.cell(kind)
        print(f"{kind}: {found.skips(kind)} skips, depth {found.depth(kind)}")
        for node, pairs in enumerate(nodes, start=genotype.CELL_INPUTS):
            print(f"  node {node} = {' + '.join(f'{op}({source})' for op, source in pairs) or '0'}")
        exists = [True] * genotype.CELL_INPUTS
        for pairs in nodes:
            exists.append(any(exists[source] for _, source in pairs))
        there = [n for n in concat if exists[n]]
        print(f"  output = concat({', '.join(map(str, there))})")
    try:
        found.validate_ops(PRIMITIVES)
    except UserError as error:
        print(f"costs: unknown ({error})")
        found_costs = {}
    else:
        found_costs = costs(found)
    for data, cost in found_costs.items():
        params, with_aux, macs = (f"{count / 1e6:.2f} M" for count in cost.values())
        print(f"{data}: {params} parameters ({with_aux} with the auxiliary head), {macs} multiply-adds")
    for path in pictures:
        print(f"written: {path}")
    return 0


def _pictures(found: Any, folder: Path) -> list[Path]:
    """The cells of a genotype as pictures."""
    from prdarts_jax.errors import RunError
    from prdarts_jax.report import plots
    from prdarts_jax.space import genotype

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in genotype.CELLS:
            for suffix in ("svg", "png"):
                written.append(folder / f"{kind}.{suffix}")
                plots.save(plots.cell_diagram(found, kind), written[-1])
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from None
    return written


def _zoo_table(rows: list[dict[str, Any]]) -> list[str]:
    """Millions of parameters, of these with the auxiliary head, and of multiply-adds, a row a genotype."""
    scales = [name for name in rows[0] if name != "name"]
    width = max(len(row["name"]) for row in rows)
    lines = [
        "millions of: parameters (with the auxiliary head), multiply-adds",
        " ".join([" " * width, *(f"{scale:>23}" for scale in scales)]),
    ]
    for row in rows:
        costs = [[count / 1e6 for count in row[scale].values()] for scale in scales]
        cells = [f"{params:6.2f} ({with_aux:6.2f}) {macs:7.2f}" for params, with_aux, macs in costs]
        lines.append(" ".join([f"{row['name']:<{width}}", *(f"{cell:>23}" for cell in cells)]))
    return lines


def _data(words: list[str]) -> int:
    parser = _Parser("prdarts data", description="prdarts data prepare: an official archive as array_record files.")
    parser.add_argument("action", choices=["prepare"])
    parser.add_argument("name", metavar="NAME", help="cifar10 | cifar100")
    parser.add_argument("--archive", metavar="FILE", required=True, help="the official binary archive")
    parser.add_argument("--data-dir", "--data_dir", metavar="DIR", required=True, help="a TFDS data directory")
    args = parser.parse_args(words)
    if args.name not in ("cifar10", "cifar100"):
        raise unknown("NAME", args.name, ("cifar10", "cifar100"))
    if not Path(args.archive).is_file():
        raise UserError(f"--archive: no file {args.archive!r}")
    from prdarts_jax.data import prepare

    print(f"written: {prepare.prepare(args.name, Path(args.archive), Path(args.data_dir))}")
    return 0


_COMMANDS: Mapping[str, tuple[Callable[[list[str]], int], str]] = {
    "search": (_search, "search a cell; the same command again resumes"),
    "train": (cli_train.train, "train a genotype from scratch; the same command again resumes"),
    "evaluate": (cli_train.evaluate, "how good a trained network is: accuracy, classes, calibration"),
    "derive": (_derive, "the genotype of a search, as JSON"),
    "report": (_report, "one self-contained HTML report of one or several searches"),
    "strategies": (_strategies, "the search methods and their options"),
    "zoo": (_zoo, "the published genotypes"),
    "export": (cli_export.export_command, "take a trained network away: StableHLO or safetensors"),
    "import-torch": (cli_export.import_command, "a workdir from a PyTorch checkpoint of the DARTS family"),
    "data": (_data, "prepare a data set from its official archive"),
}
