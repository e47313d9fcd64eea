"""Genotypes as other programs print them: in Python, in JSON, at the end of a log line. Parsed, never evaluated.

Read are `Genotype(normal=..., ...)` of the DARTS programs, also with the fields connectN and connects of
AutoDL-Projects; dictionaries, as a search of PR-DARTS or AutoDL-Projects prints them, `dict(...)` and JSON; pairs with
a weight as their third element; and numbers as NumPy writes them (`np.int64(1)`).
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prdarts_jax.errors import UserError, unknown

FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_CELLS = ("normal", "reduce")
_CONNECTIONS = ("connectN", "connects")  # of AutoDL-Projects; None in a cell of this kind
ALLOWED = f"Genotype(...), a dict or JSON with {', '.join(FIELDS)}"
# AutoDL-Projects and the program of PR-DARTS call these operations by other names.
_OPERATIONS = {
    f"{theirs}_{size}": f"{ours}_{size}"
    for theirs, ours in (("dua_sepc", "sep_conv"), ("dil_sepc", "dil_conv"))
    for size in ("3x3", "5x5")
}
_TEXT_CELL = "(op, input) pairs, two a node, or a list of pairs a node"
_LONGEST_RANGE = 1000  # range(10**9) in a text file is a mistake, not a cell
_LONGEST = 100_000  # characters of one genotype: without an end, a long log would be read over and over
_SHOWN = 12  # names in an error line

_CALLS = ("Genotype", "dict", "OrderedDict", "Namespace")
_KEYS = "|".join((*FIELDS, *_CONNECTIONS, "schema_version"))
_START = re.compile(rf"(?<!class )\bGenotype\s*\(|\b(?:dict|OrderedDict)\s*\((?=[\s\[(\"']*(?:{_KEYS})\b)"
                    rf"|\{{(?=\s*u?[\"'](?:{_KEYS})[\"']|[^{{}}]*[\"'](?:normal|reduce)_concat[\"']\s*:)")  # fmt: skip
# What is no name of a file, though no genotype begins in it: fields that nothing encloses, a cell of NAS-Bench-201.
_LOOSE = re.compile(r"\b(?:normal|reduce)\s*[=:]\s*[\[(]|\|\w+~\d+\||\n")
# What stands before one: `NAME = `, `NAME: type = genotypes.`, or the key of a dictionary.
_NAME = re.compile(r"(\w+)\s*(?::[^=\n]*)?=\s*(?:\w+\.)*$|[\"']([^\"'\n]+)[\"']\s*:\s*$")
_WORDS = {"null": None, "true": True, "false": False, "nan": 0.0, "inf": 0.0}  # of JSON, and of weights
_CONVERSIONS: Sequence[tuple[re.Pattern[str], Any]] = (  # name of a call with one argument -> what it may have
    (re.compile(r"(?:u?int|float)\d*"), int | float),
    (re.compile(r"str_?"), str),
    (re.compile(r"list|tuple"), list),
    (re.compile(r"tensor|[aA]rray"), int | float | list),
)
_OPAQUE = re.compile(r"=\s*<[^<>]*>")  # grad_fn=<SelectBackward0>
_NNI = re.compile(r"[\"'](?:normal|reduce)[_/](?:n\d+_(?:p\d+|switch)|(?:op|input)_\d+_\d+)[\"']")
_BENCH_201 = re.compile(r"\|\w+~\d+\|")


class _NotLiteral(UserError):
    """The source of a program, not what it printed."""


class Found(NamedTuple):
    """A genotype in a text."""

    name: str  # it was assigned to; may be empty
    line: int  # from 1
    source: str  # from its beginning to its last bracket; empty if that is missing

    def fields(self) -> dict[str, Any]:
        """Its fields by name, in the form of this library.

        Raises:
          UserError: it is not complete, or not made of plain values.
        """
        if not self.source:
            raise UserError(
                f"genotype: Genotype(...) in line {self.line} is not a complete Python call or dict "
                "(a parenthesis or bracket is missing)"
            )
        try:
            tree = ast.parse(_OPAQUE.sub("=None", self.source.replace("\n", " ")), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(
                f"genotype: line {self.line} is not a complete Python call or dict; allowed: {ALLOWED}"
            ) from None
        return plain(_literal(tree))


def find(text: str) -> list[Found]:
    """The genotypes of a text, in their order; nothing of them is checked.

    >>> [(found.name, found.line) for found in find("A = Genotype(normal=[])\\nfound: {'normal': []}")]
    [('A', 1), ('', 2)]
    """
    found = []
    for match in _START.finditer(text):
        source = _balanced(text, match.start())
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        name = _NAME.search(before)
        names = [group for group in name.groups() if group] if name else [""]
        found.append(Found(names[0], text.count("\n", 0, match.start()) + 1, source))
    return found


def read(text: str, name: str = "") -> dict[str, Any]:
    """The fields of the one genotype of a text, or of the one that is called NAME or begins in line NAME.

    Raises:
      UserError: there is none, or there are several different ones; the error lists them.

    >>> read("A = Genotype([[('none', 0)]], [2], [[]], [2])\\nB = dict(normal=1)", "A")["normal_concat"]
    [2]
    """
    found = find(text)
    if not found:
        raise UserError(f"genotype: {_lack(text)}; allowed: {ALLOWED}")
    if name:
        aliases = dict(re.findall(r"^(\w+)\s*=\s*(\w+)\s*$", text, re.MULTILINE))
        wanted = aliases.get(name, name)
        named = [one for one in found if wanted in (one.name, str(one.line))]
        if not named:
            raise unknown("genotype", name, _names(found))
        found = named
    distinct: dict[str, tuple[Found, dict[str, Any]]] = {}
    programs = []
    for one in found:
        try:
            fields = one.fields()
        except _NotLiteral as error:  # `Genotype(normal=gene_normal, ...)` in the program that prints it
            programs.append(error)
            continue
        distinct.setdefault(json.dumps(fields), (one, fields))
    if not distinct:
        raise programs[0]
    if len(distinct) > 1:
        ones = [one for one, _ in distinct.values()]
        raise UserError(
            f"genotype: {len(ones)} different ones in the text: {_listed(_names(ones))}; allowed: one of them, as "
            f"FILE:NAME or FILE:LINE (the last begins in line {ones[-1].line})"
        )
    return next(iter(distinct.values()))[1]


def plain(value: Any) -> dict[str, Any]:
    """The fields of a genotype of another program in the form of this library: no weights, our names of operations.

    Raises:
      UserError: it lacks a field, or has one that is not known.

    >>> plain({"normal": [["dua_sepc_3x3", 0, 0.1], ["skip_connect", 1, 0.2]], "normal_concat": [2], "reduce": [],
    ...     "reduce_concat": [2]})["normal"]
    [[['sep_conv_3x3', 0], ['skip_connect', 1]]]
    """
    if not isinstance(value, Mapping):
        raise UserError(f"genotype: a {type(value).__name__}; allowed: {ALLOWED}")
    fields = {str(key): item for key, item in value.items() if key != "schema_version"}
    for name in _CONNECTIONS:
        if fields.pop(name, None) is not None:
            raise UserError(f"genotype.{name}: connections beside the pairs of a cell are not read; allowed: None")
    return {name: _per_node(name, item) if name in _CELLS else item for name, item in fields.items()}


def looks_like(text: str) -> bool:
    """Whether a word of the command line is a genotype itself, and no name.

    >>> looks_like("Genotype(normal=[])"), looks_like("runs/Genotype")
    (True, False)
    """
    return bool(_START.search(text) or _LOOSE.search(text)) or text.strip()[:1] in ("", "{", "[")


# --- in the text ------------------------------------------------------------------------------------------------------


def _balanced(text: str, start: int) -> str:
    """The text from `start` to the bracket that closes its first one; empty if there is none."""
    depth, quote = 0, ""
    for i in range(start, min(len(text), start + _LONGEST)):
        character = text[i]
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return text[start : i + 1]
    return ""


def _names(found: Sequence[Found]) -> list[str]:
    """What they can be chosen by: their names where these are different, else their lines."""
    names = [one.name for one in found]
    return [one.name if one.name and names.count(one.name) == 1 else str(one.line) for one in found]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _lack(text: str) -> str:
    """Why a text without a genotype is none."""
    if _NNI.search(text):
        return "this is an export of NNI, whose choices name no nodes and concatenation of a cell"
    if _BENCH_201.search(text):
        return "this is a cell of NAS-Bench-201, without normal and reduction cell"
    if not text.strip():
        return "the text is empty"
    missing = [field for field in FIELDS if not re.search(rf"\b{field}\b", text)]
    return f"the text lacks {', '.join(missing)}" if missing else "the text names the fields, but holds no call or dict"


# --- values -----------------------------------------------------------------------------------------------------------


def _literal(node: ast.expr) -> Any:
    """A literal of lists, tuples, dicts, strings and numbers, and the calls that stand for one."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Dict) and all(node.keys):
        return {_key(key): _literal(item) for key, item in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Name):  # -inf
        return _literal(node.operand)
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for value in _called(name, node):
            return value
    with contextlib.suppress(ValueError, TypeError, MemoryError, RecursionError):
        value = ast.literal_eval(node)
        if isinstance(value, str | int | float | None):  # neither a set nor the `...` of a list that was cut short
            return value
    source = ast.unparse(node)[:80]
    raise _NotLiteral(f"genotype: {source!r} is not possible in Genotype(...); allowed: literals, range(...)")


