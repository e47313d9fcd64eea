"""The search: epochs of dispatches, checkpoints, logs, and the genotype at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from prdarts_jax.bilevel import half_of
from prdarts_jax.config import userfile
from prdarts_jax.config.places import expanded
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.data.batches import Images, epoch_order, padded_batches, stream_order
from prdarts_jax.devices import processes, sharding
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.optimizers import set_hyperparameters
from prdarts_jax.run import metrics, provenance
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.loop import Done, EpochLoop, Numbers, Speed, Start, Work, drive
from prdarts_jax.run.metrics import EpochLog, MetricsLog, check_finite
from prdarts_jax.run.progress import Progress
from prdarts_jax.run.signals import StopRequest
from prdarts_jax.run.workdir import atomic_write_text, claim, draw, prepared_for, report_path
from prdarts_jax.schedules import cosine
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching.inputs import SearchInputs
from prdarts_jax.searching.own_code import ARCH, METHOD, WEIGHTS, check_strategy
from prdarts_jax.searching.probe import NetworkProbe
from prdarts_jax.searching.program import Orders, SearchCarry, SearchPrograms, abstract_carry
from prdarts_jax.searching.result import SearchResult
from prdarts_jax.searching.stages import (
    Stage,
    changed_fields,
    gone_back,
    hyperparameters,
    in_words,
    kept_weights,
    plain_event,
    plan_in_words,
    space_of,
    with_event,
    with_hyperparameter,
)
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.strategy import Continue, Event, Restage, Rollback, Stop, View

_STAGES = 2**31  # in the place of a step number: the first state of a later stage shares no key with a step

# Everything a search writes: what --overwrite may remove, and nothing else. The config goes last: while it is there,
# a folder that a kill left half-cleared is known as that of a search.
_OWN = (
    "metrics.jsonl",
    "genotype.json",
    "genotypes.jsonl",
    "probabilities.jsonl",
    "events.jsonl",
    "checkpoints",
    "plots",
    "tensorboard",
    "report.html",
    "config.json",
)


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
      SearchResult. SIGTERM, SIGHUP, Ctrl-C and the time limit end it early with everything saved.

    Raises:
      UserError: a config, data set or workdir that is not possible; nothing is changed on disk.
      RunError: a metric is not finite, or the disk fails; the last good checkpoint is kept.
    """
    workdir = expanded(workdir, "workdir")
    config = search_inputs.with_method(config, strategy)

    inputs = prepared_for(
        workdir,
        lambda: search_inputs.prepare(config, weight_tx=weight_tx, arch_tx=arch_tx, strategy=strategy, data=data),
    )
    document = search_inputs.document(config, inputs, sources)
    with StopRequest() as stop:
        start = Start(config.run, workdir, out if out is not None else sys.stdout, stop, None, document)
        return drive(dispatches(config, inputs, start))


