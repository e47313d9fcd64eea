"""Failures of storage as one line: their reason, and the silence of libraries that would print pages about them."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

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
    first = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    return first if len(first) <= 160 else first[:157] + "..."


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


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def silence_writers() -> None:
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
