"""The benchmarks' own arithmetic: ratios, rows, verdicts, and that the committed page is the generated one."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from benchmarks import __main__ as command
from benchmarks import bench_growth, bench_scaling, cases, comparisons, race, report, rows, worker
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.spec import Space

ROW: dict[str, Any] = {
    "case": "prdarts-8",
    "batch": 32,
    "peer": "torch-channels-last",
    "speedup": 2.5,
    "speedup_min": 2.0,
    "speedup_max": 3.0,
    "memory_ratio": 1.2,
    "memory_ours_gb": 1.8,
    "memory_peer_gb": 1.5,
    "seconds_ours": 1.0,
    "seconds_peer": 2.5,
    "others": 0.0,
    "commit": "abc",
    "device": "a machine",
    "versions": {"jax": "1"},
}


def test_committed_page_is_what_the_generator_makes() -> None:
    """A row that changes, or a page that is edited, makes this fail: run python -m benchmarks report."""
    expected = report.page(report.load(), report.NOTES.read_text(encoding="utf-8"))
    assert report.PAGE.read_text(encoding="utf-8") == expected


def test_committed_rows_are_of_the_full_scale_and_have_their_fields() -> None:
    needed = set(ROW) - {"memory_ours_gb", "memory_peer_gb", "others"}
    known = {"search_step": cases.SEARCH, "train_step": cases.TRAIN, "depthwise": cases.DEPTHWISE}
    for name, table in known.items():
        for row in report.load()[name]:
            assert needed <= set(row) and row["case"] in table["full"], row
            assert row["speedup_min"] <= row["speedup"] <= row["speedup_max"]


def test_page_says_what_was_reached_and_what_was_not() -> None:
    empty: dict[str, list[Any]] = {name: [] for name in report.NAMES}
    assert report.page(empty, "").count("| not measured yet |") == len(report.TARGETS)
    slow = {**ROW, "batch": 64, "speedup": 1.9, "others": 0.2}
    text = report.page({**empty, "search_step": [ROW, slow]}, "A reason.")
    assert "| PR-DARTS step, speedup | `prdarts-8`, batch 32 | at least 2 | 2.5 (2.00 to 3.00) | reached |" in text
    assert "`prdarts-8`, batch 64 | at least 2 | 1.9 (2.00 to 3.00) | **not reached** |" in text
    assert (
        "| PR-DARTS step, memory against PyTorch's | `prdarts-8`, batch 32 | at most 1 | 1.2 | **not reached** |"
        in text
    )
    assert "A reason." in text and text.count("abc (busy)") == 1
    default = {**ROW, "peer": "torch-default"}  # not the peer that the targets are about
    assert "**not reached**" not in report.page({**empty, "search_step": [default]}, "")


def test_a_ratio_is_taken_pair_by_pair() -> None:
    """A machine that gets three times slower during the run slows both sides of each pair: the ratio stays 2."""
    drift = [1.0, 2.0, 3.0]
    found = race.compare(drift, [2 * d for d in drift])
    assert (found["speedup"], found["speedup_min"], found["speedup_max"]) == (2.0, 2.0, 2.0)


class _Scripted(race.Worker):
    def __init__(self, seconds: list[float]) -> None:
        self.blocks = iter(seconds)

    def seconds(self, steps: int) -> float:
        return next(self.blocks)

    def memory(self) -> float:
        return 2.0

    def cpu(self) -> float:
        return 0.0


def test_busy_pairs_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of each side is left out; a pair under load (share .5) does not count while others can be had."""
    shares = iter([0.5, 0.0, 0.01])
    monkeypatch.setattr(race.Others, "share", lambda self: next(shares))
    ours, peer = _Scripted([9.0, 1.0, 1.0, 1.0]), _Scripted([9.0, 50.0, 2.0, 4.0])
    found = race.summary([race.measure(ours, peer, race.Plan(2, 1, patience=3))])
    assert (found["speedup_min"], found["speedup_max"], found["others"]) == (2.0, 4.0, 0.01)
    assert next(ours.blocks, None) is None


def test_the_blocks_of_several_starts_are_one_row() -> None:
    """A library whose speed differs from start to start is not judged by one of them."""
    slow, fast = race.Blocks([(0.0, 1.0, 4.0)], (2.0, 1.0)), race.Blocks([(0.1, 1.0, 1.0), (0.0, 1.0, 2.0)], (1.0, 4.0))
    found = race.summary([slow, fast])
    assert (found["speedup"], found["speedup_min"], found["speedup_max"]) == (2.0, 1.0, 4.0)
    assert (found["memory_ratio"], found["others"]) == (0.5, 0.1)


