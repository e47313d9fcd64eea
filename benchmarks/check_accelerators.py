"""`make check-accelerators`: programs compiled for a GPU and a TPU that are not here, against aims and the rows before.

    python -m benchmarks.check_accelerators [--case paper|small] [--target T ...] [--write]

Each case is `prdarts check` with some flags. A row is refused where a CPU kernel is in the program, where the program
does not fit the device, where a figure exceeds its aim (`accelerators/aims.json`), and where it exceeds that of the
row before (`accelerators/rows.json`) by 5 %. --write keeps the rows, and writes the table of docs/accelerators.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import ROOT, facts

FOLDER = ROOT / "benchmarks" / "accelerators"
PAGE = ROOT / "docs" / "accelerators.md"
BEGIN, END = "<!-- rows: python -m benchmarks.check_accelerators --write -->", "<!-- end of rows -->"
Row = Mapping[str, Any]

# What is compiled: name -> (flags of `prdarts check`, targets).
CASES: Mapping[str, tuple[str, Sequence[str]]] = {
    "paper": ("--preset paper", ("cuda:h100:1", "tpu:v5e:4x4")),
    "small": (
        "--preset digits --cells 3 --channels 4 --space.nodes 2 --space.ops none,skip_connect,sep_conv_3x3 "
        "--batch-size 8 --program search",
        ("cuda:h100:1",),
    ),
}
KEY = ("case", "target", "program", "batch", "dtype")
# Figures that are the same on every machine. The seconds of the compiler are not: they have an aim alone.
COUNTED = (
    "temp_mib",
    "launches_per_step",
    "conditionals_per_step",
    "all_reduces_per_step",
    "bytes_per_step",
    "cycles_per_step",
)
WORSE = 1.05


def key(row: Row) -> tuple[Any, ...]:
    """What a row or an aim is of."""
    return tuple(row[name] for name in KEY)


def refusals(row: Row, aim: Row | None, before: Row | None) -> list[str]:
    """Why a row is refused; empty if it is not.

    >>> refusals({"cpu_kernels": 0, "fits": True, "launches_per_step": 9}, {"launches_per_step": 8}, None)
    ['launches_per_step: 9 is more than the aim, 8']
    """
    if "failure" in row:
        return [f"it is not compiled: {row['failure']}"]
    found = [f"{row['cpu_kernels']} CPU kernels are in the program"] if row["cpu_kernels"] else []
    if not row["fits"]:
        found.append(f"it does not fit: {row['memory_mib']:g} of {row['device_mib']} MiB")
    for name in ("compile_s", *COUNTED):
        value, most = row.get(name), (aim or {}).get(name)
        if value is not None and most is not None and value > most:
            found.append(f"{name}: {value:g} is more than the aim, {most:g}")
    for name in COUNTED:
        value, old = row.get(name), (before or {}).get(name)
        if value is not None and old is not None and value > WORSE * old:
            found.append(f"{name}: {value:g} is more than before, {old:g}")
    return found


def table(rows: Iterable[Row]) -> list[str]:
    """The measured rows as a table of Markdown."""
    header = ("case", "target", "program", "batch", "compiled, CPU s", "temporary MiB, of", "launches", "conditionals")
    header += ("all-reduces", "GB", "M cycles")
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        cycles = "-" if row["cycles_per_step"] is None else f"{row['cycles_per_step'] / 1e6:,.1f}"
        counts = [f"{row[name]:,}" for name in COUNTED[1:4]]
        cells = [
            *(f"`{row[name]}`" for name in ("case", "target")),
            row["program"],
            f"{row['batch']} {row['dtype']}",
            f"{row['compile_s']:.0f}",
            f"{row['temp_mib']:,.0f} of {row['device_mib']:,}",
            *counts,
            f"{row['bytes_per_step'] / 1e9:,.1f}",
            cycles,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def read(name: str) -> list[Row]:
    """The rows or aims of a file of the folder; none where it is not there."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def write(rows: Sequence[Row]) -> None:
    """Keeps rows, each in the place of the older one of the same, and writes the table of the page."""
    kept = {key(row): row for row in read("rows")} | {key(row): row for row in rows}
    lines = ",\n".join(json.dumps(row) for row in kept.values())
    (FOLDER / "rows.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text("\n".join([head + BEGIN, "", *table(kept.values()), "", END + tail]), encoding="utf-8")


def compiled(case: str, flags: str, target: str) -> list[Row]:
    """The rows of `prdarts check` for one target, in a process of its own: XLA ends the process of an error inside."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "prdarts_jax", "check", *flags.split(), "--target", target, "--json", str(out)]
        status = subprocess.run(command, cwd=ROOT).returncode
        rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    if not rows:
        raise SystemExit(f"prdarts check of {target} ended with status {status} and no row")
    return [{"case": case, **row} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_accelerators", description=__doc__)
    parser.add_argument("--case", choices=CASES, default="paper")
    parser.add_argument("--target", action="append", help="in place of those of the case")
    parser.add_argument("--write", action="store_true", help="keep the rows, in the place of those before")
    args = parser.parse_args(argv)
    flags, targets = CASES[args.case]
    aims, before = ({key(row): row for row in read(name)} for name in ("aims", "rows"))
    refused = False
    for target in args.target or targets:
        rows = compiled(args.case, flags, target)
        for row in rows:
            for why in refusals(row, aims.get(key(row)), None if args.write else before.get(key(row))):
                refused = True
                print(f"{args.case}, {target}, {row['program']}: {why}", file=sys.stderr)
        if args.write:
            write([row | {"commit": facts()["commit"]} for row in rows if "failure" not in row])
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
