"""GDAS: one sampled operation an edge, with the gradient of its relaxed probability.

    p = softmax((log softmax(alpha) + G) / tau),  G Gumbel noise;   w = one_hot(argmax p) + p - constant(p)

Dong, Yang: Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import alternating
from prdarts_jax.errors import unknown
from prdarts_jax.gates import Gates
from prdarts_jax.space.derive import derive_pairs, init_normal
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import sampling
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy

GRADIENTS = ("selected", "all")


def gdas(
    *,
    space: Space,
    tau_max: float = 10.0,
    tau_min: float = 0.1,
    grad: str = "selected",
    distinct_inputs: bool = False,
    init_scale: float = 1e-3,
) -> Strategy:
    """The GDAS strategy: one operation an edge is executed; the weights move first, alpha with a sample of its own.

    A gradient that does not reach an entry is zero: momentum and weight decay of the optimizers still move it. (The
    published program resamples noise that is not finite, and clips a norm in which stale gradients of alpha are; ours
    is finite, and the weights are clipped by their own norm. Its variant with a fixed reduction cell is not here.)

    Args:
      space: the search space.
      tau_max, tau_min: temperature, linear from the first to the last epoch; 1e-3 to 1e6.
      grad: where a step of the architecture gets a gradient from. "selected": the executed operation alone, as the
        program for this space. "all": every operation is executed in that step, those that were not selected with the
        multiplier 0, which is the straight-through gradient. (The authors' NAS-Bench-201 program adds the zero
        multipliers themselves to the node, without their operations; that is not offered.)
      distinct_inputs: whether a node's two pairs have distinct inputs (published: no).
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = gdas(space=Space())
    >>> gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), (), {"tau": 1.0}, "weights")
    >>> gates.executed["normal"].shape, sorted(set(gates.ops["normal"].ravel().tolist()))
    ((14, 1), [0.0, 1.0])
    """
    sampling.check_taus(tau_max=tau_max, tau_min=tau_min)
    sampling.check_finite(init_scale=init_scale)
    if grad not in GRADIENTS:
        raise unknown("method.options.grad", grad, GRADIENTS)

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        del memory
        noise, ops, executed = sampling.gumbel_noise(key, space), {}, {}
        for kind, alpha in sampling.logits(arch, space).items():
            drawn = jax.nn.log_softmax(alpha, axis=1) + (0.0 if role == "eval" else noise[kind])
            p, chosen = jax.nn.softmax(drawn / numbers["tau"], axis=1), jnp.argmax(drawn, axis=1)
            ops[kind] = sampling.one_hot_through(chosen, p)
            whole = grad == "all" and role == "arch"
            executed[kind] = gating.all_ops(space.allowed[kind]) if whole else chosen.astype(jnp.int32)[:, None]
        return Gates(ops, executed)

    return Strategy(
        space=space,
        init=lambda key: init_normal(key, space, init_scale),
        schedule=lambda epoch, epochs: {"tau": sampling.linear_tau(epoch, epochs, tau_max, tau_min)},
        sample=sample,
        probabilities=lambda arch, numbers: sampling.softmax(arch, space),
        scores=lambda arch: sampling.softmax(arch, space),
        select=lambda scores: derive_pairs(scores, space, distinct_inputs=distinct_inputs),
        rule=alternating(first="weights"),
    )