def _key(node: ast.expr | None) -> str:
    value = _literal(node) if node is not None else None
    return value if isinstance(value, str) else repr(value)


def _called(name: str, call: ast.Call) -> Iterator[Any]:
    """What a call stands for, if it stands for a value at all."""
    if name in _CALLS:
        yield _fields(name, call)
        return
    args = [_literal(arg) for arg in call.args]
    whole = all(type(arg) is int for arg in args)
    if name in ("range", "arange") and 1 <= len(args) <= 3 and whole and args[2:] != [0]:
        numbers = range(*args)
        if len(numbers) <= _LONGEST_RANGE:
            yield list(numbers)
    elif len(args) == 1:
        kinds = [kind for pattern, kind in _CONVERSIONS if pattern.fullmatch(name)]
        yield from [arg for arg in args for kind in kinds if isinstance(arg, kind)]


def _fields(name: str, call: ast.Call) -> dict[str, Any]:
    """The arguments of Genotype(...) or dict(...) by their names."""
    known = (*FIELDS, *_CONNECTIONS)
    positional = [_literal(arg) for arg in call.args]
    if name != "Genotype" and len(positional) == 1:  # dict([("normal", ...), ...])
        fields = dict(positional[0]) if isinstance(positional[0], dict) else _pairs(positional[0])
    else:
        if len(positional) > len(known) or any(keyword.arg is None for keyword in call.keywords):
            raise _NotLiteral(f"genotype: {name}(...) takes {', '.join(FIELDS)}")
        fields = dict(zip(known, positional, strict=False))
    for keyword in call.keywords:
        if keyword.arg in fields:
            raise UserError(f"genotype.{keyword.arg}: given twice in {name}(...)")
        fields[str(keyword.arg)] = _literal(keyword.value)
    return fields


