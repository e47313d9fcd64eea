"""Metric rows, their truncation on resume, and the progress shown."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run.metrics import MetricsLog, check_finite, comparable, importlib, read
from prdarts_jax.run.progress import Progress, time


def test_importing_it_does_not_import_jax() -> None:
    code = "import sys, prdarts_jax.run.metrics, prdarts_jax.run.progress; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write_rows(path: Path, last: int) -> None:
    with MetricsLog(path) as log:
        for step in range(1, last + 1):
            log.write("step", epoch=(step - 1) // 2, step=step, loss=1 / step, time_s=0.5)
            if step % 2 == 0:
                log.write("epoch", epoch=step // 2 - 1, step=step, train_loss=step / 3)


def test_rows_keep_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"a": 0.1, "b": np.float32(0.1), "c": np.array(5), "d": True, "e": math.inf, "loss/x": -0.0, "n": math.nan}
    with MetricsLog(path) as log:
        assert not path.exists()
        log.write("final", epoch=1, step=2, **values)
        [row] = read(path)  # visible before it is closed
    assert list(row) == ["kind", "epoch", "step", "a", "b", "c", "d", "e", "loss/x", "n"]
    assert (row["kind"], row["epoch"], row["step"], row["a"], row["c"], row["d"]) == ("final", 1, 2, 0.1, 5, 1)
    assert np.float32(row["b"]) == np.float32(0.1) and row["b"] == float(np.float32(0.1))
    assert row["e"] == math.inf and math.copysign(1, row["loss/x"]) == -1 and math.isnan(row["n"])


def test_jax_scalars(tmp_path: Path) -> None:
    jnp = pytest.importorskip("jax.numpy")
    with MetricsLog(tmp_path / "m") as log:
        log.write("step", 0, 1, half=jnp.bfloat16(0.5), count=jnp.int32(3))
    assert read(tmp_path / "m") == [{"kind": "step", "epoch": 0, "step": 1, "half": 0.5, "count": 3}]


@pytest.mark.parametrize("bad", ["text", [1.0], np.zeros(2), None, {"a": 1}])
def test_what_is_not_one_number_is_refused_and_named(tmp_path: Path, bad: Any) -> None:
    with MetricsLog(tmp_path / "m") as log, pytest.raises(TypeError, match="'loss' is a "):
        log.write("step", 0, 1, loss=bad)
    assert not (tmp_path / "m").exists()


def test_kinds_are_checked(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log, pytest.raises(ValueError, match="'batch': allowed: step"):
        log.write("batch", 0, 1)  # type: ignore[arg-type]


def test_only_epoch_and_final_rows_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(len(read(tmp_path / "m"))))
    with MetricsLog(tmp_path / "m") as log:
        for kind in ("step", "epoch", "step", "final"):
            log.write(kind, 0, 1)  # type: ignore[arg-type]
    assert synced == [2, 4]


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with MetricsLog(tmp_path / "m") as log, pytest.raises(RunError) as caught:
        log.write("epoch", 0, 1)
    assert str(caught.value) == f"{tmp_path / 'm'} could not be written: No space left on device"


# A run that is killed and resumed leaves the rows of one that was not.


@pytest.mark.parametrize("restored", [0, 1, 2, 4])
@pytest.mark.parametrize("tail", ["", '{"kind": "step", "epo', '{"kind": "step", "epoch": 9, "step": 99}', "\n"])
def test_resumed_rows_equal_uninterrupted_ones(tmp_path: Path, restored: int, tail: str) -> None:
    write_rows(tmp_path / "whole", 6)
    write_rows(tmp_path / "killed", 5)
    with (tmp_path / "killed").open("a") as stream:
        stream.write(tail)
    with MetricsLog(tmp_path / "killed") as log:
        log.truncate_after(restored)
        assert all(row["step"] <= restored for row in read(tmp_path / "killed"))
        if restored and restored % 2 == 0:  # killed after the epoch's row and its checkpoint: written once more
            log.write("epoch", epoch=restored // 2 - 1, step=restored, train_loss=restored / 3)
        for step in range(restored + 1, 7):
            log.write("step", epoch=(step - 1) // 2, step=step, loss=1 / step, time_s=0.25)
            if step % 2 == 0:
                log.write("epoch", epoch=step // 2 - 1, step=step, train_loss=step / 3)
    killed, whole = ([comparable(row) for row in read(tmp_path / name)] for name in ("killed", "whole"))
    assert killed == whole and len(whole) == 9
    assert [name for name in sorted(os.listdir(tmp_path))] == ["killed", "whole"]


def test_truncating_without_a_file_makes_none(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m").truncate_after(3)
    assert os.listdir(tmp_path) == [] and read(tmp_path / "m") == []


def test_appending_after_a_cut_line_swallows_no_row(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"kind": "step", "epoch": 0, "step": 1}\n{"kind": "st')
    with MetricsLog(path) as log:
        log.write("step", 0, 2)
    assert [row["step"] for row in read(path)] == [1, 2] and path.read_bytes().endswith(b"}\n")


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m: line 2 is not a JSON object"):
        read(tmp_path / "m")


def test_comparable_strips_what_depends_on_clock_and_machine() -> None:
    row = {"kind": "epoch", "time_epoch": 1.0, "images_per_s": 2.0, "memory_peak": 3, "time": 4.0, "loss": 5.0}
    assert comparable(row) == {"kind": "epoch", "time": 4.0, "loss": 5.0}


def test_the_first_value_that_is_not_finite_is_named() -> None:
    check_finite({"a": 1.0, "b": np.float32(2.0)}, 3)
    for bad, text in ((math.nan, "nan"), (math.inf, "inf"), (np.float32(-np.inf), "-inf")):
        with pytest.raises(RunError) as caught:
            check_finite({"z": 0.0, "loss/train": bad, "a": math.nan}, 123)
        assert str(caught.value).startswith(f"loss/train is {text} at step 123; ")


# TensorBoard.


def test_without_tensorboardx_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        MetricsLog(tmp_path / "m", tensorboard_dir=tmp_path / "tb")
    assert os.listdir(tmp_path) == []


def test_the_mirror_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def close(self) -> None:
            calls.append("closed")

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with MetricsLog(tmp_path / "m", tensorboard_dir=tmp_path / "tb") as log:
        log.truncate_after(4)
        log.write("epoch", 1, 6, train_loss=0.5, skips=2)
    assert calls == [(str(tmp_path / "tb"), 5), ("epoch/train_loss", 0.5, 6), ("epoch/skips", 2, 6), "closed"]


def test_the_real_mirror(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    with MetricsLog(tmp_path / "m", tensorboard_dir=tmp_path / "tb") as log:
        log.write("epoch", 0, 1, train_loss=0.5)
    [events] = (tmp_path / "tb").iterdir()
    assert b"epoch/train_loss" in events.read_bytes()


# Progress.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Progress(400, initial=100, stream=stream) as progress:
        progress.epoch_line("resumed")
        clock[0] += 50.0
        progress.update(60, loss=1.23456, tau=np.float32(0.5))
        progress.update(40, loss=1.5, skips=2)
        progress.epoch_line("epoch 1")
        progress.epoch_line("epoch 2 loss 9.9")
    assert stream.getvalue().splitlines() == [
        "resumed | step 100/400",
        "epoch 1 | step 200/400 | loss 1.5 | tau 0.5 | skips 2 | 1:40 left",  # 100 steps in 50 s, 200 to go
        "epoch 2 loss 9.9 | step 200/400 | tau 0.5 | skips 2 | 1:40 left",
    ]


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress(10, initial=2, stream=stream)
    progress.update(3, loss=0.51239, skips=4)
    progress.epoch_line("epoch 0 done")
    progress.close()
    progress.epoch_line("after the end")
    text = stream.getvalue()
    assert "epoch 0 done\n" in text and "after the end" not in text
    last = text.split("\r")[-1]
    assert "5/10" in last and "loss=0.5124" in last and "skips=4" in last


def test_modes() -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(10, enabled="off", stream=stream)
        progress.update(5)
        progress.epoch_line("x")
        progress.close()
        assert stream.getvalue() == ""
    forced = Terminal()
    Progress(10, enabled="lines", stream=forced).epoch_line("x")
    assert forced.getvalue() == "x | step 0/10\n"
    with pytest.raises(UserError, match=r"'loud' is not a mode; allowed: auto \| bar \| lines \| off"):
        Progress(10, enabled="loud")


def test_rows_are_json_lines(tmp_path: Path) -> None:
    write_rows(tmp_path / "m", 2)
    lines = (tmp_path / "m").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["step", "step", "epoch"]
