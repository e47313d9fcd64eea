"""ProxylessNAS on cells: one operation an edge is drawn, and all gates, or two of them, get a gradient.

    g = one_hot(o), o drawn from p = softmax(alpha);   dL/d alpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)
    alpha descends  CE_val   or, with a target,  CE_val a (ln E[multiply-adds] / ln target)^b

Cai, Zhu, Han: ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware, ICLR 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import Batches, Losses, Metrics, Optimizers, SearchState, Step, alternating
from prdarts_jax.config.schema import require
from prdarts_jax.errors import unknown
from prdarts_jax.gates import Gates
from prdarts_jax.network.counts import pair_costs
from prdarts_jax.space.derive import init_normal
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import sampling
from prdarts_jax.strategies.cost import amount, expected_cost
from prdarts_jax.strategies.transforms import frozen
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy, cross_entropy_alone

MODES = ("full", "two")


def proxyless(
    *,
    space: Space,
    mode: str = "full",
    weight_steps: int = 5,
    warm_up: float = 0.25,
    macs: str = "",
    cost_scale: float = 0.2,
    cost_power: float = 0.3,
    cells: int = 20,
    channels: int = 36,
    image: int = 32,
    stem: str = "cifar",
    init_scale: float = 1e-3,
) -> Strategy:
    """The path binarisation of ProxylessNAS on the cells of DARTS: its own space is a chain of blocks, not this one.

    The weights are trained along one drawn path; the architecture moves in every fifth step. The cell is derived as in
    DARTS (two edges a node), since a chain has no such choice. The latency of a device is replaced by multiply-adds of
    the derived network. (The program leaves an edge alone in a step that drew `none` for it; here it gets the gradient
    of the equation. Its reinforcement learning and its additive cost are not here: see the transform `cost`.)

    Args:
      space: the search space.
      mode: whose gates get a gradient. "full": all of an edge, each executed in a step of the architecture; "two": of
        two operations drawn without replacement from p, p between them alone; their share of p stays as it was.
      weight_steps: steps of the weights to one of the architecture.
      warm_up: share of the epochs in which the weights alone move (published: 40 of 160).
      macs: target of the multiplicative cost, as 600M (K, M, G); "": no cost.
      cost_scale, cost_power: a and b.
      cells, channels, image (pixels), stem ("cifar" | "imagenet"): of the derived network whose cost is expected.
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = proxyless(space=Space(), mode="two")
    >>> arch = strategy.init(jax.random.key(1))
    >>> [strategy.sample(jax.random.key(0), arch, (), {}, r).executed["normal"].shape for r in ("weights", "arch")]
    [(14, 1), (14, 2)]
    """
    if mode not in MODES:
        raise unknown("method.options.mode", mode, MODES)
    require(weight_steps >= 1, "method.options.weight_steps", weight_steps, ">= 1")
    require(0 <= warm_up < 1, "method.options.warm_up", warm_up, "in [0, 1)")
    require(image >= 1, "method.options.image", image, ">= 1")
    sampling.check_finite(cost_scale=cost_scale, cost_power=cost_power, init_scale=init_scale)

    def two(alpha: jax.Array, key: jax.Array, i: int, allowed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(drawn operation, p between the two candidates, the candidates int32[E,2])."""
        drawn = alpha + sampling.gumbel_noise(key, space)[CELL_TYPES[i]]
        pair = gating.top_k(jax.random.key(0), drawn, allowed, 2)  # the largest of noisy logits: without replacement
        between = jnp.where(gating.executed_mask(pair, space.num_ops), alpha, -jnp.inf)
        again = between + pair_noise(key, space)[CELL_TYPES[i]]
        return jnp.argmax(again, axis=1), jax.nn.softmax(between, axis=1), pair

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        del memory, numbers
        noise, ops, executed = sampling.gumbel_noise(key, space), {}, {}
        for i, (kind, alpha) in enumerate(sampling.logits(arch, space).items()):
            if role == "arch" and mode == "two":
                chosen, p, executed[kind] = two(alpha, key, i, space.allowed[kind])
            else:
                chosen = jnp.argmax(alpha if role == "eval" else alpha + noise[kind], axis=1)
                p, whole = jax.nn.softmax(alpha, axis=1), role == "arch"
                one = chosen.astype(jnp.int32)[:, None]
                executed[kind] = gating.all_ops(space.allowed[kind]) if whole else one
            ops[kind] = sampling.one_hot_through(chosen, p)
        return Gates(ops, executed)

    base = alternating(first="weights", weight_steps=weight_steps)

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        inner = base(losses, optimizers)

        def step(state: SearchState, batches: Batches, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
            after, metrics = inner(state, batches, key, numbers)
            arch = jax.tree.map(with_mass_of, state.arch, after.arch) if mode == "two" else after.arch
            return dataclasses.replace(after, arch=arch), metrics

        return step

    strategy = Strategy(
        space=space,
        init=lambda key: init_normal(key, space, init_scale),
        schedule=lambda epoch, epochs: {},
        sample=sample,
        objective=_cost(space, macs, cost_scale, cost_power, cells, channels, image, stem),
        probabilities=lambda arch, numbers: sampling.softmax(arch, space),
        scores=lambda arch: sampling.softmax(arch, space),
        rule=rule,
    )
    return frozen(strategy, share=warm_up) if warm_up else strategy


def pair_noise(key: jax.Array, space: Space) -> dict[str, jax.Array]:
    """The noise that chooses one of two candidates; `sampling.gumbel_noise` of the key chose these."""
    return sampling.gumbel_noise(jax.random.fold_in(key, len(CELL_TYPES)), space)


def with_mass_of(before: jax.Array, after: jax.Array) -> jax.Array:
    """Moved entries shifted together, so that an edge's sum of exp over them, their share of p, is as before.

    >>> moved = with_mass_of(jnp.array([[0.0, 0.0, 5.0]]), jnp.array([[1.0, -1.0, 5.0]]))
    >>> bool(jnp.allclose(jnp.exp(moved).sum(), 2 + jnp.exp(5.0))), float(moved[0, 2])
    (True, 5.0)
    """
    moved = before != after

    def log_mass(table: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(jnp.where(moved, table, -jnp.inf), axis=-1, keepdims=True)

    shift = jnp.where(jnp.any(moved, axis=-1, keepdims=True), log_mass(after) - log_mass(before), 0.0)
    return jnp.where(moved, after - shift, after)


def _cost(
    space: Space, macs: str, scale: float, power: float, cells: int, channels: int, image: int, stem: str
) -> Callable[..., Any]:
    """CE a (ln E / ln target)^b as an objective; without a target the cross-entropy."""
    if not macs:
        return cross_entropy_alone
    target = amount(macs, "method.options.macs")
    require(target > 1, "method.options.macs", macs, "> 1")
    costs = pair_costs(space, "macs", channels=channels, cells=cells, classes=space.classes, image=image, stem=stem)

    def objective(
        ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        relative = expected_cost(sampling.softmax(arch, space), costs, space, target)
        factor = scale * (1 + jnp.log(relative) / jnp.log(target)) ** power  # ln E = ln target + ln(E/target)
        return ce * factor, {"cost": ce * (factor - 1)}

    return objective
