"""Weights of the PyTorch programs of the DARTS family (DARTS, PC-DARTS, PR-DARTS) as variables of `DerivedNetwork`.

Their evaluation networks, NetworkCIFAR and NetworkImageNet, name a weight by its place in nested nn.Sequential:
`cells.3._ops.5.op.1.weight` is the first convolution of the sixth (operation, input) pair of cell 3. What is read is
such a state_dict; the genotype has to be known, since the names do not tell the operations.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from prdarts_jax.errors import UserError, unknown
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.network.plan import STEMS, CellPlan, NetworkPlan
from prdarts_jax.ops.batch_norm import BN_EPS
from prdarts_jax.ops.layers import Weight
from prdarts_jax.space.genotype import CELL_INPUTS, Genotype

_WRAPPERS = ("net", "state_dict")  # keys under which the programs save a state_dict beside the epoch and the optimizer
_PARALLEL = "module."  # nn.DataParallel puts it before every name
_NORM = {  # our leaf -> (collection, name in nn.BatchNorm2d)
    "scale": ("params", "weight"),
    "bias": ("params", "bias"),
    "mean": ("batch_stats", "running_mean"),
    "var": ("batch_stats", "running_var"),
}
_COUNTER = "num_batches_tracked"  # of use with momentum=None only; old checkpoints have none
_SHOWN = 3  # keys in an error line

# Our entry -> the submodule, for each kind of layer.
_FACTORIZED = {"first": "conv_1", "second": "conv_2", "bn": "bn"}
_RELU_CONV_BN = {"pointwise": "op.1", "bn": "op.2"}
_SEPARABLE = {
    "depthwise1": "op.1",
    "pointwise1": "op.2",
    "bn1": "op.3",
    "depthwise2": "op.5",
    "pointwise2": "op.6",
    "bn2": "op.7",
}
_DILATED = {"depthwise": "op.1", "pointwise": "op.2", "bn": "op.3"}
_OPERATIONS = {
    "none": {},
    "max_pool_3x3": {},
    "avg_pool_3x3": {},
    "skip_connect": _FACTORIZED,  # of stride 2; without entries at stride 1
    "sep_conv_3x3": _SEPARABLE,
    "sep_conv_5x5": _SEPARABLE,
    "sep_conv_7x7": _SEPARABLE,
    "dil_conv_3x3": _DILATED,
    "dil_conv_5x5": _DILATED,
    "conv_7x1_1x7": {"conv_1x7": "1", "conv_7x1": "2", "bn": "3"},  # a bare nn.Sequential
}
_STEM = {"conv": "0", "bn": "1"}
_STEM0 = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
_STEM1 = {"conv": "1", "bn": "2"}
_CLASSIFIER = {"kernel": "", "bias": ""}
_AUXILIARY = {
    "pointwise": "features.2",
    "bn1": "features.3",
    "conv": "features.5",
    "bn2": "features.6",
    "kernel": "classifier",
    "bias": "classifier",
}
_BN2 = f"auxiliary_head.{_AUXILIARY['bn2']}"


class Converted(NamedTuple):
    """A network of a PyTorch program, as ours."""

    variables: dict[str, Any]  # {"params", "batch_stats"}, float32 NumPy arrays
    network: dict[str, Any]  # keyword arguments of DerivedNetwork: channels, cells, classes, stem, auxiliary
    channels: int  # of the images
    notes: tuple[str, ...]  # what is not as in the file


class _Source(NamedTuple):
    """Where an array of ours comes from."""

    name: tuple[str, ...]  # in our tree, collection first
    shape: tuple[int, ...]
    key: str  # in the state_dict


def load_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint, under the names of the network.

    Nothing is unpickled but tensors and plain containers (`weights_only`). The state_dict may be the whole file or be
    under "net" or "state_dict", and its names may have the prefix "module." of nn.DataParallel.

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
        with warnings.catch_warnings():  # torch's remarks on old pickles would come before our line
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise whatever they like on a file that is none of theirs
        if "global" in str(error).lower():  # what torch says of a class or function that it will not look up
            reason = "holds other objects than tensors, which are not unpickled"
            allowed = "tensors and plain containers (save the state_dict alone)"
        else:
            reason, allowed = f"cannot be read ({type(error).__name__})", "a file of torch.save"
        raise UserError(f"FILE: {str(path)!r} {reason}; allowed: {allowed}") from None
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"FILE: {str(path)!r} holds no state_dict; allowed: one, bare or under {' | '.join(_WRAPPERS)}")
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise UserError(
            f"FILE: {str(path)!r} holds {_listed(strangers)}, which are no tensors; "
            f"allowed: a state_dict, bare or under {' | '.join(_WRAPPERS)}"
        )
    parallel = all(str(key).startswith(_PARALLEL) for key in loaded)
    arrays = {}
    for key, tensor in loaded.items():
        tensor = tensor.detach()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        arrays[str(key).removeprefix(_PARALLEL) if parallel else str(key)] = array
    return arrays


def convert(state_dict: Mapping[str, np.ndarray], genotype: Genotype, *, stem: str | None = None) -> Converted:
    """The variables and the size of the network that a state_dict belongs to.

    Convolutions OIHW become HWIO, depthwise ones [k,k,C], 1x1 ones [C_in,C_out]; linear layers [C_in,C_out]. Width,
    depth and classes are read off the shapes. Every key is used and every variable filled, or it is an error.

    The ImageNet program of DARTS, and others built on it, leave out the second batch normalisation of the auxiliary
    head. Ours is then the identity in evaluation; in training it would normalise (`notes` says so).

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
    sources = list(_sources(plan, genotype))
    filled, notes = dict(state_dict), []
    if plan.auxiliary is not None and network["stem"] == "imagenet" and f"{_BN2}.weight" not in state_dict:
        filled |= _identity_norm(plan)
        notes.append(
            "the auxiliary head has no second batch normalisation: ours is the identity in evaluation, and would "
            "normalise if training went on"
        )
    sources = [_unwrapped(source, filled) for source in sources]
    for key in [key for key in filled if key.endswith(f".{_COUNTER}")]:
        if f"{key.removesuffix(_COUNTER)}running_mean" in filled:
            del filled[key]
    unused = [key for key in filled if key.startswith(_void(plan, genotype))]
    if unused:
        notes.append(f"left out: {_listed(unused)}, of edges that leave a node without operations")
    _same_keys({source.key for source in sources}, {key: a for key, a in filled.items() if key not in unused})
    flat = {source.name: _array(source, filled[source.key]) for source in sources}
    return Converted(traverse_util.unflatten_dict(flat), network, in_channels, tuple(notes))


