"""Our weights into the torch modules: for the tests that the peers compute the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _layout(array: np.ndarray) -> np.ndarray:
    """[C,D] -> OIHW of a 1x1 convolution; [k,k,C] -> of a depthwise one; HWIO -> OIHW."""
    if array.ndim == 2:
        return array.T[:, :, None, None]
    return array.transpose(2, 0, 1)[:, None] if array.ndim == 3 else array.transpose(3, 2, 0, 1)


def _pairs(module: nn.Module, tree: Mapping[str, Any]) -> list[tuple[Tensor, np.ndarray]]:
    """(tensor, our array in its layout) of every entry of a tree that is named like the module."""
    found: list[tuple[Tensor, np.ndarray]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _pairs(module.get_submodule(name), value)
        elif isinstance(module, nn.BatchNorm2d):
            found.append((getattr(module, _NORM[name]), np.asarray(value)))
        elif name in ("kernel", "bias"):
            linear = module if isinstance(module, nn.Linear) else module.get_submodule("linear")
            array = np.asarray(value)
            found.append((linear.weight, array.T) if name == "kernel" else (linear.bias, array))
        else:
            found.append((module.get_submodule(name).weight, _layout(np.asarray(value))))
    return found


def derived_pairs(network: nn.Module, tree: Mapping[str, Any]) -> list[tuple[Tensor, np.ndarray]]:
    """The derived network's; the tree is "params" or "batch_stats"."""
    return _pairs(network, tree)


def search_pairs(
    network: Any, weights: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], edges: Any
) -> list[tuple[Tensor, np.ndarray]]:
    """The search network's.

    Args:
      network: the peer.
      weights, cells: ours, and those of its cells one by one (`supernet.by_cell`).
      edges: of a cell type gives (group, {operation: edges of its rows}) pairs.
    """
    stem, head = weights["stem"], weights["head"]
    found = [(network.stem[0].weight, _layout(np.asarray(stem["conv"])))]
    found += [(getattr(network.stem[1], _NORM[name]), np.asarray(stem[name])) for name in ("scale", "bias")]
    for cell, params in zip(network.cells, cells, strict=True):
        for name in ("preprocess0", "preprocess1"):
            found += _pairs(cell.get_submodule(name), params[name])
        for group, rows in edges(cell.kind):
            for op, stacks in params["edges"][group].items():
                for row, edge in enumerate(rows[op]):
                    one = {name: np.asarray(stack)[row] for name, stack in stacks.items()}
                    found += _pairs(cell.edges[edge][op], one)
    found += _pairs(network.head, {name: head[name] for name in ("kernel", "bias")})
    if "norm" in head:
        found += _pairs(network.head_norm, head["norm"])
    return found


def load(pairs: list[tuple[Tensor, np.ndarray]]) -> None:
    """Copies our arrays into the tensors."""
    with torch.no_grad():
        for tensor, array in pairs:
            tensor.copy_(torch.from_numpy(np.array(array)))
