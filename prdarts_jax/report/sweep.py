"""Figures of several runs: mean and standard deviation over seeds, for all or by the values that were swept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prdarts_jax.report.data import Run, grouped, number

# What a sweep is read for; accuracies are shares of 1.
FIGURES = ("val_accuracy", "val_loss", "eval_accuracy", "normal_skips", "normal_depth", "reduce_skips", "reduce_depth")


class Setting(NamedTuple):
    """One combination of swept values, over its seeds."""

    values: Mapping[str, Any]  # dotted config path -> value, without the seed
    members: int
    finished: int
    figures: Mapping[str, tuple[float, float | None]]  # field -> (mean, sample standard deviation or None)


def settings(runs: Sequence[Run], swept: Sequence[str]) -> list[Setting]:
    """The settings of a sweep, in the order of the runs; figures are those of the last epoch of finished runs.

    Args:
      runs: the members.
      swept: dotted config paths, the seed among them or not.
    """
    paths = [path for path in swept if path != "seed"]
    by_setting = []
    for members in grouped(runs, lambda run: json.dumps([run.config.get(path) for path in paths])):
        values = {path: members[0].config.get(path) for path in paths}
        averages = {field: average(members, field) for field in FIGURES}
        figures = {field: figure for field, figure in averages.items() if figure is not None}
        by_setting.append(Setting(values, len(members), sum(run.finished for run in members), figures))
    return by_setting


def average(runs: Iterable[Run], field: str) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (n - 1) of a field of the last epoch, over the finished runs that have it.

    The standard deviation of one run is None, and so is the figure of none.
    """
    values = [y for run in runs if run.finished and (y := number(run.last.get(field))) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def label(setting: Setting) -> str:
    """The values of a setting in words.

    >>> label(Setting({"method.options.lambda1": 0.01}, 2, 2, {}))
    'lambda1=0.01'
    """
    named = (f"{path.removeprefix('method.options.')}={value}" for path, value in setting.values.items())
    return ", ".join(named) or "all seeds"


def spread(figure: tuple[float, float | None] | None) -> str:
    """Mean and standard deviation as a report writes them.

    >>> spread((0.87512, 0.0213)), spread((2.0, None)), spread(None)
    ('0.8751 ± 0.021', '2', '')
    """
    if figure is None:
        return ""
    mean, deviation = figure
    return f"{mean:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def figures_of(table: Sequence[Setting]) -> list[str]:
    """The FIGURES that at least one setting of a table has."""
    return [field for field in FIGURES if any(field in setting.figures for setting in table)]


def lines(table: Sequence[Setting]) -> list[str]:
    """The settings as an aligned table for a terminal; n = members that are finished."""
    fields = figures_of(table)
    rows = [["", "n", *(field.replace("_", " ") for field in fields)]]
    for setting in table:
        rows.append([label(setting), str(setting.finished), *(spread(setting.figures.get(f)) for f in fields)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
