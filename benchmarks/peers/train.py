"""The training step of a derived network in PyTorch: drop-path, auxiliary head, SGD with clipping."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.layers import FactorizedReduce, ReLUConvNorm, operation, pointwise


def running_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


class DerivedCell(nn.Module):
    """The (operation, input) pairs of a genotype's cell; `factors` [drops, B, 1, 1, 1] are those of drop-path."""

    def __init__(
        self, nodes: Any, concat: Any, c_in: tuple[int, int], c: int, *, reduces: bool, previous_reduced: bool
    ) -> None:
        super().__init__()
        self.preprocess0 = (FactorizedReduce if previous_reduced else ReLUConvNorm)(c_in[0], c, running_norm)
        self.preprocess1 = ReLUConvNorm(c_in[1], c, running_norm)
        self.concat = tuple(concat)
        self.wiring: list[list[tuple[str, int, int | None]]] = []  # a node: (module, input, row of factors)
        drops = 0
        for n, pairs in enumerate(nodes, start=2):
            node: list[tuple[str, int, int | None]] = []
            for i, (op, source) in enumerate(pairs):
                stride = 2 if reduces and source < 2 else 1
                made = operation(op, c, stride, running_norm, pool_norm=False)
                assert made is not None
                name = f"node{n}_{i}_{op}"
                self.add_module(name, made)
                identity = isinstance(made, nn.Identity)
                node.append((name, source, None if identity else drops))
                drops += not identity
            self.wiring.append(node)
        self.drops = drops

    def forward(self, s0: Tensor, s1: Tensor, factors: Tensor | None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in self.wiring:
            terms = []
            for name, source, row in node:
                y = getattr(self, name)(states[source])
                terms.append(y if row is None or factors is None else y * factors[row])
            states.append(sum(terms[1:], terms[0]))
        return torch.cat([states[n] for n in self.concat], 1)


class AuxiliaryHead(nn.Module):
    """ReLU, 5x5 average pool of stride 3, 1x1 to 128, norm, ReLU, 2x2 to 768, norm, ReLU, linear."""

    def __init__(self, c_in: int, classes: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(5, 3)
        self.pointwise, self.bn1 = pointwise(c_in, 128), running_norm(128)
        self.conv, self.bn2 = nn.Conv2d(128, 768, 2, bias=False), running_norm(768)
        self.linear = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.pointwise(self.pool(F.relu(x)))), inplace=True)
        x = F.relu(self.bn2(self.conv(x)), inplace=True)
        return self.linear(x.flatten(1))


class Stem(nn.Module):
    """3x3 convolution to 3C, norm."""

    def __init__(self, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, c_out, 3, padding=1, bias=False), running_norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Classifier(nn.Module):
    """Global average pool, linear."""

    def __init__(self, c_in: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class DerivedNetwork(nn.Module):
    """The evaluation network for CIFAR of a genotype (anything with normal, normal_concat, reduce, reduce_concat)."""

    def __init__(self, genotype: Any, channels: int, cells: int, classes: int = 10) -> None:
        super().__init__()
        c = channels
        before, last, previous = 3 * c, 3 * c, False
        self.stem, self.cells, self.auxiliary_after = Stem(3 * c), cells, 2 * cells // 3
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            c *= 2 if reduces else 1
            nodes, concat = (
                (genotype.reduce, genotype.reduce_concat) if reduces else (genotype.normal, genotype.normal_concat)
            )
            cell = DerivedCell(nodes, concat, (before, last), c, reduces=reduces, previous_reduced=previous)
            self.add_module(f"cell_{i}", cell)
            before, last, previous = last, c * len(concat), reduces
            if i == self.auxiliary_after:
                self.auxiliary = AuxiliaryHead(last, classes)
        self.classifier = Classifier(last, classes)
        self.drops = max(getattr(self, f"cell_{i}").drops for i in range(cells))

    def forward(self, images: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and the auxiliary head's; factors [cells, drops, B, 1, 1, 1]."""
        s0 = s1 = self.stem(images)
        for i in range(self.cells):
            s0, s1 = s1, getattr(self, f"cell_{i}")(s0, s1, None if factors is None else factors[i])
            if i == self.auxiliary_after:
                auxiliary = self.auxiliary(s1)
        return self.classifier(s1), auxiliary


class Training:
    """Network, optimizer, and the step."""

    def __init__(
        self,
        network: DerivedNetwork,
        *,
        drop_path: float,
        compiled: bool,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.network = network.to(device).train()
        self.weights = list(network.parameters())
        options = {"momentum": 0.9, "weight_decay": 3e-4, "fused": True}
        self.optimizer = torch.optim.SGD(self.weights, 0.025, **options)
        self.drop_path, self.device, self.autocast = drop_path, device, autocast
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, images: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            logits, auxiliary = self.network(images, factors)
            return F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD."""
        self.optimizer.zero_grad(set_to_none=True)
        shape = (self.network.cells, self.network.drops, images.shape[0], 1, 1, 1)
        factors = (torch.rand(shape, device=self.device) >= self.drop_path).float().div_(1 - self.drop_path)
        self.loss(images, labels, factors).backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0, foreach=True)
        self.optimizer.step()
