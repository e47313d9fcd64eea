"""`prdarts ...`: parse, call, print. The flags are generated from the config classes.

JAX is imported by the commands that compute, never by `--help`.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import prdarts_jax
from prdarts_jax.cli import check as cli_check
from prdarts_jax.cli import completion, show
from prdarts_jax.cli import export as cli_export
from prdarts_jax.cli import pipeline as cli_pipeline
from prdarts_jax.cli import search as cli_search
from prdarts_jax.cli import train as cli_train
from prdarts_jax.cli.flags import Argument, FixedCommand, command
from prdarts_jax.devices import launch
from prdarts_jax.errors import RunError, UserError, unknown, warn
from prdarts_jax.run.output import steady
from prdarts_jax.run.workdir import reason


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 done, 1 the run failed, 2 bad usage or input, 130, 143.

    Args:
      argv: the words after `prdarts`; None: those of the process.

    >>> main(["strategies", "--jsn"])  # an error line on stderr
    2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with steady() as (out, err):
        status, message = _run(words)
        out.flush()
        if out.lost is not None and not isinstance(out.lost, BrokenPipeError):  # `prdarts ... | head` has what it wants
            lost = f"stdout: {reason(out.lost)}; what was printed is lost"
            if status == 0 and words[0] not in _RUNS:
                status, message = 1, lost
            else:
                warn(lost)
        if message:
            print(f"prdarts: error: {' '.join(message.split())}", file=err)
        return launch.leave(status)


def _run(words: list[str]) -> tuple[int, str]:
    """The exit status of a command line, and the line of a mistake or failure."""
    try:
        return _dispatch(words), ""
    except UserError as error:
        return 2, str(error)
    except RunError as error:
        return 1, str(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "interrupted"
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0, ""
    except OSError as error:
        full = " (free some space and run the same command again)" if error.errno == errno.ENOSPC else ""
        return 1, f"{error.filename or 'file system'}: {error.strerror or error}{full}"
    except Exception as error:
        if os.environ.get("PRDARTS_TRACEBACK") == "1":
            traceback.print_exc()
        return 1, f"internal: {type(error).__name__}: {error} (PRDARTS_TRACEBACK=1 shows where)"


def _dispatch(words: list[str]) -> int:
    if not words:
        raise UserError(f"no command; allowed: {' | '.join(_COMMANDS)} (see prdarts --help)")
    name, *rest = words
    if name in ("-h", "--help", "help"):
        summaries = [f"  {name:<12} {summary}" for name, (_, summary) in _COMMANDS.items()]
        print("\n".join(["usage: prdarts COMMAND ...  (prdarts COMMAND --help)", "", *summaries]))
        return 0
    if name == "--version":
        print(f"prdarts_jax {prdarts_jax.__version__}")
        return 0
    if name not in _COMMANDS:
        raise unknown("command", name, _COMMANDS)
    return _COMMANDS[name][0](rest)


@command(
    "completion",
    "The script by which a shell completes commands, flags and names.",
    Argument("shell", metavar="SHELL", choices=completion.SHELLS, help=" | ".join(completion.SHELLS)),
)
def _completion(args: argparse.Namespace) -> int:
    run = {
        "search": cli_search.SEARCH,
        "train": cli_train.TRAIN,
        "pipeline": cli_pipeline.PIPELINE,
        "check": cli_check.CHECK,
    }
    arguments = {name: completion.flags(command) for name, command in run.items()}
    fixed = {name: of.arguments for name, (of, _) in _COMMANDS.items() if isinstance(of, FixedCommand)}
    summaries = {name: summary for name, (_, summary) in _COMMANDS.items()}
    known = arguments | fixed
    print(completion.script(args.shell, {name: (summary, known.get(name, ())) for name, summary in summaries.items()}))
    return 0


_RUNS = ("search", "train", "pipeline")  # what they are for is in the workdir, and their status is that of the run
_COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "search": (cli_search.search, "search a cell; the same command again resumes"),
    "train": (cli_train.train, "train a genotype from scratch; the same command again resumes"),
    "pipeline": (cli_pipeline.pipeline, "search, choose, train and test over seeds; the same command again goes on"),
    "evaluate": (cli_train.evaluate, "how good a trained network is: accuracy, classes, calibration"),
    "check": (cli_check.check, "whether a preset fits GPUs and TPUs that are not here, and what a step does"),
    "derive": (show.derive, "the genotype of a search, as JSON"),
    "report": (show.report, "one self-contained HTML report of one or several searches"),
    "strategies": (show.strategies, "the search methods and their options"),
    "zoo": (show.zoo, "the published genotypes"),
    "export": (cli_export.export_command, "take a trained network away: StableHLO or safetensors"),
    "import-torch": (cli_export.import_command, "a workdir from a PyTorch checkpoint of the DARTS family"),
    "data": (show.data, "prepare a data set from its official archive"),
    "completion": (_completion, "a script for bash or zsh that completes command lines"),
}
