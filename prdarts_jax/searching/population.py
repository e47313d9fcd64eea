"""A population: searches that differ in numbers alone, in one process and with one compilation.

On one device the members run one after the other: one state lies on the device, one set of checkpoints is written, and
the first results are there early. On several devices each computes a member, and takes the next one when it is done.
A member is an ordinary search in WORKDIR/<its values>, and WORKDIR/population.json names them all.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax

from prdarts_jax.config import schema
from prdarts_jax.config.places import expanded
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.devices import sharding
from prdarts_jax.errors import RunError, UserError, warn
from prdarts_jax.report.data import POPULATION, POPULATION_SCHEMA
from prdarts_jax.run.loop import Done, Start, Work
from prdarts_jax.run.signals import StopRequest
from prdarts_jax.run.workdir import (
    WorkdirLock,
    atomic_write_json,
    check_workdir,
    check_writable,
    draw,
    report_path,
)
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.searching import sweep as sweeps
from prdarts_jax.searching.inputs import SearchInputs
from prdarts_jax.searching.loop import SearchResult, Shared
from prdarts_jax.searching.own_code import same_programs
from prdarts_jax.searching.side_by_side import SideBySide
from prdarts_jax.searching.sweep import Member
from prdarts_jax.strategy import Strategy

Run = Generator[Work, Done, SearchResult]


class PopulationResult(NamedTuple):
    """How a population ended.

    Attributes:
      status: "finished" | "already-finished" | "failed" | "interrupted" | "time-limit".
      members: name -> how the search ended; those that failed or were not started are missing.
      failures: name -> why a member failed; the others went on.
      workdir: holds a folder a member.
      report: path of the report over all members, or None.
      signum: the signal that interrupted it.
    """

    status: str
    members: Mapping[str, SearchResult]
    failures: Mapping[str, str]
    workdir: Path
    report: Path | None = None
    signum: int | None = None

    def _repr_html_(self) -> str:
        from prdarts_jax.report.notebook import result_html, table

        ended = [(name, member.status, _accuracy(member)) for name, member in self.members.items()]
        failed = [(name, "failed", why) for name, why in self.failures.items()]
        title = f"Population: {self.status} ({self.workdir.name})"
        return result_html(title, {}, report=self.report) + table([*ended, *failed])


def _accuracy(result: SearchResult) -> str:
    accuracy = result.metrics.get("val_accuracy")
    return "" if accuracy is None else f"{accuracy:.4g}"


class _Prepared(NamedTuple):
    """A member, ready to be started."""

    member: Member
    inputs: SearchInputs
    document: dict[str, Any]  # its config.json


class _Active(NamedTuple):
    """A member under way on a device."""

    name: str
    run: Run
    work: Work  # what it waits for


def search_population(
    config: SearchConfig,
    workdir: str | Path,
    sweep: Mapping[str, Sequence[Any]],
    *,
    weight_tx: Any = None,
    arch_tx: Any = None,
    strategy: Any = None,
    data: Any = None,
    sources: Mapping[str, str] | None = None,
    out: IO[str] | None = None,
) -> PopulationResult:
    """Searches with every combination of the swept values; the same call again resumes, or reports them again.

    Each member is the search that `search` makes of its config, and can be resumed and reported as one. A member that
    fails is named and the others go on. A larger sweep in the same workdir keeps the members that are there.

    Args:
      config: what the members share; `run.devices` are shared out, one a member.
      workdir: the folder of the population.
      sweep: name -> values, as {"seed": range(5), "lambda1": [0.01, 0.02]}; `sweep.sweepable` lists the names.
      weight_tx, arch_tx, strategy, data: as in `search`; what a caller's own object freezes cannot be swept.
      sources: where each value of the config comes from, kept in config.json.
      out: where notes go (default: stdout).

    Returns:
      PopulationResult. SIGTERM, SIGHUP, Ctrl-C and the time limit end it early with everything saved.

    Raises:
      UserError: a sweep, config, data set or workdir that is not possible; nothing is changed on disk.
    """
    workdir = expanded(workdir, "workdir")
    check_writable(workdir)
    sharding.visible()
    if jax.process_count() > 1:
        raise UserError(f"sweep: {jax.process_count()} processes are not possible; allowed: one, with its devices")
    config = search_inputs.with_method(config, strategy)
    given = {"weight_tx": weight_tx, "arch_tx": arch_tx, "strategy": strategy}
    own = [group for group, tx in (("weights", weight_tx), ("arch", arch_tx)) if tx is not None]
    members = sweeps.members(config, sweep, workdir, own)
    devices = sharding.choose_devices(config.run.devices)[: len(members)]
    prepared: list[_Prepared] = []
    strategies: dict[str, Strategy] = {}  # one for each setting of the method: to compare programs takes a second each
    for member in members:
        like = prepared[0].inputs if prepared else None
        inputs = search_inputs.prepare(member.config, data=data, like=like, **given)
        method = json.dumps(schema.to_dict(member.config.method))
        shared = strategies.setdefault(method, inputs.problem.strategy)
        if shared is not inputs.problem.strategy:
            inputs = inputs._replace(problem=inputs.problem._replace(strategy=shared))
        named = {**(sources or {}), **dict.fromkeys(member.values, "sweep")}
        document = search_inputs.document(member.config, inputs, named)
        if len(devices) > 1:
            # A resumed search that is not side by side with as many others is told that its last bits may differ.
            document["platform"]["devices"] = f"1 of {len(devices)} side by side"
            document["devices"] = sharding.describe(sharding.make_mesh(devices))
        prepared.append(_Prepared(member, inputs, document))
    same_programs({one.member.name: (one.inputs.problem, one.inputs.digests) for one in prepared})
    values = {path: list(dict.fromkeys(m.values[path] for m in members)) for path in members[0].values}
    listed = {
        "schema_version": POPULATION_SCHEMA,
        "kind": "population",
        "sweep": values,
        "members": [member.name for member in members],
    }
    _check(workdir, prepared)
    with WorkdirLock(workdir), StopRequest() as stop:
        _check(workdir, prepared)  # again, now that no other process can change it
        changed = _read(workdir) != listed
        if config.run.overwrite:
            (workdir / "report.html").unlink(missing_ok=True)
        if changed:
            atomic_write_json(workdir / POPULATION, listed)
        notes = out if out is not None else sys.stdout
        return _Population(config, prepared, devices, workdir, notes, stop).go(changed)


def _read(workdir: Path) -> Any:
    path = workdir / POPULATION
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _check(workdir: Path, prepared: Sequence[_Prepared]) -> None:
    """Refuses a folder of something else, and members' folders that hold other searches. Changes nothing."""
    if not workdir.is_dir():
        return
    found, path = _read(workdir), workdir / POPULATION
    allowed = "allowed: a new folder or one of a population"
    if path.is_file():
        if not isinstance(found, dict) or found.get("kind") != "population":
            raise UserError(f"workdir: {path} does not name a population; {allowed}")
        if found.get("schema_version") != POPULATION_SCHEMA:
            version = found.get("schema_version")
            raise UserError(f"workdir: {path} has schema_version {version!r}; {allowed} with {POPULATION_SCHEMA}")
    else:
        unfinished = (".lock", f".{POPULATION}.*.tmp")  # what a kill in the first moment leaves
        foreign = sorted(p.name for p in workdir.iterdir() if not any(p.match(name) for name in unfinished))
        if foreign:
            raise UserError(f"workdir: {workdir} holds {foreign[0]!r} and no {POPULATION}; {allowed}")
    for member, _, document in prepared:
        overwrite, compared = member.config.run.overwrite, search_inputs.compared
        check_workdir(workdir / member.name, document, overwrite=overwrite, compared=compared)


