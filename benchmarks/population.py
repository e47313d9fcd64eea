"""N searches as one population against N single starts: wall time and memory, on the embedded digits.

Both sides begin with an empty compilation cache; the single searches after the first one find its programs, as a
user's would. A row: {case, members, seconds, seconds_singles, seconds_first, memory_gb, memory_single_gb, speedup}.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.comparisons import Options, Row
from benchmarks.race import ROOT, environment

_FLAGS = {
    "smoke": ["--cells=3", "--channels=4", "--space.ops=none,skip_connect,sep_conv_3x3", "--epochs=1"],
    "full": ["--epochs=6"],
}
_MEMBERS = {"smoke": (2,), "full": (2, 4, 8)}


class _Run(NamedTuple):
    seconds: float
    memory_gb: float


def _search(words: Sequence[str], scale: str, workdir: Path, cache: Path | None) -> _Run:
    command = [sys.executable, "-m", "prdarts_jax", "search", "--preset=digits", "--progress=off"]
    command += [f"--workdir={workdir}", *_FLAGS[scale], *words]
    settings = {**environment(cache), "TQDM_DISABLE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return _Run(time.perf_counter() - began, used.ru_maxrss / 2**20)


def rows(options: Options) -> Iterator[Row]:
    """A row a number of members."""
    scale = options.scale
    for members in _MEMBERS[scale]:
        name = f"digits-{members}"
        if not options.wants(name, 0, ""):
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            # At the smoke scale nothing is measured, and what is compiled already may be used.
            caches = [root / "cache-together", root / "cache-singles"] if scale == "full" else [None, None]
            together = _search([f"--population={members}"], scale, root / "together", caches[0])
            singles = [_search([f"--seed={i}"], scale, root / str(i), caches[1]) for i in range(members)]
        alone = sum(one.seconds for one in singles)
        yield {
            "case": name,
            "members": members,
            "seconds": round(together.seconds, 1),
            "seconds_singles": round(alone, 1),
            "seconds_first": round(singles[0].seconds, 1),
            "memory_gb": round(together.memory_gb, 2),
            "memory_single_gb": round(max(one.memory_gb for one in singles), 2),
            "speedup": round(alone / together.seconds, 2),
        }
