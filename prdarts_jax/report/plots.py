"""Pictures of a search: cells, activation probabilities over epochs, curves.

Figures are built on matplotlib's object API, never on pyplot, so that a caller's figures, backend and style stay as
they are, and are not asked for.
The same input gives the same bytes (fixed SVG ids, no dates).
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prdarts_jax.errors import UserError
from prdarts_jax.report.backend import no_backend
from prdarts_jax.report.cell_layout import Box, Layout, Line, lay_out, state_name
from prdarts_jax.run.workdir import atomic_write_bytes, atomic_write_text
from prdarts_jax.space.genotype import Genotype

with no_backend():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Curve
    from matplotlib.textpath import TextPath
    from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette: told apart with any colour vision, and the op's name stands on every edge anyway.
FAMILY_COLOURS = {
    "sep": "#0072B2",
    "dil": "#D55E00",
    "pool": "#009E73",
    "skip": "#CC79A7",
    "other": "#444444",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b", "#9b4f96")
_FAMILY = "DejaVu Sans"  # comes with matplotlib, so that labels have the same width everywhere
# A matplotlibrc of the user may ask for fonts, or for a LaTeX, that are not there: what is drawn does not read it.
_WINDOWS = ("backend", "backend_fallback", "interactive")
STYLE: dict[Any, Any] = {name: v for name, v in matplotlib.rcParamsDefault.items() if name not in _WINDOWS}
STYLE |= {"svg.hashsalt": "prdarts_jax", "svg.fonttype": "none"}

_FONT = 9.0  # points
_TITLE: dict[str, Any] = {"fontsize": _FONT + 1.5, "fontweight": "bold", "va": "top"}


def op_family(op: str) -> str:
    """The family that gives an op its colour: sep, dil, pool, skip or other.

    >>> op_family("dil_conv_5x5"), op_family("max_pool_3x3"), op_family("conv_7x1_1x7")
    ('dil', 'pool', 'other')
    """
    first, separator, _ = op.partition("_")
    if separator and first in ("sep", "dil", "skip"):
        return first
    return "pool" if "pool" in op else "other"


@matplotlib.rc_context(STYLE)
def cell_diagram(genotype: Genotype, cell: str = "normal", *, title: str | None = None) -> Figure:
    """Draw one cell as a graph that runs from left to right.

    c_{k-2} and c_{k-1} stand on the left and the output c_k on the right; the intermediate nodes are numbered from 0 as
    in the papers and stand in the column of their depth. Every (op, input) pair is one line with the name of its op in
    a box (gid `pair-NODE-POSITION-OP-INPUT`); thin grey lines lead the nodes of the concat to the output. A node
    without a pair is dashed and grey, and so is a `none` line.

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
    nodes, concat = genotype.cell(cell)
    layout = lay_out(nodes, concat, label_width=_label_width)
    drawn = [box for box in layout.boxes if box.kind != "lane"]
    low = min(box.y - box.height / 2 for box in layout.boxes) - 0.08
    high = max(box.y + box.height / 2 for box in layout.boxes) + (0.34 if title else 0.08)
    wide = max(box.x + box.width / 2 for box in drawn) + 0.1
    figure = FigureCanvasAgg(Figure(figsize=(wide + 0.1, high - low))).figure
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.1, wide), ylim=(low, high))
    axes.axis("off")
    if title:
        axes.text(0, high - 0.06, title, family=_FAMILY, color="#222222", **_TITLE)
    for line in layout.lines:
        _draw_line(axes, layout, line)
    for box in drawn:
        _draw_box(axes, box)
    return figure


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
    cell_w, cell_h, gap_w, gap_h = 1.3, max(0.6, 0.118 * len(ops)), 0.16, 0.3
    left, top, bottom = 0.12 + max(_label_width(op) for op in ops) * 0.75, 0.62 if title else 0.3, 0.42
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
        axes.set_title(f"{state_name(source)} to {state_name(target)}", fontsize=7.5, pad=3)
        # Ops stand beside the first image of a row alone, epochs below the last one of a column.
        first = source == min(s for s, t in pairs if t == target)
        last = target == max(t for s, t in pairs if s == source)
        axes.set_yticks(range(len(ops)), [_plain(op) if first else "" for op in ops], fontsize=6.5)
        axes.set_xticks(ends, [str(n) if last else "" for n in ends], fontsize=6.5)
        if last:
            axes.set_xlabel("epoch", fontsize=6.5, labelpad=-4 if len(ends) > 1 else 0)
        axes.tick_params(length=2, pad=2)
    bar_h = min(cell_h, 1.2)
    box = ((width - 0.62) / width, (height - top - bar_h) / height, 0.12 / width, bar_h / height)
    bar = figure.colorbar(axes.images[0], cax=figure.add_axes(box))
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.ax.set_title(label, fontsize=7.5, pad=4)
    if title:
        figure.text(0.1 / width, 1 - 0.1 / height, title, **_TITLE)
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
        axes.plot(x, y, label=_plain(name), lw=1.4, marker="o" if len(x) < 3 else None, ms=3)
    for name, rows in (bands or {}).items():
        x, mean, std = np.array(rows, dtype=float).reshape(-1, 3).T
        [line] = axes.plot(x, mean, label=_plain(name), lw=1.6, marker="o" if len(x) < 3 else None, ms=3)
        axes.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, lw=0)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    if title:
        axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
    if len(axes.lines) > 1:
        figure.legend(loc="outside lower left", ncols=2 if len(axes.lines) > 4 else 4, fontsize=7, frameon=False)
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
def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element for an HTML page: text stays text, no date, nothing fetched from elsewhere.

    >>> to_svg(curves({}, "loss")).startswith("<svg")
    True
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    # Two images of equal content get equal ids, which a page must not have; nothing refers to them.
    svg = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", svg)
    # Where a reader has no DejaVu, Verdana has the same widths, and any other sans serif is narrower.
    svg = svg.replace(f"'{_FAMILY}'", f"'{_FAMILY}', Verdana, sans-serif")
    return svg[svg.index("<svg") :]


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


