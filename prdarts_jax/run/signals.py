"""SIGTERM, SIGHUP and Ctrl-C as a wish that the loop reads where it can save."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Self

from prdarts_jax.devices.launch import handling


class StopRequest(contextlib.ExitStack):
    """Within the context, SIGTERM, SIGHUP and SIGINT only set a flag; a second Ctrl-C raises KeyboardInterrupt at once.

    Python allows handlers in the main thread alone; elsewhere the context does nothing.

    >>> with StopRequest() as stop:
    ...     bool(stop)
    ...     signal.raise_signal(signal.SIGTERM)
    ...     bool(stop), stop.signum == signal.SIGTERM
    False
    (True, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.signum: int | None = None  # the first signal that came
        self._interrupts = 0

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
        self.enter_context(handling(self._handle))
        return self
