"""One self-contained HTML page about one or several workdirs: found cells, P over epochs, curves, figures, config.

The page holds everything it shows (inline SVG, no script, nothing fetched), so it can be mailed or kept beside a paper.
What stands where is said by page.html.jinja, how it looks by page.css.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np

from prdarts_jax.errors import UserError, brief, warn
from prdarts_jax.pictures.cell_layout import state_name
from prdarts_jax.pictures.figure import with_own_ids
from prdarts_jax.report import plots
from prdarts_jax.report.data import Run, grouped, number, population, read
from prdarts_jax.report.sweep import average, figures_of, label, settings, spread
from prdarts_jax.report.theme import DARK, themed
from prdarts_jax.run.workdir import atomic_write_text
from prdarts_jax.space.genotype import CELL_INPUTS, CELLS

Drawing = Callable[[], str]  # SVG that is drawn where it stands

# The figures that are compared and averaged; a run shows those it has. Accuracies are shares of 1.
_HEADLINES = (
    "test_accuracy",
    "test_loss",
    "val_accuracy",
    "val_loss",
    "train_accuracy",
    "train_loss",
    "normal_skips",
    "reduce_skips",
    "normal_depth",
    "reduce_depth",
)
_NORMS = "Norms of the gradients"  # from 1e-12 to 10 in one search: drawn on a logarithmic scale
# (title, what y is, the fields; a name that ends in * stands for all fields that start with it)
_PANELS = (
    ("Loss", "loss", ("train_loss", "val_loss", "test_loss")),
    ("Accuracy", "accuracy", ("train_accuracy", "val_accuracy", "test_accuracy")),
    ("Skip connections of the derived cells", "skips", ("normal_skips", "reduce_skips")),
    ("Depth of the derived cells", "depth", ("normal_depth", "reduce_depth")),
    ("Penalty terms", "value", ("penalty/*",)),
    (_NORMS, "norm", ("gradient_norm/*",)),
    ("Mean P of the operation groups", "P", ("mean_p/*",)),
    (
        "Share of saturated gates",
        "share",
        ("gates/saturated", "gates/saturated_executed", "gates/edges_without_gradient"),
    ),
    ("Temperature", "tau", ("progress/tau",)),
)


def report(workdirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one HTML page about the workdirs: each run in full, and their mean and standard deviation over seeds.

    Runs whose configs differ in `seed` (and in how they were run) alone form a group; means are over a group's finished
    runs, with the sample standard deviation (n - 1). The folder of a population stands for its members: they are in a
    table by the swept values, and their pages are linked instead of shown.

    Args:
      workdirs: one or more workdirs of searches or trainings, finished or not, or folders of populations.
      out: the file to write; report.html in the workdir, or in the current directory if there are several.

    Returns:
      The path of the page.

    Raises:
      UserError: no workdir, one that is none, a damaged file, an `out` that cannot be written. Nothing is written then.
      RunError: the report of the workdir could not be written; an older one is left.
    """
    if not workdirs:
        raise UserError("workdir: none is given; allowed: one or more workdirs")
    populations = [population(w) for w in workdirs]
    paths = [path for w, p in zip(workdirs, populations, strict=True) for path in (p.folders if p else [Path(w)])]
    runs = [read(path) for path in paths]
    if not runs:
        raise UserError(f"workdir: no member of {str(workdirs[0])!r} has been started; allowed: start the population")
    whole = Path(workdirs[0]) if len(workdirs) == 1 else Path()
    target = Path(out) if out is not None else whole / "report.html"
    swept = dict.fromkeys(field for p in populations if p for field in p.swept)
    page = _page(runs, tuple(swept), None if not any(populations) else target.parent)
    if out is None:  # whole or not there: a run whose report is there is not given another
        atomic_write_text(target, page)
        return target
    try:
        target.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        raise UserError(f"out: cannot write {str(target)!r}: {e.strerror}") from None
    return target


