"""`prdarts ...`: parse, call, print. The flags are generated from the config classes.

JAX is imported by the commands that compute, never by `--help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import prdarts_jax
from prdarts_jax import config as cfg
from prdarts_jax import presets
from prdarts_jax.config import SearchConfig
from prdarts_jax.errors import RunError, UserError, unknown
from prdarts_jax.strategies import registry

# The flags worth a short name: flag -> config path. Every other field is its path, `--arch.beta1 0.9`.
ALIASES: Mapping[str, str] = {
    "strategy": "method.strategy",
    "data": "data.source",
    "data-dir": "run.data_dir",
    "workdir": "run.workdir",
    "epochs": "epochs",
    "batch-size": "batch_size",
    "channels": "space.channels",
    "cells": "space.cells",
    "seed": "seed",
    "dtype": "dtype",
    "devices": "run.devices",
    "checkpoint-every": "run.checkpoint_every",
    "checkpoint-minutes": "run.checkpoint_minutes",
    "steps-per-dispatch": "run.steps_per_dispatch",
    "time-limit": "run.time_limit",
    "overwrite": "run.overwrite",
    "weight-tx": "weights.transform",
    "arch-tx": "arch.transform",
    "progress": "run.progress",
    "tensorboard": "run.tensorboard",
}
_OWN = {"preset", "print_config", "json", "help"}  # of `prdarts search`, no config fields


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError, so that every error is the same single line."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        for word in extra:
            if word.startswith("--"):
                raise _no_flag(word.partition("=")[0], self._option_string_actions, f"{self.prog} --help")
        if extra:
            raise UserError(f"unexpected {extra[0]!r} (see {self.prog} --help)")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 done, 1 the run failed, 2 bad usage or input, 130, 143.

    Args:
      argv: the words after `prdarts`; None: those of the process.

    >>> main(["strategies", "--jsn"])  # an error line on stderr
    2
    """
    words = list(sys.argv[1:] if argv is None else argv)
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


# Flags of config fields


def _find(name: str, fields: Mapping[str, Any]) -> tuple[str, bool] | None:
    """The config path a flag means, and whether the flag negates it; None for no config field."""
    name = name.replace("-", "_")
    aliases = {flag.replace("-", "_"): path for flag, path in ALIASES.items()}
    for spelled, negated in ((name, False), (_without_no(name), True)):
        path = aliases.get(spelled, spelled)
        if path in fields and path != "method.options":
            return path, negated
        option = path.removeprefix("method.").removeprefix("options.")
        if path.startswith("method.") and option and (negated or not _without_no(name)):
            return f"{presets.OPTIONS}{option}", negated
    return None


def _without_no(name: str) -> str:
    """`no_data.flip` or `data.no_flip` as `data.flip`; empty if there is no `no`."""
    if name.startswith("no_"):
        return name.removeprefix("no_")
    section, dot, last = name.rpartition(".")
    return f"{section}{dot}{last.removeprefix('no_')}" if last.startswith("no_") else ""


def split_flags(words: Sequence[str], kind: type = SearchConfig) -> tuple[dict[str, Any], list[str]]:
    """Takes the flags of config fields out of a command line.

    Args:
      words: the command line after the command.
      kind: the config class.

    Returns:
      dotted path -> string or bool, and the other words.

    Raises:
      UserError: a flag that does not exist (with the nearest one), or a flag without its value.

    >>> split_flags(["--space.head-norm=false", "--cells", "5", "--no-data.flip", "--preset", "digits"])
    ({'space.head_norm': 'false', 'space.cells': '5', 'data.flip': False}, ['--preset', 'digits'])
    """
    fields = {path: hint for path, hint, _ in cfg.fields(kind)}
    found: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("-", "_") in _OWN:
            rest.append(word)
            if word == "--preset" and queue:
                rest.append(queue.pop(0))
            continue
        match = _find(name, fields)
        if match is None:
            own = (flag.replace("_", "-") for flag in sorted(_OWN))
            known = [f"--{flag}" for flag in (*ALIASES, *own, *fields) if flag != "method.options"]
            raise _no_flag(f"--{name}", known, "prdarts search --help")
        path, negated = match
        follows = bool(queue) and not queue[0].startswith("--")
        # An option's type is known by its strategy only: without a value it is a switch, and the strategy objects.
        switch = fields.get(path) is bool or path.startswith(presets.OPTIONS)
        if negated:
            if equals or not switch:
                raise UserError(f"{path}: --{name} takes no value; allowed: a true | false field")
            found[path] = False
        elif equals:
            found[path] = value
        elif follows:
            found[path] = queue.pop(0)
        elif switch:
            found[path] = True
        else:
            raise UserError(f"{path}: --{name} needs a value")
    return found, rest


def _no_flag(given: str, known: Iterable[str], where: str) -> UserError:
    same = {flag.replace("-", "_"): flag for flag in known}
    near = difflib.get_close_matches(given.replace("-", "_"), same, n=1)
    hint = f"did you mean {same[near[0]]}? " if near else ""
    return UserError(f"flag: unknown {given}; {hint}({where} lists all)")


# Commands


