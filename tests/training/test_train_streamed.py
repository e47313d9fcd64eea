"""Trainings on streamed data: the bits of those on the device, of those not stopped, and ImageNet's presets whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import train_cases
from data_cases import write_tfds
from PIL import Image
from search_cases import assert_same, one_error
from train_cases import TOTAL, digits, outcome, train

from prdarts_jax import cli
from prdarts_jax.presets import train as train_presets
from prdarts_jax.run.metrics import comparable, read
from prdarts_jax.training import evaluation

MOMENT = 1e-9  # minutes: over as soon as the first dispatch is
SIDE = 193  # pixels: the least that ImageNet's auxiliary head fits


@pytest.fixture(autouse=True)
def _quick():
    with train_cases.shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def streamed(folder, capsys):
    """The uninterrupted training, streamed; tests may not change it."""
    if not (folder / "streamed").exists():
        assert train(folder / "streamed", data__stream="always", run__workers="0").status == "finished"
        assert "data: 112 + 37 images of 8x8x1 are streamed" in capsys.readouterr().out
    return folder / "streamed"


def test_streamed_is_resident(streamed, tmp_path, capsys):
    """The images, their order and every draw are the same; two compiled programs may round differently."""
    assert train(tmp_path / "w").status == "finished"
    assert "stay on the device" in capsys.readouterr().out
    found, expected = outcome(streamed), outcome(tmp_path / "w")
    assert found["leaves"].keys() == expected["leaves"].keys()
    for path, (dtype, shape, content) in expected["leaves"].items():
        values = [np.frombuffer(each, dtype) for each in (found["leaves"][path][2], content)]
        assert found["leaves"][path][:2] == (dtype, shape)
        np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-4, err_msg=str(path))
    rows = [[row for row in each["rows"] if row["kind"] == "epoch"] for each in (found, expected)]
    for row, other in zip(*rows, strict=True):
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-3)
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


@pytest.mark.multidevice
def test_four_devices_split_every_batch(streamed, tmp_path):
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices of 4")
    more = {"data__stream": "always", "run__workers": "0", "run__devices": "4"}
    assert train(tmp_path / "w", **more).status == "finished"
    found, expected = (
        [row for row in read(workdir / "metrics.jsonl") if row["kind"] == "step"]
        for workdir in (tmp_path / "w", streamed)
    )
    assert len(found) == len(expected) == TOTAL
    for row, other in zip(found[:4], expected[:4], strict=True):  # rounding grows with the steps
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert row["gradient_norm/weights"] == pytest.approx(other["gradient_norm/weights"], rel=1e-3)


def test_stopped_after_every_dispatch(streamed, tmp_path):
    statuses = []
    while "finished" not in statuses:
        made = train(tmp_path / "w", data__stream="always", run__workers="0", run__time_limit=MOMENT)
        statuses.append(made.status)
        assert len(statuses) < 20
    assert statuses == ["time-limit"] * 8 + ["finished"]  # an epoch of 7 steps is 3 + 3 + 1
    assert_same(outcome(tmp_path / "w"), outcome(streamed))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_ended_and_started_again_with_other_workers(streamed, tmp_path, capsys, number):
    """A real process with a worker, ended in the middle of an epoch; it goes on without workers."""
    npz = train_cases.write_npz(tmp_path / "digits.npz")
    more = {"data.stream": "always", "run.checkpoint_minutes": 1e-6}
    command, log = train_cases.words(tmp_path / "w", npz, **more), tmp_path / "log"
    program = [sys.executable, "-m", "prdarts_jax", *command, "--workers=1"]
    with log.open("ab") as out:
        process = subprocess.Popen(program, stdout=out, stderr=out, start_new_session=True)
    while not (tmp_path / "w" / "checkpoints" / "3").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as a terminal and a scheduler do: the worker gets the signal too
    assert process.wait(timeout=60) == (-number if number == signal.SIGKILL else 128 + number), log.read_text()
    assert "Traceback" not in log.read_text()
    assert cli.main([*command, "--workers=0"]) == 0
    step = re.search(r"resuming at step (\d+) of", capsys.readouterr().out)
    assert step and 3 <= int(step[1]) < TOTAL
    assert_same(outcome(tmp_path / "w"), outcome(streamed))


def test_evaluate_gives_the_figures_of_the_last_epoch(streamed):
    found = evaluation.evaluate(streamed, data=digits(), workers="0")
    last = [row for row in read(streamed / "metrics.jsonl") if row["kind"] == "final"][-1]
    assert found.figures.loss == pytest.approx(last["test_loss"], rel=1e-6)
    assert (found.figures.accuracy, found.figures.top5) == (last["test_accuracy"], last["test_top5"])
    assert found.images == len(digits().test_images)


def _colours(count):
    """Three classes, told apart by colour, of any size."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 80, (int(rng.integers(30, 50)), int(rng.integers(30, 50)), 3))
        pixels[..., i % 3] += 120
        yield pixels.astype(np.uint8), i % 3


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("released-imagenet", "darts-imagenet")]


