"""The whole search: from the command line to the report, with the user's own code, and what its penalties do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import search_cases
from search_cases import EPOCH_STEPS, FLAGS, assert_same, digits, final_state, one_error, outcome, rows, words

import prdarts_jax
from prdarts_jax import cli, presets
from prdarts_jax.config import userfile
from prdarts_jax.errors import UserError
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import population
from prdarts_jax.space.genotype import Genotype

# A user's file with everything: nothing learns, the search stops after its second epoch with a cell of its own.
MINE = """
import jax, optax
from prdarts_jax.ops.primitives import Primitive
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.strategies.base import Stop
from prdarts_jax.strategies.darts import darts

PRIMITIVES = {"negate": Primitive("skip", lambda *_: {}, lambda p, x, s, leaves: -x[:, ::s, ::s])}
FOUND = Genotype([[("negate", 0), ("none", 1)]], [2], [[("negate", 1)]], [2])

def strategy(*, space, stop_after: int = 2, init_scale: float = 1e-3):
    def at_epoch(view):
        assert view.metrics["train_loss"] > 0
        return Stop(FOUND, "seen enough") if view.epoch + 1 == stop_after else None
    return darts(space=space, init_scale=init_scale)._replace(at_epoch=at_epoch)

def weights(config):
    assert config.batch_size == 8
    return optax.set_to_zero()

def arch(config):
    return optax.set_to_zero()
