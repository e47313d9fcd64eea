"""Evaluation: every image exactly once, against loops in numpy, whatever the batch and the number of devices."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases
from search_cases import one_error, rows
from train_cases import TEST, digits, final_state, train

from prdarts_jax import cli
from prdarts_jax.config.train import TrainDataConfig
from prdarts_jax.data.batches import held_out_digest, hold_out
from prdarts_jax.data.sources import from_arrays
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.interop import export
from prdarts_jax.training import evaluation
from prdarts_jax.training import program as train_program


@pytest.fixture(autouse=True)
def _quick():
    with train_cases.shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture
def trained(folder):
    """One whole training; tests may not change it but for its evaluation.json."""
    if not (folder / "w").exists():
        assert train(folder / "w").status == "finished"
    return folder / "w"


@pytest.fixture(params=["auto", "always"], ids=["resident", "streamed"])
def read(request, trained, tmp_path):
    """The training, whose images stay on the device or are read while they are used."""
    workdir = shutil.copytree(trained, tmp_path / "w")
    document = json.loads((workdir / "config.json").read_text())
    document["config"]["data"]["stream"] = request.param
    (workdir / "config.json").write_text(json.dumps(document))
    return workdir


@pytest.fixture(scope="module")
def by_hand():
    """Loss, probabilities of each test image, one image at a time, with the network's own apply."""
    made = {}

    def compute(workdir, which):
        if which not in made:
            state = getattr(final_state(workdir).state, which)
            net = export.load_network(workdir).net
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            apply = jax.jit(lambda x: net.apply(variables, x)[0])
            mean, std = np.float32(digits().mean), np.float32(digits().std)
            images = (digits().test_images.astype(np.float32) / np.float32(255) - mean) / std
            logits = np.concatenate([np.asarray(apply(images[i : i + 1])) for i in range(TEST)]).astype(float)
            z = np.exp(logits - logits.max(axis=1, keepdims=True))
            made[which] = z / z.sum(axis=1, keepdims=True)
        return made[which]

    return compute


def _check(found, probabilities, labels):
    """All figures of a Figures, by loops."""
    n, classes = probabilities.shape
    order = np.argsort(-probabilities, axis=1, kind="stable")
    assert found.loss == pytest.approx(-np.mean([np.log(probabilities[i, labels[i]]) for i in range(n)]), rel=1e-4)
    right = [order[i, 0] == labels[i] for i in range(n)]
    assert found.accuracy == sum(right) / n
    assert found.top5 == sum(labels[i] in order[i, :5] for i in range(n)) / n
    for k in range(classes):
        mine = [right[i] for i in range(n) if labels[i] == k]
        assert found.class_images[k] == len(mine)
        assert found.class_accuracy[k] == (sum(mine) / len(mine) if mine else pytest.approx(np.nan, nan_ok=True))
    error = 0.0
    for b in range(15):
        inside = [i for i in range(n) if b / 15 < probabilities[i].max() <= (b + 1) / 15]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([probabilities[i].max() for i in inside])
            error += len(inside) / n * abs(gap)
    assert found.calibration_error == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("batch_size", [None, 37, 5, 64])
def test_every_image_counts_once(read, trained, by_hand, batch_size):
    found = evaluation.evaluate(read, data=digits(), batch_size=batch_size, devices="1", workers="0")
    assert (found.images, found.epoch, found.step) == (TEST, train_cases.EPOCHS, train_cases.TOTAL)
    _check(found.figures, by_hand(trained, "variables"), digits().test_labels)
    _check(found.ema, by_hand(trained, "ema"), digits().test_labels)
    last = rows(trained, "final")[0]
    assert last["test_accuracy"] == found.figures.accuracy
    assert last["test_top5"] == found.figures.top5
    assert last["test_loss"] == pytest.approx(found.figures.loss, rel=1e-6)
    assert last["ema_test_accuracy"] == found.ema.accuracy


