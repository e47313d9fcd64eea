"""Two libraries in turn on one machine, each in its own process: the machine's drift meets both sides alike."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
QUIET = 0.05  # of the cores: what others may take while a pair of blocks runs


class Side(NamedTuple):
    """A side of a comparison: the factory its process builds steps with."""

    make: str  # module:factory
    args: Mapping[str, Any]


class Plan(NamedTuple):
    """How long a comparison takes."""

    pairs: int  # blocks of each side, in turn
    steps: int  # a block
    patience: int = 1  # pairs that are run at most to find quiet ones, in multiples of `pairs`
    alternate: bool = False  # whether the peer goes first in every second pair


def cache_folder() -> Path:
    """Where the benchmarks keep compiled programs between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prdarts_jax" / "bench"


def environment(cache: Path | None = None, devices: int = 1) -> dict[str, str]:
    """The environment of a worker: our code first, compiled programs kept in `cache`; several devices are forced."""
    forced: dict[str, str] = {}
    if devices > 1:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        forced = {"XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {
        **os.environ,
        **forced,
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": str(cache or cache_folder()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


class Worker:
    """A process that runs one side's steps when told to.

    `root`: the checkout whose worker it is; `settings`: of its environment, over those of `environment`.
    """

    def __init__(
        self,
        side: Side,
        cache: Path | None = None,
        devices: int = 1,
        root: Path = ROOT,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.worker"]
        pipe = subprocess.PIPE
        whole = {**environment(cache, devices), **(settings or {})}
        self.process = subprocess.Popen(command, cwd=root, env=whole, stdin=pipe, stdout=pipe, text=True)
        self.stages = self.ask({"make": side.make, "args": dict(side.args)})

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, what: Mapping[str, Any]) -> dict[str, float]:
        """Its answer; RuntimeError if it died."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(what), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}: {what}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Seconds a step over a block of steps."""
        return self.ask({"steps": steps})["seconds"]

    def cpu(self) -> float:
        """Seconds of processor time it has used (Linux; else 0)."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Peak resident memory so far, GB."""
        return self.ask({"memory": True})["memory_gb"]


def compare(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Speedup of ours over the peer, pair by pair: median, minimum and maximum.

    >>> compare([1.0, 2.0, 1.0], [2.0, 2.0, 3.0])["speedup"]
    2.0
    """
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    return {
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "seconds_ours": float(f"{statistics.median(ours):.4g}"),
        "seconds_peer": float(f"{statistics.median(peer):.4g}"),
    }


def _busy() -> float:
    """Seconds all cores together have computed since the machine started (Linux; else 0)."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system = (int(field) for field in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


class Others:
    """How much of the machine other processes took while a comparison ran: a busy machine slows sides unequally."""

    def __init__(self, *workers: Worker) -> None:
        self.workers = workers
        self.start = time.perf_counter(), self._foreign()

    def _foreign(self) -> float:
        return _busy() - sum(worker.cpu() for worker in self.workers)

    def share(self) -> float:
        """Cores' worth of other work, as a share of the cores."""
        seconds = (time.perf_counter() - self.start[0]) * (os.cpu_count() or 1)
        return round(max(0.0, (self._foreign() - self.start[1]) / seconds), 3)


class Blocks(NamedTuple):
    """What two processes took, and their peak memory."""

    pairs: list[tuple[float, float, float]]  # share of the others, seconds of ours, of the peer
    memory: tuple[float, float]  # GB


def measure(ours: Worker, peer: Worker, plan: Plan) -> Blocks:
    """Blocks of steps of both, in turn; each block meets its neighbour. The first block of each does not count.

    A pair during which other processes took more than QUIET of the cores is run again while the plan's patience
    lasts; then the quietest count. What is kept does not depend on how long anything took.
    """

    def block(peer_first: bool) -> tuple[float, float]:
        if peer_first:
            theirs = peer.seconds(plan.steps)
            return ours.seconds(plan.steps), theirs
        return ours.seconds(plan.steps), peer.seconds(plan.steps)

    pairs: list[tuple[float, float, float]] = []
    ours.seconds(plan.steps), peer.seconds(plan.steps)
    while sum(pair[0] <= QUIET for pair in pairs) < plan.pairs and len(pairs) < plan.patience * plan.pairs:
        others = Others(ours, peer)
        mine, theirs = block(plan.alternate and len(pairs) % 2 == 1)
        pairs.append((others.share(), mine, theirs))
    quietest = sorted(pairs, key=lambda pair: max(pair[0], QUIET))[: plan.pairs]
    return Blocks(quietest, (ours.memory(), peer.memory()))


def summary(found: Sequence[Blocks]) -> dict[str, float]:
    """The numbers of a row from the blocks of one or several pairs of processes."""
    pairs = [pair for blocks in found for pair in blocks.pairs]
    mine, theirs = (max(blocks.memory[side] for blocks in found) for side in (0, 1))
    return {
        **compare([mine for _, mine, _ in pairs], [theirs for _, _, theirs in pairs]),
        "memory_ratio": round(mine / theirs, 3),
        "memory_ours_gb": round(mine, 2),
        "memory_peer_gb": round(theirs, 2),
        "others": max(share for share, _, _ in pairs),
    }


def has_torch() -> bool:
    """Whether the peers in PyTorch can run."""
    return importlib.util.find_spec("torch") is not None
