"""Presets, the registry's table, and which value wins."""

from __future__ import annotations

import json

import pytest

from prdarts_jax import presets
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.errors import UserError
from prdarts_jax.strategies import registry

# The numbers of the method as published, written down a second time.
PAPER = {
    "space.cells": 8,
    "space.channels": 16,
    "space.nodes": 4,
    "space.head_norm": True,
    "space.pool_norm": True,
    "epochs": 200,
    "batch_size": 128,
    "weights.learning_rate": 0.025,
    "weights.learning_rate_min": 0.001,
    "weights.momentum": 0.9,
    "weights.nesterov": True,
    "weights.weight_decay": 0.0005,
    "weights.clip_norm": 5,
    "arch.learning_rate": 0.0003,
    "arch.beta1": 0.5,
    "arch.beta2": 0.999,
    "arch.eps": 1e-8,
    "arch.weight_decay": 0.001,
    "arch.clip_norm": float("inf"),
    "data.source": "tfds:cifar10",
    "data.crop_padding": 4,
    "data.flip": True,
    "data.cutout": 0,
    "method.strategy": "prdarts",
    "method.options.tau_max": 10,
    "method.options.tau_min": 0.1,
    "method.options.a": -0.1,
    "method.options.b": 1.1,
    "method.options.op_subsample": "topk_gate",
    "method.options.executed_ops": 2,
    "method.options.straight_through": False,
    "method.options.gate_dropout": 0,
    "method.options.lambda1": 0.01,
    "method.options.lambda2": 0.005,
    "method.options.lambda3": 0.005,
    "method.options.path_reduction": "sum",
    "method.options.executed_mask": False,
    "method.options.pool_group": False,
    "method.options.hinge": 0,
    "method.options.derive_score": "probability",
    "method.options.distinct_inputs": True,
    "method.options.init_scale": 0.001,
}
RELEASED = {
    "space.cells": 6,
    "space.pool_norm": False,
    "batch_size": 250,
    "method.options.tau_max": 1,
    "method.options.straight_through": True,
    "method.options.gate_dropout": 0.4,
    "method.options.path_reduction": "mean",
    "method.options.executed_mask": True,
    "method.options.pool_group": True,
    "method.options.hinge": 0.2,
    "method.options.derive_score": "softmax",
    "method.options.distinct_inputs": False,
}
DARTS = {
    "epochs": 50,
    "batch_size": 64,
    "space.cells": 8,
    "space.channels": 16,
    "space.head_norm": False,
    "space.pool_norm": True,
    "weights.learning_rate": 0.025,
    "weights.learning_rate_min": 0.001,
    "weights.momentum": 0.9,
    "weights.nesterov": False,
    "weights.weight_decay": 0.0003,
    "weights.clip_norm": 5,
    "arch.learning_rate": 0.0003,
    "arch.beta1": 0.5,
    "arch.beta2": 0.999,
    "arch.weight_decay": 0.001,
    "method.options.init_scale": 0.001,
}


def _values(config, paths):
    return {path: schema.get(config, path) for path in paths}


