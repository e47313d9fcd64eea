"""The recipe's numbers, its schedules in closed form, presets, and the flags of `prdarts train`."""

from __future__ import annotations

import itertools
import json
import math
import re

import jax
import optax
import pytest

from prdarts_jax import cli, optimizers, schedules
from prdarts_jax.cli import train as cli_train
from prdarts_jax.config import schema
from prdarts_jax.config.train import NetworkConfig, SgdConfig, TrainConfig
from prdarts_jax.data.batches import hold_out
from prdarts_jax.errors import UserError
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.presets import train as train_presets
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import inputs as train_inputs

# The recipe, written down a second time.
CIFAR = {
    "data.source": "tfds:cifar10",
    "data.crop_padding": 4,
    "data.flip": True,
    "data.cutout": 16,
    "network.channels": 36,
    "network.cells": 20,
    "network.stem": "cifar",
    "network.auxiliary": True,
    "network.auxiliary_second_norm": True,
    "auxiliary_weight": 0.4,
    "epochs": 600,
    "batch_size": 128,
    "drop_path": 0.2,
    "label_smoothing": 0,
    "ema": 0,
    "weights.learning_rate": 0.025,
    "weights.schedule": "cosine",
    "weights.warmup_epochs": 0,
    "weights.scale_lr": False,
    "weights.momentum": 0.9,
    "weights.nesterov": False,
    "weights.weight_decay": 3e-4,
    "weights.clip_norm": 5,
}
IMAGENET = CIFAR | {
    "data.source": "tfds:imagenet2012",
    "data.crop_padding": 0,
    "data.cutout": 0,
    "data.image_size": 224,
    "data.min_area": 0.08,
    "data.brightness": 0.4,
    "data.contrast": 0.4,
    "data.saturation": 0.4,
    "data.hue": 0.2,
    "network.channels": 48,
    "network.cells": 14,
    "network.stem": "imagenet",
    "epochs": 250,
    "drop_path": 0,
    "label_smoothing": 0.1,
    "weights.learning_rate": 0.1,
    "weights.schedule": "linear",
    "weights.weight_decay": 3e-5,
}
RECIPES = {
    "cifar10": CIFAR,
    "cifar100": CIFAR | {"data.source": "tfds:cifar100"},
    "released-cifar10": CIFAR | {"drop_path": 0.3, "network.auxiliary": False},
    "released-cifar100": CIFAR | {"data.source": "tfds:cifar100", "drop_path": 0.4, "network.auxiliary": False},
    "imagenet": IMAGENET,
    "released-imagenet": IMAGENET | {"batch_size": 256, "label_smoothing": 0.2},
    "darts-imagenet": IMAGENET | {"weights.schedule": "step", "network.auxiliary_second_norm": False},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_was_published(name):
    made = train_presets.resolve(name).config
    assert {path: schema.get(made, path) for path in RECIPES[name]} == RECIPES[name]
    if "imagenet" in name:
        assert made.data.shorter_side == 256


def test_every_preset_is_a_config_that_survives_json():
    assert set(train_presets.PRESETS) == {*RECIPES, "digits", "cifar10-small"}
    for name in train_presets.PRESETS:
        made = train_presets.resolve(name).config
        assert schema.from_dict(TrainConfig, json.loads(json.dumps(schema.to_dict(made)))) == made
    digits = train_presets.resolve("digits").config
    assert (digits.data.source, digits.data.cutout, digits.network.auxiliary) == ("digits", 0, False)


def test_flags_win_and_every_value_has_its_source():
    made = train_presets.resolve("imagenet", {"epochs": "9", "network.cells": 5})
    assert (made.config.epochs, made.config.network.cells, made.config.network.channels) == (9, 5, 48)
    rows = {path: (value, source) for path, value, source in train_presets.table(made)}
    assert rows["epochs"] == (9, "flag")
    assert rows["network.channels"] == (48, "preset imagenet (paper)")
    assert rows["weights.schedule"] == ("linear", "preset imagenet (released program)")
    assert rows["weights.momentum"] == (0.9, "default (released program)")
    assert set(rows) == {path for path, _, _ in schema.fields(TrainConfig)}


def test_values_that_nobody_chose_say_where_they_come_from():
    words = {"paper", "released program", "DARTS", "ours"}
    assert set(train_presets.PROVENANCE) == {path for path in IMAGENET if path not in ("ema", "weights.scale_lr")} | {
        "data.test_resize"
    }
    for name, preset in train_presets.PRESETS.items():
        sources = train_presets.resolve(name, {"seed": "1"}).sources
        assert sources.pop("seed") == "flag"
        for path, source in sources.items():
            place, word = re.fullmatch(r"(.*) \((.*)\)", source).groups()
            assert place == (f"preset {name}" if path in preset.settings else "default") and word in words
    # What differs between two recipes is of the program that gave its name to one of them.
    for name, word in (("released-cifar10", "released program"), ("darts-imagenet", "DARTS")):
        base = RECIPES["cifar10" if name.endswith("10") else "imagenet"]
        sources = train_presets.resolve(name).sources
        assert {sources[path] for path in base if base[path] != RECIPES[name][path]} == {f"preset {name} ({word})"}
    assert not any("paper" in source for source in train_presets.resolve("darts-imagenet").sources.values())
    digits = train_presets.resolve("digits").sources
    assert (digits["epochs"], digits["network.stem"]) == ("preset digits (ours)", "default (DARTS)")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrainConfig(epochs=0), "epochs: 0 is not possible; allowed: >= 1"),
        (lambda: TrainConfig(drop_path=1), r"drop_path: 1 is not possible; allowed: in \[0, 1\)"),
        (lambda: TrainConfig(ema=1.0), "ema: 1.0 is not possible"),
        (lambda: TrainConfig(label_smoothing=-0.1), "label_smoothing: -0.1 is not possible"),
        (lambda: TrainConfig(dtype="float16"), "dtype: unknown value 'float16'"),
        (lambda: TrainConfig(epochs=5, weights=SgdConfig(schedule="linear")), "epochs: 5 .* > 5 with weights.schedule"),
        (lambda: TrainConfig(epochs=5, weights=SgdConfig(warmup_epochs=6)), "weights.warmup_epochs: 6 .* 0..5"),
        (lambda: SgdConfig(schedule="cosin"), "weights.schedule: unknown value 'cosin'; did you mean 'cosine'?"),
        (lambda: SgdConfig(clip_norm=0), "weights.clip_norm: 0 is not possible"),
        (lambda: NetworkConfig(stem="image"), "network.stem: unknown value 'image'"),
        (lambda: NetworkConfig(channels=1), "network.channels: 1 is not possible; allowed: >= 2"),
        (lambda: TrainConfig(seed=2**32), r"seed: 4294967296 is not possible; allowed: 0\.\.4294967295$"),
        (lambda: TrainConfig(auxiliary_weight=math.inf), "auxiliary_weight: inf is not possible; allowed: a finite"),
        (lambda: SgdConfig(learning_rate=math.inf), "weights.learning_rate: inf is not possible; allowed: a finite"),
        (lambda: SgdConfig(momentum=1.0), r"weights.momentum: 1.0 is not possible; allowed: in \[0, 1\)"),
        (lambda: NetworkConfig(cells=2), "network.cells: 2 is not possible; allowed: >= 3"),
        (lambda: train_presets.resolve("cifar"), "preset: unknown value 'cifar'; did you mean 'cifar10'?"),
    ],
)
def test_what_is_not_possible(make, said):
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stem", "channels"), [("cifar", 3), ("cifar", 7), ("imagenet", 3)])
def test_odd_widths_make_a_network(stem, channels):
    assert NetworkConfig(stem=stem, channels=channels).channels == channels
    skips = ((("skip_connect", 0), ("skip_connect", 1)),)
    net = DerivedNetwork(
        Genotype(skips, (2,), skips, (2,)), channels=channels, cells=3, classes=2, stem=stem, auxiliary=False
    )
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
    made = jax.eval_shape(net.init, jax.random.key(0), images)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(made))
    (logits, _), _ = jax.eval_shape(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"]), made, images)
    assert logits.shape == (2, 2)


@pytest.mark.parametrize("name", ["imagenet", "darts-imagenet"])
def test_the_auxiliary_head_is_that_of_the_recipe(name):
    skips = ((("skip_connect", 0), ("skip_connect", 1)),)
    made = train_presets.resolve(name, {"network.channels": 4, "network.cells": 3}).config
    problem = train_inputs.make_problem(made, Genotype(skips, (2,), skips, (2,)), 5, ((0.5,), (0.25,)))
    shapes = jax.eval_shape(problem.network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))
    assert ("bn2" in shapes["params"]["auxiliary"]) == (name == "imagenet")
    assert "bn1" in shapes["params"]["auxiliary"]


