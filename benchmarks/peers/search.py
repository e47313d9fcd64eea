"""The bilevel search step in PyTorch, of the methods in `methods`.

As light as the method allows, in the peer's favour: only executed operations are called; the gates of a weight step are
plain numbers, those of an architecture step tensors; the architecture step asks autograd for the gradients of the
architecture alone; gradients are set to None, so the optimizer does not visit what was not executed; both optimizers
are fused; nothing is logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.layers import FactorizedReduce, ReLUConvNorm, affine_norm, operation, search_norm
from benchmarks.peers.methods import EDGES, KINDS, NODES, PASSING, Method, Slots


class SearchCell(nn.Module):
    """Mixed edges: X_n = sum over edges into n and executed operations of g op(X_j).

    drop_path: the probability that an edge is dropped for an image. partial: of C channels C / partial are mixed.
    """

    def __init__(
        self,
        ops: Sequence[str],
        c_in: tuple[int, int],
        channels: int,
        *,
        reduces: bool,
        previous_reduced: bool,
        drop_path: float = 0.0,
        partial: int = 1,
    ) -> None:
        super().__init__()
        first = FactorizedReduce if previous_reduced else ReLUConvNorm
        self.preprocess0 = first(c_in[0], channels, search_norm)
        self.preprocess1 = ReLUConvNorm(c_in[1], channels, search_norm)
        self.kind = "reduce" if reduces else "normal"
        self.edges = nn.ModuleList()
        for j, _ in EDGES:
            stride = 2 if reduces and j < 2 else 1
            made = {name: operation(name, channels // partial, stride, search_norm, pool_norm=True) for name in ops}
            self.edges.append(nn.ModuleDict({name: op for name, op in made.items() if op is not None}))
        self.ops, self.drop_path, self.partial = tuple(ops), drop_path, partial

    def forward(self, s0: Tensor, s1: Tensor, slots: Slots) -> Tensor:
        s0, s1 = self.preprocess0(s0), self.preprocess1(s1)
        kept = self.kept(s0).unbind() if self.drop_path else None
        sources, states = [self._mixed_and_passing(x) for x in (s0, s1)], []
        for n in range(2, 2 + NODES):
            total = passing = None
            for e, (j, target) in enumerate(EDGES):
                if target != n:
                    continue
                head, tail = sources[j]
                own = None if kept is not None else total
                for index, gate in slots[e]:
                    if index == PASSING:
                        strided = self.kind == "reduce" and j < 2
                        passing = _plus(passing, gate, F.max_pool2d(tail, 2) if strided else tail)
                    else:
                        own = _plus(own, gate, self.edges[e][self.ops[index]](head))
                total = own if kept is None else _plus(total, kept[e], own)
            if total is None:
                h, w = ((size + 1) // 2 if self.kind == "reduce" else size for size in s0.shape[2:])
                total = s0.new_zeros(s0.shape[0], s0.shape[1] // self.partial, h, w)
            states.append(total if passing is None else _shuffled(total, passing, self.partial))
            sources.append(self._mixed_and_passing(states[-1]))
        return torch.cat(states, 1)

    def kept(self, x: Tensor) -> Tensor:
        """[E,B,1,1,1], what an edge is multiplied by for an image: 0, or as much as makes the mean 1."""
        draws = torch.empty((len(EDGES), x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
        return draws.bernoulli_(1 - self.drop_path).div_(1 - self.drop_path)

    def _mixed_and_passing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that are mixed, one behind the other in memory, and those that pass by."""
        if self.partial == 1:
            return x, x
        channels = x.shape[1] // self.partial
        return x[:, :channels].contiguous(memory_format=_format(x)), x[:, channels:]


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _plus(total: Tensor | None, gate: float | Tensor, y: Tensor | None) -> Tensor | None:
    """total + gate y, in one pass over memory; a tensor that is None is zero."""
    if y is None:
        return total
    if isinstance(gate, float):
        if total is None:
            return y if gate == 1.0 else gate * y
        return torch.add(total, y, alpha=gate)
    gate = gate.to(y.dtype)  # under autocast a float32 gate would widen the node
    return gate * y if total is None else torch.addcmul(total, y, gate)


def _shuffled(mixed: Tensor, passing: Tensor, groups: int) -> Tensor:
    """The channels of both, of which those of the same place in each group come to lie side by side."""
    x = torch.cat([mixed, passing], 1)
    b, c, h, w = x.shape
    if _format(x) is torch.channels_last:
        last = x.permute(0, 2, 3, 1).view(b, h, w, groups, c // groups)
        return last.transpose(3, 4).reshape(b, h, w, c).permute(0, 3, 1, 2)
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class SearchNetwork(nn.Module):
    """Stem, cells with reductions at cells//3 and 2 cells//3, (norm, ReLU,) pool, linear."""

    def __init__(
        self,
        ops: Sequence[str],
        cells: int,
        channels: int,
        *,
        head_norm: bool,
        classes: int = 10,
        drop_path: float = 0.0,
        partial: int = 1,
    ) -> None:
        super().__init__()
        self.partial = partial
        more = {"drop_path": drop_path, "partial": partial}
        c = channels
        before, last, previous = 3 * c, 3 * c, False
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, padding=1, bias=False), affine_norm(3 * c))
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            c *= 2 if reduces else 1
            self.cells.append(SearchCell(ops, (before, last), c, reduces=reduces, previous_reduced=previous, **more))
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
        executed: Slots = [[(o, one) for o, name in enumerate(ops) if name != "none"] for _ in EDGES]
        everything = [[*slot, (PASSING, one)] for slot in executed] if network.partial > 1 else executed
        network(images, dict.fromkeys(KINDS, everything)).mean().backward()
    network.requires_grad_(True).zero_grad(set_to_none=True)