def _user_strategy(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return f"{path}:make"


def test_paper_is_the_method_as_published():
    assert _values(presets.resolve("paper").config, PAPER) == PAPER
    assert presets.resolve() == presets.resolve("paper")


def test_released_differs_from_paper_in_the_marked_rows_only():
    paper, released = (
        schema.computed(presets.resolve("paper").config),
        schema.computed(presets.resolve("released").config),
    )
    assert {path for path in paper if paper[path] != released[path]} == set(RELEASED)
    assert {path: released[path] for path in RELEASED} == RELEASED


def test_darts_is_its_own_published_setting_on_any_preset_that_leaves_it_alone():
    assert _values(presets.resolve("paper", "darts").config, DARTS) == DARTS


def test_digits_is_never_flipped():
    data = presets.resolve("digits").config.data
    assert (data.source, data.crop_padding, data.flip, data.cutout) == ("digits", 1, False, 0)


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("strategy", [None, *(row.name for row in registry.rows())])
def test_every_preset_builds_round_trips_and_names_every_source(name, strategy):
    made = presets.resolve(name, strategy)
    assert schema.from_dict(SearchConfig, json.loads(json.dumps(schema.to_dict(made.config)))) == made.config
    options = {f"method.options.{option}" for option in made.config.method.options}
    paths = {path for path, _, _ in schema.fields(SearchConfig)} - {"method.options"}
    assert set(made.sources) == paths | options
    assert set(made.config.method.options) == set(registry.options(made.config.method.strategy))
    assert presets.PRESETS[name].summary


def test_preset_scale_wins_over_the_strategy_and_flags_over_all():
    assert registry.row("darts").settings["epochs"] != presets.PRESETS["digits"].settings["epochs"]
    made = presets.resolve("digits", "darts", {"batch_size": "32"})
    assert made.config.epochs == presets.PRESETS["digits"].settings["epochs"]
    assert made.config.batch_size == 32
    assert made.config.weights.nesterov is False
    assert made.sources["epochs"] == "preset digits"
    assert made.sources["batch_size"] == "flag"
    assert made.sources["weights.nesterov"] == "strategy darts"
    assert made.sources["method.strategy"] == "flag"
    assert made.sources["method.options.init_scale"] == "default"


def test_another_strategy_replaces_the_whole_method_section():
    assert presets.resolve("released", "darts").config.method.options == registry.options("darts")
    made = presets.resolve("released", "darts").config.space
    assert (made.cells, made.pool_norm) == (6, True)  # the scale is the preset's, the norm after pools the method's
    kept = presets.resolve("released", "prdarts")
    assert kept.config == presets.resolve("released").config
    assert kept.sources["method.options.tau_max"] == "preset released"
    assert presets.resolve("released", flags={"method.strategy": "darts"}) == presets.resolve("released", "darts")


def test_an_option_flag_wins_over_the_presets_option_and_takes_its_type():
    made = presets.resolve("released", flags={"method.options.hinge": "1", "method.options.executed_ops": "3"})
    assert made.config.method.options["hinge"] == 1.0
    assert isinstance(made.config.method.options["hinge"], float)
    assert made.config.method.options["executed_ops"] == 3
    assert made.sources["method.options.hinge"] == "flag"
    assert made.config.method.options["gate_dropout"] == 0.4


def test_the_defaults_of_prdarts_say_where_they_come_from():
    sources = presets.resolve("paper").sources
    assert sources["method.options.tau_max"] == "default (paper)"
    assert sources["weights.learning_rate"] == "strategy prdarts (released program)"
    assert sources["space.ops"] == "default (DARTS)"
    assert sources["dtype"] == "default (ours)"
    assert set(presets.PROVENANCE.values()) == {"paper", "released program", "DARTS"}
    assert set(presets.PROVENANCE) <= set(sources)
    # What the released program does otherwise is the paper's by default, but for what the paper leaves to DARTS.
    conventions = {"method.options.distinct_inputs", "space.pool_norm"}
    assert {presets.PROVENANCE[path] for path in conventions} == {"DARTS"}
    assert {presets.PROVENANCE[path] for path in set(RELEASED) - conventions} == {"paper"}
    assert {presets.PROVENANCE[path] for path in ("space.channels", "space.nodes", "space.cells")} == {"paper"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("papr",), "preset: unknown value 'papr'; did you mean 'paper'?"),
        (("paper", "dart"), "method.strategy: unknown value 'dart'; did you mean 'darts'?"),
        (("paper", None, {"method.options.lambda11": 1}), "method.options.lambda11: unknown value 'lambda11'; did you"),
        (("paper", "darts", {"method.options.lambda1": 1}), "method.options.lambda1: unknown value 'lambda1';"),
        (
            ("paper", None, {"method.options.tau_max": "hot"}),
            "method.options.tau_max: 'hot' is not possible; allowed: a",
        ),
        (
            ("paper", None, {"method.options.hinge": True}),
            "method.options.hinge: True is not possible; allowed: a numb",
        ),
        (("paper", None, {"space.cels": 1}), "field: unknown value 'space.cels'; did you mean 'space.cells'?"),
        (("paper", "absent.py:make"), "method.strategy: no file 'absent.py'"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(arguments, line):
    with pytest.raises(UserError) as error:
        presets.resolve(*arguments)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_users_strategy_brings_options_and_settings(tmp_path):
    text = (
        "def make(space, *, rate=0.5, steps=3, limit=None, init=abs, **rest):\n    return space\n"
        "make.settings = {'epochs': 7, 'weights.momentum': 0.5, 'batch_size': 16}\n"
    )
    spec = _user_strategy(tmp_path, text)
    made = presets.resolve("digits", spec, {"method.options.rate": "1", "method.options.limit": "2.5"})
    assert made.config.method.options == {"rate": 1.0, "steps": 3, "limit": 2.5}
    assert made.config.weights.momentum == 0.5
    assert made.sources["weights.momentum"] == f"strategy {spec}"
    assert made.config.epochs == presets.PRESETS["digits"].settings["epochs"]
    assert presets.resolve("paper", spec).config.epochs == 7
    assert presets.resolve("paper", spec).sources["dtype"] == "default"


@pytest.mark.parametrize(
    ("given", "value"), [("none", None), (None, None), ("3", 3), (3, 3), (0.5, 0.5), ("1e-3", 0.001)]
)
def test_an_option_that_is_none_by_default_takes_numbers(tmp_path, given, value):
    spec = _user_strategy(tmp_path, "def make(space, limit=None): ...\n")
    assert registry.resolve_options(spec, {"limit": given}) == {"limit": value}
    with pytest.raises(UserError, match=r"method\.options\.limit: 'x' is not possible; allowed: a number \| none"):
        registry.resolve_options(spec, {"limit": "x"})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("make = 3\n", "is a int; allowed: a factory function"),
        ("def make(space, needed): ...\n", "argument 'needed' of"),
        ("def make(space): ...\nmake.settings = 3\n", "allowed: a dict path -> value"),
        ("def make(space): ...\nmake.settings = {'method.options.a': 1}\n", "name 'method.options.a'"),
    ],
)
def test_a_users_factory_of_another_form_is_one_line(tmp_path, text, line):
    with pytest.raises(UserError) as error:
        presets.resolve("paper", _user_strategy(tmp_path, text))
    assert line in str(error.value)
    assert str(error.value).startswith("method.strategy: ")


def test_every_row_of_the_registry_is_complete():
    paths = {path for path, _, _ in schema.fields(SearchConfig)}
    for row in registry.rows():
        assert row.summary
        assert row.reference
        assert row.source
        assert set(row.settings) <= paths
        assert {"epochs", "batch_size", "space.head_norm"} <= set(row.settings)
        of_data = {path for path in row.settings if path.startswith("data.")}
        assert of_data <= {"data.split", "data.cutout"}, "the images are not a method's"
        assert row.competes and row.executed and row.passes
        assert callable(registry.factory(row.name))
    names = [row.name for row in registry.rows()]
    assert len(set(names)) == len(names)
