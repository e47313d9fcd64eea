"""The derived network against an independent torch network with the same weights: outputs, gradients, statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit

from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.space.genotype import Genotype

if os.environ.get("CI") == "true":
    import torch
else:
    torch = pytest.importorskip("torch", reason="needs torch")
from torch import nn

pytestmark = pytest.mark.reference
torch.set_num_threads(1)  # the tests already keep every core busy, and its threads would spin while they wait

CLASSES = 7


# --- the torch network, from the papers' description ------------------------------------------------------------------


def conv(c_in: int, c_out: int, kernel: int | tuple[int, int], **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, bias=False, **options)


class Named(nn.Module):
    """Submodules by name, and a forward function of them."""

    def __init__(self, forward: Callable[..., torch.Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def relu_conv_bn(c_in: int, c: int) -> nn.Module:
    return Named(lambda m, x: m.bn(m.pointwise(torch.relu(x))), pointwise=conv(c_in, c, 1), bn=nn.BatchNorm2d(c))


def factorized_reduce(c_in: int, c: int) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return m.bn(torch.cat([m.first(x), m.second(x[:, :, 1:, 1:])], 1))

    halves = {"first": conv(c_in, c // 2, 1, stride=2), "second": conv(c_in, c - c // 2, 1, stride=2)}
    return Named(forward, **halves, bn=nn.BatchNorm2d(c))


def separable(c: int, k: int, stride: int) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.bn1(m.pointwise1(m.depthwise1(torch.relu(x))))
        return m.bn2(m.pointwise2(m.depthwise2(torch.relu(x))))

    return Named(
        forward,
        depthwise1=conv(c, c, k, stride=stride, padding=k // 2, groups=c),
        pointwise1=conv(c, c, 1),
        bn1=nn.BatchNorm2d(c),
        depthwise2=conv(c, c, k, padding=k // 2, groups=c),
        pointwise2=conv(c, c, 1),
        bn2=nn.BatchNorm2d(c),
    )


def dilated(c: int, k: int, stride: int) -> nn.Module:
    return Named(
        lambda m, x: m.bn(m.pointwise(m.depthwise(torch.relu(x)))),
        depthwise=conv(c, c, k, stride=stride, padding=k - 1, dilation=2, groups=c),
        pointwise=conv(c, c, 1),
        bn=nn.BatchNorm2d(c),
    )


def seven(c: int, stride: int) -> nn.Module:
    return Named(
        lambda m, x: m.bn(m.conv_7x1(m.conv_1x7(torch.relu(x)))),
        conv_1x7=conv(c, c, (1, 7), stride=(1, stride), padding=(0, 3)),
        conv_7x1=conv(c, c, (7, 1), stride=(stride, 1), padding=(3, 0)),
        bn=nn.BatchNorm2d(c),
    )


def make(op: str, c: int, stride: int) -> nn.Module:
    if op == "skip_connect":
        return nn.Identity() if stride == 1 else factorized_reduce(c, c)
    if op == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if op == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if op == "conv_7x1_1x7":
        return seven(c, stride)
    kind, _, size = op.rpartition("_")
    return {"sep_conv": separable, "dil_conv": dilated}[kind](c, int(size[0]), stride)


class TorchCell(nn.Module):
    def __init__(self, genotype: Genotype, kind: str, c_in: tuple[int, int], c: int, previous_reduced: bool) -> None:
        super().__init__()
        self.preprocess0 = (factorized_reduce if previous_reduced else relu_conv_bn)(c_in[0], c)
        self.preprocess1 = relu_conv_bn(c_in[1], c)
        nodes, concat = genotype.cell(kind)
        exists, self.genotype_nodes = [True, True], []
        for pairs in nodes:  # a node without operations does not exist, nor do edges that leave it
            self.genotype_nodes.append([(op, j) for op, j in pairs if exists[j]])
            exists.append(bool(self.genotype_nodes[-1]))
        self.concat = [n for n in concat if exists[n]]
        for n, pairs in enumerate(self.genotype_nodes, start=2):
            for i, (op, source) in enumerate(pairs):
                self.add_module(f"node{n}_{i}_{op}", make(op, c, 2 if kind == "reduce" and source < 2 else 1))

    def forward(self, s0: torch.Tensor, s1: torch.Tensor) -> torch.Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for n, pairs in enumerate(self.genotype_nodes, start=2):
            terms = [self.get_submodule(f"node{n}_{i}_{op}")(states[j]) for i, (op, j) in enumerate(pairs)]
            states.append(sum(terms) if terms else None)
        return torch.cat([states[n] for n in self.concat], 1)


class TorchNetwork(nn.Module):
    def __init__(self, genotype: Genotype, c: int, cells: int, stem: str, second_norm: bool = True) -> None:
        super().__init__()
        self.kind, self.reductions = stem, (cells // 3, 2 * cells // 3)
        if stem == "cifar":
            self.stem = Named(lambda m, x: m.bn(m.conv(x)), conv=conv(3, 3 * c, 3, padding=1), bn=nn.BatchNorm2d(3 * c))
            before, last = 3 * c, 3 * c
        else:
            self.stem0 = Named(
                lambda m, x: m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(x))))),
                conv1=conv(3, c // 2, 3, stride=2, padding=1),
                bn1=nn.BatchNorm2d(c // 2),
                conv2=conv(c // 2, c, 3, stride=2, padding=1),
                bn2=nn.BatchNorm2d(c),
            )
            self.stem1 = Named(
                lambda m, x: m.bn(m.conv(torch.relu(x))),
                conv=conv(c, c, 3, stride=2, padding=1),
                bn=nn.BatchNorm2d(c),
            )
            before, last = c, c
        previous = stem == "imagenet"
        for i in range(cells):
            kind = "reduce" if i in self.reductions else "normal"
            c *= 2 if kind == "reduce" else 1
            cell = TorchCell(genotype, kind, (before, last), c, previous)
            self.add_module(f"cell_{i}", cell)
            before, last, previous = last, c * len(cell.concat), kind == "reduce"
            if i == self.reductions[1]:
                self.auxiliary = Named(
                    lambda m, x: m.linear(
                        torch.relu(m.bn2(m.conv(torch.relu(m.bn1(m.pointwise(m.pool(torch.relu(x)))))))).flatten(1)
                    ),
                    pool=nn.AvgPool2d(5, 3 if stem == "cifar" else 2),
                    pointwise=conv(last, 128, 1),
                    bn1=nn.BatchNorm2d(128),
                    conv=conv(128, 768, 2),
                    bn2=nn.BatchNorm2d(768) if second_norm else nn.Identity(),
                    linear=nn.Linear(768, CLASSES),
                )
        self.classifier = Named(lambda m, x: m.linear(x.mean((2, 3))), linear=nn.Linear(last, CLASSES))
        self.cells = cells

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s0 = s1 = self.stem(x) if self.kind == "cifar" else self.stem0(x)
        if self.kind == "imagenet":
            s1 = self.stem1(s0)
        auxiliary = None
        for i in range(self.cells):
            s0, s1 = s1, self.get_submodule(f"cell_{i}")(s0, s1)
            if i == self.reductions[1]:
                auxiliary = self.auxiliary(s1)
        assert auxiliary is not None
        return self.classifier(s1), auxiliary


# --- the same weights in both -----------------------------------------------------------------------------------------


def entries(module: nn.Module, tree: Any) -> Iterator[tuple[str, torch.Tensor, np.ndarray]]:
    """(name, torch tensor, our array in torch's layout) of every parameter or statistic in the tree."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{path}", *rest) for path, *rest in entries(module.get_submodule(name), value))
        elif name in ("scale", "mean", "var"):
            yield name, {"scale": "weight", "mean": "running_mean", "var": "running_var"}[name], value
        elif name == "kernel":
            yield name, module.linear.weight, np.asarray(value).T
        elif name == "bias":
            yield name, (module if isinstance(module, nn.BatchNorm2d) else module.linear).bias, np.asarray(value)
        else:
            array = np.asarray(value)
            if array.ndim == 2:
                array = array.T[:, :, None, None]
            else:
                array = array.transpose(2, 0, 1)[:, None] if array.ndim == 3 else array.transpose(3, 2, 0, 1)
            yield name, module.get_submodule(name).weight, array


def located(module: nn.Module, tree: Any) -> Iterator[tuple[str, torch.Tensor, np.ndarray]]:
    """`entries` with BN names resolved to tensors."""
    for path, tensor, array in entries(module, tree):
        if isinstance(tensor, str):
            tensor = getattr(module.get_submodule(path.rpartition("/")[0].replace("/", ".")), tensor)
        assert tensor.shape == array.shape, path
        yield path, tensor, np.asarray(array)


def build(
    name: str, stem: str, pixels: int, cells: int = 3, second_norm: bool = True
) -> tuple[DerivedNetwork, Any, TorchNetwork, np.ndarray]:
    genotype = Genotype.named(name)
    net = DerivedNetwork(
        genotype, 4, cells, CLASSES, stem, auxiliary=True, dtype=jnp.float64, auxiliary_second_norm=second_norm
    )
    images = np.random.default_rng(1).normal(size=(4, pixels, pixels, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(images.shape, jnp.float64))
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(lambda s: rng.uniform(-1, 1, s.shape) / np.sqrt(max(np.prod(s.shape[:-1]), 1)), shapes)
    variables = {
        "params": jax.tree.map(jnp.asarray, drawn["params"]),
        "batch_stats": jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.5, s.shape)), shapes["batch_stats"]),
    }
    other = TorchNetwork(genotype, 4, cells, stem, second_norm).double()
    covered = 0
    with torch.no_grad():
        for collection in ("params", "batch_stats"):
            for _, tensor, array in located(other, variables[collection]):
                tensor.copy_(torch.from_numpy(array.copy()))
                covered += 1
    buffers = [b for key, b in other.named_buffers() if not key.endswith("num_batches_tracked")]
    assert covered == len(list(other.parameters())) + len(buffers)
    return net, variables, other, images