def test_no_clipping_is_written_inf():
    assert schema.replace(TrainConfig(), {"weights.clip_norm": "inf"}).weights.clip_norm == math.inf


# --- schedules --------------------------------------------------------------------------------------------------------


def test_cosine_is_that_of_optax_and_ends_near_zero():
    theirs = optax.cosine_decay_schedule(0.025, 600)
    for epoch in (0, 1, 299, 300, 599):
        assert schedules.cosine(epoch, 600, 0.025) == pytest.approx(float(theirs(epoch)), rel=1e-5, abs=1e-8)
    assert schedules.cosine(599, 600, 0.025) == pytest.approx(0.025 * (math.pi / 600) ** 2 / 4, rel=1e-4)


def test_linear_has_its_kink_five_epochs_before_the_end():
    rates = [schedules.linear(epoch, 250, 0.1) for epoch in range(250)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[122] == pytest.approx(0.1 * (245 - 122) / 245)
    assert rates[244] == pytest.approx(0.1 / 245)  # five epochs and this one are left
    assert rates[245:] == pytest.approx([0.1 / 245 * share for share in (1.0, 0.8, 0.6, 0.4, 0.2)])
    assert all(a > b or math.isclose(a, b) for a, b in itertools.pairwise(rates))


def test_step_is_0_97_an_epoch():
    rates = [schedules.step(epoch, 0.1) for epoch in range(250)]
    assert rates[0] == 0.1 and rates[1] == pytest.approx(0.097)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([0.97] * 249)
    assert rates[249] == pytest.approx(0.1 * math.exp(249 * math.log(0.97)))


@pytest.mark.reference
def test_schedules_are_those_of_torch():
    """The rate that torch's scheduler has in every epoch of DARTS' ImageNet and CIFAR recipes."""
    torch = pytest.importorskip("torch")
    for kind, high, epochs, scheduler, argument in (
        ("step", 0.1, 250, torch.optim.lr_scheduler.StepLR, {"step_size": 1, "gamma": 0.97}),
        ("cosine", 0.025, 60, torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 60}),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=high)
        theirs = scheduler(optimizer, **argument)
        for epoch in range(epochs):
            rate = optimizer.param_groups[0]["lr"]
            assert schedules.learning_rate(kind, epoch, epochs, high) == pytest.approx(rate, rel=1e-9)
            optimizer.step()
            theirs.step()


