"""Checkpoints that are complete, verified and asynchronous; the only module that knows orbax.

A step directory holds two orbax items and one list of file digests:

    <directory>/<step>/state        the leaves of the state, one array a path
    <directory>/<step>/info         JSON: the caller's info, and shape, dtype and SHA-256 of every leaf
    <directory>/<step>/SHA256SUMS   SHA-256 of every file (`sha256sum -c SHA256SUMS` checks it by hand)

Orbax does not checksum: a flipped byte restores as a wrong number. The file digests find it before a parser sees the
bytes, the leaf digests prove that the arrays that come out are the arrays that went in.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from prdarts_jax.devices.processes import is_first, share, together
from prdarts_jax.errors import RunError, UserError, warn
from prdarts_jax.run import digests
from prdarts_jax.run.digests import HostLeaf, by_path, dtype_name, flatten_digests, host_leaves, is_key, json_digest
from prdarts_jax.run.workdir import atomic_write_text, check_name, reason, require_room

__all__ = ["Checkpointer", "Restored", "flatten_digests"]

_FORMAT = 1
_SUMS = "SHA256SUMS"
_TMP = ".orbax-checkpoint-tmp"
_ITEMS = ("info", "state")


class Restored(NamedTuple):
    """A verified checkpoint."""

    step: int
    state: Any  # the tree of the target
    info: dict[str, Any]


class _Damage(Exception):
    """This checkpoint cannot be used; the message is the reason."""


def _place(value: np.ndarray, like: Any) -> Any:
    """A host array as the kind of leaf, and with the sharding, of the target's leaf."""
    if isinstance(like, bool | int | float | complex) and not isinstance(like, np.generic):
        return type(like)(value.item())
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    sharding = None if isinstance(like, jax.Array) and not like.committed else getattr(like, "sharding", None)
    if is_key(like):
        # The generator of an abstract key can be asked of a concrete one alone.
        impl = jax.random.key_impl(jnp.empty((), like.dtype))
        keys = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
        return keys if sharding is None else jax.device_put(keys, sharding)
    if getattr(like, "weak_type", False) and value.ndim == 0 and np.isfinite(value):
        # Weak types decide later promotions, hence the bits; only Python numbers make them.
        weak = jnp.asarray(value.item())
        return weak if sharding is None else jax.device_put(weak, sharding)
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
    """Asynchronous, verified checkpoints of a run, newest `keep` of them.

    Use it as a context manager: leaving it waits for the save in flight, also when an exception leaves it. Opening it
    touches nothing on disk; the directory is made, and left-overs of a killed run are removed, by the first save.
    Of a run of several processes one writes, and waits for no other (`restore_latest`).

    Args:
        directory: where the step directories live (made absolute; need not exist).
        keep: how many complete checkpoints stay; an older one goes only after the newer one is complete.
        epochs, epoch_steps: of those at the end of an epoch of so many steps so many stay, beside them.
        warn: called with one line for each checkpoint that cannot be used.
        writes: False on a process that leaves it to another one, which has the same state.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d, Checkpointer(Path(d) / "checkpoints") as checkpoints:
    ...     checkpoints.save(3, {"w": jnp.ones(2)}, {"epoch": 1})
    ...     step, state, info = checkpoints.restore_latest({"w": jnp.zeros(2)})
    >>> step, state["w"].tolist(), info
    (3, [1.0, 1.0], {'epoch': 1})
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        epochs: int = 0,
        epoch_steps: int = 1,
        warn: Callable[[str], None] = warn,
        writes: bool = True,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep: {keep} checkpoints; allowed: an integer >= 1")
        _silence_writers()
        self._directory = Path(directory).expanduser().resolve()
        check_name(self._directory)
        self._keep, self._warn, self._writes = keep, warn, writes
        self._epochs, self._epoch_steps = epochs, epoch_steps
        self._writer: ocp.AsyncCheckpointer | None = None
        self._pending: int | None = None  # the step being written
        self._aside: set[int] = set()  # newer than the restored one: moved away by the next save

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except RunError as failed:
            if error is None:
                raise
            self._warn(str(failed))  # the exception on its way says why the run ends; it must not be replaced

    # Reading.

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first (complete: written to the end, not yet verified)."""
        if not self._directory.is_dir():
            return []
        names = (re.fullmatch(r"(?:replaced-)?(\d+)", path.name) for path in self._directory.iterdir() if path.is_dir())
        return sorted({int(match.group(1)) for match in names if match} - self._aside)

    def restore_latest(self, target: Any | Callable[[Mapping[str, Any]], Any]) -> Restored | None:
        """The newest checkpoint whose digests verify, or None where there is none.

        A damaged one is reported by one line and the one before it is tried. Checkpoints newer than the restored one
        belong to a history that is no longer continued: they disappear from `steps`, and the next save moves them to
        `set-aside-<step>`. Of several processes, which all must call it, the first reads and sends the others what it
        reads: they need not see its disk.

        Args:
            target: a state, concrete or abstract (`jax.eval_shape`); arrays take its shardings where it has them,
                Python numbers and NumPy arrays come back as such. Or a function of a checkpoint's info that makes it.

        Raises:
            UserError: `target` has other leaves, shapes or dtypes than an intact checkpoint; on every process.
            RunError: there are checkpoints, and none can be used; on every process.
        """
        self.wait()
        of: Callable[[Mapping[str, Any]], Any] = target if callable(target) else lambda info: target
        newest = together(lambda: self._newest(of) if is_first() else None)
        head = share(None if newest is None else [newest.step, newest.info])[0]
        if head is None:
            return None
        target = of(head[1])
        likes = by_path(target)
        leaves = {path: _blank(like) for path, like in likes.items()}
        values = {path: leaf.value for path, leaf in leaves.items()} if newest is None else newest.state
        placed = [_place(_from_first(values[path]), like) for path, like in likes.items()]
        return Restored(head[0], jax.tree.unflatten(jax.tree.structure(target), placed), head[1])

    def rewind(self, step: int) -> None:
        """Removes the checkpoints after a step, the newest first: a kill leaves a history without a gap.

        Raises:
            RunError: the save in flight failed, or there is no checkpoint of the step.
        """
        self.wait()
        if not self._writes:
            return
        if step not in self.steps():
            raise RunError(f"there is no checkpoint of step {step} in {self._directory} to go back to")
        for newer in reversed([later for later in self.steps() if later > step]):
            shutil.rmtree(self._path(newer), ignore_errors=True)

    def _newest(self, target: Callable[[Mapping[str, Any]], Any]) -> Restored | None:
        """The checkpoint that `restore_latest` restores; its state as host arrays by path."""
        steps, reasons = self.steps(), []
        for step in reversed(steps):
            try:
                document = self._document(step)
                leaves = {path: _blank(like) for path, like in by_path(target(document["info"])).items()}
                state = self._state(step, document["leaves"], leaves)
            except UserError:
                raise
            except Exception as error:  # parsers of damaged bytes fail in any way
                damage = str(error) if isinstance(error, _Damage) else reason(error)
                reasons.append(f"step {step}: {damage}")
                where = f"checkpoint at step {step} in {self._directory}"
                self._warn(f"{where} cannot be used: {damage}; trying the one before it")
                continue
            self._aside |= {newer for newer in steps if newer > step}
            return Restored(step, state, document["info"])
        if reasons:
            raise RunError(f"no checkpoint in {self._directory} can be used: {'; '.join(reasons)}")
        return None

    # Writing.

    def save(self, step: int, state: Any, info: Mapping[str, Any]) -> None:
        """Save asynchronously: on return the host copy is taken (donating `state` is safe), writing goes on.

        Saving a step again replaces it, or does nothing if nothing differs.

        Args:
            step: the number of the checkpoint, >= 0.
            state: any pytree of arrays; arrays over several processes must be replicated.
            info: what JSON can hold.

        Raises:
            RunError: the previous save or this one failed; the last good checkpoint is left as it was.
        """
        if not self._writes:
            return
        leaves = host_leaves(state)
        if not any(leaf.value.size for leaf in leaves.values()):
            raise ValueError("the state holds no number to save")
        document = {
            "format": _FORMAT,
            "info": json.loads(json.dumps(dict(info))),
            "leaves": {path: leaf.record() for path, leaf in leaves.items()},
        }
        document["sha256"] = json_digest(document)
        # Orbax cannot store arrays without elements; shape and dtype in the document restore them.
        arrays = {path: leaf.value for path, leaf in leaves.items() if leaf.value.size}
        self.wait()
        try:
            self._prepare()
            if step in self.steps():
                with contextlib.suppress(Exception):  # one that cannot be read is replaced
                    if self._document(step)["sha256"] == document["sha256"]:
                        return
                (self._directory / str(step)).rename(self._directory / f"replaced-{step}")
            require_room(self._directory, sum(array.nbytes for array in arrays.values()))
            if self._writer is None:
                self._writer = self._open_writer()
            self._pending = step
            self._writer.save(
                self._directory / str(step),
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), info=ocp.args.JsonSave(document)),
            )
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Block until the save in flight is complete, then delete what is older than the newest `keep`.

        Raises:
            RunError: that save failed.
        """
        if self._pending is None or self._writer is None:
            return
        step = self._pending
        try:
            self._writer.wait_until_finished()
            self._complete_sums(step)
            self._tidy()
            steps = self.steps()
            ends = [step for step in steps if step % self._epoch_steps == 0]
            for old in set(steps[: -self._keep]) - set(ends[max(len(ends) - self._epochs, 0) :]):
                shutil.rmtree(self._directory / str(old), ignore_errors=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = None

    def close(self) -> None:
        """Wait, then release the threads; a later save opens them again.

        Raises:
            RunError: the save in flight failed.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None and self._pending is None:
                self._writer.close()
                self._writer = None

    # Inside.

    def _path(self, step: int) -> Path:
        """A kill between the two renames of a replacement leaves only the set-back copy: it still counts."""
        path = self._directory / str(step)
        replaced = self._directory / f"replaced-{step}"
        return replaced if replaced.is_dir() and not path.is_dir() else path

    def _prepare(self) -> None:
        """Before writing: the directory exists, nothing half-written or abandoned is in it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tidy()
        for path in self._directory.glob("set-aside-*") if self._aside else ():
            shutil.rmtree(path, ignore_errors=True)
        for path in [self._directory / str(step) for step in self._aside]:
            if path.is_dir():
                path.rename(path.with_name(f"set-aside-{path.name}"))
        self._aside = set()

    def _tidy(self) -> None:
        """Remove what is half-written; what was to be replaced goes too, or back where nothing has replaced it."""
        for path in list(self._directory.iterdir()):
            final = self._directory / path.name.removeprefix("replaced-")
            if path.is_dir() and (_TMP in path.name or (path != final and final.is_dir())):
                shutil.rmtree(path, ignore_errors=True)
            elif path != final:
                path.rename(final)

    def _open_writer(self) -> ocp.AsyncCheckpointer:
        # Were the directories made in the background, a failure there would leave threads that wait for them, and
        # with them the process, for minutes.
        options = ocp.options.AsyncOptions(
            post_finalization_callback=self._write_sums, create_directories_asynchronously=False
        )
        alone = _alone()
        composite = ocp.CompositeOptions(async_options=options, multiprocessing_options=alone)
        handler = ocp.CompositeCheckpointHandler(composite_options=composite)
        return ocp.AsyncCheckpointer(handler, async_options=options, multiprocessing_options=alone)

    def _write_sums(self) -> None:
        """Called by orbax when all files are written and before the directory gets its final name."""
        for root in self._directory.glob(f"{self._pending}{_TMP}*"):
            files = (path for item in _ITEMS for path in (root / item).rglob("*") if path.is_file())
            (root / _SUMS).write_text(digests.sums(root, files), encoding="utf-8")

    def _complete_sums(self, step: int) -> None:
        """Orbax finishes its own files at the top level last; a kill before this leaves the items covered."""
        root = self._directory / str(step)
        if (root / _SUMS).is_file():
            rest = (path for path in root.iterdir() if path.is_file() and path.name != _SUMS)
            with contextlib.suppress(RunError):  # the checkpoint is complete without it
                atomic_write_text(root / _SUMS, (root / _SUMS).read_text(encoding="utf-8") + digests.sums(root, rest))

    def _failed(self, step: int, error: Exception) -> RunError:
        """Clear the wreck, put back what was being replaced, and say what is left."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
        self._pending, self._writer = None, None
        good: list[int] = []
        with contextlib.suppress(OSError):
            good = self.steps()
            self._tidy()
        left = f"the last good checkpoint is step {good[-1]}" if good else "there is no earlier checkpoint"
        return RunError(f"checkpoint at step {step} could not be written to {self._directory}: {reason(error)}; {left}")

    def _document(self, step: int) -> dict[str, Any]:
        """The JSON item of a step whose files are all as they were written."""
        path = self._path(step)
        missing = [item for item in _ITEMS if not (path / item).is_dir()]
        if missing:
            raise _Damage(f"the step directory has no {' and no '.join(missing)}")
        # No list is no damage: on storage without atomic renames there is no moment to write it.
        wrong = digests.wrong_files(path, _SUMS) if (path / _SUMS).is_file() else []
        if wrong:
            raise _Damage(f"{wrong[0]} is missing or differs from its digest")
        document = self._read(path, info=ocp.args.JsonRestore()).info
        if not isinstance(document, dict) or document.get("sha256") != json_digest(document):
            raise _Damage("info differs from its digest")
        if document["format"] != _FORMAT:
            raise UserError(
                f"checkpoint: step {step} in {self._directory} has format {document['format']}; "
                f"this version reads format {_FORMAT}"
            )
        return document

    def _state(self, step: int, records: Mapping[str, Any], leaves: Mapping[str, HostLeaf]) -> dict[str, np.ndarray]:
        """The host arrays of a step, by path, each as its record in the document says."""
        self._same_structure(step, records, leaves)
        values = {path: leaf.value for path, leaf in leaves.items()}
        stored = {path: value for path, value in values.items() if value.size}
        values |= self._read(self._path(step), state=ocp.args.StandardRestore(stored)).state
        for path, leaf in leaves.items():
            if leaf._replace(value=values[path]).record() != records[path]:
                raise _Damage(f"leaf {path} differs from its digest")
        return values

    def _same_structure(self, step: int, records: Mapping[str, Any], leaves: Mapping[str, HostLeaf]) -> None:
        """An intact checkpoint of another program: the user's mistake, never a reason to try an older one."""
        where = f"checkpoint: step {step} in {self._directory} does not fit this configuration or version"
        for path in [*leaves, *records]:
            if path not in records:
                raise UserError(f"{where}: it has no leaf {path}")
            if path not in leaves:
                raise UserError(f"{where}: its leaf {path} is unknown here")
            saved, here = (f"{leaf['dtype']}{leaf['shape']}" for leaf in (records[path], leaves[path].kind()))
            if saved != here:
                raise UserError(f"{where}: leaf {path} is {saved} there and {here} here")

    @staticmethod
    def _read(path: Path, **items: Any) -> Any:
        alone = _alone()
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(path, args=ocp.args.Composite(**items))


