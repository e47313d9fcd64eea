"""The training: its rows, its seeds, its errors; test_train_step.py has its step."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_cases
from jax.sharding import PartitionSpec
from search_cases import one_error, rows, snapshot, standard_promotion
from train_cases import EPOCH_STEPS, EPOCHS, GENOTYPE, TOTAL, digits, final_state, outcome, train, words

import prdarts_jax
from prdarts_jax import cli
from prdarts_jax.data.batches import Batch
from prdarts_jax.data.sources import from_arrays, load
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.presets import train as train_presets
from prdarts_jax.report import page as report_page
from prdarts_jax.run.metrics import comparable
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import loop as train_loop
from prdarts_jax.training import program as train_program


@pytest.fixture(autouse=True)
def _quick(request):
    if request.node.get_closest_marker("slow"):
        yield
        return
    with train_cases.shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def finished(folder):
    """One whole training; tests may not change it."""
    if not (folder / "w").exists():
        assert train(folder / "w").status == "finished"
    return folder / "w"


@pytest.fixture
def npz(folder):
    path = folder / "digits.npz"
    return path if path.exists() else train_cases.write_npz(path)


# --- a whole training -------------------------------------------------------------------------------------------------


def test_what_a_training_leaves(finished):
    assert Genotype.load(finished) == GENOTYPE
    head = json.loads((finished / "config.json").read_text())
    assert (head["kind"], head["image"], head["digests"]["data"]) == ("train", [8, 8, 1], digits().digest)
    steps, epochs, final = (rows(finished, kind) for kind in ("step", "epoch", "final"))
    assert [row["step"] for row in steps] == list(range(1, TOTAL + 1))
    assert [row["epoch"] for row in epochs] == list(range(EPOCHS))
    for epoch, row in enumerate(epochs):
        mine = [step for step in steps if step["epoch"] == epoch]
        for name in ("train_loss", "train_accuracy"):
            assert row[name] == pytest.approx(statistics.fmean(step[name] for step in mine), rel=1e-5)
        assert {f"{e}test_{name}" for e in ("", "ema_") for name in ("loss", "accuracy", "top5")} <= row.keys()
        assert row["test_accuracy"] <= row["test_top5"] <= 1
        assert row["progress/drop_path"] == pytest.approx(0.3 * epoch / EPOCHS)
        assert row["progress/learning_rate"] == pytest.approx(0.0125 * (1 + np.cos(np.pi * epoch / EPOCHS)))
    (last,) = final
    assert {**epochs[-1], "kind": "final"}.items() <= last.items()
    best = max(epochs, key=lambda row: row["test_accuracy"])
    assert (last["best_test_accuracy"], last["best_epoch"]) == (best["test_accuracy"], best["epoch"])
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_nothing_is_compiled_again_between_epochs(finished):
    """Learning rate, drop-path and the length of a dispatch are arguments."""
    inputs = train_inputs.prepare(train_cases.config(), GENOTYPE, data=digits())
    program = train_program.make_dispatch(inputs.problem, inputs.mesh, streamed=False)
    before = program._cache_size()
    train(finished.parent / "other-schedule", weights__schedule="linear", epochs=7, seed=3)
    assert program._cache_size() == max(before, 1)
    rates = [row["progress/learning_rate"] for row in rows(finished.parent / "other-schedule", "epoch")]
    assert rates == pytest.approx([0.025 * share for share in (1, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1)])


def test_evaluations_can_be_rarer(tmp_path, finished):
    train(tmp_path / "w", evaluate_every=2)
    found = rows(tmp_path / "w", "epoch")
    assert ["test_accuracy" in row for row in found] == [False, True, True]  # the last epoch always
    shared = [row for row in (comparable(row) for row in rows(finished, "step"))]
    assert [comparable(row) for row in rows(tmp_path / "w", "step")] == shared


def test_a_set_without_test_images(tmp_path):
    data = from_arrays("mine", digits().train_images, digits().train_labels)
    with pytest.raises(UserError, match=r"'mine' has no test images, .* --evaluate-every 0"):
        train(tmp_path / "w", given={"data": data})
    assert not (tmp_path / "w").exists()
    found = train(tmp_path / "w", given={"data": data}, evaluate_every=0, epochs=1)
    assert found.status == "finished"
    assert not any("test" in name for name in found.metrics)


@pytest.mark.slow
def test_a_transformation_of_the_user(tmp_path):
    """Nothing moves but the running statistics."""
    found = train(tmp_path / "w", given={"weight_tx": optax.set_to_zero()}, epochs=1, label_smoothing=0)
    assert found.status == "finished"
    inputs = train_inputs.prepare(train_cases.config(label_smoothing=0), GENOTYPE, data=digits())
    first = train_program.initial_carry(inputs.problem, inputs.mesh, jax.random.key(0), (8, 8, 1))
    head = json.loads((tmp_path / "w" / "config.json").read_text())
    assert "weights.transform" in head["digests"]
    from prdarts_jax.interop import export

    network = export.load_network(tmp_path / "w")
    jax.tree.map(np.testing.assert_array_equal, network.variables["params"], dict(first.state.variables.params))
    means = [leaf for leaf in jax.tree.leaves(network.variables["batch_stats"]) if np.any(leaf)]
    assert means
    with pytest.raises(UserError, match=r"digest of weights\.transform"):
        train(tmp_path / "w", epochs=1, label_smoothing=0)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("devices", [pytest.param("2", marks=pytest.mark.slow), "4"])
def test_several_devices_compute_the_same(devices, finished, tmp_path):
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices of 4")
    assert train(tmp_path / "w", run__devices=devices).status == "finished"
    one, four = (rows(w, "step") for w in (finished, tmp_path / "w"))
    assert len(one) == len(four) >= 10
    for expected, found in itertools.islice(zip(one, four, strict=True), 10):  # later, roundings have grown
        for name in ("train_loss", "train_accuracy", "gradient_norm/weights"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (expected["step"], name)
    one, four = (rows(w, "epoch")[0] for w in (finished, tmp_path / "w"))
    assert four["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    state = final_state(tmp_path / "w")
    for leaf in jax.tree.leaves(state):
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


@pytest.mark.slow
@pytest.mark.multidevice
def test_pmap_of_the_step_has_the_bits_of_shard_map():
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices of 4")
    problem = train_inputs.prepare(train_cases.config(), train_cases.GENOTYPE, data=digits()).problem
    mesh = sharding.make_mesh(jax.devices()[:4])
    state = train_program.initial_carry(problem, mesh, jax.random.key(0), (8, 8, 1)).state
    rng, size = np.random.default_rng(0), train_cases.BATCH
    images = jnp.asarray(rng.normal(size=(size, 8, 8, 1)), jnp.float32)
    batch = Batch(images, jnp.asarray(rng.integers(0, 10, size), jnp.int32))
    progress = {"learning_rate": np.float32(0.05), "drop_path": np.float32(0.3)}
    step, whole, split = train_program.make_step(problem, "data"), PartitionSpec(), PartitionSpec("data")
    mapped = jax.jit(sharding.map_over(mesh, step, (whole, split, split, whole, whole), (whole, whole)))
    axes = (None, 0, 0, None, None)
    pmapped = jax.pmap(step, axis_name="data", in_axes=axes, out_axes=None, devices=jax.devices()[:4])
    each = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), (batch, jnp.arange(size)))
    results = (
        mapped(state, batch, jnp.arange(size), jax.random.key(1), progress),
        pmapped(jax.device_get(state), *each, jax.random.key(1), progress),
    )
    by_map, by_pmap = (jax.tree.leaves((s.variables, s.opt, s.ema, m)) for s, m in results)
    assert [np.asarray(a).tobytes() for a in by_map] == [np.asarray(a).tobytes() for a in by_pmap]


@pytest.mark.slow
def test_bfloat16_keeps_the_state_in_float32(tmp_path):
    assert train(tmp_path / "w", dtype="bfloat16").status == "finished"
    state = final_state(tmp_path / "w")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.state.variables)} == {jnp.dtype("float32")}
    found = rows(tmp_path / "w", "epoch")
    assert found[-1]["train_loss"] < found[0]["train_loss"]


# --- several seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seeds_are_ordinary_trainings_with_a_mean(finished, npz, tmp_path, capsys, monkeypatch):
    pages = []
    monkeypatch.setattr(report_page, "report", lambda folders, out=None: pages.append((folders, out)) or out)
    command = [*words(tmp_path / "w", npz), "--seeds", "0..1"]
    assert cli.main([*command, "--time-limit", "1e-9"]) == 0
    assert f"to go on: prdarts {shlex.join(command)}\n" in capsys.readouterr().out
    assert not (tmp_path / "w" / "seed1").exists() and not pages
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "resuming at step 3 of" in said
    folders = [tmp_path / "w" / "seed0", tmp_path / "w" / "seed1"]
    assert pages[-1] == (folders, tmp_path / "w" / "report.html")
    same = outcome(folders[0])
    assert {**same, "genotype": None} == {**outcome(finished), "genotype": None}
    accuracies = [rows(w, "final")[0]["test_accuracy"] for w in folders]
    mean, spread = 100 * (1 - statistics.fmean(accuracies)), 100 * statistics.stdev(accuracies)
    assert f"test error after the last epoch: {mean:.2f} % ± {spread:.2f} (n = 2)" in said
    before = snapshot(tmp_path / "w")
    assert cli.main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert snapshot(tmp_path / "w") == before


def test_a_wrong_folder_of_a_later_seed_is_found_first(tmp_path):
    (tmp_path / "w" / "seed1").mkdir(parents=True)
    (tmp_path / "w" / "seed1" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"seed1 holds 'mine\.txt' and no config\.json"):
        train_loop.train_seeds(train_cases.config(), GENOTYPE, tmp_path / "w", [0, 1], data=digits())
    assert sorted(os.listdir(tmp_path / "w")) == ["seed1"]


def test_mean_and_deviation():
    found = train_loop.over_seeds([{"test_accuracy": a, "ema_test_loss": 1.0, "step": 1} for a in (0.1, 0.2, 0.6)])
    assert found["test_accuracy"] == pytest.approx(0.3)
    assert found["test_accuracy_std"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))
    assert found["ema_test_loss_std"] == 0 and "step" not in found


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.cutout", "9"], ["data.cutout: 9 is larger than the 8x8 images"]),
        (["--data.crop_padding", "8"], ["data.crop_padding: 8 "]),
        (["--network.auxiliary"], ["auxiliary: images of 8x8 do not fit", "29..40"]),
        (["--batch-size", "113"], ["batch_size: 113 ", "112 examples"]),
        (["--devices", "4", "--batch-size", "6"], ["batch_size: 6 ", "multiple of 4"]),
        (["--devices", "8"], ["run.devices: 8 is more than there are"]),
        (["--data", "npz:absent.npz"], ["absent.npz", "no such file"]),
        (["--weight-tx", "absent.py:f"], ["weights.transform: ", "no file 'absent.py'"]),
        (["--network.primitives", "absent.py"], ["network.primitives: ", "no file 'absent.py'"]),
        (["--workdir", "/dev/null/run"], ["workdir: ", "/dev/null is not a folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_impossible_input(npz, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    one_error(capsys, [*words(tmp_path / "runs" / "w", npz), *flags], 2, *said)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("preset", ["cifar10", "cifar100", "imagenet", "darts-imagenet", "cifar10-small"])
def test_a_missing_data_set_is_not_fetched(tmp_path, monkeypatch, capsys, preset):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--genotype", "PRDARTS", "--preset", preset, "--data-dir", str(tmp_path)]
    one_error(capsys, command, 2, "data.source: 'tfds:", f"is not prepared in {tmp_path}")
    assert os.listdir(tmp_path) == []


def test_nan_stops_the_run(npz, tmp_path, capsys, monkeypatch):
    """At the first step whose metrics see it; the checkpoint before it is whole."""
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp, optax\n"
        "def late(config):\n"
        "    def update(grads, count, params=None):\n"
        f"        return optax.tree.scale(jnp.where(count == {EPOCH_STEPS + 1}, jnp.nan, -1e-3), grads), count + 1\n"
        "    return optax.GradientTransformation(lambda params: jnp.int32(0), update)\n"
    )
    workdir = tmp_path / "w"
    command = [*words(workdir, npz), f"--weight-tx={tmp_path}/mine.py:late"]
    made, prepare = [], train_inputs.prepare

    def once(*args, **given):
        """The second start has the program of the first, which is not traced again."""
        made.append(made[0] if made else prepare(*args, **given))
        return made[0]

    monkeypatch.setattr(train_inputs, "prepare", once)
    one_error(capsys, command, 1, f"is nan at step {EPOCH_STEPS + 3}", "earlier checkpoints are kept")
    assert int(np.asarray(rows(workdir, "step")[-1]["step"])) == EPOCH_STEPS + 2
    assert sorted(os.listdir(workdir / "checkpoints")) == [str(EPOCH_STEPS)]
    one_error(capsys, command, 1, f"is nan at step {EPOCH_STEPS + 3}")  # it resumes, and says the same
    assert len(made) == 2


# --- the preset -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_digits_reach_97_percent(tmp_path):
    """The published cell on the 360 held-out images, with the preset as it is."""
    config = train_presets.resolve("digits", {"run.progress": "off"}).config
    found = prdarts_jax.train(config, "PRDARTS", tmp_path / "w")
    assert found.status == "finished" and found.report is not None
    assert found.metrics["test_accuracy"] >= 0.97
    evaluated = prdarts_jax.evaluate(tmp_path / "w")
    assert evaluated.images == 360
    assert evaluated.figures.accuracy == found.metrics["test_accuracy"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_cell_found_on_digits_and_retrained_beats_logistic_regression(tmp_path):
    """The whole way: search, derive, train from scratch; against scikit-learn's model on the same images."""
    from sklearn.linear_model import LogisticRegression

    from prdarts_jax import presets

    with standard_promotion():
        found = prdarts_jax.search(presets.resolve("digits", flags={"run.progress": "off"}).config, tmp_path / "search")
        config = train_presets.resolve("digits", {"run.progress": "off"}).config
        trained = prdarts_jax.train(config, tmp_path / "search", tmp_path / "train")
    assert (found.status, trained.status) == ("finished", "finished")
    data = load("digits")
    flat = [images.reshape(len(images), -1) / 255 for images in (data.train_images, data.test_images)]
    best = max(
        LogisticRegression(C=c, max_iter=5000).fit(flat[0], data.train_labels).score(flat[1], data.test_labels)
        for c in (0.1, 1.0, 10.0)
    )
    assert best > 0.9  # the rival is a fair one
    assert trained.metrics["test_accuracy"] > best, best
