"""A found architecture: what each cell computes, free of arrays and of frameworks.

Reads and writes the JSON form of this library, reads what other programs print (`genotype_text`), and holds the cells
others have published.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prdarts_jax.errors import UserError, unknown
from prdarts_jax.space import genotype_text

SCHEMA_VERSION = 1
CELL_INPUTS = 2  # c_{k-2} and c_{k-1}: the intermediate nodes are numbered from here
CELLS = ("normal", "reduce")

Pair = tuple[str, int]
Cell = tuple[tuple[Pair, ...], ...]

_FIELDS = genotype_text.FIELDS
_LONGEST_RANGE = 1000  # range(10**9) is a mistake, not a cell
_BOMS = (("utf-8-sig", b"\xef\xbb\xbf"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff"))  # Windows writes them


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

        JSON of another program, which has no schema_version, is read as `from_text` reads text.

        Args:
          source: JSON text, or the object already decoded.

        Raises:
          UserError: not JSON, a missing or unknown field, an unknown schema_version, or an invalid cell.

        >>> Genotype.from_json(Genotype.named("PRDARTS").to_json()) == Genotype.named("PRDARTS")
        True
        """
        if isinstance(source, str):
            try:
                data = json.loads(source.removeprefix("\ufeff"))
            except json.JSONDecodeError as e:
                raise UserError(f"genotype: not JSON (line {e.lineno}, column {e.colno}: {e.msg})") from None
        else:
            data = source
        if not isinstance(data, Mapping):
            raise UserError(
                f"genotype: a JSON {_kind(data)}; allowed: an object with schema_version, {', '.join(_FIELDS)}"
            )
        if "schema_version" not in data:
            return _from_fields(genotype_text.plain(data))
        version = data["schema_version"]
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise UserError(f"genotype.schema_version: {version!r} is unknown; allowed: {SCHEMA_VERSION}")
        return _from_fields({k: v for k, v in data.items() if k != "schema_version"})

    @classmethod
    def from_text(cls, text: str, name: str = "") -> Genotype:
        """Read what a search of the DARTS family prints: `Genotype(normal=[('sep_conv_3x3', 1), ...], ...)`, or a dict.

        A flat list has two pairs a node; a list of lists has one list a node; a concat may be a range(...). Weights of
        pairs, and other text around it (a log, a `NAME = `) are skipped. The text is parsed, never evaluated.

        Args:
          text: any text that holds one genotype, or several equal ones.
          name: which of several, by the name it is assigned to or the number of its line.

        Raises:
          UserError: no genotype, several different ones, a form that is not plain literals, or an invalid cell.

        >>> g = Genotype.from_text("X = Genotype([('conv', 0), ('none', 1)], [2], [[('none', 1)]], range(2, 3))")
        >>> g.normal, g.reduce, g.reduce_concat
        (((('conv', 0), ('none', 1)),), ((('none', 1),),), (2,))
        """
        return _from_fields(genotype_text.read(text, name))

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
        """A genotype from the zoo, a file of JSON or text, a workdir that holds genotype.json, or its text itself.

        A zoo name wins over a file of the same name (write ./NAME for the file). FILE:NAME is the one of several in a
        file that is called NAME, or begins in line NAME.

        Raises:
          UserError: none of these, or the file is not valid; the error names the file.

        >>> Genotype.load("PDARTS") == Genotype.named("PDARTS")
        True
        """
        given = str(name_or_path)
        if given in _zoo():
            return _zoo()[given]
        if genotype_text.looks_like(given):
            return cls._of_text(given, "")
        path, name = Path(name_or_path), ""
        if not os.path.exists(path) and os.path.isfile(given.rpartition(":")[0]):  # pathlib's raise on long names
            path, name = Path(given.rpartition(":")[0]), given.rpartition(":")[2]
        if os.path.isdir(path):
            if not (path / "genotype.json").is_file():
                raise UserError(
                    f"genotype: {str(path)!r} holds no genotype.json (no workdir, or the search is unfinished)"
                )
            path = path / "genotype.json"
        try:
            text = _decoded(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            if len(path.parts) > 1 or path.suffix in (".json", ".txt", ".py"):
                raise UserError(f"genotype: no file or workdir {str(path)!r}") from None
            raise UserError(
                f"{unknown('genotype', given, _zoo())} | a JSON or text file | a workdir | its text"
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or "not UTF-8 text"
            raise UserError(f"genotype: cannot read {str(path)!r}: {reason}") from None
        try:
            return cls._of_text(text, name)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None

    @classmethod
    def _of_text(cls, text: str, name: str) -> Genotype:
        """JSON of this library strictly, any other text as it is printed."""
        try:
            data = None if name else json.loads(text)
        except ValueError:
            data = None
        if isinstance(data, Mapping) and ("schema_version" in data or data.keys() & set(_FIELDS)):
            return cls.from_json(data)
        return cls.from_text(text, name)

    # Writing and counting

    def to_json(self, indent: int | None = None) -> str:
        """The JSON form that from_json reads.

        >>> Genotype([[("none", 0)]], [2], [[]], [2]).to_json()
        '{"schema_version": 1, "normal": [[["none", 0]]], "normal_concat": [2], "reduce": [[]], "reduce_concat": [2]}'
        """
        return json.dumps({"schema_version": SCHEMA_VERSION} | {f: getattr(self, f) for f in _FIELDS}, indent=indent)

    def _repr_svg_(self) -> str:
        """Both cells as a notebook shows them.

        >>> Genotype.named("PRDARTS")._repr_svg_().count("skip_connect</text>")
        1
        """
        from prdarts_jax.pictures import cell

        return cell.svg({name: self.cell(name) for name in CELLS})

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


def program(name: str) -> str:
    """The method whose program has the evaluation network of a published genotype.

    A cell that others took over is of the method that lists it in its program; BayesNAS' cells are counted in DARTS'
    network, since its own differs in more than the cells.

    >>> program("DARTS_V2"), program("FairDARTS_a"), program("PNASNet")
    ('DARTS', 'Fair DARTS', 'GDAS')
    """
    return next(row["program"] for row in _rows() if row["name"] == name)


@functools.lru_cache(maxsize=1)
def _rows() -> list[dict[str, Any]]:
    text = importlib.resources.files("prdarts_jax.space").joinpath("zoo.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["genotypes"]
    return rows


@functools.lru_cache(maxsize=1)
def _zoo() -> Mapping[str, Genotype]:
    return {row["name"]: Genotype(*(row[f] for f in _FIELDS)) for row in _rows()}


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


def _decoded(content: bytes) -> str:
    """The text of a file, without its byte order mark."""
    encoding = next((name for name, mark in _BOMS if content.startswith(mark)), "utf-8")
    return content.decode(encoding)
