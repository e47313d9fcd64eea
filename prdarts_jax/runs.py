"""What every kind of run shares, whatever it computes: its workdir, the user's own code, rows an epoch, versions."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from prdarts_jax.config import schema
from prdarts_jax.config.search import RunConfig
from prdarts_jax.config.source_digest import uncomparable
from prdarts_jax.data.stream_source import AnyDataset
from prdarts_jax.devices import sharding
from prdarts_jax.errors import RunError, UserError, warn
from prdarts_jax.ops import kernels
from prdarts_jax.workdir import WorkdirLock, atomic_write_text

_PACKAGES = ("prdarts-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ONE_PROCESS = {"processes": 1, "distributed": False}  # where a config.json does not say it
NOUNS: Mapping[str, str] = {"search": "search", "train": "training"}  # kind in config.json -> what messages call it


# --- the workdir ------------------------------------------------------------------------------------------------------


def check_workdir(
    workdir: Path,
    document: Mapping[str, Any],
    *,
    overwrite: bool,
    compared: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> dict[str, Any] | None:
    """The config.json of the run in the workdir, or None where a run can start anew.

    Args:
      workdir: the folder; nothing in it is changed.
      document: config.json of the run that is to start.
      overwrite: whether a run of the same kind may be replaced.
      compared: from such a document to the flat fields that a resumed run must share.

    Raises:
      UserError: the folder holds another run, a run of another kind, or something else.
    """
    path, noun = workdir / "config.json", NOUNS[document["kind"]]
    if not workdir.is_dir():
        return None
    if not path.is_file():
        foreign = _others(workdir)
        if foreign:
            raise UserError(
                f"workdir: {workdir} holds {foreign[0]!r} and no config.json; allowed: a new folder or one of a {noun}"
            )
        return None
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        old = json.loads(text)
    except ValueError:
        old = None
    if not isinstance(old, dict):
        if not _is_torn(text, workdir, document):
            raise _no_run(path, noun)
        if not overwrite:
            raise UserError(f"workdir: {path} is half a config of a {noun}; --overwrite starts again")
        return None
    kind, version = old.get("kind"), old.get("schema_version")
    if kind != document["kind"]:
        if isinstance(kind, str) and kind in NOUNS:
            raise UserError(f"workdir: {workdir} holds a {NOUNS[kind]}; allowed: a new folder or one of a {noun}")
        raise _no_run(path, noun)
    if version != document["schema_version"]:
        known = document["schema_version"]
        raise UserError(f"workdir: {path} has schema_version {version!r}; allowed: a new folder or one with {known}")
    if overwrite:
        return None
    try:
        before = compared(old)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        damaged = f"{path} is a damaged config of a {noun} ({reason})"
        raise UserError(f"workdir: {damaged}; --overwrite starts again") from None
    differences = schema.differences(before, compared(document))
    if differences:
        raise UserError(
            f"workdir: {workdir} holds another {noun} ({'; '.join(differences)}); "
            "use another --workdir, or --overwrite to start again"
        )
    return old


# What a process leaves that was killed in its first moment: its lock, perhaps a half-written config.
_UNFINISHED = (".lock", ".config.json.*.tmp")


def _others(workdir: Path) -> list[str]:
    """Names in the folder, but for those of a run killed in its first moment."""
    return sorted(p.name for p in workdir.iterdir() if not any(p.match(name) for name in _UNFINISHED))


def _is_torn(text: str, workdir: Path, document: Mapping[str, Any]) -> bool:
    """Whether a config.json that is no JSON is the beginning of one of ours: only then may its folder be cleared."""
    head = json.dumps({name: document[name] for name in ("schema_version", "kind")}, indent=2).removesuffix("\n}")
    # A few characters say little: then nothing else may be there that could be somebody's.
    return text.startswith(head) or (head.startswith(text) and _others(workdir) == ["config.json"])


def _no_run(path: Path, noun: str) -> UserError:
    # Without a word of --overwrite: what lies beside a foreign config.json may bear the names of our files.
    return UserError(f"workdir: {path} is not the config of a {noun}; allowed: a new folder or one of a {noun}")


def clear(workdir: Path, own: Iterable[str]) -> None:
    """Removes a run's own files and folders, in this order, and nothing else."""
    for name in own:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def report_path(workdir: Path) -> Path | None:
    """WORKDIR/report.html if it is there."""
    path = workdir / "report.html"
    return path if path.is_file() else None


