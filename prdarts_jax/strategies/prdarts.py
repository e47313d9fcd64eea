"""PR-DARTS: independent hard-concrete gates, group-structured penalties, path-depth regularisation.

    min over beta of  CE_val + lambda1 L_skip + lambda2 L_nonskip - lambda3 L_path,   each L the mean of both cell types

Zhou, Xiong, Socher, Hoi: Theory-Inspired Path-Regularized Differential Network Architecture Search, NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import gates as gating
from prdarts_jax import regularizers
from prdarts_jax.config.schema import require
from prdarts_jax.errors import unknown
from prdarts_jax.gates import Gates
from prdarts_jax.space.derive import derive_pairs, init_normal
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy

SUBSAMPLES = ("topk_gate", "uniform", "all")
SCORES = ("probability", "softmax")
# Within these temperatures float32 holds (ln u - ln(1-u) + beta)/tau and its square with room to spare: the noise is at
# most ln(2^126) = 87, so at 1e-3 the logit is about 1e5, and at 1e6 it still differs from 0.
TAU_RANGE = (1e-3, 1e6)


def prdarts(
    *,
    space: Space,
    tau_max: float = 10.0,
    tau_min: float = 0.1,
    a: float = -0.1,
    b: float = 1.1,
    op_subsample: str = "topk_gate",
    executed_ops: int = 2,
    straight_through: bool = False,
    gate_dropout: float = 0.0,
    lambda1: float = 0.01,
    lambda2: float = 0.005,
    lambda3: float = 0.005,
    path_reduction: str = "sum",
    executed_mask: bool = False,
    pool_group: bool = False,
    hinge: float = 0.0,
    derive_score: str = "probability",
    distinct_inputs: bool = True,
    init_scale: float = 1e-3,
) -> Strategy:
    """The PR-DARTS strategy; defaults as published, the released program differs where noted.

    Args:
      space: the search space.
      tau_max, tau_min: temperature, linear from the first to the last epoch (released: tau_max 1); 1e-3 to 1e6.
      a, b: ends of the stretched interval of the gates, a < 0 < 1 < b.
      op_subsample: executed operations of an edge: the largest sampled gates ("topk_gate"), "uniform" at random, "all".
      executed_ops: K, operations executed an edge and forward (ignored by "all").
      straight_through: executed gates count 1 in the forward pass (released).
      gate_dropout: probability that 1 is taken from a gate before the top-K choice (released: 0.4).
      lambda1, lambda2, lambda3: coefficients of L_skip, L_nonskip, -L_path.
      path_reduction: "sum" (eq. 8) or "mean" (released) over the convolutions of a path edge.
      executed_mask: penalties on the executed operations only (released).
      pool_group: pools are a group of their own in the non-skip penalty (released).
      hinge: a group is penalised by what its mean P exceeds this by (released: 0.2).
      derive_score: rank pairs by "probability" or by the "softmax" of beta an edge (released).
      distinct_inputs: a node's two pairs have distinct inputs (released: False).
      init_scale: beta starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = prdarts(space=Space())
    >>> strategy.schedule(0, 200)["tau"], round(strategy.schedule(199, 200)["tau"], 6)
    (10.0, 0.1)
    """
    numbers = {"a": a, "b": b, "lambda1": lambda1, "lambda2": lambda2, "lambda3": lambda3, "hinge": hinge}
    for name, value in (numbers | {"init_scale": init_scale}).items():
        _check(name, value, math.isfinite(value), "a finite number")
    gating.check_interval(a, b)
    for name, value in (("tau_min", tau_min), ("tau_max", tau_max)):
        _check(name, value, TAU_RANGE[0] <= value <= TAU_RANGE[1], "{:g} to {:g}".format(*TAU_RANGE))
    _check("executed_ops", executed_ops, 1 <= executed_ops <= space.num_ops, f"1 to {space.num_ops}, the operations")
    _check("gate_dropout", gate_dropout, 0 <= gate_dropout < 1, "in [0, 1)")
    _check("init_scale", init_scale, init_scale >= 0, ">= 0")
    for option, chosen, names in (
        ("op_subsample", op_subsample, SUBSAMPLES),
        ("path_reduction", path_reduction, regularizers.PATH_REDUCTIONS),
        ("derive_score", derive_score, SCORES),
    ):
        if chosen not in names:
            raise unknown(f"method.options.{option}", chosen, names)

    def schedule(epoch: int, epochs: int) -> dict[str, float]:
        fraction = epoch / (epochs - 1) if epochs > 1 else 1.0
        tau = tau_max - (tau_max - tau_min) * fraction
        coefficients = {"lambda1": lambda1, "lambda2": lambda2, "lambda3": lambda3}
        return {"tau": tau, **coefficients, "gate_dropout": gate_dropout}

    def probability(beta: jax.Array, numbers: Numbers) -> jax.Array:
        return gating.activation_probability(beta, tau=numbers["tau"], a=a, b=b)

    def choose(key: jax.Array, g: jax.Array, kind: str, numbers: Numbers) -> jax.Array:
        """int32[E,K]: the executed operations for gates g."""
        allowed = space.allowed[kind]
        score_key, tie_key = jax.random.split(key)
        if op_subsample == "all":
            return gating.all_ops(allowed)
        if op_subsample == "uniform":
            return gating.top_k(tie_key, jnp.zeros_like(g), allowed, executed_ops)
        # Drawn at a rate of 0 too, where nothing is dropped: one program serves all rates.
        dropped = jax.random.bernoulli(score_key, numbers["gate_dropout"], g.shape)
        return gating.top_k(tie_key, g - dropped.astype(g.dtype), allowed, executed_ops)

    def gates_of(draw: Callable[[int, str], tuple[jax.Array, jax.Array]]) -> Gates:
        ops, executed, masks = {}, {}, {}
        shares: dict[str, list[jax.Array]] = {"saturated": [], "saturated_executed": [], "edges_without_gradient": []}
        for i, kind in enumerate(CELL_TYPES):
            g, chosen = draw(i, kind)
            mask = gating.executed_mask(chosen, space.num_ops)
            values = gating.straight_through(g) if straight_through else g
            ops[kind] = jnp.where(mask, values, 0.0)
            executed[kind] = chosen if straight_through else gating.void_zeros(chosen, ops[kind])
            masks[kind] = mask
            shares["saturated"].append(gating.saturated_share(g, space.allowed[kind]))
            shares["saturated_executed"].append(gating.saturated_share(g, mask))
            shares["edges_without_gradient"].append(gating.share_without_gradient(g, mask))
        return Gates(ops, executed, None, {"mask": masks, **{name: sum(two) / 2 for name, two in shares.items()}})

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        del memory
        if role == "eval":
            return expected(arch, numbers)

        def draw(i: int, kind: str) -> tuple[jax.Array, jax.Array]:
            noise_key, choice_key = jax.random.split(jax.random.fold_in(key, i))
            g = gating.hard_concrete(noise_key, arch[kind], tau=numbers["tau"], a=a, b=b)
            return g, choose(choice_key, g, kind, numbers)

        return gates_of(draw)

    def expected(arch: Arch, numbers: Numbers) -> Gates:
        def draw(i: int, kind: str) -> tuple[jax.Array, jax.Array]:
            beta, tau, allowed = arch[kind], numbers["tau"], space.allowed[kind]
            k = space.num_ops if op_subsample == "all" else executed_ops
            if op_subsample == "topk_gate":  # what is executed is larger than what is not
                dropout = numbers.get("gate_dropout", 0.0)
                g = gating.expected_executed(beta, allowed, k, tau=tau, dropout=dropout, a=a, b=b)
            else:
                g = gating.expected_gate(beta, tau=tau, a=a, b=b)
            # Ranked by beta, of which E[g] is an increasing function: ties of saturated gates cannot occur.
            return g, gating.top_k(jax.random.key(0), beta, allowed, k)

        return gates_of(draw)

    def objective(
        ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del memory
        p = {kind: probability(arch[kind], numbers) for kind in CELL_TYPES}
        masks = {kind: gates.stats["mask"][kind] if executed_mask else None for kind in CELL_TYPES}

        def group(columns: np.ndarray) -> jax.Array:
            normal, reduce = (regularizers.group_term(p[k], columns, space, k, masks[k]) for k in CELL_TYPES)
            mean = (normal + reduce) / 2
            return jnp.maximum(mean - hinge, 0.0) if hinge else mean

        skips, pools = space.group("skip"), space.group("pool")
        nonskip = group(~skips & ~pools) + group(pools) if pool_group else group(~skips)
        path = sum(
            regularizers.path_depth_term(p[k], space, masks[k], kind=k, reduction=path_reduction) for k in CELL_TYPES
        )
        terms = {
            "skip": numbers["lambda1"] * group(skips),
            "nonskip": numbers["lambda2"] * nonskip,
            "path": -numbers["lambda3"] * path / 2,
        }
        return ce + (terms["skip"] + terms["nonskip"] + terms["path"]), terms

    def scores(arch: Arch) -> dict[str, np.ndarray]:
        tables = {}
        for kind in CELL_TYPES:
            beta = np.where(space.allowed[kind], np.asarray(arch[kind], np.float64), -np.inf)
            # P at a temperature of 0, of which P at any other is an increasing function.
            tables[kind] = 1 / (1 + np.exp(-beta)) if derive_score == "probability" else _softmax(beta)
        return tables

    return Strategy(
        space=space,
        init=lambda key: init_normal(key, space, init_scale),
        schedule=schedule,
        sample=sample,
        objective=objective,
        probabilities=lambda arch, numbers: {kind: probability(arch[kind], numbers) for kind in CELL_TYPES},
        scores=scores,
        select=lambda scores: derive_pairs(scores, space, distinct_inputs=distinct_inputs),
    )


def _check(name: str, value: float, holds: bool, allowed: str) -> None:
    require(holds, f"method.options.{name}", value, allowed)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
