"""The commands that show or prepare something: derive, report, strategies, zoo, data."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from prdarts_jax.cli.flags import Parser, shown
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.strategies import registry


def derive(words: list[str]) -> int:
    """`prdarts derive`: the genotype of a search, as JSON."""
    parser = Parser("prdarts derive", description="The genotype of a search, as JSON.")
    parser.add_argument("workdir", metavar="WORKDIR")
    workdir = Path(parser.parse_args(words).workdir)
    if not workdir.is_dir():
        raise UserError(f"WORKDIR: no directory {str(workdir)!r}")
    from prdarts_jax.space.genotype import Genotype

    if (workdir / "genotype.json").is_file():
        print(Genotype.load(workdir).to_json())
        return 0
    log = workdir / "genotypes.jsonl"
    last: dict[str, Any] | None = None
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            last = json.loads(line)
        except ValueError:  # the last line of a process that was killed while it wrote
            continue
    if last is None or "genotype" not in last:
        raise UserError(f"WORKDIR: {str(workdir)!r} holds no genotype yet (genotype.json, genotypes.jsonl)")
    print(f"prdarts: note: the search is not finished; this is epoch {last.get('epoch')}", file=sys.stderr)
    print(Genotype.from_json(last["genotype"]).to_json())
    return 0


def report(words: list[str]) -> int:
    """`prdarts report`: one page about one or several workdirs."""
    parser = Parser("prdarts report", description="One self-contained HTML report of one or several searches.")
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+")
    parser.add_argument("--out", metavar="FILE", help="default: WORKDIR/report.html, or report.html")
    args = parser.parse_args(words)
    workdirs = [Path(name) for name in args.workdirs]
    for workdir in workdirs:
        if not workdir.is_dir():
            raise UserError(f"WORKDIR: no directory {str(workdir)!r}")
    from prdarts_jax.report import page as report_page

    print(f"report: {report_page.report(workdirs, args.out)}")
    return 0


def strategies(words: list[str]) -> int:
    """`prdarts strategies`: the search methods, their options and published settings."""
    parser = Parser("prdarts strategies", description="The search methods, their options and published settings.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(words)
    rows = [dataclasses.asdict(row) | {"options": registry.options(row.name)} for row in registry.rows()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['name']:<12}{row['summary']}\n{'':<12}{row['reference']}")
        options = ", ".join(f"{name}={shown(value)}" for name, value in row["options"].items())
        print(f"{'':<12}options (--method.NAME VALUE): {options}\n")
    return 0


def zoo(words: list[str]) -> int:
    """`prdarts zoo`: the published genotypes and their costs, or the cells of one."""
    parser = Parser("prdarts zoo", description="The published genotypes and their costs, or the cells of one.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a published one, a file or a workdir")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--pictures", metavar="DIR", help="draw the cells of NAME into this folder, as .svg and .png")
    args = parser.parse_args(words)
    from prdarts_jax.ops.primitives import PRIMITIVES
    from prdarts_jax.space import genotype

    def costs(found: genotype.Genotype) -> dict[str, dict[str, int]]:
        from prdarts_jax.network import counts

        return {data: counts.profile(found, data)._asdict() for data in counts.SCALES}

    if args.name is None:
        if args.pictures:
            raise UserError("--pictures: of which genotype? allowed: NAME and --pictures DIR")
        names = genotype.names()
        rows = [{"name": name, **costs(genotype.Genotype.named(name))} for name in names]
        print(json.dumps(rows, indent=1) if args.json else "\n".join(_zoo_table(rows)))
        return 0
    found = genotype.Genotype.load(args.name)
    pictures = _pictures(found, Path(args.pictures)) if args.pictures else []
    if args.json:
        print(found.to_json())
        return 0
    for kind in genotype.CELLS:
        nodes, concat = found.cell(kind)
        print(f"{kind}: {found.skips(kind)} skips, depth {found.depth(kind)}")
        for node, pairs in enumerate(nodes, start=genotype.CELL_INPUTS):
            print(f"  node {node} = {' + '.join(f'{op}({source})' for op, source in pairs) or '0'}")
        exists = [True] * genotype.CELL_INPUTS
        for pairs in nodes:
            exists.append(any(exists[source] for _, source in pairs))
        there = [n for n in concat if exists[n]]
        print(f"  output = concat({', '.join(map(str, there))})")
    try:
        found.validate_ops(PRIMITIVES)
    except UserError as error:
        print(f"costs: unknown ({error})")
        found_costs = {}
    else:
        found_costs = costs(found)
    for data, cost in found_costs.items():
        params, with_aux, macs = (f"{count / 1e6:.2f} M" for count in cost.values())
        print(f"{data}: {params} parameters ({with_aux} with the auxiliary head), {macs} multiply-adds")
    for path in pictures:
        print(f"written: {path}")
    return 0


def _pictures(found: Any, folder: Path) -> list[Path]:
    """The cells of a genotype as pictures."""
    from prdarts_jax.errors import RunError
    from prdarts_jax.report import plots
    from prdarts_jax.space import genotype

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in genotype.CELLS:
            for suffix in ("svg", "png"):
                written.append(folder / f"{kind}.{suffix}")
                plots.save(plots.cell_diagram(found, kind), written[-1])
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from None
    return written


def _zoo_table(rows: list[dict[str, Any]]) -> list[str]:
    """Millions of parameters, of these with the auxiliary head, and of multiply-adds, a row a genotype."""
    scales = [name for name in rows[0] if name != "name"]
    width = max(len(row["name"]) for row in rows)
    lines = [
        "millions of: parameters (with the auxiliary head), multiply-adds",
        " ".join([" " * width, *(f"{scale:>23}" for scale in scales)]),
    ]
    for row in rows:
        costs = [[count / 1e6 for count in row[scale].values()] for scale in scales]
        cells = [f"{params:6.2f} ({with_aux:6.2f}) {macs:7.2f}" for params, with_aux, macs in costs]
        lines.append(" ".join([f"{row['name']:<{width}}", *(f"{cell:>23}" for cell in cells)]))
    return lines


def data(words: list[str]) -> int:
    """`prdarts data prepare`: an official archive as array_record files."""
    parser = Parser("prdarts data", description="prdarts data prepare: an official archive as array_record files.")
    parser.add_argument("action", choices=["prepare"])
    parser.add_argument("name", metavar="NAME", help="cifar10 | cifar100")
    parser.add_argument("--archive", metavar="FILE", required=True, help="the official binary archive")
    parser.add_argument("--data-dir", "--data_dir", metavar="DIR", required=True, help="a TFDS data directory")
    args = parser.parse_args(words)
    if args.name not in ("cifar10", "cifar100"):
        raise unknown("NAME", args.name, ("cifar10", "cifar100"))
    if not Path(args.archive).is_file():
        raise UserError(f"--archive: no file {args.archive!r}")
    from prdarts_jax.data import prepare

    print(f"written: {prepare.prepare(args.name, Path(args.archive), Path(args.data_dir))}")
    return 0