@pytest.mark.parametrize("kind", schedules.SCHEDULES)
def test_warm_up_multiplies_the_schedule(kind):
    plain = [schedules.learning_rate(kind, epoch, 20, 0.5) for epoch in range(20)]
    warm = [schedules.learning_rate(kind, epoch, 20, 0.5, 4) for epoch in range(20)]
    assert warm[:4] == pytest.approx([plain[e] * (e + 1) / 4 for e in range(4)])
    assert warm[4:] == plain[4:]


def test_drop_path_goes_up_in_a_line_and_never_reaches_its_rate():
    rates = [schedules.drop_path_rate(epoch, 600, 0.2) for epoch in range(600)]
    assert rates[0] == 0 and rates[300] == pytest.approx(0.1)
    assert rates[599] == pytest.approx(0.2 * 599 / 600)


def test_the_linear_rule_scales_the_learning_rate():
    on = SgdConfig(learning_rate=0.1, scale_lr=True)
    assert optimizers.base_rate(TrainConfig(batch_size=512, weights=on)) == pytest.approx(0.4)
    assert optimizers.base_rate(TrainConfig(batch_size=512)) == 0.025


def test_examples_are_a_seeded_subset_without_repetition():
    small = schema.replace(TrainConfig(), {"data.examples": 30})
    found = train_inputs.examples(small, 101)
    assert len(set(found.tolist())) == 30 and found.min() >= 0 and found.max() < 101
    assert found.tolist() == train_inputs.examples(small, 101).tolist()
    assert found.tolist() != train_inputs.examples(schema.replace(small, {"seed": 1}), 101).tolist()
    out = schema.replace(small, {"data.holdout": 71})
    kept, held = hold_out(101, 71, seed=0)
    assert sorted(train_inputs.examples(out, 101).tolist()) == kept.tolist()
    assert not set(train_inputs.examples(schema.replace(out, {"data.examples": 20, "seed": 5}), 101)) & set(held)
    for count in (30, 29, 0):
        whole = schema.replace(TrainConfig(), {"data.examples": count and 30})
        assert train_inputs.examples(whole, count).tolist() == list(range(count))


