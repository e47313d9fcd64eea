"""One self-contained HTML page about one or several workdirs: found cells, P over epochs, curves, figures, config.

The page holds everything it shows (inline SVG, no script, nothing fetched), so it can be mailed or kept beside a paper.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from prdarts_jax.errors import UserError
from prdarts_jax.report import plots
from prdarts_jax.report.data import Run, population, read
from prdarts_jax.report.sweep import FIGURES, label, settings, spread
from prdarts_jax.run.workdir import atomic_write_text
from prdarts_jax.space.genotype import CELLS

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
# (title, what y is, the fields, a name ending in / stands for all fields that start with it)
_PANELS = (
    ("Loss", "loss", ("train_loss", "val_loss", "test_loss")),
    ("Accuracy", "accuracy", ("train_accuracy", "val_accuracy", "test_accuracy")),
    ("Skip connections of the derived cells", "skips", ("normal_skips", "reduce_skips")),
    ("Depth of the derived cells", "depth", ("normal_depth", "reduce_depth")),
    ("Penalty terms", "value", ("penalty/",)),
    (_NORMS, "norm", ("gradient_norm/",)),
    ("Mean P of the operation groups", "P", ("mean_p/",)),
    ("Share of saturated gates", "share", ("gates/saturated",)),
    ("Temperature", "tau", ("progress/tau",)),
)

_BLOCKS = 8  # of a run's card; the style sheet says the same number
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1d2733; background: #f5f6f8;
  margin: 0 auto; padding: 1.5rem 2rem 4rem; }
body.one { max-width: 72rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; color: #37465a; }
p { margin: .3rem 0; } .note { color: #5b6876; font-size: .9rem; }
section.card { background: white; border: 1px solid #dde2e8; border-radius: 8px; padding: 1rem 1.3rem;
  min-width: 0; }
.runs { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(36rem, 1fr); gap: 0 1rem; overflow-x: auto;
  grid-template-rows: repeat(8, auto); }
.run { display: grid; grid-row: span 8; grid-template-rows: subgrid; }
.run > div { min-width: 0; } .run h2 { margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .6rem 1rem; }
figure { margin: .4rem 0; } svg { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem .8rem .22rem 0; border-bottom: 1px solid #e8ebef; vertical-align: top; }
td.n, th.n { text-align: right; } tr.mean td { font-weight: 600; background: #f0f5fb; }
td { overflow-wrap: anywhere; } .summary td { white-space: nowrap; } .summary th { vertical-align: bottom; }
.tag { font-size: .8rem; border-radius: 9px; padding: .05rem .55rem; background: #e3f1e6; color: #1f6032; }
.tag.open { background: #fdeed9; color: #8a4b00; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; color: #37465a; }
code { font-size: .88em; }
"""


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
        target.write_text(page, encoding="utf-8")
    except OSError as e:
        raise UserError(f"out: cannot write {str(target)!r}: {e.strerror}") from None
    return target


def _page(runs: Sequence[Run], swept: Sequence[str] = (), linked: Path | None = None) -> str:
    """The page; runs are linked, from a page in the folder `linked`, or shown in full."""
    groups = _groups(runs)
    title = f"{runs[0].path.name}: {runs[0].kind}" if len(runs) == 1 else f"{len(runs)} runs"
    ids = (f"f{i}-" for i in itertools.count())
    parts = [f"<h1>{_esc(title)}</h1>", _swept(runs, swept), _summary(groups), _differences(runs)]
    parts += [_over_seeds(name, group, ids) for name, group in groups.items()]
    if linked is not None:
        parts.append(f'<h2>Runs</h2><section class="card">{"".join(_link(run, linked) for run in runs)}</section>')
    else:
        limits = _shared_limits(runs)
        columns = "".join(_run(run, ids, limits) for run in runs)
        parts.append(f'<h2>{"Runs" if len(runs) > 1 else "Run"}</h2><div class="runs">{columns}</div>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(title)}</title><style>{_CSS}</style></head>\n"
        f'<body class="{"one" if len(runs) == 1 else "many"}">\n'
        + "\n".join(p for p in parts if p)
        + "\n</body></html>\n"
    )


# The parts that compare runs