"""


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return search_cases.write_npz(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("penalised")


@pytest.fixture
def quick():
    with search_cases.shared_programs():
        yield


@pytest.fixture
def standard_promotion():
    with search_cases.standard_promotion():
        yield


def _without_method(command: list[str]) -> list[str]:
    return [word for word in command if not word.startswith("--method.")]


# The whole way


def test_from_the_command_line_to_the_report(npz, tmp_path, capsys, standard_promotion):
    """Nothing is replaced here: real diagrams and a real report."""
    workdir = tmp_path / "runs" / "w"
    assert cli.main(words(workdir, npz)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    genotype = Genotype.load(workdir)
    printed = [line for line in said.out.splitlines() if line.startswith("{")]
    assert [Genotype.from_json(line) for line in printed] == [genotype]
    for kind in ("normal", "reduce"):
        assert f"diagram: {workdir / 'plots' / f'genotype_{kind}.svg'}" in said.out
        assert (workdir / "plots" / f"genotype_{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert said.out.splitlines()[-1] == f"report: {workdir / 'report.html'}"
    page = (workdir / "report.html").read_text()
    assert "<svg" in page
    assert len(genotype.normal) == 1
    assert {op for op, _ in genotype.normal[0]} <= {"skip_connect", "sep_conv_3x3"}

    assert cli.main(["derive", str(workdir)]) == 0
    assert Genotype.from_json(capsys.readouterr().out) == genotype

    # A process that was killed, or a disk that was full, after the genotype: the next start makes the rest.
    diagrams = {path.name for path in (workdir / "plots").iterdir()}
    shutil.rmtree(workdir / "plots")
    (workdir / "report.html").unlink()
    (workdir / "plots").write_text("in the way")
    assert cli.main(words(workdir, npz)) == 0  # the search is finished all the same
    said = capsys.readouterr()
    assert said.err.startswith("prdarts: the search is finished, but not made: plots/genotype_normal.svg, ")
    assert said.err.count("\n") == 1
    assert "File exists" in said.err
    assert (workdir / "report.html").read_text() == page  # the rest is written
    (workdir / "plots").unlink()
    assert cli.main(words(workdir, npz)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {workdir / 'report.html'}"
    assert (workdir / "report.html").read_text() == page
    assert {path.name for path in (workdir / "plots").iterdir()} == diagrams


def test_the_default_workdir_and_progress_lines(npz, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    command = [word for word in words(Path("unused"), npz) if word not in ("--workdir", "unused")]
    assert cli.main([*command, "--seed", "3", "--progress", "lines"]) == 0
    assert (tmp_path / "runs" / "search-digits-seed3" / "genotype.json").is_file()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for field in ("loss ", "accuracy ", "tau 5.05", "skips ", "images/s ", "left"):
        assert field in lines[1]


# The user's own code


def test_everything_from_files(npz, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    command = _without_method(words(tmp_path / "w", npz))
    command = [word for word in command if not word.startswith("--space.ops")]
    command += ["--strategy", "mine.py:strategy", "--weight-tx", "mine.py:weights", "--arch-tx", "mine.py:arch"]
    command += ["--space.primitives", "mine.py", "--space.ops", "none,negate,skip_connect", "--method.init_scale=0.5"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "the strategy ends the search: seen enough" in said

    found = userfile.load("mine.py:FOUND", "test").value
    assert Genotype.load(tmp_path / "w") == found  # what the strategy says, not what it derives
    assert len(rows(tmp_path / "w", "epoch")) == 2
    assert [row["step"] for row in rows(tmp_path / "w", "final")] == [2 * EPOCH_STEPS]
    first, second = [json.loads(line) for line in Path("w/probabilities.jsonl").read_text().splitlines()]
    assert first["normal"] == second["normal"]  # the architecture transform does nothing
    spread = np.std(np.log(np.array(first["normal"])))
    assert 0.1 < spread < 2  # softmax of 0.5 N(0,1), not of 0.001 N(0,1)
    assert np.asarray(first["normal"]).sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    state = final_state(tmp_path / "w").state
    assert int(state.step) == 2 * EPOCH_STEPS

    # Killed after its last checkpoint: what the strategy decided is not asked for again.
    before = outcome(tmp_path / "w")
    Path("w/genotype.json").unlink()
    assert cli.main(command) == 0
    assert_same(outcome(tmp_path / "w"), before)

    # Resume compares the source, not the place.
    Path("w/genotype.json").unlink()
    Path("elsewhere").mkdir()
    shutil.copy("mine.py", "elsewhere/mine.py")
    moved = [word.replace("mine.py", "elsewhere/mine.py") for word in command]
    assert cli.main(moved) == 0
    assert_same(outcome(tmp_path / "w"), before)
    Path("elsewhere/mine.py").write_text(MINE + "\n# edited\n")
    kept = search_cases.snapshot(tmp_path / "w")
    said = one_error(capsys, moved, 2, "holds another search")
    for field in ("method.strategy", "weights.transform", "arch.transform", "space.primitives"):
        assert f"digest of {field}: " in said
    assert search_cases.snapshot(tmp_path / "w") == kept


def test_everything_as_arguments(tmp_path, quick):
    """The same objects given to `prdarts_jax.search`; what does not move is the initial state, bit for bit."""
    calls = []

    def weight_tx(config):
        calls.append(config)
        return optax.set_to_zero()

    def strategy(*, space):
        from prdarts_jax.strategies.darts import darts

        return darts(space=space, init_scale=0.5)

    config = search_cases.config(epochs=1)
    given = {"weight_tx": weight_tx, "arch_tx": optax.set_to_zero(), "strategy": strategy, "data": digits()}
    result = prdarts_jax.search(config, tmp_path / "w", **given)
    assert result.status == "finished"
    assert [seen.weights for seen in calls] == [config.weights]  # the config, with its method named after the argument
    assert calls[0].method.strategy == "argument:strategy"
    assert result.genotype == Genotype.load(tmp_path / "w")
    assert result.metrics["train_loss"] == rows(tmp_path / "w", "final")[0]["train_loss"]
    digests = json.loads((tmp_path / "w" / "config.json").read_text())["digests"]
    assert {"data", "method.strategy", "weights.transform", "arch.transform"} == digests.keys()
    assert digests["data"] == digits().digest

    # Resumed with the config's own parts in their place: another search.
    with pytest.raises(UserError, match=r"digest of method\.strategy"):
        prdarts_jax.search(config, tmp_path / "w", data=digits())
    inputs = search_inputs.prepare(config, **given)
    assert [float(x) for x in jax.tree.leaves(inputs.problem.weight_tx.update({"w": 3.0}, ()))] == [0.0]


def test_a_workdir_is_made_only_for_a_search_that_can_start(tmp_path):
    with pytest.raises(UserError, match=r"weights\.transform: got a int"):
        prdarts_jax.search(search_cases.config(), tmp_path / "w", weight_tx=lambda config: 5, data=digits())
    with pytest.raises(UserError, match=r"method\.strategy: "):
        prdarts_jax.search(search_cases.config(), tmp_path / "w", strategy=lambda *, space: 5, data=digits())
    assert not (tmp_path / "w").exists()


# What the penalties do (sections 4.1 and 4.2 of the paper), at the same final temperature and from the same seed


def _path_convolutions(workdir: Path) -> float:
    """Mean P of the convolutions on the path edges, both cell types, after the last epoch."""
    document = json.loads((workdir / "config.json").read_text())
    last = json.loads((workdir / "probabilities.jsonl").read_text().splitlines()[-1])
    path = [i for i, (source, node) in enumerate(document["edges"]) if source == node - 1]
    convolutions = [i for i, op in enumerate(document["ops"]) if "conv" in op]
    return float(np.mean([np.array(last[kind])[np.ix_(path, convolutions)] for kind in ("normal", "reduce")]))


@pytest.fixture
def penalised(folder, quick):
    """A search with other coefficients, tau from 1: members of a population, which compiles once."""
    workdir = folder / "w"
    sweep = {"lambda1": [0.01, 10.0], "lambda3": [0.0, 1.0]}

    def run(*, lambda1: float = 0.01, lambda3: float = 0.0) -> Path:
        if not workdir.exists():
            options = {"tau_max": 1.0, "lambda1": 0.01, "lambda3": 0.0}
            flags = {f"method__options__{name}": value for name, value in options.items()}
            config = search_cases.config(epochs=6, arch__learning_rate=0.02, **flags)
            assert population.search_population(config, workdir, sweep, data=digits()).status == "finished"
        member = workdir / f"lambda1={lambda1},lambda3={lambda3}"
        assert rows(member, "epoch")[-1]["progress/tau"] == pytest.approx(0.1)
        return member

    return run


@pytest.mark.slow
def test_the_skip_penalty_lowers_the_skips(penalised):
    low, high = (rows(workdir, "epoch")[-1]["mean_p/skip"] for workdir in (penalised(), penalised(lambda1=10.0)))
    assert high < low - 0.05


def test_the_path_term_raises_the_convolutions_on_the_path(penalised):
    low, high = _path_convolutions(penalised()), _path_convolutions(penalised(lambda3=1.0))
    assert high > low + 0.05


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ('Stop(FOUND, "seen enough") if', '"enough" if', "at_epoch gives a str; allowed: None | Continue | Stop | "),
        ('assert view.metrics["train_loss"] > 0', 'view.metrics["no such"]', "KeyError: 'no such'"),
    ],
)
def test_a_mistake_in_at_epoch_is_one_line(npz, tmp_path, capsys, quick, written, instead, said):
    assert written in MINE
    (tmp_path / "mine.py").write_text(MINE.replace(written, instead))
    command = [*_without_method(words(tmp_path / "w", npz)), "--strategy", f"{tmp_path}/mine.py:strategy"]
    search_cases.one_error(capsys, command, 2, "method.strategy: ", said)


# The preset


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_digits_are_learned(tmp_path, standard_promotion):
    config = presets.resolve("digits", flags={"run.devices": "1", "run.progress": "off"}).config
    result = prdarts_jax.search(config, tmp_path / "w")
    assert result.status == "finished"
    assert result.metrics["val_accuracy"] >= 0.75  # with sampled gates; chance is 0.10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("option", "low", "high"), [("lambda1", 0.01, 10.0), ("lambda3", 0.0, 1.0)])
def test_penalties_on_digits(tmp_path, standard_promotion, option, low, high):
    """The claim at the preset's scale: all operations, four nodes."""
    found = {}
    for value in (low, high):
        flags = {"run.devices": "1", "run.progress": "off", "epochs": 10, "method.options.tau_max": 1.0}
        config = presets.resolve("digits", flags={**flags, f"method.options.{option}": value}).config
        workdir = tmp_path / str(value)
        assert prdarts_jax.search(config, workdir).status == "finished"
        skips = rows(workdir, "epoch")[-1]["mean_p/skip"]
        found[value] = skips if option == "lambda1" else _path_convolutions(workdir)
    assert found[high] < found[low] if option == "lambda1" else found[high] > found[low]


def test_the_tiny_search_is_the_preset_made_small():
    """The tests above speak for the presets: the same strategy, optimizers and augmentation."""
    tiny, preset = search_cases.config(), presets.resolve("digits").config
    assert tiny.weights == preset.weights
    assert tiny.data == preset.data
    assert tiny.method.strategy == preset.method.strategy == "prdarts"
    changed = {name for name in FLAGS if name.startswith("method.")}
    assert changed == {"method.options.executed_ops"}
