"""The protocol: stages are ordinary runs, no test image chooses a cell, and it goes on in whatever stage it ended.

Searches have a stub of the network here; the test that kills the command has the real one.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import search_cases
import train_cases
from search_cases import assert_same, one_error, snapshot

from prdarts_jax import cli, protocol
from prdarts_jax.config.pipeline import PipelineConfig
from prdarts_jax.data.batches import hold_out
from prdarts_jax.data.sources import Dataset, from_arrays
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.presets import pipeline as presets
from prdarts_jax.report import page as report_page
from prdarts_jax.report import pipeline as report
from prdarts_jax.run.metrics import comparable, read
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import evaluation
from prdarts_jax.training import loop as train_loop

HELD_OUT = 28
MOMENT = 1e-9  # minutes: over as soon as the first dispatch is
_SHARED = {"devices": "1", "progress": "off", "steps_per_dispatch": 3, "log_every": 1}
_SEARCH = {p: v for p, v in search_cases.FLAGS.items() if not p.startswith(("run.", "data."))}
_TRAIN = {"network.cells": 3, "network.channels": 4, "batch_size": 16}
FLAGS: dict[str, Any] = {
    **{f"search.{path}": value for path, value in _SEARCH.items()},
    **{f"{stage}.{path}": value for stage in ("short", "full") for path, value in _TRAIN.items()},
    **{f"run.{name}": value for name, value in _SHARED.items()},
    "search.epochs": 2,
    "short.epochs": 2,
    "full.epochs": 2,
    "holdout": HELD_OUT,
    "search_seeds": (0, 1),
    "train_seeds": (3, 4),
}
SEARCHES, TRAININGS = ("seed=0", "seed=1"), ("seed3", "seed4")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with search_cases.shared_programs(stub=True), train_cases.shared_programs():
        yield


def config(**flags: Any) -> PipelineConfig:
    """The tiny pipeline with other values; `__` in a name stands for a dot."""
    return presets.resolve("digits", {**FLAGS, **{k.replace("__", "."): v for k, v in flags.items()}}).config


def run(workdir: Path, *, data: Dataset | None = None, **flags: Any) -> protocol.PipelineResult:
    return protocol.run_pipeline(config(**flags), workdir, data=train_cases.digits() if data is None else data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture
def finished(folder: Path) -> Path:
    """The uninterrupted pipeline; tests may not change it."""
    workdir = folder / "uninterrupted"
    if not workdir.exists():
        assert run(workdir).status == "finished"
    return workdir


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit, however a pipeline came to its end."""
    files = ["genotype.json", "choice.json", *(f"search/{name}/genotype.json" for name in SEARCHES)]
    files += [f"short/{name}/evaluation.json" for name in SEARCHES]
    files += [f"full/{name}/evaluation.json" for name in TRAININGS]
    files += [f"full/{name}/network.safetensors" for name in TRAININGS]
    found: dict[str, Any] = {file: (workdir / file).read_bytes() for file in files}
    logs = sorted(workdir.glob("*/*/metrics.jsonl"))
    assert len(logs) == 2 * len(SEARCHES) + len(TRAININGS)
    return found | {str(log.relative_to(workdir)): [comparable(row) for row in read(log)] for log in logs}


# --- what the stages compute ------------------------------------------------------------------------------------------


def test_every_stage_is_an_ordinary_run(finished: Path, tmp_path: Path) -> None:
    """Searches and trainings by hand, with the fields that the protocol promises, leave the same bits."""
    made, data = config(), train_cases.digits()
    by_hand = tmp_path / "search"
    search_loop.search(made.search, by_hand, data=data)
    assert (by_hand / "genotype.json").read_bytes() == (finished / "search/seed=0/genotype.json").read_bytes()
    rows = [[comparable(row) for row in read(path / "metrics.jsonl")] for path in (by_hand, finished / "search/seed=0")]
    assert rows[0] == rows[1]
    train_loop.train(made.short, Genotype.load(by_hand), tmp_path / "short", data=data)
    name = "network.safetensors"
    assert (tmp_path / "short" / name).read_bytes() == (finished / "short/seed=0" / name).read_bytes()
    for stage, seeds in (("search", (0, 1)), ("short", (0, 0)), ("full", (3, 4))):
        heads = [json.loads(path.read_text()) for path in sorted((finished / stage).glob("*/config.json"))]
        assert tuple(head["config"]["seed"] for head in heads) == seeds
        left_out = 0 if stage == "full" else HELD_OUT
        assert {head["config"]["data"]["holdout"] for head in heads} == {left_out}


