"""What a person sees of a run while it goes on: a bar, or a line an epoch."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import IO, Any

from tqdm import tqdm

from prdarts_jax.errors import UserError
from prdarts_jax.run.output import Steady


def _short(value: Any) -> str:
    return f"{float(value):.4g}" if isinstance(value, float) or hasattr(value, "dtype") else str(value)


class Progress(contextlib.ExitStack):
    """What a person sees of a run: a bar on a terminal, one line an epoch elsewhere.

    Args:
        total_steps: steps of the whole run.
        initial: steps done before, by the run this one resumes; they do not count for the speed.
        enabled: auto (bar if `stream` is a terminal, lines otherwise) | bar | lines | off.
        stream: where it goes.
        label: the run's name among several, before everything shown of it.

    Raises:
        UserError: `enabled` is none of these.

    >>> progress = Progress(100, enabled="lines", stream=sys.stdout)
    >>> progress.update(50, loss=1.25); progress.epoch_line("epoch 0")  # doctest: +ELLIPSIS
    epoch 0 | step 50/100 | loss 1.25 | ... left
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial: int = 0,
        enabled: str = "auto",
        stream: IO[str] | None = None,
        label: str = "",
    ) -> None:
        if enabled not in ("auto", "bar", "lines", "off"):
            raise UserError(f"progress: {enabled!r} is not a mode; allowed: auto | bar | lines | off")
        super().__init__()
        self._stream = Steady(sys.stderr if stream is None else stream)
        if enabled == "auto":
            enabled = "bar" if self._stream.isatty() else "lines"
        self._mode, self._label = enabled, f"{label}: " if label else ""
        self._total, self._initial, self._done = total_steps, initial, initial
        self._began = time.monotonic()
        self._fields: dict[str, Any] = {}
        bar = tqdm(
            total=total_steps,
            initial=initial,
            file=self._stream,
            unit="step",
            dynamic_ncols=True,
            desc=label or None,
            disable=enabled != "bar",
        )
        self._bar = self.enter_context(bar)  # `close` leaves it as it stands

    def update(self, n: int, **fields: Any) -> None:
        """Advance by n steps; fields (loss, accuracy, tau, skips, images/s ...) replace those shown before."""
        self._done += n
        self._fields.update(fields)
        self._bar.set_postfix({name: _short(value) for name, value in self._fields.items()}, refresh=False)
        self._bar.update(n)

    def epoch_line(self, text: str) -> None:
        """A line that stays: above the bar, or with the step, the last fields and the time left where there is none."""
        if not self._bar.disable:
            self._bar.write(f"{self._label}{text}", file=self._stream)
        elif self._mode == "lines":
            parts = [f"{self._label}{text}", f"step {self._done}/{self._total}"]
            parts += [f"{name} {_short(value)}" for name, value in self._fields.items() if f"{name} " not in text]
            if self._done > self._initial:
                each = (time.monotonic() - self._began) / (self._done - self._initial)
                left = tqdm.format_interval(round(each * max(self._total - self._done, 0)))
                parts.append(f"{left.removeprefix('0')} left")
            print(" | ".join(parts), file=self._stream, flush=True)
