"""The search: epochs of dispatches, checkpoints, logs, and the genotype at the end."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from prdarts_jax import config as cfg
from prdarts_jax import parallel, search_inputs, search_program
from prdarts_jax.checkpoint import Checkpointer
from prdarts_jax.config import SearchConfig
from prdarts_jax.data import batches
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.metrics import MetricsLog, Progress, check_finite
from prdarts_jax.search_inputs import Inputs
from prdarts_jax.search_program import Carry, Images, Orders
from prdarts_jax.signals import StopRequest
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.strategies.base import Stop
from prdarts_jax.workdir import WorkdirLock, atomic_write_json, atomic_write_text, check_writable

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
    check_writable(workdir)
    config = search_inputs.with_method(config, strategy)
    inputs = search_inputs.prepare(config, weight_tx=weight_tx, arch_tx=arch_tx, strategy=strategy, data=data)
    document = search_inputs.document(config, inputs, sources)
    _check_workdir(workdir, document, config.run.overwrite)
    with WorkdirLock(workdir), StopRequest() as stop:
        notes = out if out is not None else sys.stdout
        # Again, now that no other process can change it.
        old = _check_workdir(workdir, document, config.run.overwrite)
        if config.run.overwrite:
            _clear(workdir)
        if old is not None and (workdir / "genotype.json").is_file():
            found = Genotype.load(workdir)
            return SearchResult("already-finished", found, workdir, _report_path(workdir))
        if old is None:
            atomic_write_json(workdir / "config.json", document)
        run = _Run(config, inputs, workdir, notes, stop, old, document)
        return run.run()


# --- the workdir ------------------------------------------------------------------------------------------------------


def _check_workdir(workdir: Path, document: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The config.json of the search in the workdir, or None; refuses another search and a folder of something else."""
    path = workdir / "config.json"
    if not workdir.is_dir():
        return None
    if not path.is_file():
        # A process killed in its first moment leaves its lock, perhaps a half-written config.
        unfinished = (".lock", ".config.json.*.tmp")
        foreign = sorted(p.name for p in workdir.iterdir() if not any(p.match(name) for name in unfinished))
        if foreign:
            raise UserError(
                f"workdir: {workdir} holds {foreign[0]!r} and no config.json; allowed: a new folder or one of a search"
            )
        return None
    if overwrite:
        return None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        before = search_inputs.compared(old)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"workdir: {path} is not the config of a search ({reason}); --overwrite starts again") from None
    differences = cfg.differences(before, search_inputs.compared(document))
    if differences:
        raise UserError(
            f"workdir: {workdir} holds another search ({'; '.join(differences)}); "
            "use another --workdir, or --overwrite to start again"
        )
    return old


def _clear(workdir: Path) -> None:
    for name in _OWN:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _report_path(workdir: Path) -> Path | None:
    path = workdir / "report.html"
    return path if path.is_file() else None


class _EpochLog:
    """A file of one JSON row an epoch; on resume the rows of epochs that are computed again are dropped."""

    def __init__(self, path: Path, epochs_done: int) -> None:
        self._path = path
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):  # the last line of a killed process
                if json.loads(line)["epoch"] < epochs_done:
                    kept.append(line)
        if path.is_file():
            atomic_write_text(path, "".join(f"{line}\n" for line in kept))
        self._done = len(kept)

    def write(self, epoch: int, **values: Any) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"epoch": epoch, **values}) + "\n")
        except OSError as error:
            raise RunError(f"{self._path} could not be written: {error.strerror or error}") from error


# --- the run ----------------------------------------------------------------------------------------------------------


def learning_rate(epoch: int, epochs: int, high: float, low: float) -> float:
    """Cosine, constant within an epoch: low + (high - low)/2 (1 + cos(pi e / E)), e = 0..E-1.

    >>> learning_rate(0, 200, 0.025, 0.001)
    0.025
    """
    return low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * epoch / epochs))