def templates(failures: list[str]) -> jinja2.Environment:
    """The templates of this folder with their filters; what cannot be drawn on a page is added to `failures`."""
    figure_numbers = itertools.count()

    def svg(drawing: Drawing) -> str:
        """Inline SVG whose ids are its own and whose colours are those of the page."""
        prefix = f"f{next(figure_numbers)}-"
        try:
            return themed(with_own_ids(drawing(), prefix))
        except Exception as error:  # one picture is not the page
            failures.append(f"{type(error).__name__}: {brief(error)}")
            return f'<p class="note">This picture could not be drawn ({html.escape(failures[-1])}).</p>'

    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("prdarts_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {
        "changes": _changes,
        "label": label,
        "plain": _plain,
        "shown": _shown,
        "spread": spread,
        "svg": svg,
    }
    pages.globals["dark"] = DARK
    return pages


def _page(runs: Sequence[Run], swept: Sequence[str], linked: Path | None) -> str:
    """The page; runs are linked, from a page in the folder `linked`, or shown in full."""
    failures: list[str] = []
    pages = templates(failures)
    lettered = {_letter(i): group for i, group in enumerate(grouped(runs, lambda run: run.group))}
    by_setting = settings(runs, swept) if swept else []
    probabilities = [run.history(cell)[1].ravel() for run in runs for cell in CELLS]
    page = pages.get_template("page.html.jinja").render(
        title=f"{runs[0].path.name}: {runs[0].kind}" if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        groups=lettered,
        averaged={name: seeds for name, group in lettered.items() if len(seeds := _to_average(group)) > 1},
        settings=by_setting,
        sweep_figures=figures_of(by_setting),
        headlines=[f for f in _HEADLINES if any(number(run.last.get(f)) is not None for run in runs)],
        differences=_differences(runs),
        links=[] if linked is None else [(run, _address(run, linked)) for run in runs],
        cells=CELLS,
        limits=plots.value_range(np.concatenate(probabilities)),  # one colour scale: runs can be compared
        average=average,
        cell_diagram=_cell_diagram,
        heatmaps=_heatmaps,
        panels=_panels,
        parts=_parts,
        test_error=_test_error,
    )
    if failures:
        warn(f"{len(failures)} pictures of the report could not be drawn: {failures[0]}")
    return page


def _to_average(group: Sequence[Run]) -> list[Run]:
    return [run for run in group if run.finished and run.epochs]


def _parts(run: Run) -> dict[str, str]:
    """What a run's card shows: the id of a part, without the number of the run -> its heading."""
    whole = run.finished or run.kind == "train"
    parts = {
        "cells": ("Cells" if whole else "Cells of the last epoch", run.genotype),
        "curves": ("Curves", run.epochs),
        **{cell: (f"P, {cell} cell", run.history(cell)[0]) for cell in CELLS},
        "events": ("Stages and steps back", run.events),
        "figures": ("Final figures", run.figures),
        "config-of": ("Config", True),
        "versions": ("Versions and devices", True),
    }
    return {part: heading for part, (heading, shown) in parts.items() if shown}


def _letter(i: int) -> str:
    """A, B, ... Z, AA, ..."""
    return chr(ord("A") + i) if i < 26 else f"{_letter(i // 26 - 1)}{_letter(i % 26)}"


def _address(run: Run, folder: Path) -> str:
    """Where the run's own report stands, seen from a page in the folder; nothing if there is none."""
    page = run.path / "report.html"
    return quote(Path(os.path.relpath(page, folder)).as_posix()) if page.is_file() else ""


def _differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The config fields in which the runs differ, and each run's value."""
    paths = dict.fromkeys(path for run in runs for path in run.config if not path.startswith("run."))
    values = {path: [run.config.get(path) for run in runs] for path in paths}
    return {path: row for path, row in values.items() if len(set(map(json.dumps, row))) > 1}


def _test_error(runs: Sequence[Run]) -> tuple[str, list[str]] | None:
    """In percent: over the finished runs after the last epoch, and that of each one's best epoch."""
    tested = [run for run in runs if run.finished and number(run.last.get("test_accuracy")) is not None]
    accuracy = average(tested, "test_accuracy")
    if accuracy is None:
        return None
    mean, deviation = accuracy
    last = f"{100 * (1 - mean):.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")
    best = [max(y for _, y in run.points("test_accuracy")) for run in tested]
    return last, [f"{100 * (1 - accuracy):.2f} %" for accuracy in best]