class _Population:
    """One start of a population."""

    def __init__(
        self,
        config: SearchConfig,
        prepared: Sequence[_Prepared],
        devices: Sequence[jax.Device],
        workdir: Path,
        notes: IO[str],
        stop: StopRequest,
    ) -> None:
        self.prepared, self.devices, self.workdir, self.notes, self.stop = prepared, devices, workdir, notes, stop
        # Bars of several members would overwrite each other.
        bars = config.run.progress in ("auto", "bar") and len(devices) > 1
        self.run = dataclasses.replace(config.run, progress="lines") if bars else config.run
        self.began = time.monotonic()
        self.shared = Shared(prepared[0].inputs)
        self.compiled = False
        self.results: dict[str, SearchResult] = {}
        self.failures: dict[str, str] = {}

    def go(self, changed: bool) -> PopulationResult:
        """Runs the members, then writes the report; `changed`: whether the list of members is a new one."""
        waiting = deque(self.prepared)
        active: list[_Active | None] = [None] * len(self.devices)
        compute = self._compute()
        try:
            while True:
                for i, device in enumerate(self.devices):
                    while active[i] is None and waiting and not self._leaving():
                        active[i] = self._start(waiting.popleft(), device)
                if not any(active):
                    break
                done = compute([one.work if one else None for one in active])
                self.compiled = True
                active = [one and self._go_on(one.name, one.run, d) for one, d in zip(active, done, strict=True)]
        finally:
            for one in active:
                if one is not None:
                    one.run.close()
        return self._result(changed)

    def _compute(self) -> Callable[[Sequence[Work | None]], Sequence[Done | None]]:
        if len(self.devices) == 1:
            return lambda works: [work and work.done() for work in works]
        inputs = self.prepared[0].inputs
        return SideBySide(inputs.problem, self.devices, inputs.dataset)

    def _leaving(self) -> bool:
        """Whether no other member is started; a time limit, however short, leaves time for a dispatch."""
        limit = self.run.time_limit
        return bool(self.stop) or (self.compiled and limit > 0 and time.monotonic() - self.began > 60 * limit)

    def _start(self, prepared: _Prepared, device: jax.Device) -> _Active | None:
        member, inputs, document = prepared
        run = dataclasses.replace(member.config.run, progress=self.run.progress)
        start = Start(run, self.workdir / member.name, self.notes, self.stop, None, document)
        start = start._replace(label=member.name, compiled=self.compiled, began=self.began)
        start = start._replace(side_by_side=len(self.devices) > 1)
        inputs = inputs._replace(mesh=sharding.make_mesh([device]))
        return self._go_on(member.name, search_loop.dispatches(member.config, inputs, start, self.shared), None)

    def _go_on(self, name: str, run: Run, done: Any) -> _Active | None:
        """A member up to its next dispatch, or its end."""
        try:
            return _Active(name, run, run.send(done))
        except StopIteration as end:
            self.results[name] = end.value
        except (RunError, UserError) as error:
            self.failures[name] = str(error)
            warn(f"{name} failed: {error}; the other members go on")
        return None

    def _result(self, changed: bool) -> PopulationResult:
        statuses = {result.status for result in self.results.values()}
        ended = len(self.failures) + sum(r.genotype is not None for r in self.results.values()) == len(self.prepared)
        if not ended:
            status = "interrupted" if self.stop else "time-limit"
        elif self.failures:
            status = "failed"
        else:
            status = "already-finished" if statuses == {"already-finished"} else "finished"
        result = PopulationResult(status, self.results, self.failures, self.workdir, None, self.stop.signum)
        if not ended:
            return result
        path = report_path(self.workdir)
        if path is None or changed or status != "already-finished":
            draw("population", {"report.html": self._report})
            path = report_path(self.workdir)
        return result._replace(report=path)

    def _report(self) -> None:
        from prdarts_jax.report import page

        page.report([self.workdir])