# --- sizes ------------------------------------------------------------------------------------------------------------


def _size(state_dict: Mapping[str, np.ndarray], stem: str | None) -> tuple[dict[str, Any], int]:
    """(keyword arguments of DerivedNetwork, channels of the images)."""
    said = "imagenet" if "stem0.0.weight" in state_dict else "cifar"
    if stem is not None and stem not in STEMS:
        raise unknown("stem", stem, STEMS)
    if stem is not None and stem != said and f"{_first(said)}.0.weight" in state_dict:
        raise UserError(f"stem: {stem!r}, but the names are those of {said!r} ({_first(said)}.0.weight)")
    stem = stem or said
    widest = f"{_first(stem)}.0.weight"
    shapes = {key: _shape_of(state_dict, key) for key in (widest, "classifier.weight")}
    divided = shapes[widest][0] // 3 if stem == "cifar" else _shape_of(state_dict, "stem1.1.weight")[0]
    numbers = [int(match[1]) for key in state_dict if (match := re.match(r"cells\.(\d+)\.", key))]
    network = {
        "channels": divided,
        "cells": max(numbers, default=-1) + 1,
        "classes": shapes["classifier.weight"][0],
        "stem": stem,
        "auxiliary": any(key.startswith("auxiliary_head.") for key in state_dict),
    }
    return network, shapes[widest][1]


def _first(stem: str) -> str:
    return "stem" if stem == "cifar" else "stem0"


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


def _sources(plan: NetworkPlan, genotype: Genotype) -> Iterator[_Source]:
    """Where every variable of the network comes from."""
    stems = {"stem": _STEM, "stem0": _STEM0, "stem1": _STEM1}
    for name, layer in plan.stem:
        yield from _of_layer((name,), layer.declared, name, stems[name])
    for i, cell in enumerate(plan.cells):
        for edge in cell.edges:
            prefix, submodules = _module(cell, genotype, edge.name, edge.layer.declared)
            yield from _of_layer((f"cell_{i}", edge.name), edge.layer.declared, f"cells.{i}.{prefix}", submodules)
    if plan.auxiliary is not None:
        yield from _of_layer(("auxiliary",), plan.auxiliary.declared, "auxiliary_head", _AUXILIARY)
    yield from _of_layer(("classifier",), plan.classifier.declared, "classifier", _CLASSIFIER)


