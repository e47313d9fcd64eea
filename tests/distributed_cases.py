"""Jobs of several processes on loopback; each process has a hard time limit of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT = 600  # seconds; a deadlock ends here, not the suite


class End(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str
    seconds: float  # after `wait` was called

    @property
    def line(self) -> str:
        """The last line of stderr: what a person reads."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Job(NamedTuple):
    """The processes of a run."""

    processes: Sequence[subprocess.Popen[bytes]]
    logs: Sequence[tuple[Path, Path]]

    def wait(self, limit: float = LIMIT) -> list[End]:
        """Waits for all of them; one that takes longer is killed, which its status shows."""
        began, ends = time.monotonic(), []
        for process, (out, err) in zip(self.processes, self.logs, strict=True):
            try:
                process.wait(max(0.1, limit - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            end = time.monotonic() - began
            ends.append(End(process.returncode, out.read_text(), err.read_text(), end))
        return ends

    def until(self, condition: Callable[[], bool], limit: float = LIMIT) -> None:
        """Waits for something that the running processes do."""
        end = time.monotonic() + limit
        while not condition():
            for process, logs in zip(self.processes, self.logs, strict=True):
                assert process.poll() is None, [log.read_text() for log in logs]
            assert time.monotonic() < end, "nothing happens"
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def flags(port: int, processes: int, process: int) -> list[str]:
    return [f"--coordinator=localhost:{port}", f"--num-processes={processes}", f"--process-id={process}"]


@contextlib.contextmanager
def job(
    commands: Sequence[Sequence[str]],
    folder: Path,
    *,
    devices: int,
    environments: Sequence[Mapping[str, str]] | None = None,
) -> Iterator[Job]:
    """Starts one process a command; none outlives the context."""
    folder.mkdir(parents=True, exist_ok=True)
    processes, logs = [], []
    for i, command in enumerate(commands):
        environment = {
            **os.environ,
            # What is compiled runs for seconds only: half the compile time counts for more.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
            " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
            " --xla_cpu_collective_call_terminate_timeout_seconds=120"
            " --xla_cpu_collective_call_warn_stuck_timeout_seconds=60",
            **(environments[i] if environments else {}),
        }
        out, err = folder / f"{i}.out", folder / f"{i}.err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            words = [sys.executable, "-m", "prdarts_jax", *command]
            processes.append(subprocess.Popen(words, stdout=stdout, stderr=stderr, env=environment))
        logs.append((out, err))
    try:
        yield Job(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def together(command: Sequence[str], processes: int) -> list[list[str]]:
    """The command lines of one run of several processes."""
    port = free_port()
    return [[*command, *flags(port, processes, process)] for process in range(processes)]


def run(command: Sequence[str], folder: Path, *, processes: int, devices: int, limit: float = LIMIT) -> list[End]:
    """A whole run."""
    with job(together(command, processes), folder, devices=devices) as started:
        return started.wait(limit)