# --- the command line -------------------------------------------------------------------------------------------------


def _error(capsys, words):
    capsys.readouterr()
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("prdarts: error: ") and said.count("\n") == 1, said
    return said.removeprefix("prdarts: error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--genotype: none is given; allowed: a name of the zoo"),
        (["--genotype", "PRDART"], "genotype: unknown value 'PRDART'; did you mean 'PRDARTS'?"),
        (["--genotype", "absent.json"], "genotype: no file or workdir 'absent.json'"),
        (["--genotype"], "argument --genotype: expected one argument"),
        (["--epoch", "3"], "flag: unknown --epoch; did you mean --epochs?"),
        (["--genotipe", "PRDARTS"], "flag: unknown --genotipe; did you mean --genotype?"),
        (["--space.cells", "3"], "flag: unknown --space.cells"),
        (["--method.lambda1", "3"], "flag: unknown --method.lambda1"),
        (["--preset", "digit"], "preset: unknown value 'digit'; did you mean 'digits'?"),
        (["--seeds", "2..0"], "seeds: '2..0' is not possible; allowed: A..B with A <= B"),
        (["--seeds", "1,1"], "seeds: '1,1' is not possible"),
        (["--seeds", "0..1", "--seed", "3"], "flag: --seed and --seeds exclude each other"),
        (["--cells", "2"], "network.cells: 2 is not possible"),
        (["--json"], "flag: --json goes with --print-config"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in _error(capsys, ["train", *words])
    assert list(tmp_path.iterdir()) == []


def test_print_config_and_help_name_every_field(capsys):
    assert cli.main(["train", "--preset", "imagenet", "--channels=10", "--print-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {path for path, _, _ in schema.fields(TrainConfig)}
    assert shown["network.channels"] == {"value": 10, "source": "flag"}
    assert shown["run.workdir"]["value"] == "runs/train-imagenet-seed0"
    assert cli.main(["train", "--seeds", "0..2", "--print-config"]) == 0
    assert "runs/train-cifar10 " in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path, comment in schema.comments(TrainConfig).items():
        assert any(comment in line and path.replace("_", "-") in line.replace("_", "-") for line in lines), path
    assert any("data.cutout" in line and "(default: 16)" in line for line in lines)
    for name in train_presets.PRESETS:
        assert any(line.strip().startswith(f"{name} ") for line in lines)


def test_seeds():
    assert cli_train.parse_seeds("0..2") == [0, 1, 2]
    assert cli_train.parse_seeds("5..5") == [5]
    assert cli_train.parse_seeds("7,3") == [7, 3]
    for text in ("", "a..b", "0..", "-1..2", "1, 2", "0..99999999"):
        with pytest.raises(UserError, match="seeds: "):
            cli_train.parse_seeds(text)
