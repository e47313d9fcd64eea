"""What `prdarts search` and `prdarts train` have in common, from the words of the command line to the last lines."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prdarts_jax.cli.flags import Argument, Command, Parser, help_text, print_config, split
from prdarts_jax.config import schema
from prdarts_jax.config.places import cache_folder, expanded
from prdarts_jax.devices import launch
from prdarts_jax.devices.launch import Cluster
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.presets.merge import Resolved, table

# The flags worth a short name in every command that runs something: flag -> config path.
ALIASES: Mapping[str, str] = {
    "data": "data.source",
    "data-dir": "run.data_dir",
    "workdir": "run.workdir",
    "epochs": "epochs",
    "batch-size": "batch_size",
    "seed": "seed",
    "dtype": "dtype",
    "devices": "run.devices",
    "checkpoint-every": "run.checkpoint_every",
    "checkpoint-minutes": "run.checkpoint_minutes",
    "steps-per-dispatch": "run.steps_per_dispatch",
    "time-limit": "run.time_limit",
    "overwrite": "run.overwrite",
    "local-batch-norm": "local_batch_norm",
    "weight-tx": "weights.transform",
    "progress": "run.progress",
    "tensorboard": "run.tensorboard",
}
# And the flags of every one of them that are no config fields.
OWN = (
    Argument(
        "--print-config", "--print_config", action="store_true", help="print every value and its source, and stop"
    ),
    Argument("--json", action="store_true", help="with --print-config: as JSON"),
    Argument(
        "--distributed",
        action="store_true",
        help="one process of several, as TPU, Slurm, Open MPI or Kubernetes have started it",
    ),
    Argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="one process of several, without these: where the first one listens",
    ),
    Argument("--num-processes", "--num_processes", metavar="N", help="with --coordinator: how many there are"),
    Argument("--process-id", "--process_id", metavar="I", help="with --coordinator: which of them this is, 0..N-1"),
)


class Ending(NamedTuple):
    """What a run came to, for its last lines."""

    result: Any  # with status, signum and report
    already: str  # the line of one that was finished before
    lines: Sequence[str]
    failure: str = ""


class Plan(NamedTuple):
    """What a command line asks for."""

    resolved: Resolved[Any]
    folder: str  # in runs/, where no workdir is named
    start: Callable[[Any, Path], Ending]  # of the config and its workdir
    swept: Mapping[str, Sequence[str]] = {}  # dotted config path -> values


def run(command: Command, words: Sequence[str], plan: Callable[[argparse.Namespace, dict[str, Any]], Plan]) -> int:
    """Runs a command and returns its exit status.

    Args:
      command: its description.
      words: the command line after its name.
      plan: what the own flags, parsed, and the config flags (dotted path -> string or bool) ask for.

    Raises:
      UserError, RunError: bad usage or input; the run failed.
    """
    if "--help" in words or "-h" in words:
        print(help_text(command))
        return 0
    line = split(words, command)
    args = Parser(command.name, command.own, add_help=False).parse_args(line.rest)
    processes = cluster(args)
    if args.json and not args.print_config:
        raise UserError("flag: --json goes with --print-config")
    compilation_cache()  # before a strategy's module imports JAX
    resolved, folder, start, swept = plan(args, line.fields)
    if not resolved.config.run.workdir:
        config = schema.replace(resolved.config, {"run.workdir": f"runs/{folder}"})
        resolved = dataclasses.replace(resolved, config=config)
    if args.print_config:
        rows = [(row[0], ",".join(swept[row[0]]), "sweep") if row[0] in swept else row for row in table(resolved)]
        print_config(rows, args.json)
        return 0
    workdir = expanded(resolved.config.run.workdir, "run.workdir")
    again = shlex.join(["prdarts", command.name, *line.again])
    return launch.run(processes, command.name, words, lambda: _finish(start(resolved.config, workdir), workdir, again))


def _finish(ending: Ending, workdir: Path, again: str) -> int:
    """Prints the last lines of a run, with how it goes on; returns the exit status."""
    result = ending.result
    if result.status == "interrupted":
        print(f"stopped, and saved in {workdir}; to go on: {again}")
        return 128 + (result.signum or signal.SIGINT)
    if result.status == "time-limit":
        print(f"the time limit is reached, saved in {workdir}; to go on: {again}")
    if result.status == "already-finished":
        print(f"{ending.already}: {again} --overwrite")
    for line in [*ending.lines, *([f"report: {result.report}"] if result.report else [])]:
        print(line)
    if ending.failure:
        raise RunError(ending.failure)
    return 0


def cluster(args: argparse.Namespace) -> Cluster | None:
    """The other processes of a run, as its flags name them; None: an ordinary run of one process.

    Raises:
      UserError: half of what is needed, or values that are not possible.

    >>> cluster(argparse.Namespace(distributed=False, coordinator="n1:1234", num_processes="2", process_id="0"))
    Cluster(coordinator='n1:1234', processes=2, process=0)
    """
    values = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    missing = [flag for flag, value in values.items() if value is None]
    if len(missing) == len(values):
        return Cluster() if args.distributed else None
    if missing:
        raise UserError(f"{missing[0]}: none is given; allowed: {', '.join(values)} together, or --distributed alone")
    if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", args.coordinator):
        raise UserError(f"--coordinator: {args.coordinator!r} is not possible; allowed: HOST:PORT")
    for flag, low in (("--num-processes", 1), ("--process-id", 0)):
        whole = re.fullmatch(r"\d{1,9}", values[flag]) and int(values[flag]) >= low
        schema.require(bool(whole), flag, values[flag], f"a whole number >= {low}")
    number, process = int(args.num_processes), int(args.process_id)
    schema.require(process < number, "--process-id", process, f"0..{number - 1} (--num-processes {number})")
    return Cluster(args.coordinator, number, process)


def compilation_cache() -> None:
    """Compiled programs are kept in the user's cache directory, so that another seed starts without compiling.

    JAX reads the environment when it is imported; what the user has set there wins.
    """
    folder = cache_folder("jax")
    if folder is None:  # every start compiles
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
