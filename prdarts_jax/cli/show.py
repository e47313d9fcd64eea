"""The commands that show or prepare something: derive, report, strategies, zoo, data."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prdarts_jax.cli.flags import Argument, command, existing_folder, shown
from prdarts_jax.config.places import expanded
from prdarts_jax.errors import RunError, UserError, unknown
from prdarts_jax.strategies import composition, registry

if TYPE_CHECKING:
    from prdarts_jax.space.genotype import Genotype


@command("derive", "The genotype of a search, as JSON.", Argument("workdir", metavar="WORKDIR"))
def derive(args: argparse.Namespace) -> int:
    """`prdarts derive`: the result of a search, or what it has reached so far."""
    workdir = existing_folder(args.workdir)
    from prdarts_jax.space.genotype import Genotype

    if (workdir / "genotype.json").is_file():
        print(Genotype.load(workdir).to_json())
        return 0
    log = workdir / "genotypes.jsonl"
    last: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError):  # the last line of a process that was killed while it wrote
            last = json.loads(line)
    if "genotype" not in last:
        raise UserError(f"WORKDIR: {str(workdir)!r} holds no genotype yet (genotype.json, genotypes.jsonl)")
    print(f"prdarts: note: the search is not finished; this is epoch {last.get('epoch')}", file=sys.stderr)
    print(Genotype.from_json(last["genotype"]).to_json())
    return 0


@command(
    "report",
    "One self-contained HTML report of one or several runs, or of a pipeline.",
    Argument("workdirs", metavar="WORKDIR", nargs="+"),
    Argument("--out", metavar="FILE", help="default: WORKDIR/report.html, or report.html"),
)
def report(args: argparse.Namespace) -> int:
    """`prdarts report`."""
    workdirs = [existing_folder(name) for name in args.workdirs]
    from prdarts_jax.report import page, pipeline

    if any(map(pipeline.is_pipeline, workdirs)):
        if len(workdirs) > 1:
            raise UserError("WORKDIR: a pipeline has a report of its own; allowed: its workdir alone")
        print(f"report: {pipeline.write(workdirs[0], args.out)}")
        return 0
    print(f"report: {page.report(workdirs, args.out)}")
    return 0


@command(
    "strategies",
    "The search methods, their options and published settings.",
    Argument("--json", action="store_true"),
)
def strategies(args: argparse.Namespace) -> int:
    """`prdarts strategies`."""
    rows = [dataclasses.asdict(row) | {"options": registry.options(row.name)} for row in registry.rows()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        options = ", ".join(f"{name}={shown(value)}" for name, value in row["options"].items())
        executed = f"executed an edge: {row['executed']}; forward-backward passes a step: {row['passes']}"
        lines = [
            row["summary"],
            row["reference"],
            f"competition: {row['competes']}; {executed}",
            f"transforms: {', '.join(row['made_of'])}" if row["made_of"] else "",
            f"not claimed: {row['not_claimed']}" if row["not_claimed"] else "",
            f"options (--method.NAME VALUE): {options}",
        ]
        print(f"{row['name']:<14}" + f"\n{'':<14}".join(filter(None, lines)) + "\n")
    print("Transforms of any method (--with NAME:option=value,option=value; several --with, the first one innermost):")
    for name in composition.TRANSFORMS:
        options = ", ".join(f"{option}={shown(value)}" for option, value in composition.options(name).items())
        print(f"  {name}: {(composition.transform(name).__doc__ or '').splitlines()[0]}\n{'':<14}{options}")
    return 0


@command(
    "zoo",
    "The published genotypes and their costs, or the cells of one.",
    Argument(
        "name", metavar="NAME", nargs="?", help="a published one | FILE | FILE:NAME of several | WORKDIR | the text"
    ),
    Argument("--json", action="store_true", help="as JSON"),
    Argument("--pictures", metavar="DIR", help="draw the cells of NAME into this folder, as .svg and .png"),
)
def zoo(args: argparse.Namespace) -> int:
    """`prdarts zoo`."""
    from prdarts_jax.space import genotype

    if args.name is not None:
        one = genotype.Genotype.load(args.name)
        written = _pictures(one, expanded(args.pictures, "--pictures")) if args.pictures else []
        lines = itertools.chain(_cells(one), _cost_lines(one, args.name), written)
        for line in [one.to_json()] if args.json else lines:
            print(line)
        return 0
    if args.pictures:
        raise UserError("--pictures: of which genotype? allowed: NAME and --pictures DIR")
    costs = {name: _costs(genotype.Genotype.named(name), name) for name in genotype.names()}
    rows = [{"name": name, **cost} for name, cost in costs.items()]
    print(json.dumps(rows, indent=1) if args.json else "\n".join(_zoo_table(costs)))
    return 0


def _costs(one: Genotype, name: str) -> dict[str, dict[str, int]]:
    """Parameters, these with the auxiliary head, and multiply-adds of a genotype, by data set.

    The auxiliary head is that of the program of a published genotype.
    """
    from prdarts_jax.network.counts import SCALES, has_second_norm, profile

    return {d: profile(one, d, auxiliary_second_norm=has_second_norm(name, d))._asdict() for d in SCALES}


def _cells(one: Genotype) -> Iterator[str]:
    """The cells of a genotype, a line a node."""
    from prdarts_jax.space.genotype import CELL_INPUTS, CELLS

    for kind in CELLS:
        nodes, concat = one.cell(kind)
        yield f"{kind}: {one.skips(kind)} skips, depth {one.depth(kind)}"
        exists = [True] * CELL_INPUTS
        for node, pairs in enumerate(nodes, start=CELL_INPUTS):
            yield f"  node {node} = {' + '.join(f'{op}({source})' for op, source in pairs) or '0'}"
            exists.append(any(exists[source] for _, source in pairs))
        yield f"  output = concat({', '.join(str(node) for node in concat if exists[node])})"


def _cost_lines(one: Genotype, name: str) -> Iterator[str]:
    from prdarts_jax.ops.primitives import PRIMITIVES

    try:
        one.validate_ops(PRIMITIVES)
    except UserError as error:
        yield f"costs: unknown ({error})"
        return
    for data, cost in _costs(one, name).items():
        params, with_aux, macs = (f"{count / 1e6:.2f} M" for count in cost.values())
        yield f"{data}: {params} parameters ({with_aux} with the auxiliary head), {macs} multiply-adds"


def _pictures(one: Genotype, folder: Path) -> list[str]:
    """Draws the cells of a genotype; the lines that name the pictures."""
    from prdarts_jax.report import plots
    from prdarts_jax.space.genotype import CELLS

    paths = [folder / f"{kind}.{suffix}" for kind in CELLS for suffix in ("svg", "png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            plots.save(plots.cell_diagram(one, path.stem), path)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from None
    return [f"written: {path}" for path in paths]


def _zoo_table(costs: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    """Millions of parameters, of these with the auxiliary head, and of multiply-adds, a row a genotype."""
    width = max(map(len, costs))
    yield "millions of: parameters (with the auxiliary head), multiply-adds"
    yield " ".join([" " * width, *(f"{scale:>23}" for scale in next(iter(costs.values())))])
    for name, cost in costs.items():
        millions = [[count / 1e6 for count in counts.values()] for counts in cost.values()]
        cells = [f"{params:6.2f} ({with_aux:6.2f}) {macs:7.2f}" for params, with_aux, macs in millions]
        yield " ".join([f"{name:<{width}}", *(f"{cell:>23}" for cell in cells)])


@command(
    "data",
    "prdarts data prepare: an official archive as array_record files.",
    Argument("action", choices=["prepare"]),
    Argument("name", metavar="NAME", help="cifar10 | cifar100"),
    Argument("--archive", metavar="FILE", required=True, help="the official binary archive"),
    Argument("--data-dir", "--data_dir", metavar="DIR", required=True, help="a TFDS data directory"),
)
def data(args: argparse.Namespace) -> int:
    """`prdarts data prepare`."""
    if args.name not in ("cifar10", "cifar100"):
        raise unknown("NAME", args.name, ("cifar10", "cifar100"))
    archive = expanded(args.archive, "--archive")
    if not archive.is_file():
        raise UserError(f"--archive: no file {args.archive!r}")
    from prdarts_jax.data import prepare

    print(f"written: {prepare.prepare(args.name, archive, Path(args.data_dir))}")
    return 0
