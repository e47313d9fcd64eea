"""A process with one library, which runs steps when it is told to: `python -m benchmarks.worker`.

One JSON object a line comes in and goes out. {"make": "module:factory", "args": {...}} builds a side, runs its first
step and answers with the seconds of each stage; {"steps": n} answers with the seconds a step; {"memory": true} with the
peak resident memory in GB. The end of the input ends it. While one worker steps, the others sleep in read().
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import Any, TextIO


def peak_gb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(lines: TextIO, out: TextIO) -> None:
    """Answers every line until there are none."""
    run: Any = None
    for line in lines:
        said = json.loads(line)
        answer: dict[str, float] = {}
        if "make" in said:
            module, _, factory = said["make"].partition(":")
            began = time.perf_counter()
            make = getattr(importlib.import_module(module), factory)
            imported = time.perf_counter()
            run, answer = make(**said["args"])
            built = time.perf_counter()
            run(1)
            answer |= {"import_s": imported - began, "first_step_s": time.perf_counter() - built}
        elif "steps" in said:
            began = time.perf_counter()
            run(said["steps"])
            answer = {"seconds": (time.perf_counter() - began) / said["steps"]}
        elif "memory" in said:
            answer = {"memory_gb": peak_gb()}
        print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    # What libraries print must not get among the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, out)


if __name__ == "__main__":
    main()