def test_what_is_taken_away_has_the_same_figures(trained, by_hand, tmp_path):
    """From a training to the exported program, and to an evaluation of the flat file that knows no training."""
    assert cli.main(["export", str(trained), "--format", "stablehlo", "--out", str(tmp_path / "net.stablehlo")]) == 0
    program = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    logits = np.asarray(program.call(digits().test_images)).astype(float)
    z = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(z / z.sum(axis=1, keepdims=True), by_hand(trained, "variables"), rtol=1e-4, atol=1e-6)
    flat = tmp_path / "w" / "network.safetensors"
    flat.parent.mkdir()
    assert cli.main(["export", str(trained), "--format", "safetensors", "--out", str(flat)]) == 0
    found = evaluation.evaluate(flat.parent, data=digits(), batch_size=37, devices="1")
    _check(found.figures, by_hand(trained, "variables"), digits().test_labels)


@pytest.mark.multidevice
def test_four_devices_find_the_same(read, trained, by_hand):
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices of 4")
    found = evaluation.evaluate(read, data=digits(), batch_size=8, devices="4", workers="0")
    _check(found.figures, by_hand(trained, "variables"), digits().test_labels)
    with pytest.raises(UserError, match="batch_size: 6 is not divisible by 4 devices"):
        evaluation.evaluate(trained, data=digits(), batch_size=6, devices="4")


def test_an_image_does_not_see_the_others(trained):
    """Loss, rank and confidence of each image, in an order turned round."""
    problem = evaluation.restore(trained, _mesh())
    program = train_program.make_evaluation(problem.problem, _mesh())
    data = train_program.Images(digits().test_images, digits().test_labels)
    order = np.arange(TEST, dtype=np.int32)[None]
    straight = program(problem.variables, order, data)
    turned = program(problem.variables, order[:, ::-1], data)
    np.testing.assert_array_equal(np.asarray(straight.rank)[:, ::-1], turned.rank)
    np.testing.assert_allclose(np.asarray(straight.loss)[:, ::-1], turned.loss, rtol=1e-4, atol=1e-6)


def _mesh():
    from prdarts_jax.devices import sharding

    return sharding.make_mesh(jax.devices()[:1])


# --- the figures ------------------------------------------------------------------------------------------------------