def no_report(noun: str, error: Exception) -> RunError:
    """The error of a run that is finished but for its report; the next start makes it."""
    return RunError(f"the {noun} is finished, its report could not be written: {error}; start it again for the report")


def lock(workdir: Path) -> contextlib.AbstractContextManager[object]:
    """The lock on a workdir; processes of one distributed run share it, so only the first of them takes it."""
    return WorkdirLock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()


class EpochLog:
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

    def write(self, epoch: int, **values: Any) -> None:
        """Append the row of an epoch.

        Raises:
          RunError: the file could not be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"epoch": epoch, **values}) + "\n")
        except OSError as error:
            raise RunError(f"{self._path} could not be written: {error.strerror or error}") from error


def check_tensorboard(run: RunConfig) -> None:
    """Refuses `run.tensorboard` without the package that writes it.

    >>> check_tensorboard(cfg.RunConfig(tensorboard=False))
    """
    if run.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("run.tensorboard: True needs the package tensorboardX; allowed: false, or install tensorboardX")


# --- the user's own code ----------------------------------------------------------------------------------------------


# --- config.json ------------------------------------------------------------------------------------------------------


def document(
    kind: str,
    config: Any,
    *,
    sources: Mapping[str, str] | None,
    digests: Mapping[str, str],
    dataset: AnyDataset,
    mesh: Mesh,
    **more: Any,
) -> dict[str, Any]:
    """The content of config.json: what is computed, on what, by which versions."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": kind,
        "config": schema.to_dict(config),
        "sources": dict(sources or {}),
        "digests": dict(digests),
        "data": {
            "name": dataset.name,
            "classes": list(dataset.class_names),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
        },
        **more,
        "versions": versions(),
        "devices": sharding.describe(mesh),
        "platform": {
            "backend": jax.default_backend(),
            "cores": _cores(),
            "cpu_kernels": kernels.kernels().description,
            "devices": mesh.size,
            "processes": jax.process_count(),
            # On CPU other collectives are used then, of one process as of many: their sums have another order.
            "distributed": jax.distributed.is_initialized(),
        },
    }


@functools.cache
def warn_without_kernels(why: str) -> None:
    """One line, once, where a computer could have the CPU kernels and has not."""
    if not why.startswith(("native ", "off ")) and why != "no CPU":
        warn(f"no CPU kernels ({why}): steps take twice as long or more; {kernels.SWITCH}=off says no more of it")


def compared(document: Mapping[str, Any], kind: type, files: Iterable[str]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed run must share: what is computed.

    Args:
      document: content of config.json.
      kind: the config class.
      files: fields that say where something lies; what lies there is compared by its digest.
    """
    flat = schema.computed(schema.from_dict(kind, document["config"]))
    for field in files:
        flat.pop(field)
    if flat["local_batch_norm"]:  # then how the batch is split decides what is computed
        flat["devices of local_batch_norm"] = document["platform"]["devices"]
    return flat | {f"digest of {name}": value for name, value in document["digests"].items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tolerance(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why a resumed run may differ in its last bits from one that was not interrupted; empty if it may not.

    >>> tolerance({"platform": {"cores": 2}}, {"platform": {"cores": 4}})
    ['cores 2 -> 4']
    """
    before = {**_ONE_PROCESS, **old.get("versions", {}), **old.get("platform", {})}
    after = {**_ONE_PROCESS, **new.get("versions", {}), **new.get("platform", {})}
    changed = [
        f"{k} {before.get(k)} -> {after.get(k)}" for k in sorted(before | after) if before.get(k) != after.get(k)
    ]
    hidden = {field: uncomparable(digest) for field, digest in new.get("digests", {}).items()}
    return changed + [f"uncomparable: {types} in {field}" for field, types in hidden.items() if types]


# --- small pieces -----------------------------------------------------------------------------------------------------


def padded(order: np.ndarray, length: int) -> np.ndarray:
    """Batches [S,B] up to the fixed length of a dispatch; the loop never reaches the repeated ones.

    >>> padded(np.array([[3, 4]]), 2).tolist()
    [[3, 4], [3, 4]]
    """
    return np.concatenate([order, np.repeat(order[:1], length - len(order), axis=0)]) if len(order) < length else order
