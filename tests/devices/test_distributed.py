"""Several processes are one run: the same bits, one writer, one stop, one exit status, no survivor of a lost peer."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_cases
import jax
import numpy as np
import oracles
import pytest
import search_cases
import train_cases
from distributed_cases import together
from search_cases import EPOCH_STEPS, assert_same, one_error, rows

from prdarts_jax.cli import runs
from prdarts_jax.devices import launch, processes
from prdarts_jax.errors import RunError
from prdarts_jax.run.checkpoint import Checkpointer

GLOO = {"gloo", "rank", "is", "connected", "to", "peer", "ranks", "expected", "number", "of"}
several = [pytest.mark.slow, pytest.mark.multidevice, pytest.mark.timeout(3600)]
CASES = {"search": search_cases, "train": train_cases}
EPOCHS = 12  # long enough to be caught in the middle


@pytest.fixture(autouse=True)
def _standard_promotion():
    with search_cases.standard_promotion():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


def _command(kind: str, folder: Path, workdir: Path, **flags: object) -> list[str]:
    npz = folder / f"{kind}.npz"
    if not npz.exists():
        CASES[kind].write_npz(npz)
    return CASES[kind].words(workdir, npz, **{"run__devices": "all", "epochs": EPOCHS, **flags})


@pytest.fixture
def whole(folder):
    """Uninterrupted runs of two processes of two devices; tests may not change them."""

    def made(kind: str) -> Path:
        workdir = folder / f"{kind}-2x2"
        if not (workdir / "report.html").exists():
            ends = distributed_cases.run(
                _command(kind, folder, workdir), folder / f"{kind}-log", processes=2, devices=2
            )
            assert [end.status for end in ends] == [0, 0], ends
            assert "report: " in ends[0].out
            # Gloo says how many it is connected to, from several threads: its lines may come apart.
            assert set(re.findall(r"[a-z_]+", ends[1].out.lower())) <= GLOO, ends[1].out
            assert "prdarts" not in ends[1].err and "epoch" not in ends[1].err  # logs are the first one's
        return workdir

    return made


# Without other processes


def _args(**given: object) -> argparse.Namespace:
    names = ("distributed", "coordinator", "num_processes", "process_id")
    return argparse.Namespace(**{**dict.fromkeys(names), **given})


def test_flags_of_a_cluster():
    assert runs.cluster(_args()) is None
    assert runs.cluster(_args(distributed=True)) == (None, None, None)
    found = runs.cluster(_args(coordinator="[::1]:80", num_processes="3", process_id="2"))
    assert found == ("[::1]:80", 3, 2)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--coordinator", "h:1"], "--num-processes: none is given"),
        (["--process-id", "0"], "--coordinator: none is given; allowed: --coordinator, --num-processes, --process-id"),
        (["--coordinator", "h", "--num-processes", "2", "--process-id", "0"], "--coordinator: 'h' is not possible"),
        (["--coordinator", "h:1", "--num-processes", "0", "--process-id", "0"], "--num-processes: '0' is not possible"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "--process-id: 2 is not possible; all"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id=x"], "--process-id: 'x' is not possible"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(kind, words, said, tmp_path, folder, capsys):
    one_error(capsys, [*_command(kind, folder, tmp_path / "w"), *words], 2, said)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("import sys; sys.exit(0)", 0),
        ("import sys; sys.exit(143)", 143),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_the_parent_ends_as_its_process(program, status):
    assert launch._watch([sys.executable, "-c", program]) == status


@pytest.mark.parametrize(("signum", "said"), [(signal.SIGABRT, "another process of this run"), (signal.SIGKILL, "9")])
def test_an_abort_of_the_runtime_is_one_line(signum, said):
    with pytest.raises(RunError, match=said):
        launch._watch([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signum)})"])


_CHILD = """
import os, sys, time
sys.path[:0] = [{root!r}]
from prdarts_jax.devices import launch
launch._end_with_parent()
assert launch.is_watched()
open({file!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_killed_parent_takes_its_process_with_it(tmp_path):
    root, file = str(Path(__file__).parents[2]), tmp_path / "pid"
    child = _CHILD.format(root=root, file=str(file))
    watch = f"import sys; sys.path[:0] = [{root!r}]; from prdarts_jax.devices import launch as c; "
    watch += f"c._watch([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", watch])
    try:
        end = time.monotonic() + 60
        while not (file.exists() and file.read_text()):
            assert parent.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        parent.kill()
        parent.wait()
        while _runs(int(file.read_text())):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        parent.kill()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_asks_nobody(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a run of one process must exchange nothing")

    for name in ("process_allgather", "broadcast_one_to_all"):
        monkeypatch.setattr(processes.multihost_utils, name, never)
    wish = processes.Wish(15, False)
    assert processes.agreed(wish, events=["stop"]) is wish and bool(wish)
    assert not processes.Wish(None, False)
    assert processes.share("a") == ["a"] and processes.on_first(lambda: {"a": 1}) == {"a": 1}
    assert np.array_equal(processes.fetch({"x": jax.numpy.arange(3)})["x"], [0, 1, 2])
    processes.same(search_cases.config(), {}, {})
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)


