"""What is printed for people: a stream that is closed, full or cannot spell a name never stops the work."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class Steady(io.TextIOBase):
    """A text stream whose failures do not reach the one who prints.

    Characters that its encoding lacks are escaped. From the first write that fails on (a pipe whose reader is gone, a
    terminal that was closed, a full disk) everything goes nowhere, also what the stream had kept back.

    Args:
      stream: None, or closed: as Python has a standard stream whose descriptor was closed, everything goes nowhere.

    >>> ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    >>> print("Möwe", file=Steady(ascii), flush=True)
    >>> ascii.buffer.getvalue()
    b'M\\\\xf6we\\n'
    """

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__()
        self._stream = stream
        self.lost: Exception | None = None  # why nothing is written any more

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """As of any stream, but for the errors."""
        if self._stream is not None and self.lost is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:  # nothing of the text was written
                    self._stream.write(_spelled(text, self.encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """As of any stream, but for the errors."""
        if self._stream is not None and self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost = error
        # What the stream still holds would fail again at the end of the interpreter, and change the exit status.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number, nowhere = self.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The descriptor of the stream; OSError if it has none."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def close(self) -> None:
        """Leaves the stream open: it is its owner's."""
        self.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)


def _spelled(text: str, encoding: str) -> str:
    """The text with escapes for what the encoding lacks."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def steady() -> Iterator[tuple[Steady, Steady]]:
    """A block in which sys.stdout and sys.stderr are steady."""
    _fill_descriptors()
    out, err = Steady(sys.stdout), Steady(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out, err
        finally:
            out.flush()
            err.flush()


def _fill_descriptors() -> None:
    """Standard descriptors that are closed (`2>&-`) lead nowhere: else the next file opened, a checkpoint perhaps,
    would get the number, and with it what XLA writes for people."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
