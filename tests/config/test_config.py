"""The config classes: validation lines, JSON, dotted paths."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig, SpaceConfig
from prdarts_jax.errors import UserError

PATHS = [path for path, _, _ in schema.fields(SearchConfig)]


def test_json_round_trip_keeps_every_value():
    changed = schema.replace(
        SearchConfig(),
        {
            "space.cells": 5,
            "space.nodes": 1,
            "space.ops": ["skip_connect", "sep_conv_3x3"],
            "space.edge_ops": [[["skip_connect"], ["sep_conv_3x3"]], [["sep_conv_3x3"], ["skip_connect"]]],
            "method.options": {"lambda1": 0.5},
            "weights.clip_norm": "inf",
            "seed": 7,
        },
    )
    again = schema.from_dict(SearchConfig, json.loads(json.dumps(schema.to_dict(changed))))
    assert again == changed
    assert again != SearchConfig()
    assert again.space.edge_ops == ((("skip_connect",), ("sep_conv_3x3",)), (("sep_conv_3x3",), ("skip_connect",)))
    assert again.weights.clip_norm == float("inf")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"space.cells": 2}, "space.cells: 2 is not possible; allowed: >= 3"),
        ({"space.channels": 0}, "space.channels: 0 is not possible; allowed: >= 1"),
        ({"space.nodes": 0}, "space.nodes: 0 is not possible; allowed: >= 1"),
        ({"space.ops": "sep_conv_3x3,sep_conv_3x3"}, "allowed: each operation once"),
        ({"space.ops": "none"}, "space.ops: 'none' is not possible; allowed: at least one operation besides none"),
        ({"space.ops": ""}, "allowed: at least one operation"),
        ({"space.ops": "sep_conv_3x3,skip_conect"}, "did you mean 'skip_connect'?"),
        ({"space.ops": 3}, "space.ops: 3 is not possible; allowed: a list"),
        ({"space.edge_ops": [[["none"]], [["none"]]]}, "space.edge_ops.normal: 1 is not possible; allowed: 14 lists"),
        ({"space.nodes": 1, "space.edge_ops": [[["none"], []], [["none"], ["none"]]]}, "space.edge_ops.normal[1]"),
        ({"weights.clip_norm": 0}, "weights.clip_norm: 0.0 is not possible"),
        ({"weights.learning_rate": -1}, "weights.learning_rate: -1.0 is not possible; allowed: >= 0"),
        ({"weights.momentum": "nan"}, "weights.momentum: 'nan' is not possible; allowed: a number"),
        ({"arch.clip_norm": 0}, "arch.clip_norm: 0.0 is not possible; allowed: > 0 (inf = no clipping)"),
        ({"arch.beta2": 1}, "arch.beta2: 1.0 is not possible; allowed: in [0, 1)"),
        ({"data.source": "cifar"}, "data.source: 'cifar' is not a source; allowed: digits | tfds:NAME | npz:FILE"),
        ({"data.source": "digits:8"}, "data.source: 'digits:8' is not a source"),
        ({"data.flip": "maybe"}, "data.flip: 'maybe' is not possible; allowed: true | false"),
        ({"epochs": "3.5"}, "epochs: '3.5' is not possible; allowed: a whole number"),
        ({"epochs": True}, "epochs: True is not possible; allowed: a whole number"),
        ({"epochs": "many"}, "epochs: 'many' is not possible; allowed: a whole number"),
        ({"epochs": "inf"}, "epochs: 'inf' is not possible; allowed: a whole number"),
        ({"batch_size": 0}, "batch_size: 0 is not possible; allowed: >= 1"),
        ({"batch_size": 10, "run.devices": "4"}, "batch_size: 10 is not possible; allowed: a multiple of 4 (devices)"),
        ({"seed": -1}, "seed: -1 is not possible; allowed: 0..4294967295"),
        ({"seed": 2**32}, "seed: 4294967296 is not possible; allowed: 0..4294967295"),
        ({"seed": "99999999999999999999"}, "seed: 99999999999999999999 is not possible; allowed: 0..4294967295"),
        ({"seed": "9" * 5000}, "is not possible; allowed: a whole number"),
        ({"dtype": "float31"}, "dtype: unknown value 'float31'; did you mean 'float32'?"),
        ({"precision": "tf23"}, "precision: unknown value 'tf23'; did you mean 'tf32'?"),
        ({"run.devices": "two"}, "run.devices: 'two' is not possible; allowed: >= 1 | all"),
        ({"run.devices": "0"}, "run.devices: '0' is not possible; allowed: >= 1 | all"),
        ({"run.devices": "²"}, "run.devices: '²' is not possible; allowed: >= 1 | all"),
        ({"weights.momentum": 1}, "weights.momentum: 1.0 is not possible; allowed: in [0, 1)"),
        ({"weights.momentum": -0.5}, "weights.momentum: -0.5 is not possible; allowed: in [0, 1)"),
        ({"weights.clip_norm": "-inf"}, "weights.clip_norm: -inf is not possible; allowed: > 0"),
        ({"data.examples": 1}, "data.examples: 1 is not possible; allowed: 0 (all) | >= 2"),
        ({"data.examples": -2}, "data.examples: -2 is not possible; allowed: 0 (all) | >= 2"),
        ({"data.holdout": -0.1}, "data.holdout: -0.1 is not possible; allowed: in [0, 1) | a whole number"),
        ({"data.holdout": 2.5}, "data.holdout: 2.5 is not possible; allowed: in [0, 1) | a whole number"),
        ({"data.split": "0.7,0.7"}, "data.split: '0.7,0.7' is not possible; allowed: shared | two shares > 0 of sum"),
        ({"data.split": "0.5,nan"}, "data.split: '0.5,nan' is not possible; allowed: shared | two shares > 0"),
        ({"data.split": "0,1"}, "data.split: '0,1' is not possible; allowed: shared | two shares > 0"),
        ({"data.split": "sharde"}, "data.split: 'sharde' is not possible; allowed: shared | two shares > 0"),
        ({"run.checkpoint_every": 0}, "run.checkpoint_every: 0 is not possible; allowed: >= 1"),
        ({"run.progress": "bars"}, "run.progress: unknown value 'bars'; did you mean 'bar'?"),
        ({"space.cels": 8}, "did you mean 'space.cells'?"),
    ],
)
def test_impossible_values_are_one_line(changes, line):
    with pytest.raises(UserError) as error:
        schema.replace(SearchConfig(), changes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [path for path, hint, _ in schema.fields(SearchConfig) if hint is float])
def test_every_number_is_finite_but_the_norm_that_means_no_clipping(path):
    for value in ("inf", float("inf")):
        if path.endswith(".clip_norm"):
            assert schema.get(schema.replace(SearchConfig(), {path: value}), path) == float("inf")
        else:
            with pytest.raises(UserError, match=rf"^{path}: inf is not possible; allowed: a finite number$"):
                schema.replace(SearchConfig(), {path: value})


def test_whole_numbers_keep_every_digit():
    assert schema.convert_scalar(int, "9007199254740993", "f") == 2**53 + 1  # a float would round it to 2^53
    assert schema.convert_scalar(int, 9007199254740993, "f") == 2**53 + 1
    assert schema.convert_scalar(int, "1e3", "f") == schema.convert_scalar(int, "1000.0", "f") == 1000
    assert schema.replace(SearchConfig(), {"seed": "4294967295"}).seed == 2**32 - 1


def test_odd_widths_and_small_subsets_are_possible():
    assert [SpaceConfig(channels=width).channels for width in (1, 3, 7)] == [1, 3, 7]
    assert [schema.replace(SearchConfig(), {"data.examples": n}).data.examples for n in (0, 2, 3)] == [0, 2, 3]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"space": {"cels": 8}}, "space: unknown value 'cels'; did you mean 'cells'?"),
        ({"spce": {}}, "config: unknown value 'spce'; did you mean 'space'?"),
        ({"space": 3}, "space: 3 is not possible; allowed: a section"),
    ],
)
def test_json_of_another_shape_is_one_line(values, line):
    with pytest.raises(UserError) as error:
        schema.from_dict(SearchConfig, values)
    assert line in str(error.value)


def test_replace_converts_and_leaves_the_rest_alone():
    made = schema.replace(
        SearchConfig(), {"space.head_norm": "no", "arch.learning_rate": "1e-2", "method.options.x": 1}
    )
    assert made.space.head_norm is False
    assert made.arch.learning_rate == 0.01
    assert made.method.options == {"x": 1}
    changed = {path for path in PATHS if schema.get(made, path) != schema.get(SearchConfig(), path)}
    assert changed == {"space.head_norm", "arch.learning_rate", "method.options"}


def test_own_primitives_bring_their_own_names():
    with pytest.raises(UserError):
        SpaceConfig(ops=("mine",))
    assert SpaceConfig(ops=("mine",), primitives="mine.py").ops == ("mine",)


def test_how_it_is_run_is_not_compared_on_resume():
    start = schema.replace(SearchConfig(), {"method.options.lambda1": 1.0})
    moved = schema.replace(start, {"run.workdir": "elsewhere", "run.devices": "2", "run.steps_per_dispatch": 3})
    other = schema.replace(start, {"method.options.lambda1": 2.0, "seed": 1})
    assert schema.differences(schema.computed(start), schema.computed(moved)) == []
    assert schema.differences(schema.computed(start), schema.computed(other)) == [
        "method.options.lambda1: 1.0 in the workdir, 2.0 now",
        "seed: 0 in the workdir, 1 now",
    ]
    assert not any(path.startswith("run.") for path in schema.computed(start))
    assert set(schema.computed(start)) | {"method.options"} == {p for p in PATHS if not p.startswith("run.")} | {
        "method.options.lambda1"
    }


def test_every_field_is_explained_beside_it():
    comments = schema.comments(SearchConfig)
    assert list(comments) == PATHS
    assert [path for path, text in comments.items() if not text] == []
    assert comments["weights.momentum"] == "decay of the velocity"


def test_config_imports_neither_jax_nor_numpy():
    code = "import sys, prdarts_jax.config.search; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
