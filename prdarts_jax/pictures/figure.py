"""What all pictures share: matplotlib's own style and fonts, labels, and SVG that stands in a page.

Figures are built on matplotlib's object API, never on pyplot, so that a caller's figures, backend and style stay as
they are, and are not asked for.
The same input gives the same bytes (fixed SVG ids, no dates).
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Mapping
from typing import Any

from prdarts_jax.pictures.backend import no_backend

with no_backend():
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

FAMILY = "DejaVu Sans"  # comes with matplotlib, so that labels have the same width everywhere
FONT = 9.0  # points
TITLE: dict[str, Any] = {"fontsize": FONT + 1.5, "fontweight": "bold", "va": "top"}
# A matplotlibrc of the user may ask for fonts, or for a LaTeX, that are not there: what is drawn does not read it.
_WINDOWS = ("backend", "backend_fallback", "interactive")
STYLE: dict[Any, Any] = {name: v for name, v in matplotlib.rcParamsDefault.items() if name not in _WINDOWS}
STYLE |= {"svg.hashsalt": "prdarts_jax", "svg.fonttype": "none"}


def plain(text: str) -> str:
    """A name as it is: a dollar sign in it must not start a formula."""
    return text.replace("$", r"\$")


@functools.lru_cache(maxsize=256)
def label_width(text: str) -> float:
    """Inches that the box of a label takes."""
    prop = FontProperties(family=FAMILY)
    return TextPath((0, 0), plain(text), size=FONT, prop=prop).get_extents().width / 72 + 0.16


@matplotlib.rc_context(STYLE)
def to_svg(figure: Figure, *, hover: Mapping[str, str] | None = None) -> str:
    """The figure as an <svg> element for an HTML page: text stays text, no date, nothing fetched from elsewhere.

    Args:
      figure: of matplotlib.
      hover: gid of an artist -> text that a browser shows where the pointer is on it.

    >>> to_svg(Figure()).startswith("<svg")
    True
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    # Two images of equal content get equal ids, which a page must not have; nothing refers to them.
    svg = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", svg)
    # Where a reader has no DejaVu, Verdana has the same widths, and any other sans serif is narrower.
    svg = svg.replace(f"'{FAMILY}'", f"'{FAMILY}', Verdana, sans-serif")
    for gid, text in (hover or {}).items():
        group = f'<g id="{html.escape(gid)}">'
        svg = svg.replace(group, f"{group}<title>{html.escape(text)}</title>")
    return svg[svg.index("<svg") :]


def with_own_ids(svg: str, prefix: str) -> str:
    """SVG whose ids begin with a prefix: on one page, matplotlib's would repeat from figure to figure.

    >>> with_own_ids('<g id="a"/><use href="#a"/>', "f0-")
    '<g id="f0-a"/><use href="#f0-a"/>'
    """
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)


def stacked(pictures: list[str]) -> str:
    """Several <svg> elements, one below the other, as one."""
    sizes = [re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg) for svg in pictures]
    widths, heights = ([float(size[i]) for size in sizes if size] for i in (1, 2))
    parts = []
    for i, svg in enumerate(pictures):
        place = f'width="{widths[i]:g}" height="{heights[i]:g}" y="{sum(heights[:i]):g}"'
        parts.append(with_own_ids(re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', place, svg, count=1), f"p{i}-"))
    width, height = max(widths), sum(heights)
    size = f'width="{width:g}pt" height="{height:g}pt" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} version="1.1">\n{"".join(parts)}</svg>\n'
