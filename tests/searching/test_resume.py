"""A search that was stopped, killed or damaged ends as the one that was not: the same bits in every file."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optax
import pytest
import search_cases
from search_cases import EPOCH_STEPS, TOTAL, assert_same, one_error, outcome, search, snapshot, words

from prdarts_jax import cli, presets
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.prdarts import prdarts


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


MOMENT = 1e-9  # minutes: over as soon as the first dispatch is


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture
def finished(folder):
    """The uninterrupted search; tests may not change it."""
    workdir = folder / "uninterrupted"
    if not workdir.exists():
        assert search(workdir).status == "finished"
    return workdir


@pytest.fixture
def stopped(folder):
    """A search stopped in the middle of its second epoch, with two checkpoints; tests may not change it."""
    workdir = folder / "stopped"
    if not workdir.exists():
        while not (workdir / "checkpoints" / str(EPOCH_STEPS + 3)).exists():
            assert search(workdir, run__time_limit=MOMENT).status == "time-limit"
    return workdir


@pytest.fixture
def npz(folder):
    path = folder / "digits.npz"
    return path if path.exists() else search_cases.write_npz(path)


def test_stopped_after_every_dispatch(finished, tmp_path, capsys):
    statuses = []
    while "finished" not in statuses:
        statuses.append(search(tmp_path / "w", run__time_limit=MOMENT).status)
        assert len(statuses) < 20
    dispatches = 3 * 3  # an epoch of 7 steps is 3 + 3 + 1
    assert statuses == ["time-limit"] * (dispatches - 1) + ["finished"]
    assert_same(outcome(tmp_path / "w"), outcome(finished))
    said = capsys.readouterr().out
    assert f"resuming at step 3 of {TOTAL} (epoch 0)" in said
    assert "bit for bit" in said


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_the_length_of_a_dispatch_changes_no_bit(finished, tmp_path, steps):
    assert search(tmp_path / "w", run__steps_per_dispatch=steps).status == "finished"
    assert_same(outcome(tmp_path / "w"), outcome(finished))


def test_how_it_is_run_may_change(finished, stopped, tmp_path):
    """Other run fields, in a copy of the workdir elsewhere."""
    shutil.copytree(stopped, tmp_path / "elsewhere" / "w")
    changed = {"run__steps_per_dispatch": 10, "run__checkpoint_every": 2, "run__checkpoint_minutes": 0}
    found = search(tmp_path / "elsewhere" / "w", **changed, run__progress="lines", run__workdir="ignored")
    assert found.status == "finished"
    assert_same(outcome(tmp_path / "elsewhere" / "w"), outcome(finished))


def test_the_seed_decides_every_bit(finished, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert search(again).status == search(other, seed=1).status == "finished"
    expected = outcome(finished)
    assert_same(outcome(again), expected)
    different = outcome(other)
    assert different["leaves"] != expected["leaves"]
    assert different["rows"][0]["train_loss"] != expected["rows"][0]["train_loss"]


# Signals


@pytest.fixture
def hangups():
    """Signals of a closed terminal arrive, in a suite that was itself started to outlive one too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(finished, npz, tmp_path, monkeypatch, capsys, signum, status):
    update, seen = search_loop.Progress.update, []

    def interrupted(self, n, **fields):
        seen.append(n)
        if sum(seen) == EPOCH_STEPS + 3:  # in the middle of the second epoch
            signal.raise_signal(signum)
        update(self, n, **fields)

    command = words(tmp_path / "w", npz)
    with monkeypatch.context() as patch:
        patch.setattr(search_loop.Progress, "update", interrupted)
        assert cli.main(command) == status
    said = capsys.readouterr()
    assert said.err == ""
    last = said.out.splitlines()[-1]
    assert f"saved in {tmp_path / 'w'}; to go on: prdarts search --preset digits" in last
    assert sum(seen) == EPOCH_STEPS + 3
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps() == [EPOCH_STEPS, EPOCH_STEPS + 3]
    assert not (tmp_path / "w" / "genotype.json").exists()

    assert cli.main(command) == 0
    assert_same(outcome(tmp_path / "w"), outcome(finished))


# Killing


def _start(command: list[str], log: Path) -> subprocess.Popen:
    # -u and a file: a full pipe would block the process that is to be killed.
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, "-m", "prdarts_jax", *command], stdout=stream, stderr=stream)


def _wait_for(path: Path, process: subprocess.Popen, log: Path) -> None:
    while not path.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


