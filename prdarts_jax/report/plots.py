"""Pictures of a search: cells, activation probabilities over epochs, curves."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prdarts_jax.errors import UserError
from prdarts_jax.pictures.backend import no_backend
from prdarts_jax.pictures.cell import FAMILY_COLOURS, cell_figure, op_family
from prdarts_jax.pictures.cell_layout import state_name
from prdarts_jax.pictures.figure import STYLE, TITLE, label_width, plain, to_svg
from prdarts_jax.run.workdir import atomic_write_bytes, atomic_write_text
from prdarts_jax.space.genotype import Genotype

with no_backend():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = [
    "COLOURS",
    "FAMILY_COLOURS",
    "STYLE",
    "cell_diagram",
    "curves",
    "mean_and_std",
    "op_family",
    "probability_heatmap",
    "save",
    "to_svg",
    "value_range",
]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b", "#9b4f96")
_TEXT, _SMALL = 9.5, 8.5  # points: of curves, which a page shows at nine tenths; of heatmaps, shown as they are
_ROW = 0.145  # inches of an operation in a heatmap: its name is as high


def cell_diagram(genotype: Genotype, cell: str = "normal", *, title: str | None = None) -> Figure:
    """Draw one cell of a genotype (`prdarts_jax.pictures.cell.cell_figure`).

    Args:
      genotype: the architecture.
      cell: 'normal' or 'reduce'.
      title: text above the cell.

    Raises:
      UserError: no such cell.

    >>> figure = cell_diagram(Genotype.named("DARTS_V2"), "normal")
    >>> sum((t.get_gid() or "").startswith("pair-") for t in figure.axes[0].texts)
    8
    """
    return cell_figure(*genotype.cell(cell), title=title)


@matplotlib.rc_context(STYLE)
def probability_heatmap(
    history: Any,
    edges: Sequence[Sequence[int]],
    ops: Sequence[str],
    *,
    epochs: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    label: str = "P",
    colours: str = "viridis",
) -> Figure:
    """The probability of every op on every edge over the epochs: one small image an edge, ops down, epochs across.

    The images stand in a triangle: a row for each node, a column for each of its inputs. All share one colour scale.

    Args:
      history: [T, E, O], the probabilities after each of T epochs; NaN is drawn grey.
      edges: E pairs (input state, state), numbered as in Genotype.
      ops: O names.
      epochs: T epoch numbers; 0 .. T-1 if left out.
      limits: the ends of the colour scale; the range of the values, widened to multiples of 0.1, if left out.
      title: text above.
      label: text at the colour scale.
      colours: name of a matplotlib colour map.

    Raises:
      UserError: the three shapes do not fit, or there is no epoch.

    >>> figure = probability_heatmap(np.full((3, 2, 4), 0.5), [(0, 2), (1, 2)], ["none", "skip_connect", "a", "b"])
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['$c_{k-2}$ to 0', '$c_{k-1}$ to 0']
    """
    values = np.asarray(history, dtype=float)
    if values.ndim != 3 or values.shape[1:] != (len(edges), len(ops)) or not len(values) or not len(edges):
        raise UserError(f"history: shape {values.shape}; allowed: [epochs >= 1, {len(edges)} edges, {len(ops)} ops]")
    numbers = list(range(len(values))) if epochs is None else [int(e) for e in epochs]
    ends = sorted({numbers[0], numbers[-1]})
    extent = (numbers[0] - 0.5, numbers[-1] + 0.5, len(ops) - 0.5, -0.5)
    low, high = limits or value_range(values)
    pairs = [(int(source), int(target)) for source, target in edges]
    sources, targets = sorted({source for source, _ in pairs}), sorted({target for _, target in pairs})
    cell_w, cell_h, gap_w, gap_h = 1.4, max(0.7, _ROW * len(ops)), 0.18, 0.36
    left, top, bottom = 0.12 + max(label_width(op) for op in ops), 0.66 if title else 0.34, 0.46
    # The colour scale stands in the corner that the triangle leaves free; beside a single row or column there is none.
    right = 0.15 if len(targets) > 1 and len(sources) > 2 else 1.0
    width = left + len(sources) * (cell_w + gap_w) + right
    height = top + len(targets) * (cell_h + gap_h) - gap_h + bottom
    figure = FigureCanvasAgg(Figure(figsize=(width, height))).figure
    colour_map = matplotlib.colormaps[colours].with_extremes(bad="#dddddd")
    for e, (source, target) in enumerate(pairs):
        x = left + sources.index(source) * (cell_w + gap_w)
        y = height - top - cell_h - targets.index(target) * (cell_h + gap_h)
        axes = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
        axes.imshow(
            values[:, e].T, aspect="auto", extent=extent, vmin=low, vmax=high, cmap=colour_map, interpolation="nearest"
        )
        axes.set_title(f"{state_name(source)} to {state_name(target)}", fontsize=_SMALL, pad=3)
        # Ops stand beside the first image of a row alone, epochs below the last one of a column.
        first = source == min(s for s, t in pairs if t == target)
        last = target == max(t for s, t in pairs if s == source)
        axes.set_yticks(range(len(ops)), [plain(op) if first else "" for op in ops], fontsize=_SMALL)
        axes.set_xticks(ends, [str(n) if last else "" for n in ends], fontsize=_SMALL)
        if last:
            axes.set_xlabel("epoch", fontsize=_SMALL, labelpad=-6 if len(ends) > 1 else 0)
        axes.tick_params(length=2, pad=2)
    bar_h = min(cell_h, 1.2)
    box = ((width - 0.62) / width, (height - top - bar_h) / height, 0.12 / width, bar_h / height)
    bar = figure.colorbar(axes.images[0], cax=figure.add_axes(box))
    bar.ax.tick_params(labelsize=_SMALL, length=2)
    bar.ax.set_title(label, fontsize=_SMALL, pad=5)
    if title:
        figure.text(0.1 / width, 1 - 0.1 / height, title, **TITLE)
    return figure


def value_range(values: Any) -> tuple[float, float]:
    """The range of the finite values, widened to multiples of 0.1 (a colour scale with round ends).

    >>> value_range([0.12, 0.31])
    (0.1, 0.4)
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.floor(finite.min() * 10 + 1e-9) / 10, np.ceil(finite.max() * 10 - 1e-9) / 10
    return float(low), float(high if high > low else low + 0.1)