# Two processes


class TestTwo:
    pytestmark = [pytest.mark.multidevice, pytest.mark.timeout(600)]

    def test_processes_that_differ_are_refused(self, folder, tmp_path):
        commands = together(_command("search", folder, tmp_path / "w"), 2)
        commands[1] = [*commands[1], "--seed=5"]
        with distributed_cases.job(commands, tmp_path / "log", devices=1) as job:
            ends = job.wait()
        assert [end.status for end in ends] == [2, 2], ends
        for end in ends:
            said = "prdarts: error: process 1 was started differently (seed: 0 on process 0, 5 there)"
            assert end.line.startswith(said) and end.err.count("prdarts: error") == 1, end
        assert not (tmp_path / "w").exists()

    def test_processes_that_would_run_other_programs_are_refused(self, folder, tmp_path):
        """They would pair one's all-reduce with another of the other's."""
        oracles.require_kernels()
        commands = together(_command("search", folder, tmp_path / "w"), 2)
        environments = [{"PRDARTS_CPU_KERNELS": "auto"}, {"PRDARTS_CPU_KERNELS": "off"}]
        with distributed_cases.job(commands, tmp_path / "log", devices=1, environments=environments) as job:
            ends = job.wait()
        assert [end.status for end in ends] == [2, 2], ends
        said = "(CPU kernels, of all or (PRDARTS_CPU_KERNELS=off) of none: 'native' on process 0, 'XLA' there)"
        assert all(said in end.line for end in ends)
        assert not (tmp_path / "w").exists()

    def test_a_workdir_that_the_first_refuses_ends_all(self, folder, tmp_path):
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "thesis.tex").write_text("years of work")
        ends = distributed_cases.run(
            _command("train", folder, tmp_path / "w"), tmp_path / "log", processes=2, devices=1
        )
        assert [end.status for end in ends] == [2, 2], ends
        assert "holds 'thesis.tex' and no config.json" in ends[0].line
        assert ends[1].line.startswith("prdarts: error: process 0: workdir: ")
        assert os.listdir(tmp_path / "w") == ["thesis.tex"]

    def test_no_cluster(self, folder, tmp_path):
        command = [*_command("search", folder, tmp_path / "w"), "--distributed"]
        with distributed_cases.job([command], tmp_path / "log", devices=1) as job:
            (end,) = job.wait()
        assert end.status == 2 and end.line.startswith("prdarts: error: --distributed: no cluster is found"), end