def test_a_peer_that_dies_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Side(race.Worker):
        def __init__(self, side: race.Side) -> None:
            if side.make == "dies":
                raise RuntimeError("the worker ended with status 9")
            self.stages = {}

        def __exit__(self, *args: object) -> None:
            pass

    monkeypatch.setattr(comparisons, "Worker", Side)
    monkeypatch.setattr(comparisons, "measure", lambda *args: race.Blocks([(0.0, 1.0, 2.0)], (1.0, 2.0)))
    said: list[str] = []
    sides = {"a": race.Side("dies", {}), "b": race.Side("lives", {})}
    args = "prdarts-8", 32, race.Side("lives", {}), sides, race.Plan(1, 1)
    found = list(comparisons._compare(comparisons.Options("full", note=said.append), *args))
    assert [(row["peer"], row["speedup"]) for row in found] == [("b", 2.0)]
    assert said == ["prdarts-8, batch 32, a: the worker ended with status 9"]
    blocks = iter([(0.0, 1.0, 2.0), (0.0, 1.0, 4.0), (0.0, 1.0, 9.0)])
    monkeypatch.setattr(comparisons, "measure", lambda *args: race.Blocks([next(blocks)], (1.0, 2.0)))
    (row,) = comparisons._compare(comparisons.Options("full", peers=("b",)), *args, starts=3)  # of all starts
    assert (row["speedup"], row["speedup_min"], row["speedup_max"]) == (4.0, 2.0, 9.0)
    with pytest.raises(RuntimeError):  # in the checks it is a failure
        list(comparisons._compare(comparisons.Options("smoke"), *args))


def test_a_worker_answers_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(cases, "made_here", lambda **args: (ran.append, {"init_s": args["init"]}), raising=False)
    said = [{"make": "benchmarks.cases:made_here", "args": {"init": 0.5}}, {"steps": 3}, {"memory": True}]
    out = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(line) + "\n" for line in said)), out)
    built, steps, memory = map(json.loads, out.getvalue().splitlines())
    assert ran == [1, 3] and built["init_s"] == 0.5 and built["first_step_s"] >= 0
    assert set(steps) == {"seconds"} and memory["memory_gb"] > 0.01


def test_a_row_replaces_the_same_measurement(tmp_path: Path) -> None:
    path = tmp_path / "made" / "search_step.jsonl"
    rows.keep(path, [ROW, {**ROW, "batch": 64}])
    rows.keep(path, [{**ROW, "speedup": 9.0}])
    assert [(row["batch"], row["speedup"]) for row in rows.read(path)] == [(32, 9.0), (64, 2.5)]


def test_smoke_rows_stay_out_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--scale", "smoke", "--out", str(rows.RESULTS)])
    assert ended.value.code == 2 and "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["nothing"])
    assert "allowed: depthwise, search_step" in capsys.readouterr().err


def test_growth_is_drawn_from_its_rows(tmp_path: Path) -> None:
    stages = {"seconds": 1.0, "seconds_min": 0.5, "seconds_max": 1.5, "trace_s": 0.1, "compile_s": 2.0}
    points = [
        {"axis": axis, "value": value, "memory_gb": 1.0, **stages}
        for axis in ("batch", "temperature")
        for value in (1.0, 2.0)
    ]
    for name in ("a", "b"):
        bench_growth.plot(points, tmp_path / f"{name}.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "<svg" in text  # the same rows, the same file


@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_synchronisations_of_a_cell_are_counted_for_its_real_terms(kind: str) -> None:
    """By hand: 5 edges of 2 terms; a term is one of four choices (BN once, 0 or 1 times by stride, none, void)."""
    space = Space(nodes=2, ops=("skip_connect", "dil_conv_3x3", "none"))
    weights = oracles.drawn(declare_edges(space, kind, 4))
    x, values, executed = jnp.zeros((2, 8, 8, 4)), jnp.ones((5, 2)), jnp.zeros((5, 2), jnp.int32)
    cell = partial(mixed_nodes, space=space, kind=kind, axis_name="data")
    traced = jax.make_jaxpr(cell, axis_env=[("data", 2)])(weights, values, executed, x, x)
    terms, strided = 10, {"normal": 0, "reduce": 8}[kind]  # terms whose identity is a FactorizedReduce with a BN
    mean = (terms + strided) / 4
    np.testing.assert_allclose(bench_scaling.synchronisations(traced.jaxpr).count, (0, mean, terms))


def test_without_torch_its_peers_are_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "has_torch", lambda: False)
    said: list[str] = []
    options = comparisons.Options("smoke", peers=("torch-default",), note=said.append)
    assert list(comparisons.search_step(options)) == []
    assert said == ["prdarts-3, batch 4: no torch, so no torch-default (requirements-bench.txt)"]
