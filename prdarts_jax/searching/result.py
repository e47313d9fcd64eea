"""What a search ends with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prdarts_jax.space.genotype import Genotype


class SearchResult(NamedTuple):
    """How a search ended; a notebook shows its figures and cells.

    Attributes:
      status: "finished" | "already-finished" | "interrupted" | "time-limit".
      genotype: the result, or None if the search is not finished.
      workdir: where everything lies.
      report: path of report.html, or None.
      metrics: the last epoch's row.
      signum: the signal that interrupted it.
    """

    status: str
    genotype: Genotype | None
    workdir: Path
    report: Path | None = None
    metrics: Mapping[str, Any] = {}
    signum: int | None = None

    def _repr_html_(self) -> str:
        from prdarts_jax.report.notebook import result_html

        title = f"Search: {self.status} ({self.workdir.name})"
        return result_html(title, self.metrics, genotype=self.genotype, report=self.report)