def _search_help() -> str:
    own = [
        ("--preset NAME", " | ".join(presets.PRESETS) + " (default: paper)"),
        ("--print-config [--json]", "print every value and its source, and stop"),
    ]
    short = {path: flag for flag, path in ALIASES.items()}
    comments = cfg.comments(SearchConfig)
    sections: dict[str, list[tuple[str, str]]] = {"": []}
    for path, _, default in cfg.fields(SearchConfig):
        section = path.rpartition(".")[0]
        if path == "method.options":
            row = ("--method.NAME", "an option of the strategy (prdarts strategies lists them)")
        else:
            flags = [f"--{path.replace('_', '-') if not section else path}"]
            if path in short and short[path] != path.replace("_", "-"):
                flags.insert(0, f"--{short[path]}")
            row = (", ".join(flags), comments[path] + (f" (default: {_shown(default)})" if default != "" else ""))
        sections.setdefault(section, []).append(row)
    docs = {name: type(cfg.get(SearchConfig(), name)).__doc__ or "" for name in sections if name}
    width = max(len(flag) for rows in sections.values() for flag, _ in rows) + 2
    lines = ["usage: prdarts search [--preset NAME] [--FIELD VALUE ...]", ""]
    lines += ["Searches a cell. The same command again resumes; --flag, --no-flag and --flag=false set a switch.", ""]
    for section, rows in [("", own + sections.pop("")), *sections.items()]:
        lines += [f"{section}: {docs[section].splitlines()[0]}"] if section else []
        lines += [f"  {flag:<{width}}{text}" for flag, text in rows] + [""]
    lines += ["Summary of the presets:"]
    lines += [f"  {name:<{width}}{preset.summary}" for name, preset in presets.PRESETS.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, list | tuple | dict) or value == "" else str(value)


def _print_config(resolved: presets.Resolved, as_json: bool) -> None:
    rows = presets.table(resolved)
    if as_json:
        print(json.dumps({path: {"value": value, "source": source} for path, value, source in rows}, indent=1))
        return
    width = max(len(path) for path, _, _ in rows)
    longest = max(len(text) for _, value, _ in rows if len(text := _shown(value)) <= 40)
    for path, value, source in rows:
        print(f"{path:<{width}} = {_shown(value):<{longest}}  # {source}")


def _search(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(_search_help())
        return 0
    flags, rest = split_flags(words)
    parser = _Parser("prdarts search", add_help=False)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--print-config", "--print_config", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(rest)
    if args.json and not args.print_config:
        raise UserError("flag: --json goes with --print-config")
    if args.preset not in presets.PRESETS:
        raise unknown("preset", args.preset, presets.PRESETS)
    _compilation_cache()  # before a strategy's module imports JAX
    resolved = presets.resolve(args.preset, flags.pop("method.strategy", None), flags)
    config = resolved.config
    if not config.run.workdir:
        config = cfg.replace(config, {"run.workdir": f"runs/search-{args.preset}-seed{config.seed}"})
        resolved = dataclasses.replace(resolved, config=config)
    if args.print_config:
        _print_config(resolved, args.json)
        return 0
    from prdarts_jax import search_loop

    workdir = Path(config.run.workdir)
    result = search_loop.search(config, workdir, sources=resolved.sources)
    again = [word for word in words if not word.startswith("--overwrite")]  # going on must not start again
    return _finish(result, workdir, shlex.join(["prdarts", "search", *again]))


def _finish(result: Any, workdir: Path, command: str) -> int:
    """The last lines of a search, and its exit status."""
    if result.status == "interrupted":
        print(f"stopped, and saved in {workdir}; to go on: {command}")
        return 128 + (result.signum or signal.SIGINT)
    if result.status == "time-limit":
        print(f"the time limit is reached, saved in {workdir}; to go on: {command}")
    if result.status == "already-finished":
        print(f"this search is finished already; --overwrite starts it again: {command} --overwrite")
    if result.genotype is not None:
        print(result.genotype.to_json())
    for diagram in sorted((workdir / "plots").glob("genotype*")):
        print(f"diagram: {diagram}")
    if result.report:
        print(f"report: {result.report}")
    return 0


def _compilation_cache() -> None:
    """Compiled programs are kept in the user's cache directory, so that another seed starts without compiling.

    JAX reads the environment when it is imported; what the user has set there wins.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home directory: every start compiles
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "prdarts_jax" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


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
    from prdarts_jax import report

    print(f"report: {report.report(workdirs, args.out)}")
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
    parser = _Parser("prdarts zoo", description="The published genotypes: their names, or the cells and costs of one.")
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("--json", action="store_true", help="as JSON; without NAME: the costs of all")
    args = parser.parse_args(words)
    from prdarts_jax.space import genotype

    def costs(found: genotype.Genotype) -> dict[str, dict[str, int]]:
        from prdarts_jax import network_counts

        return {data: network_counts.profile(found, data)._asdict() for data in network_counts.SCALES}

    if args.name is None:
        names = genotype.names()
        if args.json:
            rows = [{"name": name, **costs(genotype.Genotype.named(name))} for name in names]
            print(json.dumps(rows, indent=1))
        else:
            print("\n".join(names))
        return 0
    found = genotype.Genotype.named(args.name)
    if args.json:
        print(found.to_json())
        return 0
    for kind in genotype.CELLS:
        nodes, concat = found.cell(kind)
        print(f"{kind}: {found.skips(kind)} skips, depth {found.depth(kind)}")
        for node, pairs in enumerate(nodes, start=genotype.CELL_INPUTS):
            print(f"  node {node} = {' + '.join(f'{op}({source})' for op, source in pairs) or '0'}")
        print(f"  output = concat({', '.join(map(str, concat))})")
    for data, cost in costs(found).items():
        params, with_aux, macs = (f"{count / 1e6:.2f} M" for count in cost.values())
        print(f"{data}: {params} parameters ({with_aux} with the auxiliary head), {macs} multiply-adds")
    return 0


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
    "derive": (_derive, "the genotype of a search, as JSON"),
    "report": (_report, "one self-contained HTML report of one or several searches"),
    "strategies": (_strategies, "the search methods and their options"),
    "zoo": (_zoo, "the published genotypes"),
    "data": (_data, "prepare a data set from its official archive"),
}
