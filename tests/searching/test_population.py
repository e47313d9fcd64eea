"""A population: each member is its single search, one compilation serves all, and nothing that ends it loses any."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax
import pytest
import search_cases
from search_cases import EPOCH_STEPS, assert_same, one_error, outcome, search, snapshot, words

from prdarts_jax import cli
from prdarts_jax.errors import UserError
from prdarts_jax.report import data as report_data
from prdarts_jax.report import page as report_page
from prdarts_jax.report import sweep as report_sweep
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.workdir import WorkdirLock
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.searching import population, side_by_side
from prdarts_jax.searching import sweep as sweeps
from prdarts_jax.space.genotype import Genotype

MOMENT = 1e-9  # minutes: over as soon as the first dispatch is
SWEEP = {"seed": [0, 1], "lambda1": [0.01, 5.0]}
NAMES = ("seed=0,lambda1=0.01", "seed=1,lambda1=0.01", "seed=0,lambda1=5.0", "seed=1,lambda1=5.0")
SIDE = "1 of 2 side by side"
REPORT = report_page.report  # the real one; searches of these tests draw none


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("population")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return search_cases.write_npz(tmp_path_factory.mktemp("data") / "digits.npz")


def populate(workdir, sweep=SWEEP, *, given=None, **flags):
    config = search_cases.config(**flags)
    return population.search_population(config, workdir, sweep, **{"data": search_cases.digits(), **(given or {})})


def single(folder, **flags):
    """The outcome of an ordinary search, computed once for all tests."""
    workdir = folder / "single" / hashlib.sha256(repr(sorted(flags.items())).encode()).hexdigest()
    if not workdir.exists():
        assert search(workdir, **flags).status == "finished"
    return outcome(workdir)


def singles(folder, **flags):
    """The outcomes of the members of SWEEP."""
    return {
        f"seed={seed},lambda1={lambda1}": single(folder, seed=seed, method__options__lambda1=lambda1, **flags)
        for seed in SWEEP["seed"]
        for lambda1 in SWEEP["lambda1"]
    }


PROGRAMS = ("initial", "dispatch", "evaluation")


@pytest.fixture
def compilations(monkeypatch):
    """What the populations of a test compile beyond what their first member, alone, has compiled before."""
    seen, shared = [], population.Shared

    def sizes(one):
        return {kind: getattr(one.programs, kind)._cache_size() for kind in PROGRAMS}

    def spying(inputs):
        one = shared(inputs)
        seen.append((one, sizes(one)))
        return one

    monkeypatch.setattr(population, "Shared", spying)
    return lambda: [{kind: size - before[kind] for kind, size in sizes(one).items()} for one, before in seen]


@pytest.fixture
def finished(folder):
    """A population on one device; tests may not change it."""
    workdir = folder / "finished"
    if not workdir.exists():
        assert populate(workdir).status == "finished"
    return workdir


# Members


def test_each_member_is_its_single_search(folder, finished):
    expected = singles(folder)
    assert {p.name for p in finished.iterdir() if p.is_dir()} == set(NAMES) == expected.keys()
    for name, want in expected.items():
        assert_same(outcome(finished / name), want)
    leaves = [outcome(finished / name)["leaves"] for name in NAMES]
    assert all(leaves[i] != leaves[j] for i in range(4) for j in range(i))


NUMBERS = {
    "weights.learning_rate": [0.025, 0.2],
    "weights.learning_rate_min": [0.001, 0.1],
    "weights.weight_decay": [5e-4, 0.5],
    "weights.momentum": [0.9, 0.0],
    "arch.learning_rate": [3e-4, 0.1],
    "arch.weight_decay": [1e-3, 1.0],
    "tau_max": [10.0, 2.0],
    "tau_min": [0.1, 1.0],
    "lambda1": [0.01, 5.0],
    "lambda2": [0.005, 1.0],
    "lambda3": [0.005, 2.0],
    "gate_dropout": [0.0, 0.5],
}


def test_every_number_that_can_be_swept(folder, tmp_path, compilations, monkeypatch):
    """The last member shares the first one's programs and has none of its numbers."""
    assert {"seed", *NUMBERS} == set(sweeps.sweepable(search_cases.config()))
    members = sweeps.members

    def ends(config, numbers, *rest):
        """The first and the last of the product, which are thousands."""
        both = ({name: [values[i]] for name, values in numbers.items()} for i in (0, -1))
        return tuple(member for one in both for member in members(config, one, *rest))

    monkeypatch.setattr(sweeps, "members", ends)
    flags = {name if "." in name else f"method.options.{name}": values[-1] for name, values in NUMBERS.items()}
    other = {path.replace(".", "__"): value for path, value in flags.items()}
    expected = [single(folder, epochs=2, evaluate_every=1, **numbers) for numbers in ({}, other)]
    result = populate(tmp_path / "w", NUMBERS, epochs=2, evaluate_every=1)
    assert result.status == "finished"
    assert compilations() == [dict.fromkeys(PROGRAMS, 0)]
    assert len(result.members) == 2
    for name, want in zip(result.members, expected, strict=True):
        assert_same(outcome(tmp_path / "w" / name), want)


