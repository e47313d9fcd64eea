"""One tiny search that the tests of the whole program share, so that it is compiled once, and what it left behind.

Within one process they also share its traced form (`shared_programs`); the tests that start
processes show that it makes no difference.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prdarts_jax import cli, presets
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.data.sources import Dataset, from_arrays, load
from prdarts_jax.report import page as report_page
from prdarts_jax.report import plots
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.digests import host_leaves
from prdarts_jax.run.metrics import comparable, read
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.searching import program as search_program
from prdarts_jax.searching import sweep
from prdarts_jax.searching.loop import SearchResult
from prdarts_jax.searching.program import SearchCarry
from prdarts_jax.space import supernet
from prdarts_jax.strategies import registry

IMAGES, BATCH, EPOCHS = 112, 8, 3
EPOCH_STEPS = IMAGES // 2 // BATCH  # 7, a prime: dispatches of 3 leave a remainder
TOTAL = EPOCHS * EPOCH_STEPS
WITHOUT_GRADIENTS = ("random", "evolution", "enas", "pnas")  # their architecture moves between epochs alone
FLAGS: Mapping[str, Any] = {
    "data.source": "digits",
    "space.cells": 3,
    "space.channels": 4,
    "space.nodes": 1,
    "space.ops": "none,skip_connect,sep_conv_3x3",
    "method.options.executed_ops": 1,
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "run.devices": "1",
    "run.progress": "off",
    "run.steps_per_dispatch": 3,
    "run.log_every": 1,
}


@functools.cache
def digits() -> Dataset:
    """The first digits of each class, enough for an epoch of seven steps, and no test images."""
    full = load("digits")
    picked = np.sort(np.concatenate([np.flatnonzero(full.train_labels == k)[: IMAGES // 10 + 2] for k in range(10)]))
    images, labels = full.train_images[picked[:IMAGES]], full.train_labels[picked[:IMAGES]]
    return from_arrays("digits", images, labels)


def write_npz(path: Path) -> Path:
    np.savez(path, images=digits().train_images, labels=digits().train_labels)
    return path


def config(**flags: Any) -> SearchConfig:
    """The tiny search with other values; `__` in a name stands for a dot."""
    return presets.resolve("digits", flags={**FLAGS, **{k.replace("__", "."): v for k, v in flags.items()}}).config


def config_of(method: str, *transforms: str, **flags: Any) -> SearchConfig:
    """The tiny search with another method and these transforms, which has a few operations that the method allows."""
    values = {path: value for path, value in FLAGS.items() if not path.startswith("method.")}
    if method == "prdarts":
        values["method.options.executed_ops"] = 1
    if "none" not in registry.settings(method).get("space.ops", ("none",)):
        values["space.ops"] = "skip_connect,sep_conv_3x3"
    values |= {"method.transforms": list(transforms), **{k.replace("__", "."): v for k, v in flags.items()}}
    return presets.resolve("digits", method, values).config


def words(workdir: Path, npz: Path, **flags: Any) -> list[str]:
    """The command line of the tiny search on a npz file."""
    values = {**FLAGS, "data.source": f"npz:{npz}", **{k.replace("__", "."): v for k, v in flags.items()}}
    command = ["search", "--preset", "digits", "--workdir", str(workdir)]
    return command + [f"--{path}={value}" for path, value in values.items()]


def search(workdir: Path, *, given: Mapping[str, Any] | None = None, **flags: Any) -> SearchResult:
    return search_loop.search(config(**flags), workdir, **{"data": digits(), **(given or {})})


def final_state(workdir: Path) -> SearchCarry:
    """The newest checkpoint, restored and verified."""
    config_ = schema.from_dict(SearchConfig, json.loads((workdir / "config.json").read_text())["config"])
    if config_.method.strategy == config().method.strategy:
        # The numbers that members of a population differ in change no shape: all have one target, traced once.
        numbers = [path for path in sweep.sweepable(config_).values() if path != "seed"]
        config_ = schema.replace(config_, {path: schema.get(config(), path) for path in numbers})
    inputs = search_inputs.prepare(config_, data=digits())
    progress = inputs.problem.strategy.schedule(0, 1) | {"weight_learning_rate": 0.0, "arch_learning_rate": 0.0}
    target = search_program.abstract_carry(
        inputs.problem,
        inputs.mesh,
        jax.random.key(0),
        {name: np.float32(value) for name, value in progress.items()},
        digits().train_images.shape[1:],
    )
    with Checkpointer(workdir / "checkpoints") as saved:
        found = saved.restore_latest(target)
    assert found is not None
    return found.state


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit, however a search came to its end."""
    leaves = host_leaves(final_state(workdir))
    return {
        "genotype": (workdir / "genotype.json").read_text(),
        "genotypes": (workdir / "genotypes.jsonl").read_text(),
        "probabilities": (workdir / "probabilities.jsonl").read_text(),
        "rows": [comparable(row) for row in read(workdir / "metrics.jsonl")],
        "leaves": {path: (leaf.dtype, leaf.shape, leaf.value.tobytes()) for path, leaf in leaves.items()},
    }


def ended(workdir: Path) -> dict[str, Any]:
    """What must be equal, bit for bit, of a search of any method and number of stages, however it came to its end."""
    files = ("genotype.json", "genotypes.jsonl", "probabilities.jsonl", "events.jsonl")
    found: dict[str, Any] = {f: (workdir / f).read_text() if (workdir / f).exists() else None for f in files}
    saved = Checkpointer(workdir / "checkpoints")
    leaves = saved._document(saved.steps()[-1])["leaves"]  # a digest a leaf
    return found | {"rows": [comparable(row) for row in read(workdir / "metrics.jsonl")], "leaves": leaves}


