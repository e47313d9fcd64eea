"""Methods with gates of their own against a torch loop: gradient of the architecture and three steps, in float64.

The noise of a step is drawn by the function that the method draws it with, from the key of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import oracles
import pytest
from torch_search import STEPS, Pair, Step, TorchSearch, assert_same, batches, ours

from prdarts_jax import presets
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import get
from prdarts_jax.strategies.proxyless import pair_noise
from prdarts_jax.strategies.sampling import gumbel_noise

pytestmark = pytest.mark.reference

OPS = ("none", "skip_connect", "avg_pool_3x3", "dil_conv_3x3")
_LISTS = (OPS, OPS[1::2]), (OPS[::2] + OPS[3:], OPS)  # not all of them on every edge
SPACE = Space(nodes=1, cells=3, channels=2, classes=3, in_channels=1, ops=OPS, edge_ops=_LISTS, head_norm=False)
KINDS = [cell.kind for cell in SPACE.layout]
Move = Callable[[TorchSearch, Pair, Pair, Any], None]  # one step from a train batch, a validation batch and a key


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _noise(key: Any, draw: Callable[..., Any] = gumbel_noise) -> dict[str, Any]:
    torch = oracles.require_torch()
    return {kind: torch.tensor(np.asarray(g, np.float64)) for kind, g in draw(key, SPACE).items()}


def _masked(side: TorchSearch, kind: str) -> Any:
    return side.arch[kind].masked_fill(~oracles.require_torch().tensor(SPACE.allowed[kind]), -float("inf"))


# --- SNAS -------------------------------------------------------------------------------------------------------------


def _costs() -> list[list[np.ndarray]]:
    """Size, flops and access of the operations of each cell [E,O], by the formulas of the program, at 8 pixels."""
    tables, side, c = [], 8, SPACE.channels
    for kind in KINDS:
        stride = 2 if kind == "reduce" else 1
        side, c = -(-side // stride), c * stride
        y, conv = side**2, 9 * c + c * c
        skip = (0, 0, 2 * c * y) if stride == 1 else (c * c, c * c * y, 3 * c * y + c * c)
        columns = [
            (0, 0, 0),
            skip,
            (0, 9 * y * c, (2 if stride == 1 else 5) * y * c),
            (conv, conv * y, y * ((3 if stride == 1 else 6) * c + c) + conv),
        ]
        tables.append([np.array([[column[i] for column in columns]] * 2, float) for i in range(3)])
    return tables


def _snas(side: TorchSearch, train: Pair, val: Pair, key: Any) -> None:
    torch, noise, resource = oracles.require_torch(), _noise(key), 0.0
    z = {kind: torch.softmax((_masked(side, kind) + noise[kind]) / 0.7, 1) for kind in CELL_TYPES}
    for kind, tables in zip(KINDS, _costs(), strict=True):
        for table in tables:
            resource += (z[kind] * torch.tensor(table)).sum(1).clamp(min=1).log().sum() / 3 / KINDS.count(kind)
    loss = side.loss(train, gates=z) + 0.2 * resource
    slopes = side.grad(loss, [side.weights, side.arch])
    number = len(side.leaves(side.weights))
    side.move_weights(slopes[:number])
    side.move_arch(slopes[number:])


# --- GDAS and Fair DARTS ----------------------------------------------------------------------------------------------


def _gdas(grad: str) -> Move:
    torch = oracles.require_torch()

    def gates(side: TorchSearch, key: Any) -> dict[str, Any]:
        noise, drawn = _noise(key), {}
        for kind in CELL_TYPES:
            p = torch.softmax((torch.log_softmax(_masked(side, kind), 1) + noise[kind]) / 2.0, 1)
            one = torch.nn.functional.one_hot(p.argmax(1), len(OPS)).double()
            through = p - p.detach() + one
            drawn[kind] = through * one if grad == "selected" else through
        return drawn

    def move(side: TorchSearch, train: Pair, val: Pair, key: Any) -> None:
        weight_key, arch_key = jax.random.split(key)
        side.move_weights(side.grad(side.loss(train, gates=gates(side, weight_key)), side.weights))
        side.move_arch(side.grad(side.loss(val, gates=gates(side, arch_key)), side.arch))

    return move


def _fair(norm: str) -> Move:
    torch = oracles.require_torch()
    loss = torch.nn.MSELoss() if norm == "l2" else torch.nn.L1Loss()

    def move(side: TorchSearch, train: Pair, val: Pair, key: Any) -> None:
        w = {kind: torch.sigmoid(side.arch[kind]) for kind in CELL_TYPES}
        entries = torch.cat([w[kind][torch.tensor(SPACE.allowed[kind])] for kind in CELL_TYPES])
        zero_one = loss(entries, torch.full_like(entries, 0.5))
        side.move_arch(side.grad(side.loss(val, gates=w) - 10 * zero_one, side.arch))
        w = {kind: torch.sigmoid(side.arch[kind]) for kind in CELL_TYPES}
        side.move_weights(side.grad(side.loss(train, gates=w), side.weights))

    return move


# --- ProxylessNAS -----------------------------------------------------------------------------------------------------


def _proxyless(mode: str) -> Move:
    """Alpha gets the double sum over the gradients of the gates; of two candidates the updated values are rescaled."""
    torch = oracles.require_torch()

    def move(side: TorchSearch, train: Pair, val: Pair, key: Any) -> None:
        weight_key, arch_key = jax.random.split(key)
        noise = _noise(weight_key)
        chosen = {kind: (_masked(side, kind) + noise[kind]).argmax(1) for kind in CELL_TYPES}
        path = {kind: torch.nn.functional.one_hot(chosen[kind], len(OPS)).double() for kind in CELL_TYPES}
        side.move_weights(side.grad(side.loss(train, gates=path), side.weights))
        noise, again, gates, involved = _noise(arch_key), _noise(arch_key, pair_noise), {}, {}
        old = {kind: side.arch[kind].detach().clone() for kind in CELL_TYPES}
        for kind in CELL_TYPES:
            drawn = _masked(side, kind).detach() + noise[kind]
            gates[kind] = torch.zeros_like(drawn)
            for e in range(2):
                candidates = np.flatnonzero(SPACE.allowed[kind][e]).tolist()
                best = int(drawn[e].argmax())
                if mode == "two":
                    candidates = sorted(candidates, key=lambda o, row=drawn[e]: -float(row[o]))[:2]
                    scores = old[kind][e] + again[kind][e]
                    best = max(candidates, key=lambda o, row=scores: float(row[o]))
                involved[kind, e] = candidates
                gates[kind][e, best] = 1.0
            gates[kind].requires_grad_()
        by_gate = dict(zip(CELL_TYPES, side.grad(side.loss(val, gates=gates), gates), strict=True))
        slopes = {kind: torch.zeros_like(old[kind]) for kind in CELL_TYPES}
        for (kind, e), among in involved.items():
            p = torch.softmax(old[kind][e, among], 0)
            for i, one in enumerate(among):
                for j, other in enumerate(among):
                    slopes[kind][e, one] += by_gate[kind][e, other] * p[j] * (float(i == j) - p[i])
        side.move_arch(side.leaves(slopes))
        for (kind, e), among in involved.items() if mode == "two" else ():
            with torch.no_grad():
                new = side.arch[kind][e, among]
                side.arch[kind][e, among] -= torch.log(new.exp().sum() / old[kind][e, among].exp().sum())

    return move


# --- the method after BayesNAS ----------------------------------------------------------------------------------------


class _Cells:
    """Gates of a network's cells, in the order in which it asks for them."""

    def __init__(self, of_cell: list[Any]) -> None:
        self._next = iter(of_cell)

    def __getitem__(self, kind: str) -> Any:
        return next(self._next)


