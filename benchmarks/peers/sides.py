"""PyTorch's side of each comparison, in the form of `benchmarks.ours`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import DepthwiseCase, SearchCase, TrainCase
from benchmarks.peers import methods
from benchmarks.peers.search import Search, SearchNetwork, compile_operations
from benchmarks.peers.train import DerivedNetwork, Training
from prdarts_jax.space.genotype import Genotype

Steps = Callable[[int], None]
POOL = 4


def _settings(precision: str) -> torch.dtype | None:
    """All cores; on a GPU the fastest convolutions of the precision. The dtype of autocast, or None."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def _format(layout: str) -> torch.memory_format:
    return {"channels-last": torch.channels_last, "default": torch.contiguous_format}[layout]


def _batches(batch: int, side: int, layout: str, device: str) -> list[tuple[Tensor, Tensor]]:
    found = []
    for seed in range(POOL):
        rng = np.random.default_rng(seed)
        images = torch.from_numpy(rng.normal(size=(batch, 3, side, side)).astype(np.float32))
        labels = torch.from_numpy(rng.integers(0, 10, batch))
        found.append((images.to(device).contiguous(memory_format=_format(layout)), labels.to(device)))
    return found


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _repeated(step: Callable[[int], None], device: str) -> Steps:
    """Runs step(0), step(1), ... and waits for the last of each call."""
    done = 0

    def run(count: int) -> None:
        nonlocal done
        for _ in range(count):
            step(done)
            done += 1
        _wait(device)

    return run


RESOURCE, DROP_PATH = 1e-2, 0.3  # of SNAS with 8 cells


def search_network(case: SearchCase) -> SearchNetwork:
    """The search network of a case."""
    drop_path = DROP_PATH if case.method == "snas" else 0.0
    return SearchNetwork(
        case.ops, case.cells, case.channels, head_norm=case.head_norm, drop_path=drop_path, partial=case.partial
    )


def search_method(case: SearchCase) -> tuple[methods.Method, str]:
    """(method, rule) of a case."""
    if case.method == "prdarts":
        return methods.PathRegularized(case.tau, executed=case.executed), "weights-first"
    if case.method == "snas":
        return methods.Relaxed(case.tau, RESOURCE, search_costs(case)), "joint"
    if case.method == "gdas":
        return methods.OneSampled(case.tau), "weights-first"
    made = {"fair-darts": methods.Sigmoid, "pc-darts": methods.EdgeSoftmax}.get(case.method, methods.Softmax)
    return made(), "unrolled" if case.method == "darts2" else "arch-first"


def search_costs(case: SearchCase) -> dict[str, Tensor]:
    """{"normal", "reduce"} -> [cells, 3, E, O]: size, flops and access, the tables of the library."""
    from prdarts_jax.config.search import SpaceConfig
    from prdarts_jax.network import counts
    from prdarts_jax.space import Space

    config = SpaceConfig(cells=case.cells, channels=case.channels, ops=case.ops, head_norm=case.head_norm)
    space = Space.create(config, classes=10, in_channels=3)
    tables = np.stack(counts.search_costs(space, image=case.side), 1).astype(np.float32)
    return {kind: torch.from_numpy(tables[[cell.kind == kind for cell in space.layout]]) for kind in methods.KINDS}


def search(
    layout: str = "channels-last",
    compiled: bool = False,
    device: str = "cpu",
    precision: str = "float32",
    **fields: Any,
) -> tuple[Steps, dict[str, float]]:
    """The bilevel step of a `SearchCase`."""
    autocast = _settings(precision)
    case = SearchCase(**fields)
    began = time.perf_counter()
    torch.manual_seed(0)
    network = search_network(case)
    method, rule = search_method(case)
    search = Search(
        network.to(memory_format=_format(layout)),
        method,
        case.ops,
        rule=rule,
        compiled=compiled,
        device=device,
        autocast=autocast,
    )
    pool = _batches(case.batch, case.side, layout, device)
    if compiled:
        compile_operations(network, pool[0][0], case.ops)
    run = _repeated(lambda i: search.step(pool[i % POOL], pool[(i + 1) % POOL]), device)
    return run, {"init_s": time.perf_counter() - began}


def train(
    layout: str = "channels-last",
    compiled: bool = False,
    device: str = "cpu",
    precision: str = "float32",
    **fields: Any,
) -> tuple[Steps, dict[str, float]]:
    """The SGD step of a `TrainCase`."""
    autocast = _settings(precision)
    case = TrainCase(**fields)
    began = time.perf_counter()
    torch.manual_seed(0)
    network = DerivedNetwork(Genotype.named(case.genotype), case.channels, case.cells)
    training = Training(
        network.to(memory_format=_format(layout)),
        drop_path=case.drop_path,
        compiled=compiled,
        device=device,
        autocast=autocast,
    )
    pool = _batches(case.batch, case.side, layout, device)
    run = _repeated(lambda i: training.step(*pool[i % POOL]), device)
    return run, {"init_s": time.perf_counter() - began}


def depthwise(layout: str = "channels-last", device: str = "cpu", **fields: Any) -> tuple[Steps, dict[str, float]]:
    """Forward and both gradients of a depthwise nn.Conv2d."""
    _settings("float32")
    case = DepthwiseCase(**fields)
    out = -(-case.side // case.stride)
    padding = case.dilation * (case.kernel - 1) // 2
    x, ct = (
        torch.randn(case.batch, case.channels, n, n, device=device).contiguous(memory_format=_format(layout))
        for n in (case.side, out)
    )
    conv = torch.nn.Conv2d(
        case.channels, case.channels, case.kernel, case.stride, padding, case.dilation, case.channels, bias=False
    ).to(device, memory_format=_format(layout))
    x.requires_grad_()

    def run(count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(conv(x), (x, conv.weight), ct)
        _wait(device)

    return run, {}
