"""The protocol of the field: search with several seeds, choose a cell by a short training, train it in full, test it.

    WORKDIR/search/seed=N    the searches                     data without the held-out images
    WORKDIR/short/seed=N     a short training of each cell    without them too; evaluated on them alone
    WORKDIR/choice.json      the cell of the best held-out accuracy: no test image has a say in it
    WORKDIR/full/seedN       its full trainings               all training images; evaluated on the test images

Each folder is an ordinary workdir. The same call again goes on in whatever stage it was ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax

from prdarts_jax.config import schema, userfile
from prdarts_jax.config.pipeline import STAGES, PipelineConfig
from prdarts_jax.config.places import expanded
from prdarts_jax.data.sources import Dataset
from prdarts_jax.devices import sharding
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.report import pipeline as report
from prdarts_jax.run import provenance
from prdarts_jax.run.signals import StopRequest
from prdarts_jax.run.workdir import (
    atomic_write_json,
    atomic_write_text,
    claim,
    draw,
    prepared_for,
    report_path,
)
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching.inputs import SearchInputs
from prdarts_jax.searching.population import search_population
from prdarts_jax.space.genotype import CELLS, Genotype
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training.evaluation import evaluate
from prdarts_jax.training.loop import train, train_seeds

# Everything a pipeline writes: what --overwrite may remove, and nothing else. The config goes last: while it is there,
# a folder that a kill left half-cleared is known as that of a pipeline.
_OWN = (report.RESULT, "report.html", "genotype.json", report.CHOICE, "full", "short", "search", "config.json")
_FILES = ("data.source", "space.primitives", "network.primitives", "weights.transform", "arch.transform")
_ANY = "DARTS_V2"  # a cell with which the trainings are tried out before there is one of the search


class PipelineResult(NamedTuple):
    """How a pipeline ended.

    Attributes:
      status: "finished" | "already-finished" | "interrupted" | "time-limit".
      genotype: the chosen cell, or None if it is not chosen yet.
      workdir: where everything lies.
      summary: what result.json holds: each stage's runs, means and deviations, cost; empty if not finished.
      report: path of report.html, or None.
      signum: the signal that interrupted it.
    """

    status: str
    genotype: Genotype | None
    workdir: Path
    summary: Mapping[str, Any] = {}
    report: Path | None = None
    signum: int | None = None


def run_pipeline(
    config: PipelineConfig,
    workdir: str | Path,
    *,
    strategy: Any = None,
    data: Dataset | None = None,
    sources: Mapping[str, str] | None = None,
    out: IO[str] | None = None,
) -> PipelineResult:
    """Searches, chooses, trains and tests; the same call again goes on, or reports a finished pipeline.

    Args:
      config: of all stages (`presets.pipeline.resolve` makes one).
      workdir: the folder of the pipeline.
      strategy: a method in place of the config's, as in `search`.
      data: images in place of the config's source, with test images.
      sources: where each value of the config comes from, kept in config.json.
      out: where notes go (default: stdout).

    Returns:
      PipelineResult. SIGTERM, SIGHUP, Ctrl-C and the time limit (of all stages together) end it early with everything
      saved.

    Raises:
      UserError: a config, data set or workdir that is not possible; nothing is changed on disk.
      RunError: a search has failed, no cell can be trained, or the disk fails; the other runs are kept.
    """
    workdir = expanded(workdir, "workdir")
    sharding.visible()
    if jax.process_count() > 1:
        raise UserError(f"pipeline: {jax.process_count()} processes are not possible; allowed: one, with its devices")
    config = dataclasses.replace(config, search=search_inputs.with_method(config.search, strategy))

    def prepare() -> SearchInputs:
        """What a later stage would refuse is refused now."""
        for stage in (config.short, config.full):
            train_inputs.prepare(stage, Genotype.named(_ANY), data=data)
        first = dataclasses.replace(config.search, seed=config.search_seeds[0])
        return search_inputs.prepare(first, strategy=strategy, data=data)

    inputs = prepared_for(workdir, prepare)
    document = provenance.document("pipeline", config, inputs, sources)
    with contextlib.ExitStack() as lock, StopRequest() as stop:
        claim(lock, workdir, document, overwrite=config.run.overwrite, compared=compared, own=_OWN)
        notes = out if out is not None else sys.stdout
        several = inputs.problem.strategy.stage_epochs(config.search.epochs) < config.search.epochs
        given = {"data": data, "out": notes}
        return _Pipeline(config, workdir, stop, several, strategy, sources or {}, given).go()


def compared(document: Mapping[str, Any]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed pipeline must share: what is computed.

    What lies in files is compared by its digest: here that of the images and of the method, in each stage the rest.
    """
    config = schema.from_dict(PipelineConfig, document["config"])
    flat: dict[str, Any] = {"search_seeds": list(config.search_seeds), "train_seeds": list(config.train_seeds)}
    for stage in STAGES:
        flat |= {
            f"{stage}.{path}": value
            for path, value in schema.computed(getattr(config, stage)).items()
            if path not in _FILES
        }
    method = flat["search.method.strategy"]
    flat["search.method.strategy"] = method.rpartition(":")[2] if userfile.is_path(method) else method
    return flat | {f"digest of {name}": value for name, value in document["digests"].items()}


