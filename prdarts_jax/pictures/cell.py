"""The picture of a cell: a graph that runs from left to right."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from prdarts_jax.pictures.backend import no_backend
from prdarts_jax.pictures.cell_layout import Box, Layout, Line, lay_out
from prdarts_jax.pictures.figure import FAMILY, FONT, STYLE, TITLE, label_width, stacked, to_svg

with no_backend():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Curve

Nodes = Sequence[Sequence[tuple[str, int]]]  # per node its (op, input state) pairs

# Okabe and Ito's palette: told apart with any colour vision, and the op's name stands on every edge anyway.
FAMILY_COLOURS = {
    "sep": "#0072B2",
    "dil": "#D55E00",
    "pool": "#009E73",
    "skip": "#CC79A7",
    "other": "#444444",
}


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
def cell_figure(nodes: Nodes, concat: Sequence[int], *, title: str | None = None) -> Figure:
    """Draw one cell as a graph that runs from left to right.

    c_{k-2} and c_{k-1} stand on the left and the output c_k on the right; the intermediate nodes are numbered from 0 as
    in the papers and stand in the column of their depth. Every (op, input) pair is one line with the name of its op in
    a box (gid `pair-NODE-POSITION-OP-INPUT`, that of the box begins with `box`); thin grey lines lead the nodes of the
    concat to the output. A node without a pair is dashed and grey, and so is a `none` line.

    Args:
      nodes: per node its (op, input) pairs, as in Genotype.
      concat: the states that go to the output.
      title: text above the cell.

    >>> figure = cell_figure([[("skip_connect", 0), ("none", 1)]], [2])
    >>> [t.get_text() for t in figure.axes[0].texts if (t.get_gid() or "").startswith("pair-")]
    ['skip_connect', 'none']
    """
    layout = lay_out(nodes, concat, label_width=label_width)
    drawn = [box for box in layout.boxes if box.kind != "lane"]
    low = min(box.y - box.height / 2 for box in layout.boxes) - 0.08
    high = max(box.y + box.height / 2 for box in layout.boxes) + (0.34 if title else 0.08)
    wide = max(box.x + box.width / 2 for box in drawn) + 0.1
    figure = FigureCanvasAgg(Figure(figsize=(wide + 0.1, high - low))).figure
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.1, wide), ylim=(low, high))
    axes.axis("off")
    if title:
        axes.text(0, high - 0.06, title, family=FAMILY, color="#222222", **TITLE)
    for line in layout.lines:
        _draw_line(axes, layout, line)
    for box in drawn:
        _draw_box(axes, box)
    return figure


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
            gid=None if state else box.gid.replace("pair", "box", 1),
        )
    )
    axes.text(
        box.x,
        box.y,
        box.text,
        gid=box.gid,
        zorder=5,
        parse_math=state,
        fontsize=FONT + 1.5 if state else FONT,
        family=FAMILY,
        color=ink,
        ha="center",
        va="center_baseline",
    )


def svg(cells: Mapping[str, tuple[Nodes, Sequence[int]]]) -> str:
    """Cells by their names as one <svg> element, one below the other.

    >>> svg({"normal": ([[("skip_connect", 0)]], [2])}).count("skip_connect</text>")
    1
    """
    return stacked([to_svg(cell_figure(*cell, title=f"{name} cell")) for name, cell in cells.items()])
