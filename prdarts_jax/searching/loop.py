"""The search: epochs of dispatches, checkpoints, logs, and the genotype at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from prdarts_jax import optimizers
from prdarts_jax.config import userfile
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.data.batches import Images, epoch_order, padded_batches
from prdarts_jax.devices import processes, sharding
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run import followers, provenance
from prdarts_jax.run.loop import Done, Epoch, EpochLoop, Speed, Start, Work, drive
from prdarts_jax.run.metrics import MetricsLog, check_finite
from prdarts_jax.run.progress import Progress
from prdarts_jax.run.signals import StopRequest
from prdarts_jax.run.workdir import (
    atomic_write_json,
    atomic_write_text,
    check_workdir,
    check_writable,
    clear,
    locked,
    no_report,
    report_path,
)
from prdarts_jax.schedules import cosine as learning_rate
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching.inputs import Inputs
from prdarts_jax.searching.program import Carry, Orders, Programs, abstract_carry
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.strategy import Stop

__all__ = ["RunError", "SearchResult", "UserError", "learning_rate", "search"]

# Everything a search writes: what --overwrite may remove, and nothing else. The config goes last: while it is there,
# a folder that a kill left half-cleared is known as that of a search.
_OWN = (
    "metrics.jsonl",
    "genotype.json",
    "genotypes.jsonl",
    "probabilities.jsonl",
    "checkpoints",
    "plots",
    "tensorboard",
    "report.html",
    "config.json",
)


class SearchResult(NamedTuple):
    """How a search ended.

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


def search(
    config: SearchConfig,
    workdir: str | Path,
    *,
    weight_tx: Any = None,
    arch_tx: Any = None,
    strategy: Any = None,
    data: Any = None,
    sources: Mapping[str, str] | None = None,
    out: IO[str] | None = None,
) -> SearchResult:
    """Searches a cell; the same call again resumes, or reports a finished search.

    Args:
      config: what is computed and how it is run (`presets.resolve` makes one).
      workdir: the folder of this search.
      weight_tx, arch_tx, strategy, data: objects in place of what the config names, see `search_inputs.prepare`.
      sources: where each value of the config comes from, kept in config.json.
      out: where notes go (default: stdout).

    Returns:
      SearchResult. SIGTERM, Ctrl-C and the time limit end it early with everything saved.

    Raises:
      UserError: a config, data set or workdir that is not possible; nothing is changed on disk.
      RunError: a metric is not finite, or the disk fails; the last good checkpoint is kept.
    """
    workdir = Path(workdir).expanduser()
    config = search_inputs.with_method(config, strategy)

    def prepare() -> Inputs:
        if processes.is_first():
            check_writable(workdir)
        return search_inputs.prepare(config, weight_tx=weight_tx, arch_tx=arch_tx, strategy=strategy, data=data)

    inputs = processes.prepared(prepare)
    document = search_inputs.document(config, inputs, sources)
    with StopRequest() as stop:
        start = Start(config.run, workdir, out if out is not None else sys.stdout, stop, None, document)
        return drive(dispatches(config, inputs, start))


def dispatches(
    config: SearchConfig, inputs: Inputs, start: Start, shared: Shared | None = None
) -> Generator[Work, Done, SearchResult]:
    """A search in its locked workdir, as the generator of its dispatches.

    Args:
      config, inputs: of the search.
      start: what `search` makes of its arguments; the config.json of an earlier start is looked for here.
      shared: what it has in common with other searches of this process.

    Raises:
      UserError: the workdir holds something else, or is in use; nothing is changed on disk.
      RunError: as in `search`.
    """
    workdir, document = start.workdir, start.document
    overwrite, compared = config.run.overwrite, search_inputs.compared
    processes.same(config, compared(document), document)
    provenance.warn_without_kernels(document["platform"]["cpu_kernels"])

    def check() -> dict[str, Any] | None:
        return check_workdir(workdir, document, overwrite=overwrite, compared=compared)

    def begin() -> list[Any]:
        """(config.json of the search in the workdir or None, its genotype if it is finished)."""
        check()
        lock.enter_context(locked(workdir))
        old = check()  # again, now that no other process can change it
        if overwrite:
            clear(workdir, _OWN)
        if old is not None and (workdir / "genotype.json").is_file():
            return [old, json.loads(Genotype.load(workdir).to_json())]
        if old is None:
            atomic_write_json(workdir / "config.json", document)
        return [old, None]

    with contextlib.ExitStack() as lock:
        old, finished = processes.on_first(begin)
        if finished is not None:
            found = Genotype.from_json(finished)
            again = SearchResult("already-finished", found, workdir)
            pictures = processes.on_first(lambda: str(_pictures(workdir, found, again=False) or ""))
            return again._replace(report=Path(pictures)) if pictures else again
        return (yield from _Search(config, inputs, start._replace(old=old), shared or Shared(inputs)).work())