def test_killed_and_started_again(npz, tmp_path):
    """kill -9 of a real process at a random moment after the first checkpoint, then the same command again."""
    epochs = 10
    command, log = words(tmp_path / "w", npz, epochs=epochs), tmp_path / "log"
    process = _start(command, log)
    _wait_for(tmp_path / "w" / "checkpoints" / str(EPOCH_STEPS), process, log)
    delay = random.uniform(0, 1.5)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, log.read_text()

    where = f"killed {delay:.3f} s after the first checkpoint"
    again = subprocess.run([sys.executable, "-m", "prdarts_jax", *command], capture_output=True, text=True)
    assert again.returncode == 0, f"{where}: {again.stderr}"
    assert "resuming at step " in again.stdout or "finished already" in again.stdout, where
    assert search(tmp_path / "whole", epochs=epochs).status == "finished"
    found, expected = outcome(tmp_path / "w"), outcome(tmp_path / "whole")
    for part in expected:
        assert found[part] == expected[part], f"{where}: {part}"


def test_killed_before_the_result_is_written(finished, tmp_path):
    """The last checkpoint is there, the genotype is not."""
    shutil.copytree(finished, tmp_path / "w")
    (tmp_path / "w" / "genotype.json").unlink()
    assert search(tmp_path / "w").status == "finished"
    assert_same(outcome(tmp_path / "w"), outcome(finished))


def test_killed_while_the_config_is_written(finished, tmp_path):
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / ".config.json.4711.tmp").write_text("{")
    assert search(workdir).status == "finished"
    assert_same(outcome(workdir), outcome(finished))


def test_half_written_lines_are_dropped(finished, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "w")
    for name in ("metrics.jsonl", "genotypes.jsonl", "probabilities.jsonl"):
        whole = (finished / name).read_bytes()
        (workdir / name).write_bytes(whole[: len(whole) * 2 // 3 + 5])  # of steps after the checkpoint, cut anywhere
    assert search(workdir).status == "finished"
    assert_same(outcome(workdir), outcome(finished))


# Damage


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(finished, stopped, tmp_path, capsys):
    workdir = shutil.copytree(stopped, tmp_path / "w")
    newest = workdir / "checkpoints" / str(EPOCH_STEPS + 3)
    arrays = (path for path in (newest / "state").rglob("*") if path.is_file())
    _flip(max(arrays, key=lambda path: path.stat().st_size))
    assert search(workdir).status == "finished"
    said = capsys.readouterr()
    assert f"checkpoint at step {EPOCH_STEPS + 3}" in said.err
    assert said.err.count("\n") == 1
    before = Checkpointer(stopped / "checkpoints").steps()[-2]
    assert f"resuming at step {before} " in said.out
    assert_same(outcome(workdir), outcome(finished))


def test_only_damaged_checkpoints(stopped, npz, tmp_path, capsys):
    """Nothing to go on from is a failure that is said, never a silent new start."""
    workdir = shutil.copytree(stopped, tmp_path / "w")
    for step in (workdir / "checkpoints").iterdir():
        _flip(step / "SHA256SUMS")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be used"):
        search(workdir)


# One workdir


def test_a_second_process_is_refused(npz, tmp_path, capsys):
    hold = "import sys; from prdarts_jax.run.workdir import WorkdirLock; from pathlib import Path\n"
    hold += "with WorkdirLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "w")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        one_error(capsys, words(tmp_path / "w", npz), 2, "workdir: ", f"in use by process {holder.pid}")
        one_error(capsys, [*words(tmp_path / "w", npz), "--overwrite"], 2, f"in use by process {holder.pid}")
        assert snapshot(tmp_path / "w") == {}
    finally:
        holder.kill()
        holder.communicate()
    assert cli.main(words(tmp_path / "w", npz, run__time_limit=MOMENT)) == 0  # the lock died with its process


def test_a_finished_search_is_reported_again(finished, npz, tmp_path, capsys):
    workdir = tmp_path / "w"
    command = words(workdir, npz)
    assert cli.main(command) == 0
    first, before = capsys.readouterr().out, snapshot(workdir)
    assert cli.main(command) == 0
    second = capsys.readouterr().out
    assert "finished already" in second
    assert second.splitlines()[0].endswith("--overwrite")
    assert [line for line in first.splitlines() if line.startswith("{")] == second.splitlines()[1:2]
    assert Genotype.from_json(second.splitlines()[1]) == Genotype.load(workdir)
    assert snapshot(workdir) == before

    (workdir / "notes.txt").write_text("mine")
    assert cli.main([*command, "--overwrite", "--seed=1"]) == 0
    assert "finished already" not in capsys.readouterr().out
    assert outcome(workdir)["leaves"] != outcome(finished)["leaves"]
    assert (workdir / "notes.txt").read_text() == "mine"
    assert cli.main([*command, "--overwrite"]) == 0
    assert_same(outcome(workdir), outcome(finished))


@pytest.mark.parametrize(
    "changed",
    [
        {"arch__learning_rate": 0.5},
        {"seed": 7, "epochs": 9},
        {"method__options__lambda1": 0.5},
        {"method__strategy": "darts"},
        {"space__channels": 6},
        {"dtype": "bfloat16"},
        {"precision": "highest"},
    ],
    ids=lambda changed: "+".join(changed),
)
@pytest.mark.parametrize("which", ["finished", "stopped"])
def test_another_search_is_refused(request, changed, which):
    workdir = request.getfixturevalue(which)
    before = snapshot(workdir)
    if "method__strategy" in changed:
        config = presets.resolve(
            "digits", "darts", {k: v for k, v in search_cases.FLAGS.items() if not k.startswith("method.")}
        ).config
    else:
        config = search_cases.config(**changed)
    with pytest.raises(UserError, match="holds another search") as caught:
        search_loop.search(config, workdir, data=search_cases.digits())
    for name in changed:
        assert f"{name.replace('__', '.')}: " in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert snapshot(workdir) == before


def test_other_data_is_refused(stopped):
    before, data = snapshot(stopped), search_cases.digits()
    changed = dataclasses.replace(data, digest="another")
    with pytest.raises(UserError, match="digest of data"):
        search_loop.search(search_cases.config(), stopped, data=changed)
    assert snapshot(stopped) == before


def test_a_folder_of_something_else_is_left_alone(npz, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.png").write_text("a figure")
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"]):  # it overwrites a search, nothing else
        one_error(capsys, [*words(tmp_path, npz), *more], 2, "workdir: ", "'plots'", "no config.json")
        assert snapshot(tmp_path) == before
        assert not {"config.json", "metrics.jsonl"} & set(os.listdir(tmp_path))


FOREIGN = (
    '{"model": "bert"}',
    "[]",
    "{",
    "",
    "model: bert",
    "\xff",
    '{"kind": ["search"]}',
    '{"schema_version": 2, "kind": "search"}',
    '{"kind": "search"}',
)


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_config_is_never_cleared(npz, tmp_path, capsys, content):
    """Its neighbours may bear the names of our files."""
    workdir = tmp_path / "w"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "checkpoints" / "model.bin").write_text("weeks of computing")
    (workdir / "metrics.jsonl").write_text("{}")
    (workdir / "config.json").write_text(content, encoding="latin-1")
    before = snapshot(workdir)
    for more in ([], ["--overwrite"]):
        message = one_error(capsys, [*words(workdir, npz), *more], 2, "workdir: ", "config.json", "a new folder")
        assert "--overwrite" not in message
        assert snapshot(workdir) == before


def test_a_config_of_another_schema_is_not_resumed(stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "w")
    document = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(document | {"schema_version": 0}))
    before = snapshot(workdir)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="schema_version 0; allowed: a new folder or one with 1"):
            search(workdir, run__overwrite=overwrite)
    assert snapshot(workdir) == before


