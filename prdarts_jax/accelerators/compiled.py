"""What a compiled program does in one run, counted in the text that XLA prints of it.

    total(computation) = sum over its instructions:
        a kernel or copy: 1 launch and its bytes        a collective: besides, 1 exchange
        a loop of n turns: n total(body)                a conditional: 1 and the mean of total(branch)

A loop whose length is an argument of the program counts as one turn: so a dispatch counts as one step of it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Counts(NamedTuple):
    """What happens in one run; means over the branches of conditionals."""

    launches: float = 0.0  # kernels, calls of libraries and copies that are started
    conditionals: float = 0.0  # decisions, each a wait of the host unless the device takes them itself
    exchanges: float = 0.0  # all-reduces and all other collectives
    bytes: float = 0.0  # of all arrays that launches read and write, each whole (a slice counts as its array)
    cycles: float = 0.0  # as XLA:TPU estimates them; other compilers give none

    def plus(self, other: Counts, times: float = 1.0) -> Counts:
        """The sum of these and `times` others.

        >>> Counts(1.0).plus(Counts(2.0, 1.0), 3).launches
        7.0
        """
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    type: str  # of its result, as f32[8,4]{1,0}
    opcode: str
    arguments: str  # between its parentheses
    attributes: str  # what follows them

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return _NAME.findall(self.arguments)


Computations = dict[str, list[Instruction]]
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# What is started by itself when it stands outside a fusion. Other instructions name, pass on or look into arrays.
_LAUNCHED = frozenset(
    {"fusion", "custom-call", "convolution", "dot", "copy", "reduce", "reduce-window", "select-and-scatter"}
    | {"scatter", "gather", "sort", "fft", "cholesky", "triangular-solve", "rng", "rng-bit-generator", "transpose"}
    | {"concatenate", "pad", "slice", "dynamic-slice", "dynamic-update-slice", "reverse", "broadcast", "iota"}
)
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SIZES |= {f"f8{kind}": 1 for kind in ("e4m3", "e4m3fn", "e4m3b11fnuz", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


def _closing(text: str, start: int = 0, end: str = "") -> int:
    """Where the first `end` outside brackets stands, or (without) the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if not depth and end and text[i] == end:
            return i
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth and not end:
            return i
    return len(text)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    name, rest = match.groups()
    gap = _closing(rest, end=" ")
    opcode, _, _ = rest[gap + 1 :].partition("(")
    opened = gap + 1 + len(opcode)
    closed = _closing(rest, opened)
    return Instruction(name, rest[:gap], opcode.strip(), rest[opened + 1 : closed], rest[closed + 1 :])


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a module by name, and the name of the first one to run."""
    found: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (one := _instruction(line)):
            current.append(one)
    return found, entry


def size(type_: str) -> float:
    """Bytes of an array or of all arrays of a tuple.

    >>> size("f32[8,4]{1,0}"), size("(bf16[3]{0}, pred[])")
    (128.0, 7.0)
    """
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_)
    return float(sum(_SIZES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays))


def turns(loop: Instruction, computations: Computations) -> int | None:
    """How often the body of a loop runs, if the program says it: as XLA found it, or in a condition `i < n` from 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = computations.get(_named(loop, "condition"), [])
    bounds = [one.arguments for one in condition if one.opcode == "constant" and one.type.startswith("s32[]")]
    compares = any(one.opcode == "fusion" or "direction=LT" in one.attributes for one in condition)
    return int(bounds[0]) if compares and len(bounds) == 1 else None


def _named(instruction: Instruction, *attributes: str) -> str:
    """The computation that an instruction names in the first of these attributes that it has."""
    for attribute in attributes:
        if match := re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.attributes):
            return match[1]
    return ""


def _branches(conditional: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [_named(conditional, f"{branch}_computation") for branch in ("true", "false")]


class Program:
    """A compiled program.

    Args:
      text: of the optimised module, `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self._computations, self._entry = parse(text)
        self._known: dict[str, Counts] = {}

    def run(self) -> Counts:
        """What one run does."""
        return self._total(self._entry)

    def step(self) -> Counts:
        """What one turn of the loop of unknown length does; without such a loop, one run of the program."""
        bodies = list(self._open_loops(self._entry))
        return functools.reduce(Counts.plus, map(self._total, bodies)) if bodies else self.run()

    def custom_calls(self, prefix: str) -> int:
        """How many custom calls of the text have a target that begins so."""
        lines = (one for found in self._computations.values() for one in found if one.opcode == "custom-call")
        return sum(f'custom_call_target="{prefix}' in one.attributes for one in lines)

    def _open_loops(self, name: str) -> Iterator[str]:
        for one in self._computations.get(name, ()):
            if one.opcode == "while" and turns(one, self._computations) is None:
                yield _named(one, "body")
            elif one.opcode == "call":
                yield from self._open_loops(_named(one, "to_apply", "calls"))

    def _total(self, name: str) -> Counts:
        if name not in self._known:
            lines = self._computations.get(name, ())
            sizes = {one.name: size(one.type) for one in lines}
            self._known[name] = functools.reduce(Counts.plus, (self._counted(one, sizes) for one in lines), Counts())
        return self._known[name]

    def _counted(self, one: Instruction, sizes: dict[str, float]) -> Counts:
        base = one.opcode.removesuffix("-start")
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        found = Counts(cycles=float(cycles[1]) if cycles else 0.0)
        if one.opcode == "while":
            length = turns(one, self._computations)
            return found.plus(self._total(_named(one, "body")), 1 if length is None else length)
        if one.opcode == "conditional":
            return found.plus(Counts(conditionals=1.0)).plus(_mean([self._total(name) for name in _branches(one)]))
        if one.opcode in ("call", "async-start"):
            return found.plus(self._total(_named(one, "to_apply", "calls")))
        exchange = base in COLLECTIVES
        if not exchange and base not in _LAUNCHED:
            return found
        read = sum(sizes.get(operand, 0.0) for operand in one.operands)
        return found.plus(Counts(launches=1.0, exchanges=float(exchange), bytes=sizes[one.name] + read))


def _mean(branches: Sequence[Counts]) -> Counts:
    return functools.reduce(lambda total, one: total.plus(one, 1 / len(branches)), branches, Counts())
