"""What README and docs say is so: code runs, commands parse, links and names exist, tables equal the code."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import pytest

from prdarts_jax import cli, presets
from prdarts_jax.accelerators import targets
from prdarts_jax.cli import commands
from prdarts_jax.cli.flags import shown
from prdarts_jax.config import schema, userfile
from prdarts_jax.config.search import OPS, SearchConfig
from prdarts_jax.network.counts import has_second_norm
from prdarts_jax.presets import train as train_presets
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.space.genotype import Genotype, names, program
from prdarts_jax.strategies import registry
from prdarts_jax.strategies.rows import Row

ROOT = Path(__file__).parents[1]
_FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in _FILES}
NEEDED = (
    "README",
    "CONTRIBUTING",
    "start",
    "guide",
    "design",
    "equations",
    "fidelity",
    "notation",
    "adding_a_method",
    "install",
    "data",
    "results",
)
FILE = re.compile(r"# file: (\S+)\n")

every_page = pytest.mark.parametrize("page", PAGES)


def _text(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def _blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _text(page), re.DOTALL | re.MULTILINE)


def _table(page: str, header: str) -> list[list[str]]:
    """The rows, without backticks, of the table whose first header cell is `header`."""
    lines = _text(page).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    assert rows
    return rows


def _named(dotted: str) -> Any:
    """The object of a dotted name: the longest part that is a module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


def _search(*args: Any, **kwargs: Any) -> search_loop.SearchResult:
    """`prdarts_jax.search` up to the first step: arguments bound, data loaded, everything checked, nothing written.

    What is checked by tracing is traced in a small space: the user's own transformation does not depend on its size.
    """
    bound = inspect.signature(search_loop_search).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    objects = {name: given[name] for name in ("weight_tx", "arch_tx", "strategy", "data")}
    small = schema.replace(given["config"], {"space.cells": 3, "space.nodes": 1, "space.channels": 4})
    inputs = search_inputs.prepare(small, **objects)
    search_inputs.document(given["config"], inputs, given["sources"])
    return search_loop.SearchResult("finished", Genotype.named("PRDARTS"), Path(given["workdir"]))


search_loop_search = search_loop.search


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Users' examples run under JAX's default: optax.adam does not trace under the strict promotion of these tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs the Python of a page once, in a folder that holds the files which all pages show."""
    folder = tmp_path_factory.mktemp("docs")
    for page in PAGES:
        for block in _blocks(page):
            if match := FILE.match(block):
                assert not (folder / match[1]).exists(), f"{match[1]} is shown twice"
                (folder / match[1]).write_text(block, encoding="utf-8")
    done: dict[str, dict[str, Any]] = {}

    def once(page: str) -> dict[str, Any]:
        if page not in done:
            names: dict[str, Any] = {"__name__": "docs"}
            for i, block in enumerate(_blocks(page)):
                if not FILE.match(block):
                    exec(compile(block, f"{page}, block {i + 1}", "exec"), names)
            done[page] = names
        return done[page]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(search_loop, "search", _search)
        yield once


def test_the_pages_are_there() -> None:
    assert {Path(page).stem for page in PAGES} >= set(NEEDED)


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)])
def test_python_runs(page: str, run: Callable[[str], dict[str, Any]]) -> None:
    run(page)


def test_every_fence_is_known() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", _text(page), re.MULTILINE)
        assert set(fences[::2]) <= {"python"} and set(fences[1::2]) <= {""}, page


def _commands(page: str) -> list[str]:
    """Command lines in indented blocks, and complete ones in backticks (no NAME to fill in, no command to come)."""
    text = _text(page)
    found = [re.split(r" [>|&]", line)[0] for line in re.findall(r"^ {4,}(prdarts .*)$", text, re.MULTILINE)]
    for inline in re.findall(r"`(prdarts [^`]+)`", text):
        if inline.split()[1] in commands._COMMANDS and not re.search(r" [A-Z]{2,}", inline):
            found.append(inline)
    return found


# tests/test_first_task.py runs those of CONTRIBUTING.md, on what its steps have made.
@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page) and page != "CONTRIBUTING.md"])
def test_commands_parse(
    page: str,
    run: Callable[[str], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Searches and trainings up to their complete config; what reads files or compiles up to what is not there."""
    run(page)
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    monkeypatch.setattr(targets, "before_jax", lambda: None)  # this process goes on
    for command in _commands(page):
        words = shlex.split(command, comments=True)[1:]
        if words[0] in ("search", "train", "pipeline") and not {"--help", "--print-config"} & set(words):
            words.append("--print-config")
        status, said = cli.main(words), capsys.readouterr().err
        if words[0] in ("derive", "report", "evaluate"):
            assert (status, said.split(" '")[0]) == (2, "prdarts: error: WORKDIR: no directory"), said
        elif words[0] in ("export", "import-torch"):
            assert status == 2 and re.match(r"prdarts: error: (WORKDIR|FILE|--)?.*(no |No such)", said), said
        elif words[0] == "check":
            assert status == 2 and re.match("prdarts: error: (--target: none|.* is not installed; )", said), said
        elif words[0] == "data":
            assert (status, said.split(" '")[0]) == (2, "prdarts: error: --archive: no file"), said
        else:
            assert (status, said) == (0, ""), f"{command}: {said}"


