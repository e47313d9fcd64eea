"""Decoded sets kept as arrays in the user's cache directory: decoding CIFAR-10 takes seconds, reading it back does not.

A cache only ever saves time: a damaged, stale or unwritable one is reported on the log and otherwise ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from prdarts_jax.config.places import cache_folder
from prdarts_jax.data.arrays import Arrays, digest
from prdarts_jax.errors import first_line

log = logging.getLogger(__name__)

# Part of every key: raise it when the decoding itself changes, so that arrays of an older decoder are not used.
DECODER_VERSION = 2

# A damaged zip archive of arrays surfaces as any of these, depending on where the damage lies.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


def file_identity(name: str, root: Path, files: Iterable[Path]) -> str:
    """A key for the files behind a decoded set: their names, sizes and modification times, not their content.

    Args:
        name: what is read from them (source, version).
        root: the directory that holds them.
        files: files under `root`.

    Returns:
        64 hexadecimal digits.
    """
    rows = [(str(f.relative_to(root)), s.st_size, s.st_mtime_ns) for f in sorted(files) for s in [f.stat()]]
    return hashlib.sha256(json.dumps([DECODER_VERSION, name, str(root.resolve()), rows]).encode()).hexdigest()


def cached(name: str, key: str, decode: Callable[[], Arrays], cache_dir: Path | None = None) -> Arrays:
    """The arrays cached under `key`, else those of `decode()`, which are then cached.

    Args:
        name: readable part of the cache file's name.
        key: identity of what is decoded (see `file_identity`).
        decode: reads and decodes the set; its errors pass through.
        cache_dir: default `cache_folder("data")`; where there is none, nothing is cached.
    """
    folder = cache_dir or cache_folder("data")
    if folder is None:
        return decode()
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{key[:20]}.npz"
    arrays = _read(path, key)
    if arrays is None:
        arrays = decode()
        _write(path, key, arrays)
    return arrays


def _read(path: Path, key: str) -> Arrays | None:
    if not path.exists():
        return None
    try:
        # Opened here: np.load leaves its own file open where the zip directory is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = Arrays(*(stored[field] for field in Arrays._fields))
            arrays = arrays._replace(class_names=tuple(map(str, arrays.class_names)))
            intact = str(stored["key"]) == key and str(stored["digest"]) == digest(arrays)
    except _DAMAGE as error:
        log.warning("data cache %s is damaged and ignored (%s)", path, first_line(error))
        return None
    if not intact:
        log.warning("data cache %s is damaged and ignored (its digest differs)", path)
        return None
    return arrays


def _write(path: Path, key: str, arrays: Arrays) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own per process: two runs that decode the same set must not write into one file.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem + ".", suffix=".tmp")
        with os.fdopen(handle, "wb") as out:
            fields = arrays._asdict() | {"class_names": np.array(arrays.class_names, dtype=np.str_)}
            np.savez(out, **fields, key=np.array(key), digest=np.array(digest(arrays)))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("data cache %s cannot be written (%s); the set will be decoded again", path, first_line(error))
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
