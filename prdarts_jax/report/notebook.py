"""Results as a notebook shows them: a table of figures, and the cells."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prdarts_jax.space.genotype import Genotype

_FIGURE = re.compile(r"\w*(accuracy|loss|top5|error|skips|depth|parameters)(_std)?")  # of the many that are logged


def result_html(
    title: str, figures: Mapping[str, Any], *, genotype: Genotype | None = None, report: Path | None = None
) -> str:
    """One result as HTML: its numbers with four digits, the cells, and where the report lies.

    Args:
      title: what it is.
      figures: name -> value; numbers that say how good it is are shown.
      genotype: whose cells are drawn below.
      report: path of a page about it.

    >>> result_html("Search", {"val_accuracy": 0.87512, "kind": "final"}).count("<tr>")
    1
    """
    rows = [
        (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in figures.items()
        if isinstance(value, int | float) and _FIGURE.fullmatch(name)
    ]
    parts = [f"<p><b>{html.escape(title)}</b></p>", table(rows)]
    if genotype is not None:
        parts.append(genotype._repr_svg_())
    if report is not None:
        parts.append(f"<p>report: <code>{html.escape(str(report))}</code></p>")
    return "\n".join(part for part in parts if part)


def table(rows: Iterable[Iterable[str]]) -> str:
    """Rows of texts as an HTML table; nothing for none.

    >>> table([["a", "<b>"]])
    '<table>\\n<tr><td>a</td><td>&lt;b&gt;</td></tr>\\n</table>'
    """
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(["<table>", *lines, "</table>"]) if lines else ""