class Search:
    """Network, architecture parameters, their optimizers, and the step.

    rule: "weights-first" | "arch-first" | "joint" (both from one batch) | "unrolled" (DARTS, second order: the
    validation loss of the weights after a virtual step, the product by finite differences).
    """

    def __init__(
        self,
        network: SearchNetwork,
        method: Method,
        ops: Sequence[str],
        *,
        rule: str,
        compiled: bool = False,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.network, self.method, self.ops, self.rule = network.to(device), method, tuple(ops), rule
        # A compiled backward pass has all gradients of its operation, unless some are known not to be asked for.
        self.freezes = compiled
        self.autocast, self.device = autocast, device
        shape = (len(EDGES), method.columns(ops))
        self.arch = [(1e-3 * torch.randn(shape, device=device)).requires_grad_() for _ in KINDS]
        self.rate, self.momentum, self.decay = 0.025, 0.9, 5e-4
        options = {"momentum": self.momentum, "nesterov": True, "weight_decay": self.decay, "fused": True}
        self.weights = list(network.parameters())
        self.weight_opt = torch.optim.SGD(self.weights, self.rate, **options)
        # The fused kernel does not take a mixture of old and missing buffers, which ops executed late would make.
        for w in self.weights:
            self.weight_opt.state[w]["momentum_buffer"] = torch.zeros_like(w)
        self.arch_opt = torch.optim.Adam(self.arch, 3e-4, (0.5, 0.999), weight_decay=1e-3, fused=True)

    def loss(self, images: Tensor, labels: Tensor, *, differentiable: bool) -> Tensor:
        """The cross-entropy; `differentiable` in the architecture too."""
        slots = {
            kind: self.method.slots(arch, self.ops, differentiable=differentiable)
            for kind, arch in zip(KINDS, self.arch, strict=True)
        }
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            return F.cross_entropy(self.network(images, slots), labels)

    def weight_step(self, images: Tensor, labels: Tensor) -> None:
        self.weight_opt.zero_grad(set_to_none=True)
        self.loss(images, labels, differentiable=False).backward()
        self._move_weights()

    def arch_step(self, images: Tensor, labels: Tensor) -> None:
        if self.freezes:
            self.network.requires_grad_(False)
        loss = self.objective(images, labels)
        if self.freezes:
            self.network.requires_grad_(True)
        self._move_arch(torch.autograd.grad(loss, self.arch))

    def joint_step(self, images: Tensor, labels: Tensor) -> None:
        self.weight_opt.zero_grad(set_to_none=True)
        self.arch_opt.zero_grad(set_to_none=True)
        self.objective(images, labels).backward()
        self._move_weights()
        self.arch_opt.step()

    def unrolled_step(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
        """grad_a L_val(w', a) - rate (grad_a L_train(w+, a) - grad_a L_train(w-, a)) / 2e, w' the virtual weights."""
        slope = torch.autograd.grad(self.loss(*train, differentiable=False), self.weights)
        with torch.no_grad():
            start = [w.clone() for w in self.weights]
            velocity = [self.weight_opt.state[w]["momentum_buffer"] for w in self.weights]
            torch._foreach_add_(self.weights, torch._foreach_mul(velocity, -self.rate * self.momentum))
            torch._foreach_add_(self.weights, slope, alpha=-self.rate)
            torch._foreach_add_(self.weights, start, alpha=-self.rate * self.decay)
        found = torch.autograd.grad(self.objective(*val), [*self.arch, *self.weights])
        direct, g = found[: len(self.arch)], found[len(self.arch) :]
        radius = 0.01 / torch.stack(torch._foreach_norm(g)).norm().item()
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                torch._foreach_copy_(self.weights, start)
                torch._foreach_add_(self.weights, g, alpha=sign * radius)
            ends.append(torch.autograd.grad(self.loss(*train, differentiable=True), self.arch))
        with torch.no_grad():
            torch._foreach_copy_(self.weights, start)
        self._move_arch([d - self.rate / (2 * radius) * (p - m) for d, p, m in zip(direct, *ends, strict=True)])

    def step(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
        """One step of each group."""
        if self.rule == "joint":
            self.joint_step(*train)
        elif self.rule == "unrolled":
            self.unrolled_step(train, val)
            self.weight_step(*train)
        elif self.rule == "arch-first":
            self.arch_step(*val)
            self.weight_step(*train)
        else:
            self.weight_step(*train)
            self.arch_step(*val)

    def objective(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the architecture descends."""
        loss = self.loss(images, labels, differentiable=True)
        penalty = self.method.penalty(self.arch, self.ops)
        return loss if penalty is None else loss + penalty

    def _move_weights(self) -> None:
        nn.utils.clip_grad_norm_(self.weights, 5.0, foreach=True)
        self.weight_opt.step()

    def _move_arch(self, gradients: Sequence[Tensor]) -> None:
        for arch, gradient in zip(self.arch, gradients, strict=True):
            arch.grad = gradient
        self.arch_opt.step()