def dispatches(
    config: SearchConfig, inputs: SearchInputs, start: Start, shared: Shared | None = None
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
    processes.same(config, search_inputs.compared(document), document)
    provenance.warn_without_kernels(document["platform"]["cpu_kernels"])

    def begin() -> list[Any]:
        """(config.json of the search in the workdir or None, its genotype if it is finished)."""
        overwrite, compared = config.run.overwrite, search_inputs.compared
        old = claim(lock, workdir, document, overwrite=overwrite, compared=compared, own=_OWN)
        finished = old is not None and (workdir / "genotype.json").is_file()
        return [old, json.loads(Genotype.load(workdir).to_json()) if finished else None]

    with contextlib.ExitStack() as lock:
        old, finished = processes.on_first(begin)
        if finished is not None:
            genotype = Genotype.from_json(finished)
            page = processes.on_first(lambda: str(_pictures(workdir, genotype, again=False) or ""))
            return SearchResult("already-finished", genotype, workdir, Path(page) if page else None)
        return (yield from _Search(config, inputs, start._replace(old=old), shared or Shared(inputs)).work())


# --- the run ----------------------------------------------------------------------------------------------------------


class Shared:
    """What searches of one process have in common: their programs, and the images on the devices of these."""

    def __init__(self, inputs: SearchInputs) -> None:
        self.mesh, self._dataset = inputs.mesh, inputs.dataset
        self.programs = SearchPrograms(inputs.problem, inputs.mesh, inputs.dataset.image)

    @functools.cached_property
    def images(self) -> Images:
        """The training images, on all devices of the mesh."""
        return sharding.replicate(self.mesh, Images(self._dataset.train_images, self._dataset.train_labels))


class _Search(EpochLoop[SearchCarry, SearchResult]):
    """A search as epochs of bilevel steps."""

    noun = "search"

    def __init__(self, config: SearchConfig, inputs: SearchInputs, start: Start, shared: Shared) -> None:
        self.config, self.inputs, self.shared = config, inputs, shared
        self.problem, self.programs, self.mesh = inputs.problem, shared.programs, inputs.mesh
        self.train_half, self.val_half = search_inputs.halves(config, inputs.dataset.train_size)
        self.key = jax.random.key(config.seed)
        self.stopped: Stop | None = None
        self.event: Event | None = None
        self.events: list[dict[str, Any]] = []
        first = inputs.problem.strategy.stage_epochs(config.epochs)
        self.stages, self.horizon = [Stage(epochs=first)], inputs.problem.strategy.horizon
        positions = np.arange(config.batch_size, dtype=np.int32)
        self.positions = sharding.place(self.mesh, positions, PartitionSpec(sharding.AXIS))
        super().__init__(
            start,
            epochs=config.epochs,
            epoch_steps=len(self.train_half) // config.batch_size,
            images_per_step=2 * config.batch_size,
        )
        self.end = first

    @property
    def stage(self) -> Stage:
        """The one that is computed now."""
        return self.stages[-1]

    def numbers(self, epoch: int) -> dict[str, float]:
        """The learning rates and the strategy's schedule, of an epoch of this stage; the schedule wins."""
        weights, epoch, epochs = self.config.weights, epoch - self.stage.start, self.stage.epochs
        rate = cosine(epoch, epochs, weights.learning_rate, weights.learning_rate_min)
        schedule = self.problem.strategy.schedule(epoch, epochs)
        return {"weight_learning_rate": rate, "arch_learning_rate": self.config.arch.learning_rate} | schedule

    def first(self) -> SearchCarry:
        if plan := plan_in_words(self.problem.strategy, self.stage, self.epochs):
            self.say(plan)
        carry = self.programs.initial(self.key, self.arrays(0))
        # The program may be that of a search with other numbers in its optimizers.
        state, own = carry.state, self.inputs.digests
        if WEIGHTS not in own:
            weight_opt = set_hyperparameters(state.weight_opt, self.problem.weight_tx)
            state = dataclasses.replace(state, weight_opt=weight_opt)
        if ARCH not in own:
            arch_opt = set_hyperparameters(state.arch_opt, self.problem.arch_tx)
            state = dataclasses.replace(state, arch_opt=arch_opt)
        return sharding.replicate(self.mesh, dataclasses.replace(carry, state=state))

    def target(self, info: Mapping[str, Any]) -> SearchCarry:
        self._enter([Stage(*stage) for stage in info.get("stages", ())] or self.stages[:1])
        numbers = self.arrays(self.stage.start)
        return abstract_carry(self.problem, self.mesh, self.key, numbers, self.inputs.dataset.image)

    def decided(self) -> bool:
        return self.stopped is not None

    def info(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"stopped": None}
        if self.stopped is not None:
            genotype = json.loads(self.stopped.genotype.to_json())
            kept["stopped"] = {"genotype": genotype, "reason": self.stopped.reason}
        if self.events:
            kept |= {"stages": [list(stage) for stage in self.stages], "events": self.events}
        return kept

    def recall(self, info: Mapping[str, Any]) -> None:
        stopped = info.get("stopped")
        self.stopped = Stop(Genotype.from_json(stopped["genotype"]), stopped["reason"]) if stopped else None
        self.events = list(info.get("events", ()))

    def _enter(self, stages: list[Stage]) -> None:
        """Makes space, strategy and programs those of the last of these stages."""
        if json.dumps(stages) == json.dumps(self.stages):
            return
        if self.start.side_by_side and len(stages) > 1:
            raise UserError("run.devices: searches side by side have one stage each; allowed: 1, one after the other")
        self.stages, self.end = stages, stages[-1].end
        if len(stages) == 1:
            self.problem, self.programs = self.inputs.problem, self.shared.programs
            return
        first = self.inputs.problem
        space = space_of(stages[-1], first.space)
        strategy = self.inputs.remake(space, stages[-1].options)
        self.problem = first._replace(space=space, strategy=strategy)
        self.programs = SearchPrograms(self.problem, self.mesh, self.inputs.dataset.image)

    def open(self, step: int) -> None:
        done, writes = step // self.epoch_steps, processes.is_first()
        self._write_events()
        self.genotypes = EpochLog(self.workdir / "genotypes.jsonl", done, writes=writes)
        self.probabilities = EpochLog(self.workdir / "probabilities.jsonl", done, writes=writes)

    def batches(self, epoch: int) -> Orders:
        size, seed = self.config.batch_size, self.config.seed
        return Orders(
            train=epoch_order(self.train_half, size, seed, epoch, "train"),
            val=stream_order(self.val_half, size, seed, epoch, "val", self.epoch_steps),
        )

    def dispatch(
        self, carry: SearchCarry, count: np.int32, fresh: np.bool_, batches: Any, numbers: Numbers
    ) -> tuple[SearchCarry, Mapping[str, jax.Array]]:
        program, images = self.programs.dispatch, self.shared.images
        return program(carry, count, fresh, batches, self.positions, self.key, numbers, images)

    def shown(self, carry: SearchCarry, values: Mapping[str, np.ndarray], numbers: Numbers) -> dict[str, Any]:
        genotype = self.problem.strategy.derive(jax.device_get(carry.state.arch))
        accuracy = (
            "val_accuracy" if np.any(values.get("steps/arch", 1)) and "val_accuracy" in values else "train_accuracy"
        )
        shown = {
            "loss": float(values["train_loss"].mean()),
            "accuracy": float(values[accuracy].mean()),
            "skips": genotype.skips("normal"),
        }
        return shown | ({"tau": float(numbers["tau"])} if "tau" in numbers else {})

    def end_epoch(
        self,
        carry: SearchCarry,
        epoch: int,
        step: int,
        numbers: Numbers,
        log: MetricsLog,
        bar: Progress,
        speed: Speed,
    ) -> dict[str, Any]:
        """The epoch's rows; asks the strategy how to go on."""
        strategy = self.problem.strategy
        arch, memory = jax.device_get((carry.state.arch, carry.state.memory))
        genotype = strategy.derive(arch)
        p = {kind: np.asarray(table) for kind, table in strategy.probabilities(arch, numbers).items()}
        row = self.means(carry.sums) | self._group_means(p)
        for kind in ("normal", "reduce"):
            row[f"{kind}_skips"], row[f"{kind}_depth"] = genotype.skips(kind), genotype.depth(kind)
        row |= self.numbers_row(epoch) | ({"stage": len(self.stages) - 1} if len(self.stages) > 1 else {})
        if self.is_due(self.config.evaluate_every, epoch):
            row["eval_loss"], row["eval_accuracy"] = self.evaluate(carry, numbers)
        row |= speed.fields()
        check_finite(row, step)
        self.genotypes.write(epoch, genotype=json.loads(genotype.to_json()))
        tables = {kind: np.round(table.astype(float), 6).tolist() for kind, table in p.items()}
        self.probabilities.write(epoch, **tables)
        log.write("epoch", epoch, step, **row)
        text = f"epoch {epoch + 1}/{self.epochs}"
        for half in ("train", "val"):
            if f"{half}_loss" in row:  # a half that was left out in every step has none
                text += f" | {half} {row[f'{half}_loss']:.3f} {row[f'{half}_accuracy']:.1%}"
        bar.epoch_line(text)
        probe = NetworkProbe(
            self.programs, carry.state, numbers, self.val_half, self.shared.images, self.config.batch_size
        )
        place, now = (epoch - self.stage.start, self.stage.epochs), hyperparameters(carry.state)
        seed = self.config.seed, epoch
        view = View(*place, arch, memory, row, numbers, genotype, probe, now, strategy.derive, seed)
        self.event = plain_event(userfile.call(strategy.at_epoch, view, field=METHOD))
        self.stopped = self.event if isinstance(self.event, Stop) else None
        return row

    def means(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """As of every run; a half that was left out in some steps is averaged over the others, or is not there."""
        ran = {group: float(sums.get(f"steps/{group}", self.epoch_steps)) for group in ("weights", "arch")}
        return {
            name: float(np.float32(total) / (self.epoch_steps if name.startswith("steps/") else ran[half_of(name)]))
            for name, total in sums.items()
            if ran[half_of(name)] or name.startswith("steps/")
        }

    def step_row(self, values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in values.items()
            if name.startswith("steps/") or values.get(f"steps/{half_of(name)}", 1)
        }

    def turn(self, carry: SearchCarry, step: int, saved: Checkpointer, log: MetricsLog) -> tuple[SearchCarry, int]:
        """What the event of the strategy makes of the search."""
        event, epoch = self.event, step // self.epoch_steps - 1
        if isinstance(event, Continue):
            return with_event(carry, event, self.mesh), step
        if isinstance(event, Restage):
            return self._restaged(carry, step, event)
        if isinstance(event, Rollback):
            return self._rolled_back(carry, epoch, event, saved, log)
        return carry, step

    def _restaged(self, carry: SearchCarry, step: int, event: Restage) -> tuple[SearchCarry, int]:
        start, before = step // self.epoch_steps, self.problem
        left = self.config.epochs - start
        epochs = left if event.epochs is None else event.epochs
        if epochs < 1:
            raise UserError(f"{METHOD}: Restage for {epochs} epochs is not possible; allowed: >= 1")
        fields = changed_fields(event.space, self.inputs.problem.space)
        options = {**self.stage.options, **event.options}
        weights = jax.device_get(carry.state.weights)
        self._enter([*self.stages, Stage(start, epochs, fields, options)])
        strategy, own = self.problem.strategy, METHOD in self.inputs.digests
        search_inputs.check_schedule(strategy, epochs)
        if own:
            check_strategy(strategy, self.problem.space, epochs)
        with userfile.errors_of({METHOD: strategy}) if own else contextlib.nullcontext():
            made = self.programs.initial(jax.random.fold_in(self.key, _STAGES + len(self.stages)), self.arrays(start))
        self._record(start - 1, step, "restage", space=fields, options=dict(event.options), epochs=epochs)
        state = jax.device_get(made.state)
        if event.keep_weights:
            kept = kept_weights(weights, state.weights, before.space, self.problem.space)
            # On the host, as a checkpoint has it: without the weak types of Python numbers.
            opt = jax.device_get(jax.jit(self.problem.weight_tx.init)(kept))
            state = dataclasses.replace(state, weights=kept, weight_opt=opt)
        state = sharding.replicate(self.mesh, dataclasses.replace(state, step=np.asarray(step, np.int32)))
        for past in self.events:  # what a Rollback has set stays
            for name, value in past.get("hyperparameters", {}).items():
                state = with_hyperparameter(state, name, value)
        new = SearchCarry(state, sharding.replicate(self.mesh, made.sums))
        if event.memory is not None:
            new = with_event(new, Continue(event.memory), self.mesh)
        plan = plan_in_words(strategy, self.stage, self.epochs)
        words = [f"stage {len(self.stages)} begins: {epochs} epochs", in_words(fields), plan]
        self.say(", ".join(filter(None, words)))
        return new, step

    def _rolled_back(
        self, carry: SearchCarry, epoch: int, event: Rollback, saved: Checkpointer, log: MetricsLog
    ) -> tuple[SearchCarry, int]:
        horizon, now = self.problem.strategy.horizon, epoch - self.stage.start
        if not max(now - horizon, 0) <= event.epoch < now:
            allowed = f"earlier epochs of the stage, at most {horizon} (horizon) ago"
            raise UserError(f"{METHOD}: Rollback to epoch {event.epoch} at epoch {now}; allowed: {allowed}")
        gone_back(carry, event, self.mesh)  # a mistake in it is found before checkpoints are gone
        target, events = self.stage.start + event.epoch, self.events
        saved.rewind((target + 1) * self.epoch_steps)
        found = saved.restore_latest(self.target)
        if found is None:
            raise RunError(f"{METHOD}: Rollback finds no checkpoint of epoch {event.epoch}")
        carry, step = found.state, found.step
        self.events = events
        carry = gone_back(carry, event, self.mesh)
        log.truncate_after(step)
        self._record(epoch, step, "rollback", hyperparameters=dict(event.hyperparameters))
        self.open(step)
        changes = ", ".join(f"{name} = {value:g}" for name, value in event.hyperparameters.items())
        self.say(f"back to the end of epoch {step // self.epoch_steps}" + (f" with {changes}" if changes else ""))
        return carry, step

    def _record(self, epoch: int, step: int, kind: str, **what: Any) -> None:
        """Keeps an event: checkpoints have them all, and WORKDIR/events.jsonl is written from what they have."""
        done = step // self.epoch_steps
        self.events = [*self.events, {"epoch": epoch, "event": kind, "goes_on_from_epoch": done, **what}]
        self._write_events()

    def _write_events(self) -> None:
        path = self.workdir / "events.jsonl"
        if processes.is_first() and (self.events or path.exists()):
            atomic_write_text(path, "".join(json.dumps(event) + "\n" for event in self.events))

    def _group_means(self, p: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The mean P of each group of operations, over the edges of both cells that may use one."""
        space, means = self.problem.space, {}
        for group in ("none", "skip", "pool", "conv"):
            picked = np.concatenate([p[kind][space.allowed[kind] & space.group(group)[None, :]] for kind in p])
            if len(picked):
                means[f"mean_p/{group}"] = float(picked.mean())
        return means

    def evaluate(self, carry: SearchCarry, numbers: Numbers) -> tuple[float, float]:
        """Loss and accuracy on the whole validation half, with the expected gates."""
        order, mask = padded_batches(len(self.val_half), self.config.batch_size)
        mesh = self.programs.mesh
        state = carry.state if mesh == self.mesh else sharding.replicate(mesh, carry.state)
        placed = sharding.place(mesh, (self.val_half[order], mask), PartitionSpec(None, sharding.AXIS))
        loss, accuracy = self.programs.evaluation(state, *placed, numbers, self.shared.images)
        return float(loss), float(accuracy)

    def left(self, status: str, row: Mapping[str, Any]) -> SearchResult:
        return SearchResult(status, None, self.workdir, None, row, self.start.stop.signum)

    def finish(self, carry: SearchCarry, step: int, log: MetricsLog) -> SearchResult:
        """The final row, the genotype, its diagrams and the report."""
        stopped = self.stopped
        genotype = stopped.genotype if stopped else self.problem.strategy.derive(jax.device_get(carry.state.arch))
        if stopped:
            self.say(f"the strategy ends the search: {stopped.reason}")
        rows = [row for row in metrics.read(self.workdir / "metrics.jsonl") if row["kind"] == "epoch"]
        last = metrics.values(rows[-1]) if rows else {}
        total = sum(row.get("time_epoch_s", 0.0) for row in rows)
        log.write("final", max((step - 1) // self.epoch_steps, 0), step, **last, time_search_s=total)
        log.close()
        # Its presence is what makes a search finished; pictures and report can be made from it at any time.
        atomic_write_text(self.workdir / "genotype.json", genotype.to_json(indent=1) + "\n")
        return SearchResult("finished", genotype, self.workdir, _pictures(self.workdir, genotype, again=True), last)


def _pictures(workdir: Path, genotype: Genotype, *, again: bool) -> Path | None:
    """Diagrams and report of a finished search; those that a killed process did not write, or (again) all of them."""
    again = again or report_path(workdir) is None

    def diagram(kind: str, path: Path) -> None:
        from prdarts_jax.report import plots

        path.parent.mkdir(exist_ok=True)
        plots.save(plots.cell_diagram(genotype, kind), path)

    def report() -> None:
        from prdarts_jax.report import page

        page.report([workdir])

    parts: dict[str, Callable[[], object]] = {}
    for kind, suffix in itertools.product(("normal", "reduce"), ("svg", "png")):
        path = workdir / "plots" / f"genotype_{kind}.{suffix}"
        if again or not path.is_file():
            parts[f"plots/{path.name}"] = functools.partial(diagram, kind, path)
    draw("search", parts | ({"report.html": report} if again else {}))
    return report_path(workdir)
