"""Methods made of DARTS against a torch loop: the gradient of the architecture and three bilevel steps, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import oracles
import pytest
from torch_search import Pair, TorchSearch, assert_same, batches, ours

from prdarts_jax import presets
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import get

pytestmark = pytest.mark.reference

# Tiny: what a method computes does not depend on the size of the network, and compiling does.
_OPS = ("none", "avg_pool_3x3", "skip_connect", "dil_conv_3x3")
SPACE = Space(nodes=1, cells=3, channels=2, classes=3, in_channels=1, ops=_OPS, head_norm=False)
TWO = dataclasses.replace(SPACE, nodes=2)
_LISTS = (("none", "skip_connect"), ("avg_pool_3x3", "dil_conv_3x3"), SPACE.ops, ("skip_connect",), SPACE.ops[1:])
SOME = dataclasses.replace(TWO, edge_ops=(_LISTS, _LISTS[::-1]))
PARTIAL = dataclasses.replace(SPACE, channels=8, partial=4)
ETA, MU, DECAY = 0.025, 0.9, 3e-4


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _config(method: str) -> SearchConfig:
    return presets.resolve("digits", method).config


# --- gates and steps, written again in torch --------------------------------------------------------------------------


def _softmax(space: Space) -> Callable[[Any], Any]:
    torch = oracles.require_torch()

    def gates(arch: Any) -> Any:
        tables = {}
        for kind in CELL_TYPES:
            allowed = torch.tensor(space.allowed[kind])
            exponentials = torch.exp(arch[kind]) * allowed
            tables[kind] = exponentials / exponentials.sum(1, keepdim=True)
        return tables

    return gates


def _with_edges(space: Space) -> Callable[[Any], Any]:
    torch = oracles.require_torch()

    def gates(arch: Any) -> Any:
        edges = {}
        for kind in CELL_TYPES:
            b = arch["edges"][kind]
            parts = [
                torch.softmax(b[[e for e, (_, n) in enumerate(space.edges) if n == node]], 0)
                for node in range(2, 2 + space.nodes)
            ]
            edges[kind] = torch.cat(parts)
        return _softmax(space)(arch["base"]), edges

    return gates


def _first_order(side: TorchSearch, train: Pair, val: Pair) -> None:
    side.move_arch(side.grad(side.loss(val), side.arch))
    side.move_weights(side.grad(side.loss(train), side.weights))


def _mixed_level(side: TorchSearch, train: Pair, val: Pair) -> None:
    both = (side.grad(side.loss(pair), side.arch) for pair in (val, train))
    side.move_arch([v + t for v, t in zip(*both, strict=True)])
    side.move_weights(side.grad(side.loss(train), side.weights))


def _velocity(side: TorchSearch) -> list[Any]:
    torch = oracles.require_torch()
    states = [side.weight_opt.state.get(w, {}) for w in side.leaves(side.weights)]
    return [
        torch.zeros_like(w) if state.get("momentum_buffer") is None else state["momentum_buffer"]
        for w, state in zip(side.leaves(side.weights), states, strict=True)
    ]


def _with_leaves(side: TorchSearch, leaves: list[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(side.weights), leaves)


def _second_order(side: TorchSearch, train: Pair, val: Pair) -> None:
    """The gradient at the virtual weights, minus eta times the central difference at radius .01/|g|."""
    torch = oracles.require_torch()
    weights = [w.detach() for w in side.leaves(side.weights)]
    slope = side.grad(side.loss(train), side.weights)
    ahead = [
        (w - ETA * (MU * v + g + DECAY * w)).requires_grad_()
        for w, g, v in zip(weights, slope, _velocity(side), strict=True)
    ]
    virtual = _with_leaves(side, ahead)
    loss = side.loss(val, weights=virtual)
    direct = side.grad(loss, [side.arch, virtual])
    arch, g = direct[: len(side.leaves(side.arch))], direct[len(side.leaves(side.arch)) :]
    radius = 0.01 / torch.sqrt(sum((x**2).sum() for x in g))
    ends = []
    for sign in (1, -1):
        moved = _with_leaves(side, [w + sign * radius * x for w, x in zip(weights, g, strict=True)])
        ends.append(side.grad(side.loss(train, weights=moved), side.arch))
    side.move_arch([a - ETA * (up - down) / (2 * radius) for a, up, down in zip(arch, *ends, strict=True)])
    side.move_weights(side.grad(side.loss(train), side.weights))


def _second_order_exact(side: TorchSearch, train: Pair, val: Pair) -> None:
    """Autograd through the virtual step."""
    torch = oracles.require_torch()
    leaves = side.leaves(side.weights)
    slope = torch.autograd.grad(side.loss(train), leaves, create_graph=True)
    ahead = [w - ETA * (MU * v + g + DECAY * w) for w, g, v in zip(leaves, slope, _velocity(side), strict=True)]
    side.move_arch(side.grad(side.loss(val, weights=_with_leaves(side, ahead)), side.arch))
    side.move_weights(side.grad(side.loss(train), side.weights))


CASES: dict[str, tuple[str, dict[str, Any], Space, Any, Any]] = {
    "darts, first order": ("darts", {}, SPACE, _softmax, _first_order),
    "darts, second order": ("darts", {"order": 2}, SPACE, _softmax, _second_order),
    "darts, second order, exact": ("darts", {"order": 2, "exact": True}, SPACE, _softmax, _second_order_exact),
    "milenas": ("milenas", {}, SPACE, _softmax, _mixed_level),
    "pc-darts": ("pc-darts", {}, PARTIAL, _with_edges, _first_order),
    "pc-darts, two nodes": ("pc-darts", {}, dataclasses.replace(PARTIAL, nodes=2), _with_edges, _first_order),
    "pc-darts, all channels": ("pc-darts", {}, TWO, _with_edges, _first_order),
    "p-darts, a late stage": ("p-darts", {"stage": 1, "skip_dropout": "0,0,0"}, SOME, _softmax, _first_order),
}
_QUICK = ("darts, first order", "darts, second order", "pc-darts")


@pytest.mark.parametrize("name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_three_steps_are_those_of_torch(name: str) -> None:
    method, options, space, gates, move = CASES[name]
    config, strategy = _config(method), get(method, space=space, **options)
    data = batches(space)
    start, found = ours(strategy, config, data=data)
    side = TorchSearch(space, config, start, gates(space))
    for (train, val), step in zip(data, found, strict=True):
        move(side, train, val)
        assert_same(step, side.now(), atol=1e-9)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start.arch, step.arch)), strict=True)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["darts, first order", "milenas", "pc-darts"])
def test_single_precision_stays_near_them(name: str) -> None:
    """What users compute; not the second order, whose finite difference multiplies the rounding of the weights."""
    method, options, space, gates, move = CASES[name]
    config, data = _config(method), batches(space)
    with jax.enable_x64(False):
        start, found = ours(get(method, space=space, **options), config, dtype="float32", data=data)
    side = TorchSearch(space, config, start, gates(space))
    for (train, val), step in zip(data, found, strict=True):
        move(side, train, val)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(step))
        assert_same(step, side.now(), atol=1e-5)