@matplotlib.rc_context(STYLE)
def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    ylabel: str,
    *,
    xlabel: str = "epoch",
    title: str | None = None,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    log: bool = False,
) -> Figure:
    """Lines over epochs, and bands of mean and standard deviation over seeds.

    Args:
      series: name -> points (x, y); one line each.
      ylabel: what y is.
      xlabel: what x is.
      title: text above.
      bands: name -> (x, mean, standard deviation), as mean_and_std makes them; one line with a shaded band each.
      log: a logarithmic y axis; values of zero and below are left out.

    >>> len(curves({"train": [(0, 2.3), (1, 1.9)]}, "loss").axes[0].lines)
    1
    """
    figure = FigureCanvasAgg(Figure(figsize=(4.4, 2.7), layout="constrained")).figure
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COLOURS)
    for name, points in series.items():
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
        axes.plot(x, y, label=plain(name), lw=1.4, marker="o" if len(x) < 3 else None, ms=3)
    for name, rows in (bands or {}).items():
        x, mean, std = np.array(rows, dtype=float).reshape(-1, 3).T
        [line] = axes.plot(x, mean, label=plain(name), lw=1.6, marker="o" if len(x) < 3 else None, ms=3)
        axes.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, lw=0)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel(xlabel, fontsize=_TEXT)
    axes.set_ylabel(ylabel, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    if title:
        axes.set_title(title, fontsize=_TEXT + 1, loc="left", fontweight="bold")
    if len(axes.lines) > 1:
        longest = max(len(str(line.get_label())) for line in axes.lines)
        columns = max(1, int(72 * figure.get_figwidth() / (_TEXT * (6 + 0.62 * longest))))  # 6 em: the sample, and room
        figure.legend(loc="outside lower left", ncols=columns, fontsize=_TEXT, frameon=False)
    return figure


def mean_and_std(runs: Iterable[Iterable[tuple[float, float]]]) -> list[tuple[float, float, float]]:
    """(x, mean, sample standard deviation) over runs, at the x that all runs have.

        std = sqrt(sum (y - mean)^2 / (n - 1)),   0 for a single run

    >>> mean_and_std([[(0, 1.0), (1, 3.0)], [(0, 3.0)]])
    [(0, 2.0, 1.4142135623730951)]
    """
    tables = [dict(run) for run in runs]
    shared = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    columns = [(x, [t[x] for t in tables]) for x in shared]
    return [(x, statistics.fmean(ys), statistics.stdev(ys) if len(ys) > 1 else 0.0) for x, ys in columns]


@matplotlib.rc_context(STYLE)
def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as .png (160 dots an inch) or .svg, the same bytes for the same figure.

    Raises:
      UserError: another suffix.
      RunError: it could not be written; an older picture is left.

    >>> save(curves({}, "loss"), "curve.gif")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: path: 'curve.gif' is no picture this library writes; allowed: .png | .svg
    """
    target = Path(path)
    if target.suffix == ".svg":
        atomic_write_text(target, '<?xml version="1.0" encoding="utf-8"?>\n' + to_svg(figure))
    elif target.suffix == ".png":
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        atomic_write_bytes(target, buffer.getvalue())
    else:
        raise UserError(f"path: {str(path)!r} is no picture this library writes; allowed: .png | .svg")