@pytest.mark.parametrize("preset", ["imagenet", *SLOW])
def test_imagenet_from_end_to_end(preset, tmp_path, capsys):
    if preset == "imagenet":
        for split, count in (("train", 24), ("val", 7)):
            for i, (pixels, k) in enumerate(_colours(count)):
                path = tmp_path / "set" / split / f"c{k}"
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path / f"{i}.jpg")
        source = [f"--data=folder:{tmp_path / 'set'}"]
    else:
        write_tfds(tmp_path, "mine", {"train": list(_colours(24)), "validation": list(_colours(7))}, classes=3)
        source = ["--data=tfds:mine", f"--data-dir={tmp_path}"]
    genotype = train_cases.write_genotype(tmp_path / "genotype.json")
    flags = [
        "train", f"--genotype={genotype}", f"--preset={preset}", *source, "--epochs=6", "--batch-size=8",
        f"--data.image-size={SIDE}", "--network.channels=4", "--network.cells=3", "--devices=1", "--progress=off",
        "--evaluate-every=6", "--run.steps-per-dispatch=2", "--run.log-every=1", "--run.checkpoint-every=6",
    ]  # fmt: skip
    assert cli.main([*flags, f"--workdir={tmp_path / 'w'}", "--workers=0"]) == 0
    said = capsys.readouterr().out
    assert f"data: 24 + 7 images of {SIDE}x{SIDE}x3 are streamed" in said and "test error after the last epoch" in said
    document = json.loads((tmp_path / "w" / "config.json").read_text())
    assert document["streamed"] is True and document["image"] == [SIDE, SIDE, 3]
    values, expected = document["config"], train_presets.resolve(preset).config
    assert values["network"]["auxiliary"] and values["label_smoothing"] == expected.label_smoothing > 0
    assert values["network"]["auxiliary_second_norm"] == (preset != "darts-imagenet")

    # Stopped in the middle of the first epoch, and gone on with by a worker: the same bits.
    again = [*flags, f"--workdir={tmp_path / 'again'}"]
    assert cli.main([*again, "--workers=0", f"--time-limit={MOMENT}"]) == 0
    assert cli.main([*again, "--workers=1"]) == 0
    assert "resuming at step 2 of 18" in capsys.readouterr().out
    found, whole = (
        [
            (workdir / "network.safetensors").read_bytes(),
            *(comparable(row) for row in read(workdir / "metrics.jsonl")),
        ]
        for workdir in (tmp_path / "again", tmp_path / "w")
    )
    assert found == whole and len([row for row in whole[1:] if row["kind"] == "step"]) == 18

    evaluate = ["evaluate", str(tmp_path / "w"), "--workers=0", "--devices=1"]
    assert cli.main(evaluate) == 0
    last = [row for row in read(tmp_path / "w" / "metrics.jsonl") if row["kind"] == "final"][-1]
    made = json.loads((tmp_path / "w" / "evaluation.json").read_text())
    assert made["images"] == sum(made["class_images"]) == 7 and made["accuracy"] == last["test_accuracy"]
    for wrong, words in (
        (["--batch-size=25"], ["batch_size: 25", "24 examples"]),
        (["--data.stream=never"], ["data.stream: 'never'", "data.image_size"]),
        (["--data.crop-padding=2"], ["data.crop_padding: 2", "data.image_size"]),
        (["--workers=some"], ["run.workers: 'some'", "auto | >= 0"]),
    ):
        one_error(capsys, [*flags, f"--workdir={tmp_path / 'other'}", *wrong], 2, *words)
        assert not (tmp_path / "other").exists()
    if preset == "imagenet":
        bad = sorted((tmp_path / "set" / "val").rglob("*.jpg"))[4]
        bad.write_bytes(bytes(bad.stat().st_size))  # the same name and size
        one_error(capsys, evaluate, 2, str(bad), "not a readable image")
