"""The report: what it says about workdirs written by hand, that it stands alone, and that it refuses what it must."""

from __future__ import annotations

import html.parser
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from prdarts_jax.errors import UserError
from prdarts_jax.report import plots
from prdarts_jax.report.page import report
from prdarts_jax.space.genotype import Genotype

EDGES = [[0, 2], [1, 2]]
OPS = ["none", "skip_connect", "sep_conv_3x3"]
NASTY = "<script>alert('x')</script>&\""


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def accuracy(seed: int, epoch: int) -> float:
    return 0.5 + 0.01 * seed + 0.1 * epoch


def workdir(
    path: Path, *, seed: int = 0, kind: str = "search", done: bool = True, full: bool = True, **config: Any
) -> Path:
    path.mkdir()
    nested = {
        "space": {"cells": 8, "ops": OPS},
        "method": {"strategy": "prdarts", "options": {"lambda1": 0.01}},
        "run": {"workdir": str(path)},
        "epochs": 3,
        "seed": seed,
    }
    head = {
        "schema_version": 1,
        "kind": kind,
        "config": nested | config,
        "sources": {"seed": "flag --seed", "space.cells": "preset digits"},
        "versions": {"jax": "0.10.2"},
        "devices": ["TFRT_CPU_0"],
        "edges": EDGES,
        "ops": OPS,
    }
    (path / "config.json").write_text(json.dumps(head))
    epochs = range(3 if done else 2)
    side = "test" if kind == "train" else "val"
    rows: list[dict[str, Any]] = [{"kind": "step", "epoch": 0, "step": 1, "train_loss": 77.0}]
    for e in epochs:
        row = {
            "kind": "epoch",
            "epoch": e,
            "step": 10 * e,
            "train_loss": 2.0 - e / 2,
            f"{side}_accuracy": accuracy(seed, e),
        }
        row |= {
            "penalty/skip": 0.25,
            "progress/tau": 1.0 - e / 4,
            "mean_p/conv": 0.875,
            "normal_skips": e,
            "time_s": 1.5,
        }
        rows.append(row)
    if done and kind == "train":
        rows.append({"kind": "final", "epoch": 2, "step": 20, "parameters": 3444814})
    jsonl(path / "metrics.jsonl", rows)
    genotype = Genotype.named("PRDARTS").to_json()
    if kind == "search" and full:
        jsonl(path / "genotypes.jsonl", [{"epoch": e, "genotype": json.loads(genotype)} for e in epochs])
        p = [[0.1, 0.5, 0.9]] * len(EDGES)
        jsonl(path / "probabilities.jsonl", [{"epoch": e, "normal": p, "reduce": p} for e in epochs])
    if done:
        (path / "genotype.json").write_text(genotype)
    return path