def _plain(text: str) -> str:
    """A name as it is: a dollar sign in it must not start a formula."""
    return text.replace("$", r"\$")


@functools.lru_cache(maxsize=256)
def _label_width(text: str) -> float:
    prop = FontProperties(family=_FAMILY)
    return TextPath((0, 0), _plain(text), size=_FONT, prop=prop).get_extents().width / 72 + 0.16


def _op_colour(op: str | None) -> str:
    if op is None:
        return "#9c9c9c"
    return "#a0a0a0" if op == "none" else FAMILY_COLOURS[op_family(op)]


def _draw_line(axes: Any, layout: Layout, line: Line) -> None:
    boxes = [layout.boxes[i] for i in line.path]
    heights = [line.leaves, *(box.y for box in boxes[1:-1]), line.arrives]
    head, tip = 0.09, boxes[-1].x - boxes[-1].width / 2
    vertices = []
    for (left, y), (right, height) in itertools.pairwise(zip(boxes, heights, strict=True)):
        start = left.x + left.width / 2
        end = right.x - right.width / 2 - (head if right is boxes[-1] else 0)
        vertices += [(start, y), ((start + end) / 2, y), ((start + end) / 2, height), (end, height)]
    codes = [Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4] * (len(boxes) - 1)
    curve = Curve(vertices, [Curve.MOVETO, *codes[1:]])
    order = 1.0 if line.op is None else 2.0
    colour = _op_colour(line.op)
    # A white rim under each line shows at a crossing which line goes on where.
    axes.add_patch(PathPatch(curve, fill=False, lw=4.0, ec="white", zorder=order, capstyle="butt"))
    width, dashes = (1.0 if line.op is None else 1.5), ((0, (4, 2)) if line.faint else "-")
    axes.add_patch(PathPatch(curve, fill=False, lw=width, ec=colour, ls=dashes, zorder=order + 0.1, capstyle="butt"))
    arrow = [(tip, heights[-1]), (tip - head, heights[-1] + 0.04), (tip - head, heights[-1] - 0.04)]
    axes.add_patch(Polygon(arrow, closed=True, fc=colour, ec="none", zorder=order + 0.2))


def _draw_box(axes: Any, box: Box) -> None:
    state = box.kind == "state"
    ink = "#8a8a8a" if box.faint else "#222222" if state else _op_colour(box.text)
    axes.add_patch(
        FancyBboxPatch(
            (box.x - box.width / 2, box.y - box.height / 2),
            box.width,
            box.height,
            boxstyle=f"round,pad=0,rounding_size={0.1 if state else 0.07}",
            fc=("#f4f4f4" if box.faint else "#e4ecf5") if state else "white",
            ec="#5b6b7f" if state and not box.faint else ink,
            ls=(0, (3, 2)) if box.faint else "-",
            lw=1.1,
            zorder=4,
        )
    )
    axes.text(
        box.x,
        box.y,
        box.text,
        gid=box.gid,
        zorder=5,
        parse_math=state,
        fontsize=_FONT + 1.5 if state else _FONT,
        family=_FAMILY,
        color=ink,
        ha="center",
        va="center_baseline",
    )