def test_members_are_ordinary_workdirs(finished, npz, capsys, tmp_path):
    workdir = finished / NAMES[2]
    assert search(workdir, method__options__lambda1=5.0).status == "already-finished"
    with pytest.raises(UserError, match="holds another search"):
        search(workdir)
    capsys.readouterr()
    assert cli.main(["derive", str(workdir)]) == 0
    assert Genotype.from_json(capsys.readouterr().out) == Genotype.load(workdir)
    document = json.loads((workdir / "config.json").read_text())
    assert document["sources"]["method.options.lambda1"] == document["sources"]["seed"] == "sweep"
    assert document["platform"]["devices"] == 1


def test_a_single_search_goes_on_with_a_member(folder, tmp_path, capsys):
    """And the population with what the single search has finished."""
    workdir = tmp_path / "w"
    assert populate(workdir, run__time_limit=MOMENT).status == "time-limit"
    member = workdir / NAMES[0]
    assert Checkpointer(member / "checkpoints").steps() == [3]
    capsys.readouterr()
    assert search(member).status == "finished"
    assert "resuming at step 3 " in capsys.readouterr().out
    result = populate(workdir)
    assert {name: r.status for name, r in result.members.items()} == {
        name: "already-finished" if name == NAMES[0] else "finished" for name in NAMES
    }
    for name, want in singles(folder).items():
        assert_same(outcome(workdir / name), want)


def test_progress_names_the_member(tmp_path, capsys):
    populate(tmp_path / "w", {"seed": [0, 1]}, epochs=1, run__progress="lines")
    said = capsys.readouterr()
    for seed in (0, 1):
        assert f"seed={seed}: epoch 1/1 | train " in said.err
    compiled = [line for line in said.out.splitlines() if "compil" in line]
    assert [line.partition(": ")[0] for line in compiled] == ["seed=0"] * 2


# Stopping


