"""Figures of a population by the values that were swept: mean and standard deviation over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prdarts_jax.report.data import Run

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
    fields = [path for path in swept if path != "seed"]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.config.get(path) for path in fields]), []).append(run)
    return [_setting(group, fields) for group in groups.values()]


def _setting(group: Sequence[Run], fields: Sequence[str]) -> Setting:
    done = [run for run in group if run.finished]
    figures = {}
    for field in FIGURES:
        found = [float(run.last[field]) for run in done if isinstance(run.last.get(field), int | float)]
        if found:
            figures[field] = (statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)
    return Setting({path: group[0].config.get(path) for path in fields}, len(group), len(done), figures)


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


def lines(found: Sequence[Setting]) -> list[str]:
    """The settings as an aligned table for a terminal; n = members that are finished."""
    fields = [field for field in FIGURES if any(field in setting.figures for setting in found)]
    rows = [["", "n", *(field.replace("_", " ") for field in fields)]]
    for setting in found:
        rows.append([label(setting), str(setting.finished), *(spread(setting.figures.get(f)) for f in fields)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
