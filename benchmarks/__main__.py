"""python -m benchmarks [--scale smoke|full] [--out DIR]: every benchmark, one JSON line a row."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from benchmarks import depthwise, search_step
from prdarts_jax.runs import versions

BENCHMARKS = {"depthwise": depthwise.rows, "search_step": search_step.rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--scale", choices=("smoke", "full"), default="full")
    parser.add_argument("--only", choices=tuple(BENCHMARKS), help="one benchmark (default: all)")
    parser.add_argument("--out", type=Path, help="folder for NAME.jsonl, appended to (default: print only)")
    args = parser.parse_args()
    facts = {"device": jax.devices()[0].device_kind, "versions": versions()}
    for name in [args.only] if args.only else BENCHMARKS:
        for row in BENCHMARKS[name](args.scale):
            line = json.dumps({"benchmark": name, "scale": args.scale, **row, **facts})
            print(line, flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                with (args.out / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
                    stream.write(line + "\n")


if __name__ == "__main__":
    main()