def _swept(runs: Sequence[Run], swept: Sequence[str]) -> str:
    """The table of a sweep: a row a setting, mean and standard deviation over its seeds."""
    if not swept:
        return ""
    found = settings(runs, swept)
    fields = [f for f in FIGURES if any(f in setting.figures for setting in found)]
    lines = [
        _row([_esc(label(s)), f"{s.finished} of {s.members}", *(spread(s.figures.get(f)) for f in fields)], 1)
        for s in found
    ]
    table = f'<table class="summary">{_head(["setting", "seeds", *(f.replace("_", " ") for f in fields)], 1)}'
    note = '<p class="note">Last epoch of the finished members: mean ± sample standard deviation over the seeds.</p>'
    body = f'<div class="scroll">{table}{"".join(lines)}</table></div>{note}'
    return f'<h2>Sweep</h2><section class="card">{body}</section>'


def _link(run: Run, page: Path) -> str:
    """A line about a run, with its own report where there is one."""
    name = f"<code>{_esc(run.path.name)}</code>"
    if (run.path / "report.html").is_file():
        address = quote(Path(os.path.relpath(run.path / "report.html", page)).as_posix())
        name = f'<a href="{address}">{name}</a>'
    skips = "" if run.genotype is None else f", {run.genotype.skips('normal')} skips in the normal cell"
    return f"<p>{name} {_tag(run)} {_esc(_progress(run))} epochs{skips}</p>"


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by group, under the names A, B, ... in the order in which they are given."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.group, []).append(run)
    return {_letter(i): group for i, group in enumerate(by_key.values())}


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"{_letter(i // 26 - 1)}{_letter(i % 26)}"


def _summary(groups: Mapping[str, Sequence[Run]]) -> str:
    runs = [run for group in groups.values() for run in group]
    fields = [f for f in _HEADLINES if any(_number(run.last.get(f)) is not None for run in runs)]
    head = ["config", "workdir", "method", "seed", "epochs", *(f.replace("_", " ") for f in fields)]
    lines, sentences = [], []
    for name, group in groups.items():
        for run in group:
            state = "" if run.finished else " " + _tag(run)
            cells = [name, f"<code>{_esc(run.path)}</code>{state}", _esc(run.config.get("method.strategy", run.kind))]
            cells += [_esc(run.config.get("seed", "")), _esc(_progress(run)), *(_show(run.last.get(f)) for f in fields)]
            lines.append(_row(cells, first_number=3))
        done = [run for run in group if run.finished]
        if len(group) > 1:
            stats = [_mean_std([run.last.get(f) for run in done]) for f in fields]
            label = f"mean ± standard deviation, n = {len(done)}"
            lines.append(_row([name, _esc(label), "", "", "", *stats], first_number=3, css="mean"))
        accuracies = [a for run in done if (a := _number(run.last.get("test_accuracy"))) is not None]
        if accuracies:
            error = 100 * (1 - statistics.fmean(accuracies))
            spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
            sentences.append(
                f"<p>{name}: test error after the last epoch <b>{error:.2f}{spread} %</b> (n = {len(accuracies)}). "
                f"A side note: the best epoch's is {_best(done)}.</p>"
            )
    note = (
        '<p class="note">Figures of the last epoch; accuracies are shares of 1. The standard deviation is that of the '
        "sample (n - 1), over the finished runs whose configs differ in the seed alone.</p>"
    )
    table = f'<div class="scroll"><table class="summary">{_head(head, 3)}{"".join(lines)}</table></div>'
    return f'<h2>Summary</h2><section class="card">{"".join(sentences)}{table}{note}</section>'


def _best(runs: Sequence[Run]) -> str:
    best = [max((y for _, y in _points(run.epochs, "test_accuracy")), default=None) for run in runs]
    return ", ".join(f"{100 * (1 - a):.2f} %" for a in best if a is not None)


def _differences(runs: Sequence[Run]) -> str:
    """The config fields in which the runs differ."""
    if len(runs) < 2:
        return ""
    paths = list(dict.fromkeys(path for run in runs for path in run.config if not path.startswith("run.")))
    differing = [p for p in paths if len({json.dumps(run.config.get(p)) for run in runs}) > 1]
    if not differing:
        return ""
    lines = [_row([f"<code>{_esc(p)}</code>", *(_esc(_json(run.config.get(p))) for run in runs)]) for p in differing]
    table = f"<table>{_head(['field', *(str(run.path) for run in runs)])}{''.join(lines)}</table>"
    return f'<h2>What differs</h2><section class="card"><div class="scroll">{table}</div></section>'