class TestSeveral:
    pytestmark = several

    @pytest.mark.parametrize("kind", CASES)
    def test_two_processes_have_the_bits_of_one(self, kind, whole, folder, tmp_path):
        """2 x 2 devices and 1 x 4, with the same collectives."""
        expected = CASES[kind].outcome(whole(kind))
        command = _command(kind, folder, tmp_path / "w")
        (end,) = distributed_cases.run(command, tmp_path / "log", processes=1, devices=4)
        assert end.status == 0, end
        assert_same(CASES[kind].outcome(tmp_path / "w"), expected)
        document = json.loads((whole(kind) / "config.json").read_text())
        assert (document["platform"]["devices"], document["platform"]["processes"]) == (4, 2)
        assert document["devices"][3].startswith("process 1, cpu:1")
        assert "process 1, cpu:1" in (whole(kind) / "report.html").read_text()

    def test_two_processes_stream_their_parts_of_a_batch(self, folder, tmp_path):
        for count, devices in ((2, 2), (1, 4)):
            flags = {"data__stream": "always", "run__workers": 0, "epochs": 2}
            command = _command("train", folder, tmp_path / f"{count}", **flags)
            ends = distributed_cases.run(command, tmp_path / f"log{count}", processes=count, devices=devices)
            assert [end.status for end in ends] == [0] * count, ends
        assert_same(train_cases.outcome(tmp_path / "2"), train_cases.outcome(tmp_path / "1"))

    @pytest.mark.parametrize("kind", CASES)
    def test_a_signal_to_one_stops_all_and_another_number_of_processes_goes_on(self, kind, whole, folder, tmp_path):
        workdir = tmp_path / "w"
        command = _command(kind, folder, workdir)
        with distributed_cases.job(together(command, 2), tmp_path / "log", devices=2) as job:
            job.until((workdir / "checkpoints" / str(EPOCH_STEPS)).exists)
            job.processes[1].send_signal(signal.SIGTERM)
            ends = job.wait()
        assert [end.status for end in ends] == [143, 143], ends
        assert "stopped, and saved in" in ends[0].out and "prdarts: error" not in ends[0].err + ends[1].err
        stopped = Checkpointer(workdir / "checkpoints").steps()[-1]
        assert 0 < stopped < EPOCHS * EPOCH_STEPS
        with distributed_cases.job([command], tmp_path / "log", devices=2) as job:
            (end,) = job.wait()
        assert end.status == 0, end
        changed = "devices 4 -> 2; distributed True -> False; processes 2 -> 1"
        assert f"resuming at step {stopped} " in end.out and f"to float tolerance only ({changed})" in end.out
        epoch = stopped // EPOCH_STEPS
        found, expected = (rows(w, "epoch")[epoch] for w in (workdir, whole(kind)))
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)

    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_lost_process_ends_the_others_and_the_job_goes_on(self, victim, whole, folder, tmp_path):
        workdir = tmp_path / "w"
        command = _command("search", folder, workdir)
        with distributed_cases.job(together(command, 2), tmp_path / "log", devices=2) as job:
            job.until((workdir / "checkpoints" / str(EPOCH_STEPS)).exists)
            job.processes[victim].kill()
            survivor = job.wait(limit=60)[1 - victim]
        assert survivor.status == 1, survivor
        assert survivor.line.startswith("prdarts: error: another process of this run ended"), survivor
        ends = distributed_cases.run(command, tmp_path / "log", processes=2, devices=2)
        assert [end.status for end in ends] == [0, 0], ends
        assert "bit for bit" in ends[0].out or "finished already" in ends[0].out
        assert_same(search_cases.outcome(workdir), search_cases.outcome(whole("search")))

    def test_simulated_slurm(self, whole, folder, tmp_path):
        """`--distributed` alone, with the variables that srun sets, goes on with a copy of the finished run."""
        shutil.copytree(whole("search"), tmp_path / "w")
        (tmp_path / "w" / "genotype.json").unlink()
        command = [*_command("search", folder, tmp_path / "w"), "--distributed"]
        environments = [
            {
                "SLURM_JOB_ID": str(distributed_cases.free_port()),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process),
            }
            for process in range(2)
        ]
        environments[1]["SLURM_JOB_ID"] = environments[0]["SLURM_JOB_ID"]  # the port comes from it
        with distributed_cases.job([command] * 2, tmp_path / "log", devices=2, environments=environments) as job:
            ends = job.wait()
        assert [end.status for end in ends] == [0, 0], ends
        assert_same(search_cases.outcome(tmp_path / "w"), search_cases.outcome(whole("search")))
