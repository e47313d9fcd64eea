"""Independent oracles: closed forms and loops in numpy, the search network written from torch.nn layers.

The torch functions take the JAX weight tree as torch leaves in its own layout (HWIO, edges stacked) and hand each
torch.nn layer a permuted view, so that `leaf.grad` is directly comparable. Images are NCHW inside.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from prdarts_jax.ops import kernels
from prdarts_jax.ops.layers import Weight
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import Space


def require_torch() -> Any:
    """torch; absent: skip with a reason, but fail where CI=true, since a skipped parity test proves nothing."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail("torch is absent: the parity tests cannot run (pip install torch)")
        pytest.skip("needs torch, the oracle of the parity tests")


def require_kernels() -> None:
    """The CPU kernels; absent: skip with the reason, but fail where CI=true, whose machines have a compiler."""
    found = kernels.kernels()
    if not found.loaded:
        (pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip)(f"no CPU kernels: {found[1]}")


def quick_jit(f: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit with the compiler's optimisations off: less than half the compile time, for programs that run once."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(f, compiler_options=options)


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, float64."""
    return np.random.default_rng(seed).normal(size=shape)


def drawn(declared: Any, seed: int = 0) -> Any:
    """float32 numpy arrays for a tree of `Weight` declarations; `draw` would be a small program for each of them."""
    rng = np.random.default_rng(seed)

    def one(weight: Weight) -> np.ndarray:
        if not weight.fan_in:
            return np.full(weight.shape, weight.constant, np.float32)
        return (rng.uniform(-1.0, 1.0, weight.shape) / np.sqrt(weight.fan_in)).astype(np.float32)

    return jax.tree.map(one, declared, is_leaf=lambda node: isinstance(node, Weight))


def float64(tree: Any) -> Any:
    """float64 copies; biases and scales get noise, so that a mix-up of the two would show."""
    rng = np.random.default_rng(0)

    def widen(a: jax.Array) -> jax.Array:
        wide = np.asarray(a, np.float64)
        return jax.numpy.asarray(wide + rng.normal(scale=0.1, size=wide.shape) if wide.ndim == 1 else wide)

    return jax.tree.map(widen, tree)


def all_executed(space: Space, kind: str) -> jax.Array:
    """int32[E,O]: every operation that an edge may use, void for the others."""
    operations = np.where(space.allowed[kind], np.arange(space.num_ops), space.num_ops)
    return jax.numpy.asarray(operations.astype(np.int32))


def sigmoid(x: Any) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


# --- gates ------------------------------------------------------------------------------------------------------------


def gate_cdf(x: float, beta: Any, tau: float, a: float = -0.1, b: float = 1.1) -> np.ndarray:
    """P(g <= x), 0 <= x < 1: g <= x iff logit(u) <= tau logit((x-a)/(b-a)) - beta; P(logit(u) <= z) = sigmoid(z)."""
    q = (x - a) / (b - a)
    return sigmoid(tau * np.log(q / (1 - q)) - np.asarray(beta, np.float64))


def gate_mean(beta: float, tau: float, a: float = -0.1, b: float = 1.1) -> float:
    """E[g] = integral over [0,1] of P(g > x), by a fine trapezoid."""
    x = np.linspace(0.0, 1.0, 200_001)
    return float(np.trapezoid(1.0 - np.array(gate_cdf(x, beta, tau, a, b)), x))  # type: ignore[arg-type]


# --- penalties, by loops ----------------------------------------------------------------------------------------------


def group_mean(p: np.ndarray, counted: np.ndarray) -> float:
    """Mean P over the counted (edge, operation) pairs, 0 if there are none."""
    total, number = 0.0, 0
    for e in range(p.shape[0]):
        for o in range(p.shape[1]):
            if counted[e, o]:
                total, number = total + float(p[e, o]), number + 1
    return total / number if number else 0.0


def path_product(p: np.ndarray, counted: np.ndarray, nodes: int, reduction: str, *, masked: bool) -> float:
    """Product over the edges 1->2, 2->3, ... of the sum (mean) of P over what counts: an empty sum is 0.

    Masked, edges where nothing counts are left out; 0 if nothing does anywhere.
    """
    product, any_edge, row = 1.0, False, 0
    for n in range(2, 2 + nodes):
        for j in range(n):
            if j == n - 1:
                chosen = [float(p[row, o]) for o in range(p.shape[1]) if counted[row, o]]
                if chosen or not masked:
                    any_edge = True
                    product *= sum(chosen) / (max(len(chosen), 1) if reduction == "mean" else 1)
            row += 1
    return product if any_edge else 0.0


# --- optimizers, as torch.optim computes them -------------------------------------------------------------------------


def clip_by_global_norm(grads: list[np.ndarray], limit: float) -> list[np.ndarray]:
    norm = np.sqrt(sum(float(np.sum(g * g)) for g in grads))
    return [g * min(1.0, limit / norm) for g in grads]


def sgd_nesterov(w: np.ndarray, g: np.ndarray, buffer: np.ndarray, *, lr: float, mu: float, wd: float):
    """torch.optim.SGD(nesterov=True): (new weight, new buffer)."""
    g = g + wd * w
    buffer = mu * buffer + g
    return w - lr * (g + mu * buffer), buffer


def adam_coupled(w, g, m, v, t, *, lr, b1, b2, eps, wd):  # type: ignore[no-untyped-def]
    """torch.optim.Adam(weight_decay=wd), step t = 1, 2, ...: (new weight, m, v)."""
    g = g + wd * w
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), m, v


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_leaves(tree: Any) -> Any:
    """A JAX tree as float64 torch leaves that want gradients."""
    torch = require_torch()
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a, np.float64), requires_grad=True), tree)


def torch_grads(tree: Any) -> Any:
    """Their gradients as numpy; zeros where a leaf was not used."""
    return jax.tree.map(lambda t: np.zeros(t.shape) if t.grad is None else t.grad.numpy(), tree)


def nchw(x: Any) -> Any:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Any) -> Any:
    return x.permute(0, 2, 3, 1)


def _conv(x: Any, kernel: Any, stride: Any = 1, dilation: int = 1, groups: int = 1, same: bool = True) -> Any:
    """torch.nn.Conv2d without bias, its weight a view of an HWIO kernel."""
    torch = require_torch()
    kh, kw, ci, co = kernel.shape
    padding = (dilation * (kh - 1) // 2, dilation * (kw - 1) // 2) if same else 0
    layer = torch.nn.Conv2d(ci * groups, co, (kh, kw), stride, padding, dilation, groups, bias=False)
    return torch.func.functional_call(layer, {"weight": kernel.permute(3, 2, 0, 1)}, (x,))


def _depthwise(x: Any, kernel: Any, stride: int = 1, dilation: int = 1) -> Any:
    return _conv(x, kernel[:, :, None, :], stride, dilation, groups=kernel.shape[2])


def _pointwise(x: Any, kernel: Any, stride: int = 1) -> Any:
    return _conv(x, kernel[None, None], stride, same=False)


def _norm(x: Any, affine: Mapping[str, Any] | None = None) -> Any:
    """torch.nn.BatchNorm2d with the statistics of the batch."""
    torch = require_torch()
    layer = torch.nn.BatchNorm2d(x.shape[1], affine=affine is not None, track_running_stats=False)
    named = {} if affine is None else {"weight": affine["scale"], "bias": affine["bias"]}
    return torch.func.functional_call(layer, named, (x,))


def _factorized_reduce(x: Any, first: Any, second: Any) -> Any:
    torch = require_torch()
    x = torch.nn.ZeroPad2d((0, x.shape[3] % 2, 0, x.shape[2] % 2))(x)
    return torch.cat([_pointwise(x, first, 2), _pointwise(x[:, :, 1:, 1:], second, 2)], dim=1)


def torch_primitive(name: str, params: Mapping[str, Any], x: Any, stride: int) -> Any:
    """One operation of the search space, [B,C,H,W] -> [B,C,ceil(H/s),ceil(W/s)]."""
    torch = require_torch()
    nn = torch.nn
    if name == "none":
        return nn.MaxPool2d(1, stride)(x) * 0.0
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)(x)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)(x)
    if name == "skip_connect":
        return x if stride == 1 else _norm(_factorized_reduce(nn.ReLU()(x), params["first"], params["second"]))
    if name.startswith("sep_conv"):
        x = _norm(_pointwise(_depthwise(nn.ReLU()(x), params["depthwise1"], stride), params["pointwise1"]))
        return _norm(_pointwise(_depthwise(nn.ReLU()(x), params["depthwise2"]), params["pointwise2"]))
    if name.startswith("dil_conv"):
        return _norm(_pointwise(_depthwise(nn.ReLU()(x), params["depthwise"], stride, 2), params["pointwise"]))
    assert name == "conv_7x1_1x7"
    return _norm(_conv(_conv(nn.ReLU()(x), params["conv_1x7"], (1, stride)), params["conv_7x1"], (stride, 1)))


def torch_cell(space: Space, kind: str, weights: Any, gates: Any, s0: Any, s1: Any) -> list[Any]:
    """The intermediate nodes: every node the gated sum of all allowed operations of all its edges; gates [E,O]."""
    states, row = [s0, s1], 0
    rows_seen: dict[tuple[int, str], int] = {}
    for n in range(2, 2 + space.nodes):
        node = None
        for j in range(n):
            stride = 2 if kind == "reduce" and j < 2 else 1
            names = space.edge_ops[("normal", "reduce").index(kind)][row] if space.edge_ops else space.ops
            for o, name in enumerate(space.ops):
                if name not in names:
                    continue
                place = rows_seen.get((stride, name), 0)
                rows_seen[stride, name] = place + 1
                stacks = weights[f"stride{stride}"].get(name, {})
                y = torch_primitive(name, {key: stack[place] for key, stack in stacks.items()}, states[j], stride)
                if "pool" in name and space.pool_norm:
                    y = _norm(y)
                node = gates[row, o] * y + (0.0 if node is None else node)
            row += 1
        states.append(node)
    return states[2:]


def torch_partial_cell(space: Space, kind: str, weights: Any, gates: Any, edges: Any, s0: Any, s1: Any) -> list[Any]:
    """`torch_cell` of partial channels, an edge at a time: mixture of the first C/K, the others beside it, shuffle."""
    torch = require_torch()
    shuffle = torch.nn.ChannelShuffle(space.partial)
    states, row = [s0, s1], 0
    rows_seen: dict[tuple[int, str], int] = {}
    for n in range(2, 2 + space.nodes):
        outputs = []
        for j in range(n):
            stride = 2 if kind == "reduce" and j < 2 else 1
            width = states[j].shape[1] // space.partial
            first, rest = states[j][:, :width], states[j][:, width:]
            mixed = []
            names = space.edge_ops[("normal", "reduce").index(kind)][row] if space.edge_ops else space.ops
            for o, name in enumerate(space.ops):
                if name not in names:
                    continue
                place = rows_seen.get((stride, name), 0)
                rows_seen[stride, name] = place + 1
                stacks = weights[f"stride{stride}"].get(name, {})
                y = torch_primitive(name, {key: stack[place] for key, stack in stacks.items()}, first, stride)
                mixed.append(gates[row, o] * (_norm(y) if "pool" in name and space.pool_norm else y))
            if stride == 2:
                rest = torch.nn.MaxPool2d(2, 2, ceil_mode=True)(rest)
            outputs.append(edges[row] * shuffle(torch.cat([sum(mixed), rest], dim=1)))
            row += 1
        states.append(sum(outputs))
    return states[2:]


def torch_preprocess(params: Mapping[str, Any], x: Any) -> Any:
    x = require_torch().nn.ReLU()(x)
    if "pointwise" in params:
        return _norm(_pointwise(x, params["pointwise"]))
    return _norm(_factorized_reduce(x, params["first"], params["second"]))


def torch_supernet(space: Space, weights: Any, gates: Mapping[str, Any], images: Any, edges: Any = None) -> Any:
    """Logits of the search network; images [B,H,W,C], gates {"normal", "reduce"} -> [E,O]; edges -> [E], or None: 1."""
    torch = require_torch()
    stem = weights["stem"]
    x = _norm(_conv(nchw(images), stem["conv"]), stem)
    before_last, last = x, x
    for i, cell in enumerate(supernet.by_cell(weights, space)):
        kind = "reduce" if i in (space.cells // 3, 2 * space.cells // 3) else "normal"
        s0, s1 = torch_preprocess(cell["preprocess0"], before_last), torch_preprocess(cell["preprocess1"], last)
        if space.partial > 1:
            nodes = torch_partial_cell(space, kind, cell["edges"], gates[kind], edges[kind], s0, s1)
        else:
            table = gates[kind] if edges is None else edges[kind][:, None] * gates[kind]
            nodes = torch_cell(space, kind, cell["edges"], table, s0, s1)
        before_last, last = last, torch.cat(nodes, dim=1)
    head = weights["head"]
    if "norm" in head:
        last = torch.nn.ReLU()(_norm(last, head["norm"]))
    features = torch.nn.AdaptiveAvgPool2d(1)(last).flatten(1)
    layer = torch.nn.Linear(*head["kernel"].shape)
    return torch.func.functional_call(layer, {"weight": head["kernel"].T, "bias": head["bias"]}, (features,))
