"""The programs in experiments/ run at their smallest scale, say what they are, and compute what they say."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import search_cases

from experiments import paper
from prdarts_jax import cli, presets
from prdarts_jax.run.metrics import read
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.strategies import registry

FOLDER = Path(__file__).parents[2] / "experiments"
PROGRAMS = [path for path in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_experiment_is_documented(path):
    """A docstring with the command and every scale; a test here, or one of those that run every claim of the paper."""
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc is not None
    for word in (f"python -m experiments.{path.stem}", "--scale smoke", "xpected", "inute"):
        assert word in doc
    assert path.stem in (*paper.NAMES, "paper") or f'_load("{path.stem}"' in Path(__file__).read_text()


@pytest.mark.slow
def test_search_cifar10_smoke(tmp_path, monkeypatch, capsys):
    experiment = _load("search_cifar10", monkeypatch)
    workdir = tmp_path / "runs" / "search-cifar10-paper-smoke"
    assert experiment.main(["--scale", "smoke", "--devices", "1"]) == 0
    genotype = Genotype.load(workdir)
    assert genotype.to_json() in capsys.readouterr().out
    epochs = [row for row in read(workdir / "metrics.jsonl") if row["kind"] == "epoch"]
    assert len(epochs) == 2
    assert np.isfinite([row["val_loss"] for row in epochs]).all()
    assert experiment.main(["--scale", "smoke", "--devices", "1"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert experiment.main(["--scale", "smoke", "--devices", "1", "--seed", "1"]) == 2
    assert "holds another search (seed: 0 in the workdir, 1 now)" in capsys.readouterr().err


@pytest.mark.parametrize("settings", ["paper", "released"])
@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_search_cifar10_computes_what_it_says(monkeypatch, capsys, settings, scale):
    experiment = _load("search_cifar10", monkeypatch)
    assert experiment.main(["--settings", settings, "--scale", scale, "--print-config", "--json"]) == 0
    found = {path: row["value"] for path, row in json.loads(capsys.readouterr().out).items()}
    preset = {path: json.loads(json.dumps(value)) for path, value, _ in presets.table(presets.resolve(settings))}
    changed = {path for path, value in found.items() if preset[path] != value}
    assert found["method.options.straight_through"] == (settings == "released")
    assert found["data.source"] == ("digits" if scale == "smoke" else "tfds:cifar10")
    assert {"run.workdir"} <= changed <= {"run.workdir", *experiment.SCALES[scale]}
    if scale == "paper":
        assert changed == {"run.workdir"}
        assert (found["space.cells"], found["epochs"]) == (8 if settings == "paper" else 6, 200)
    if scale == "cpu":
        for path, value in presets.PRESETS["cifar10-small"].settings.items():
            assert found[path] == value
    assert os.listdir() == []


def test_search_cifar10_rejects_other_words(monkeypatch, capsys):
    experiment = _load("search_cifar10", monkeypatch)
    assert experiment.main(["--scale", "smoke", "--epohcs", "3"]) == 2
    assert "did you mean --epochs?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        experiment.main(["--scale", "huge"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_search_own_data_smoke(tmp_path, monkeypatch, capsys):
    experiment = _load("search_own_data", monkeypatch)
    assert experiment.main(["--scale", "smoke", "--devices", "1", "--workdir", "w"]) == 0
    genotype = Genotype.load(tmp_path / "w")
    assert genotype.to_json() in capsys.readouterr().out
    document = json.loads((tmp_path / "w" / "config.json").read_text())
    assert document["data"]["name"] == "my digits"
    assert {"method.strategy", "weights.transform"} <= document["digests"].keys()
    taus = [row["progress/tau"] for row in read(tmp_path / "w" / "metrics.jsonl") if row["kind"] == "epoch"]
    assert taus == pytest.approx([10.0, 0.1])
    assert experiment.main(["--scale", "smoke", "--devices", "1", "--workdir", "w", "--seed", "1"]) == 2
    assert "search_own_data: error: workdir: " in capsys.readouterr().err


def test_search_own_data_shows_a_strategy_of_its_own(monkeypatch):
    experiment = _load("search_own_data", monkeypatch)
    from prdarts_jax.space.spec import Space

    made = experiment.strategy(space=Space())
    taus = [made.schedule(epoch, 5)["tau"] for epoch in range(5)]
    assert np.diff(np.log(taus)) == pytest.approx([np.log(0.01) / 4] * 4)
    assert made.schedule(0, 5).keys() == registry.factory("prdarts")(space=Space()).schedule(0, 5).keys()


@pytest.mark.slow
def test_lambda_study_smoke(tmp_path, monkeypatch, capsys):
    experiment = _load("lambda_study", monkeypatch)
    folder = tmp_path / "runs" / "lambda-study-smoke"
    assert experiment.main(["--scale", "smoke", "--devices", "1", "--epochs", "1", "--which", "lambda3"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["lambda3"]
    members = {f"seed={seed},lambda3={value}" for seed in (0, 1) for value in (0.005, 0.5)}
    assert {path.name for path in (folder / "lambda3").iterdir() if path.is_dir()} == members
    for name in members:
        document = json.loads((folder / "lambda3" / name / "config.json").read_text())
        assert document["config"]["method"]["options"]["lambda3"] == float(name.rpartition("=")[2])
        assert document["config"]["method"]["options"]["lambda1"] == 0.01
        assert Genotype.load(folder / "lambda3" / name)
    assert experiment.main(["--scale", "smoke", "--devices", "1", "--epochs", "1", "--which", "lambda3"]) == 0
    assert "all 4 searches are finished already" in capsys.readouterr().out
    assert experiment.main(["--scale", "smoke", "--epohcs", "1"]) == 2
    assert "did you mean --epochs?" in capsys.readouterr().err


def test_lambda_study_computes_what_it_says(monkeypatch, capsys):
    experiment = _load("lambda_study", monkeypatch)
    assert experiment.PUBLISHED == {"lambda1": 0.01, "lambda2": 0.005, "lambda3": 0.005}
    assert experiment.main(["--scale", "paper", "--which", "lambda2", "--print-config", "--json"]) == 0
    found = {path: row["value"] for path, row in json.loads(capsys.readouterr().out).items()}
    preset = {path: json.loads(json.dumps(value)) for path, value, _ in presets.table(presets.resolve("paper"))}
    changed = {path for path, value in found.items() if preset[path] != value}
    assert changed == {"run.workdir", "method.options.lambda2", "seed"}
    assert found["method.options.lambda2"] == "0.001,0.0025,0.005,0.01,0.025"
    assert found["seed"] == "0,1,2"
    assert os.listdir() == []


def test_help_is_the_docstring(monkeypatch, capsys):
    for name in ("search_cifar10", "search_own_data", "lambda_study"):
        with pytest.raises(SystemExit) as stop:
            _load(name, monkeypatch).main(["--help"])
        assert stop.value.code == 0
        assert "--scale" in capsys.readouterr().out
    assert cli.main(["search", "--help"]) == 0