def assert_resumes(config: SearchConfig, folder: Path, dispatch: int = 5) -> Path:
    """Stopped after every dispatch it ends as uninterrupted; the workdir of the uninterrupted one."""
    assert search_loop.search(config, folder / "whole", data=digits()).status == "finished"
    moment = schema.replace(config, {"run.time_limit": 1e-9, "run.steps_per_dispatch": dispatch})
    statuses = [""]
    while statuses[-1] != "finished":
        statuses.append(search_loop.search(moment, folder / "parts", data=digits()).status)
        assert len(statuses) < 20
    assert len(statuses) > 2
    assert_same(ended(folder / "parts"), ended(folder / "whole"))
    return folder / "whole"


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for part in expected:
        assert found[part] == expected[part], part


def rows(workdir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read(workdir / "metrics.jsonl") if row["kind"] == kind]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file; the lock is written by everyone who tries."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def one_error(capsys: pytest.CaptureFixture[str], command: list[str], status: int, *said: str) -> str:
    """The single stderr line that a command fails with."""
    capsys.readouterr()
    assert cli.main(command) == status
    message = capsys.readouterr().err
    assert message.startswith("prdarts: error: "), message
    assert message.count("\n") == 1, message
    for word in said:
        assert word in message, message
    return message


# Sharing


def _remembering(prepare: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    @functools.wraps(prepare)
    def remembered(config: SearchConfig, **given: Any) -> Any:
        """What is prepared is real; a problem that computes the same as an earlier one is that one."""
        inputs = prepare(config, **given)
        if given.get("like") is not None and any(given.get(name) for name in ("weight_tx", "arch_tx", "strategy")):
            return (
                inputs  # its digests are those of the first member, whatever the caller's own code makes of its config
            )
        computed = {k: v for k, v in schema.computed(config).items() if k not in ("seed", "epochs", "evaluate_every")}
        # Where data and the user's files lie is not computed, which function of a file it is, is.
        computed |= {"data.source": "", "space.primitives": ""}
        for field in ("method.strategy", "weights.transform", "arch.transform"):
            computed[field] = computed[field].rpartition(":")[2]
        key = json.dumps([computed, config.run.devices, config.run.lowering, inputs.digests])
        return inputs._replace(problem=known.setdefault(key, inputs.problem))

    return remembered


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """A program is made once a problem: by identity, since the memory of a strategy has no hash."""
    known: dict[Any, Any] = {}

    @functools.wraps(make)
    def made(problem: Any, *rest: Any, **options: Any) -> Any:
        key = (id(problem), rest, tuple(options.items()))
        if key not in known:
            known[key] = make(problem, *rest, **options), problem  # kept, so that its number is not given again
        return known[key][0]

    return made


@functools.cache
def _shared(stub: bool) -> dict[tuple[Any, str], Callable[..., Any]]:
    programs = ("make_dispatch", "make_evaluation", "_initial")
    return {
        (search_inputs, "prepare"): _remembering(search_inputs.prepare),
        **{(search_program, name): _once(getattr(search_program, name)) for name in programs},
    }


def _stub(weights: Any, gates: Any, images: jax.Array, *, space: Any, **_: Any) -> tuple[jax.Array, dict[str, Any]]:
    """A network that is traced and compiled in no time; each weight and each gate has a gradient of its own."""
    tables = [part for part in jax.tree.leaves((gates.ops, gates.edges)) if part is not None]
    scale = sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(weights)) / 10
    scale = scale + sum(jnp.mean(table * jnp.cos(jnp.arange(table.size).reshape(table.shape))) for table in tables)
    return images.reshape(images.shape[0], -1)[:, : space.classes] * scale, {}


def _stub_init(key: jax.Array, space: Any) -> dict[str, Any]:
    """Few weights, of every rank; their number depends on the space. Moving hundreds takes the most time to trace."""
    shapes = {"conv": (3, 3, space.in_channels, 2), "matrix": (space.cells, 2), "bias": (space.classes,)}
    keys = jax.random.split(key, len(shapes))
    return {"stem": {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}}


def _stub_kept(old: Any, new: Any, before: Any, after: Any) -> Any:
    return {"stem": {**new["stem"], "conv": old["stem"]["conv"], "bias": old["stem"]["bias"]}}


@contextlib.contextmanager
def stub_network() -> Iterator[None]:
    """For tests of what is around the search network, which takes most of their time: searches have a stub of it."""
    with pytest.MonkeyPatch.context() as patch:
        make = functools.partial(search_program.make_search_step, apply=_stub)
        patch.setattr(search_program, "make_search_step", make)
        patch.setattr(supernet, "init", _stub_init)
        patch.setattr(search_loop, "kept_weights", _stub_kept)
        patch.setattr(supernet, "apply", _stub)
        patch.setattr(supernet, "apply_reference", _stub)
        yield


def standard_promotion() -> contextlib.AbstractContextManager[None]:
    """optax.adam raises a Python float to an integer power, which strict promotion forbids."""
    return jax.numpy_dtype_promotion("standard")


@contextlib.contextmanager
def shared_programs(stub: bool = False) -> Iterator[None]:
    """Searches of one configuration are traced once, and draw neither diagrams nor reports (their own tests do)."""
    network = stub_network() if stub else contextlib.nullcontext()
    with standard_promotion(), network, pytest.MonkeyPatch.context() as patch:
        for (module, name), value in _shared(stub).items():
            patch.setattr(module, name, value)
        patch.setattr(plots, "cell_diagram", lambda *_, **__: None)
        patch.setattr(plots, "save", lambda *_, **__: None)
        patch.setattr(report_page, "report", lambda *_, **__: None)
        yield
