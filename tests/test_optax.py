"""Every public transformation of optax and optax.contrib moves a search: finite, resumed to the bit, compiled once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import search_cases
from search_cases import assert_same, ended, rows

from prdarts_jax import optimizers
from prdarts_jax.report import page as report_page
from prdarts_jax.report import plots
from prdarts_jax.searching import program as search_program

RATE = 1e-3
Make = Callable[[], optax.GradientTransformation]


def _labels(parameters: Any) -> Any:
    """By path: kernels and architecture tables one way, vectors the other."""
    return jax.tree.map_with_path(lambda path, leaf: "many" if np.ndim(leaf) > 1 else "few", parameters)


def _matrices(parameters: Any) -> Any:
    return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(), parameters)


def _descend(*inner: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(*inner, optax.scale(-RATE))


_SGD = optax.sgd(RATE)
# What needs more than a learning rate, or is no whole optimizer.
MADE: dict[str, Make] = {
    "adaptive_grad_clip": lambda: _descend(optax.adaptive_grad_clip(0.1)),
    "add_decayed_weights": lambda: _descend(optax.add_decayed_weights(0.1)),
    "add_noise": lambda: _descend(optax.add_noise(0.01, 0.55, key=0)),
    "apply_every": lambda: _descend(optax.apply_every(3)),
    "apply_if_finite": lambda: optax.apply_if_finite(_SGD, 2),
    "chain": lambda: optax.chain(optax.clip(1.0), _SGD),
    "clip": lambda: _descend(optax.clip(0.1)),
    "clip_by_block_rms": lambda: _descend(optax.clip_by_block_rms(0.1)),
    "clip_by_global_norm": lambda: _descend(optax.clip_by_global_norm(0.1)),
    "conditionally_mask": lambda: _descend(optax.conditionally_mask(optax.trace(0.9), lambda step: step < 5)),
    "conditionally_transform": lambda: _descend(optax.conditionally_transform(optax.trace(0.9), lambda step: step < 5)),
    "ema": lambda: _descend(optax.ema(0.9)),
    "flatten": lambda: optax.flatten(optax.adam(RATE)),
    "freeze": lambda: optax.chain(optax.freeze(lambda tree: jax.tree.map(lambda leaf: np.ndim(leaf) < 2, tree)), _SGD),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=RATE),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(learning_rate=RATE),
    "keep_params_nonnegative": lambda: optax.chain(_SGD, optax.keep_params_nonnegative()),
    "lookahead": lambda: optax.lookahead(optax.adam(RATE), 3, 0.5),
    "masked": lambda: optax.masked(optax.adam(RATE), lambda tree: jax.tree.map(lambda leaf: np.ndim(leaf) > 1, tree)),
    "multi_transform": lambda: optax.multi_transform({"many": optax.adam(RATE), "few": _SGD}, _labels),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("sgd", _SGD)),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "partition": lambda: optax.partition({"many": optax.adam(RATE), "few": _SGD}, _labels),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=RATE),
    "scale": lambda: optax.scale(-RATE),
    "scale_by_backtracking_linesearch": lambda: optax.chain(
        optax.scale(-1.0), optax.scale_by_backtracking_linesearch(5, max_learning_rate=0.01)
    ),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "scale_by_polyak": lambda: optax.chain(optax.scale_by_polyak(max_learning_rate=RATE), optax.scale(-1.0)),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda step: -RATE / (1 + step)),
    "scale_by_zoom_linesearch": lambda: optax.chain(
        optax.scale(-1.0), optax.scale_by_zoom_linesearch(5, max_learning_rate=0.01)
    ),
    "selective_transform": lambda: optax.selective_transform(optax.adam(RATE), freeze_mask=False),
    "snapshot": lambda: optax.chain(optax.snapshot("norm", lambda updates, *_, **__: optax.global_norm(updates)), _SGD),
    "stateless": lambda: optax.stateless(lambda updates, params: jax.tree.map(lambda g: -RATE * g, updates)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, p: -RATE * g),
    "trace": lambda: _descend(optax.trace(0.9)),
    "with_extra_args_support": lambda: optax.with_extra_args_support(_SGD),
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.adam(RATE)),
    "contrib.reduce_on_plateau": lambda: optax.chain(_SGD, optax.contrib.reduce_on_plateau(patience=2)),
    "contrib.sam": lambda: optax.contrib.sam(_SGD, optax.chain(optax.contrib.normalize(), optax.sgd(1e-3))),
    "contrib.scale_by_muon": lambda: optax.partition(
        {"matrix": _descend(optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices)), "rest": _SGD},
        lambda tree: jax.tree.map(lambda leaf: "matrix" if np.ndim(leaf) == 2 else "rest", tree),
    ),
    "contrib.schedule_free": lambda: optax.contrib.schedule_free(_SGD, learning_rate=RATE),
    "contrib.split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(optax.adam(RATE)),
}
# name -> why it cannot move a search
IMPOSSIBLE = {
    "contrib.differentially_private_aggregate": "it takes a gradient an image",
    "contrib.dpsgd": "it takes a gradient an image",
    "measure_with_ema": "the state of optax.monitor, which it is for, has no entries before the first update",
    "contrib.sophia": "it calls the loss of the whole tree of parameters in a form of its own (obj_fn)",
}


def _public() -> dict[str, Callable[..., Any]]:
    """name -> function, of everything that says it makes a transformation."""
    found = {}
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, function in vars(module).items():
            if name.startswith("_") or not callable(function) or inspect.isclass(function):
                continue
            try:
                made = str(inspect.signature(function).return_annotation)
            except ValueError:
                continue
            if "GradientTransformation" in made:
                found[f"{prefix}{name}"] = function
    return found


def _make(name: str) -> optax.GradientTransformation:
    if name in MADE:
        return MADE[name]()
    function = _public()[name]
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    ]
    if "learning_rate" in inspect.signature(function).parameters:
        return function(learning_rate=RATE)
    assert not required, f"{name} needs {required}: say how in MADE"
    return function() if name in ("set_to_zero",) else _descend(function())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The programs of the searches that follow; they are those of the stub, and shared."""
    made: list[Any] = []
    dispatch = search_program.make_dispatch

    def once(*problem: Any) -> Any:
        if not made:
            made.append(dispatch(*problem))
        return made[0]

    monkeypatch.setattr(search_program, "make_dispatch", once)
    for name in ("cell_diagram", "save"):
        monkeypatch.setattr(plots, name, lambda *_, **__: None)
    monkeypatch.setattr(report_page, "report", lambda *_, **__: None)
    # As users have it: shapes are promoted.
    with search_cases.stub_network(), search_cases.standard_promotion(), jax.numpy_rank_promotion("allow"):
        yield made


