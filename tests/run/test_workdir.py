"""The folder of a run: atomic files, the lock, whether it can be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run.workdir import WorkdirLock, atomic_write_json, atomic_write_text, check_name, check_writable, draw

HOLDER = """
    import sys
    from pathlib import Path
    from prdarts_jax.run.workdir import WorkdirLock

    with WorkdirLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def holder(workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(workdir)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_what_cannot_be_drawn_costs_a_finished_run_one_line(tmp_path, capsys):
    def fails():
        raise KeyError("font")

    made = tmp_path / "made"
    draw("training", {"plots/a.svg": fails, "report.html": made.touch, "plots/b.svg": fails})
    assert made.exists()
    said = capsys.readouterr().err
    assert said.startswith(
        "prdarts: the training is finished, but not made: plots/a.svg, plots/b.svg (KeyError: 'font')"
    )
    assert said.count("\n") == 1
    draw("training", {"report.html": made.touch})
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_not_named_in_utf_8_is_refused_before_the_work(tmp_path: Path) -> None:
    """Its checkpoints could not be written, nor those in it read."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xf6we"))
    with pytest.raises(UserError, match=r"^workdir: .*/M\\udcf6we is not named in UTF-8; allowed"):
        check_writable(folder)
    assert not folder.exists()
    check_name(tmp_path / "Möwe \u540d")


def test_text_and_json(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"
    value = {"b": [1, None, "é"], "a": {"x": 0.1}}
    atomic_write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and text.endswith("}\n") and "é" in text
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", {"x" * 200_000, "y" * 200_000}
    atomic_write_text(path, max(contents))
    done = threading.Event()

    def write() -> None:
        for n in range(40):
            atomic_write_text(path, sorted(contents)[n % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_text())
    writer.join()
    assert seen <= contents


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        atomic_write_json(path, {"new": 2})
    assert str(caught.value) == f"{path} could not be written: No space left on device"
    with pytest.raises(TypeError):
        atomic_write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent/a could not be written: No such file or directory"):
        atomic_write_text(tmp_path / "absent" / "a", "")


def test_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


def test_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for bad, reason in {
        "file": f"cannot be used: {tmp_path}/file is not a folder",
        "file/run": f"cannot be made: {tmp_path}/file is not a folder",
        "link/run": f"cannot be made: {tmp_path}/link is not a folder",
    }.items():
        with pytest.raises(UserError) as caught:
            check_writable(tmp_path / bad)
        assert str(caught.value) == f"workdir: {tmp_path}/{bad} {reason}; name another folder"

    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"run cannot be made: .* cannot be written \(Read-only file system\)"):
        check_writable(tmp_path / "run")


def test_the_second_process_is_refused_and_a_kill_releases(tmp_path: Path) -> None:
    workdir = tmp_path / "runs" / "one"
    with holder(workdir) as child:
        for _ in range(2):
            with pytest.raises(UserError) as caught, WorkdirLock(workdir):
                pass
            message = str(caught.value)
            assert f"workdir: {workdir} is in use by process {child.pid};" in message and "\n" not in message
        child.kill()
        child.wait()
        with WorkdirLock(workdir):
            assert (workdir / ".lock").read_text() == f"{os.getpid()}\n"
            with pytest.raises(UserError, match=f"process {os.getpid()};"), WorkdirLock(workdir):
                pass
    with holder(workdir) as child:  # leaving the context released it
        child.communicate("")
    with WorkdirLock(workdir):
        pass
    assert os.listdir(workdir) == [".lock"]


def test_an_exception_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WorkdirLock(tmp_path):
        raise ZeroDivisionError
    with WorkdirLock(tmp_path):
        pass


def test_a_program_started_by_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    with WorkdirLock(tmp_path):
        command, pipe = [sys.executable, "-c", "print(flush=True); input()"], subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, close_fds=False)
        assert child.stdout is not None and child.stdout.readline() == b"\n"  # it runs: the system has closed its copy
    with child:
        with WorkdirLock(tmp_path):
            pass
        child.communicate(b"\n")


def test_a_file_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be used: File exists"), WorkdirLock(tmp_path / "file"):
        pass
