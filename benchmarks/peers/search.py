"""The bilevel search step of PR-DARTS and of first-order DARTS in PyTorch.

As light as the method allows, in the peer's favour: only executed operations are called; the gates of a weight step are
plain numbers, those of an architecture step tensors; the architecture step asks autograd for the gradients of the
architecture alone; gradients are set to None, so the optimizer does not visit what was not executed; both optimizers
are fused; nothing is logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.layers import FactorizedReduce, ReLUConvNorm, affine_norm, operation, search_norm

KINDS = ("normal", "reduce")
NODES = 4
EDGES = tuple((j, n) for n in range(2, 2 + NODES) for j in range(n))  # node-major
PATH = tuple(EDGES.index((n - 1, n)) for n in range(2, 2 + NODES))

Slots = list[list[tuple[int, float | Tensor]]]  # an edge: its executed operations, each with its gate


class SearchCell(nn.Module):
    """Mixed edges: X_n = sum over edges into n and executed operations of g op(X_j)."""

    def __init__(
        self, ops: Sequence[str], c_in: tuple[int, int], channels: int, *, reduces: bool, previous_reduced: bool
    ) -> None:
        super().__init__()
        first = FactorizedReduce if previous_reduced else ReLUConvNorm
        self.preprocess0 = first(c_in[0], channels, search_norm)
        self.preprocess1 = ReLUConvNorm(c_in[1], channels, search_norm)
        self.kind = "reduce" if reduces else "normal"
        self.edges = nn.ModuleList()
        for j, _ in EDGES:
            stride = 2 if reduces and j < 2 else 1
            made = {name: operation(name, channels, stride, search_norm, pool_norm=True) for name in ops}
            self.edges.append(nn.ModuleDict({name: op for name, op in made.items() if op is not None}))
        self.ops = tuple(ops)

    def forward(self, s0: Tensor, s1: Tensor, slots: Slots) -> Tensor:
        s0, s1 = self.preprocess0(s0), self.preprocess1(s1)
        states = [s0, s1]
        for n in range(2, 2 + NODES):
            total: Tensor | None = None
            for (j, target), edge, chosen in zip(EDGES, self.edges, slots, strict=True):
                if target != n:
                    continue
                for index, gate in chosen:
                    y = edge[self.ops[index]](states[j])
                    if isinstance(gate, float):
                        total = gate * y if total is None else torch.add(total, y, alpha=gate)
                    else:
                        gate = gate.to(y.dtype)  # under autocast a float32 gate would widen the node
                        total = gate * y if total is None else torch.addcmul(total, y, gate)
            if total is None:
                h, w = ((size + 1) // 2 if self.kind == "reduce" else size for size in s0.shape[2:])
                total = s0.new_zeros(s0.shape[0], s0.shape[1], h, w)
            states.append(total)
        return torch.cat(states[2:], 1)


class SearchNetwork(nn.Module):
    """Stem, cells with reductions at cells//3 and 2 cells//3, (norm, ReLU,) pool, linear."""

    def __init__(self, ops: Sequence[str], cells: int, channels: int, *, head_norm: bool, classes: int = 10) -> None:
        super().__init__()
        c = channels
        before, last, previous = 3 * c, 3 * c, False
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, padding=1, bias=False), affine_norm(3 * c))
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            c *= 2 if reduces else 1
            self.cells.append(SearchCell(ops, (before, last), c, reduces=reduces, previous_reduced=previous))
            before, last, previous = last, NODES * c, reduces
        self.head_norm = affine_norm(last) if head_norm else None
        self.head = nn.Linear(last, classes)

    def forward(self, images: Tensor, slots: dict[str, Slots]) -> Tensor:
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, slots[cell.kind])
        if self.head_norm is not None:
            s1 = F.relu(self.head_norm(s1), inplace=True)
        return self.head(s1.mean((2, 3)))