def _alone() -> ocp.options.MultiprocessingOptions:
    """For orbax: this process waits for no other. Else a full disk of one would be a deadlock of all."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}")


def _from_first(value: np.ndarray) -> np.ndarray:
    """An array as the first process has it: sent as bytes, since a sum of floats would lose -0 and NaNs."""
    if jax.process_count() == 1:
        return value
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).view(value.dtype).reshape(value.shape)


def _blank(like: Any) -> HostLeaf:
    """A leaf of the target, without its numbers."""
    plain = jax.eval_shape(jax.random.key_data, like) if is_key(like) else like
    dtype = plain.dtype if hasattr(plain, "dtype") else np.asarray(plain).dtype
    return HostLeaf(np.zeros(np.shape(plain), dtype), dtype_name(like), np.shape(like))


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _silence_writers() -> None:
    """Keep orbax and tensorstore from printing the errors that the caller raises as one line of its own.

    Orbax logs a failed write several times, with tracebacks. Tensorstore then reports the writes that were still
    under way to an event loop that orbax has closed, which Python prints as an exception that nobody can catch.
    """
    logging.getLogger("absl").addFilter(_not_from_orbax)  # adding it again changes nothing
    before = sys.unraisablehook
    if getattr(before, "__module__", None) == __name__:
        return

    def unraisable(report: Any) -> None:
        late = isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"
        if not (late and report.object is None):
            before(report)

    sys.unraisablehook = unraisable
