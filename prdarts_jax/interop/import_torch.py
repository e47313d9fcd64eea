"""Weights of the PyTorch programs of the DARTS family (DARTS, PC-DARTS, PR-DARTS) as variables of `DerivedNetwork`.

Their evaluation networks, NetworkCIFAR and NetworkImageNet, name a weight by its place in nested nn.Sequential:
`cells.3._ops.5.op.1.weight` is the first convolution of the sixth (operation, input) pair of cell 3. What is read is
such a state_dict; the genotype has to be known, since the names do not tell the operations.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from prdarts_jax.errors import UserError, unknown
from prdarts_jax.network.layers import TreePath
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.network.plan import STEMS, NetworkPlan
from prdarts_jax.space.genotype import CELL_INPUTS, Genotype

# Keys under which programs save a state_dict beside the epoch and the optimizer.
_WRAPPERS = ("net", "state_dict", "model_state_dict", "model", "network", "base-model")
# What stands before every name: of nn.DataParallel, of torch.compile, of a module that holds the network (Lightning).
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_SHOWN = 3  # keys in an error line

# The layer -> our entry -> the submodule; layers without weights are not in it.
_SEPARABLE = {
    "depthwise1": "op.1",
    "pointwise1": "op.2",
    "bn1": "op.3",
    "depthwise2": "op.5",
    "pointwise2": "op.6",
    "bn2": "op.7",
}
_DILATED = {"depthwise": "op.1", "pointwise": "op.2", "bn": "op.3"}
_SUBMODULES = {
    "stem": {"conv": "0", "bn": "1"},
    "stem0": {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"},
    "stem1": {"conv": "1", "bn": "2"},
    "preprocess0": {"pointwise": "op.1", "bn": "op.2"},
    "preprocess1": {"pointwise": "op.1", "bn": "op.2"},
    "sep_conv_3x3": _SEPARABLE,
    "sep_conv_5x5": _SEPARABLE,
    "sep_conv_7x7": _SEPARABLE,
    "dil_conv_3x3": _DILATED,
    "dil_conv_5x5": _DILATED,
    "conv_7x1_1x7": {"conv_1x7": "1", "conv_7x1": "2", "bn": "3"},  # a bare nn.Sequential
    "auxiliary": {
        "pointwise": "features.2",
        "bn1": "features.3",
        "conv": "features.5",
        "bn2": "features.6",
        "kernel": "classifier",
        "bias": "classifier",
    },
    "classifier": {"kernel": "", "bias": ""},
}
_FACTORIZED = {"first": "conv_1", "second": "conv_2", "bn": "bn"}  # preprocess0 or skip_connect, where it halves
# The last part of our name -> of theirs; the rest are called weight.
_LEAVES = {"bias": "bias", "mean": "running_mean", "var": "running_var"}
_LAYOUTS = {  # (our rank, theirs) -> their axes in our order; the others are of length 1
    (4, 4): (2, 3, 1, 0),  # OIHW -> HWIO
    (3, 4): (2, 3, 0),  # a depthwise convolution, [C,1,k,k] -> [k,k,C]
    (2, 4): (1, 0),  # a 1x1 convolution, [O,I,1,1] -> [I,O]
    (2, 2): (1, 0),  # a linear layer
}
_SECOND_NORM = "auxiliary_head.features.6."  # of the auxiliary head; some programs leave it out
_STEM_WEIGHT = {"cifar": "stem.0.weight", "imagenet": "stem0.0.weight"}  # the first convolution


class Converted(NamedTuple):
    """A network of a PyTorch program, as ours."""

    variables: dict[str, Any]  # {"params", "batch_stats"}, float32 NumPy arrays
    network: dict[str, Any]  # keyword arguments of DerivedNetwork: its sizes, stem and auxiliary head
    channels: int  # of the images
    notes: tuple[str, ...]  # what is not as in the file


def load_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint, under the names of the network.

    Nothing is unpickled but tensors, plain containers and values that run no code: numbers and arrays of NumPy, paths,
    and the argparse.Namespace that programs save beside the weights (`weights_only`). The state_dict may be the whole
    file or lie under a usual key, and its names may have the prefixes of nn.DataParallel, torch.compile and Lightning.

    Args:
      path: what torch.save wrote.

    Returns:
      name -> array in the layout of PyTorch; floating-point numbers as float32.

    Raises:
      UserError: no such file, PyTorch is not installed, or the file holds anything else.

    >>> load_state_dict(Path("absent.pt"))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: FILE: no file 'absent.pt'
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"FILE: no file {str(path)!r}")
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise UserError("FILE: a PyTorch checkpoint is read with torch, which is absent (pip install torch)") from None
    try:
        with warnings.catch_warnings(), _harmless(torch):  # torch's remarks on old pickles would come before our line
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise whatever they like on a file that is none of theirs
        raise UserError(f"FILE: {str(path)!r} {_problem(error)}") from None
    while isinstance(loaded, Mapping):
        inner = [loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    under = f"bare or under {' | '.join(_WRAPPERS)}"
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"FILE: {str(path)!r} holds no state_dict; allowed: one, {under}")
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise UserError(
            f"FILE: {str(path)!r} holds {_listed(strangers)}, which are no tensors; allowed: a state_dict, {under}"
        )
    prefix = _prefix([str(key) for key in loaded])
    tensors = {str(key).removeprefix(prefix): tensor.detach() for key, tensor in loaded.items()}
    arrays = {}
    for key, t in tensors.items():
        try:
            arrays[key] = (t.float() if t.is_floating_point() else t).numpy()
        except (TypeError, RuntimeError):
            what = "quantized" if t.is_quantized else f"of layout {t.layout} on device {t.device}"
            raise UserError(
                f"FILE: {str(path)!r} holds {key!r}, {what}, which is no plain array; allowed: dense tensors of numbers"
            ) from None
    return arrays


def _harmless(torch: Any) -> contextlib.AbstractContextManager[Any]:
    """A block in which torch unpickles values that hold data alone: making one runs no code of the file."""
    multiarray = importlib.import_module("numpy._core.multiarray")
    functions = {name: getattr(multiarray, name) for name in ("scalar", "_reconstruct")}
    allowed: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, PosixPath]
    kinds = "".join(np.typecodes[name] for name in ("AllInteger", "AllFloat", "Datetime")) + "?SU"
    allowed += {type(np.dtype(kind)) for kind in kinds}
    # NumPy 1 and 2 call the module of the same functions differently, and so do versions of Python that of paths.
    allowed += [(f, f"numpy.{core}.multiarray.{name}") for name, f in functions.items() for core in ("core", "_core")]
    allowed += [(PosixPath, f"pathlib{module}.PosixPath") for module in ("", "._local")]
    return torch.serialization.safe_globals(allowed)


def _problem(error: Exception) -> str:
    """What is wrong with a file that torch does not load, and how to save it again."""
    text = str(error)
    if "TorchScript" in text:
        again = "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        return f"is a TorchScript program, which is not run; allowed: its weights (in PyTorch: {again})"
    if "global" in text.lower():  # what torch says of a class or function that it will not look up
        names = re.findall(r"(?:GLOBAL |got <class ')([\w.]+)", text)
        again = "x = torch.load(FILE, weights_only=False); torch.save(x['state_dict'], NEW)"
        return (
            f"holds other objects than tensors ({names[0] if names else 'of a class'}), which are not unpickled: that "
            "would run their code; allowed: the state_dict alone (if you trust the file, in PyTorch: "
            f"{again}; of a whole network x.state_dict())"
        )
    return f"cannot be read ({type(error).__name__}); allowed: a file of torch.save"


def _prefix(keys: list[str]) -> str:
    """What stands before the names of the network, of the known prefixes."""
    pattern = f"((?:{'|'.join(map(re.escape, _PREFIXES))})*)classifier.weight"
    found = [match[1] for key in keys if (match := re.fullmatch(pattern, key))]
    return min(found, key=len, default="")


def convert(state_dict: Mapping[str, np.ndarray], genotype: Genotype, *, stem: str | None = None) -> Converted:
    """The variables and the size of the network that a state_dict belongs to.

    Convolutions OIHW become HWIO, depthwise ones [k,k,C], 1x1 ones [C_in,C_out]; linear layers [C_in,C_out]. Width,
    depth and classes are read off the shapes. Every key is used and every variable filled, or it is an error.

    The ImageNet programs of DARTS, and others built on it, leave out the second batch normalisation of the auxiliary
    head; so does the network of a checkpoint without it.

    Args:
      state_dict: name -> array, as `load_state_dict` gives it.
      genotype: whose network it is.
      stem: "cifar" | "imagenet"; None: as the names say.

    Raises:
      UserError: the names or shapes are not those of the genotype's network; the line names the first of them.

    Source: the evaluation networks of Liu et al., "DARTS: Differentiable Architecture Search" (ICLR 2019).

    >>> cell = [[("skip_connect", 0), ("max_pool_3x3", 1)]]
    >>> convert({"classifier.weight": np.ones((10, 8, 1))}, Genotype(cell, [2], cell, [2]))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: state_dict: stem.0.weight is missing among classifier.weight; allowed: NetworkCIFAR or NetworkImageNet of the DARTS programs
    """  # noqa: E501 (the message is one line)
    network, in_channels = _size(state_dict, stem)
    plan = DerivedNetwork(genotype, **network).plan(in_channels)
    notes: list[str] = []
    modules = _modules(plan, genotype)
    sources = _sources(plan, modules, state_dict)
    norms = {key.removesuffix("running_mean") for key in state_dict if key.endswith(".running_mean")}
    idle = {f"{norm}num_batches_tracked" for norm in norms}  # of use with momentum=None only; old checkpoints have none
    void = tuple(f"{module}." for path, module in modules.items() if path not in plan.layers)
    unused = [key for key in state_dict if key not in idle and key.startswith(void)]
    if unused:
        notes.append(f"left out: {_listed(unused)}, of edges that leave a node without operations")
    keys = state_dict.keys() - idle - set(unused)
    differences = {"it lacks": sources.keys() - keys, "it has besides": keys - sources.keys()}
    parts = [f"{what} {_listed(sorted(names, key=_natural))}" for what, names in differences.items() if names]
    if parts:
        raise UserError(
            f"state_dict: these are not the weights of the genotype's network: {'; '.join(parts)}; "
            "allowed: the genotype that was trained"
        )
    arrays = {name: _array(key, state_dict[key], name, shape) for key, (name, shape) in sources.items()}
    return Converted(traverse_util.unflatten_dict(arrays), network, in_channels, tuple(notes))


# --- sizes ------------------------------------------------------------------------------------------------------------


def _size(state_dict: Mapping[str, np.ndarray], stem: str | None) -> tuple[dict[str, Any], int]:
    """(keyword arguments of DerivedNetwork, channels of the images)."""
    named = "imagenet" if _STEM_WEIGHT["imagenet"] in state_dict else "cifar"
    if stem is not None and stem not in STEMS:
        raise unknown("stem", stem, STEMS)
    if stem is not None and stem != named and _STEM_WEIGHT[named] in state_dict:
        raise UserError(f"stem: {stem!r}, but the names are those of {named!r} ({_STEM_WEIGHT[named]})")
    stem = stem or named
    first, last = (_shape_of(state_dict, key) for key in (_STEM_WEIGHT[stem], "classifier.weight"))
    numbers = [int(match[1]) for key in state_dict if (match := re.match(r"cells\.(\d+)\.", key))]
    head = [key for key in state_dict if key.startswith("auxiliary_head.")]
    network = {
        "channels": first[0] // 3 if stem == "cifar" else _shape_of(state_dict, "stem1.1.weight")[0],
        "cells": max(numbers, default=-1) + 1,
        "classes": last[0],
        "stem": stem,
        "auxiliary": bool(head),
        "auxiliary_second_norm": not head or any(key.startswith(_SECOND_NORM) for key in head),
    }
    return network, first[1]


def _shape_of(state_dict: Mapping[str, np.ndarray], key: str) -> tuple[int, ...]:
    if key not in state_dict:
        raise UserError(
            f"state_dict: {key} is missing among {_listed(list(state_dict))}; "
            "allowed: NetworkCIFAR or NetworkImageNet of the DARTS programs"
        )
    shape = np.shape(state_dict[key])
    if len(shape) < 2:
        raise UserError(f"state_dict: {key} has shape {list(shape)}; allowed: a weight matrix or convolution")
    return shape


# --- names ------------------------------------------------------------------------------------------------------------


def _modules(plan: NetworkPlan, genotype: Genotype) -> dict[TreePath, str]:
    """Our path of every layer -> their module; also of the edges that leave a node without operations.

    `_ops` numbers the pairs of all nodes of a cell one after the other.
    """
    modules: dict[TreePath, str] = {("auxiliary",): "auxiliary_head"}
    modules |= {(name,): name for name in ("classifier", *dict(plan.stem))}
    for i, cell in enumerate(plan.cells):
        nodes = enumerate(genotype.cell(cell.kind)[0], CELL_INPUTS)
        pairs = [f"node{n}_{k}_{op}" for n, node in nodes for k, (op, _) in enumerate(node)]
        modules |= {(f"cell_{i}", edge.name): f"cells.{i}.{edge.name}" for edge in cell.preprocess}
        modules |= {(f"cell_{i}", pair): f"cells.{i}._ops.{number}" for number, pair in enumerate(pairs)}
    return modules


def _sources(
    plan: NetworkPlan, modules: Mapping[TreePath, str], tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[TreePath, tuple[int, ...]]]:
    """Key of the state_dict -> (our name, collection first, and shape) of every variable of the network."""
    sources = {}
    for path, layer in plan.layers.items():
        kind = re.sub(r"^node\d+_\d+_", "", path[-1])
        submodules = _FACTORIZED if "first" in layer.weights else _SUBMODULES.get(kind, {})
        for (collection, entry, *leaf), weight in layer.variables.items():
            parts = modules[path], submodules[entry], _LEAVES.get((entry, *leaf)[-1], "weight")
            key = ".".join(part for part in parts if part)
            # Some programs wrap conv_7x1_1x7, too, in a module whose nn.Sequential is `op`.
            wrapped = re.sub(r"(\._ops\.\d+)\.(?=\d)", r"\1.op.", key)
            if key not in tensors and wrapped in tensors:
                key = wrapped
            sources[key] = (collection, *path, entry, *leaf), weight.shape
    return sources


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{', '.join(keys[:_SHOWN])}{more}"


# --- arrays -----------------------------------------------------------------------------------------------------------


def _array(key: str, tensor: np.ndarray, name: TreePath, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of PyTorch in our layout, which the ranks tell."""
    tensor = np.asarray(tensor)
    axes = _LAYOUTS.get((len(shape), tensor.ndim), tuple(range(tensor.ndim)))
    rest = [axis for axis in range(tensor.ndim) if axis not in axes]
    ours = tensor.transpose(*axes, *rest)
    if ours.shape != shape + (1,) * len(rest):
        raise UserError(
            f"state_dict: {key} of shape {list(tensor.shape)} does not fit {'/'.join(name[1:])} "
            f"{list(shape)}; allowed: the genotype that was trained"
        )
    if not np.all(np.isfinite(ours)):
        raise UserError(f"state_dict: {key} holds NaN or infinity; allowed: finite weights")
    return np.asarray(ours.reshape(shape), np.float32, order="C")