class Page(html.parser.HTMLParser):
    """The rows of all tables, the text, and every attribute of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text = ""
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cell = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        (found,) = (row for row in self.rows if tuple(row[: len(start)]) == start)
        return found


def test_one_finished_search(tmp_path: Path) -> None:
    run = workdir(tmp_path / "run", seed=3)
    out = report([run])
    assert out == run / "report.html"
    page = Page(out)
    header = page.row("config", "workdir")
    summary = dict(zip(header, page.row("A"), strict=True))
    assert summary["workdir"] == str(run) and summary["seed"] == "3" and summary["epochs"] == "3 of 3"
    assert float(summary["val accuracy"]) == pytest.approx(accuracy(3, 2)) and summary["normal skips"] == "2"
    assert page.row("penalty/skip") == ["penalty/skip", "0.25"]
    assert page.row("train_loss") == ["train_loss", "1"]  # of the last epoch, not of a step
    assert page.row("space.cells") == ["space.cells", "8", "preset digits"]
    assert page.row("method.options.lambda1") == ["method.options.lambda1", "0.01", ""]
    assert page.row("jax") == ["jax", "0.10.2"] and page.row("device") == ["device", "TFRT_CPU_0"]
    assert Genotype.named("PRDARTS").to_json() in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert sum("pair-" in i for i in ids) == 16  # both cells, every pair
    assert len(ids) == len(set(ids))
    assert page.text.count("P over epochs, ") == 2
    for title in ("Loss", "Accuracy", "Penalty terms", "Temperature", "Skip connections of the derived cells"):
        assert title in page.text
    assert "mean ±" not in page.text and "unfinished" not in page.text and "What differs" not in page.text
    assert report([run]).read_text() == page.source  # the same input, the same page


def test_a_picture_that_cannot_be_drawn_is_not_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no <font>\nfor this")

    monkeypatch.setattr(plots, "cell_diagram", fails)
    page = Page(report([workdir(tmp_path / "run", seed=3)]))
    assert page.text.count("This picture could not be drawn (RuntimeError: no <font>).") == 2
    assert "Accuracy" in page.text and "<svg" in page.source  # the rest is there
    said = capsys.readouterr().err
    assert said == "prdarts: 2 pictures of the report could not be drawn: RuntimeError: no <font>\n"


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = Page(report([workdir(tmp_path / "a"), workdir(tmp_path / "b", seed=1)], tmp_path / "two.html"))
    ids = {value for name, value in page.attributes if name == "id"}
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")]
    links += re.findall(r"url\(([^)]*)\)", page.source)
    assert links
    for link in links:
        assert link.startswith("data:image/png;base64,") or (link[0] == "#" and link[1:] in ids), link
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "@import" not in page.source


def test_every_part_is_in_the_contents(tmp_path: Path) -> None:
    """And every heading of a run can be linked to; one page of one run, one of two."""
    one = report([workdir(tmp_path / "a")])
    page = Page(one)
    links = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")]
    headings = re.findall(r'<(?:h2|h3|details) id="([^"]+)"', page.source)
    assert headings == [
        *("summary", "runs", "cells-1", "curves-1", "normal-1", "reduce-1"),
        *("figures-1", "config-of-1", "versions-1"),
    ]
    assert set(headings) <= set(links)
    two = Page(report([tmp_path / "a", workdir(tmp_path / "b", seed=1, done=False)], tmp_path / "two.html"))
    links = [value for name, value in two.attributes if name == "href"]
    assert {"#differences", "#run-1", "#run-2", "#cells-2", "#curves-2"} <= set(links)
    assert "Cells of the last epoch" in two.source.partition("</nav>")[0]


def test_the_pointer_on_an_operation_shows_its_p(tmp_path: Path) -> None:
    """The last row of probabilities.jsonl, by the edge and the operation of each pair; both the box and its name."""
    run = workdir(tmp_path / "run")
    cell = [[("skip_connect", 0), ("sep_conv_3x3", 1)]]
    (run / "genotype.json").write_text(Genotype(cell, [2], cell, [2]).to_json())
    rows = [
        {
            "epoch": e,
            "normal": [[0.1, 0.2 + e, 0.3], [0.4, 0.5, 0.25 * e]],
            "reduce": [[0.0, 0.9, 0.0], [0.0, 0.0, 0.7]],
        }
        for e in range(3)
    ]
    jsonl(run / "probabilities.jsonl", rows)
    source = report([run]).read_text()
    titles = re.findall(r'<g id="f\d+-(pair|box)-0-(\d)-\w+-\d">\s*<title>([^<]*)</title>', source)
    said = [
        "skip_connect from c_{k-2} to node 0: P = {} after epoch 3",
        "sep_conv_3x3 from c_{k-1} to node 0: P = {} after epoch 3",
    ]
    wanted = [
        said[0].replace("{}", "2.200"),
        said[1].replace("{}", "0.500"),
        said[0].replace("{}", "0.900"),
        said[1].replace("{}", "0.700"),
    ]
    for part in ("pair", "box"):
        assert [text for kind, _, text in titles if kind == part] == wanted


def test_a_dark_screen_has_other_colours(tmp_path: Path) -> None:
    """Every colour that a picture takes from the page is given for a dark one; ink and ground differ on both."""
    source = report([workdir(tmp_path / "run")]).read_text()
    dark = source.partition("@media screen and (prefers-color-scheme: dark) { :root {\n")[2].partition("}")[0]
    given = dict(re.findall(r"--(\w+): (#\w{6})", dark))
    used = set(re.findall(r"var\(--([0-9a-f]{6}), #\1\)", source))
    assert used and used <= set(given)
    assert {"ffffff", "000000"} <= used

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    for ink in ("000000", "222222", *(colour[1:].lower() for colour in plots.FAMILY_COLOURS.values())):
        assert contrast(given[ink], given["ffffff"]) > 4.5, ink  # WCAG 2.1, 1.4.3


def test_mean_and_standard_deviation_over_seeds(tmp_path: Path) -> None:
    runs = [workdir(tmp_path / f"s{s}", seed=s, full=False) for s in range(3)]
    other = workdir(tmp_path / "other", full=False, method={"strategy": "darts", "options": {}})
    unfinished = workdir(tmp_path / "open", seed=9, done=False, full=False)
    page = Page(report([*runs, other, unfinished], tmp_path / "out.html"))
    header = page.row("config", "workdir")
    mean = dict(zip(header, page.row("A", "mean ± standard deviation, n = 3"), strict=True))
    values = [accuracy(s, 2) for s in range(3)]
    m, s = mean["val accuracy"].split(" ± ")
    assert float(m) == pytest.approx(statistics.fmean(values))
    assert float(s) == pytest.approx(statistics.stdev(values), rel=0.05)  # two digits; the population's would be 0.0082
    assert mean["train loss"] == "1 ± 0"
    assert page.row("B")[1:4] == [str(other), "darts", "0"]
    assert [row[0] for row in page.rows if row[1:2] == [f"{unfinished} unfinished"]] == ["A"]
    assert page.row("seed", "0", "1", "2", "0", "9")
    assert page.row("method.strategy", "prdarts", "prdarts", "prdarts", "darts", "prdarts")
    assert not any(row[:1] == ["run.workdir"] and len(row) == 6 for row in page.rows)
    assert "Config A: mean and standard deviation over 3 seeds" in page.text and "Config B: mean" not in page.text


def test_an_unfinished_search_says_so(tmp_path: Path) -> None:
    run = workdir(tmp_path / "run", done=False)
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "epoch", "epo')  # killed while writing
    page = Page(report([run], tmp_path / "r.html"))
    assert "This search has not ended: 2 of 3 epochs so far." in page.text
    assert "Cells of the last epoch" in page.text and "unfinished" in page.text
    for name in ("metrics.jsonl", "genotypes.jsonl", "probabilities.jsonl"):
        (run / name).unlink()
    page = Page(report([run], tmp_path / "r.html"))
    assert "No epoch has ended yet." in page.text and "0 of 3 epochs" in page.text and "svg" not in page.tags


def test_trainings(tmp_path: Path) -> None:
    runs = [workdir(tmp_path / f"t{s}", seed=s, kind="train") for s in range(2)]
    page = Page(report(runs, tmp_path / "out.html"))
    values = [100 * (1 - accuracy(s, 2)) for s in range(2)]
    error, spread = statistics.fmean(values), statistics.stdev(values)
    assert f"test error after the last epoch {error:.2f} ± {spread:.2f} % (n = 2)" in page.text
    assert "Cells" in page.text and page.text.count("P over epochs") == 0
    assert [row for row in page.rows if row == ["parameters", "3444814"]]
    open_run = workdir(tmp_path / "t2", seed=2, kind="train", done=False)
    assert "This train has not ended" in Page(report([open_run], tmp_path / "out.html")).text
    (runs[1] / "genotype.json").write_text(Genotype.named("PDARTS").to_json())
    page = Page(report(runs, tmp_path / "out.html"))
    assert page.row("B")[1] == str(runs[1])  # two architectures are not two seeds of one


def test_everything_is_escaped(tmp_path: Path) -> None:
    run = workdir(tmp_path / "a<b>&c", method={"strategy": NASTY, "options": {NASTY: NASTY}})
    head = json.loads((run / "config.json").read_text())
    head |= {"versions": {NASTY: NASTY}, "devices": NASTY, "ops": ["none", NASTY, "a$b$"]}
    head["sources"]["seed"] = NASTY
    (run / "config.json").write_text(json.dumps(head))
    with (run / "metrics.jsonl").open("a") as f:
        f.write(
            json.dumps({"kind": "epoch", "epoch": 3, f"penalty/{NASTY}": 1.0, "mean_p/$x^": 0.5, NASTY: NASTY}) + "\n"
        )
    g = Genotype([[(NASTY, 0)]], [2], [[("a$b$", 1)]], [2])  # type: ignore[arg-type]
    (run / "genotype.json").write_text(g.to_json())
    page = Page(report([run], tmp_path / "out.html"))
    assert "script" not in page.tags and "b" not in page.tags
    assert NASTY in page.row("seed")[2] and page.row("device") == ["device", NASTY]
    assert page.rows.count([NASTY, NASTY]) == 2 and f"method.options.{NASTY}" in [row[0] for row in page.rows if row]
    assert page.text.count("a$b$") >= 2 and NASTY in page.text


def test_not_a_number_does_not_stop_the_report(tmp_path: Path) -> None:
    run = workdir(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "epoch", "epoch": 3, "train_loss": NaN, "val_loss": Infinity, "val_accuracy": null}\n')
    page = Page(report([run]))
    assert page.row("train_loss") == ["train_loss", "nan"] and page.row("val_loss") == ["val_loss", "inf"]


def test_errors_name_the_workdir_and_write_nothing(tmp_path: Path) -> None:
    good, bad, out = workdir(tmp_path / "good", full=False), workdir(tmp_path / "bad"), tmp_path / "out.html"
    (tmp_path / "empty").mkdir()

    def error(*workdirs: Path, to: Path = out) -> str:
        with pytest.raises(UserError) as e:
            report(workdirs, to)
        assert not out.exists() and "\n" not in str(e.value)
        return str(e.value)

    assert "none is given" in error()
    assert f"workdir: {str(tmp_path / 'absent')!r} is no directory" in error(good, tmp_path / "absent")
    assert f"workdir: {str(tmp_path / 'empty')!r} holds no config.json" in error(good, tmp_path / "empty")
    assert "out: cannot write" in error(good, to=tmp_path / "no" / "such" / "out.html")
    assert "out: cannot write" in error(good, to=tmp_path)

    metrics, config = (bad / "metrics.jsonl").read_text(), (bad / "config.json").read_text()
    (bad / "metrics.jsonl").write_text("{oops\n" + metrics)
    assert f"{bad / 'metrics.jsonl'}: line 1 is not JSON" in error(good, bad)
    (bad / "metrics.jsonl").write_text("3\n" + metrics)
    assert "line 1 is not a JSON object" in error(good, bad)
    (bad / "metrics.jsonl").write_text(metrics)
    for text, message in {
        "": "not the config of a workdir",
        "[]": "not the config of a workdir",
        '{"kind": "search"}': "not the config of a workdir (KeyError: 'config')",
        config.replace('"schema_version": 1', '"schema_version": 2'): "schema_version 2 is unknown; allowed: 1",
        config.replace('"kind": "search"', '"kind": "dance"'): "kind 'dance' is unknown; allowed: search | train",
    }.items():
        (bad / "config.json").write_text(text)
        assert error(good, bad).startswith(f"{bad / 'config.json'}: ") and message in error(good, bad)
    (bad / "config.json").write_text(config)
    (bad / "genotype.json").write_text("{}")
    assert f"{bad / 'genotype.json'}: genotype: the text lacks normal" in error(good, bad)
