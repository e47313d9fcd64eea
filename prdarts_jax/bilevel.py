"""The bilevel step: a weight step on a train batch, an architecture step on a validation batch, two optimizers.

    weights <- weights - update by weight_tx of  grad_w CE_train(weights, g),              g  ~ gates(beta)
    beta    <- beta - update by arch_tx of       grad_beta [CE_val(weights, g') + penalty], g' ~ gates(beta), fresh

First order: each group is a constant in the other's step. The step is a pure per-device function; `sharding.map_over`
maps it over a mesh, and gradients, BN statistics and metrics are means over `axis_name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from prdarts_jax.data.batches import Batch
from prdarts_jax.devices.sharding import mean_over
from prdarts_jax.gates import Gates
from prdarts_jax.ops.losses import accuracy, cross_entropy
from prdarts_jax.optimizers import arch_transform, set_learning_rate, weight_transform
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import Space
from prdarts_jax.strategy import Arch, Numbers, Strategy

__all__ = [
    "Batch",
    "Batches",
    "SearchState",
    "accuracy",
    "arch_transform",
    "cross_entropy",
    "init_state",
    "make_search_step",
    "mean_over",
    "set_learning_rate",
    "weight_transform",
]

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class SearchState:
    """Everything a bilevel step changes."""

    step: jax.Array  # int32[], steps done since the start of the search
    weights: Any  # float32 tree, see supernet.init
    arch: Any  # float32 tree, see Strategy.init
    weight_opt: Any  # state of weight_tx
    arch_opt: Any  # state of arch_tx


class Batches(NamedTuple):
    """The two batches of a step."""

    train: Batch
    val: Batch


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
    return SearchState(jnp.zeros((), jnp.int32), weights, arch, weight_tx.init(weights), arch_tx.init(arch))


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
    """A pure function (state, batches, key, numbers) -> (state, metrics): one step of each of the two groups.

    Args:
      space: the search space.
      strategy: the method; `strategy.traits.order` says which group moves first.
      weight_tx, arch_tx: any optax transformations; neither sees the other group's gradients or state.
      axis_name: mapped axis over which the batches are split; None on one device.
      local_batch_norm: BN statistics of each device's part of a batch; gradients and metrics stay means over the axis.
      apply: the network, `supernet.apply` or (small spaces, tests) `supernet.apply_reference`.

    Returns:
      step. Its key must be the same on all devices (all devices sample one architecture). `numbers` holds the
      strategy's numbers of the epoch and `weight_learning_rate`, `arch_learning_rate` (optional) as scalars: changing
      them does not recompile. Metrics are float32 scalars, validation metrics taken before the architecture moves.
    """

    norm_axis = None if local_batch_norm else axis_name

    def losses(weights: Any, gates: Gates, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits, _ = apply(weights, gates, batch.images, space=space, axis_name=norm_axis)
        return cross_entropy(logits, batch.labels), accuracy(logits, batch.labels)

    def weight_step(state: SearchState, batch: Batch, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
        gates = strategy.sample(key, state.arch, numbers)
        (loss, acc), grads = jax.value_and_grad(losses, has_aux=True)(state.weights, gates, batch)
        loss, acc, grads = mean_over(axis_name, (loss, acc, grads))
        opt = set_learning_rate(state.weight_opt, numbers.get("weight_learning_rate"))
        updates, opt = weight_tx.update(grads, opt, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        metrics = {
            "train_loss": loss,
            "train_accuracy": acc,
            "gradient_norm/weights": optax.global_norm(grads),
            # Not finite when the new weights are not: they may be saved before anything is computed with them.
            "update_norm/weights": optax.global_norm(updates),
        }
        return dataclasses.replace(state, weights=weights, weight_opt=opt), metrics

    def arch_step(state: SearchState, batch: Batch, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
        def validation(arch: Arch) -> tuple[jax.Array, tuple[jax.Array, Gates]]:
            gates = strategy.sample(key, arch, numbers)
            loss, acc = losses(state.weights, gates, batch)
            return loss, (acc, gates)

        (loss, (acc, gates)), grads = jax.value_and_grad(validation, has_aux=True)(state.arch)
        loss, acc, grads = mean_over(axis_name, (loss, acc, grads))
        metrics = {"val_loss": loss, "val_accuracy": acc, "gradient_norm/cross_entropy": optax.global_norm(grads)}
        # The penalty depends on arch alone, not on data, so its gradient is the same on every device. The scalar moves
        # the architecture; one gradient a term (a few hundred numbers each) shows which force does.
        total, pull = jax.value_and_grad(lambda arch: strategy.penalty(arch, gates, numbers)[0])(state.arch)
        grads = jax.tree.map(jnp.add, grads, pull)
        _, terms = strategy.penalty(state.arch, gates, numbers)
        if terms:
            per_term = jax.jacrev(lambda arch: strategy.penalty(arch, gates, numbers)[1])(state.arch)
            metrics |= {f"penalty/{name}": value for name, value in terms.items()}
            metrics |= {f"gradient_norm/{name}": optax.global_norm(g) for name, g in per_term.items()}
        metrics["penalty/total"] = total
        if "saturated" in gates.stats:
            metrics["gates/saturated"] = gates.stats["saturated"]
        opt = set_learning_rate(state.arch_opt, numbers.get("arch_learning_rate"))
        updates, opt = arch_tx.update(grads, opt, state.arch)
        metrics["update_norm/arch"] = optax.global_norm(updates)
        return dataclasses.replace(state, arch=optax.apply_updates(state.arch, updates), arch_opt=opt), metrics

    def step(state: SearchState, batches: Batches, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
        chex.assert_rank([batches.train.images, batches.val.images], 4)
        weight_key, arch_key = jax.random.split(key)
        first = ("weights", "arch") if strategy.traits.order == "weights_first" else ("arch", "weights")
        metrics: Metrics = {}
        for group in first:
            if group == "weights":
                state, found = weight_step(state, batches.train, weight_key, numbers)
            else:
                state, found = arch_step(state, batches.val, arch_key, numbers)
            metrics |= found
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return dataclasses.replace(state, step=state.step + 1), metrics

    return step
