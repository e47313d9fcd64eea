"""The one exception a user can cause: bad usage or bad input."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Bad usage or input: one line that names the field, the value and what is allowed (exit status 2).

    >>> raise UserError("space.cells: 2 is too few; allowed: an integer >= 3")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: space.cells: 2 is too few; allowed: an integer >= 3
    """


class RunError(RuntimeError):
    """The run itself failed (exit status 1): one line that says what happened and what is left on disk."""


def unknown(field: str, value: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the nearest name if there is one.

    >>> print(unknown("preset", "papr", ["paper", "digits"]))
    preset: unknown value 'papr'; did you mean 'paper'? allowed: paper | digits
    """
    names = list(allowed)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return UserError(f"{field}: unknown value {value!r};{hint} allowed: {' | '.join(names)}")


def warn(line: str) -> None:
    """A line on stderr; where nobody can read it, nothing."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal or stream
        print(f"prdarts: {line}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, for a message of our own; its type where it says nothing.

    >>> first_line(OSError("cannot open file\\nsee the manual")), first_line(ValueError())
    ('cannot open file', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def brief(error: BaseException) -> str:
    """The first line of an error, its spaces made single ones, of at most 160 characters.

    >>> brief(ValueError("DATA_LOSS:  bad header\\n  and more")), len(brief(ValueError("long " * 99)))
    ('DATA_LOSS: bad header', 160)
    """
    line = " ".join(first_line(error).split())
    return line if len(line) <= 160 else line[:157] + "..."
