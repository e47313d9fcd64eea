"""Docstrings of the library as Markdown: examples fenced, each argument by itself, comments beside fields as theirs."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Loaded by mkdocstrings (mkdocs.yml)."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object of the library."""
        if obj.docstring is not None:
            obj.docstring.value = one_by_one(fenced(obj.docstring.value))
        elif obj.is_attribute and obj.lines and "  # " in obj.lines[0]:
            comment = obj.lines[0].partition("  # ")[2].strip()
            obj.docstring = griffe.Docstring(comment, parent=obj)


def fenced(text: str) -> str:
    """Doctests as blocks of code; Markdown takes `>>>` for a quotation in a quotation in a quotation.

    >>> fenced("Twice.\\n\\n>>> 2 * 21\\n42").splitlines()
    ['Twice.', '', '```pycon', '>>> 2 * 21', '42', '```']
    """
    out: list[str] = []
    inside = False
    for line in text.split("\n"):
        if not inside and re.match(r" *>>> ", line):
            inside = True
            out.append(f"{line[: len(line) - len(line.lstrip())]}```pycon")
        elif inside and not line.strip():
            inside = False
            out.append("```")
        out.append(line)
    return "\n".join([*out, "```"] if inside else out)


def one_by_one(text: str) -> str:
    """The arguments of a docstring with an entry each; what is said of several is said of each of them.

    >>> print(one_by_one("Args:\\n  x, y (pixels): where,\\n    from 0.\\n  z: how deep."))
    Args:
      x: where,
        from 0.
      y: where,
        from 0.
      z: how deep.
    """
    name = r"\w+(?: \([^)]*\))?"
    several = re.compile(rf"^( +)({name}(?:, {name})+)(:.*(?:\n\1 +.*)*)", re.MULTILINE)

    def each(match: re.Match[str]) -> str:
        names = [one.partition(" ")[0] for one in match[2].split(", ")]
        return "\n".join(f"{match[1]}{one}{match[3]}" for one in names)

    head, args, rest = text.partition("Args:\n")
    body, blank, after = rest.partition("\n\n")
    return head + args + several.sub(each, body) + blank + after
