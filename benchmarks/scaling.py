"""`bench_scaling` in a process of its own, since forced host devices are a matter of how a process starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.comparisons import Options, Row
from benchmarks.race import ROOT, environment


def rows(options: Options) -> Iterator[Row]:
    """The rows of `bench_scaling`: on CPU with forced devices, elsewhere with those that are there."""
    devices = 2 if options.scale == "smoke" else 4
    settings = environment(devices=devices)
    command = [sys.executable, "-m", "benchmarks.bench_scaling", "--scale", options.scale]
    done = subprocess.run(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        row = json.loads(line)
        yield {name: row[name] for name in row if name not in ("benchmark", "scale", "jax", "device")}
