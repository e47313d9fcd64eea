"""The step of a search: the losses of a strategy on the search network, moved by the strategy's rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from prdarts_jax.bilevel import Batch, Batches, Loss, Losses, Metrics, Optimizers, SearchState
from prdarts_jax.gates import Gates
from prdarts_jax.ops.losses import accuracy, cross_entropy
from prdarts_jax.optimizers import with_extra_arguments
from prdarts_jax.space import supernet
from prdarts_jax.space.noise import DROP_PATH, DROPOUT, Noise
from prdarts_jax.space.spec import Space
from prdarts_jax.strategy import Numbers, Strategy, cross_entropy_alone


def init_state(
    key: jax.Array,
    *,
    space: Space,
    strategy: Strategy,
    weight_tx: optax.GradientTransformation,
    arch_tx: optax.GradientTransformation,
) -> SearchState:
    """The state before the first step; jit it: eager initialisation compiles hundreds of small programs."""
    weight_key, arch_key = jax.random.split(key)
    weights, arch = supernet.init(weight_key, space), strategy.init(arch_key)
    memory = jax.tree.map(jnp.asarray, strategy.memory)
    return SearchState(jnp.zeros((), jnp.int32), weights, arch, weight_tx.init(weights), arch_tx.init(arch), memory)


_NOISE = 2**32 - 3  # in the place of a cell type's number: the noise shares no key with the gates


def _noise(key: jax.Array, batch: Batch, numbers: Numbers, axis_name: str | None) -> Noise | None:
    """The noise that the numbers of the epoch name: drop-path and dropout; None if they name none."""
    rates = {name: numbers[name] for name in numbers if name == DROP_PATH or name.startswith(DROPOUT)}
    if not rates:
        return None
    positions = jnp.arange(batch.images.shape[0], dtype=jnp.int32)
    if axis_name is not None:
        positions = positions + jax.lax.axis_index(axis_name).astype(jnp.int32) * batch.images.shape[0]
    return Noise(jax.random.fold_in(key, _NOISE), positions, rates)


def make_losses(
    *,
    space: Space,
    strategy: Strategy,
    axis_name: str | None = None,
    local_batch_norm: bool = False,
    apply: Callable[..., Any] = supernet.apply,
) -> Losses:
    """The losses of a strategy on the search network; arguments as in `make_search_step`."""
    norm_axis = None if local_batch_norm else axis_name

    def network(apply: Callable[..., Any]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def losses(
            weights: Any, gates: Gates, batch: Batch, key: jax.Array, numbers: Numbers
        ) -> tuple[jax.Array, jax.Array]:
            noise = _noise(key, batch, numbers, axis_name)
            more = {} if noise is None else {"noise": noise}
            logits, _ = apply(weights, gates, batch.images, space=space, axis_name=norm_axis, **more)
            return cross_entropy(logits, batch.labels), accuracy(logits, batch.labels)

        return losses

    def gates(role: str) -> Callable[..., Gates]:
        def sample(weights: Any, arch: Any, memory: Any, batch: Batch, key: jax.Array, numbers: Numbers) -> Gates:
            del weights, batch
            return strategy.sample(key, arch, memory, numbers, role)

        return sample

    objective = None if strategy.objective is cross_entropy_alone else strategy.objective
    return Losses(
        plain=Loss(gates("arch"), network(apply), None, axis_name),
        full=Loss(gates("arch"), network(apply), objective, axis_name),
        weight=Loss(gates("weights"), network(apply), strategy.weight_objective, axis_name),
        twice=Loss(gates("weights"), network(supernet.apply_reference), strategy.weight_objective, axis_name),
    )


def make_search_step(
    *,
    space: Space,
    strategy: Strategy,
    weight_tx: optax.GradientTransformation,
    arch_tx: optax.GradientTransformation,
    axis_name: str | None = None,
    local_batch_norm: bool = False,
    apply: Callable[..., Any] = supernet.apply,
) -> Callable[[SearchState, Batches, jax.Array, Numbers], tuple[SearchState, Metrics]]:
    """A pure function (state, batches, key, numbers) -> (state, metrics): a step by the rule of a strategy.

    Args:
      space: the search space.
      strategy: the method; `strategy.rule` says how the two groups move.
      weight_tx, arch_tx: any optax transformations; those that take more than gradients and parameters are given
        `value` (the loss), `grad` and `value_fn` (parameters -> loss).
      axis_name: mapped axis over which the batches are split; None on one device.
      local_batch_norm: BN statistics of each device's part of a batch; gradients and metrics stay means over the axis.
      apply: the network, `supernet.apply` or (small spaces, tests) `supernet.apply_reference`.

    Returns:
      step. Its key must be the same on all devices (all devices sample one architecture). `numbers` holds the
      strategy's numbers of the epoch and `weight_learning_rate`, `arch_learning_rate` (optional) as scalars: changing
      them does not recompile. Metrics are float32 scalars, validation metrics taken before the architecture moves.
    """
    losses = make_losses(
        space=space, strategy=strategy, axis_name=axis_name, local_batch_norm=local_batch_norm, apply=apply
    )
    move = strategy.rule(losses, Optimizers(*map(with_extra_arguments, (weight_tx, arch_tx))))

    def step(state: SearchState, batches: Batches, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
        chex.assert_rank([batches.train.images, batches.val.images], 4)
        state, metrics = move(state, batches, key, numbers)
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return step
