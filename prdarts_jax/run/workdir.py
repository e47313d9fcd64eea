"""The folder of a run: whether it can be written, who holds it, files that are never half-written. Imports no jax."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from prdarts_jax.config import schema
from prdarts_jax.config.places import expanded
from prdarts_jax.errors import RunError, UserError, brief, warn

T = TypeVar("T")


_SPARE_BYTES, _SPARE_FILES = 64 * 1024, 32  # metadata, manifests and digests beside the arrays


def reason(error: BaseException) -> str:
    """The shortest true account of an error; tensorstore nests the error of the system in a page of context.

    >>> reason(OSError(28, "No space left on device", "/a/long/path"))
    'No space left on device'
    >>> reason(ValueError("RESOURCE_EXHAUSTED: Error writing ... [os_error_code='28']"))
    'No space left on device'
    >>> reason(ValueError("DATA_LOSS: bad header\\n  and more"))
    'DATA_LOSS: bad header'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    return brief(error)


def require_room(directory: Path, size: int) -> None:
    """Refuse a write that cannot fit before it makes a half of it.

    Args:
        directory: an existing folder.
        size: bytes to be written.

    Raises:
        OSError: ENOSPC, too few free bytes or files.
    """
    disk = os.statvfs(directory)
    full = disk.f_bavail * disk.f_frsize < size + _SPARE_BYTES
    if full or (disk.f_files and disk.f_favail < _SPARE_FILES):  # 0 files: the file system does not count them
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader, or a kill, finds the old content or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        text: the whole new content.

    Raises:
        RunError: it could not be written (full disk, read-only); the old content is left.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write_text(Path(folder) / "a.txt", "new")
    ...     (Path(folder) / "a.txt").read_text()
    'new'
    """
    # A name of the file system that is no UTF-8 has surrogates in it; what is written for them JSON reads as they are.
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """`atomic_write_text` of bytes.

    Raises:
        RunError: it could not be written; the old content is left.
    """
    path = Path(path)
    # Beside the target: os.replace is atomic only within one file system. The pid keeps two writers apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write_text` of a JSON value, indented, with a final newline.

    Raises:
        RunError: it could not be written; the old content is left.
        TypeError: JSON cannot hold the value; nothing is written.
    """
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_name(path: Path) -> None:
    """Whether checkpoints can lie there: their library names files in UTF-8, whatever Python and the locale do.

    Raises:
        UserError: the name of the folder has other bytes than in UTF-8.

    >>> check_name(Path(os.fsdecode(bytes([77, 246, 119, 101]))))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: workdir: M\\udcf6we is not named in UTF-8; allowed: another name, or the locale of UTF-8 (PYTHONUTF8=1)
    """  # noqa: E501 (the message is one line)
    name = os.path.abspath(path)
    if os.fsencode(name) != name.encode("utf-8", "replace"):
        shown = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
        raise UserError(
            f"workdir: {shown} is not named in UTF-8; allowed: another name, or the locale of UTF-8 (PYTHONUTF8=1)"
        )


def check_writable(path: Path) -> None:
    """Whether a workdir could be made and written, found out without leaving anything behind.

    Raises:
        UserError: it, or the nearest folder above it that exists, is a file or cannot be written.

    >>> check_writable(Path("/dev/null/run"))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: workdir: /dev/null/run cannot be made: /dev/null is not a folder; name another folder
    """
    path = expanded(path, "workdir").absolute()
    check_name(path)
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    verb = "used" if existing == path else "made"
    if not existing.is_dir():
        raise UserError(f"workdir: {path} cannot be {verb}: {existing} is not a folder; name another folder")
    try:
        # Only a real file tells: permission bits say nothing to root, on a read-only or on a full file system.
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as error:
        why = f"{existing} cannot be written ({reason(error)})"
        raise UserError(f"workdir: {path} cannot be {verb}: {why}; name another folder") from error


def prepared_for(workdir: Path, prepare: Callable[[], T]) -> T:
    """What `prepare` makes, on every process, for a run in a workdir that can be written.

    Raises:
      UserError: see `check_writable`, or what `prepare` raises; on all processes.
    """
    from prdarts_jax.devices import processes  # which imports jax

    def checked() -> T:
        if processes.is_first():
            check_writable(workdir)
        return prepare()

    return processes.prepared(checked)