class _Run:
    """One start of a search, from the restored (or first) step to the end, a stop, or the time limit."""

    def __init__(
        self,
        config: SearchConfig,
        inputs: Inputs,
        workdir: Path,
        notes: IO[str],
        stop: StopRequest,
        old: Mapping[str, Any] | None,
        document: Mapping[str, Any],
    ) -> None:
        self.config, self.inputs, self.workdir, self.notes, self.stop = config, inputs, workdir, notes, stop
        self.old, self.document = old, document
        self.problem, self.mesh = inputs.problem, inputs.mesh
        self.train_half, self.val_half = search_inputs.halves(config, len(inputs.dataset.train_images))
        self.epoch_steps = len(self.train_half) // config.batch_size
        self.total_steps = self.epoch_steps * config.epochs
        self.key = jax.random.key(config.seed)
        self.began = time.monotonic()
        self.evaluation = search_program.make_evaluation(self.problem, self.mesh)

    def say(self, text: str) -> None:
        print(text, file=self.notes, flush=True)

    def numbers(self, epoch: int) -> dict[str, float]:
        """What changes between epochs: the strategy's schedule and the learning rates."""
        weights = self.config.weights
        rate = learning_rate(epoch, self.config.epochs, weights.learning_rate, weights.learning_rate_min)
        return {
            **self.problem.strategy.schedule(epoch, self.config.epochs),
            "weight_learning_rate": rate,
            "arch_learning_rate": self.config.arch.learning_rate,
        }

    def progress(self, epoch: int) -> dict[str, Any]:
        return {name: np.float32(value) for name, value in self.numbers(epoch).items()}

    def run(self) -> SearchResult:
        config, workdir = self.config, self.workdir
        tensorboard = workdir / "tensorboard" if config.run.tensorboard else None
        with (
            Checkpointer(workdir / "checkpoints", warn=_warn) as saved,
            MetricsLog(workdir / "metrics.jsonl", tensorboard_dir=tensorboard) as log,
        ):
            carry, step, stopped = self.restore(saved)
            log.truncate_after(step)
            done = step // self.epoch_steps
            self.genotypes = _EpochLog(workdir / "genotypes.jsonl", done)
            self.probabilities = _EpochLog(workdir / "probabilities.jsonl", done)
            with Progress(self.total_steps, initial=step, enabled=config.run.progress) as bar:
                return self.loop(carry, step, stopped, saved, log, bar)

    def restore(self, saved: Checkpointer) -> tuple[Carry, int, Stop | None]:
        """The carry to go on from, its step, and what the strategy had decided there."""
        image = self.inputs.dataset.train_images.shape[1:]
        progress = self.progress(0)
        target = search_program.abstract_carry(self.problem, self.mesh, self.key, progress, image)
        found = saved.restore_latest(target)
        if found is None:
            return search_program.initial_carry(self.problem, self.mesh, self.key, progress, image), 0, None
        changed = search_inputs.tolerance(self.old or {}, self.document)
        how = f"to float tolerance only ({'; '.join(changed)})" if changed else "bit for bit"
        where = f"step {found.step} of {self.total_steps} (epoch {found.step // self.epoch_steps})"
        self.say(f"resuming at {where}; the result is that of an uninterrupted search {how}")
        decided = found.info.get("stopped")
        stopped = Stop(Genotype.from_json(decided["genotype"]), decided["reason"]) if decided else None
        return found.state, found.step, stopped

    def loop(
        self,
        carry: Carry,
        step: int,
        stopped: Stop | None,
        saved: Checkpointer,
        log: MetricsLog,
        bar: Progress,
    ) -> SearchResult:
        config, run = self.config, self.config.run
        dispatch = search_program.make_dispatch(self.problem, self.mesh)
        train = self.inputs.dataset
        data = parallel.replicate(self.mesh, Images(train.train_images, train.train_labels))
        positions = np.arange(config.batch_size, dtype=np.int32)
        length = min(run.steps_per_dispatch, self.epoch_steps)
        last_save = time.monotonic()
        row: dict[str, Any] = {}
        compiled = False
        if step < self.total_steps and stopped is None:
            self.say("compiling the search (once: compiled programs are kept for the next start)")
        while step < self.total_steps and stopped is None:
            epoch, first = divmod(step, self.epoch_steps)
            epoch_began, images = time.monotonic(), 0
            orders = Orders(
                *(
                    batches.epoch_order(half, config.batch_size, config.seed, epoch, purpose)
                    for half, purpose in ((self.train_half, "train"), (self.val_half, "val"))
                )
            )
            progress = self.progress(epoch)
            for start in range(first, self.epoch_steps, length):
                count = min(length, self.epoch_steps - start)
                chunk = Orders(*(_padded(order[start : start + count], length) for order in orders))
                began = time.monotonic()
                carry, rows = dispatch(
                    carry, np.int32(count), np.bool_(start == 0), chunk, positions, self.key, progress, data
                )
                values = {name: np.asarray(value)[:count] for name, value in rows.items()}
                elapsed = time.monotonic() - began
                if not compiled:
                    self.say(f"compiled and ran the first {count} steps in {elapsed:.1f} s")
                    compiled, epoch_began = True, time.monotonic()
                else:
                    images += 2 * count * config.batch_size
                self.log_steps(log, epoch, step, values)
                step += count
                genotype = self.problem.strategy.derive(jax.device_get(carry.state.arch))
                bar.update(count, **self.fields(values, progress, genotype, 2 * count * config.batch_size / elapsed))
                epoch_done = start + count == self.epoch_steps
                if epoch_done:
                    row, stopped = self.end_epoch(carry, epoch, step, progress, log, bar, data, epoch_began, images)
                over_time = run.time_limit > 0 and time.monotonic() - self.began > 60 * run.time_limit
                leaving = bool(self.stop) or over_time
                due = epoch_done and ((epoch + 1) % run.checkpoint_every == 0 or step == self.total_steps)
                late = run.checkpoint_minutes > 0 and time.monotonic() - last_save > 60 * run.checkpoint_minutes
                if due or late or leaving or stopped is not None:
                    saved.save(step, carry, self.info(step, stopped))
                    last_save = time.monotonic()
                if leaving and stopped is None and step < self.total_steps:
                    saved.wait()
                    status = "interrupted" if self.stop else "time-limit"
                    return SearchResult(status, None, self.workdir, None, row, self.stop.signum)
        saved.wait()
        return self.finish(carry, step, log, stopped)

    def info(self, step: int, stopped: Stop | None) -> dict[str, Any]:
        decided = stopped and {"genotype": json.loads(stopped.genotype.to_json()), "reason": stopped.reason}
        return {"epoch": step // self.epoch_steps, "step": step, "stopped": decided}

    def log_steps(self, log: MetricsLog, epoch: int, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Rows of every log_every-th step (counted globally, so independent of the dispatches); stops at a NaN."""
        for i in range(len(next(iter(values.values())))):
            number = step + i + 1
            found = {name: value[i] for name, value in values.items()}
            check_finite(found, number)
            if number % self.config.run.log_every == 0:
                log.write("step", epoch, number, **found)

    def fields(
        self, values: Mapping[str, np.ndarray], progress: Mapping[str, Any], genotype: Genotype, speed: float
    ) -> dict[str, Any]:
        shown = {
            "loss": float(values["train_loss"].mean()),
            "accuracy": float(values["val_accuracy"].mean()),
            "skips": genotype.skips("normal"),
            "images/s": round(speed),
        }
        return shown | ({"tau": float(progress["tau"])} if "tau" in progress else {})

    def end_epoch(
        self,
        carry: Carry,
        epoch: int,
        step: int,
        progress: Mapping[str, Any],
        log: MetricsLog,
        bar: Progress,
        data: Images,
        began: float,
        images: int,
    ) -> tuple[dict[str, Any], Stop | None]:
        """The epoch's rows; asks the strategy whether to go on."""
        strategy, space = self.problem.strategy, self.problem.space
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
            row["eval_loss"], row["eval_accuracy"] = self.evaluate(carry, progress, data)
        seconds = time.monotonic() - began
        row["time_epoch_s"] = seconds
        row["images_per_s"] = images / seconds if images else 0.0
        row["memory_peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        check_finite(row, step)
        self.genotypes.write(epoch, genotype=json.loads(genotype.to_json()))
        self.probabilities.write(epoch, **{kind: np.round(v.astype(float), 6).tolist() for kind, v in p.items()})
        log.write("epoch", epoch, step, **row)
        text = f"epoch {epoch + 1}/{self.config.epochs} | train {row['train_loss']:.3f} {row['train_accuracy']:.1%}"
        bar.epoch_line(f"{text} | val {row['val_loss']:.3f} {row['val_accuracy']:.1%}")
        return row, strategy.end_epoch(arch, row, epoch)

    def evaluate(self, carry: Carry, progress: Mapping[str, Any], data: Images) -> tuple[float, float]:
        """Loss and accuracy on the whole validation half, with the expected gates."""
        order, mask = batches.padded_batches(len(self.val_half), self.config.batch_size)
        loss, accuracy = self.evaluation(carry.state, self.val_half[order], mask, progress, data)
        return float(loss), float(accuracy)

    def finish(self, carry: Carry, step: int, log: MetricsLog, stopped: Stop | None) -> SearchResult:
        """The final row, the genotype, its diagrams and the report."""
        from prdarts_jax import metrics, plots, report

        genotype = stopped.genotype if stopped else self.problem.strategy.derive(jax.device_get(carry.state.arch))
        if stopped:
            self.say(f"the strategy ends the search: {stopped.reason}")
        rows = [row for row in metrics.read(self.workdir / "metrics.jsonl") if row["kind"] == "epoch"]
        last = {k: v for k, v in rows[-1].items() if k not in ("kind", "epoch", "step")} if rows else {}
        total = sum(row.get("time_epoch_s", 0.0) for row in rows)
        log.write("final", max((step - 1) // self.epoch_steps, 0), step, **last, time_search_s=total)
        log.close()
        folder = self.workdir / "plots"
        folder.mkdir(exist_ok=True)
        for kind in ("normal", "reduce"):
            plots.save(plots.cell_diagram(genotype, kind), folder / f"genotype_{kind}.svg")
            plots.save(plots.cell_diagram(genotype, kind), folder / f"genotype_{kind}.png")
        # Last: its presence is what makes a search finished.
        atomic_write_text(self.workdir / "genotype.json", genotype.to_json(indent=1) + "\n")
        path = report.report([self.workdir])
        return SearchResult("finished", genotype, self.workdir, path, last)


def _warn(line: str) -> None:
    print(f"prdarts: {line}", file=sys.stderr)


def _padded(order: np.ndarray, length: int) -> np.ndarray:
    """Batches up to the fixed length of a dispatch; the loop never reaches the repeated ones."""
    return np.concatenate([order, np.repeat(order[:1], length - len(order), axis=0)]) if len(order) < length else order
