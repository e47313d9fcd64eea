"""What can be swept, how a sweep is written, and which members it makes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from prdarts_jax import cli, presets
from prdarts_jax.config import schema
from prdarts_jax.errors import UserError
from prdarts_jax.searching import sweep
from prdarts_jax.strategies import registry

DIGITS = presets.resolve("digits").config
NUMBERS = ("seed", "weights.learning_rate", "weights.learning_rate_min", "weights.weight_decay", "weights.momentum")
NUMBERS += ("arch.learning_rate", "arch.weight_decay")


def test_what_can_be_swept():
    options = ("tau_max", "tau_min", "lambda1", "lambda2", "lambda3", "gate_dropout")
    assert tuple(sweep.sweepable(DIGITS)) == NUMBERS + options
    darts = presets.resolve("digits", "darts").config
    assert tuple(sweep.sweepable(darts)) == NUMBERS
    assert "weights.weight_decay" not in sweep.sweepable(DIGITS, ["weights"])
    given = schema.replace(DIGITS, {"arch.transform": "mine.py:adam"})
    assert [name for name in sweep.sweepable(given) if name.startswith("arch.")] == []


@pytest.mark.parametrize("row", registry.rows(), ids=lambda row: row.name)
def test_arrays_of_a_method_are_its_options(row):
    assert set(row.arrays) <= registry.options(row.name).keys()


def test_every_spelling_of_a_name():
    for name in ("lambda1", "method.lambda1", "method.options.lambda1"):
        assert sweep.find(name, DIGITS) == "lambda1"
    assert sweep.find("weights.weight-decay", DIGITS) == "weights.weight_decay"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=0..4"], {"seed": ["0", "1", "2", "3", "4"]}),
        (["seed=3..3"], {"seed": ["3"]}),
        (["seed=0..1,7"], {"seed": ["0", "1", "7"]}),
        (["lambda1=0.01,1e-3", "seed=5"], {"lambda1": ["0.01", "1e-3"], "seed": ["5"]}),
    ],
)
def test_parse(words, expected):
    assert sweep.parse(words) == expected


def test_members_are_the_product_and_their_names_are_canonical():
    sweeps = {"lambda1": ["1e-2", "0.02"], "seed": ["0", "1"], "method.tau_max": [10]}
    found = sweep.members(DIGITS, sweeps, Path("runs/p"))
    assert [m.name for m in found] == [
        f"seed={seed},tau_max=10.0,lambda1={lambda1}" for lambda1, seed in itertools.product((0.01, 0.02), (0, 1))
    ]
    other_order = {"seed": [0, 1], "tau_max": [10.0], "method.options.lambda1": [0.01, 0.02]}
    assert sweep.members(DIGITS, other_order, Path("runs/p")) == found
    for member in found:
        assert member.config.run.workdir == f"runs/p/{member.name}"
        for path, value in member.values.items():
            assert schema.get(member.config, path) == value
        base, mine = schema.computed(DIGITS), schema.computed(member.config)
        assert {path for path in base if base[path] != mine[path]} <= member.values.keys()


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        ({"epochs": ["1", "2"]}, ["'epochs' needs a compilation of its own", "allowed: seed | weights.learning_rate"]),
        ({"batch_size": ["1"]}, ["'batch_size' needs a compilation of its own"]),
        ({"space.channels": ["4"]}, ["'space.channels' needs"]),
        ({"hinge": ["0.1"]}, ["'hinge' needs a compilation of its own", "lambda3"]),
        ({"method.options.a": ["-1"]}, ["'method.options.a' needs"]),
        ({"weights.nesterov": ["true"]}, ["'weights.nesterov' needs"]),
        ({"lamda1": ["1"]}, ["unknown value 'lamda1'", "did you mean 'lambda1'?", "allowed: seed |"]),
        ({"sed": ["1"]}, ["did you mean 'seed'?"]),
        ({"seed": ["0", "0"]}, ["seed = 0,0 is not possible", "different values"]),
        ({"lambda1": ["0.01", "1e-2"]}, ["lambda1 = 0.01,1e-2", "different values"]),
        ({"lambda1": ["1"], "method.lambda1": ["2"]}, ["'lambda1' is given twice"]),
        ({"lambda1": ["high"]}, ["method.options.lambda1: 'high'", "a number"]),
        ({"seed": ["-1"]}, ["seed: -1 is not possible"]),
        ({"seed": ["1.5"]}, ["seed: '1.5' is not possible", "a whole number"]),
        ({"seed": []}, ["seed = "]),
        ({}, ["nothing is swept"]),
        ({"seed": [*range(100)], "lambda1": [*range(11)]}, ["1100", "at most 1000 members"]),
    ],
)
def test_what_cannot_be_swept_is_said(sweeps, said):
    with pytest.raises(UserError) as caught:
        sweep.members(DIGITS, sweeps, Path("w"))
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sweep", "lambda1"], ["sweep: 'lambda1' is not possible", "NAME=A,B,C"]),
        (["--sweep", "lambda1=1,,2"], ["'lambda1=1,,2'"]),
        (["--sweep", "lambda1=0..0.5"], ["ranges A..B of whole numbers"]),
        (["--sweep", "seed=4..0"], ["A <= B"]),
        (["--sweep", "seed=0..4000000"], ["at most 1000"]),
        (["--sweep", "seed=1", "--sweep", "seed=2"], ["'seed' is given twice"]),
        (["--sweep=seed=1,2", "--seed=3"], ["--sweep seed and --seed exclude each other"]),
        (["--sweep", "lambda1=1,2", "--method.lambda1=3"], ["--sweep lambda1 and --method.options.lambda1 exclude"]),
        (["--sweep", "seed=1", "--population", "3"], ["--sweep seed and --population exclude each other"]),
        (["--population", "2", "--distributed"], ["--sweep and --population are for one process"]),
        (["--population", "0"], ["population: 0 is not possible", "1..1000"]),
        (["--population", "few"], ["population: 'few'"]),
        (["--sweep", "tau_min=0,1"], ["tau_min: 0.0 is not possible"]),
        (["--swep", "seed=1"], ["did you mean --sweep?"]),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", "--preset", "digits", "--workdir", "w", "--devices=1", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("prdarts: error: ") and message.count("\n") == 1
    for text in said:
        assert text in message
    assert not list(tmp_path.iterdir())


def test_print_config_shows_what_is_swept(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["search", "--preset", "digits", "--seed", "5", "--population", "3", "--sweep", "lambda1=0.01,0.02"]
    assert cli.main([*command, "--print-config", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["seed"] == {"value": "5,6,7", "source": "sweep"}
    assert rows["method.options.lambda1"] == {"value": "0.01,0.02", "source": "sweep"}
    assert rows["run.workdir"]["value"] == "runs/population-digits"
    assert rows["epochs"] == {"value": DIGITS.epochs, "source": "preset digits"}
    assert cli.main(["search", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--sweep NAME=VALUES" in said and "--population N" in said


def test_a_users_method_names_its_arrays(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(*, space, pull=0.5, seed=1.0):\n    return None\n\nmine.arrays = ('pull', 'seed')\n")
    config = presets.resolve("digits", f"{file}:mine").config
    assert list(sweep.sweepable(config))[-2:] == ["pull", "method.seed"]  # `seed` is that of the search
    file.write_text("def mine(*, space, pull=0.5):\n    return None\n\nmine.arrays = ('pul',)\n")
    config = presets.resolve("digits", f"{file}:mine").config
    with pytest.raises(UserError, match=r"arrays of .* are \('pul',\); allowed: names among pull"):
        sweep.sweepable(config)
