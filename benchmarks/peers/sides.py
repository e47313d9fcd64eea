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
from benchmarks.peers.search import PathRegularized, Search, SearchNetwork, Softmax, compile_operations
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
    network = SearchNetwork(case.ops, case.cells, case.channels, head_norm=case.head_norm)
    method = PathRegularized(case.tau, executed=case.executed) if case.method == "prdarts" else Softmax()
    search = Search(
        network.to(memory_format=_format(layout)),
        method,
        case.ops,
        arch_first=case.method == "darts",
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
