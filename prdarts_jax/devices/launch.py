"""One process of several, started by a launcher on each host, and watched by a parent of its own.

The parent exists because JAX's runtime aborts a process whose peers are lost, wherever it is: while it loads, compiles
or waits. Nothing in that process can turn this into a line and an exit status; its parent can.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from prdarts_jax.errors import RunError, UserError, brief

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what asks a run to save and stop
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
    from prdarts_jax.devices import processes

    processes.initialize(found.coordinator, found.processes, found.process)
    try:
        with contextlib.ExitStack() as quiet:
            if not processes.is_first():  # one process speaks for all; errors are each one's own
                nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
            status = work()
        processes.leave()
        return status
    except UserError:  # found by all of them at the same point
        processes.leave()
        raise
    except Exception as error:
        if processes.is_loss(error):
            raise RunError(f"{_LOST} ({brief(error)})") from error
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


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A block in which SIGTERM, SIGINT and SIGHUP call `handler`. Python allows that in the main thread alone.

    SIGHUP, the end of a terminal, stays ignored where it is: nohup has asked for that.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, former in before.items():
            # None: a handler that was not set from Python and cannot be set back; the system's default is nearest.
            signal.signal(number, signal.SIG_DFL if former is None else former)


def _end_with_parent() -> None:
    """A parent that is killed takes this process with it: nothing may go on computing unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if not is_watched():  # it was killed before
            os._exit(1)


def _watch(words: Sequence[str]) -> int:
    """Starts a process, passes SIGTERM, SIGHUP and Ctrl-C on to it, and says what became of it."""
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

    with handling(pass_on):
        try:
            status = process.wait()
        finally:
            process.kill()  # nothing if it has ended
    if status >= 0:
        return status
    if -status == signal.SIGABRT:
        raise RunError(f"{_LOST} (JAX's runtime ended this process)")
    if -status in STOPS:
        return 128 - status
    raise RunError(f"the process was ended by signal {-status}; the last checkpoint is kept")
