"""The search methods in PyTorch: what an edge executes and with which gates, and what is added to the loss.

A method has a tensor [E, columns] of parameters for each cell type. `slots` gives, for a cell type, the executed
operations of each edge with their gates; `none` and gates that are exactly zero execute nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KINDS = ("normal", "reduce")
NODES = 4
EDGES = tuple((j, n) for n in range(2, 2 + NODES) for j in range(n))  # node-major
PATH = tuple(EDGES.index((n - 1, n)) for n in range(2, 2 + NODES))
PASSING = -1  # in the place of an operation: the channels that pass it by, with the gate of the edge

Slots = list[list[tuple[int, float | Tensor]]]  # an edge: its executed operations, each with its gate


class Method(Protocol):
    """What `Search` asks of a method."""

    def columns(self, ops: Sequence[str]) -> int:
        """Parameters of an edge."""

    def slots(self, arch: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        """Of one cell type, from a sample of its own."""

    def penalty(self, archs: Sequence[Tensor], ops: Sequence[str]) -> Tensor | None:
        """What the architecture descends beside the cross-entropy, of the last sample."""


class _OfEveryOperation:
    """A parameter for each operation of an edge, and no penalty."""

    def columns(self, ops: Sequence[str]) -> int:
        return len(ops)

    def penalty(self, archs: Sequence[Tensor], ops: Sequence[str]) -> Tensor | None:
        return None


def _all(weights: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
    rows = [row.unbind() for row in weights.unbind()] if differentiable else weights.tolist()
    return [[(o, row[o]) for o in range(len(ops)) if ops[o] != "none"] for row in rows]


class PathRegularized(NamedTuple):
    """PR-DARTS' numbers: temperature, gate interval, executed operations, coefficients of the penalty."""

    tau: float
    a: float = -0.1
    b: float = 1.1
    executed: int = 2
    lambdas: tuple[float, float, float] = (0.01, 0.005, 0.005)

    def columns(self, ops: Sequence[str]) -> int:
        return len(ops)

    def gates(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """(g [E,O], indices [E,K] of the largest, ties broken at random)."""
        u = torch.rand_like(beta).clamp_(1e-38, 1 - 2**-24)
        bar = torch.sigmoid((u.log() - torch.log1p(-u) + beta) / self.tau)
        stretched = self.a + (self.b - self.a) * bar
        # Clipped as min(1, max(0, .)) with gradient zero outside (0,1): torch's clamp does the same but at ties.
        g = stretched.clamp(0.0, 1.0)
        order = torch.rand_like(g).argsort(1)  # a stable sort of shuffled columns breaks ties at random
        ranked = torch.sort(g.detach().gather(1, order), dim=1, descending=True, stable=True)[1]
        return g, order.gather(1, ranked[:, : self.executed])

    def slots(self, beta: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        g, chosen = self.gates(beta if differentiable else beta.detach())
        numbers, indices = g.tolist(), chosen.tolist()
        rows = [row.unbind() for row in g.unbind()] if differentiable else numbers
        return [
            [(o, rows[e][o]) for o in indices[e] if ops[o] != "none" and numbers[e][o] != 0.0]
            for e in range(len(indices))
        ]

    def penalty(self, betas: Sequence[Tensor], ops: Sequence[str]) -> Tensor:
        """lambda1 L_skip + lambda2 L_nonskip - lambda3 L_path, each the mean of both cell types."""
        skip = ops.index("skip_connect")
        others = [o for o in range(len(ops)) if o != skip]
        convs = [o for o, name in enumerate(ops) if "conv" in name]
        total = betas[0].new_zeros(())
        for beta in betas:
            p = torch.sigmoid(beta - self.tau * math.log(-self.a / self.b))
            path = p[list(PATH)][:, convs].sum(1).prod()
            terms = (p[:, skip].mean(), p[:, others].mean(), -path)
            total = total + sum(c * term for c, term in zip(self.lambdas, terms, strict=True)) / len(betas)
        return total


class Softmax(_OfEveryOperation):
    """DARTS: every operation, weighted by the softmax of its edge."""

    def slots(self, alpha: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        return _all(torch.softmax(alpha if differentiable else alpha.detach(), 1), ops, differentiable=differentiable)


class Sigmoid(_OfEveryOperation):
    """Fair DARTS: every operation with its sigmoid, driven away from a half."""

    def __init__(self, w01: float = 10.0) -> None:
        self.w01 = w01

    def slots(self, alpha: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        return _all(torch.sigmoid(alpha if differentiable else alpha.detach()), ops, differentiable=differentiable)

    def penalty(self, alphas: Sequence[Tensor], ops: Sequence[str]) -> Tensor:
        return -self.w01 * (torch.sigmoid(torch.stack(list(alphas))) - 0.5).square().mean()


class EdgeSoftmax(_OfEveryOperation):
    """PC-DARTS: the softmax of an edge's operations, times that of the edges into a node; the last column has these."""

    def columns(self, ops: Sequence[str]) -> int:
        return len(ops) + 1

    def slots(self, arch: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        alpha, b = (arch if differentiable else arch.detach()).split((len(ops), 1), 1)
        sizes = [sum(n == target for _, n in EDGES) for target in range(2, 2 + NODES)]
        edges = torch.cat([part.softmax(0) for part in b.squeeze(1).split(sizes)])
        slots = _all(edges[:, None] * torch.softmax(alpha, 1), ops, differentiable=differentiable)
        passing = edges.unbind() if differentiable else edges.tolist()
        return [[*slot, (PASSING, gate)] for slot, gate in zip(slots, passing, strict=True)]


class OneSampled(_OfEveryOperation):
    """GDAS: the operation that the Gumbel noise makes the largest, with the gradient of its relaxed probability."""

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def noise(self, alpha: Tensor) -> Tensor:
        """Gumbel noise like alpha."""
        return -torch.empty_like(alpha).exponential_().log()

    def slots(self, alpha: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        noise = self.noise(alpha)
        if not differentiable:
            chosen = (alpha.detach().log_softmax(1) + noise).argmax(1).tolist()
            return [[] if ops[o] == "none" else [(o, 1.0)] for o in chosen]
        p = ((alpha.log_softmax(1) + noise) / self.tau).softmax(1)
        best, chosen = p.max(1)
        gates = (best - best.detach() + 1.0).unbind()
        return [[] if ops[o] == "none" else [(o, gates[e])] for e, o in enumerate(chosen.tolist())]


class Relaxed(_OfEveryOperation):
    """SNAS: a relaxed one-hot of an edge; both groups descend the cost of what was drawn.

    costs: of each cell type, [cells, 3, E, O]: size, flops and access of the operations.
    """

    def __init__(self, tau: float, resource: float, costs: Mapping[str, Tensor]) -> None:
        self.tau, self.resource = tau, resource
        self.costs = [costs[kind] for kind in KINDS]
        self._drawn: list[Tensor] = []

    def noise(self, alpha: Tensor) -> Tensor:
        """Gumbel noise like alpha."""
        return -torch.empty_like(alpha).exponential_().log()

    def slots(self, alpha: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        z = ((alpha + self.noise(alpha)) / self.tau).softmax(1)
        self._drawn.append(z)
        return _all(z, ops, differentiable=differentiable)

    def penalty(self, alphas: Sequence[Tensor], ops: Sequence[str]) -> Tensor:
        drawn, self._drawn = self._drawn[-len(KINDS) :], []
        total = sum(
            (z * cost).sum(-1).clamp(min=1.0).log().sum() / len(cost) for z, cost in zip(drawn, self.costs, strict=True)
        )
        return self.resource * total / 3
