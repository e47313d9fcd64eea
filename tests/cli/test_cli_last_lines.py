"""What `prdarts zoo` and a training of several seeds print."""

from __future__ import annotations

import json
import types

import pytest
from search_cases import one_error

from prdarts_jax import cli
from prdarts_jax.cli import train as cli_train
from prdarts_jax.space.genotype import Genotype, names

PRDARTS = Genotype.named("PRDARTS")


def test_zoo_lists_names_and_shows_cells(capsys):
    assert cli.main(["zoo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == names()
    assert cli.main(["zoo"]) == 0
    _, head, *table = capsys.readouterr().out.splitlines()
    assert head.split() == [scale for scale in rows[0] if scale != "name"]
    for line, row in zip(table, rows, strict=True):
        numbers = [float(word.strip("()")) for word in line.replace("(", " ").split()[1:]]
        exact = [count / 1e6 for scale in head.split() for count in row[scale].values()]
        assert line.split()[0] == row["name"] and numbers == pytest.approx(exact, abs=0.0051)
    assert cli.main(["zoo", "PRDARTS", "--json"]) == 0
    assert Genotype.from_json(capsys.readouterr().out) == PRDARTS
    assert cli.main(["zoo", "PRDARTS"]) == 0
    out = capsys.readouterr().out
    assert "normal: 1 skips, depth 4" in out
    assert "node 2 = skip_connect(0) + sep_conv_3x3(1)" in out


def test_zoo_takes_a_workdir_and_draws(capsys, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "genotype.json").write_text(Genotype.named("FairDARTS_a").to_json())
    assert cli.main(["zoo", str(tmp_path / "w"), "--pictures", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    assert "node 3 = 0" in out and "output = concat(2, 4, 5)" in out  # node 3 has no operation: it does not exist
    names = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert names == ["normal.png", "normal.svg", "reduce.png", "reduce.svg"]
    assert (tmp_path / "p" / "normal.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p" / "reduce.svg").read_text()
    one_error(capsys, ["zoo", "--pictures", str(tmp_path / "q")], 2, "--pictures: of which genotype?")


def test_zoo_shows_a_cell_with_an_operation_of_the_user(capsys, tmp_path):
    (tmp_path / "own.json").write_text(Genotype([[("mine", 0)]], [2], [[("skip_connect", 0)]], [2]).to_json())
    assert cli.main(["zoo", str(tmp_path / "own.json")]) == 0
    out = capsys.readouterr().out
    assert "node 2 = mine(0)" in out and "costs: unknown (" in out and "parameters" not in out


def test_several_seeds_end_with_the_averaged_weights_too():
    runs = [types.SimpleNamespace(metrics={"test_accuracy": a}) for a in (0.7, 0.8)]
    mean = {"test_accuracy": 0.75, "test_accuracy_std": 0.07, "ema_test_accuracy": 0.9, "ema_test_accuracy_std": 0.01}
    *seeds, last, averaged = cli_train._over_seeds((0, 1), types.SimpleNamespace(runs=runs, metrics=mean))
    assert len(seeds) == 2 and last == "test error after the last epoch: 25.00 % \u00b1 7.00 (n = 2)"
    assert averaged == "of the averaged weights: 10.00 % \u00b1 1.00"