# --- the run ----------------------------------------------------------------------------------------------------------


class Shared:
    """What searches of one process have in common: their programs, and the images on the devices of these."""

    def __init__(self, inputs: Inputs) -> None:
        self.mesh, self._dataset = inputs.mesh, inputs.dataset
        self.programs = Programs(inputs.problem, inputs.mesh, inputs.dataset.train_images.shape[1:])

    @functools.cached_property
    def images(self) -> Images:
        """The training images, on all devices of the mesh."""
        return sharding.replicate(self.mesh, Images(self._dataset.train_images, self._dataset.train_labels))


class _Search(EpochLoop[Carry, SearchResult]):
    """A search as epochs of bilevel steps."""

    noun = "search"

    def __init__(self, config: SearchConfig, inputs: Inputs, start: Start, shared: Shared) -> None:
        self.config, self.inputs, self.shared = config, inputs, shared
        self.problem, self.mesh = inputs.problem, inputs.mesh
        self.train_half, self.val_half = search_inputs.halves(config, len(inputs.dataset.train_images))
        self.key = jax.random.key(config.seed)
        self.stopped: Stop | None = None
        positions = np.arange(config.batch_size, dtype=np.int32)
        self.positions = sharding.place(self.mesh, positions, PartitionSpec(sharding.AXIS))
        super().__init__(
            start,
            epochs=config.epochs,
            epoch_steps=len(self.train_half) // config.batch_size,
            images_per_step=2 * config.batch_size,
        )

    def numbers(self, epoch: int) -> dict[str, float]:
        """What changes between epochs: the strategy's schedule and the learning rates."""
        weights = self.config.weights
        rate = learning_rate(epoch, self.config.epochs, weights.learning_rate, weights.learning_rate_min)
        return {
            **self.problem.strategy.schedule(epoch, self.config.epochs),
            "weight_learning_rate": rate,
            "arch_learning_rate": self.config.arch.learning_rate,
        }

    def progress(self, epoch: int) -> dict[str, np.float32]:
        return {name: np.float32(value) for name, value in self.numbers(epoch).items()}

    def first(self) -> Carry:
        carry = self.shared.programs.initial(self.key, self.progress(0))
        # The program may be that of a search with other numbers in its optimizers.
        weight_opt, arch_opt = carry.state.weight_opt, carry.state.arch_opt
        if "weights.transform" not in self.inputs.digests:
            weight_opt = optimizers.set_hyperparameters(weight_opt, self.problem.weight_tx)
        if "arch.transform" not in self.inputs.digests:
            arch_opt = optimizers.set_hyperparameters(arch_opt, self.problem.arch_tx)
        state = dataclasses.replace(carry.state, weight_opt=weight_opt, arch_opt=arch_opt)
        return sharding.replicate(self.mesh, dataclasses.replace(carry, state=state))

    def target(self) -> Carry:
        image = self.inputs.dataset.train_images.shape[1:]
        return abstract_carry(self.problem, self.mesh, self.key, self.progress(0), image)

    def decided(self) -> dict[str, Any] | None:
        if self.stopped is None:
            return None
        return {"genotype": json.loads(self.stopped.genotype.to_json()), "reason": self.stopped.reason}

    def recall(self, decided: Any) -> None:
        self.stopped = Stop(Genotype.from_json(decided["genotype"]), decided["reason"]) if decided else None

    def open(self, step: int) -> None:
        done = step // self.epoch_steps
        self.genotypes = followers.epoch_log(self.workdir / "genotypes.jsonl", done)
        self.probabilities = followers.epoch_log(self.workdir / "probabilities.jsonl", done)

    def epoch(self, epoch: int) -> Epoch:
        orders = Orders(
            *(
                epoch_order(half, self.config.batch_size, self.config.seed, epoch, purpose)
                for half, purpose in ((self.train_half, "train"), (self.val_half, "val"))
            )
        )
        return Epoch(orders, self.progress(epoch))

    def dispatch(
        self, carry: Carry, count: np.int32, fresh: np.bool_, batches: Any, progress: Mapping[str, np.float32]
    ) -> tuple[Carry, Mapping[str, jax.Array]]:
        program, images = self.shared.programs.dispatch, self.shared.images
        return program(carry, count, fresh, batches, self.positions, self.key, progress, images)

    def shown(self, carry: Carry, values: Mapping[str, np.ndarray], now: Epoch) -> dict[str, Any]:
        genotype = self.problem.strategy.derive(jax.device_get(carry.state.arch))
        shown = {
            "loss": float(values["train_loss"].mean()),
            "accuracy": float(values["val_accuracy"].mean()),
            "skips": genotype.skips("normal"),
        }
        return shown | ({"tau": float(now.progress["tau"])} if "tau" in now.progress else {})

    def end_epoch(
        self, carry: Carry, epoch: int, step: int, now: Epoch, log: MetricsLog, bar: Progress, speed: Speed
    ) -> dict[str, Any]:
        """The epoch's rows; asks the strategy whether to go on."""
        strategy, space, progress = self.problem.strategy, self.problem.space, now.progress
        arch = jax.device_get(carry.state.arch)
        genotype = strategy.derive(arch)
        row: dict[str, Any] = {name: float(np.float32(v) / self.epoch_steps) for name, v in carry.sums.items()}
        p = {kind: np.asarray(v) for kind, v in strategy.probabilities(arch, progress).items()}
        for group in ("none", "skip", "pool", "conv"):
            picked = [p[kind][space.allowed[kind] & space.group(group)[None, :]] for kind in p]
            if sum(map(len, picked)):
                row[f"mean_p/{group}"] = float(np.concatenate(picked).mean())
        for kind in ("normal", "reduce"):
            row[f"{kind}_skips"], row[f"{kind}_depth"] = genotype.skips(kind), genotype.depth(kind)
        row |= {f"progress/{name}": float(value) for name, value in self.numbers(epoch).items()}
        every = self.config.evaluate_every
        if every and ((epoch + 1) % every == 0 or step == self.total_steps):
            row["eval_loss"], row["eval_accuracy"] = self.evaluate(carry, progress)
        row |= speed.fields()
        check_finite(row, step)
        self.genotypes.write(epoch, genotype=json.loads(genotype.to_json()))
        self.probabilities.write(epoch, **{kind: np.round(v.astype(float), 6).tolist() for kind, v in p.items()})
        log.write("epoch", epoch, step, **row)
        text = f"epoch {epoch + 1}/{self.config.epochs} | train {row['train_loss']:.3f} {row['train_accuracy']:.1%}"
        bar.epoch_line(f"{text} | val {row['val_loss']:.3f} {row['val_accuracy']:.1%}")
        self.stopped = userfile.call(strategy.end_epoch, arch, row, epoch, field="method.strategy")
        if not isinstance(self.stopped, Stop | None):
            found = type(self.stopped).__name__
            raise UserError(f"method.strategy: end_epoch gives a {found}; allowed: None or a Stop")
        return row

    def evaluate(self, carry: Carry, progress: Mapping[str, Any]) -> tuple[float, float]:
        """Loss and accuracy on the whole validation half, with the expected gates."""
        order, mask = padded_batches(len(self.val_half), self.config.batch_size)
        state = carry.state if self.shared.mesh == self.mesh else sharding.replicate(self.shared.mesh, carry.state)
        placed = sharding.place(self.shared.mesh, (self.val_half[order], mask), PartitionSpec(None, sharding.AXIS))
        loss, accuracy = self.shared.programs.evaluation(state, *placed, progress, self.shared.images)
        return float(loss), float(accuracy)

    def left(self, status: str, row: Mapping[str, Any]) -> SearchResult:
        return SearchResult(status, None, self.workdir, None, row, self.start.stop.signum)

    def finish(self, carry: Carry, step: int, log: MetricsLog) -> SearchResult:
        """The final row, the genotype, its diagrams and the report."""
        from prdarts_jax.run.metrics import read

        stopped = self.stopped
        genotype = stopped.genotype if stopped else self.problem.strategy.derive(jax.device_get(carry.state.arch))
        if stopped:
            self.say(f"the strategy ends the search: {stopped.reason}")
        rows = [row for row in read(self.workdir / "metrics.jsonl") if row["kind"] == "epoch"]
        last = {k: v for k, v in rows[-1].items() if k not in ("kind", "epoch", "step")} if rows else {}
        total = sum(row.get("time_epoch_s", 0.0) for row in rows)
        log.write("final", max((step - 1) // self.epoch_steps, 0), step, **last, time_search_s=total)
        log.close()
        # Its presence is what makes a search finished; pictures and report can be made from it at any time.
        atomic_write_text(self.workdir / "genotype.json", genotype.to_json(indent=1) + "\n")
        return SearchResult("finished", genotype, self.workdir, _pictures(self.workdir, genotype, again=True), last)


def _pictures(workdir: Path, genotype: Genotype, *, again: bool) -> Path | None:
    """Diagrams and report of a finished search; those that a killed process did not write, or (again) all of them."""
    from prdarts_jax.report import page as report_page
    from prdarts_jax.report import plots

    folder = workdir / "plots"
    again = again or report_path(workdir) is None  # it is written last: without it a diagram may be half a file
    try:
        folder.mkdir(exist_ok=True)
        for kind in ("normal", "reduce"):
            for suffix in ("svg", "png"):
                path = folder / f"genotype_{kind}.{suffix}"
                if again or not path.is_file():
                    plots.save(plots.cell_diagram(genotype, kind), path)
        return report_page.report([workdir]) if again else report_path(workdir)
    except (OSError, RunError, UserError) as error:
        raise no_report("search", error) from error
