"""A slip that a careless change could make."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One slip: in `file`, the text `old` (which is there exactly once) becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # node ids of the quick suite, of which at least one must fail