def test_stopped_after_every_dispatch(folder, tmp_path):
    statuses = []
    sweep = {"seed": [0, 1]}
    while "finished" not in statuses:
        statuses.append(populate(tmp_path / "w", sweep, run__time_limit=MOMENT, epochs=1).status)
        assert len(statuses) < 20
    dispatches = 3  # of a member
    # A member that has computed its last dispatch writes its results; the next one is left to the next start.
    assert statuses == ["time-limit"] * (2 * dispatches - 1) + ["finished"]
    for seed in (0, 1):
        assert_same(outcome(tmp_path / "w" / f"seed={seed}"), single(folder, seed=seed, epochs=1))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(folder, npz, tmp_path, monkeypatch, capsys, signum, status):
    update, seen = search_loop.Progress.update, []

    def interrupted(self, n, **fields):
        seen.append(n)
        if sum(seen) == 3 * EPOCH_STEPS + 3:  # in the first epoch of the second member
            signal.raise_signal(signum)
        update(self, n, **fields)

    command = [*words(tmp_path / "w", npz), "--population", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(search_loop.Progress, "update", interrupted)
        assert cli.main(command) == status
    said = capsys.readouterr()
    assert said.err == ""
    last = said.out.splitlines()[-1]
    assert f"saved in {tmp_path / 'w'}; to go on: prdarts search --preset digits" in last
    assert "--population 3" in last
    assert (tmp_path / "w" / "seed=0" / "genotype.json").exists()
    assert Checkpointer(tmp_path / "w" / "seed=1" / "checkpoints").steps() == [3]
    assert not (tmp_path / "w" / "seed=2").exists()

    assert cli.main(command) == 0
    for seed in range(3):
        assert_same(outcome(tmp_path / "w" / f"seed={seed}"), single(folder, seed=seed))


def test_killed_and_started_again(folder, npz, tmp_path, monkeypatch):
    """kill -9 of a real process at a random moment after the second member has begun, then the same command again.

    The one that goes on shares the programs of the other tests; test_resume.py goes on in a new process.
    """
    workdir, log = tmp_path / "w", tmp_path / "log"
    command = [sys.executable, "-m", "prdarts_jax", *words(workdir, npz), "--population=3"]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    while not (workdir / "seed=1" / "config.json").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    delay = random.uniform(0, 1.0)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, log.read_text()
    assert not (workdir / "report.html").exists()

    where = f"killed {delay:.3f} s after the second member began"
    with monkeypatch.context() as patch:
        patch.setattr(report_page, "report", lambda workdirs: REPORT(workdirs) if workdirs == [workdir] else None)
        assert cli.main(command[3:]) == 0, where
    assert (workdir / "report.html").is_file()
    for seed in range(3):
        found, expected = outcome(workdir / f"seed={seed}"), single(folder, seed=seed)
        for part in expected:
            assert found[part] == expected[part], f"{where}: seed {seed}: {part}"


def test_a_failing_member_is_named_and_the_others_go_on(folder, npz, tmp_path, capsys):
    # The last is the first one as a float32, so that both are one search, which has been traced.
    rates = (0.025, 1e30, 0.025 + 1e-12)
    command = [*words(tmp_path / "w", npz), "--sweep", f"weights.learning_rate={','.join(map(str, rates))}"]
    name = "weights.learning_rate=1e+30"
    expected, rate = single(folder), "progress/weight_learning_rate"
    for _ in range(2):  # again: it fails again, and what is finished stays
        capsys.readouterr()
        assert cli.main(command) == 1
        first, last = capsys.readouterr().err.splitlines()
        assert (
            first.startswith(f"prdarts: {name} failed: ") and "at step 1;" in first and "other members go on" in first
        )
        assert last.startswith(f"prdarts: error: population: {name} failed: ") and "at step " in last
        assert not (tmp_path / "w" / name / "genotype.json").exists()
        assert Checkpointer(tmp_path / "w" / name / "checkpoints").steps() == []
        for other in (rates[0], rates[-1]):
            found = outcome(tmp_path / "w" / f"weights.learning_rate={other}")
            for mine, want in zip(found["rows"], expected["rows"], strict=True):
                if rate in want:
                    assert mine[rate] == pytest.approx(want[rate])
                    mine[rate] = want[rate]
            assert_same(found, expected)


def test_a_member_in_use_is_named_and_the_others_go_on(folder, tmp_path, capsys):
    with WorkdirLock(tmp_path / "w" / "seed=0"):
        (tmp_path / "w" / "population.json").write_text(json.dumps({"schema_version": 1, "kind": "population"}))
        result = populate(tmp_path / "w", {"seed": [0, 1]})
    assert result.status == "failed"
    assert "in use by process" in result.failures["seed=0"]
    assert_same(outcome(tmp_path / "w" / "seed=1"), single(folder, seed=1))


# The folder


def test_a_finished_population_is_reported_again(npz, tmp_path, capsys, monkeypatch):
    def page(workdirs):
        path = workdirs[0] / "report.html"
        path.write_text("a page")
        return path

    monkeypatch.setattr(report_page, "report", page)
    command = [*words(tmp_path / "w", npz, epochs=1), "--population=2"]
    assert cli.main(command) == 0
    first, before = capsys.readouterr().out, snapshot(tmp_path / "w")
    assert cli.main(command) == 0
    second = capsys.readouterr().out
    assert second.splitlines()[0].startswith("all 2 searches are finished already; --overwrite starts them again: ")
    assert second.splitlines()[1:] == first.splitlines()[-len(second.splitlines()) + 1 :]
    assert snapshot(tmp_path / "w") == before
    assert cli.main([*command, "--overwrite"]) == 0
    assert "finished already" not in capsys.readouterr().out
    same = {name: content for name, (_, content) in snapshot(tmp_path / "w").items() if name.endswith("genotype.json")}
    assert same == {name: content for name, (_, content) in before.items() if name.endswith("genotype.json")}


def test_a_larger_sweep_keeps_the_members_that_are_there(tmp_path):
    assert populate(tmp_path / "w", {"seed": [0]}, epochs=1).status == "finished"
    before = snapshot(tmp_path / "w" / "seed=0")
    result = populate(tmp_path / "w", {"seed": [0, 1]}, epochs=1)
    assert [r.status for r in result.members.values()] == ["already-finished", "finished"]
    assert snapshot(tmp_path / "w" / "seed=0") == before
    assert json.loads((tmp_path / "w" / "population.json").read_text())["members"] == ["seed=0", "seed=1"]


def test_other_folders_are_left_alone(finished, npz, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"]):
        command = [*words(tmp_path, npz), "--population=2", *more]
        one_error(capsys, command, 2, "workdir: ", "'thesis.tex'", "no population.json")
        assert snapshot(tmp_path) == before
    one = tmp_path / "one"
    assert search(one, epochs=1).status == "finished"
    one_error(capsys, [*words(one, npz), "--population=2"], 2, "workdir: ", "'checkpoints'", "no population.json")
    one_error(capsys, words(finished, npz), 2, "workdir: ", "'population.json' and no config.json")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "population.json").write_text("{")
    one_error(capsys, [*words(tmp_path / "p", npz), "--population=2"], 2, "population.json does not name a population")


def test_members_of_another_population_are_refused(finished):
    before = snapshot(finished)
    with pytest.raises(UserError, match=r"seed=0,lambda1=0\.01 holds another search \(epochs: 3 in the workdir, 2 now"):
        populate(finished, epochs=2)
    assert snapshot(finished) == before


# Several devices


@pytest.fixture
def on_two_devices(folder, mapped):
    if jax.device_count() < 2:
        pytest.skip(f"{jax.device_count()} devices of 2")
    workdir = folder / "side-by-side"
    if not workdir.exists():
        assert populate(workdir, run__devices="2", epochs=2, evaluate_every=2).status == "finished"
    return workdir


@pytest.fixture(scope="module")
def mapped():
    """The program of two devices, which the tests of this file share, and its text."""
    original, known = side_by_side._mapped, {}

    def remembered(problem, mesh, kinds):
        key = (problem, mesh)
        if key not in known:
            program, texts = original(problem, mesh, kinds), []

            def call(*arguments):
                if not texts:
                    texts.append(program.lower(*arguments).as_text())
                return program(*arguments)

            known[key] = call
            call.program, call.texts = program, texts
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "_mapped", remembered)
        yield known