def test_an_empty_config_alone_in_its_folder_can_be_overwritten(finished, tmp_path):
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "config.json").write_text("")
    with pytest.raises(UserError, match="--overwrite starts again"):
        search(workdir)
    assert search(workdir, run__overwrite=True).status == "finished"
    assert_same(outcome(workdir), outcome(finished))


@pytest.fixture
def stub():
    with search_cases.shared_programs(stub=True):
        yield


def _sgd(rate):
    return {"weight_tx": optax.sgd(rate)}


def _prdarts(lambda1):
    return {"strategy": functools.partial(prdarts, lambda1=lambda1, executed_ops=1)}


def _made(lambda1):
    space = Space.create(search_cases.config().space, classes=10, in_channels=1)
    return {"strategy": prdarts(space=space, lambda1=lambda1, executed_ops=1)}


@pytest.mark.parametrize(
    ("make", "field"),
    [
        pytest.param(_sgd, "weights.transform", marks=pytest.mark.slow),
        (_prdarts, "method.strategy"),
        (_made, "method.strategy"),
    ],
)
def test_arguments_that_differ_in_a_number_are_another_search(stub, tmp_path, make, field, capsys):
    assert search(tmp_path / "w", given=make(0.1), run__time_limit=MOMENT).status == "time-limit"
    before = snapshot(tmp_path / "w")
    with pytest.raises(UserError, match=f"digest of {field}: "):
        search(tmp_path / "w", given=make(0.2), run__time_limit=MOMENT)
    assert snapshot(tmp_path / "w") == before
    capsys.readouterr()
    assert search(tmp_path / "w", given=make(0.1), run__time_limit=MOMENT).status == "time-limit"
    assert "bit for bit" in capsys.readouterr().out


def test_an_argument_is_compared_by_what_it_computes(stub, tmp_path, capsys):
    """Not by what it holds: no one can see into a lock."""
    lock = threading.Lock()

    def locked(config):
        with lock:
            return optax.sgd(0.1)

    for _ in range(2):
        assert search(tmp_path / "w", given={"weight_tx": locked}, run__time_limit=MOMENT).status == "time-limit"
    said = capsys.readouterr().out
    assert "bit for bit" in said