def best_first(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names by accuracy, the highest first; of equals the one with the lower loss, then the one that comes first.

    >>> best_first({"a": {"accuracy": 0.5, "loss": 1.0}, "b": {"accuracy": 0.5, "loss": 0.9}})
    ['b', 'a']
    """
    return sorted(measured, key=lambda name: (-measured[name]["accuracy"], measured[name]["loss"]))


class _Pipeline:
    """One start of a pipeline, in its locked workdir."""

    def __init__(
        self,
        config: PipelineConfig,
        workdir: Path,
        stop: StopRequest,
        several_stages: bool,
        strategy: Any,
        sources: Mapping[str, str],
        given: Mapping[str, Any],
    ) -> None:
        self.config, self.workdir, self.stop = config, workdir, stop
        self.several_stages, self.strategy, self.sources, self.given = several_stages, strategy, sources, given
        self.began = time.monotonic()
        self.names = [f"seed={seed}" for seed in config.search_seeds]

    def go(self) -> PipelineResult:
        """Stage after stage; one that is finished only says so."""
        if (self.workdir / report.RESULT).is_file():
            return self._result("already-finished")
        for stage in (self._search, self._short, self._choose, self._full, self._test):
            left = stage()
            if left is None and self.stop:
                left = self._left("interrupted", self.stop.signum)
            if left is not None:
                return left
        atomic_write_json(self.workdir / report.RESULT, report.summary(self.workdir))
        return self._result("finished")

    def _say(self, text: str) -> None:
        print(text, file=self.given["out"], flush=True)

    def _stage(self, stage: str) -> Any:
        """The config of a stage, with what is left of the time."""
        config, limit = getattr(self.config, stage), self.config.run.time_limit
        # At least a moment: then a start gets on, however short its limit, and says itself that it is over.
        left = max(limit - (time.monotonic() - self.began) / 60, 1e-9) if limit else 0.0
        return dataclasses.replace(config, run=dataclasses.replace(config.run, time_limit=left))

    def _left(self, status: str, signum: int | None) -> PipelineResult:
        chosen = self.workdir / "genotype.json"
        return PipelineResult(status, Genotype.load(chosen) if chosen.is_file() else None, self.workdir, signum=signum)

    def _given(self, stage: str) -> dict[str, Any]:
        """What every call of a stage is given beside its config."""
        prefix = f"{stage}."
        own = {p.removeprefix(prefix): source for p, source in self.sources.items() if p.startswith(prefix)}
        return {**self.given, "sources": own}

    def _unless_left(self, result: Any) -> PipelineResult | None:
        """The end of this start, where a run was left early."""
        return self._left(result.status, result.signum) if result.status in ("interrupted", "time-limit") else None

    def _search(self) -> PipelineResult | None:
        """One cell a seed, from one compiled program."""
        self._say(f"stage 1 of 3: searches with {len(self.names)} seeds")
        config = self._stage("search")
        if self.several_stages:  # searches side by side have one stage each
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, devices="1"))
        sweep = {"seed": self.config.search_seeds}
        given = {"strategy": self.strategy, **self._given("search")}
        found = search_population(config, self.workdir / "search", sweep, **given)
        if found.failures:
            name, why = next(iter(found.failures.items()))
            raise RunError(f"pipeline: {name} failed: {why}; the other searches are kept")
        return self._unless_left(found)

    def _genotype(self, name: str) -> Genotype:
        return Genotype.load(self.workdir / "search" / name / "genotype.json")

    def _can_be_trained(self, name: str) -> bool:
        genotype = self._genotype(name)
        return all(any(genotype.cell(kind)[0]) for kind in CELLS)

    def _short(self) -> PipelineResult | None:
        """Each cell is trained for a while on what is not held out, and measured on what is."""
        self._say("stage 2 of 3: a short training of each cell, and its accuracy on held-out images")
        for name in self.names:
            if not self._can_be_trained(name):
                self._say(f"{name}: a cell without any operation cannot be trained, and is not chosen")
                continue
            folder, genotype = self.workdir / "short" / name, self._genotype(name)
            left = self._unless_left(train(self._stage("short"), genotype, folder, **self._given("short")))
            if left is None and self.stop:
                left = self._left("interrupted", self.stop.signum)
            if left is not None:
                return left
            self._measure(folder, "holdout", self.config.short.run)
        return None

    def _choose(self) -> PipelineResult | None:
        """The cell whose network is right most often on the held-out images; of equals the one with the lower loss."""
        if (self.workdir / report.CHOICE).is_file():
            return None
        measured = {
            name: report.evaluation(self.workdir / "short" / name) for name in self.names if self._can_be_trained(name)
        }
        if not measured:
            raise RunError("pipeline: no search has found a cell that can be trained")
        ranking = best_first(measured)
        genotype = self._genotype(ranking[0])
        atomic_write_text(self.workdir / "genotype.json", genotype.to_json(indent=1) + "\n")
        rows = [{"name": name, **{key: measured[name][key] for key in ("accuracy", "loss")}} for name in ranking]
        atomic_write_json(self.workdir / report.CHOICE, {"part": "holdout", "ranking": rows})
        accuracies = ", ".join(f"{row['name']} {row['accuracy']:.2%}" for row in rows)
        self._say(f"chosen: {ranking[0]} (held-out accuracy: {accuracies})")
        return None

    def _full(self) -> PipelineResult | None:
        """The chosen cell from scratch, on all training images."""
        self._say(f"stage 3 of 3: full trainings of the chosen cell with {len(self.config.train_seeds)} seeds")
        genotype = Genotype.load(self.workdir / "genotype.json")
        seeds, given = self.config.train_seeds, self._given("full")
        return self._unless_left(train_seeds(self._stage("full"), genotype, self.workdir / "full", seeds, **given))

    def _test(self) -> PipelineResult | None:
        for seed in self.config.train_seeds:
            self._measure(self.workdir / "full" / f"seed{seed}", "test", self.config.full.run)
        return None

    def _measure(self, folder: Path, part: str, run: Any) -> None:
        """evaluation.json of a finished training; one that is there is not made again."""
        if report.evaluation(folder).get("part") != part:
            options = {"devices": run.devices, "workers": run.workers, "data_dir": run.data_dir or None}
            evaluate(folder, part=part, data=self.given["data"], **options)

    def _result(self, status: str) -> PipelineResult:
        summary = json.loads((self.workdir / report.RESULT).read_text(encoding="utf-8"))
        if status == "finished" or report_path(self.workdir) is None:
            draw("pipeline", {"report.html": lambda: report.write(self.workdir)})
        genotype = Genotype.load(self.workdir / "genotype.json")
        return PipelineResult(status, genotype, self.workdir, summary, report_path(self.workdir))
