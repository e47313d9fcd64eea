"""`--distributed`: one process of several, started by a launcher on each host, and watched by a parent of its own.

The parent exists because JAX's runtime aborts a process whose peers are lost, wherever it is: while it loads, compiles
or waits. Nothing in that process can turn this into a line and an exit status; its parent can.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NamedTuple

from prdarts_jax.errors import RunError, UserError

FLAGS: Mapping[str, str] = {
    "--distributed": "one process of several, as TPU, Slurm, Open MPI or Kubernetes have started it",
    "--coordinator HOST:PORT": "one process of several, without these: where the first one listens",
    "--num-processes N": "with --coordinator: how many there are",
    "--process-id I": "with --coordinator: which of them this is, 0..N-1",
}
_PARENT = "PRDARTS_WATCHED_BY"  # in the environment of a watched process: the process id of its parent
_LOST = (
    "another process of this run ended or cannot be reached; the log of the one that failed first says why. "
    "The same command on all of them goes on from the last checkpoint"
)


class Cluster(NamedTuple):
    """How a process finds the others; all None: JAX finds it out from the environment."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of FLAGS."""
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", "--num_processes")
    parser.add_argument("--process-id", "--process_id")


def cluster(args: argparse.Namespace) -> Cluster | None:
    """What the flags say; None: an ordinary run of one process.

    Raises:
      UserError: half of what is needed, or values that are not possible.

    >>> cluster(argparse.Namespace(distributed=False, coordinator="n1:1234", num_processes="2", process_id="0"))
    Cluster(coordinator='n1:1234', processes=2, process=0)
    """
    given = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return Cluster() if args.distributed else None
    if missing:
        raise UserError(f"{missing[0]}: none is given; allowed: {', '.join(given)} together, or --distributed alone")
    if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", args.coordinator):
        raise UserError(f"--coordinator: {args.coordinator!r} is not possible; allowed: HOST:PORT")
    numbers = {}
    for flag, low in (("--num-processes", 1), ("--process-id", 0)):
        if not re.fullmatch(r"\d{1,9}", given[flag]) or int(given[flag]) < low:
            raise UserError(f"{flag}: {given[flag]!r} is not possible; allowed: a whole number >= {low}")
        numbers[flag] = int(given[flag])
    if numbers["--process-id"] >= numbers["--num-processes"]:
        allowed = f"0..{numbers['--num-processes'] - 1} (--num-processes {numbers['--num-processes']})"
        raise UserError(f"--process-id: {numbers['--process-id']} is not possible; allowed: {allowed}")
    return Cluster(args.coordinator, numbers["--num-processes"], numbers["--process-id"])


def run(found: Cluster | None, command: str, words: Sequence[str], work: Callable[[], int]) -> int:
    """`work()` and its exit status: here, or as one process of several.

    Args:
      found: of the command line.
      command, words: that command line again, for the process that will be watched.
      work: what the command does once its flags are known.

    Raises:
      UserError, RunError: what `work` raises, that no cluster was found, or that another process is lost.
    """
    if found is None:
        return work()
    if not is_watched():
        return _watch([sys.executable, "-m", "prdarts_jax", command, *words])
    _end_with_parent()
    from prdarts_jax import distributed

    distributed.initialize(found.coordinator, found.processes, found.process)
    try:
        with contextlib.ExitStack() as quiet:
            if not distributed.is_first():  # one process speaks for all; errors are each one's own
                nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
            status = work()
        distributed.leave()
        return status
    except UserError:  # found by all of them at the same point
        distributed.leave()
        raise
    except Exception as error:
        if distributed.is_loss(error):
            raise RunError(f"{_LOST} ({_first_line(error)})") from error
        raise


def leave(status: int) -> int:
    """The end of a command: what is left of a run of several processes is not waited for.

    After an error of one of them, an orderly end would wait for the others and then abort.
    """
    if is_watched() and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_watched() -> bool:
    """Whether this is the process that a parent of this module has started."""
    return os.environ.get(_PARENT) == str(os.getppid())


def _first_line(error: Exception) -> str:
    line = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    return line if len(line) <= 160 else line[:157] + "..."


def _end_with_parent() -> None:
    """A parent that is killed takes this process with it: nothing may go on computing unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if not is_watched():  # it was killed before
            os._exit(1)


def _watch(words: Sequence[str]) -> int:
    """Starts a process, passes SIGTERM and Ctrl-C on to it, and says what became of it."""
    environment = {
        **os.environ,
        _PARENT: str(os.getpid()),
        # JAX's own handler of SIGTERM would take the signal while no loop reads it.
        "JAX_ENABLE_PREEMPTION_SERVICE": "false",
    }
    # A group of its own: else a Ctrl-C on the terminal would come twice.
    process = subprocess.Popen(words, env=environment, process_group=0)

    def pass_on(signum: int, _: FrameType | None) -> None:
        process.send_signal(signum)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        status = process.wait()
    finally:
        process.kill()  # nothing if it has ended
        for number, handler in before.items():
            # None: a handler that was not set from Python and cannot be set back; the system's default is nearest.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if status >= 0:
        return status
    if -status == signal.SIGABRT:
        raise RunError(f"{_LOST} (JAX's runtime ended this process)")
    if -status in (signal.SIGTERM, signal.SIGINT):
        return 128 - status
    raise RunError(f"the process was ended by signal {-status}; the last checkpoint is kept")
