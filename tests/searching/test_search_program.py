"""The compiled programs and the rows they leave: one compilation, checkpoints in time, means, evaluation, batches."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest
import search_cases
from search_cases import BATCH, EPOCH_STEPS, EPOCHS, FLAGS, IMAGES, TOTAL, digits, final_state, rows, search

from prdarts_jax import presets
from prdarts_jax.config import schema
from prdarts_jax.data.augment import normalize
from prdarts_jax.data.batches import epoch_order, held_out_digest, hold_out, padded_batches, split_indices
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import program as search_program
from prdarts_jax.searching.program import Images
from prdarts_jax.space import supernet


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("program")


@pytest.fixture
def finished(folder):
    workdir = folder / "w"
    if not workdir.exists():
        assert search(workdir, evaluate_every=2).status == "finished"
    return workdir


@pytest.fixture
def dispatches(monkeypatch):
    """Every call of the compiled program: its count of steps, its batches, and the program."""
    seen, make = [], search_program.make_dispatch

    def spying(problem, mesh):
        program = make(problem, mesh)

        def spy(carry, count, fresh, orders, positions, *rest):
            seen.append((int(count), bool(fresh), jax.tree.map(np.asarray, orders), program))
            return program(carry, count, fresh, orders, positions, *rest)

        return spy

    monkeypatch.setattr(search_program, "make_dispatch", spying)
    return seen


def test_a_search_compiles_its_step_once(tmp_path, monkeypatch, dispatches):
    """Temperature, learning rates and coefficients change every epoch; the length of a dispatch in every epoch."""
    monkeypatch.setattr(search_inputs, "prepare", search_inputs.prepare.__wrapped__)  # a program of its own
    assert search(tmp_path / "w").status == "finished"
    assert [count for count, *_ in dispatches] == [3, 3, 1] * EPOCHS
    assert [fresh for _, fresh, *_ in dispatches] == [True, False, False] * EPOCHS
    taus = [row["progress/tau"] for row in rows(tmp_path / "w", "epoch")]
    rates = [row["progress/weight_learning_rate"] for row in rows(tmp_path / "w", "epoch")]
    # lr_e = min + (max - min)/2 (1 + cos(pi e/E)): 0.001 + 0.012 (1 + cos(pi e/E)) with the published numbers.
    expected = [0.001 + 0.012 * (1 + np.cos(np.pi * epoch / EPOCHS)) for epoch in range(EPOCHS)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert taus == pytest.approx([10.0, 5.05, 0.1])
    assert len(set(rates)) == EPOCHS
    programs = {id(program): program for *_, program in dispatches}
    assert len(programs) == 1
    assert next(iter(programs.values()))._cache_size() == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_depend_on_seed_epoch_and_step_alone(tmp_path, dispatches, seed):
    epochs = 2
    search(tmp_path / "a", seed=seed, epochs=epochs)
    first, dispatches[:] = list(dispatches), []
    search(tmp_path / "b", seed=seed, epochs=epochs, run__steps_per_dispatch=10)
    assert len(first) == 3 * epochs
    assert len(dispatches) == epochs
    for kind in (0, 1):
        found = [
            np.concatenate([orders[kind][:count] for count, _, orders, _ in calls]) for calls in (first, dispatches)
        ]
        half = split_indices(IMAGES, seed)[kind]
        name = ("train", "val")[kind]
        expected = [epoch_order(half, BATCH, seed, epoch, name) for epoch in range(epochs)]
        for order in found:
            np.testing.assert_array_equal(order, np.concatenate(expected))
        assert sorted(expected[0].ravel()) == sorted(expected[1].ravel()) == sorted(half)  # the whole half, anew
        assert (expected[0] != expected[1]).any()
    train, val = (np.concatenate([orders[kind] for _, _, orders, _ in dispatches]) for kind in (0, 1))
    assert not np.intersect1d(train, val).size


# Checkpoints


def _saved(monkeypatch):
    steps, save = [], Checkpointer.save
    monkeypatch.setattr(
        Checkpointer, "save", lambda self, step, *rest: (steps.append(step), save(self, step, *rest))[1]
    )
    return steps


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [7, 14, 21]),
        ({"run__checkpoint_every": 2}, [14, 21]),
        ({"run__checkpoint_every": 9}, [21]),
        ({"run__checkpoint_every": 9, "run__checkpoint_minutes": 1e-9}, [3, 6, 7, 10, 13, 14, 17, 20, 21]),
        ({"run__checkpoint_every": 2, "run__checkpoint_minutes": 0}, [14, 21]),
    ],
)
def test_checkpoints_fall_due(tmp_path, monkeypatch, flags, expected):
    steps = _saved(monkeypatch)
    search(tmp_path / "w", **flags)
    assert steps == expected
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps() == expected[-2:]


# Rows


def test_rows_and_their_fields(finished):
    steps, epochs = rows(finished, "step"), rows(finished, "epoch")
    (final,) = rows(finished, "final")
    assert [row["step"] for row in steps] == list(range(1, TOTAL + 1))
    assert [row["epoch"] for row in steps] == [i // EPOCH_STEPS for i in range(TOTAL)]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(e, (e + 1) * EPOCH_STEPS) for e in range(EPOCHS)]
    assert (final["epoch"], final["step"]) == (EPOCHS - 1, TOTAL)

    measured = {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    measured |= {f"gates/{name}" for name in ("saturated", "saturated_executed", "edges_without_gradient")}
    measured |= {f"penalty/{term}" for term in ("skip", "nonskip", "path", "total")}
    measured |= {f"gradient_norm/{part}" for part in ("weights", "cross_entropy", "skip", "nonskip", "path")}
    measured |= {"update_norm/weights", "update_norm/arch"}
    assert set(steps[0]) == {"kind", "epoch", "step"} | measured
    derived = {f"{kind}_{what}" for kind in ("normal", "reduce") for what in ("skips", "depth")}
    derived |= {f"mean_p/{group}" for group in ("none", "skip", "conv")}  # this space has no pools
    derived |= {f"progress/{name}" for name in ("tau", "lambda1", "lambda2", "lambda3", "gate_dropout")}
    derived |= {"progress/weight_learning_rate", "progress/arch_learning_rate"}
    machine = {"time_epoch_s", "images_per_s", "memory_peak_gb"}
    assert set(epochs[0]) == {"kind", "epoch", "step"} | measured | derived | machine
    assert set(final) - set(epochs[-1]) == {"time_search_s"}
    assert {k: v for k, v in final.items() if k in derived} == {k: epochs[-1][k] for k in derived}


def test_an_epoch_is_the_mean_of_its_steps(finished):
    steps = rows(finished, "step")
    for row in rows(finished, "epoch"):
        own = [step for step in steps if step["epoch"] == row["epoch"]]
        for name in own[0].keys() - {"kind", "epoch", "step"}:
            assert row[name] == pytest.approx(np.mean([step[name] for step in own]), rel=1e-5, abs=1e-7), name


def test_penalties_add_up_and_have_their_coefficients(finished):
    for row in rows(finished, "step"):
        parts = sum(row[f"penalty/{term}"] for term in ("skip", "nonskip", "path"))
        assert row["penalty/total"] == pytest.approx(parts, abs=1e-6)
        assert 0 < row["penalty/skip"] <= 0.01
        assert 0 < row["penalty/nonskip"] <= 0.005
        assert -0.005 <= row["penalty/path"] < 0  # a path edge has one convolution here, so the product is at most 1


def test_the_epochs_are_documented(finished):
    probabilities = [json.loads(line) for line in (finished / "probabilities.jsonl").read_text().splitlines()]
    genotypes = [json.loads(line) for line in (finished / "genotypes.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in probabilities] == [row["epoch"] for row in genotypes] == list(range(EPOCHS))
    assert genotypes[-1]["genotype"] == json.loads((finished / "genotype.json").read_text())
    for row, p in zip(rows(finished, "epoch"), probabilities, strict=True):
        both = np.concatenate([p["normal"], p["reduce"]])
        assert both.shape == (2 * 2, 3)
        assert row["mean_p/skip"] == pytest.approx(both[:, 1].mean(), abs=1e-6)
        assert row["mean_p/conv"] == pytest.approx(both[:, 2].mean(), abs=1e-6)
    document = json.loads((finished / "config.json").read_text())
    assert document["kind"] == "search"
    assert document["config"]["space"]["cells"] == FLAGS["space.cells"]
    assert {"python", "jax", "jaxlib", "optax"} <= document["versions"].keys()
    assert document["devices"] == ["cpu:0 (cpu)"]


# Evaluation


def _by_hand(inputs, state, tau, order, counted):
    """Loss and accuracy of the images under the mask, a batch at a time, with the reference network."""
    problem, data = inputs.problem, digits()
    gates = problem.strategy.sample(jax.random.key(0), state.arch, (), {"tau": np.float32(tau)}, "eval")
    forward = jax.jit(lambda images: supernet.apply_reference(state.weights, gates, images, space=problem.space)[0])
    losses, right = [], []
    for index, mask in zip(order, counted, strict=True):
        images = normalize(data.train_images[index], problem.mean, problem.std, problem.dtype)
        logits, labels = np.asarray(forward(images)), data.train_labels[index]
        losses += list(np.asarray(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))[mask])
        right += list((logits.argmax(1) == labels)[mask])
    return np.mean(losses), np.mean(right)


def test_evaluations_fall_due_and_are_right(finished):
    epochs = rows(finished, "epoch")
    assert ["eval_loss" in row for row in epochs] == [False, True, True]  # every second, and the last
    val = split_indices(IMAGES, 0)[1].reshape(EPOCH_STEPS, BATCH)
    inputs = search_inputs.prepare(search_cases.config(), data=digits())
    everything = np.ones(val.shape, bool)
    loss, accuracy = _by_hand(inputs, final_state(finished).state, epochs[-1]["progress/tau"], val, everything)
    assert epochs[-1]["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert epochs[-1]["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_an_evaluation_counts_every_image_once(finished):
    """A set that does not fill its last batch: the images that fill it up pass through, and are not counted."""
    inputs = search_inputs.prepare(search_cases.config(), data=digits())
    order, mask = padded_batches(EPOCH_STEPS * BATCH - 5, BATCH)
    assert mask.sum() == EPOCH_STEPS * BATCH - 5
    state = final_state(finished).state
    program = search_program.make_evaluation(inputs.problem, inputs.mesh)
    data = Images(digits().train_images, digits().train_labels)
    progress = {name: np.float32(v) for name, v in inputs.problem.strategy.schedule(2, EPOCHS).items()}
    found = program(state, order, mask, progress, data)
    expected = _by_hand(inputs, state, progress["tau"], order, mask)
    assert [float(value) for value in found] == pytest.approx(expected, rel=1e-4)


def test_a_subset_of_the_images_keeps_the_split():
    config = presets.resolve("digits").config
    weights, arch = search_inputs.halves(config, 1437)
    assert len(weights) == len(arch) == 718 and not set(weights) & set(arch)
    few = schema.replace(config, {"data.examples": 101})
    small, other = search_inputs.halves(few, 1437)
    np.testing.assert_array_equal(small, weights[:50])
    np.testing.assert_array_equal(other, arch[:50])
    many = schema.replace(config, {"data.examples": 5000})
    np.testing.assert_array_equal(search_inputs.halves(many, 1437)[0], weights)


def test_neither_part_has_what_is_held_out():
    """Searches of all seeds leave out the same images; the parts share what remains."""
    config = schema.replace(presets.resolve("digits").config, {"data.holdout": 0.2, "data.split": "0.75,0.25"})
    kept, held = hold_out(1437, 0.2, seed=0)
    assert len(held) == 287
    for seed in (0, 1):
        weights, arch = search_inputs.halves(schema.replace(config, {"seed": seed}), 1437)
        assert (len(weights), len(arch)) == (862, 287) and not set(weights) & set(arch)
        assert not {*weights.tolist(), *arch.tolist()} & set(held.tolist())
    few = schema.replace(config, {"data.examples": 100})
    assert [len(part) for part in search_inputs.halves(few, 1437)] == [75, 25]
    shared = schema.replace(config, {"data.split": "shared"})
    weights, arch = search_inputs.halves(shared, 1437)
    assert sorted(weights.tolist()) == sorted(arch.tolist()) == kept.tolist()
    assert [len(part) for part in search_inputs.halves(schema.replace(few, {"data.split": "shared"}), 1437)] == [
        100
    ] * 2


def test_an_epoch_is_a_pass_over_the_share_of_the_weights(tmp_path, dispatches):
    """The part of the architecture, a third as large, goes on from pass to pass; its choice is kept with the data."""
    search(tmp_path / "w", data__split="0.6,0.2", data__holdout=12, epochs=2)
    train, val = (np.concatenate([orders[i][:count] for count, _, orders, _ in dispatches]) for i in (0, 1))
    kept, _ = hold_out(IMAGES, 12, seed=0)
    parts = [kept[part] for part in split_indices(len(kept), 0, shares=(0.6, 0.2))]
    assert [len(part) // BATCH for part in parts] == [7, 2]
    for found, part, purpose, passes in ((train, parts[0], "train", 2), (val, parts[1], "val", 7)):
        expected = [epoch_order(part, BATCH, 0, one, purpose) for one in range(passes)]
        np.testing.assert_array_equal(found, np.concatenate(expected))
    document = json.loads((tmp_path / "w" / "config.json").read_text())
    assert document["digests"]["data.holdout"] == held_out_digest(IMAGES, 12, 0)["data.holdout"]