def test_rank_counts_classes_ahead_and_ties_in_their_order():
    logits = jnp.asarray([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    found = [train_program.outputs(logits, jnp.full(3, k)).rank.tolist() for k in range(3)]
    assert found == [[0, 0, 2], [2, 1, 0], [1, 2, 1]]
    assert (np.argmax(logits, axis=1) == np.argmin(np.asarray(found), axis=0)).all()


def test_calibration_error_of_known_cases():
    sure = np.full(10, 1.0)
    assert evaluation.calibration_error(sure, np.ones(10, bool)) == 0
    assert evaluation.calibration_error(sure, np.zeros(10, bool)) == 1
    # 0.2 is the upper end of its bin: 3/15. Two bins: |0.5 - 0.2| and |1 - 0.9|.
    confidence, right = np.array([0.2, 0.2, 0.9, 0.9]), np.array([True, False, True, True])
    assert evaluation.calibration_error(confidence, right) == pytest.approx(0.5 * 0.3 + 0.5 * 0.1)
    assert evaluation.calibration_error(np.array([0.2, 0.21]), np.array([True, False])) == pytest.approx(0.505)
    assert evaluation.calibration_error(np.array([0.19, 0.2]), np.array([True, False])) == pytest.approx(0.305)


def test_five_classes_are_the_top_five():
    found = evaluation.figures(np.ones(7), np.arange(7), np.ones(7), np.arange(7), 7)  # image k: k classes ahead
    assert (found.accuracy, found.top5) == (1 / 7, 5 / 7)


def test_a_class_without_images_has_no_accuracy():
    found = evaluation.figures(np.ones(2), np.array([0, 6]), np.ones(2), np.array([0, 0]), 3)
    assert found.class_images == (2, 0, 0)
    assert found.class_accuracy[0] == 0.5 and np.isnan(found.class_accuracy[1:]).all()
    assert (found.accuracy, found.top5, found.loss) == (0.5, 0.5, 1.0)


def test_weights_that_are_not_finite_are_no_result(tmp_path):
    """Comparisons with NaN would count every image as right."""

    def program(variables, order, data):
        shape = order.shape
        return train_program.Outputs(np.full(shape, np.nan), np.zeros(shape, int), np.full(shape, np.nan))

    measure = evaluation.make_measure(program, digits(), TrainDataConfig(), _mesh(), batch_size=2, workers=0)
    with pytest.raises(RunError, match="test_loss is nan"):
        measure(None)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(folder, tmp_path):
    """A training whose data lies in a file, and that file."""
    npz = folder / "digits.npz"
    if not npz.exists():
        train_cases.write_npz(npz)
    if not (folder / "file").exists():
        assert cli.main(train_cases.words(folder / "file", npz)) == 0
    return shutil.copytree(folder / "file", tmp_path / "w"), npz


def test_the_command_prints_a_table_and_writes_json(on_disk, capsys):
    workdir, npz = on_disk
    capsys.readouterr()
    assert cli.main(["evaluate", str(workdir), "--devices", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads((workdir / "evaluation.json").read_text())
    last = rows(workdir, "final")[0]
    assert (found["accuracy"], found["ema"]["accuracy"]) == (last["test_accuracy"], last["ema_test_accuracy"])
    assert (found["images"], found["data"], found["classes"]) == (TEST, f"npz:{npz}", list(map(str, range(10))))
    assert sum(found["class_images"]) == TEST
    lines = captured.out.splitlines()
    assert lines[0] == f"{TEST} images of npz:{npz}, after epoch 3 (step 21)"
    (top1,) = [line.split() for line in lines if line.startswith("top-1")]
    assert top1[2] == f"{100 * found['accuracy']:.2f}"
    assert sum(line.startswith("class ") for line in lines) == sum(n > 0 for n in found["class_images"])
    assert lines[-1] == f"written: {workdir / 'evaluation.json'}"


def test_other_data_of_the_same_kind(on_disk, tmp_path):
    workdir, _ = on_disk
    data = digits()
    half = from_arrays(
        "half",
        data.train_images,
        data.train_labels,
        test_images=data.test_images[:9],
        test_labels=data.test_labels[:9],
    )
    path = train_cases.write_npz(tmp_path / "half.npz", half)
    assert cli.main(["evaluate", str(workdir), "--data", f"npz:{path}", "--devices=1"]) == 0
    found = json.loads((workdir / "evaluation.json").read_text())
    assert (found["images"], found["data"]) == (9, f"npz:{path}")


def test_what_cannot_be_evaluated(on_disk, tmp_path, capsys):
    workdir, npz = on_disk
    data, command = digits(), ["evaluate", str(workdir), "--devices", "1"]
    wide = from_arrays(
        "wide",
        data.train_images.repeat(2, axis=2),
        data.train_labels,
        test_images=data.test_images.repeat(2, axis=2),
        test_labels=data.test_labels,
    )
    none = from_arrays("none", data.train_images, data.train_labels)
    for made, said in ((wide, "images [8, 16, 1]; allowed: 10 classes, images [8, 8, 1]"), (none, "no test images")):
        path = train_cases.write_npz(tmp_path / f"{made.name}.npz", made)
        one_error(capsys, [*command, "--data", f"npz:{path}"], 2, "data.source: ", said)
    one_error(capsys, ["evaluate", str(tmp_path / "absent")], 2, "WORKDIR: no directory ")
    one_error(capsys, ["evaluate", str(tmp_path)], 2, "holds no config.json; allowed: the workdir of a training")
    one_error(capsys, [*command[:2], "--devices", "9"], 2, "run.devices: 9 is more than there are")
    one_error(capsys, [*command[:2], "--devices", "x"], 2, "run.devices: 'x' is not possible")
    one_error(capsys, [*command, "--batch-size", "0"], 2, "batch_size: 0 is too small")
    assert not (workdir / "evaluation.json").exists()

    edited = json.loads((workdir / "config.json").read_text())
    edited["digests"]["data"] = "another"
    (workdir / "config.json").write_text(json.dumps(edited))
    one_error(capsys, command, 2, "is no longer the data of the training", "--data SOURCE")
    assert cli.main([*command, "--data", f"npz:{npz}"]) == 0
    shutil.rmtree(workdir / "checkpoints")
    one_error(capsys, [*command, "--data", f"npz:{npz}"], 2, "holds no checkpoint yet")
    edited["kind"] = "search"
    (workdir / "config.json").write_text(json.dumps(edited))
    one_error(capsys, command, 2, "holds a search; allowed: the workdir of a training")
    (workdir / "config.json").write_text("{")
    one_error(capsys, command, 2, "is not the config of a training")


def test_the_newest_good_checkpoint_is_read_and_nothing_else_touched(on_disk, capsys):
    workdir, _ = on_disk
    newest = workdir / "checkpoints" / str(train_cases.TOTAL)
    (newest / "SHA256SUMS").write_text("damaged\n")
    before = sorted(os.listdir(workdir / "checkpoints"))
    capsys.readouterr()
    assert cli.main(["evaluate", str(workdir), "--devices", "1"]) == 0
    captured = capsys.readouterr()
    assert f"checkpoint at step {train_cases.TOTAL}" in captured.err
    assert "after epoch 2 (step 14)" in captured.out
    assert sorted(os.listdir(workdir / "checkpoints")) == before


def test_a_network_without_a_training(trained, tmp_path, capsys):
    """What `prdarts import-torch` leaves: the network file alone."""
    (tmp_path / "w").mkdir()
    for name in ("network.safetensors", "genotype.json"):
        shutil.copy(trained / name, tmp_path / "w" / name)
    one_error(capsys, ["evaluate", str(tmp_path / "w")], 2, "--data: the network was imported and names no data")
    found = evaluation.evaluate(tmp_path / "w", data=digits(), batch_size=16, devices="1")
    assert found.figures.accuracy == rows(trained, "final")[0]["test_accuracy"]
    assert (found.epoch, found.ema) == (None, None)


def test_images_that_were_held_out(read, capsys):
    """The workdir of a training that has left out 12 images."""
    one_error(
        capsys, ["evaluate", str(read), "--part", "held"], 2, "part: unknown value 'held'; allowed: test | holdout"
    )
    with pytest.raises(UserError, match=r"part: 'holdout' .* \(it left out none\); allowed: test"):
        evaluation.evaluate(read, part="holdout", data=digits())
    document = json.loads((read / "config.json").read_text())
    document["config"]["data"]["holdout"] = 12
    document["digests"] |= held_out_digest(train_cases.IMAGES, 12, 0)
    (read / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"part: 'holdout' .* \(these are not its data\); allowed: test"):
        evaluation.evaluate(read, part="holdout", data=dataclasses.replace(digits(), digest="another"))
    found = evaluation.evaluate(read, part="holdout", data=digits(), batch_size=TEST, devices="1", workers="0")
    _, held = hold_out(train_cases.IMAGES, 12, seed=0)
    images, labels = digits().train_images[held], digits().train_labels[held]
    moved = from_arrays("digits", digits().train_images, digits().train_labels, test_images=images, test_labels=labels)
    expected = evaluation.evaluate(read, data=moved, batch_size=TEST, devices="1", workers="0")
    assert (found.images, found.figures.class_images) == (12, tuple(np.bincount(labels, minlength=10)))
    assert dataclasses.replace(found.figures, class_accuracy=()) == dataclasses.replace(
        expected.figures, class_accuracy=()
    )
    assert json.loads((read / "evaluation.json").read_text())["part"] == "test"
