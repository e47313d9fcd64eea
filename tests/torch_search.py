"""A bilevel search in torch, written out: network, optimizers and steps; and our steps in a form that compares with it.

The torch side knows nothing of ours but the initial weights: softmaxes, virtual steps and losses are written again in
the tests of the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles

from prdarts_jax.bilevel import Batches
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.optimizers import arch_transform, weight_transform
from prdarts_jax.searching import step as search_step
from prdarts_jax.space.spec import Space
from prdarts_jax.strategy import Strategy

STEPS = 3
Pair = tuple[np.ndarray, np.ndarray]  # images [B,H,W,C], labels


class Step(NamedTuple):
    """What a step leaves: the gradient that the architecture's optimizer was given, both groups afterwards."""

    gradient: Any
    arch: Any
    weights: Any


def batches(space: Space, size: int = 4, side: int = 6) -> list[tuple[Pair, Pair]]:
    """(train, val) of each step."""
    rng = np.random.default_rng(7)

    def one() -> Pair:
        shape = (size, side, side, space.in_channels)
        return rng.normal(size=shape), rng.integers(0, space.classes, size).astype(np.int32)

    return [(one(), one()) for _ in range(STEPS)]


class _Seen(NamedTuple):
    gradient: Any
    inner: Any


def _seeing(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation, whose state has the last gradient beside its own."""

    def update(gradient: Any, state: _Seen, params: Any) -> tuple[Any, _Seen]:
        updates, inner = tx.update(gradient, state.inner, params)
        return updates, _Seen(gradient, inner)

    return optax.GradientTransformation(lambda arch: _Seen(jax.tree.map(jnp.zeros_like, arch), tx.init(arch)), update)


def ours(
    strategy: Strategy,
    config: SearchConfig,
    *,
    dtype: str = "float64",
    scale: float = 1.0,
    numbers: Mapping[str, float] | None = None,
    key: int = 5,
    data: Sequence[tuple[Pair, Pair]] | None = None,
) -> tuple[Step, list[Step]]:
    """The start (its gradient is zero) and what each of some steps of a search leaves.

    Args:
      strategy: on the space of the search.
      config: whose optimizers move the groups.
      dtype: "float64" (inside `jax.enable_x64`) or "float32".
      scale: the architecture starts at scale * N(0,1).
      numbers: of the epoch; None: those of the last of ten.
      key: of the steps.
      data: batches of the steps.
    """
    space = strategy.space
    weight_tx, arch_tx = weight_transform(config.weights), _seeing(arch_transform(config.arch))
    parts = {"space": space, "strategy": strategy, "weight_tx": weight_tx, "arch_tx": arch_tx}
    with jax.numpy_dtype_promotion("standard"):
        state = oracles.quick_jit(lambda key: search_step.init_state(key, **parts))(jax.random.key(0))
        rng = np.random.default_rng(1)
        arch = jax.tree.map(lambda a: jnp.asarray(scale * rng.normal(size=a.shape), dtype), state.arch)
        weights = jax.tree.map(lambda a: jnp.asarray(a, dtype), oracles.float64(state.weights))
        state = state.replace(
            weights=weights, arch=arch, weight_opt=weight_tx.init(weights), arch_opt=arch_tx.init(arch)
        )
        known = dict(strategy.schedule(9, 10) if numbers is None else numbers)
        known |= {"weight_learning_rate": config.weights.learning_rate, "arch_learning_rate": config.arch.learning_rate}
        known = {name: jnp.asarray(value, dtype) for name, value in known.items()}
        step, found = oracles.quick_jit(search_step.make_search_step(**parts)), []
        start = jax.device_get(Step(state.arch_opt.gradient, state.arch, state.weights))
        for i, pairs in enumerate(data or batches(space)):
            both = Batches(*(Batch(jnp.asarray(x, dtype), jnp.asarray(y)) for x, y in pairs))
            state, _ = step(state, both, jax.random.fold_in(jax.random.key(key), i), known)
            found.append(jax.device_get(Step(state.arch_opt.gradient, state.arch, state.weights)))
    return start, found


class TorchSearch:
    """The network with leaves that torch's own optimizers move, in float64.

    Args:
      space, config: of the search.
      start: whose weights and architecture are taken.
      gates: architecture (a tree of leaves) -> {"normal", "reduce"} -> [E,O], or such a pair with edges [E] too.
    """

    def __init__(self, space: Space, config: SearchConfig, start: Step, gates: Callable[[Any], Any]) -> None:
        torch = oracles.require_torch()
        self.space, self.config, self.gates = space, config, gates
        self.weights, self.arch = oracles.torch_leaves(start.weights), oracles.torch_leaves(start.arch)
        w, a = config.weights, config.arch
        self.weight_opt = torch.optim.SGD(
            self.leaves(self.weights), w.learning_rate, w.momentum, weight_decay=w.weight_decay, nesterov=w.nesterov
        )
        leaves, betas = self.leaves(self.arch), (a.beta1, a.beta2)
        self.arch_opt = (
            torch.optim.SGD(leaves, a.learning_rate, a.momentum, weight_decay=a.weight_decay)
            if a.optimizer == "sgd"
            else torch.optim.Adam(leaves, a.learning_rate, betas, a.eps, a.weight_decay)
        )

    @staticmethod
    def leaves(tree: Any) -> list[Any]:
        return jax.tree.leaves(tree)

    def loss(self, pair: Pair, weights: Any = None, gates: Any = None) -> Any:
        """Cross-entropy on a batch, at these weights and gates, or at its own."""
        torch = oracles.require_torch()
        images, labels = torch.tensor(pair[0]), torch.tensor(pair[1].astype(np.int64))
        gates = self.gates(self.arch) if gates is None else gates
        ops, edges = gates if isinstance(gates, tuple) else (gates, None)
        logits = oracles.torch_supernet(self.space, self.weights if weights is None else weights, ops, images, edges)
        return torch.nn.functional.cross_entropy(logits, labels)

    def grad(self, loss: Any, wrt: Any) -> list[Any]:
        """Zeros where a leaf is not used."""
        torch = oracles.require_torch()
        found = torch.autograd.grad(loss, self.leaves(wrt), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, self.leaves(wrt), strict=True)]

    def move_weights(self, gradient: Sequence[Any]) -> None:
        self._move(self.weight_opt, self.weights, gradient, self.config.weights.clip_norm)

    def move_arch(self, gradient: Sequence[Any]) -> None:
        self.seen = jax.tree.unflatten(jax.tree.structure(self.arch), [g.detach().numpy().copy() for g in gradient])
        self._move(self.arch_opt, self.arch, gradient, self.config.arch.clip_norm)

    def _move(self, opt: Any, tree: Any, gradient: Sequence[Any], clip: float) -> None:
        torch = oracles.require_torch()
        for leaf, g in zip(self.leaves(tree), gradient, strict=True):
            leaf.grad = g.detach().clone()
        if np.isfinite(clip):
            torch.nn.utils.clip_grad_norm_(self.leaves(tree), clip)
        opt.step()

    def now(self) -> Step:
        return Step(
            self.seen, *(jax.tree.map(lambda leaf: leaf.detach().numpy().copy(), t) for t in (self.arch, self.weights))
        )


def assert_same(found: Step, expected: Step, *, atol: float) -> None:
    """Both groups and the gradient of the architecture."""
    for part in Step._fields:
        ours_, theirs = (jax.tree.leaves_with_path(getattr(side, part)) for side in (found, expected))
        for (path, a), (_, b) in zip(ours_, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=atol, rtol=atol, err_msg=f"{part}{jax.tree_util.keystr(path)}")
