"""BayesNAS-like: scalar switches with a group lasso whose weights are learnt, pruned by the variance of their prior.

    node_n = sum over edges s_e sum over operations s_(e,o) op_o(x);  w and s descend  CE + sum_g lambda_g omega_g |s_g|
    H = mean of (dCE/ds)^2 over an epoch, times the batch size, / lambda        (diagonal Gauss-Newton, empirical)
    omega_g = sqrt(sum over cells of H / (1 + gamma_g H)),   gamma_g = |s_g| / omega_g          (after every epoch)
    1 / gamma_(e,o) = 1 / gamma + 1 / gamma_e   for an operation of an edge;   kept: gamma_(e,o) >= threshold

A group is a switch of all cells of a type. H/(1 + gamma H) is 1/gamma - C/gamma^2 with C = 1/(1/gamma + H).
Zhou, Yang, Wang, Pan: BayesNAS: A Bayesian Approach for Neural Architecture Search, ICML 2019.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import Batch, Evaluated, Losses, Optimizers, SearchState, Step, joint
from prdarts_jax.config.schema import require
from prdarts_jax.gates import Gates
from prdarts_jax.space.derive import derive_edges, derive_pairs
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.sampling import check_finite
from prdarts_jax.strategies.transforms import frozen
from prdarts_jax.strategy import Arch, Continue, Event, Memory, Numbers, Stop, Strategy, Tables, View

_START = 0.5  # of omega and gamma: the mean of the program's random start


def bayesnas(
    *,
    space: Space,
    lambda_edges: float = 0.01,
    lambda_ops: float = 0.01,
    threshold: float = 0.5,
    pairs: int = 2,
    warm_up: float = 0.5,
) -> Strategy:
    """A strategy after BayesNAS, on the space of DARTS: parity with published figures cannot be claimed.

    What differs: the Hessian of a switch is the empirical diagonal Gauss-Newton (the program propagates a layerwise
    diagonal through the network of one batch); a switch of an edge multiplies what the edge gives, not its input, which
    the normalisation of this space would undo; all edges of the cell are there (the program has 8 of 14); omega and
    gamma start at their random start's mean; they move after every epoch past the warm-up (the program: once); the
    threshold is explicit, where the authors prune by hand. They say that their code is insufficient to reproduce the
    paper.

    Args:
      space: the search space; meant without `none`.
      lambda_edges, lambda_ops: coefficients of the group lasso (models of the authors are named .005, .007 and .01).
      threshold: of gamma; groups below it are pruned when the search ends.
      pairs: of a node, at most, the best by gamma and with distinct inputs; 0: all that are left.
      warm_up: share of the epochs in which the weights alone move (published: 1 of 2).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = bayesnas(space=Space(cells=3))
    >>> {name: leaf.shape for name, leaf in strategy.init(jax.random.key(0)).items()}
    {'edges': (3, 14), 'ops': (3, 14, 8)}
    """
    check_finite(threshold=threshold)
    for name, value in (("lambda_edges", lambda_edges), ("lambda_ops", lambda_ops)):
        require(0 < value < float("inf"), f"method.options.{name}", value, "> 0, finite")
    require(pairs >= 0, "method.options.pairs", pairs, ">= 0 (0: all)")
    require(0 <= warm_up < 1, "method.options.warm_up", warm_up, "in [0, 1)")
    shapes = {"edges": (space.cells, space.num_edges), "ops": (space.cells, space.num_edges, space.num_ops)}
    lambdas = {"edges": lambda_edges, "ops": lambda_ops}
    of_type = {kind: np.array([cell.kind == kind for cell in space.layout]) for kind in CELL_TYPES}

    def init(key: jax.Array) -> Arch:
        del key
        return {name: jnp.ones(shape, jnp.float32) for name, shape in shapes.items()}

    def start(value: float) -> dict[str, dict[str, np.ndarray]]:
        groups = {name: np.full(shape[1:], value, np.float32) for name, shape in shapes.items()}
        return {kind: groups for kind in CELL_TYPES}

    memory = {
        "omega": start(_START),
        "gamma": start(_START),
        "squares": {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        "steps": np.zeros((), np.float32),
    }

    def norms(arch: Arch, kind: str) -> dict[str, jax.Array]:
        """|s_g| of the groups of a type; its gradient at 0 is 0."""
        rows = np.flatnonzero(of_type[kind])
        squares = {name: jnp.sum(leaf[rows] ** 2, axis=0) for name, leaf in arch.items()}
        return {name: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0) for name, x in squares.items()}

    def lasso(arch: Arch, memory: Memory) -> jax.Array:
        total: Any = 0.0
        for kind in CELL_TYPES:
            for name, norm in norms(arch, kind).items():
                norm = norm if name == "edges" else jnp.where(jnp.asarray(space.allowed[kind]), norm, 0.0)
                total = total + lambdas[name] * jnp.sum(memory["omega"][kind][name] * norm)
        return total

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        ops = {kind: jnp.where(jnp.asarray(space.allowed[kind][None]), arch["ops"], 0.0) for kind in CELL_TYPES}
        executed = {kind: gating.all_ops(space.allowed[kind]) for kind in CELL_TYPES}
        return Gates(ops, executed, dict.fromkeys(CELL_TYPES, arch["edges"]))

    def objective(
        ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # In the warm-up the switches rest, and so does what is known of them.
        term = numbers.get("arch_on", 1.0) * lasso(arch, memory)
        return ce + term, {"lasso": term}

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        axis = losses.full.axis_name

        def step(state: SearchState, batches: Any, key: jax.Array, numbers: Numbers) -> Any:
            on = jnp.asarray(numbers.get("arch_on", 1.0), jnp.float32)

            def observe(state: SearchState, found: Evaluated, batch: Batch) -> Memory:
                images = batch.labels.shape[0] * (1 if axis is None else lax.psum(1, axis))
                of_lasso = jax.grad(lambda arch: on * lasso(arch, state.memory))(losses.own(state.arch))
                slope = jax.tree.map(jnp.subtract, losses.own(found.arch), of_lasso)
                old = state.memory["squares"]
                squares = jax.tree.map(lambda s, g: s + on.astype(s.dtype) * images * g**2, old, slope)
                return {**state.memory, "squares": squares, "steps": state.memory["steps"] + on}

            return joint(observe)(losses, optimizers)(state, batches, key, numbers)

        return step

    def at_epoch(view: View) -> Event | None:
        if float(view.memory["steps"]) == 0:
            return None
        after, gamma = updated(view.arch, view.memory), {}
        memory = {**after, "squares": jax.tree.map(np.zeros_like, view.memory["squares"]), "steps": np.float32(0)}
        if view.epoch + 1 < view.epochs:
            return Continue(memory)
        gamma = {kind: after["gamma"][kind]["ops"] for kind in CELL_TYPES}
        groups = np.concatenate([gamma[kind][space.allowed[kind]] for kind in CELL_TYPES])
        small = int((groups < threshold).sum())
        return Stop(kept(gamma), f"{small} of {groups.size} operations have gamma below {threshold:g}")

    def updated(arch: Arch, memory: Memory) -> dict[str, Any]:
        """Omega and gamma after an epoch."""
        omega: dict[str, Any] = {}
        gamma: dict[str, Any] = {}
        for kind in CELL_TYPES:
            omega[kind], gamma[kind] = {}, {}
            for name, norm in norms(arch, kind).items():
                h = np.asarray(memory["squares"][name], np.float64)[of_type[kind]] / memory["steps"] / lambdas[name]
                old = np.asarray(memory["gamma"][kind][name], np.float64)
                weight = np.sqrt(np.sum(h / (1 + old * h), axis=0))
                own = np.asarray(norm, np.float64) / np.maximum(weight, _LEAST)
                if name == "ops":
                    own = 1 / (1 / np.maximum(own, _LEAST) + 1 / np.maximum(gamma[kind]["edges"], _LEAST)[:, None])
                omega[kind][name] = weight.astype(np.float32)
                gamma[kind][name] = np.minimum(own, 1 / _LEAST).astype(np.float32)
        return {"omega": omega, "gamma": gamma}

    def kept(gamma: Tables) -> Genotype:
        if pairs == 0:
            return derive_edges(gamma, space, per_edge=space.num_ops, least=threshold)
        return derive_pairs(gamma, space, pairs=pairs, least=threshold)

    def scores(arch: Arch) -> dict[str, np.ndarray]:
        """|s_e| |s_(e,o)|: what there is to rank before gamma is known."""
        tables = {}
        for kind in CELL_TYPES:
            found = {name: np.asarray(norm, np.float64) for name, norm in norms(arch, kind).items()}
            tables[kind] = np.where(space.allowed[kind], found["edges"][:, None] * found["ops"], 0.0)
        return tables

    def probabilities(arch: Arch, numbers: Numbers) -> dict[str, jax.Array]:
        """The root mean square of a switch over the cells of a type, at most 1."""
        tables = {}
        for kind in CELL_TYPES:
            square = jnp.mean((arch["edges"][..., None] * arch["ops"])[np.flatnonzero(of_type[kind])] ** 2, axis=0)
            tables[kind] = jnp.where(jnp.asarray(space.allowed[kind]), jnp.minimum(jnp.sqrt(square), 1.0), 0.0)
        return tables

    strategy = Strategy(
        space=space,
        init=init,
        schedule=lambda epoch, epochs: {},
        sample=sample,
        objective=objective,
        probabilities=probabilities,
        scores=scores,
        rule=rule,
        memory=memory,
        at_epoch=at_epoch,
    )
    return frozen(strategy, share=warm_up) if warm_up else strategy


_LEAST = 1e-12  # of a divisor