def compile_operations(network: SearchNetwork, images: Tensor, ops: Sequence[str]) -> None:
    """Compiles every operation and preprocessing, once a shape, and runs each so that no later step has to.

    The network as a whole is no static graph: other operations are executed in each step.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    for cell in network.cells:
        layers = [cell.preprocess0, cell.preprocess1, *(op for edge in cell.edges for op in edge.values())]
        for layer in layers:
            if not isinstance(layer, nn.Identity):
                layer.compile(dynamic=False)
    gate = torch.ones((), device=images.device, requires_grad=True)
    for one in (1.0, gate):
        network.requires_grad_(one is not gate)
        everything: Slots = [[(o, one) for o, name in enumerate(ops) if name != "none"] for _ in EDGES]
        network(images, dict.fromkeys(KINDS, everything)).mean().backward()
    network.requires_grad_(True).zero_grad(set_to_none=True)


class PathRegularized(NamedTuple):
    """PR-DARTS' numbers: temperature, gate interval, executed operations, coefficients of the penalty."""

    tau: float
    a: float = -0.1
    b: float = 1.1
    executed: int = 2
    lambdas: tuple[float, float, float] = (0.01, 0.005, 0.005)

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
        """The executed operations of each edge. A gate that is exactly zero, and `none`, execute nothing."""
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


class Softmax(NamedTuple):
    """DARTS: every operation, weighted by the softmax of its edge."""

    def slots(self, alpha: Tensor, ops: Sequence[str], *, differentiable: bool) -> Slots:
        w = torch.softmax(alpha if differentiable else alpha.detach(), 1)
        rows = [row.unbind() for row in w.unbind()] if differentiable else w.tolist()
        return [[(o, row[o]) for o in range(len(ops)) if ops[o] != "none"] for row in rows]

    def penalty(self, alphas: Sequence[Tensor], ops: Sequence[str]) -> Tensor:
        return alphas[0].new_zeros(())


class Search:
    """Network, architecture parameters, their optimizers, and the step."""

    def __init__(
        self,
        network: SearchNetwork,
        method: PathRegularized | Softmax,
        ops: Sequence[str],
        *,
        arch_first: bool,
        compiled: bool = False,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.network, self.method, self.ops, self.arch_first = network.to(device), method, tuple(ops), arch_first
        # A compiled backward pass has all gradients of its operation, unless some are known not to be asked for.
        self.freezes = compiled
        self.autocast, self.device = autocast, device
        shape = (len(EDGES), len(ops))
        self.arch = [(1e-3 * torch.randn(shape, device=device)).requires_grad_() for _ in KINDS]
        options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
        self.weights = list(network.parameters())
        self.weight_opt = torch.optim.SGD(self.weights, 0.025, **options)
        # The fused kernel does not take a mixture of old and missing buffers, which ops executed late would make.
        for w in self.weights:
            self.weight_opt.state[w]["momentum_buffer"] = torch.zeros_like(w)
        self.arch_opt = torch.optim.Adam(self.arch, 3e-4, (0.5, 0.999), weight_decay=1e-3, fused=True)

    def loss(self, images: Tensor, labels: Tensor, *, differentiable: bool) -> Tensor:
        slots = {
            kind: self.method.slots(arch, self.ops, differentiable=differentiable)
            for kind, arch in zip(KINDS, self.arch, strict=True)
        }
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            return F.cross_entropy(self.network(images, slots), labels)

    def weight_step(self, images: Tensor, labels: Tensor) -> None:
        self.weight_opt.zero_grad(set_to_none=True)
        self.loss(images, labels, differentiable=False).backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0, foreach=True)
        self.weight_opt.step()

    def arch_step(self, images: Tensor, labels: Tensor) -> None:
        if self.freezes:
            self.network.requires_grad_(False)
        loss = self.loss(images, labels, differentiable=True) + self.method.penalty(self.arch, self.ops)
        if self.freezes:
            self.network.requires_grad_(True)
        for arch, gradient in zip(self.arch, torch.autograd.grad(loss, self.arch), strict=True):
            arch.grad = gradient
        self.arch_opt.step()

    def step(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
        """One step of each group."""
        if self.arch_first:
            self.arch_step(*val)
            self.weight_step(*train)
        else:
            self.weight_step(*train)
            self.arch_step(*val)