def _over_seeds(name: str, group: Sequence[Run], ids: Iterable[str]) -> str:
    done = [run for run in group if run.finished and run.epochs]
    if len(done) < 2:
        return ""
    figures = []
    for title, ylabel, fields in _PANELS:
        bands = {}
        for f in _matching(fields, done[0].epochs):
            rows = plots.mean_and_std([_points(run.epochs, f) for run in done])
            if rows:
                bands[_short(f, fields)] = rows
        if bands:
            figures.append(_figure(plots.curves({}, ylabel, title=title, bands=bands), ids))
    return (
        f'<h2>Config {_esc(name)}: mean and standard deviation over {len(done)} seeds</h2><section class="card">'
        f'<div class="panels">{"".join(figures)}</div></section>'
    )


# The parts of one run


def _run(run: Run, ids: Iterable[str], limits: tuple[float, float]) -> str:
    """A card of _BLOCKS blocks, empty ones too: they are the rows of a grid that lines up the runs."""
    head = f"<h2><code>{_esc(run.path)}</code> {_tag(run)}</h2>"
    if not run.finished:
        head += f'<p class="note">This {_esc(run.kind)} has not ended: {_esc(_progress(run))} epochs so far.</p>'
    heatmaps = [_heatmap(run, cell, ids, limits) for cell in CELLS]
    blocks = [head, _cells_of(run, ids), _curves(run, ids), *heatmaps, _figures(run), _config(run), _versions(run)]
    assert len(blocks) == _BLOCKS
    return f'<section class="card run">{"".join(f"<div>{block}</div>" for block in blocks)}</section>'


def _cells_of(run: Run, ids: Iterable[str]) -> str:
    if run.genotype is None:
        return ""
    parts = ["<h3>Cells</h3>" if run.finished or run.kind == "train" else "<h3>Cells of the last epoch</h3>"]
    for cell in CELLS:
        drawing = plots.cell_diagram(run.genotype, cell, title=f"{cell} cell")
        facts = f"skip connections: {run.genotype.skips(cell)}, depth: {run.genotype.depth(cell)}"
        parts.append(f'{_figure(drawing, ids)}<p class="note">{facts}</p>')
    json_form = f"<p><code>{_esc(run.genotype.to_json())}</code></p>"
    return "".join(parts) + f"<details><summary>Genotype as JSON</summary>{json_form}</details>"


def _curves(run: Run, ids: Iterable[str]) -> str:
    if not run.epochs:
        return '<p class="note">No epoch has ended yet.</p>'
    panels = []
    for title, ylabel, fields in _PANELS:
        series = {_short(f, fields): p for f in _matching(fields, run.epochs) if (p := _points(run.epochs, f))}
        if series:
            panels.append(_figure(plots.curves(series, ylabel, title=title, log=title == _NORMS), ids))
    return f'<h3>Curves</h3><div class="panels">{"".join(panels)}</div>'


def _figures(run: Run) -> str:
    rows = {k: v for k, v in (dict(run.last) | dict(run.final)).items() if k != "kind"}
    lines = [_row([f"<code>{_esc(k)}</code>", _show(v)], first_number=1) for k, v in rows.items()]
    table = f"<table>{_head(['field', 'value'], 1)}{''.join(lines)}</table>"
    return f"<h3>Final figures</h3>{table}" if rows else ""


def _config(run: Run) -> str:
    lines = [
        _row([f"<code>{_esc(path)}</code>", _esc(_json(value)), _esc(run.sources.get(path, ""))])
        for path, value in run.config.items()
    ]
    table = f"<table>{_head(['field', 'value', 'source'])}{''.join(lines)}</table>"
    return f"<details><summary>Config</summary>{table}</details>"


def _versions(run: Run) -> str:
    lines = [_row([_esc(k), _esc(v)]) for k, v in run.versions.items()]
    lines += [_row(["device", _esc(device)]) for device in run.devices]
    lines += [_row(["processes", _esc(run.processes)])]
    return f"<h3>Versions and devices</h3><table>{''.join(lines)}</table>"


