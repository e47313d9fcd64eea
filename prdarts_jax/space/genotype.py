"""A found architecture: what each cell computes, free of arrays and of frameworks.

Reads and writes the JSON form of this library, reads the `Genotype(...)` text form of the DARTS scripts, and holds the
cells others have published.
"""

from __future__ import annotations

import ast
import functools
import importlib.resources
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prdarts_jax.errors import UserError, unknown

SCHEMA_VERSION = 1
CELL_INPUTS = 2  # c_{k-2} and c_{k-1}: the intermediate nodes are numbered from here
CELLS = ("normal", "reduce")

Pair = tuple[str, int]
Cell = tuple[tuple[Pair, ...], ...]

_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_TEXT_CELL = "(op, input) pairs, two a node, or a list of pairs a node"
_MOST_PARENTHESES = 500  # a cell needs one a pair; without an end, a long log would be parsed over and over
_LONGEST_RANGE = 1000  # range(10**9) in a text file is a mistake, not a cell


@dataclass(frozen=True)
class Genotype:
    """The discrete cells a search returns: per intermediate node the (op, input) pairs whose outputs are added.

    States are numbered as in DARTS: 0 is c_{k-2}, 1 is c_{k-1}, and node i of a cell is state i + 2. The output of a
    cell is the concatenation of the states in its concat. Any number of pairs a node, two ops on one input, nodes
    without a pair and ops of any name are allowed, so that genotypes of every cell-based search fit.

    Args:
      normal: per node a sequence of (op name, input state); node i may use the states below i + 2.
      normal_concat: the states concatenated into the output of a normal cell, each in 2 .. nodes + 1.
      reduce: as normal, for the reduction cell.
      reduce_concat: as normal_concat, for the reduction cell.

    Raises:
      UserError: a pair that is not (str, int), an input out of range, a concat that is empty, out of range or has
        duplicates.

    Source: the cell encoding of Liu et al., "DARTS: Differentiable Architecture Search" (ICLR 2019), a list per node.

    >>> cell = [[("sep_conv_3x3", 1), ("skip_connect", 0)]]
    >>> Genotype(cell, [2], cell, [2]).normal
    ((('sep_conv_3x3', 1), ('skip_connect', 0)),)
    """

    normal: Cell
    normal_concat: tuple[int, ...]
    reduce: Cell
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        # Lists are accepted and frozen here: a genotype must be hashable, it is a static argument of jitted functions.
        for name in CELLS:
            cell = _checked_cell(name, getattr(self, name))
            concat = _checked_concat(f"{name}_concat", getattr(self, f"{name}_concat"), len(cell))
            object.__setattr__(self, name, cell)
            object.__setattr__(self, f"{name}_concat", concat)

    # Reading

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Genotype:
        """Read the JSON form: {"schema_version": 1, "normal": [[[op, input], ...], ...], "normal_concat": [...], ...}.

        Args:
          source: JSON text, or the object already decoded.

        Raises:
          UserError: not JSON, a missing or unknown field, an unknown schema_version, or an invalid cell.

        >>> Genotype.from_json(Genotype.named("PRDARTS").to_json()) == Genotype.named("PRDARTS")
        True
        """
        if isinstance(source, str):
            try:
                data = json.loads(source)
            except json.JSONDecodeError as e:
                raise UserError(f"genotype: not JSON (line {e.lineno}, column {e.colno}: {e.msg})") from None
        else:
            data = source
        if not isinstance(data, Mapping):
            raise UserError(
                f"genotype: a JSON {_kind(data)}; allowed: an object with schema_version, {', '.join(_FIELDS)}"
            )
        version = data.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            shown = "missing" if "schema_version" not in data else f"{version!r} is unknown"
            raise UserError(f"genotype.schema_version: {shown}; allowed: {SCHEMA_VERSION}")
        return _from_fields({k: v for k, v in data.items() if k != "schema_version"})

    @classmethod
    def from_text(cls, text: str) -> Genotype:
        """Read the text form of the DARTS scripts: `Genotype(normal=[('sep_conv_3x3', 1), ...], reduce=..., ...)`.

        A flat list has two pairs a node; a list of lists has one list a node; a concat may be a range(...). Other lines
        around it (a log, a `NAME = `) are skipped. The text is parsed, never evaluated.

        Args:
          text: any text that holds one Genotype(...), or several equal ones.

        Raises:
          UserError: no Genotype(...), several different ones, a form that is not plain literals, or an invalid cell.

        >>> g = Genotype.from_text("X = Genotype([('conv', 0), ('none', 1)], [2], [[('none', 1)]], range(2, 3))")
        >>> g.normal, g.reduce, g.reduce_concat
        (((('conv', 0), ('none', 1)),), ((('none', 1),),), (2,))
        """
        found = {_from_call(text, match) for match in re.finditer(r"\bGenotype\s*\(", text)}
        if not found:
            raise UserError(f"genotype: no Genotype(...) in the text; allowed: one, with {', '.join(_FIELDS)}")
        if len(found) > 1:
            raise UserError(f"genotype: {len(found)} different Genotype(...) in the text; keep the one that is meant")
        return found.pop()

    @classmethod
    def named(cls, name: str) -> Genotype:
        """A published genotype by its name in the zoo.

        Raises:
          UserError: no such name; the error names the nearest one.

        >>> Genotype.named("DARTS_V2").skips("normal")
        2
        """
        zoo = _zoo()
        if name not in zoo:
            raise unknown("genotype", name, zoo)
        return zoo[name]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Genotype:
        """A genotype from the zoo, a JSON file, a text file with Genotype(...), or a workdir that holds genotype.json.

        A zoo name wins over a file of the same name (write ./NAME for the file).

        Raises:
          UserError: none of these, or the file is not valid; the error names the file.

        >>> Genotype.load("PDARTS") == Genotype.named("PDARTS")
        True
        """
        if str(name_or_path) in _zoo():
            return _zoo()[str(name_or_path)]
        path = Path(name_or_path)
        if path.is_dir():
            if not (path / "genotype.json").is_file():
                raise UserError(
                    f"genotype: {str(path)!r} holds no genotype.json (no workdir, or the search is unfinished)"
                )
            path = path / "genotype.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            if len(path.parts) > 1 or path.suffix in (".json", ".txt", ".py"):
                raise UserError(f"genotype: no file or workdir {str(path)!r}") from None
            raise UserError(
                f"{unknown('genotype', str(name_or_path), _zoo())} | a JSON or text file | a workdir"
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or "not UTF-8 text"
            raise UserError(f"genotype: cannot read {str(path)!r}: {reason}") from None
        try:
            return cls.from_text(text) if re.search(r"\bGenotype\s*\(", text) else cls.from_json(text)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None

    # Writing and counting

    def to_json(self, indent: int | None = None) -> str:
        """The JSON form that from_json reads.

        >>> Genotype([[("none", 0)]], [2], [[]], [2]).to_json()
        '{"schema_version": 1, "normal": [[["none", 0]]], "normal_concat": [2], "reduce": [[]], "reduce_concat": [2]}'
        """
        return json.dumps({"schema_version": SCHEMA_VERSION} | {f: getattr(self, f) for f in _FIELDS}, indent=indent)

    def cell(self, cell: str = "normal") -> tuple[Cell, tuple[int, ...]]:
        """The nodes and the concat of one cell.

        Raises:
          UserError: cell is neither 'normal' nor 'reduce'.

        >>> Genotype.named("PRDARTS").cell("normal")[1]
        (2, 3, 4, 5)
        """
        if cell not in CELLS:
            raise unknown("cell", cell, CELLS)
        return getattr(self, cell), getattr(self, f"{cell}_concat")

    def count(self, op: str, cell: str = "normal") -> int:
        """How many pairs of a cell have this op.

        >>> Genotype.named("PRDARTS").count("dil_conv_3x3")
        4
        """
        return sum(name == op for pairs in self.cell(cell)[0] for name, _ in pairs)

    def skips(self, cell: str = "normal") -> int:
        """The number of skip connections of a cell, the usual sign of a collapsed search.

        >>> Genotype.named("PRDARTS").skips()
        1
        """
        return self.count("skip_connect", cell)

    def depth(self, cell: str = "normal") -> int:
        """Edges on the longest path from either cell input to a node of the concat.

            d(0) = d(1) = 0,   d(n) = 1 + max d(s) over the pairs (op, s) of node n,   depth = max d(n) over the concat

        Every op is one edge, skip_connect too; `none` carries nothing and is no edge, and a node that no path from an
        input reaches has no depth. A cell whose concat is not reached at all has depth 0. Shu, Wang and Cai
        ("Understanding Architectures Learnt by Cell-based Neural Architecture Search", ICLR 2020) count the edge to the
        output as well: their depth is this one plus 1.

        >>> Genotype.named("DARTS_V2").depth(), Genotype.named("PRDARTS").depth()
        (2, 4)
        """
        nodes, concat = self.cell(cell)
        state: list[int | None] = [0] * CELL_INPUTS
        for pairs in nodes:
            reached = [d for op, s in pairs if op != "none" and (d := state[s]) is not None]
            state.append(1 + max(reached) if reached else None)
        return max((d for n in concat if (d := state[n]) is not None), default=0)

    def width(self, cell: str = "normal") -> float:
        """Width of a cell in units of its channels: the shares of pairs that read a cell input, summed over the nodes.

        `none` pairs are left out, as in depth. Source: Shu, Wang and Cai (ICLR 2020); the cell of DARTS is 3.5 wide.

        >>> Genotype.named("DARTS_V2").width(), Genotype.named("PRDARTS").width()
        (3.5, 2.5)
        """
        live = [[s for op, s in pairs if op != "none"] for pairs in self.cell(cell)[0]]
        return float(sum(sum(s < CELL_INPUTS for s in inputs) / len(inputs) for inputs in live if inputs))

    def validate_ops(self, allowed: Iterable[str]) -> None:
        """Check that every op is one of these.

        Raises:
          UserError: names the cell, the node (numbered from 0) and the op.

        >>> Genotype.named("NASNet_A").validate_ops(["sep_conv_3x3", "sep_conv_5x5", "skip_connect", "avg_pool_3x3"])
        Traceback (most recent call last):
        ...
        prdarts_jax.errors.UserError: genotype.reduce[0]: unknown value 'sep_conv_7x7'; did you mean 'sep_conv_5x5'? allowed: sep_conv_3x3 | sep_conv_5x5 | skip_connect | avg_pool_3x3
        """  # noqa: E501 (the message is one line)
        known = list(allowed)
        for name in CELLS:
            for i, pairs in enumerate(self.cell(name)[0]):
                for op, _ in pairs:
                    if op not in known:
                        raise unknown(f"genotype.{name}[{i}]", op, known)


def names() -> list[str]:
    """The names of the published genotypes, in the order of zoo.json.

    >>> names()[:2], "PRDARTS" in names()
    (['NASNet_A', 'AmoebaNet_A'], True)
    """
    return list(_zoo())


@functools.lru_cache(maxsize=1)
def _zoo() -> Mapping[str, Genotype]:
    text = importlib.resources.files("prdarts_jax.space").joinpath("zoo.json").read_text(encoding="utf-8")
    return {row["name"]: Genotype(*(row[f] for f in _FIELDS)) for row in json.loads(text)["genotypes"]}


def _checked_cell(field: str, nodes: Any) -> Cell:
    if not isinstance(nodes, list | tuple):
        raise UserError(f"genotype.{field}: {nodes!r} is a {_kind(nodes)}; allowed: a list of nodes")
    out: list[tuple[Pair, ...]] = []
    for i, pairs in enumerate(nodes):
        if not isinstance(pairs, list | tuple):
            raise UserError(f"genotype.{field}[{i}]: {pairs!r} is a {_kind(pairs)}; allowed: a list of pairs")
        for pair in pairs:
            if not _is_pair(pair):
                raise UserError(f"genotype.{field}[{i}]: {pair!r} is not a pair; allowed: [op name, input number]")
            if not 0 <= pair[1] < i + CELL_INPUTS:
                top = i + CELL_INPUTS - 1
                raise UserError(
                    f"genotype.{field}[{i}]: input {pair[1]} of {pair[0]!r} is out of range; allowed: 0..{top}"
                )
        out.append(tuple((op, s) for op, s in pairs))
    return tuple(out)


def _checked_concat(field: str, concat: Any, nodes: int) -> tuple[int, ...]:
    states = tuple(concat) if isinstance(concat, list | tuple | range) and len(concat) <= _LONGEST_RANGE else concat
    top = nodes + CELL_INPUTS - 1
    allowed = f"allowed: different numbers in {CELL_INPUTS}..{top}" if nodes else "the cell has no node"
    if not isinstance(states, tuple) or not all(type(n) is int for n in states):
        raise UserError(f"genotype.{field}: {concat!r} is not a list of node numbers; {allowed}")
    if not states:
        raise UserError(f"genotype.{field}: empty, the cell has no output; {allowed}")
    for i, n in enumerate(states):
        if not CELL_INPUTS <= n < nodes + CELL_INPUTS:
            raise UserError(f"genotype.{field}: node {n} is out of range; {allowed}")
        if n in states[:i]:
            raise UserError(f"genotype.{field}: node {n} is there twice; {allowed}")
    return states


def _is_pair(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) == 2 and isinstance(x[0], str) and bool(x[0]) and type(x[1]) is int


def _kind(x: Any) -> str:
    return {dict: "object", str: "string", type(None): "null", bool: "boolean"}.get(type(x), type(x).__name__)


def _from_fields(data: Mapping[str, Any]) -> Genotype:
    for field in data:
        if field not in _FIELDS:
            raise unknown("genotype", str(field), _FIELDS)
    for field in _FIELDS:
        if field not in data:
            raise UserError(f"genotype.{field}: missing; allowed: all of {', '.join(_FIELDS)}")
    return Genotype(**data)


def _from_call(text: str, match: re.Match[str]) -> Genotype:
    """The Genotype(...) that starts at the match; what follows its closing parenthesis is not looked at."""
    call = _parsed_call(text[match.start() :])
    if len(call.args) > len(_FIELDS) or any(k.arg is None for k in call.keywords):
        raise UserError(f"genotype: Genotype(...) takes {', '.join(_FIELDS)}")
    fields = dict(zip(_FIELDS, (_literal(a) for a in call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg in fields:
            raise UserError(f"genotype.{keyword.arg}: given twice in Genotype(...)")
        fields[str(keyword.arg)] = _literal(keyword.value)
    return _from_fields({k: _per_node(k, v) if k in CELLS else v for k, v in fields.items()})


def _parsed_call(text: str) -> ast.Call:
    # The end of the call is the first closing parenthesis at which the text parses: log lines may follow it.
    for end in (m.end() for m in itertools.islice(re.finditer(r"\)", text), _MOST_PARENTHESES)):
        try:
            tree = ast.parse(text[:end], mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if isinstance(tree.body, ast.Call):
            return tree.body
    raise UserError("genotype: Genotype(...) is not a complete Python call (a parenthesis or bracket is missing)")


def _literal(node: ast.expr) -> Any:
    """A literal of lists, tuples, strings and integers; range(...) and list(range(...)) stand for their numbers."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(e) for e in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        args = [_literal(a) for a in node.args]
        if node.func.id == "range" and 1 <= len(args) <= 3 and all(type(a) is int for a in args) and args[2:] != [0]:
            numbers = range(*args)
            if len(numbers) <= _LONGEST_RANGE:
                return list(numbers)
        if node.func.id in ("list", "tuple") and len(args) == 1 and isinstance(args[0], list):
            return args[0]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        source = ast.unparse(node)
        raise UserError(
            f"genotype: {source!r} is not possible in Genotype(...); allowed: literals, range(...)"
        ) from None


def _per_node(field: str, value: Any) -> Any:
    """A flat list of pairs as a list of two pairs a node; a nested list as it is."""
    if not isinstance(value, list) or not value or not any(_is_pair(x) for x in value):
        return value
    if not all(_is_pair(x) for x in value):
        bad = next(x for x in value if not _is_pair(x))
        raise UserError(f"genotype.{field}: {bad!r} among pairs is none; allowed: {_TEXT_CELL}")
    if len(value) % 2:
        raise UserError(f"genotype.{field}: a flat list of {len(value)} pairs; allowed: {_TEXT_CELL}")
    return [value[i : i + 2] for i in range(0, len(value), 2)]
