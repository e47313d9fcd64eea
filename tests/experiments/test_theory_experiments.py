"""The experiments on the paper's claims: what is kept and made of rows, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import search_cases
from scipy import stats

from experiments import (
    fig2_skip_convergence,
    frame,
    paper,
    path_term,
    search_dynamics,
    section3,
    theorem1_rate,
    theorem2_gates,
    theorem4_depth,
)
from prdarts_jax import theory
from prdarts_jax.errors import UserError
from prdarts_jax.space import Space
from prdarts_jax.space.genotype import Genotype

EXPERIMENTS = {experiment.name: experiment for experiment in paper.experiments()}
every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


def _toy(measured: list[int], units: tuple[int, ...] = (1, 2, 3)) -> frame.Experiment:
    def measure(unit: frame.Unit) -> dict[str, int]:
        measured.append(unit["n"])
        if unit["n"] == 2 and len(measured) == 2:
            raise KeyboardInterrupt
        return {"square": unit["n"] ** 2}

    return frame.Experiment(
        name="toy",
        title="A toy",
        claim="squares grow.",
        units=lambda scale: [{"n": n} for n in units],
        measure=measure,
        findings=lambda rows: [f"the last is {rows[-1]['square']}"],
    )


def test_a_stopped_experiment_goes_on_and_stale_rows_are_left_out(tmp_path: Path) -> None:
    measured: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        frame.complete(_toy(measured), "cpu", tmp_path, lambda line: None)
    assert frame.rows(_toy(measured), "cpu", tmp_path) == [{"n": 1, "square": 1}]
    text = "\n".join(frame.section(_toy(measured), "cpu", frame.rows(_toy(measured), "cpu", tmp_path)))
    assert "**1 of its 3 units so far**" in text and "the last is 1" in text
    frame.complete(_toy(measured), "cpu", tmp_path, lambda line: None)
    assert measured == [1, 2, 2, 3]
    fewer = _toy(measured, units=(3, 1))
    assert [row["n"] for row in frame.rows(fewer, "cpu", tmp_path)] == [3, 1]
    records = frame.read(tmp_path / "toy.jsonl")
    assert all({"commit", "device", "jax", "seconds", "cpu_seconds"} <= set(record) for record in records)


def test_a_file_that_holds_no_rows_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.jsonl").write_text('{"unit": {"n": 1}, "measured": {"square": 1}}\n{"unit": 3}\n')
    with pytest.raises(UserError, match=r"toy\.jsonl, line 2: no row of an experiment"):
        frame.read(tmp_path / "toy.jsonl")
    assert frame.main(_toy([]), "doc", ["--scale", "cpu", "--folder", str(tmp_path)]) == 2
    assert "toy: error: " in capsys.readouterr().err


def test_statistics_are_those_of_scipy() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    mean, half = frame.interval(x)
    np.testing.assert_allclose(
        (mean - half, mean + half), stats.t.interval(0.95, 11, x.mean(), stats.sem(x)), rtol=1e-12
    )
    np.testing.assert_allclose(frame.rank_correlation(x, y), stats.spearmanr(x, y).statistic, atol=1e-9)
    assert frame.spread([1.0]) == "1.000 (one value)"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_the_generated_one() -> None:
    """`python -m experiments.paper --write` makes it anew from the rows and the notes."""
    assert (paper.DOCS / "results.md").read_text(encoding="utf-8") == paper.page()


@every_experiment
def test_pictures_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    _, rows = paper.largest(experiment, frame.RESULTS, ("cpu", "paper"))
    if experiment.picture is None or not rows:
        return
    committed = paper.DOCS / "pictures" / f"{name}.svg"
    assert committed.stat().st_size < 150_000
    frame.draw(experiment, rows, tmp_path / "new.svg")
    assert (tmp_path / "new.svg").read_bytes() == committed.read_bytes()


@every_experiment
def test_units_say_what_they_are(name: str) -> None:
    """JSON that comes back as it was, none twice, and at least five seeds of the theory, three of the rest."""
    for scale in frame.SCALES:
        units = EXPERIMENTS[name].units(scale)
        texts = [json.dumps(unit, sort_keys=True) for unit in units]
        assert units and len(set(texts)) == len(texts)
        assert [json.loads(text) for text in texts] == [dict(unit) for unit in units]
    seeds = {unit["seed"] for unit in EXPERIMENTS[name].units("cpu") if "seed" in unit}
    assert not seeds or len(seeds) >= (5 if name.startswith("theorem") else 3)


@pytest.mark.slow
@every_experiment
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command measures, prints its section, and does nothing when it is called again."""
    monkeypatch.chdir(tmp_path)
    experiment = EXPERIMENTS[name]
    with search_cases.standard_promotion():
        assert frame.main(experiment, "doc", ["--scale", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert f"### {experiment.title}" in printed and "units so far" not in printed
    file = tmp_path / "runs" / "experiments" / f"{name}.jsonl"
    before = file.read_bytes()
    for record in frame.read(file):
        numbers = [v for v in json.dumps(record["measured"]).split() if v.strip("[]{},") in ("NaN", "Infinity")]
        assert not numbers, record
    assert frame.main(experiment, "doc", ["--scale", "smoke"]) == 0
    assert file.read_bytes() == before
    assert (file.with_suffix(".svg")).is_file() == (experiment.picture is not None)


@pytest.mark.slow
def test_the_page_of_a_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every claim that is asked for is measured, and the page and its pictures lie in the current folder."""
    monkeypatch.chdir(tmp_path)
    with search_cases.standard_promotion():
        assert paper.main(["--scale", "smoke", "--only", "theorem3_gates", "--only", "table2_imagenet"]) == 0
    folder = tmp_path / "runs" / "experiments"
    page = (folder / "results.md").read_text()
    assert page.count("Not measured yet (") == len(paper.NAMES) - 2
    assert page.count("Measured at scale `smoke`") == 2 and "pictures/theorem3_gates.svg" in page
    assert [path.name for path in (folder / "pictures").iterdir()] == ["theorem3_gates.svg"]
    with pytest.raises(SystemExit) as stop:
        paper.main(["--only", "theorem5"])
    assert stop.value.code == 2


# --- what they compute ------------------------------------------------------------------------------------------------


def test_rates_of_known_curves() -> None:
    """A residual that shrinks by 0.9 a step; one that slows down; one that reaches the floor of rounding."""
    steps = np.arange(101.0)
    two = (0.5 * 0.8**steps + 0.5 * 0.98**steps) ** 2
    floor = np.maximum(0.5 ** (2 * steps), 1e-26)
    found = section3.rates(np.stack([0.9 ** (2 * steps), two, floor]))
    np.testing.assert_allclose(found.middle[[0, 2]], [0.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.late, [0.1, 0.02, 0.5], rtol=1e-4)
    assert found.middle[1] > found.late[1]
    np.testing.assert_allclose(found.worst[[0, 2]], [1 - 0.81, 1 - 0.25], rtol=1e-6)


def test_gates_have_their_laws() -> None:
    rng = np.random.default_rng(0)
    simplex, independent = section3.simplex_gates(rng, 500, 3), section3.independent_gates(rng, 500, 3)
    assert simplex.shape == independent.shape == (500, 3, 3)
    np.testing.assert_allclose(simplex.sum(axis=2), 1.0)
    assert abs(simplex.mean() - 1 / 3) < 1e-9 and abs(independent.mean() - 0.5) < 0.02


def test_groups_are_those_of_the_theorem() -> None:
    """The theorem's sum depends on what the groups name, and on nothing else."""
    nodes = 4
    with jax.enable_x64(True):
        depends = np.asarray(jax.grad(theory.rate_sum)(jnp.full((6, 3), 0.5), nodes)) != 0
    named = ("skip before the last node", "convolution into the last node")
    for e, edge in enumerate(theory.edges(nodes)):
        for column in range(3):
            assert depends[e, column] == (theorem1_rate.group(edge, column, nodes) in named)


def test_gauss_newton_fits_every_sample() -> None:
    unit = {"seed": 0, "nodes": 3, "width": 6, "channels": 2, "positions": 3, "kernel": 3}
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y = section3.samples(rng, 3, unit), jnp.asarray(rng.normal(size=3))
        np.testing.assert_allclose(jnp.sum(x**2, axis=(1, 2)), 1.0)
        start, gates = section3.weights(unit), jnp.asarray(section3.independent_gates(rng, 1, 3)[0])
        solve = oracles.quick_jit(lambda g: theorem2_gates.interpolate(start, g, x, y, sigma=jnp.tanh, roots=(0,)))
        fitted, left = solve(gates)
        assert float(left) < theorem2_gates.TOLERANCE
        u = oracles.quick_jit(jax.vmap(lambda one: theory.output(fitted, gates, one, sigma=jnp.tanh)))(x)
        np.testing.assert_allclose(u, y, atol=1e-6)


def test_both_cells_share_what_both_have() -> None:
    """With the gates between the halves at 0, the deep cell's first half is the shallow cell's first branch."""
    unit = {"seed": 1, "nodes": 4, "width": 3, "channels": 2, "positions": 3, "kernel": 3}
    assert theorem4_depth.shared_edges(6) == [0, 1, 2, 9, 13, 14]
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x = section3.samples(rng, 1, unit)[0]
        deep, two = theorem4_depth.starts(unit)
        gates = jnp.asarray(section3.independent_gates(rng, 1, 4)[0])
        common = np.array(theorem4_depth.shared_edges(4))
        a = oracles.quick_jit(lambda: theory.node_values(deep, gates, x, sigma=jnp.tanh))()
        b = oracles.quick_jit(lambda: theory.node_values(two, gates[common], x, sigma=jnp.tanh, roots=(0, 2)))()
        np.testing.assert_allclose(a[:2], b[:2], rtol=1e-12)
        assert float(jnp.abs(a[2:] - b[2:]).max()) > 1e-3
        np.testing.assert_array_equal(deep.heads, two.heads)


def test_counts_of_the_tables_are_those_of_the_original_programs() -> None:
    """The rows that the tables are made of against the golden counts, as far as there are any."""
    golden = json.loads((Path(__file__).parents[1] / "golden_genotypes.json").read_text(encoding="utf-8"))
    tables = {"cifar10": "table1_cifar", "cifar100": "table1_cifar", "imagenet": "table2_imagenet"}
    compared = 0
    for data, name in tables.items():
        counted = [row for row in frame.rows(EXPERIMENTS[name], "cpu") if row["what"] == "counts"]
        rows = {row["cell"]: row for row in counted if row.get("data", data) == data}
        for cell, counts in golden.items():
            for what in ("params", "macs"):
                if (count := counts.get(f"{data}_{what}")) is not None:
                    assert rows[cell][what] == count
                    compared += 1
    assert compared >= 13


def test_replaced_operations_of_figure_2() -> None:
    published = Genotype.named("PRDARTS")
    for number in fig2_skip_convergence.REPLACED:
        found = fig2_skip_convergence.replaced(number, 1)
        for kind in ("normal", "reduce"):
            pairs = [pair for node in found.cell(kind)[0] for pair in node]
            assert [op for op, _ in pairs].count("skip_connect") == number
            assert {op for op, _ in pairs} <= {"skip_connect", "sep_conv_3x3"}
            assert [source for _, source in pairs] == [j for node in published.cell(kind)[0] for _, j in node]
    assert fig2_skip_convergence.replaced(3, 0) != fig2_skip_convergence.replaced(3, 1)


def test_the_path_term_of_the_ablation_by_loops() -> None:
    """DARTS' loss minus lambda3 times eq. 8 of the softmax weights, mean of the cell types."""
    space = Space()
    strategy = path_term.darts_with_path(space=space, lambda3=0.5)
    rng = np.random.default_rng(0)
    arch = {kind: jnp.asarray(rng.normal(size=(14, 8)), jnp.float32) for kind in ("normal", "reduce")}
    gates = strategy.sample(jax.random.key(0), arch, (), {}, "arch")
    value, terms = strategy.objective(jnp.float32(2.0), arch, gates, (), {})
    expected = 0.0
    for table in arch.values():
        p = np.exp(np.asarray(table, np.float64))
        p /= p.sum(axis=1, keepdims=True)
        product = 1.0
        for edge in ((1, 2), (2, 3), (3, 4), (4, 5)):
            product *= sum(p[space.edges.index(edge), space.ops.index(op)] for op in space.ops if "conv_" in op)
        expected += product / 2
    assert float(value) == pytest.approx(2.0 - 0.5 * expected, rel=1e-5)
    assert float(terms["path"]) == pytest.approx(-0.5 * expected, rel=1e-5)


def test_penalties_are_inert_below_a_hundredth_of_the_loss_gradient() -> None:
    log = {"cross_entropy": [1.0, 1.0, 1.0, 1.0], "skip": [0.0, 0.02, 0.0, 0.0], "path": [0.001, 0.0, 0.5, 0.009]}
    assert search_dynamics.inert({"log": log}) == 50.0
