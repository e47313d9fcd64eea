"""python -m benchmarks [NAMES...] --scale smoke|full [--out DIR]: one JSON line a row. `report` writes the page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_gpu, bench_growth, comparisons, overhead, population, report, rows, scaling, startup
from benchmarks.comparisons import Options

QUICK = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")  # half the compile time


def _gpu(options: Options) -> Iterator[dict[str, Any]]:
    """On the CPU and at the smoke scale only: that `make bench-gpu` would run. A failure stops the checks."""
    if options.scale == "full":
        options.note("gpu: make bench-gpu measures it")
        return
    for row in bench_gpu.rows("cpu", "smoke", 7200, options.note):
        if row.get("ok") is False or "failure" in row:
            raise SystemExit(f"gpu: {row['section']}: {row['what']}: {row.get('failure', row['value'])}")
        yield row


BENCHMARKS: dict[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "depthwise": comparisons.depthwise,
    "search_step": comparisons.search_step,
    "train_step": comparisons.train_step,
    "startup": startup.rows,
    "overhead": overhead.rows,
    "growth": bench_growth.rows,
    "population": population.rows,
    "scaling": scaling.rows,
    "gpu": _gpu,
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--scale", choices=("smoke", "full"), default="smoke")
    parser.add_argument("--out", type=Path, help="folder of NAME.jsonl, where rows replace older ones (default: print)")
    parser.add_argument("--cases", type=_names, default=(), help="these cases only, comma-separated")
    parser.add_argument("--batch", type=_names, default=(), help="these batch sizes only")
    parser.add_argument("--peers", type=_names, default=(), help="these peers only")
    parser.add_argument(
        "--patience", type=int, help="pairs of blocks run to find quiet ones, at most so many times (1; 4 with --out)"
    )
    args = parser.parse_args(argv)
    if args.names == ["report"]:
        report.write()
        return 0
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"NAME: no benchmark {name!r}; allowed: {', '.join(BENCHMARKS)}")
    if args.out and args.scale == "smoke" and args.out.resolve() == rows.RESULTS:
        parser.error("--out: rows of the smoke scale measure nothing and stay out of benchmarks/results")

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.scale == "smoke":  # nothing is measured, so nothing need be fast but the compiler
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK]).strip()
    options = Options(
        args.scale, args.cases, tuple(map(int, args.batch)), args.peers, note, args.patience or (4 if args.out else 1)
    )
    for name in args.names or BENCHMARKS:
        facts = rows.facts()
        for row in BENCHMARKS[name](options):
            row = {**facts, **row}
            print(json.dumps({"benchmark": name, **row}), flush=True)
            if args.out:
                rows.keep(args.out / f"{name}.jsonl", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