def _moves(name: str, made: list[Any], tmp_path: Path) -> None:
    flags = {"epochs": 2, "space__channels": 2, "space__ops": "none,skip_connect,sep_conv_3x3"}
    given = {"weight_tx": lambda config: _make(name), "arch_tx": lambda config: _make(name)}
    assert search_cases.search(tmp_path / "whole", given=given, **flags).status == "finished"
    found = rows(tmp_path / "whole", "epoch")
    assert all(np.isfinite(value) for row in found for value in row.values() if not isinstance(value, str))
    moved = [row["update_norm/weights"] for row in found]
    assert (max(moved) > 0) is (name != "set_to_zero")
    first = search_cases.search(tmp_path / "parts", given=given, run__time_limit=1e-9, **flags)
    assert first.status == "time-limit"
    assert search_cases.search(tmp_path / "parts", given=given, **flags).status == "finished"
    assert made[0]._cache_size() == 1
    assert_same(ended(tmp_path / "parts"), ended(tmp_path / "whole"))


QUICK = ("polyak_sgd", "lookahead", "contrib.reduce_on_plateau", "contrib.sam", "multi_transform")


@pytest.mark.parametrize("name", QUICK)
def test_what_takes_more_than_gradients(name: str, quick: list[Any], tmp_path: Path) -> None:
    _moves(name, quick, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(_public()) - set(IMPOSSIBLE) - set(QUICK)))
def test_every_public_transformation(name: str, quick: list[Any], tmp_path: Path) -> None:
    _moves(name, quick, tmp_path)


def test_the_list_of_the_impossible_is_of_public_names() -> None:
    assert set(IMPOSSIBLE) | set(MADE) <= set(_public())


def test_lookahead_is_that_of_optax() -> None:
    """Six steps of the pair of fast and slow parameters, kept by hand as optax's page shows it."""
    shapes = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    theirs = optax.lookahead(optax.sgd(0.1, momentum=0.9), 3, 0.25)
    with search_cases.standard_promotion():
        ours = optimizers.on_plain_parameters(theirs, shapes)
    start = {"w": jnp.array([1.0, -2.0, 3.0])}
    pair, w = optax.LookaheadParams.init_synced(start), start
    their_state, our_state = theirs.init(pair), ours.init(start)
    for _ in range(6):
        with search_cases.standard_promotion():
            updates, their_state = theirs.update(pair.fast, their_state, pair)
            pair = optax.apply_updates(pair, updates)
            updates, our_state = ours.update(w, our_state, w)
            w = optax.apply_updates(w, updates)
        np.testing.assert_array_equal(w["w"], pair.fast["w"])
    np.testing.assert_array_equal(our_state.slow["w"], pair.slow["w"])
