"""Transforms: functions Strategy -> Strategy that add one idea to any method, as optax chains transformations.

    frozen           the architecture rests in the first epochs
    edge_weights     node_n = sum over j of softmax(edges)_j mixed_j: edge normalisation of PC-DARTS
    stop_at_skips    the search ends when the normal cell has so many skip connections: DARTS+
    at_most_skips    so many skip connections are left when a cell is derived: P-DARTS
    perturbed        the weights see perturbed gates: SmoothDARTS

`strategies.composition` reads them from a command line. Others, with a file of their own, are there too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import Losses, Optimizers, Step
from prdarts_jax.config.schema import require
from prdarts_jax.devices.sharding import mean_over
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.gates import Gates
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES
from prdarts_jax.strategies.nesting import with_arch
from prdarts_jax.strategy import Arch, Event, Memory, Numbers, Stop, Strategy, Tables, View

MODES = ("random", "adversarial")
_EDGES, _PERTURBATION = 2**32 - 1, 2**32 - 2  # in the place of a cell type's number: keys of their own


def frozen(strategy: Strategy, *, epochs: int | None = None, share: float = 0.3) -> Strategy:
    """The architecture rests in the first epochs of a stage; its half of a step is then left out.

    Args:
      strategy: any.
      epochs: how many; None: the share.
      share: of the epochs of the stage (PC-DARTS: 15 of 50).

    Raises:
      UserError: a value that is not possible; from `schedule`, if nothing of the stage is left.

    >>> from prdarts_jax.space import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = frozen(get("darts", space=Space()), epochs=2)
    >>> [strategy.schedule(epoch, 4)["arch_on"] for epoch in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    """
    require(epochs is None or epochs >= 0, "method.transforms.frozen.epochs", epochs, ">= 0")
    require(0 <= share < 1, "method.transforms.frozen.share", share, "in [0, 1)")

    def schedule(epoch: int, of: int) -> dict[str, float]:
        rest = round(share * of) if epochs is None else epochs
        require(rest < of, "method.transforms.frozen.epochs", rest, f"0..{of - 1}, less than the epochs of a stage")
        numbers = strategy.schedule(epoch, of)
        return numbers | {"arch_on": float(epoch >= rest and numbers.get("arch_on", 1.0) > 0)}

    return strategy._replace(schedule=schedule)


def edge_weights(strategy: Strategy, *, init_scale: float = 1e-3) -> Strategy:
    """Edge normalisation: the edges into a node are weighted by a softmax of parameters of their own.

        node_n = sum over j of softmax(b)_(j->n) mixed_(j->n);   score of a pair = softmax(b)_edge times its score

    The parameters belong to the architecture: {"base": of the method, "edges": {"normal", "reduce"} -> float32[E]}.
    Source: Xu et al., PC-DARTS, ICLR 2020, eq. 4.

    Args:
      strategy: any.
      init_scale: they start at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> from prdarts_jax.space import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = edge_weights(get("darts", space=Space()))
    >>> gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), (), {}, "eval")
    >>> [round(float(w), 2) for w in gates.edges["normal"][:5]]  # two edges into the first node, three into the next
    [0.5, 0.5, 0.33, 0.33, 0.33]
    """
    require(0 <= init_scale < float("inf"), "method.transforms.edge_weights.init_scale", init_scale, ">= 0, finite")
    space = strategy.space
    into = jnp.asarray([target for _, target in space.edges])

    def init(key: jax.Array) -> Arch:
        drawn = init_scale * jax.random.normal(jax.random.fold_in(key, _EDGES), (2, space.num_edges))
        return {"base": strategy.init(key), "edges": dict(zip(CELL_TYPES, drawn, strict=True))}

    def shares(arch: Arch) -> dict[str, jax.Array]:
        """Softmax over the edges into each node, float32[E]."""
        same = into[:, None] == into[None, :]
        return {
            kind: jax.nn.softmax(jnp.where(same, b[None, :], -jnp.inf), axis=1).diagonal()
            for kind, b in arch["edges"].items()
        }

    inner = with_arch(strategy, inside=lambda arch: arch["base"], outside=lambda arch, base: {**arch, "base": base})

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        gates, own = inner.sample(key, arch, memory, numbers, role), shares(arch)
        before = gates.edges
        if before is None:
            return dataclasses.replace(gates, edges=own)
        edges = {kind: jnp.broadcast_to(own[kind], before[kind].shape) * before[kind] for kind in CELL_TYPES}
        return dataclasses.replace(gates, edges=edges)

    def scores(arch: Arch) -> Tables:
        own = shares(arch)
        return {k: np.asarray(table) * np.asarray(own[k])[:, None] for k, table in inner.scores(arch).items()}

    return inner._replace(init=init, sample=sample, scores=scores)


def stop_at_skips(strategy: Strategy, *, skips: int = 2, from_epoch: int | None = None, share: float = 0.0) -> Strategy:
    """The search ends when the derived normal cell has so many skip connections.

    The criterion of DARTS+ (Liang et al. 2019) as others report it; the paper itself was not at hand.

    Args:
      strategy: any.
      skips: how many end the search.
      from_epoch: the first epoch of a stage after which the cell is looked at; None: the share.
      share: of the epochs of the stage.

    Raises:
      UserError: a value that is not possible.

    >>> from prdarts_jax.space import Space
    >>> from prdarts_jax.strategies import get
    >>> stop_at_skips(get("darts", space=Space()), skips=0)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: method.transforms.stop_at_skips.skips: 0 is not possible; allowed: >= 1
    """
    require(skips >= 1, "method.transforms.stop_at_skips.skips", skips, ">= 1")
    field = "method.transforms.stop_at_skips"
    require(from_epoch is None or from_epoch >= 0, f"{field}.from_epoch", from_epoch, ">= 0")
    require(0 <= share < 1, f"{field}.share", share, "in [0, 1)")

    def at_epoch(view: View) -> Event | None:
        event, found = strategy.at_epoch(view), view.genotype.skips("normal")
        first = round(share * view.epochs) if from_epoch is None else from_epoch
        if isinstance(event, Stop) or view.epoch < first or found < skips:
            return event
        return Stop(view.genotype, f"the normal cell has {found} skip connections (stop_at_skips: {skips})")

    return strategy._replace(at_epoch=at_epoch)


def at_most_skips(strategy: Strategy, *, skips: int = 2) -> Strategy:
    """A derived normal cell keeps the best so many skip connections.

    While it has more, the chosen skip connection with the lowest score gets the lowest score of all, and the cell is
    derived again: its edge then takes another operation, or gives way to another edge. Source: Chen et al., P-DARTS,
    ICCV 2019, section 3.3, and its program.

    Args:
      strategy: one whose genotype is `select(scores(arch))`.
      skips: how many are left.

    Raises:
      UserError: a strategy that derives in another way, or a value that is not possible.

    >>> from prdarts_jax.space import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = at_most_skips(get("darts", space=Space()), skips=1)
    >>> table = np.full((14, 8), 0.1); table[:, 3] = 0.3
    >>> strategy.select({"normal": table, "reduce": table}).skips("normal")
    1
    """
    require(skips >= 0, "method.transforms.at_most_skips.skips", skips, ">= 0")
    if not strategy.derives_from_scores:
        raise UserError("method.transforms: at_most_skips needs a method that derives its genotype from scores")
    space = strategy.space

    def select(scores: Tables) -> Genotype:
        tables = {kind: np.array(table, np.float64) for kind, table in scores.items()}
        while True:
            genotype = strategy.select(tables)
            chosen = [
                (tables["normal"][e, o], e, o)
                for node, pairs in enumerate(genotype.normal, start=2)
                for op, source in pairs
                for e, o in [(space.edges.index((source, node)), space.ops.index(op))]
                if space.group("skip")[o] and np.isfinite(tables["normal"][e, o])
            ]
            if genotype.skips("normal") <= skips or not chosen:
                return genotype
            _, e, o = min(chosen)
            tables["normal"][e, o] = -np.inf

    return strategy._replace(select=select)


def perturbed(strategy: Strategy, *, mode: str = "random", epsilon: float = 0.3, steps: int = 7) -> Strategy:
    """The weights descend the loss at perturbed gates, the architecture that at its own.

    "random": gates + U(-e, e); "adversarial": the gates within e that raise the loss of the train batch, by ascent in
    steps of 2e/steps along the sign of the gradient. Executed gates alone move; they stay at least 0, and those of an
    edge keep their sum. e rises linearly from 0 to epsilon over the epochs of a stage. After Chen and Hsieh,
    SmoothDARTS, ICML 2020, as others describe it: step size and start of the ascent were not checked against it.

    Args:
      strategy: any whose weights descend a loss of their own; meant for mixtures. One that moves both groups by one
        loss (`joint`) asks for no gates of the weights, and nothing is perturbed.
      mode: "random" or "adversarial" (costs `steps` passes more a step).
      epsilon: e in the last epoch.
      steps: of the ascent.

    Raises:
      UserError: a value that is not possible.

    >>> from prdarts_jax.space import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = perturbed(get("darts", space=Space()))
    >>> [round(strategy.schedule(epoch, 4)["perturbation"], 3) for epoch in range(4)]
    [0.0, 0.1, 0.2, 0.3]
    """
    if mode not in MODES:
        raise unknown("method.transforms.perturbed.mode", mode, MODES)
    require(0 < epsilon < float("inf"), "method.transforms.perturbed.epsilon", epsilon, "> 0, finite")
    require(steps >= 1, "method.transforms.perturbed.steps", steps, ">= 1")

    def schedule(epoch: int, epochs: int) -> dict[str, float]:
        return strategy.schedule(epoch, epochs) | {"perturbation": epsilon * epoch / max(epochs - 1, 1)}

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        gates = strategy.sample(key, arch, memory, numbers, role)
        if role != "weights" or mode != "random":
            return gates
        keys = jax.random.split(jax.random.fold_in(key, _PERTURBATION), len(CELL_TYPES))
        noise = {
            kind: jax.random.uniform(k, gates.ops[kind].shape, minval=-1.0, maxval=1.0)
            for kind, k in zip(CELL_TYPES, keys, strict=True)
        }
        return _moved(gates, {kind: numbers["perturbation"] * noise[kind] for kind in CELL_TYPES})

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        if mode != "adversarial":
            return strategy.rule(losses, optimizers)
        weight = losses.weight  # the fast form finds the shift for the twice differentiable one too

        def gates(weights: Any, arch: Any, memory: Any, batch: Any, key: jax.Array, numbers: Numbers) -> Gates:
            drawn = weight.gates(weights, arch, memory, batch, key, numbers)
            still, e = lax.stop_gradient((weights, drawn)), numbers["perturbation"]

            def loss(delta: dict[str, jax.Array]) -> jax.Array:
                return weight.network(still[0], _moved(still[1], delta), batch, key, numbers)[0]

            def ascend(_: int, delta: dict[str, jax.Array]) -> dict[str, jax.Array]:
                slope = mean_over(weight.axis_name, jax.grad(loss)(delta))
                return jax.tree.map(lambda d, g: jnp.clip(d + 2 * e / steps * jnp.sign(g), -e, e), delta, slope)

            delta = lax.fori_loop(0, steps, ascend, jax.tree.map(jnp.zeros_like, drawn.ops))
            return _moved(drawn, lax.stop_gradient(delta))

        twice = dataclasses.replace(losses.twice, gates=gates)
        return strategy.rule(losses._replace(weight=dataclasses.replace(weight, gates=gates), twice=twice), optimizers)

    return strategy._replace(schedule=schedule, sample=sample, rule=rule)


def _moved(gates: Gates, delta: Mapping[str, jax.Array]) -> Gates:
    """Gates + delta where they are executed, at least 0, with the sum of each edge as before."""
    ops = {}
    for kind, before in gates.ops.items():
        mask = jnp.broadcast_to(gating.executed_mask(gates.executed[kind], before.shape[-1]), before.shape)
        after = jnp.where(mask, jnp.maximum(before + delta[kind], 0.0), 0.0)
        total = jnp.sum(after, axis=-1, keepdims=True)
        ops[kind] = after * (jnp.sum(before, axis=-1, keepdims=True) / jnp.maximum(total, 1e-12))
    return dataclasses.replace(gates, ops=ops)