def _module(
    cell: CellPlan, genotype: Genotype, entry: str, declared: Mapping[str, Any]
) -> tuple[str, Mapping[str, str]]:
    """(the module of an entry of a cell, its submodules): `_ops` numbers the pairs of all nodes one after the other."""
    if entry.startswith("preprocess"):
        return entry, _FACTORIZED if "first" in declared else _RELU_CONV_BN
    match = re.fullmatch(r"node(\d+)_(\d+)_(.+)", entry)
    assert match is not None
    nodes = genotype.cell(cell.kind)[0]
    before = sum(len(pairs) for pairs in nodes[: int(match[1]) - CELL_INPUTS])
    if match[3] not in _OPERATIONS:
        raise unknown("genotype", match[3], _OPERATIONS)
    return f"_ops.{before + int(match[2])}", _OPERATIONS[match[3]]


def _of_layer(
    name: tuple[str, ...], declared: Mapping[str, Any], module: str, submodules: Mapping[str, str]
) -> Iterator[_Source]:
    for entry, weight in declared.items():
        where = f"{module}.{submodules[entry]}".rstrip(".")
        if isinstance(weight, Weight):
            yield _Source(("params", *name, entry), weight.shape, f"{where}.{'bias' if entry == 'bias' else 'weight'}")
            continue
        for leaf, (collection, theirs) in _NORM.items():
            yield _Source((collection, *name, entry, leaf), weight["scale"].shape, f"{where}.{theirs}")


def _unwrapped(source: _Source, found: Mapping[str, np.ndarray]) -> _Source:
    """Some programs wrap conv_7x1_1x7, too, in a module whose nn.Sequential is `op`."""
    wrapped = re.sub(r"(\._ops\.\d+)\.(?=\d)", r"\1.op.", source.key)
    return source._replace(key=wrapped) if source.key not in found and wrapped in found else source


def _void(plan: NetworkPlan, genotype: Genotype) -> tuple[str, ...]:
    """What names begin with that belong to edges which do nothing: they leave a node that does not exist."""
    found = []
    for i, cell in enumerate(plan.cells):
        nodes = enumerate(genotype.cell(cell.kind)[0], CELL_INPUTS)
        names = [f"node{n}_{k}_{op}" for n, pairs in nodes for k, (op, _) in enumerate(pairs)]
        live = {edge.name for node in cell.nodes for edge in node}
        found += [f"cells.{i}._ops.{at}." for at, name in enumerate(names) if name not in live]
    return tuple(found)


def _same_keys(wanted: set[str], found: Mapping[str, np.ndarray]) -> None:
    missing, strange = sorted(wanted - set(found), key=_natural), sorted(set(found) - wanted, key=_natural)
    if not missing and not strange:
        return
    parts = [f"{what} {_listed(keys)}" for what, keys in (("it lacks", missing), ("it has besides", strange)) if keys]
    raise UserError(
        f"state_dict: these are not the weights of the genotype's network: {'; '.join(parts)}; "
        "allowed: the genotype that was trained"
    )


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{', '.join(keys[:_SHOWN])}{more}"


# --- arrays -----------------------------------------------------------------------------------------------------------


def _identity_norm(plan: NetworkPlan) -> dict[str, np.ndarray]:
    """The second normalisation of the auxiliary head as y = x: scale sqrt(var + eps) undoes the division."""
    assert plan.auxiliary is not None
    channels = plan.auxiliary.norms["bn2"]
    values = {"weight": np.sqrt(1 + BN_EPS), "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    return {f"{_BN2}.{name}": np.full(channels, value, np.float32) for name, value in values.items()}


def _array(source: _Source, array: np.ndarray) -> np.ndarray:
    """An array of PyTorch in our layout, which its rank tells."""
    array, rank = np.asarray(array), len(source.shape)
    ours = array
    if rank == 4:  # [O,I,k,k]
        ours = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    elif rank == 3:  # depthwise, [C,1,k,k]
        ours = array[:, 0].transpose(1, 2, 0) if array.ndim == 4 and array.shape[1] == 1 else array
    elif rank == 2:  # linear [O,I], or 1x1 [O,I,1,1]
        ours = array[:, :, 0, 0] if array.ndim == 4 and array.shape[2:] == (1, 1) else array
        ours = ours.T
    if ours.shape != source.shape:
        raise UserError(
            f"state_dict: {source.key} of shape {list(array.shape)} does not fit {'/'.join(source.name[1:])} "
            f"{list(source.shape)}; allowed: the genotype that was trained"
        )
    if not np.all(np.isfinite(ours)):
        raise UserError(f"state_dict: {source.key} holds NaN or infinity; allowed: finite weights")
    return np.asarray(ours, np.float32, order="C")
