"""SNAS: a relaxed one-hot an edge, weights and architecture on one batch, with the cost of what was drawn.

    Z = softmax((log alpha + G) / tau),  G Gumbel noise;   both groups descend  CE_train + resource R(Z)
    R = sum over types of the mean over cells of  sum over edges of  (ln+ Z.size + ln+ Z.flops + ln+ Z.access) / 3

Here ln+ x = ln max(x, 1), and size, flops and access are the costs of an edge's operations in that cell.
Xie, Zheng, Liu, Lin: SNAS: Stochastic Neural Architecture Search, ICLR 2019.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import joint
from prdarts_jax.config.schema import require
from prdarts_jax.gates import Gates
from prdarts_jax.network.counts import search_costs
from prdarts_jax.space.derive import derive_edges
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import sampling
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy


def snas(
    *,
    space: Space,
    tau_max: float = 1.0,
    tau_min: float = 0.03,
    resource: float = 1e-2,
    drop_path: float = 0.3,
    per_cell: bool = False,
    image: int = 32,
    init_mean: float = 1.0,
    init_scale: float = 0.01,
) -> Strategy:
    """The SNAS strategy: dense, soft samples, single level; every edge keeps its best operation, `none` included.

    An edge whose best operation is `none` vanishes, so that a node may have any number of pairs, or not exist. The
    resource term is the reparametrised one with a logarithm (the program has others: policy gradient, without a
    logarithm); its mean over cells is the program's division by 6 and 2, which are the numbers of cells at 8. The
    access of a strided skip connection counts the pixels that it reads; the program counts the whole input twice.

    Args:
      space: the search space.
      tau_max, tau_min: temperature, linear from the first to the last epoch; 1e-3 to 1e6.
      resource: coefficient of the resource term (published: .01 with 8 cells, .0015 with 20).
      drop_path: probability that an edge is dropped for an image (published: .3 with 8 cells, .2 with 20).
      per_cell: a sample for each cell, in the place of one for all cells of a type.
      image: pixels a side, for the costs.
      init_mean, init_scale: log alpha starts at init_mean + init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = snas(space=Space(), resource=0.0)
    >>> gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), (), {"tau": 1.0}, "arch")
    >>> bool(jnp.allclose(gates.ops["normal"].sum(axis=1), 1.0, atol=1e-6))
    True
    """
    sampling.check_taus(tau_max=tau_max, tau_min=tau_min)
    sampling.check_finite(resource=resource, init_scale=init_scale)
    require(bool(np.isfinite(init_mean)), "method.options.init_mean", init_mean, "a finite number")
    require(0 <= drop_path < 1, "method.options.drop_path", drop_path, "in [0, 1)")
    require(image >= 1, "method.options.image", image, ">= 1")
    costs = search_costs(space, image=image)
    of_type = {kind: [i for i, cell in enumerate(space.layout) if cell.kind == kind] for kind in CELL_TYPES}
    shape = (space.num_edges, space.num_ops)

    def init(key: jax.Array) -> Arch:
        keys = {kind: jax.random.fold_in(key, i) for i, kind in enumerate(CELL_TYPES)}
        return {kind: init_mean + init_scale * jax.random.normal(k, shape) for kind, k in keys.items()}

    def schedule(epoch: int, epochs: int) -> dict[str, float]:
        numbers = {"tau": sampling.linear_tau(epoch, epochs, tau_max, tau_min), "resource": resource}
        return numbers | ({"drop_path": drop_path} if drop_path else {})

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        del memory
        drawn = sampling.logits(arch, space)
        if role != "eval":
            noise = sampling.gumbel_noise(key, space, space.cells if per_cell else None)
            drawn = {kind: jnp.broadcast_to(drawn[kind], noise[kind].shape) + noise[kind] for kind in CELL_TYPES}
        z = {kind: jax.nn.softmax(table / numbers["tau"], axis=-1) for kind, table in drawn.items()}
        return Gates(z, {kind: gating.all_ops(space.allowed[kind]) for kind in CELL_TYPES})

    def objective(
        ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        total = jnp.zeros((), ce.dtype)
        for kind, cells in of_type.items():
            z = gates.ops[kind][None] if gates.ops[kind].ndim == 2 else gates.ops[kind][np.array(cells)]
            for table in costs:
                cost = jnp.sum(z * jnp.asarray(table[cells], z.dtype), axis=-1)
                total = total + jnp.sum(jnp.log(jnp.where(cost < 1, 1.0, cost))) / (3 * len(cells))
        term = numbers["resource"] * total
        return ce + term, {"resource": term}

    return Strategy(
        space=space,
        init=init,
        schedule=schedule,
        sample=sample,
        objective=objective,
        probabilities=lambda arch, numbers: sampling.softmax(arch, space),
        scores=lambda arch: sampling.softmax(arch, space),
        select=lambda scores: derive_edges(scores, space, none_competes=True),
        rule=joint(),
    )
