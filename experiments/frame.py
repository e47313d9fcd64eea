"""What the experiments on the paper's claims share: units of work, rows that are kept, what is made from the rows.

An experiment is cut into units. A unit is a dict that says everything its outcome depends on; what was measured is
kept with it as one line of JSON, at once. Any start measures the units that no row has, so an interrupted experiment
goes on; rows of units that are no longer asked for are left out. Pictures and paragraphs are made from the rows alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.rows import commit, processor
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.report import plots
from prdarts_jax.run.workdir import atomic_write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
SCALES = ("smoke", "cpu", "paper")

Unit = Mapping[str, Any]
Row = Mapping[str, Any]  # a unit and what was measured, in one dict


class Experiment(NamedTuple):
    """A claim of the paper, and how it is measured.

    Attributes:
      name: of the file in experiments/.
      title: of its section in docs/results.md.
      claim: what the paper says, in a sentence or two.
      units: scale -> the units of work.
      measure: unit -> what was measured, JSON values.
      findings: rows -> lines of Markdown: what was found, whether the claim held, with spread.
      picture: rows -> the picture; or None.
      caption: what the picture shows.
    """

    name: str
    title: str
    claim: str
    units: Callable[[str], Sequence[Unit]]
    measure: Callable[[Unit], Mapping[str, Any]]
    findings: Callable[[Sequence[Row]], Sequence[str]]
    picture: Callable[[Sequence[Row]], Figure] | None = None
    caption: str = ""


# --- rows -------------------------------------------------------------------------------------------------------------


def _key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The records {"unit", "measured", ...} of a file, in its order; none if it is not there.

    Raises:
      UserError: a line is not such a record.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            dict(record["unit"]), dict(record["measured"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: no row of an experiment; allowed: JSON with unit and measured"
            ) from error
        found.append(record)
    return found


def rows(experiment: Experiment, scale: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured of the units of a scale, in their order: each unit with its outcome in one dict."""
    kept = {_key(record["unit"]): record for record in read(_file(experiment, folder))}
    wanted = [_key(unit) for unit in experiment.units(scale)]
    return [{**kept[key]["unit"], **kept[key]["measured"]} for key in wanted if key in kept]


def _file(experiment: Experiment, folder: Path) -> Path:
    return folder / f"{experiment.name}.jsonl"


def complete(experiment: Experiment, scale: str, folder: Path, say: Callable[[str], None] = print) -> None:
    """Measures the units of a scale that no row has; each row is kept as soon as it is there."""
    path = _file(experiment, folder)
    records = read(path)
    have = {_key(record["unit"]) for record in records}
    units = experiment.units(scale)
    for number, unit in enumerate(units, start=1):
        if _key(unit) in have:
            continue
        begun, cpu = time.perf_counter(), time.process_time()
        measured = experiment.measure(unit)
        took, worked = time.perf_counter() - begun, time.process_time() - cpu
        facts = {
            "seconds": round(took, 1),
            "cpu_seconds": round(worked, 1),
            "jax": jax.__version__,
            "device": _device(),
        }
        records.append(
            {
                "unit": dict(unit),
                "measured": dict(measured),
                "commit": commit("prdarts_jax", "experiments/*.py"),
                **facts,
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        say(f"{experiment.name}: {number} of {len(units)} ({took:.0f} s)")


def _device() -> str:
    first = jax.devices()[0]
    return processor() if first.platform == "cpu" else str(first.device_kind)


# --- numbers ----------------------------------------------------------------------------------------------------------


def short(value: Any) -> Any:
    """Numbers, and lists and dicts of them, with five significant digits: what a row keeps.

    >>> short({"a": [0.123456789, 2]})
    {'a': [0.12346, 2]}
    """
    if isinstance(value, Mapping):
        return {name: short(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [short(each) for each in value]
    if isinstance(value, np.ndarray | jax.Array):
        return short(np.asarray(value).tolist())
    return float(f"{value:.5g}") if isinstance(value, float) else value


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean of independent values and half the width of its 95 % confidence interval (Student's t; inf for one value).

    >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0])]
    [2.0, 2.484]
    """
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return float(x.mean()), math.inf
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def spread(values: Iterable[float], digits: int = 3) -> str:
    """`mean +- half the 95 % interval` as text.

    >>> spread([1.0, 2.0, 3.0], 1)
    '2.0 +- 2.5'
    """
    mean, half = interval(values)
    return f"{mean:.{digits}f} +- {half:.{digits}f}" if math.isfinite(half) else f"{mean:.{digits}f} (one value)"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation.

    >>> rank_correlation([1, 2, 3], [1, 4, 9])
    1.0
    """
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1].round(12))


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table and an empty line."""
    found = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return [*found, *(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


# --- pictures ---------------------------------------------------------------------------------------------------------


def panels(columns: int, lines: int = 1, *, width: float = 2.6, height: float = 2.3) -> tuple[Figure, list[Any]]:
    """A figure with a grid of axes, and the axes row by row; sizes of a panel in inches."""
    figure = FigureCanvasAgg(Figure(figsize=(width * columns, height * lines), layout="constrained")).figure
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_prop_cycle(color=plots.COLOURS)
        axes.grid(color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def draw(experiment: Experiment, found: Sequence[Row], path: Path) -> None:
    """The picture of rows, as .svg or .png."""
    assert experiment.picture is not None
    sizes = {"axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
    with matplotlib.rc_context({**plots.STYLE, **sizes}):
        plots.save(experiment.picture(found), path)


# --- the section of docs/results.md, and the command ------------------------------------------------------------------


def section(experiment: Experiment, scale: str, found: Sequence[Row], picture: str = "") -> list[str]:
    """The section of an experiment: the claim, what was measured at which scale, the findings, the picture."""
    lines = [f"### {experiment.title}", "", f"The paper: {experiment.claim}", ""]
    command = f"`python -m experiments.{experiment.name} --scale {scale}`"
    total = len(experiment.units(scale))
    if not found:
        return [*lines, f"Not measured yet ({command}).", ""]
    part = "" if len(found) == total else f"; **{len(found)} of its {total} units so far**"
    lines += [f"Measured at scale `{scale}` by {command}{part}.", "", *experiment.findings(found), ""]
    if experiment.picture is not None and picture:
        lines += [f"![{experiment.caption}]({picture})", ""]
    return lines


def main(experiment: Experiment, doc: str, argv: Sequence[str] | None = None) -> int:
    """The command of an experiment: measures what is missing at a scale, prints the section, returns the exit status.

    Rows of `cpu` and `paper` are kept in experiments/results, those of `smoke`, which mean nothing, in
    runs/experiments of the current folder; `--folder` keeps them elsewhere. `python -m experiments.paper` writes
    docs/results.md from them.
    """
    parser = argparse.ArgumentParser(
        experiment.name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--folder", type=Path, default=None, help="where the rows are kept")
    args = parser.parse_args(argv)
    folder = args.folder or default_folder(args.scale)
    try:
        complete(experiment, args.scale, folder, lambda line: print(line, flush=True))
        found = rows(experiment, args.scale, folder)
        picture = folder / f"{experiment.name}.svg"
        if experiment.picture is not None and args.scale == "smoke":
            draw(experiment, found, picture)
        print("\n".join(section(experiment, args.scale, found, picture.name)))
    except (UserError, RunError) as error:
        print(f"{experiment.name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def default_folder(scale: str) -> Path:
    """Where the rows of a scale are kept."""
    return Path("runs") / "experiments" if scale == "smoke" else RESULTS
