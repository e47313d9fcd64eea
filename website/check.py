"""Checks a built site: every page can be reached from the first one, every link leads somewhere, nothing is fetched.

python -m website.check site
"""

from __future__ import annotations

import html.parser
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

_FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class Page(html.parser.HTMLParser):
    """What a page links to, what it loads, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.viewport = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.viewport |= tag == "meta" and values.get("name") == "viewport"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in _FETCHED and _FETCHED[tag] in values and values.get("rel") != "canonical":
            self.loads.append(values[_FETCHED[tag]])


def problems(site: Path) -> list[str]:
    """What is wrong with a site, a line each."""
    pages = {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found, graph = [], {}
    for name, page in pages.items():
        if not page.viewport:
            found.append(f"{name}: no viewport, a phone would show it small")
        found += [f"{name}: loads {url}" for url in page.loads if urlsplit(url).scheme not in ("", "data")]
        graph[name] = set()
        if name == "404.html":  # its addresses are absolute
            continue
        for url in [*page.links, *page.loads]:
            address, fragment = urldefrag(url)
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            target = unquote(urljoin(name, address)) if address else name
            target = f"{target}index.html" if target.endswith("/") or not target else target
            graph[name].add(target)
            if not (site / target).is_file():
                found.append(f"{name}: {url} leads nowhere")
            elif fragment and target in pages and fragment != "__skip" and unquote(fragment) not in pages[target].ids:
                found.append(f"{name}: {url} leads to no place in the page")
    reached, todo = set(), ["index.html"]
    while todo:
        name = todo.pop()
        if name in graph and name not in reached:
            reached.add(name)
            todo += graph[name]
    return found + [f"{name}: cannot be reached" for name in pages if name not in reached | {"404.html"}]


def main(argv: Sequence[str]) -> int:
    """Prints what is wrong; the exit status."""
    site = Path(argv[0])
    found = problems(site)
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages, each reached, each link leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
