"""From the start of a process to the end of the first step, on images in memory: cold, and with compiled programs kept.

A row a case and cache ("cold" | "warm"): seconds of each stage, their total, and the peak memory with the compiler's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import cases
from benchmarks.comparisons import Options, Row
from benchmarks.race import ROOT, environment


def _given(options: Options) -> dict[str, dict[str, object]]:
    given: dict[str, dict[str, object]] = {}
    for name, case in cases.SEARCH[options.scale].items():
        if case.method == "prdarts":
            given[name] = {"kind": "search", **case._asdict(), "ops": ",".join(case.ops)}
    for name, train in cases.TRAIN[options.scale].items() if options.scale == "full" else ():
        given[name] = {"kind": "train", **train._asdict()}
    return {name: {"images": 128 if options.scale == "smoke" else 2048, **one} for name, one in given.items()}


def rows(options: Options) -> Iterator[Row]:
    """Each case cold and warm."""
    for name, given in _given(options).items():
        batch = int(str(given["batch"]))
        if not options.wants(name, batch, ""):
            continue
        with tempfile.TemporaryDirectory() as folder:
            # At the smoke scale nothing is measured, so the cold start may find what earlier runs compiled.
            cache = None if options.scale == "smoke" else Path(folder)
            for state in ("cold", "warm") if cache else ("warm",):
                yield {"case": name, "batch": batch, "cache": state, **_start(given, cache)}


def _start(given: dict[str, object], cache: Path | None) -> dict[str, float]:
    """`cache`: of compiled programs, and of our kernels too."""
    settings = environment(cache) | ({} if cache is None else {"XDG_CACHE_HOME": str(cache)})
    words = json.dumps({**given, "began": time.time()})
    command = [sys.executable, "-m", "benchmarks.startup_worker", words]
    done = subprocess.run(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
