"""The commands that show or prepare something call what does it, with what the words say."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from prdarts_jax import cli
from prdarts_jax.space.genotype import Genotype


def test_derive_reads_the_result_or_the_last_whole_epoch(capsys, tmp_path):
    assert cli.main(["derive", str(tmp_path)]) == 2
    assert "holds no genotype yet" in capsys.readouterr().err
    row = {"epoch": 3, "genotype": json.loads(Genotype.named("DARTS_V2").to_json())}
    (tmp_path / "genotypes.jsonl").write_text(json.dumps({**row, "epoch": 2}) + "\n" + json.dumps(row) + '\n{"epo')
    assert cli.main(["derive", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert Genotype.from_json(captured.out) == Genotype.named("DARTS_V2")
    assert "epoch 3" in captured.err
    (tmp_path / "genotype.json").write_text(Genotype.named("PRDARTS").to_json())
    assert cli.main(["derive", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert Genotype.from_json(captured.out) == Genotype.named("PRDARTS")
    assert captured.err == ""


def test_strategies_show_options_and_settings(capsys):
    assert cli.main(["strategies", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["prdarts"]["options"]["lambda2"] == 0.005
    assert rows["darts"]["settings"]["epochs"] == 50
    assert (rows["darts"]["competes"], rows["darts"]["executed"], rows["prdarts"]["passes"]) == (
        "the operations of an edge",
        "all",
        "2",
    )
    assert all(isinstance(row["made_of"], list) and isinstance(row["not_claimed"], str) for row in rows.values())
    assert cli.main(["strategies"]) == 0
    out = capsys.readouterr().out
    assert "lambda3=0.005" in out
    assert "competition: the operations of an edge; executed an edge: all; forward-backward passes a step: 2;" in out
    assert "darts" in out


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["a"], ([Path("a")], None)),
        (["a", "b", "--out", "c.html"], ([Path("a"), Path("b")], "c.html")),
    ],
)
def test_report_of_one_or_several(monkeypatch, capsys, tmp_path, words, arguments):
    called = []
    module = types.ModuleType("prdarts_jax.report.page")
    module.report = lambda workdirs, out: called.append((workdirs, out)) or "page.html"
    monkeypatch.setitem(sys.modules, "prdarts_jax.report.page", module)
    monkeypatch.setattr("prdarts_jax.report.page", module, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
    assert cli.main(["report", *words]) == 0
    assert called == [arguments]
    assert capsys.readouterr().out == "report: page.html\n"


def test_data_prepare_calls_it_with_paths(monkeypatch, capsys, tmp_path):
    called = []
    module = types.ModuleType("prdarts_jax.data.prepare")
    module.prepare = lambda name, archive, data_dir: called.append((name, archive, data_dir)) or data_dir / name
    package = types.ModuleType("prdarts_jax.data")
    package.prepare = module
    monkeypatch.setitem(sys.modules, "prdarts_jax.data", package)
    (tmp_path / "c.tar.gz").touch()
    words = ["data", "prepare", "cifar10", "--archive", str(tmp_path / "c.tar.gz"), "--data-dir", str(tmp_path)]
    assert cli.main(words) == 0
    assert called == [("cifar10", tmp_path / "c.tar.gz", tmp_path)]
    assert capsys.readouterr().out == f"written: {tmp_path / 'cifar10'}\n"
