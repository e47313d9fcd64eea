"""A training that was stopped or killed ends as the one that was not: the same bits in every file."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import search_cases
import train_cases
from search_cases import assert_same, one_error, snapshot
from train_cases import EPOCH_STEPS, GENOTYPE, TOTAL, digits, outcome, train, words

from prdarts_jax import cli
from prdarts_jax.errors import UserError
from prdarts_jax.report import page as report_page
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import loop as train_loop


@pytest.fixture(autouse=True)
def _quick():
    with train_cases.shared_programs():
        yield


MOMENT = 1e-9  # minutes: over as soon as the first dispatch is


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def finished(folder):
    """The uninterrupted training; tests may not change it."""
    if not (folder / "uninterrupted").exists():
        assert train(folder / "uninterrupted").status == "finished"
    return folder / "uninterrupted"


@pytest.fixture
def stopped(folder):
    """A training stopped in the middle of its second epoch; tests may not change it."""
    workdir = folder / "stopped"
    if not workdir.exists():
        while not (workdir / "checkpoints" / str(EPOCH_STEPS + 3)).exists():
            assert train(workdir, run__time_limit=MOMENT).status == "time-limit"
    return workdir


@pytest.fixture
def npz(folder):
    path = folder / "digits.npz"
    return path if path.exists() else train_cases.write_npz(path)


def test_stopped_after_every_dispatch(finished, tmp_path, capsys):
    statuses = []
    while "finished" not in statuses:
        statuses.append(train(tmp_path / "w", run__time_limit=MOMENT).status)
        assert len(statuses) < 20
        assert (tmp_path / "w" / "genotype.json").is_file()  # from the start: it is an input
    assert statuses == ["time-limit"] * 8 + ["finished"]  # an epoch of 7 steps is 3 + 3 + 1
    assert_same(outcome(tmp_path / "w"), outcome(finished))
    said = capsys.readouterr().out
    assert f"resuming at step 3 of {TOTAL} (epoch 0); the result is that of an uninterrupted training bit" in said


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_the_length_of_a_dispatch_changes_no_bit(finished, tmp_path, steps):
    assert train(tmp_path / "w", run__steps_per_dispatch=steps).status == "finished"
    assert_same(outcome(tmp_path / "w"), outcome(finished))


def test_the_seed_decides_every_bit(finished, tmp_path):
    assert train(tmp_path / "w", seed=1).status == "finished"
    assert outcome(tmp_path / "w")["leaves"] != outcome(finished)["leaves"]


def test_a_signal_saves_and_says_how_to_go_on(finished, npz, tmp_path, monkeypatch, capsys):
    update, seen = train_loop.Progress.update, []

    def interrupted(self, n, **fields):
        seen.append(n)
        if sum(seen) == EPOCH_STEPS + 3:
            signal.raise_signal(signal.SIGTERM)
        update(self, n, **fields)

    command = words(tmp_path / "w", npz)
    with monkeypatch.context() as patch:
        patch.setattr(train_loop.Progress, "update", interrupted)
        assert cli.main(command) == 143
    said = capsys.readouterr()
    assert said.err == ""
    assert f"saved in {tmp_path / 'w'}; to go on: prdarts train --genotype" in said.out.splitlines()[-1]
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps() == [EPOCH_STEPS, EPOCH_STEPS + 3]
    assert cli.main(command) == 0
    assert "test error after the last epoch: " in capsys.readouterr().out
    assert_same(outcome(tmp_path / "w"), outcome(finished))


def test_killed_and_started_again(npz, tmp_path, capsys):
    """kill -9 of a real process at a random moment after the first checkpoint, then the same command again."""
    epochs = 10
    command, log = words(tmp_path / "w", npz, epochs=epochs), tmp_path / "log"
    with log.open("ab") as stream:  # a file: a full pipe would block the process that is to be killed
        process = subprocess.Popen([sys.executable, "-m", "prdarts_jax", *command], stdout=stream, stderr=stream)
    while not (tmp_path / "w" / "checkpoints" / str(EPOCH_STEPS)).exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    delay = random.uniform(0, 1.5)
    time.sleep(delay)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0), log.read_text()

    where = f"killed {delay:.3f} s after the first checkpoint"
    capsys.readouterr()
    assert cli.main(command) == 0, f"{where}: {capsys.readouterr().err}"
    said = capsys.readouterr().out
    assert "resuming at step " in said or "finished already" in said, where
    assert train(tmp_path / "whole", epochs=epochs).status == "finished"
    found, expected = outcome(tmp_path / "w"), outcome(tmp_path / "whole")
    for part in expected:
        assert found[part] == expected[part], f"{where}: {part}"


def test_killed_before_the_final_row_is_written(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "w")
    path = tmp_path / "w" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])
    for name in ("genotype.json", "network.safetensors"):
        (tmp_path / "w" / name).unlink()
    assert train(tmp_path / "w").status == "finished"
    assert_same(outcome(tmp_path / "w"), outcome(finished))


def test_half_written_lines_are_dropped(finished, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "w")
    whole = (finished / "metrics.jsonl").read_bytes()
    cut = whole[: len(whole) * 2 // 3 + 5]  # rows of steps after the checkpoint, the last one cut anywhere
    assert b'"final"' not in cut
    (workdir / "metrics.jsonl").write_bytes(cut)
    assert train(workdir).status == "finished"
    assert_same(outcome(workdir), outcome(finished))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(finished, stopped, tmp_path, capsys):
    workdir = shutil.copytree(stopped, tmp_path / "w")
    arrays = [p for p in (workdir / "checkpoints" / str(EPOCH_STEPS + 3) / "state").rglob("*") if p.is_file()]
    largest = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert train(workdir).status == "finished"
    assert f"checkpoint at step {EPOCH_STEPS + 3}" in capsys.readouterr().err
    assert_same(outcome(workdir), outcome(finished))


# One workdir


def test_a_finished_training_is_reported_again(npz, tmp_path, capsys):
    command = words(tmp_path / "w", npz)
    assert cli.main(command) == 0
    first, before = capsys.readouterr().out, snapshot(tmp_path / "w")
    assert cli.main(command) == 0
    second = capsys.readouterr().out
    assert "this training is finished already; --overwrite starts it again: " in second
    assert first.splitlines()[-3:] == second.splitlines()[1:4]
    assert snapshot(tmp_path / "w") == before
    (tmp_path / "w" / "notes.txt").write_text("mine")
    assert cli.main([*command, "--overwrite", "--seed=1"]) == 0
    assert "finished already" not in capsys.readouterr().out
    assert (tmp_path / "w" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changed", [{"weights__learning_rate": 0.5}, {"seed": 7, "epochs": 9}, {"drop_path": 0.1}, {"network__cells": 4}]
)
@pytest.mark.parametrize("which", ["finished", "stopped"])
def test_another_training_is_refused(request, changed, which):
    workdir = request.getfixturevalue(which)
    before = snapshot(workdir)
    with pytest.raises(UserError, match="holds another training") as caught:
        train(workdir, **changed)
    for name in changed:
        assert f"{name.replace('__', '.')}: " in str(caught.value)
    assert snapshot(workdir) == before


def test_another_genotype_is_refused(stopped):
    before, other = snapshot(stopped), Genotype([[("sep_conv_3x3", 1)]], [2], [[("max_pool_3x3", 0)]], [2])
    with pytest.raises(UserError, match="digest of genotype"):
        train_loop.train(train_cases.config(), other, stopped, data=digits())
    assert snapshot(stopped) == before


def test_search_and_training_do_not_overwrite_each_other(finished, npz, tmp_path, capsys):
    before = snapshot(finished)
    for more in ([], ["--overwrite"]):
        command = search_cases.words(finished, npz)
        one_error(capsys, [*command, *more], 2, "workdir: ", "holds a training; allowed: a new folder or one of a sea")
    assert snapshot(finished) == before
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text('{"kind": "search", "config": {}}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds a search; allowed: a new folder or one of a training"):
            train(tmp_path / "w", run__overwrite=overwrite)


def test_a_folder_of_something_else_is_left_alone(npz, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"]):
        one_error(capsys, [*words(tmp_path, npz), *more], 2, "workdir: ", "'thesis.tex'", "no config.json")
    assert snapshot(tmp_path) == before
    assert Genotype.load(Path(npz).parent / "genotype.json") == GENOTYPE


@pytest.mark.parametrize("content", ['{"model": "bert"}', "{", '{"schema_version": 2, "kind": "train"}'])
def test_a_foreign_config_is_never_cleared(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.bin").write_text("weeks of computing")
    (tmp_path / "config.json").write_text(content)
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="allowed: a new folder or one") as caught:
            train(tmp_path, run__overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
        assert snapshot(tmp_path) == before


def test_a_report_that_could_not_be_written_is_made_by_the_next_start(tmp_path, monkeypatch, capsys):
    """It costs the finished training a line, and not its status."""

    def full(folders, out=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report_page, "report", full)
        for status in ("finished", "already-finished"):
            found = train(tmp_path / "w")
            assert (found.status, found.report) == (status, None)
            said = capsys.readouterr().err
            assert "the training is finished, but not made: report.html" in said and "No space left" in said
            assert said.count("\n") == 1
    made = []

    def writes(folders, out=None):
        made.append(folders)
        (folders[0] / "report.html").touch()

    monkeypatch.setattr(report_page, "report", writes)
    found = train(tmp_path / "w")
    assert (found.status, found.report) == ("already-finished", tmp_path / "w" / "report.html")
    assert made == [[tmp_path / "w"]]