def drawing(draw: Callable[..., Any], *args: Any, hover: Mapping[str, str] | None = None, **options: Any) -> Drawing:
    """A picture of plots.py that is drawn later."""
    return lambda: plots.to_svg(draw(*args, **options), hover=hover)


def _cell_diagram(run: Run, cell: str) -> Drawing:
    """A cell of a run; the pointer on an operation shows its P after the last epoch."""
    hover: dict[str, str] = {}
    epochs, history = run.history(cell)
    for node, pairs in enumerate(run.genotype.cell(cell)[0] if run.genotype else ()):
        for k, (op, source) in enumerate(pairs):
            text = f"{op} from {state_name(source).strip('$')} to node {node}"
            edge = [source, node + CELL_INPUTS]
            if epochs and edge in run.edges and op in run.ops:
                p = history[-1, list(run.edges).index(edge), list(run.ops).index(op)]
                text += f": P = {p:.3f} after epoch {epochs[-1] + 1}"
            hover |= {f"{part}-{node}-{k}-{op}-{source}": text for part in ("pair", "box")}
    return drawing(plots.cell_diagram, run.genotype, cell, title=f"{cell} cell", hover=hover)


def _panels(runs: Sequence[Run]) -> Iterator[Drawing]:
    """The curves of one run, or their mean and standard deviation over several."""
    for title, ylabel, patterns in _PANELS:
        curves = {name: [run.points(f) for run in runs] for name, f in _fields(patterns, runs[0].epochs).items()}
        if len(runs) == 1:
            lines = {name: points for name, (points,) in curves.items() if points}
            if lines:
                yield drawing(plots.curves, lines, ylabel, title=title, log=title == _NORMS)
        else:
            bands = {name: band for name, curve in curves.items() if (band := plots.mean_and_std(curve))}
            if bands:
                yield drawing(plots.curves, {}, ylabel, title=title, bands=bands)


def _fields(patterns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The fields of the rows that match: name, without what the pattern says anyway, -> field."""
    present = dict.fromkeys(field for row in rows for field in row)
    return {f.removeprefix(p.rstrip("*")) or f: f for p in patterns for f in present if fnmatchcase(f, p)}


def _heatmaps(run: Run, cell: str, limits: tuple[float, float]) -> Iterator[tuple[Drawing, Drawing]]:
    """P of a cell over the epochs, and P minus the mean of each epoch; nothing if there is no P."""
    epochs, history = run.history(cell)
    if not epochs:
        return
    relative = history - np.nanmean(history, axis=(1, 2), keepdims=True)
    widest = float(np.nanmax(np.abs(relative), initial=0.0)) or 1.0
    draw = functools.partial(drawing, plots.probability_heatmap, edges=run.edges, ops=run.ops, epochs=epochs)
    yield (
        draw(history, limits=limits),
        draw(relative, limits=(-widest, widest), label="P - mean", colours="PuOr_r"),
    )


def _shown(value: Any) -> str:
    """A figure with four digits, anything else as it is, and nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _changes(event: Mapping[str, Any]) -> str:
    """What an event of a strategy changes, in words; of lists of operations an edge the numbers alone.

    >>> _changes({"event": "restage", "epochs": 5, "space": {"cells": 11, "edge_ops": [[["none"], ["a", "b"]]]}})
    '5 epochs, cells = 11, 1 to 2 operations an edge'
    """
    words = [f"{event['epochs']} epochs"] if "epochs" in event else []
    fields = {**event.get("space", {}), **event.get("options", {}), **event.get("hyperparameters", {})}
    lists = fields.pop("edge_ops", [])
    words += [f"{name} = {_plain(value)}" for name, value in fields.items()]
    numbers = [len(names) for cell in lists for names in cell]
    return ", ".join(words + ([f"{min(numbers)} to {max(numbers)} operations an edge"] if numbers else []))


def _plain(value: Any) -> str:
    """A value of a config: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