def _pairs(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not all(
        isinstance(x, list) and len(x) == 2 and isinstance(x[0], str) for x in value
    ):
        raise UserError(f"genotype: {str(value)[:80]} is no list of (field, value); allowed: {ALLOWED}")
    return dict(value)


def _is_pair(x: Any) -> bool:
    """(op, input), or (op, input, weight)."""
    named = isinstance(x, list | tuple) and 2 <= len(x) <= 3 and isinstance(x[0], str) and type(x[1]) is int
    return named and all(isinstance(weight, int | float | None) for weight in x[2:])


def _pair(x: Any) -> Any:
    return [_OPERATIONS.get(x[0], x[0]), x[1]] if _is_pair(x) else x


def _per_node(field: str, value: Any) -> Any:
    """A flat list of pairs as a list of two pairs a node; a nested list as it is. Weights are left out."""
    if not isinstance(value, list | tuple):
        return value
    if not any(_is_pair(x) for x in value):
        return [[_pair(pair) for pair in node] if isinstance(node, list | tuple) else node for node in value]
    if not all(_is_pair(x) for x in value):
        bad = next(x for x in value if not _is_pair(x))
        raise UserError(f"genotype.{field}: {bad!r} among pairs is none; allowed: {_TEXT_CELL}")
    if len(value) % 2:
        raise UserError(f"genotype.{field}: a flat list of {len(value)} pairs; allowed: {_TEXT_CELL}")
    return [[_pair(value[i]), _pair(value[i + 1])] for i in range(0, len(value), 2)]
