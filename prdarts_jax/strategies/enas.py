"""After ENAS: a policy over cells learns by REINFORCE from the accuracies of shared weights that it trains.

    R(c) = accuracy(c) on a batch of validation images + entropy * H(c)
    b <- decay b + (1 - decay) R;   policy + adam(mean over `aggregate` cells of (R - b) grad ln pi(c))

Pham, Guan, Zoph, Le, Dean: Efficient Neural Architecture Search via Parameter Sharing, ICML 2018.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from prdarts_jax.config.schema import require
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import cells, sampling
from prdarts_jax.strategies.gradient_free import Proposed, Round, check_counts, gradient_free
from prdarts_jax.strategy import Memory, Strategy

Policy = dict[str, np.ndarray]  # {"edges": float[2,E], "ops": float[2,E,O]}: logits


def enas(
    *,
    space: Space,
    policy_steps: int = 30,
    aggregate: int = 10,
    samples: int = 10,
    learning_rate: float = 0.0035,
    beta1: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-3,
    entropy: float = 1e-4,
    baseline_decay: float = 0.99,
    warm_up: float = 0.0,
    batches: int = 0,
) -> Strategy:
    """The weights are trained on cells that the policy draws; after an epoch the policy moves, then draws candidates.

    The policy is a logit for each edge and for each operation of an edge, without a network that makes them depend on
    each other (published: an LSTM, whose logits are squashed by tanh, and which begins with a bias for convolutions).
    The two inputs of a node are drawn without replacement (published: with). The baseline begins with the first reward
    (published: with 0).

    Args:
      space: the search space.
      policy_steps: of the policy after an epoch.
      aggregate: cells in each of them, judged on one batch of validation images each.
      samples: cells that are then drawn and judged for the result.
      learning_rate, beta1, beta2, eps: of the policy's Adam.
      entropy: weight of the entropy in the reward.
      baseline_decay: of the moving average of rewards.
      warm_up: share of the epochs after which the policy rests.
      batches: of validation images in the judgement of a sample; 0: all.

    Raises:
      UserError: a value that is not possible.

    >>> strategy = enas(space=Space(nodes=1))
    >>> sorted(strategy.memory), strategy.memory["policy"]["ops"].shape
    (['baseline', 'first', 'policy', 'second', 'steps'], (2, 2, 8))
    """
    check_counts(policy_steps=policy_steps, aggregate=aggregate, samples=samples)
    sampling.check_finite(learning_rate=learning_rate, entropy=entropy)
    require(0 < eps < float("inf"), "method.options.eps", eps, "> 0, finite")
    for name, value in (("beta1", beta1), ("beta2", beta2), ("baseline_decay", baseline_decay)):
        require(0 <= value < 1, f"method.options.{name}", value, "in [0, 1)")

    def propose(now: Round) -> Proposed:
        policy: Policy = {name: np.array(table, np.float64) for name, table in now.memory["policy"].items()}
        moments: list[Policy] = [
            {name: np.array(table, np.float64) for name, table in now.memory[which].items()}
            for which in ("first", "second")
        ]
        baseline, steps = float(now.memory["baseline"]), int(now.memory["steps"])
        for _ in range(policy_steps):
            total = {name: np.zeros_like(table) for name, table in policy.items()}
            for k in range(aggregate):
                choice, slope, h = drawn(now.rng, policy, space)
                reward = now.worth(choice, batches=1, first=steps * aggregate + k) + entropy * h
                baseline = reward if steps == k == 0 else baseline_decay * baseline + (1 - baseline_decay) * reward
                total = {name: total[name] + (reward - baseline) / aggregate * slope[name] for name in total}
            steps += 1
            for name, gradient in total.items():
                for moment, decay, value in zip(moments, (beta1, beta2), (gradient, gradient**2), strict=True):
                    moment[name] = decay * moment[name] + (1 - decay) * value
                first, second = moments[0][name] / (1 - beta1**steps), moments[1][name] / (1 - beta2**steps)
                policy[name] = policy[name] + learning_rate * first / (np.sqrt(second) + eps)
        candidates = [drawn(now.rng, policy, space)[0] for _ in range(samples)]
        kept: Any = [{name: t.astype(np.float32) for name, t in tables.items()} for tables in (policy, *moments)]
        memory = {
            **dict(zip(("policy", "first", "second"), kept, strict=True)),
            "baseline": np.float32(baseline),
            "steps": np.int32(steps),
        }
        rated = [(now.worth(choice), choice) for choice in candidates]
        return Proposed(memory, rated, operation_probabilities(policy, space))

    def sample(key: jax.Array, memory: Memory) -> jax.Array:
        return cells.draw(key, memory["policy"]["edges"], memory["policy"]["ops"], space)

    shape = (len(CELL_TYPES), space.num_edges)
    zeros = {"edges": np.zeros(shape, np.float32), "ops": np.zeros((*shape, space.num_ops), np.float32)}
    memory = {
        "policy": zeros,
        "first": zeros,
        "second": zeros,
        "baseline": np.float32(0),
        "steps": np.int32(0),
    }
    return gradient_free(space=space, propose=propose, memory=memory, warm_up=warm_up, batches=batches, sample=sample)


def drawn(rng: np.random.Generator, policy: Policy, space: Space) -> tuple[np.ndarray, Policy, float]:
    """(a choice c of the policy, the gradient of ln pi(c) in its logits, the entropies of what c was drawn from).

    ln pi(c) is the sum over nodes of ln p(first input) + ln p(second input | it is not the first) and over both of
    ln p(operation | input), each p a softmax.
    """
    choice = np.full((len(CELL_TYPES), space.num_edges), space.num_ops, np.int32)
    slope = {name: np.zeros_like(table) for name, table in policy.items()}
    may, entropy = cells.usable(space), 0.0
    for kind, edges in cells.blocks(space):
        left = list(edges)
        for _ in range(min(cells.PAIRS, len(edges))):
            p = _softmax(policy["edges"][kind, left])
            taken = rng.choice(len(left), p=p)
            e = left[taken]
            slope["edges"][kind, left] -= p
            slope["edges"][kind, e] += 1.0
            ops = np.flatnonzero(may[kind, e])
            q = _softmax(policy["ops"][kind, e, ops])
            choice[kind, e] = ops[rng.choice(len(ops), p=q)]
            slope["ops"][kind, e, ops] -= q
            slope["ops"][kind, e, choice[kind, e]] += 1.0
            entropy += _entropy(p) + _entropy(q)
            del left[taken]
    return choice, slope, entropy


def operation_probabilities(policy: Policy, space: Space) -> dict[str, np.ndarray]:
    """The softmax over the operations of each edge, float32[E,O]: what reports call P."""
    may = cells.usable(space)
    logits = np.where(may, policy["ops"], -np.inf)
    logits = np.where(may.any(axis=2, keepdims=True), logits, 0.0)
    p = np.where(may, _softmax(logits), 0.0).astype(np.float32)
    return {kind: p[i] for i, kind in enumerate(CELL_TYPES)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _entropy(p: np.ndarray) -> float:
    return float(-np.sum(p * np.log(np.maximum(p, np.finfo(float).tiny))))