def test_a_wrong_command_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--preset", "digits", "--no-such-flag", "--print-config"]) == 2
    assert "unknown --no-such-flag" in capsys.readouterr().err


@every_page
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (PAGES[page].parent / target.partition("#")[0]).exists(), target


@every_page
def test_named_objects_exist(page: str) -> None:
    for code in re.findall(r"`([^`\n]+)`", _text(page)):
        for dotted in re.findall(r"(?<![\w/.])prdarts_jax(?:\.[A-Za-z_]\w*)+", code):
            _named(dotted)


@every_page
def test_named_tests_exist(page: str) -> None:
    for file, name in re.findall(r"(tests/(?:\w+/)?\w+\.py)(?:::(\w+))?", _text(page)):
        assert (ROOT / file).is_file(), file
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_equation_names_a_function() -> None:
    rows = [line for line in _text("docs/equations.md").splitlines() if line.startswith("| ") and "---" not in line]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert cells[1] == "function" or re.search(r"`prdarts_jax\.\w+\.\w+", cells[1]), row


@every_page
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", _text(page), re.MULTILINE)) <= targets


def test_rooms_of_the_design_exist() -> None:
    """Every folder and root module of the package has a row, and every row is one."""
    named = [name.strip() for row in _table("docs/design.md", "room") for name in row[0].split(",")]
    rooms = [
        path for path in (ROOT / "prdarts_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert sorted(named) == sorted(path.name if path.suffix else f"{path.name}/" for path in rooms)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_guide_lists_presets() -> None:
    rows = {row[0]: row for row in _table("docs/guide.md", "preset")}
    assert list(rows) == list(presets.PRESETS)
    fields = ("data.source", "space.cells", "space.channels", "epochs", "batch_size")
    for name, row in rows.items():
        config = presets.resolve(name).config
        assert row[1:6] == [str(schema.get(config, field)) for field in fields]


def test_methods_are_those_of_the_registry() -> None:
    """The README names each, the index has what the registry says, and each has a page."""
    found = [[row[0].split("]")[0].strip("["), *row[1:]] for row in _table("docs/methods.md", "method")]
    assert found == [
        [
            row.name,
            row.competes,
            row.executed,
            row.passes,
            ", ".join(row.made_of) or "-",
            row.reference.partition(":")[0],
        ]
        for row in registry.rows()
    ]
    assert all(f"`{row.name}`" in _text("README.md") for row in registry.rows())
    assert {Path(page).stem for page in PAGES if page.startswith("docs/methods/")} == {
        row.name for row in registry.rows()
    }


@pytest.mark.parametrize("method", registry.rows(), ids=lambda row: row.name)
def test_the_page_of_a_method(method: Row) -> None:
    """Its sections, its published settings as they are used, and what is not claimed."""
    page = f"docs/methods/{method.name}.md"
    sections = re.findall(r"^## (.*)$", _text(page), re.MULTILINE)
    assert sections == ["Equations", "Settings", "Deviations", "What was not read"]
    assert {row[0]: row[1] for row in _table(page, "setting")} == {k: shown(v) for k, v in method.settings.items()}
    for _, function in _table(page, "equation"):
        assert callable(_named(function)), function
    assert " ".join(method.not_claimed.split()) in " ".join(_text(page).split())


def test_guide_names_every_command() -> None:
    text = _text("docs/guide.md")
    assert all(f"prdarts {name}" in text for name in commands._COMMANDS)


def test_fidelity_has_every_default_with_its_source() -> None:
    rows = {row[0]: row[1:5] for row in _table("docs/fidelity.md", "field")}
    configs = [presets.resolve(*names).config for names in (("paper",), ("released",), ("paper", "darts"))]

    def cell(config: SearchConfig, path: str) -> str:
        try:
            value = schema.get(config, path)
        except KeyError:
            return "-"
        return "all eight" if value == OPS else shown(value)

    assert rows == {
        path: [*(cell(config, path) for config in configs), source] for path, source in presets.PROVENANCE.items()
    }


def test_fidelity_has_every_default_of_a_training_with_its_source() -> None:
    rows = {row[0]: row[1:5] for row in _table("docs/fidelity.md", "field of a training")}
    made = [train_presets.resolve(name) for name in ("cifar10", "imagenet", "darts-imagenet")]

    def sources(path: str) -> str:
        found = [each.sources[path].partition("(")[2].rstrip(")") for each in made[:2]]
        return "; ".join(dict.fromkeys(found))

    assert rows == {
        path: [*(shown(schema.get(each.config, path)) for each in made), sources(path)]
        for path in train_presets.PROVENANCE
    }


def test_fidelity_has_the_program_of_every_published_cell() -> None:
    table = _table("docs/fidelity.md", "program")
    for name in names():
        (row,) = [row for row in table if any(fnmatch(name, pattern) for pattern in re.findall(r"[\w*]+", row[2]))]
        assert (row[0], row[1] == "yes") == (program(name), has_second_norm(name, "imagenet")), name


def test_notation_has_the_order_of_edges_and_operations() -> None:
    from prdarts_jax.space import Space

    space = Space()
    edges = re.search(r"^    (\(0,2\).*)$", _text("docs/notation.md"), re.MULTILINE)
    assert edges and re.findall(r"\((\d),(\d)\)", edges[1]) == [(str(j), str(n)) for j, n in space.edges]
    rows = [[str(i), name, space.table[name].group] for i, name in enumerate(space.ops)]
    assert _table("docs/notation.md", "column") == rows


def test_the_example_works_as_a_row(run: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of adding_a_method.md, put where the page says, is found by name with its options and settings."""
    row = run("docs/adding_a_method.md")["row"]
    module = userfile.load_module("one_hot.py", "method.strategy").value
    assert isinstance(module, types.ModuleType)
    monkeypatch.setitem(sys.modules, row.factory.partition(":")[0], module)
    monkeypatch.setattr(registry, "_ROWS", (*registry.rows(), row))
    made = presets.resolve("digits", "one_hot", {"method.options.sharpen": "0.2"})
    assert made.config.method.options == {"sharpen": 0.2, "decided": 0.99}
    assert (made.config.arch.learning_rate, made.config.epochs) == (3e-3, presets.resolve("digits").config.epochs)
    inputs = search_inputs.prepare(made.config)
    assert inputs.problem.strategy.schedule(0, 10) == {"sharpen": 0.0}
