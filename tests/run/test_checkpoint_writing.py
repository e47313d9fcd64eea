"""Checkpoints that cannot be written, or whose process is killed: one line, and nothing accepted is lost."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import bits, restore_with_warnings, state_at

from prdarts_jax.errors import RunError
from prdarts_jax.run import checkpoint
from prdarts_jax.run.checkpoint import Checkpointer


def test_an_exception_right_after_save_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state_at(1), {})
        raise ZeroDivisionError
    restored, _ = restore_with_warnings(tmp_path / "c")
    assert restored.step == 1


def keeps_the_process(thread: threading.Thread) -> bool:
    """The idle worker of an executor does not: the interpreter wakes it when it ends."""
    return not (thread.daemon or thread is threading.main_thread() or thread.name.startswith("metadata_store"))


def failing_save(directory: Path, state: Any, step: int = 2) -> str:
    with Checkpointer(directory) as checkpoints:
        with pytest.raises(RunError) as caught:
            checkpoints.save(step, state, {})
            checkpoints.wait()
        checkpoints.wait()  # told once
    end = time.monotonic() + 5
    while waiting := [thread for thread in threading.enumerate() if keeps_the_process(thread)]:
        assert time.monotonic() < end, f"{waiting} would keep the process from ending"
        time.sleep(0.01)
    return str(caught.value)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def test_a_file_where_the_directory_should_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").write_text("in the way")
    message = failing_save(tmp_path / "c", state_at(2))
    assert message == (
        f"checkpoint at step 2 could not be written to {tmp_path / 'c'}: File exists; there is no earlier checkpoint"
    )
    assert (tmp_path / "c").read_text() == "in the way"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_keeps_the_last_good_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    if when == "while":  # as if another program took the room after it was looked for
        monkeypatch.setattr(checkpoint, "require_room", lambda directory, size: None)
    directory, large = tmp_path / "disk" / "c", state_at(2, size=200_000)
    with small_disk(tmp_path / "disk", "size=400k"):
        with Checkpointer(directory) as checkpoints:
            checkpoints.save(1, state_at(1), {"epoch": 1})
        message = failing_save(directory, large)
        assert message == (
            f"checkpoint at step 2 could not be written to {directory}: No space left on device; "
            "the last good checkpoint is step 1"
        )
        assert failing_save(directory, large, step=1).endswith("the last good checkpoint is step 1")
        assert "1" in os.listdir(directory)  # what was to be replaced is back
        restored, lines = restore_with_warnings(directory)
        assert restored.info == {"epoch": 1} and bits(restored.state) == bits(state_at(1)) and lines == []
        with Checkpointer(directory) as checkpoints:  # room again
            checkpoints.save(2, state_at(2), {"epoch": 2})
        assert sorted(os.listdir(directory)) == ["1", "2"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("more_files", [0, 1, 3, 6, 10, 16, None])
def test_failures_at_every_stage_end_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more_files: int | None
) -> None:
    monkeypatch.setattr(checkpoint, "require_room", lambda directory, size: None)
    directory = tmp_path / "disk" / "c"
    with small_disk(tmp_path / "disk", "size=4m"):
        with Checkpointer(directory) as checkpoints:
            checkpoints.save(1, state_at(1), {})
        disk = os.statvfs(directory)
        options = "ro" if more_files is None else f"nr_inodes={disk.f_files - disk.f_ffree + more_files}"
        subprocess.run(["mount", "-o", f"remount,{options}", str(tmp_path / "disk")], check=True)
        message = failing_save(directory, state_at(2))
        reason = "Read-only file system" if options == "ro" else "No space left on device"
        assert message.endswith(f": {reason}; the last good checkpoint is step 1")
        restored, lines = restore_with_warnings(directory)
        assert bits(restored.state) == bits(state_at(1)) and lines == []
    assert capfd.readouterr().err == ""


def test_a_failed_write_does_not_replace_the_exception_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Checkpointer, "_write_sums", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path / "c", warn=lines.append) as checkpoints:
        checkpoints.save(1, state_at(1), {})
        raise ZeroDivisionError
    assert len(lines) == 1 and "could not be written" in lines[0] and os.listdir(tmp_path / "c") == []


CHILD = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from prdarts_jax.run.checkpoint import Checkpointer

    step = jax.jit(lambda s: {"w": s["w"] * 1.0001 + s["n"].astype("float32"), "n": s["n"] + 1}, donate_argnums=0)
    state = {"w": jnp.arange(300_000.0), "n": jnp.zeros((), "int32")}
    with Checkpointer(Path(sys.argv[1])) as checkpoints:
        restored = checkpoints.restore_latest(state)
        done = 0 if restored is None else restored.step
        state = state if restored is None else restored.state
        for n in range(done + 1, 100_000):
            state = step(state)
            checkpoints.save(n, state, {"n": n})
            print(n, flush=True)
"""


def test_kill_9_while_saving(tmp_path: Path) -> None:
    rng = random.Random(0)
    directory, last = tmp_path / "c", 0
    for _ in range(2):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()  # the first save is accepted
            time.sleep(rng.uniform(0.05, 0.6))
            child.send_signal(signal.SIGKILL)
            accepted = [int(line) for line in child.stdout.read().split()]
        lines: list[str] = []
        with Checkpointer(directory, warn=lines.append) as checkpoints:
            target = {"w": jnp.arange(300_000.0), "n": jnp.zeros((), jnp.int32)}
            restored = checkpoints.restore_latest(target)
        assert lines == []  # half-written ones are no checkpoints at all
        if restored is None:
            assert last == 0 and len(accepted) < 2
            continue
        assert restored.step > last or not accepted
        # One save may be in flight and one accepted line unread.
        assert not accepted or restored.step >= accepted[-1] - 1
        last = restored.step
        assert restored.info == {"n": last} and int(restored.state["n"]) == last
        step = jax.jit(lambda s: {"w": s["w"] * 1.0001 + s["n"].astype(jnp.float32), "n": s["n"] + 1})
        for _ in range(last):
            target = step(target)
        assert bits(restored.state) == bits(target)
    assert last > 0
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(last + 1, target, {})
    assert not [name for name in os.listdir(directory) if "tmp" in name]
