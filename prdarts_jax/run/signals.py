"""SIGTERM and Ctrl-C as a wish that the loop reads where it can save."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within the context, SIGTERM and SIGINT only set a flag; a second Ctrl-C raises KeyboardInterrupt at once.

    Python allows handlers in the main thread alone; elsewhere the context does nothing.

    >>> with StopRequest() as stop:
    ...     bool(stop)
    ...     signal.raise_signal(signal.SIGTERM)
    ...     bool(stop), stop.signum == signal.SIGTERM
    False
    (True, True)
    """

    def __init__(self) -> None:
        self.signum: int | None = None  # the first signal that came
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.signum is None:
            self.signum = signum

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python and cannot be set back; the system's default is nearest.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