def _accuracy(workdir: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Of a training's network on raw images, by its plain application to all of them at once."""
    found = evaluation.restore(workdir)
    mean, std = (np.asarray(v, np.float32) for v in (found.problem.mean, found.problem.std))
    net = found.problem.network.clone(own_kernels=False)
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    logits = jax.jit(lambda x: net.apply(found.variables._asdict(), x)[0])(scaled)
    return float(np.mean(np.argmax(np.asarray(logits), axis=1) == labels))


def test_the_cell_of_the_best_held_out_accuracy_is_chosen(finished: Path) -> None:
    data = train_cases.digits()
    _, held_out = hold_out(len(data.train_labels), HELD_OUT, 0)
    expected = {
        name: _accuracy(finished / "short" / name, data.train_images[held_out], data.train_labels[held_out])
        for name in SEARCHES
    }
    choice = json.loads((finished / "choice.json").read_text())
    assert {row["name"]: row["accuracy"] for row in choice["ranking"]} == pytest.approx(expected)
    best = choice["ranking"][0]["name"]
    assert expected[best] == max(expected.values())
    assert Genotype.load(finished) == Genotype.load(finished / "search" / best)
    assert all(Genotype.load(finished / "full" / name) == Genotype.load(finished) for name in TRAININGS)


def test_no_log_before_the_test_has_a_test_figure(finished: Path) -> None:
    for stage, part, images in (("short", "holdout", HELD_OUT), ("full", "test", train_cases.TEST)):
        for path in (finished / stage).glob("*/evaluation.json"):
            found = json.loads(path.read_text())
            assert (found["part"], found["images"]) == (part, images)
    for stage, there in (("search", False), ("short", False), ("full", True)):
        for log in (finished / stage).glob("*/metrics.jsonl"):
            assert any("test_" in name for row in read(log) for name in row) == there, log


@pytest.mark.slow
def test_no_test_image_has_a_say(finished: Path, tmp_path: Path) -> None:
    """With other test images everything before the test is as it was."""
    data, rng = train_cases.digits(), np.random.default_rng(0)
    other = from_arrays(
        "digits",
        data.train_images,
        data.train_labels,
        test_images=rng.integers(0, 255, data.test_images.shape, np.uint8),
        test_labels=rng.permutation(data.test_labels),
    )
    assert run(tmp_path / "w", data=other).status == "finished"
    before, now = outcome(finished), outcome(tmp_path / "w")
    same = [file for file in before if not file.startswith("full/") or file.endswith(".safetensors")]
    assert_same({file: now[file] for file in same}, {file: before[file] for file in same})
    assert now["full/seed3/evaluation.json"] != before["full/seed3/evaluation.json"]


def test_best_first_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = {f"seed={i}": {"accuracy": rng.integers(3) / 2, "loss": rng.integers(2) / 2} for i in range(4)}
        ranking = protocol.best_first(rows)
        assert sorted(ranking) == sorted(rows)
        for first, second in itertools.pairwise(ranking):
            (a, la), (b, lb) = ((rows[n]["accuracy"], rows[n]["loss"]) for n in (first, second))
            assert a > b or (a == b and (la < lb or (la == lb and first < second)))


# --- goes on ----------------------------------------------------------------------------------------------------------


def test_stopped_in_every_stage_it_ends_as_uninterrupted(finished: Path, tmp_path: Path) -> None:
    """After every epoch; what is finished is not touched again."""
    workdir, statuses, stages = tmp_path / "w", [""], []
    while statuses[-1] != "finished":
        before = snapshot(workdir)
        result = run(workdir, run__time_limit=MOMENT, run__steps_per_dispatch=10)
        statuses.append(result.status)
        after = snapshot(workdir)
        done = [path for path in before if Path(path).parts[-1] in ("genotype.json", "network.safetensors")]
        assert all(after[path] == before[path] for path in done)
        stages.append(max(("search", "short", "full").index(path.parent.name) for path in workdir.glob("*/*")))
        assert len(statuses) < 60
    assert set(statuses) == {"", "time-limit", "finished"}
    assert set(stages) == {0, 1, 2}
    assert_same(outcome(workdir), outcome(finished))


def test_a_finished_pipeline_is_reported_again(finished: Path, tmp_path: Path) -> None:
    before = snapshot(finished)
    again = run(finished)
    assert again.status == "already-finished" and again.genotype == Genotype.load(finished)
    assert again.summary == json.loads((finished / "result.json").read_text())
    assert snapshot(finished) == before
    shutil.copytree(finished, tmp_path / "w")
    assert run(tmp_path / "w", run__overwrite=True).status == "finished"
    assert_same(outcome(tmp_path / "w"), outcome(finished))


def test_what_a_signal_between_two_runs_leaves(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while a network is measured: no run sees it, so the pipeline itself does."""
    measure = protocol.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return measure(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "evaluate", interrupted)
        result = run(tmp_path / "w")
    assert (result.status, result.signum) == ("interrupted", signal.SIGTERM)
    assert not (tmp_path / "w" / "full").exists()
    assert run(tmp_path / "w").status == "finished"
    assert_same(outcome(tmp_path / "w"), outcome(finished))


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_uninterrupted(tmp_path: Path) -> None:
    """kill -9 of the command as soon as a file of a stage is there; the same command again goes on."""
    npz = train_cases.write_npz(tmp_path / "digits.npz")
    values = {**FLAGS, "data": f"npz:{npz}", "search_seeds": "0,1", "train_seeds": "3,4"}
    flags = [f"--{path.replace('_seeds', '-seeds')}={value}" for path, value in values.items()]

    def start(workdir: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "prdarts_jax", "pipeline", "--preset", "digits", "--workdir", str(workdir)]
        return subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=500) == 0
    workdir, killed = tmp_path / "killed", []
    for mark in (
        "config.json",
        "search/seed=0/checkpoints/2",
        "search/seed=1/metrics.jsonl",
        "short/seed=0/metrics.jsonl",
        "short/seed=0/evaluation.json",
        "choice.json",
        "full/seed3/metrics.jsonl",
        "full/seed4/genotype.json",
        "full/seed3/evaluation.json",
    ):
        process = start(workdir)
        while process.poll() is None and not (workdir / mark).exists():
            time.sleep(0.005)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed.append(mark)
    assert {mark.partition("/")[0] for mark in killed} >= {"config.json", "search", "short", "full"}
    assert start(workdir).wait(timeout=500) == 0
    assert_same(outcome(workdir), outcome(tmp_path / "whole"))


def test_a_failed_search_ends_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are finished and kept; a later start tries it again."""
    real = search_loop.check_finite

    def failing(row: Any, step: int) -> None:
        if "normal_skips" in row and not (tmp_path / "w" / "search" / "seed=1").exists():
            raise RunError("val_loss is nan")
        real(row, step)

    with monkeypatch.context() as patch:
        patch.setattr(search_loop, "check_finite", failing)
        with pytest.raises(RunError, match=r"^pipeline: seed=0 failed: val_loss is nan; the other searches are kept$"):
            run(tmp_path / "w")
    assert (tmp_path / "w" / "search" / "seed=1" / "genotype.json").is_file()
    assert not (tmp_path / "w" / "short").exists()
    assert run(tmp_path / "w").status == "finished"


def test_a_cell_without_operations_is_not_chosen(finished: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(finished, tmp_path / "w")
    best = json.loads((finished / "choice.json").read_text())["ranking"][0]["name"]
    for name in ("result.json", "choice.json", "genotype.json"):
        (tmp_path / "w" / name).unlink()
    for name in ("short", "full"):
        shutil.rmtree(tmp_path / "w" / name)
    cell = Genotype.load(finished / "search" / best)
    empty = Genotype([()], cell.normal_concat, cell.reduce, cell.reduce_concat)
    (tmp_path / "w" / "search" / best / "genotype.json").write_text(empty.to_json())
    assert run(tmp_path / "w").status == "finished"
    assert f"{best}: a cell without any operation cannot be trained" in capsys.readouterr().out
    (other,) = set(SEARCHES) - {best}
    assert [row["name"] for row in json.loads((tmp_path / "w" / "choice.json").read_text())["ranking"]] == [other]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_summary_has_every_run_mean_and_cost(finished: Path) -> None:
    found = json.loads((finished / "result.json").read_text())
    assert {stage: tuple(rows["runs"]) for stage, rows in found["stages"].items()} == {
        "search": SEARCHES,
        "short": SEARCHES,
        "full": TRAININGS,
    }
    tested = [json.loads((finished / "full" / n / "evaluation.json").read_text())["accuracy"] for n in TRAININGS]
    assert found["stages"]["full"]["mean"]["accuracy"] == pytest.approx(
        [statistics.fmean(tested), statistics.stdev(tested)]
    )
    for stage, half, batch in (("search", 2, search_cases.BATCH), ("short", 1, 16), ("full", 1, 16)):
        seconds = images = 0.0
        for log in (finished / stage).glob("*/metrics.jsonl"):
            rows = [row for row in read(log) if row["kind"] == "epoch"]
            seconds += sum(row["time_epoch_s"] for row in rows)
            images += rows[-1]["step"] * half * batch
        assert found["stages"][stage]["seconds"] == pytest.approx(seconds)
        assert found["stages"][stage]["images"] == images
    weights = jax.tree.leaves(evaluation.restore(finished / "full" / "seed3").variables.params)
    assert found["network"]["parameters"] == sum(leaf.size for leaf in weights)


@pytest.mark.parametrize("unfinished", [False, True])
def test_the_page_says_what_the_summary_says(finished: Path, tmp_path: Path, unfinished: bool) -> None:
    shutil.copytree(finished, tmp_path / "w")
    if unfinished:
        (tmp_path / "w" / "result.json").unlink()
        shutil.rmtree(tmp_path / "w" / "full")
    text = report.write(tmp_path / "w").read_text()
    found = report.summary(tmp_path / "w")
    assert ("has not ended" in text) == unfinished
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org", "").replace("https://", "http")
    if not unfinished:
        mean, deviation = found["stages"]["full"]["mean"]["accuracy"]
        assert f"<b>{100 * (1 - mean):.2f} ± {100 * deviation:.2f} %</b>" in text
        assert f"{found['network']['parameters']:,} parameters" in text
    for name in SEARCHES:
        assert f"<code>{name}</code>" in text
        assert f"{found['stages']['short']['runs'][name]['accuracy']:.4g}" in text


def test_the_report_command_knows_a_pipeline(finished: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["report", str(finished), "--out", str(out)]) == 0
    assert "pipeline" in out.read_text()
    one_error(capsys, ["report", str(finished), str(finished)], 2, "WORKDIR: a pipeline has a report of its own")
    with pytest.raises(UserError, match=r"holds no pipeline"):
        report.write(tmp_path)
    with pytest.raises(UserError, match=r"kind 'pipeline' is unknown"):
        report_page.read(finished)


# --- configs and mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_those_of_search_and_training(name: str) -> None:
    made = presets.resolve(name)
    search, training = presets.PARTS[name]
    from prdarts_jax.config import schema
    from prdarts_jax.presets import search as search_presets
    from prdarts_jax.presets import train as train_presets

    changed = {
        "search": {"data.holdout"},
        "short": {"data.holdout", "epochs", "evaluate_every"},
        "full": set(),
    }
    for stage, kept in changed.items():
        plain = search_presets.resolve(search) if stage == "search" else train_presets.resolve(training)
        ours = getattr(made.config, stage)
        paths = {path for path, _, _ in schema.fields(type(ours))}
        found = {path for path in paths if schema.get(ours, path) != schema.get(plain.config, path)}
        assert found == kept, stage
    assert made.sources.keys() >= {path for path, _, _ in schema.fields(PipelineConfig) if "options" not in path}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"search_seeds": "0,0"}, "search_seeds: '0,0' is not possible; allowed: A..B with A <= B"),
        ({"search_seeds": ()}, "search_seeds: () is not possible; allowed: different seeds, at least one"),
        ({"train_seeds": (1, 1)}, "train_seeds: (1, 1) is not possible; allowed: different seeds"),
        ({"train_seeds": (2**32,)}, "train_seeds: (4294967296,) is not possible; allowed: seeds in 0..4294967295"),
        ({"holdout": 0}, "short.data.holdout: 0.0 is not possible; allowed: > 0"),
        ({"holdout": 1.5}, "data.holdout: 1.5 is not possible"),
        (
            {"search.data.holdout": 0.3},
            "short.data.holdout: 28.0 is not possible; allowed: that of search.data.holdout",
        ),
        ({"short.evaluate_every": 1}, "short.evaluate_every: 1 is not possible; allowed: 0: no cell is chosen by"),
        ({"full.evaluate_every": 0}, "full.evaluate_every: 0 is not possible; allowed: >= 1"),
        ({"full.data.source": "npz:x.npz"}, "full.data.source: 'npz:x.npz' is not possible; allowed: that of the"),
        ({"search.seed": 3}, "search.seed: 3 is not possible; allowed: search_seeds, which says it for the stages"),
        ({"full.run.workdir": "x"}, "full.run.workdir: 'x' is not possible; allowed: run.workdir"),
        ({"short.epohcs": 3}, "field: unknown value 'epohcs'; did you mean 'epochs'?"),
        ({"epochs": 3}, "field: unknown value 'epochs'; did you mean"),
    ],
)
def test_impossible_configs_are_one_line(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        presets.resolve("digits", {**FLAGS, **flags})
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_said_once_holds_for_all_stages() -> None:
    made = config(data="npz:a.npz", run__checkpoint_every=7, search__run__checkpoint_every=3).search
    assert (made.data.source, made.run.checkpoint_every, made.run.steps_per_dispatch) == ("npz:a.npz", 3, 3)
    whole = config(data="npz:a.npz", run__workers="2", run__checkpoint_every=7)
    assert {whole.short.data.source, whole.full.data.source} == {"npz:a.npz"}
    assert (whole.short.run.workers, whole.full.run.checkpoint_every) == ("2", 7)
    own = config(search__space__primitives="own.py").full.network.primitives
    assert own == "own.py"


def test_a_foreign_workdir_is_left_alone(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "w"
    shutil.copytree(finished, other)
    before = snapshot(other)
    for flags, said in (
        ({"short__epochs": 3}, r"holds another pipeline \(short\.epochs: 2 in the workdir, 3 now\)"),
        ({"search_seeds": (0, 1, 2)}, r"search_seeds: \[0, 1\] in the workdir, \[0, 1, 2\] now"),
        ({"search__method__options__lambda1": 0.5}, r"search\.method\.options\.lambda1: 0\.01 in the workdir"),
    ):
        with pytest.raises(UserError, match=said):
            run(other, **flags)
    with pytest.raises(UserError, match=r"holds a search; allowed: a new folder or one of a pipeline"):
        run(other / "search" / "seed=0")
    assert snapshot(other) == before
    without = from_arrays("digits", train_cases.digits().train_images, train_cases.digits().train_labels)
    with pytest.raises(UserError, match=r"has no test images"):
        run(tmp_path / "new", data=without)
    with pytest.raises(UserError, match=r"method\.options\.executed_ops: 9"):
        run(tmp_path / "new", search__method__options__executed_ops=9)
    assert not (tmp_path / "new").exists()


def test_the_command_line(capsys: Any) -> None:
    words = ["pipeline", "--preset", "digits", "--strategy", "darts", "--search.epochs=3", "--holdout", "0.25"]
    words += ["--method.order", "2", "--with", "stop_at_skips:skips=3", "--search-seeds", "4..6", "--data=npz:x.npz"]
    assert cli.main([*words, "--print-config", "--json"]) == 0
    found = {path: row["value"] for path, row in json.loads(capsys.readouterr().out).items()}
    assert found["search.method.strategy"] == "darts" and found["search.method.options.order"] == 2
    assert found["search.method.transforms"] == ["stop_at_skips:skips=3"]
    assert (found["search.epochs"], found["search_seeds"], found["train_seeds"]) == (3, [4, 5, 6], [0, 1])
    assert {found[f"{stage}.data.source"] for stage in ("search", "short", "full")} == {"npz:x.npz"}
    assert (found["search.data.holdout"], found["full.data.holdout"]) == (0.25, 0.0)
    assert found["run.workdir"] == "runs/pipeline-digits"
    for more, said in (
        (["--epochs", "3"], "unknown --epochs"),
        (["--short.epohcs", "3"], "unknown --short.epohcs; did you mean --short.epochs?"),
        (["--method.lambda1", "3"], "method.options.lambda1"),
        (["--distributed"], "flag: pipeline is for one process"),
    ):
        one_error(capsys, [*words, *more, "--print-config"], 2, said)
    assert cli.main(["pipeline", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--search.method.NAME" in text and "--short.epochs" in text and "--full.network.channels" in text