def _bayesnas(side: TorchSearch, train: Pair, val: Pair, key: Any) -> None:
    edges, ops, lasso = side.arch["edges"], side.arch["ops"], 0.0
    cells = _Cells([edges[c][:, None] * ops[c] for c in range(3)])
    for kind in CELL_TYPES:
        rows = [c for c, other in enumerate(KINDS) if other == kind]
        for e in range(2):
            lasso += 0.02 * 0.5 * edges[rows, e].norm()
            for o in np.flatnonzero(SPACE.allowed[kind][e]):
                lasso += 0.03 * 0.5 * ops[rows, e, int(o)].norm()
    slopes = side.grad(side.loss(train, gates=cells) + lasso, [side.weights, side.arch])
    number = len(side.leaves(side.weights))
    side.move_weights(slopes[:number])
    side.move_arch(slopes[number:])


# --- three steps ------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], dict[str, float], Callable[[], Move]]] = {
    "snas": ("snas", {"image": 8}, {"tau": 0.7, "resource": 0.2}, lambda: _snas),
    "gdas": ("gdas", {}, {"tau": 2.0}, lambda: _gdas("selected")),
    "gdas, all": ("gdas", {"grad": "all"}, {"tau": 2.0}, lambda: _gdas("all")),
    "fair-darts": ("fair-darts", {}, {"w01": 10.0}, lambda: _fair("l2")),
    "fair-darts, l1": ("fair-darts", {"norm": "l1"}, {"w01": 10.0}, lambda: _fair("l1")),
    "proxyless": ("proxyless", {"weight_steps": 1}, {}, lambda: _proxyless("full")),
    "proxyless, two": ("proxyless", {"weight_steps": 1, "mode": "two"}, {}, lambda: _proxyless("two")),
    "bayesnas": ("bayesnas", {"lambda_edges": 0.02, "lambda_ops": 0.03}, {}, lambda: _bayesnas),
}
_QUICK = ("snas", "gdas", "proxyless, two")


@pytest.mark.parametrize("name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_three_steps_are_those_of_torch(name: str) -> None:
    method, options, numbers, made = CASES[name]
    config, strategy, move = presets.resolve("digits", method).config, get(method, space=SPACE, **options), made()
    data = batches(SPACE)
    start, found = ours(strategy, config, numbers=numbers, data=data)
    side = TorchSearch(SPACE, config, start, lambda arch: arch)
    for i, ((train, val), step) in enumerate(zip(data, found, strict=True)):
        move(side, train, val, jax.random.fold_in(jax.random.key(5), i))
        assert_same(step, side.now(), atol=1e-9)
    assert len(found) == STEPS and _distance(start, found[-1]) > 1e-5


def _distance(start: Step, end: Step) -> float:
    return max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start.arch, end.arch)), strict=True))
