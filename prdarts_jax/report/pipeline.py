"""The page and the figures of a pipeline: searches, choice, full trainings, and what each stage has cost."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdarts_jax.config import schema
from prdarts_jax.errors import UserError, warn
from prdarts_jax.network.counts import Scale, profile_at
from prdarts_jax.report import plots
from prdarts_jax.report.data import Run, number, read
from prdarts_jax.report.page import drawing, templates
from prdarts_jax.run.workdir import atomic_write_text
from prdarts_jax.space.genotype import CELLS, Genotype

CHOICE, RESULT = "choice.json", "result.json"
STAGES: Mapping[str, str] = {"search": "search", "short": "short training", "full": "full training"}
# What each stage is read for: field -> where it is, "evaluation" or "metrics".
_FIGURES: Mapping[str, Mapping[str, str]] = {
    "search": {
        "val_accuracy": "metrics",
        "val_loss": "metrics",
        "normal_skips": "metrics",
        "normal_depth": "metrics",
        "reduce_skips": "metrics",
        "reduce_depth": "metrics",
    },
    "short": {"accuracy": "evaluation", "loss": "evaluation", "train_accuracy": "metrics"},
    "full": {
        "accuracy": "evaluation",
        "loss": "evaluation",
        "top5": "evaluation",
        "calibration_error": "evaluation",
        "train_accuracy": "metrics",
    },
}


def is_pipeline(workdir: str | Path) -> bool:
    """Whether a folder is that of a pipeline, finished or not."""
    try:
        return json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8"))["kind"] == "pipeline"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def evaluation(folder: Path) -> dict[str, Any]:
    """The evaluation.json of a training; empty where there is none, or half of one."""
    try:
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def summary(workdir: Path) -> dict[str, Any]:
    """What result.json holds: for each stage its runs, their mean and sample standard deviation, and the cost.

    {"stages": {"search", "short", "full"} -> {"runs": {name: figures}, "mean": {field: [mean, deviation]}, "seconds",
    "images"}, "chosen": name or None, "genotype", "network": {"parameters", "multiply_adds"}, "seconds"}. Seconds are
    those of epochs, compilations in them included; images are those that passed forward and backward.

    Args:
      workdir: of a pipeline, finished or not: what is not there yet is left out.

    Raises:
      UserError: a damaged workdir of a stage.
    """
    stages = {stage: _stage(workdir / stage, figures) for stage, figures in _FIGURES.items()}
    chosen = workdir / "genotype.json"
    genotype = Genotype.load(chosen) if chosen.is_file() else None
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "chosen": next((row["name"] for row in ranking(workdir)), None),
        "genotype": genotype and json.loads(genotype.to_json()),
        "network": genotype and _network(workdir, genotype),
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
    }


def ranking(workdir: Path) -> list[dict[str, Any]]:
    """The rows of choice.json, the chosen cell first; none before the choice."""
    try:
        return list(json.loads((workdir / CHOICE).read_text(encoding="utf-8"))["ranking"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _stage(folder: Path, figures: Mapping[str, str]) -> dict[str, Any]:
    rows = {run.path.name: _figures(run, figures) for run in _runs(folder)}
    means = {
        field: mean_and_deviation([row[field] for row in rows.values() if row.get(field) is not None])
        for field in figures
    }
    return {
        "runs": rows,
        "mean": {field: mean for field, mean in means.items() if mean is not None},
        "seconds": sum(row["seconds"] for row in rows.values()),
        "images": sum(row["images"] for row in rows.values()),
    }


def _runs(folder: Path) -> list[Run]:
    """The runs of a stage, in the order of their seeds."""
    found = [read(path.parent) for path in folder.glob("*/config.json")]
    return sorted(found, key=lambda run: int(run.path.name.removeprefix("seed").removeprefix("=") or 0))


def _figures(run: Run, figures: Mapping[str, str]) -> dict[str, Any]:
    places = {"metrics": run.figures, "evaluation": evaluation(run.path)}
    row: dict[str, Any] = {field: number(places[place].get(field)) for field, place in figures.items()}
    passes = 2 if run.kind == "search" else 1  # a batch of each half a step
    steps = number(run.last.get("step")) or 0.0
    return row | {
        "finished": run.finished,
        "epochs": len(run.epochs),
        "seconds": sum(number(epoch.get("time_epoch_s")) or 0.0 for epoch in run.epochs),
        "images": int(steps) * passes * int(run.config.get("batch_size") or 0),
    }


def mean_and_deviation(values: Sequence[float]) -> list[float | None] | None:
    """[mean, sample standard deviation (n - 1)]; the deviation of one value is None, and so is the mean of none.

    >>> mean_and_deviation([1.0, 3.0]), mean_and_deviation([2.0]), mean_and_deviation([])
    ([2.0, 1.4142135623730951], [2.0, None], None)
    """
    if not values:
        return None
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def _network(workdir: Path, genotype: Genotype) -> dict[str, int] | None:
    """Parameters and multiply-adds of the chosen cell's network in full size; None before a full training began."""
    for path in sorted((workdir / "full").glob("*/config.json")):
        head = json.loads(path.read_text(encoding="utf-8"))
        network, image = head["config"]["network"], head["image"]
        if network["primitives"]:  # operations that only the user's file knows
            return None
        scale = Scale(network["channels"], network["cells"], len(head["data"]["classes"]), network["stem"], image[0])
        counts = profile_at(genotype, scale, (image[0], image[1], image[2]))
        return {"parameters": counts.params, "multiply_adds": counts.macs}
    return None