def _history(run: Run, cell: str) -> list[tuple[int, Any]]:
    """(epoch, [E, O]) of the rows that fit the workdir's edges and ops."""

    def fits(matrix: Any) -> bool:
        return (
            isinstance(matrix, list) and len(matrix) == len(run.edges) and all(len(r) == len(run.ops) for r in matrix)
        )

    return [(row["epoch"], row[cell]) for row in run.probabilities if fits(row.get(cell))] if run.edges else []


def _heatmap(run: Run, cell: str, ids: Iterable[str], limits: tuple[float, float]) -> str:
    history = _history(run, cell)
    if not history:
        return ""
    figure = plots.probability_heatmap(
        [matrix for _, matrix in history],
        run.edges,
        run.ops,
        epochs=[epoch for epoch, _ in history],
        limits=limits,
    )
    relative = _relative([matrix for _, matrix in history])
    widest = float(np.nanmax(np.abs(relative), initial=0.0)) or 1.0
    differences = plots.probability_heatmap(
        relative,
        run.edges,
        run.ops,
        epochs=[epoch for epoch, _ in history],
        limits=(-widest, widest),
        label="P - mean",
        colours="PuOr_r",
    )
    return (
        f"<h3>P over epochs, {cell} cell</h3>{_figure(figure, ids)}"
        f"<h3>P against its mean, {cell} cell</h3>"
        "<p>P minus the mean over all edges and operations of the same epoch: the temperature moves all P together, "
        f"this is what tells them apart.</p>{_figure(differences, ids)}"
    )


def _relative(history: Sequence[Any]) -> np.ndarray:
    """[T,E,O] minus the mean of each epoch."""
    values = np.asarray([[[np.nan if p is None else p for p in row] for row in m] for m in history], float)
    return values - np.nanmean(values, axis=(1, 2), keepdims=True)


def _shared_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """One colour scale for all heatmaps of the page, so that they can be compared."""
    values = [p for run in runs for cell in CELLS for _, rows in _history(run, cell) for row in rows for p in row]
    return plots.value_range([float("nan") if p is None else p for p in values])


# Small pieces


def _matching(fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    present = dict.fromkeys(key for row in rows for key in row)
    return [key for f in fields for key in present if key == f or (f.endswith("/") and key.startswith(f))]


def _short(field: str, fields: Sequence[str]) -> str:
    return next((field[len(f) :] for f in fields if f.endswith("/") and field.startswith(f)), field)


def _points(rows: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    return [(row["epoch"], y) for row in rows if (y := _number(row.get(field))) is not None]


def _number(value: Any) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def _mean_std(values: Sequence[Any]) -> str:
    numbers = [y for v in values if (y := _number(v)) is not None]
    if not numbers:
        return ""
    return _show(statistics.fmean(numbers)) + (f" ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else "")


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _esc(value)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _esc(value: Any) -> str:
    return html.escape(str(value))


def _progress(run: Run) -> str:
    planned = run.config.get("epochs")
    return f"{len(run.epochs)}" + (f" of {planned}" if planned is not None else "")


def _tag(run: Run) -> str:
    return '<span class="tag">finished</span>' if run.finished else '<span class="tag open">unfinished</span>'


def _head(names: Sequence[str], first_number: int = 99) -> str:
    return f"<tr>{_cells('th', [_esc(n) for n in names], first_number)}</tr>"


def _row(cells: Sequence[str], first_number: int = 99, css: str = "") -> str:
    """A table row of cells that are HTML already; those from first_number on are numbers and stand to the right."""
    return f'<tr class="{css}">{_cells("td", cells, first_number)}</tr>'


def _cells(tag: str, cells: Sequence[str], first_number: int) -> str:
    kinds = ("n" if i >= first_number else "t" for i in range(len(cells)))
    return "".join(f'<{tag} class="{kind}">{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))


def _figure(figure: Figure, ids: Iterable[str]) -> str:
    """Inline SVG whose ids are its own: on one page, matplotlib's would repeat from figure to figure."""
    prefix = next(iter(ids))
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", plots.to_svg(figure))
    return f"<figure>{svg}</figure>"
