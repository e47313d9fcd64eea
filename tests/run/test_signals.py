"""Stop requests, with real signals sent to a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from prdarts_jax.run.signals import StopRequest

LOOP = """
    import sys, time
    from prdarts_jax.run.signals import StopRequest

    print("import", "jax" in sys.modules, flush=True)
    with StopRequest() as stop:
        print("ready", flush=True)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if not stop:
                continue
            if sys.argv[1] == "once":
                print("saved", flush=True)
                sys.exit(128 + stop.signum)
            print("seen", flush=True)
            time.sleep(30)
"""


def start(mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(LOOP), mode]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert [child.stdout.readline(), child.stdout.readline()] == ["import False\n", "ready\n"]
    return child


@pytest.fixture
def hangups() -> Iterator[None]:
    """Signals of a closed terminal arrive, in a suite that was itself started to outlive one too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_one_signal_lets_the_loop_finish(signum: signal.Signals, status: int) -> None:
    with start("once") as child:
        os.kill(child.pid, signum)
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (status, "saved\n", "")


def test_the_second_ctrl_c_ends_at_once() -> None:
    with start("twice") as child:
        os.kill(child.pid, signal.SIGINT)
        assert child.stdout is not None and child.stdout.readline() == "seen\n"
        os.kill(child.pid, signal.SIGTERM)  # neither counts as the second Ctrl-C nor replaces the first signal
        os.kill(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT and "KeyboardInterrupt" in err


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop and stop.signum is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.signum == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread_it_does_nothing() -> None:
    seen = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