def lines(found: Mapping[str, Any]) -> list[str]:
    """A summary in a few lines for a terminal.

    >>> stage = {"runs": {"seed0": {}}, "mean": {"accuracy": [0.75, None]}, "seconds": 90.0, "images": 10}
    >>> lines({"stages": {"full": stage}, "chosen": "seed=1", "network": None, "seconds": 90.0})[-1]
    'test error of the chosen cell (seed=1): 25.00 % (n = 1)'
    """
    rows = [
        f"{STAGES[name]}: {len(stage['runs'])} runs, {_clock(stage['seconds'])}, {stage['images']:,} images"
        for name, stage in found["stages"].items()
    ]
    accuracy = found["stages"]["full"]["mean"].get("accuracy")
    if accuracy is None:
        return rows
    n = len(found["stages"]["full"]["runs"])
    return [*rows, f"test error of the chosen cell ({found['chosen']}): {_error(accuracy)} (n = {n})"]


def _error(accuracy: Sequence[float | None]) -> str:
    mean, deviation = accuracy
    return f"{100 * (1 - (mean or 0.0)):.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}") + " %"


def _clock(seconds: float) -> str:
    """A duration as people say it.

    >>> _clock(3725.0), _clock(65.2), _clock(9.0)
    ('1 h 2 min', '1 min 5 s', '9 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def write(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Writes one self-contained HTML page about a pipeline, finished or not.

    Args:
      workdir: of the pipeline.
      out: the file; report.html in the workdir.

    Raises:
      UserError: it is no pipeline, or a workdir in it is damaged.
      RunError: the page could not be written; an older one is left.
    """
    folder = Path(workdir)
    if not is_pipeline(folder):
        raise UserError(f"workdir: {str(workdir)!r} holds no pipeline; allowed: the workdir of prdarts pipeline")
    head = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config, devices = config_rows(head["config"], head.get("sources") or {}), head.get("devices") or []
    found, failures = summary(folder), list[str]()
    cells = {run.path.name: run.genotype for run in _runs(folder / "search") if run.genotype is not None}
    pages = {
        f"{stage}/{path.parent.name}": f"{stage}/{path.parent.name}/report.html"
        for stage in STAGES
        for path in sorted((folder / stage).glob("*/report.html"))
    }
    page = templates(failures)
    page.filters |= {"clock": _clock, "error": _error}
    text = page.get_template("pipeline.html.jinja").render(
        title=f"{folder.resolve().name}: pipeline",
        found=found,
        names=STAGES,
        figures={
            stage: [f for f in fields if f in found["stages"][stage]["mean"]] for stage, fields in _FIGURES.items()
        },
        ranking=ranking(folder),
        finished=(folder / RESULT).is_file(),
        cells=cells,
        kinds=CELLS,
        cell_diagram=functools.partial(drawing, plots.cell_diagram),
        pages=pages,
        config=config,
        versions=head.get("versions") or {},
        devices=[devices] if isinstance(devices, str) else devices,
    )
    if failures:
        warn(f"{len(failures)} pictures of the report could not be drawn: {failures[0]}")
    target = folder / "report.html" if out is None else Path(out)
    atomic_write_text(target, text)
    return target


def config_rows(config: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted path, value, source) of every value of a nested config.

    >>> config_rows({"search": {"epochs": 3}}, {"search.epochs": "flag"})
    [('search.epochs', 3, 'flag')]
    """
    rows: list[tuple[str, Any, str]] = []
    for name, value in config.items():
        path = f"{prefix}{name}"
        nested = isinstance(value, Mapping) and value
        rows += config_rows(value, sources, f"{path}.") if nested else [(path, value, sources.get(path, ""))]
    return rows