def targets(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=shape), rng.normal(size=shape)


def close(ours: Any, theirs: torch.Tensor, name: str, tolerance: float) -> None:
    theirs = theirs.detach().numpy()
    scale = 1e-3 + np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance * scale, err_msg=name)


@cache
def gradient_step(net: DerivedNetwork, train: bool) -> Callable[..., Any]:
    """(params, statistics, images, a, b) -> gradients of sum(a * logits) + sum(b * auxiliary logits), and the rest."""

    def loss(params: Any, x: jax.Array, batch_stats: Any, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
        state = {"params": params, "batch_stats": batch_stats}
        out, new = net.apply(state, x, train=train, mutable=["batch_stats"])
        return jnp.sum(out[0] * a) + jnp.sum(out[1] * b), (out, new["batch_stats"])

    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def backward(other: TorchNetwork, images: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[Any, torch.Tensor]:
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    out = other(x)
    (torch.sum(out[0] * torch.from_numpy(a)) + torch.sum(out[1] * torch.from_numpy(b))).backward()
    return out, x.grad


# Every one is compiled for minutes on a busy machine: the rest of the product is in the slow set. Those that are not
# have every operation at every stride, nodes of one and of five operations, partial concats, both stems, both modes and
# both auxiliary heads.
SLOW = pytest.mark.slow
CASES = [
    ("PRDARTS", "cifar", 32, True, True),
    ("PRDARTS", "cifar", 32, False, True),
    ("AmoebaNet_A", "cifar", 32, True, True),
    ("BayesNAS_0.01", "imagenet", 224, True, False),
    pytest.param("NASNet_A", "cifar", 32, True, True, marks=SLOW),
    pytest.param("FairDARTS_b", "cifar", 32, True, True, marks=SLOW),
    pytest.param("BayesNAS_0.01", "cifar", 32, True, True, marks=SLOW),
    pytest.param("NASNet_A", "cifar", 32, False, True, marks=SLOW),
    pytest.param("AmoebaNet_A", "cifar", 32, False, True, marks=SLOW),
    pytest.param("FairDARTS_b", "cifar", 32, False, True, marks=SLOW),
    pytest.param("BayesNAS_0.01", "cifar", 32, False, True, marks=SLOW),
    pytest.param("PRDARTS", "imagenet", 224, True, True, marks=SLOW),
    pytest.param("PRDARTS", "imagenet", 224, False, True, marks=SLOW),
]


@pytest.mark.parametrize(("name", "stem", "pixels", "train", "second_norm"), CASES)
def test_outputs_gradients_and_statistics_equal_those_of_torch(
    name: str, stem: str, pixels: int, train: bool, second_norm: bool
) -> None:
    with jax.enable_x64(True):
        net, variables, other, images = build(name, stem, pixels, second_norm=second_norm)
        a, b = targets((images.shape[0], CLASSES))
        step = gradient_step(net, train)
        (_, (out, statistics)), (gradients, dx) = step(
            variables["params"], jnp.asarray(images), variables["batch_stats"], a, b
        )
        other.train(train)
        expected, expected_dx = backward(other, images, a, b)
        close(out[0], expected[0], "logits", 1e-9)
        close(out[1], expected[1], "auxiliary logits", 1e-9)
        close(dx.transpose(0, 3, 1, 2), expected_dx, "image gradient", 1e-8)
        for path, tensor, gradient in located(other, gradients):
            close(gradient, tensor.grad, path, 1e-8)
        for path, tensor, statistic in located(other, statistics):
            close(statistic, tensor, path, 1e-9)


def test_three_training_steps_equal_those_of_torch() -> None:
    """Gradient descent on three batches: the running statistics afterwards, and the weights."""
    with jax.enable_x64(True):
        net, variables, other, images = build("PRDARTS", "cifar", 32)
        params, statistics = variables["params"], variables["batch_stats"]
        step = gradient_step(net, True)
        sgd = torch.optim.SGD(other.parameters(), lr=0.02)
        other.train()
        for i in range(3):
            batch = np.roll(images, i, axis=2) * (1 + 0.1 * i)
            a, b = (0.1 * np.roll(t, i, axis=0) for t in targets((images.shape[0], CLASSES)))
            (_, (_, statistics)), (gradients, _) = step(params, jnp.asarray(batch), statistics, a, b)
            params = jax.tree.map(lambda p, g: np.asarray(p) - 0.02 * np.asarray(g), params, gradients)
            sgd.zero_grad()
            backward(other, batch, a, b)
            sgd.step()
        for tree in (statistics, params):
            for path, tensor, array in located(other, tree):
                close(array, tensor, path, 1e-7)


@pytest.mark.slow
def test_equal_cells_in_float32_as_a_training_runs_them() -> None:
    """Scanned and recomputed, with the CPU kernels where there are any; a genotype with a node that does not exist."""
    with jax.enable_x64(True):
        net, variables, other, images = build("FairDARTS_a", "cifar", 32, cells=8)
        a, b = targets((images.shape[0], CLASSES))
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (variables, images, a, b))
    (params, x, *factors), net = (low[0]["params"], *low[1:]), net.clone(dtype="float32", recompute=True)
    (_, (out, statistics)), (gradients, _) = gradient_step(net, True)(params, x, low[0]["batch_stats"], *factors)
    other.train()
    expected, _ = backward(other, images, a, b)
    close(out[0], expected[0], "logits", 1e-5)
    close(out[1], expected[1], "auxiliary logits", 1e-5)
    for path, tensor, gradient in located(other, gradients):
        close(gradient, tensor.grad, path, 2e-4)
    for path, tensor, statistic in located(other, statistics):
        close(statistic, tensor, path, 1e-5)