class WorkdirLock:
    """One run a workdir: an advisory lock on WORKDIR/.lock that ends with its process, however that ends.

    The folder is made if absent; the file `.lock` stays (removing it would let two processes lock two files).
    Processes of one distributed run share a workdir, so only one of them may take it (`claim` is called by the first).

    Raises (on entering):
        UserError: another process holds it, or the folder cannot be locked.

    >>> with tempfile.TemporaryDirectory() as folder, WorkdirLock(Path(folder)):
    ...     Path(folder, ".lock").read_text() == f"{os.getpid()}\\n"
    True
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir = expanded(workdir, "workdir").absolute()

    def __enter__(self) -> Self:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            # Not inherited by programs this one starts (PEP 446), so that they cannot outlive it as holders.
            self._file = os.open(self._workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"workdir: {self._workdir} cannot be used: {reason(error)}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                in_use = f"{self._workdir} is in use by process {holder}"
                raise UserError(f"workdir: {in_use}; wait for it, stop it or name another folder") from None
            raise UserError(f"workdir: {self._workdir} cannot be locked: {reason(error)}") from error
        with contextlib.suppress(OSError):  # a full disk must not stop a run that only has to read and report
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._file)


# kind in config.json -> what messages call it
NOUNS: Mapping[str, str] = {"search": "search", "train": "training", "pipeline": "pipeline"}


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
    allowed = f"allowed: a new folder or one of a {noun}"
    if not workdir.is_dir():
        return None
    others = _others(workdir)
    if not path.is_file():
        if others:
            raise UserError(f"workdir: {workdir} holds {others[0]!r} and no config.json; {allowed}")
        return None
    # Without a word of --overwrite: what lies beside a foreign config.json may bear the names of our files.
    foreign = UserError(f"workdir: {path} is not the config of a {noun}; {allowed}")
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        old = json.loads(text)
    except ValueError:
        old = None
    if not isinstance(old, dict):
        if not _is_torn(text, others, document):
            raise foreign
        if not overwrite:
            raise UserError(f"workdir: {path} is half a config of a {noun}; --overwrite starts again")
        return None
    kind, version, known = old.get("kind"), old.get("schema_version"), document["schema_version"]
    if kind != document["kind"]:
        if isinstance(kind, str) and kind in NOUNS:
            raise UserError(f"workdir: {workdir} holds a {NOUNS[kind]}; {allowed}")
        raise foreign
    if version != known:
        raise UserError(f"workdir: {path} has schema_version {version!r}; allowed: a new folder or one with {known}")
    if overwrite:
        return None
    try:
        before = compared(old)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = f"{path} is a damaged config of a {noun} ({' '.join(str(error).split())})"
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


def _is_torn(text: str, names: Sequence[str], document: Mapping[str, Any]) -> bool:
    """Whether a config.json that is no JSON is the beginning of one of ours: only then may its folder be cleared."""
    head = json.dumps({name: document[name] for name in ("schema_version", "kind")}, indent=2).removesuffix("\n}")
    # A few characters say little: then nothing else may be there that could be somebody's.
    return text.startswith(head) or (head.startswith(text) and list(names) == ["config.json"])


def claim(
    lock: contextlib.ExitStack,
    workdir: Path,
    document: Mapping[str, Any],
    *,
    overwrite: bool,
    compared: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    own: Iterable[str],
) -> dict[str, Any] | None:
    """Takes a workdir for a run: checks it, locks it, clears it if it is to be overwritten, writes config.json.

    Of several processes the first alone calls it (`processes.on_first`): two would not both get the lock.

    Args:
      lock: holds the lock from now on.
      workdir, document, overwrite, compared: as in `check_workdir`.
      own: the files and folders a run of this kind writes, in the order in which they are cleared.

    Returns:
      the config.json of the run that goes on here, or None where one begins.

    Raises:
      UserError: see `check_workdir`, or the workdir is in use; nothing is changed.
    """

    def check() -> dict[str, Any] | None:
        return check_workdir(workdir, document, overwrite=overwrite, compared=compared)

    check()
    lock.enter_context(WorkdirLock(workdir))
    old = check()  # again, now that no other process can change it
    for path in (workdir / name for name in own) if overwrite else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if old is None:
        atomic_write_json(workdir / "config.json", document)
    return old


def report_path(workdir: Path) -> Path | None:
    """WORKDIR/report.html if it is there."""
    path = workdir / "report.html"
    return path if path.is_file() else None


def draw(noun: str, parts: Mapping[str, Callable[[], object]]) -> None:
    """Makes the pictures and the report of a finished run, each if it can be made; what fails is one line.

    Args:
      noun: what the run is called.
      parts: what messages call a part -> what makes it.

    >>> draw("search", {"its report": lambda: 1 / 0})  # a line on stderr
    """
    failures = {}
    for name, make in parts.items():
        try:
            make()
        except Exception as error:
            kind = "" if isinstance(error, OSError | RunError | UserError) else f"{type(error).__name__}: "
            failures[name] = f"{kind}{brief(error)}"
    if failures:
        why = next(iter(failures.values()))
        names = ", ".join(failures)
        warn(f"the {noun} is finished, but not made: {names} ({why}); the same command makes what is missing")