@pytest.mark.slow
@pytest.mark.multidevice
def test_members_on_several_devices_are_their_single_searches(folder, on_two_devices):
    """To float tolerance: the compiler may fuse the program of an axis otherwise."""
    for name, want in singles(folder, epochs=2, evaluate_every=2).items():
        found = outcome(on_two_devices / name)
        assert found["genotype"] == want["genotype"]
        assert found["leaves"].keys() == want["leaves"].keys()
        for mine, single_ in zip(found["rows"], want["rows"], strict=True):
            assert mine.keys() == single_.keys()
            for field in mine.keys() - {"kind"}:
                assert mine[field] == pytest.approx(single_[field], rel=1e-4, abs=1e-5), (name, field)
        document = json.loads((on_two_devices / name / "config.json").read_text())
        assert document["platform"]["devices"] == SIDE and len(document["devices"]) == 2


@pytest.mark.slow
@pytest.mark.multidevice
def test_stopped_side_by_side(on_two_devices, tmp_path, capsys):
    """Members at different steps, and a device without a member, compute what they compute side by side."""
    flags = {"run__devices": "2", "epochs": 2, "evaluate_every": 2}
    statuses = []
    while "finished" not in statuses:
        statuses.append(populate(tmp_path / "w", run__time_limit=MOMENT, **flags).status)
        if len(statuses) == 2:  # one member loses the steps since its first checkpoint, and the other does not
            newest = tmp_path / "w" / NAMES[1] / "checkpoints" / "6"
            shutil.rmtree(newest)
        assert len(statuses) < 30
    assert len(statuses) > 10
    for name in NAMES:
        assert_same(outcome(tmp_path / "w" / name), outcome(on_two_devices / name))
    capsys.readouterr()
    os.remove(tmp_path / "w" / NAMES[0] / "genotype.json")
    assert search(tmp_path / "w" / NAMES[0], epochs=2, evaluate_every=2).status == "finished"
    assert f"to float tolerance only (devices {SIDE} -> 1)" in capsys.readouterr().out


