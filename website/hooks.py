"""What mkdocs is told: pages from outside docs/, links and lists as GitHub reads them, a nav of patterns."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/ that are pages of the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r" *```")
_SVG = re.compile(r"<svg.*</svg>", re.DOTALL)


def sources() -> dict[str, Path]:
    """Every page of the site: its name there -> the file that it is written from.

    >>> sources()["index.md"].name, sources()["guide.md"].parent.name
    ('README.md', 'docs')
    """
    pages = {site: ROOT / name for name, site in PAGES.items()}
    pages |= {f"notebooks/{path.stem}.md": path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
    docs = ROOT / "docs"
    return pages | {path.relative_to(docs).as_posix(): path for path in sorted(docs.rglob("*.md"))}


def place(path: Path) -> str:
    """Where a file of the repository stands in the site; what is no page is a file below source/.

    >>> place(ROOT / "docs/guide.md"), place(ROOT / "README.md"), place(ROOT / "LICENSE")
    ('guide.md', 'index.md', 'source/LICENSE')
    """
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("examples/") and path.suffix == ".ipynb":
        return f"notebooks/{path.stem}.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"source/{name}"


def links(text: str, origin: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for match in _LINK.finditer(text):
        if not re.match(r"[a-z]+:", match[2]):
            yield (origin.parent / match[2]).resolve()


def relinked(text: str, origin: Path) -> str:
    """A page whose links lead to the places of their files in the site.

    >>> relinked("[guide](docs/guide.md#presets) [a](https://a.org)", ROOT / "README.md")
    '[guide](guide.md#presets) [a](https://a.org)'
    """

    def link(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", match[2]):
            return match[0]
        target = place((origin.parent / match[2]).resolve())
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(place(origin)) or '.')}{match[3] or ''}"

    return _LINK.sub(link, text)


def fenced(text: str) -> str:
    """Markdown as GitHub reads it, as Python-Markdown takes it: blocks of code fenced, lists indented by four.

    GitHub counts the indentation within a list from the text of the item.

    >>> print(fenced("Run:\\n\\n    make test\\n\\n- or\\n\\n      make lint\\n"))
    Run:
    <BLANKLINE>
    ```bash
    make test
    ```
    <BLANKLINE>
    - or
    <BLANKLINE>
        ```bash
        make lint
        ```
    <BLANKLINE>
    """
    lines, out, inside, item = text.split("\n"), [], False, 0
    while lines:
        line = lines.pop(0)
        if _FENCE.match(line):
            inside = not inside
        elif not inside and line.strip():
            if marker := re.match(r"(- |\d+\. +)", line):
                item = len(marker[0])
            elif not line.startswith(" "):
                item = 0
        if inside or not line.startswith(" " * (4 + item)) or (out and out[-1].strip()):
            out.append(f"    {line[item:]}" if item and not inside and line.startswith(" " * item) else line)
            continue
        block = [line]
        while lines and (not lines[0].strip() or lines[0].startswith(" " * (4 + item))):
            block.append(lines.pop(0))
        blank = 0
        while not block[-1].strip():
            block.pop()
            blank += 1
        shell = re.match(r"(prdarts|make|python3?|git|\.venv/bin/\w+|\.ci/run|source|mkdir) ?", line.strip())
        margin = "    " if item else ""
        out.append(f"{margin}```{'bash' if shell else 'text'}")
        out += [f"{margin}{each[4 + item :]}".rstrip() for each in block]
        out += [f"{margin}```", *[""] * blank]
    return "\n".join(out)


def notebook(path: Path) -> str:
    """A notebook as Markdown: its text, its code and what the code prints; pictures as they are kept in it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = {
                kind: "".join(text) for kind, text in output.get("data", {"text/plain": output.get("text")}).items()
            }
            if "<iframe" in data.get("text/html", ""):  # a file beside the notebook
                continue
            if markup := data.get("text/html") or data.get("image/svg+xml"):
                parts.append(f"<div>\n{_SVG.sub(_as_image, markup)}\n</div>")
            else:
                parts.append(f"```text\n{data['text/plain'].rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _as_image(svg: re.Match[str]) -> str:
    """An <svg> element as an image, which Markdown leaves alone and whose ids are its own."""
    return f'<img alt="cells" src="data:image/svg+xml;base64,{base64.b64encode(svg[0].encode()).decode()}">'


def source(path: Path) -> str:
    """The Markdown of a page, as it is written in the repository."""
    return notebook(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def markdown(path: Path) -> str:
    """The Markdown of a page, as mkdocs is to read it."""
    text = relinked(source(path), path)
    return text if path.suffix == ".ipynb" else fenced(text)


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """A nav whose entries are patterns, as one of pages: a page stands where a pattern matches it first, or at "**".

    >>> expanded([{"A": ["a.md", "a/*.md", "gone.md"]}, {"All": "a.md"}, "**"], ["a.md", "b.md", "a/c.md"])
    [{'A': ['a.md', 'a/c.md']}, 'b.md']
    """
    left = [name for name in pages if not any(fnmatchcase(name, p) for p in _patterns(nav) if p != "**")]
    taken: set[str] = set()

    def entries(pattern: str) -> list[str]:
        found = [p for p in (left if pattern == "**" else pages) if fnmatchcase(p, pattern) and p not in taken]
        taken.update(found)
        return found

    def level(items: list[Any]) -> list[Any]:
        made: list[Any] = []
        for item in items:
            if isinstance(item, str):
                made += entries(item)
                continue
            ((title, inner),) = item.items()
            if isinstance(inner, str):
                made += [{title: found} for found in entries(inner)]
            elif below := level(inner):
                made.append({title: below})
        return made

    return level(nav)


def _patterns(nav: list[Any]) -> Iterator[str]:
    for item in nav:
        if isinstance(item, str):
            yield item
        else:
            for inner in item.values():
                yield from _patterns([inner] if isinstance(inner, str) else inner)


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The nav."""
    config["nav"] = expanded(config["nav"], sorted(sources(), key=lambda name: (name.count("/"), name)))
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages from outside docs/, and the files that pages link to."""
    from mkdocs.structure.files import File

    for name, origin in sources().items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=markdown(origin)))
        for target in links(source(origin), origin):
            if place(target).startswith("source/") and files.get_file_from_path(place(target)) is None:
                files.append(File.generated(config, place(target), abs_src_path=str(target)))
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The pages in docs/; None leaves the reading to mkdocs."""
    origin = sources().get(page.file.src_uri)
    return markdown(origin) if origin is not None and origin.is_relative_to(ROOT / "docs") else None
