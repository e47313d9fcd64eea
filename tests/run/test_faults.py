"""Disks that fill up, folders that move, bytes that flip, processes that die: searches and trainings survive alike."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import search_cases
import train_cases
from search_cases import assert_same

from prdarts_jax import cli
from prdarts_jax.run import loop
from prdarts_jax.run.checkpoint import Checkpointer

CASES: dict[str, Any] = {"search": search_cases, "train": train_cases}
START: dict[str, Any] = {"search": search_cases.search, "train": train_cases.train}
EPOCH_STEPS = 7
MOMENT = 1e-9  # minutes: over as soon as the first dispatch is
both = pytest.mark.parametrize("kind", CASES)


@pytest.fixture(autouse=True)
def _quick(kind):
    with CASES[kind].shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def finished(folder, kind):
    """The uninterrupted run; tests may not change it."""
    workdir = folder / f"{kind}-finished"
    if not workdir.exists():
        assert START[kind](workdir).status == "finished"
    return workdir


@pytest.fixture
def stopped(folder, kind):
    """A run stopped in the middle of its second epoch, with two checkpoints; tests may not change it."""
    workdir = folder / f"{kind}-stopped"
    while not (workdir / "checkpoints" / str(EPOCH_STEPS + 3)).exists():
        assert START[kind](workdir, run__time_limit=MOMENT).status == "time-limit"
    return workdir


@pytest.fixture
def npz(folder, kind):
    path = folder / f"{kind}.npz"
    return path if path.exists() else CASES[kind].write_npz(path)


# Disks


@contextlib.contextmanager
def _small_disk(folder: Path):
    """A file system of its own: a user who is root writes everywhere else."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "other").open("wb") as stream:
        while True:
            stream.write(b"\0" * 4096)
            stream.flush()


def _lock(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@both
@pytest.mark.parametrize(
    # A file system with a file that is being written, as the log is, cannot be made read-only.
    ("fault", "where"),
    [("full", "checkpoints"), ("read-only", "checkpoints"), ("full", "workdir")],
)
def test_a_bad_disk_is_one_line_and_the_run_goes_on_later(
    kind, fault, where, finished, npz, tmp_path, monkeypatch, capsys
):
    """The disk goes bad in the second epoch: the disk of the checkpoints alone, or that of the whole workdir."""
    disk, workdir = tmp_path / "disk", tmp_path / "w"
    update, seen = loop.Progress.update, []

    def goes_bad(self, n, **fields):
        seen.append(n)
        if sum(seen) == EPOCH_STEPS + 3:
            while Checkpointer(workdir / "checkpoints").steps() != [EPOCH_STEPS]:
                time.sleep(0.01)  # written in the background
            _fill(disk) if fault == "full" else _lock(disk, "ro")
        update(self, n, **fields)

    with _small_disk(disk):
        if where == "workdir":
            workdir.symlink_to(disk)
        else:
            # A folder with something in it is not taken for a new one: a start that is stopped makes it a run's.
            assert START[kind](workdir, run__time_limit=MOMENT).status == "time-limit"
            shutil.rmtree(workdir / "checkpoints")
            (workdir / "checkpoints").symlink_to(disk)
        command = CASES[kind].words(workdir, npz)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(loop.Progress, "update", goes_bad)
            assert cli.main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("prdarts: error: ") and said.count("\n") == 1, said
        assert ("No space left on device" if fault == "full" else "Read-only file system") in said
        if where == "checkpoints":
            assert said.rstrip().endswith(f"the last good checkpoint is step {EPOCH_STEPS}")
        assert Checkpointer(workdir / "checkpoints").steps() == [EPOCH_STEPS]

        _lock(disk, "rw") if fault == "read-only" else (disk / "other").unlink()
        assert cli.main(command) == 0
        assert f"resuming at step {EPOCH_STEPS} " in capsys.readouterr().out
        assert_same(CASES[kind].outcome(workdir), CASES[kind].outcome(finished))


# Folders


@both
def test_a_copy_elsewhere_goes_on(kind, finished, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "another" / "place")
    assert START[kind](workdir).status == "finished"
    assert_same(CASES[kind].outcome(workdir), CASES[kind].outcome(finished))


# Damage


@both
@pytest.mark.slow
def test_twenty_flipped_bytes_are_found_and_survived(kind, finished, stopped, tmp_path, capsys):
    """Any byte of any file of the newest checkpoint, another one each time."""
    rng = random.Random(0)
    newest, before = reversed(Checkpointer(stopped / "checkpoints").steps()[-2:])
    for number in range(20):
        workdir = shutil.copytree(stopped, tmp_path / str(number))
        files = sorted(p for p in (workdir / "checkpoints" / str(newest)).rglob("*") if p.is_file())
        sizes = [path.stat().st_size for path in files]
        # Every second time by size, else by file: most bytes are those of the arrays.
        (file,) = rng.choices(files, weights=sizes if number % 2 else [size > 0 for size in sizes])
        content = bytearray(file.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= rng.randrange(1, 256)
        file.write_bytes(content)
        where = f"byte {place} of {file.relative_to(workdir)}"
        capsys.readouterr()
        assert START[kind](workdir).status == "finished", where
        said = capsys.readouterr()
        assert f"checkpoint at step {newest} in " in said.err and said.err.count("\n") == 1, (where, said.err)
        assert f"resuming at step {before} " in said.out, where
        assert_same(CASES[kind].outcome(workdir), CASES[kind].outcome(finished))
        shutil.rmtree(workdir)


# Killing


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "epochs"), [("search", 60), ("train", 150)])
def test_killed_twenty_times(kind, epochs, npz, tmp_path):
    """At any moment: while it starts, compiles, computes, saves, evaluates, or draws its report."""
    command = CASES[kind].words(tmp_path / "w", npz, epochs=epochs, run__checkpoint_minutes=1e-6)
    log, saved, moments = tmp_path / "log", Checkpointer(tmp_path / "w" / "checkpoints"), []
    for number in range(20):
        before = saved.steps()
        with log.open("ab") as stream:
            process = subprocess.Popen([sys.executable, "-m", "prdarts_jax", *command], stdout=stream, stderr=stream)
        while number % 2 and saved.steps()[-1:] <= before[-1:]:  # every second time: once it has got further
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        moments.append(random.uniform(0, 1 if number % 2 else 8))
        time.sleep(moments[-1])
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
    assert 0 < saved.steps()[-1] < epochs * EPOCH_STEPS
    again = subprocess.run([sys.executable, "-m", "prdarts_jax", *command], capture_output=True, text=True)
    assert again.returncode == 0, f"killed after {moments} s: {again.stderr}"
    assert START[kind](tmp_path / "whole", epochs=epochs).status == "finished"
    found, expected = CASES[kind].outcome(tmp_path / "w"), CASES[kind].outcome(tmp_path / "whole")
    for part in expected:
        assert found[part] == expected[part], f"killed after {moments} s: {part}"