@pytest.mark.multidevice
def test_three_members_on_two_devices_have_one_program_without_collectives(mapped, tmp_path):
    result = populate(tmp_path / "w", {"seed": [0, 1, 2]}, run__devices="2", epochs=1)
    assert result.status == "finished"
    ((_, mesh),) = mapped
    assert mesh.devices.shape == (2,)
    (call,) = mapped.values()
    assert call.program._cache_size() == 1
    (text,) = call.texts
    assert "func.func public @main" in text
    assert not [word for word in ("all_reduce", "all_gather", "collective", "all_to_all") if word in text]


# The report


def test_the_report_has_mean_and_deviation_by_setting(finished, tmp_path, capsys):
    found = report_data.population(finished)
    assert found.swept == ("seed", "method.options.lambda1")
    settings = report_sweep.settings([report_data.read(p) for p in found.folders], found.swept)
    assert [report_sweep.label(s) for s in settings] == ["lambda1=0.01", "lambda1=5.0"]
    for setting, names in zip(settings, (NAMES[:2], NAMES[2:]), strict=True):
        rows = [search_cases.rows(finished / name, "epoch")[-1] for name in names]
        assert (setting.members, setting.finished) == (2, 2)
        for field in ("val_accuracy", "val_loss", "normal_skips"):
            values = [row[field] for row in rows]
            mean, deviation = setting.figures[field]
            assert mean == pytest.approx(sum(values) / 2)
            assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
            assert deviation == pytest.approx(statistics.stdev(values))
    out = tmp_path / "page.html"
    with pytest.MonkeyPatch.context() as patch:  # undone before what it replaces is
        patch.setattr(report_page, "report", REPORT)
        assert cli.main(["report", str(finished), "--out", str(out)]) == 0
    page = out.read_text()
    assert '<h2 id="sweep">Sweep</h2>' in page and "2 of 2" in page
    for setting in settings:
        assert report_sweep.spread(setting.figures["val_loss"]) in page
        assert f"<td>{report_sweep.label(setting)}</td>" in page
    for name in NAMES:
        assert f"<code>{name}</code>" in page
    assert "P over epochs" not in page  # members are linked, not shown in full
    table = report_sweep.lines(settings)
    assert len(table) == 3 and table[0].split()[0] == "n"
    capsys.readouterr()
