"""One tiny training that the tests of the whole program share, so that it is compiled once, and what it left behind."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prdarts_jax.config import schema
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data.sources import Dataset, from_arrays, load
from prdarts_jax.presets import train as train_presets
from prdarts_jax.report import page as report_page
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.digests import host_leaves
from prdarts_jax.run.metrics import comparable, read
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import loop as train_loop
from prdarts_jax.training import program as train_program
from prdarts_jax.training.loop import TrainResult
from prdarts_jax.training.program import TrainCarry

IMAGES, TEST, BATCH, EPOCHS = 112, 37, 16, 3
EPOCH_STEPS = IMAGES // BATCH  # 7, a prime: dispatches of 3 leave a remainder
TOTAL = EPOCHS * EPOCH_STEPS
GENOTYPE = Genotype(
    [[("sep_conv_3x3", 0), ("skip_connect", 1)]], [2], [[("max_pool_3x3", 0), ("avg_pool_3x3", 1)]], [2]
)
FLAGS: Mapping[str, Any] = {
    "data.source": "digits",
    "network.cells": 3,
    "network.channels": 4,
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "drop_path": 0.3,
    "label_smoothing": 0.1,
    "ema": 0.8,
    "run.devices": "1",
    "run.progress": "off",
    "run.steps_per_dispatch": 3,
    "run.log_every": 1,
}


@functools.cache
def digits() -> Dataset:
    """Enough digits for an epoch of seven steps, and test images that do not fill their last batch."""
    full = load("digits")
    return from_arrays(
        "digits",
        full.train_images[:IMAGES],
        full.train_labels[:IMAGES],
        test_images=full.test_images[:TEST],
        test_labels=full.test_labels[:TEST],
    )


def write_npz(path: Path, data: Dataset | None = None) -> Path:
    data = digits() if data is None else data
    arrays = {"images": data.train_images, "labels": data.train_labels}
    if len(data.test_images):
        arrays |= {"test_images": data.test_images, "test_labels": data.test_labels}
    np.savez(path, **arrays)
    return path


def write_genotype(path: Path) -> Path:
    path.write_text(GENOTYPE.to_json())
    return path


def _dotted(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {**FLAGS, **{name.replace("__", "."): value for name, value in flags.items()}}


def config(**flags: Any) -> TrainConfig:
    """The tiny training with other values; `__` in a name stands for a dot."""
    return train_presets.resolve("digits", _dotted(flags)).config


def words(workdir: Path, npz: Path, **flags: Any) -> list[str]:
    """The command line of the tiny training, on files beside `npz`."""
    genotype = write_genotype(npz.parent / "genotype.json")
    values = {**_dotted(flags), "data.source": f"npz:{npz}"}
    command = ["train", "--genotype", str(genotype), "--preset", "digits", "--workdir", str(workdir)]
    return command + [f"--{path}={value}" for path, value in values.items()]


def train(workdir: Path, *, given: Mapping[str, Any] | None = None, **flags: Any) -> TrainResult:
    return train_loop.train(config(**flags), GENOTYPE, workdir, **{"data": digits(), **(given or {})})


def final_state(workdir: Path) -> TrainCarry:
    """The newest checkpoint, restored and verified."""
    config_ = schema.from_dict(TrainConfig, json.loads((workdir / "config.json").read_text())["config"])
    inputs = train_inputs.prepare(config_, GENOTYPE, data=digits())
    image = digits().train_images.shape[1:]
    target = train_program.abstract_carry(inputs.problem, inputs.mesh, jax.random.key(0), image)
    with Checkpointer(workdir / "checkpoints") as saved:
        found = saved.restore_latest(target)
    assert found is not None
    return found.state


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit, however a training came to its end."""
    leaves = host_leaves(final_state(workdir))
    return {
        "genotype": Genotype.load(workdir / "genotype.json"),
        "network": (workdir / "network.safetensors").read_bytes(),
        "rows": [comparable(row) for row in read(workdir / "metrics.jsonl")],
        "leaves": {path: (leaf.dtype, leaf.shape, leaf.value.tobytes()) for path, leaf in leaves.items()},
    }


# Sharing


def _remembering(prepare: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    @functools.wraps(prepare)
    def remembered(config: TrainConfig, genotype: Any, **given: Any) -> Any:
        if given.get("weight_tx") is not None or config.weights.transform or config.network.primitives:
            return prepare(config, genotype, **given)
        free = ("seed", "epochs", "evaluate_every", "weights.schedule", "weights.warmup_epochs")
        computed = {k: v for k, v in schema.computed(config).items() if k not in free}
        data = given.get("data")
        key = json.dumps([computed, config.run.devices, str(genotype), data.digest if data else None])
        if key not in known:
            known[key] = prepare(config, genotype, **given)
        return known[key]

    return remembered


@functools.cache
def _shared() -> dict[tuple[Any, str], Callable[..., Any]]:
    programs = ("make_dispatch", "make_evaluation", "_initial")
    return {
        (train_inputs, "prepare"): _remembering(train_inputs.prepare),
        **{(train_program, name): functools.cache(getattr(train_program, name)) for name in programs},
    }


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Trainings of one configuration are traced once, and draw no reports (their own tests do)."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in _shared().items():
            patch.setattr(module, name, value)
        patch.setattr(report_page, "report", lambda *_, **__: None)
        yield
