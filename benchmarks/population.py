"""N searches as one population against N single starts: wall time and memory, on the embedded digits.

Both sides begin with an empty compilation cache; the single searches after the first one find its programs, as a
user's would. A row: {case, members, seconds, seconds_singles, seconds_first, compile_s, compile_singles_s, memory_gb,
memory_single_gb, speedup}; `compile_s` are tracing, compiling or loading, and the first steps.
"""

from __future__ import annotations

import os
import re
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
    compile_s: float  # to trace, to compile and to run the first steps, once for all members


def _search(words: Sequence[str], scale: str, workdir: Path, cache: Path | None) -> _Run:
    command = [sys.executable, "-m", "prdarts_jax", "search", "--preset=digits", "--progress=off"]
    command += [f"--workdir={workdir}", *_FLAGS[scale], *words]
    settings = {**environment(cache), "TQDM_DISABLE": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        compiling = [float(found) for found in re.findall(r"compiled and ran the first .* in ([0-9.]+) s", out.read())]
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return _Run(seconds, used.ru_maxrss / 2**20, sum(compiling))


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
            "compile_s": round(together.compile_s, 1),
            "compile_singles_s": round(sum(one.compile_s for one in singles), 1),
            "memory_gb": round(together.memory_gb, 2),
            "memory_single_gb": round(max(one.memory_gb for one in singles), 2),
            "speedup": round(alone / together.seconds, 2),
        }
