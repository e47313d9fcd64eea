"""What is computed and how it is run, as frozen dataclasses: validation, JSON, dotted paths, the sources of values.

`SearchConfig` holds two kinds of fields. Everything but `run` says *what is computed*: it is compared on resume and a
difference is refused. `run` says *how* (paths, devices, intervals, logging) and may change between starts.

This module imports neither jax nor numpy, so `prdarts --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prdarts_jax.errors import UserError, unknown

SCHEMA_VERSION = 1
OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
DTYPES = ("float32", "bfloat16")
MAX_SEED = 2**32 - 1  # a key of jax.random holds 32 bits of a seed: larger ones would repeat smaller ones


def require(holds: bool, path: str, value: object, allowed: str) -> None:
    """Refuses the value of a field in one line, unless it `holds`."""
    if not holds:
        raise UserError(f"{path}: {value!r} is not possible; allowed: {allowed}")


def minimum(config: object, section: str, **least: float) -> None:
    """Refuses fields of a config below their least value; `section` is their path with its dot."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value >= low, f"{section}{name}", value, f">= {low}")


def finite(config: object, section: str, *, but: tuple[str, ...] = ()) -> None:
    """Refuses inf and nan in the float fields of a config, apart from those named in `but`."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        if f.type == "float" and f.name not in but:  # annotations are texts here
            value = getattr(config, f.name)
            require(math.isfinite(value), f"{section}{f.name}", value, "a finite number")


def check_seed(seed: int) -> None:
    """Refuses a seed that jax.random would not tell from another one."""
    require(0 <= seed <= MAX_SEED, "seed", seed, f"0..{MAX_SEED}")


@dataclass(frozen=True)
class SpaceConfig:
    """The search space (Zhou et al. 2020, section 4; the eight operations are those of DARTS)."""

    cells: int = 8  # cells in the search network; reductions at cells//3 and 2*cells//3
    channels: int = 16  # C of the first cells
    nodes: int = 4  # intermediate nodes of a cell
    ops: tuple[str, ...] = OPS  # names in the order of the columns of beta
    edge_ops: tuple[tuple[tuple[str, ...], ...], ...] = ()  # (normal, reduce) x edge -> names allowed there; () = all
    head_norm: bool = True  # affine BN and ReLU before the pooling
    pool_norm: bool = True  # BN without affine after the pooling operations
    primitives: str = ""  # FILE.py with PRIMITIVES = {name: Primitive(...)} of the user

    def __post_init__(self) -> None:
        minimum(self, "space.", cells=3, channels=1, nodes=1)
        require(len(self.ops) >= 1, "space.ops", self.ops, "at least one operation")
        require(len(set(self.ops)) == len(self.ops), "space.ops", ",".join(self.ops), "each operation once")
        require(set(self.ops) != {"none"}, "space.ops", "none", "at least one operation besides none")
        if not self.primitives:
            for name in self.ops:
                if name not in OPS:
                    raise unknown("space.ops", name, OPS)
        if self.edge_ops:
            edges = sum(2 + n for n in range(self.nodes))
            require(len(self.edge_ops) == 2, "space.edge_ops", len(self.edge_ops), "a list for normal and for reduce")
            for kind, lists in zip(("normal", "reduce"), self.edge_ops, strict=True):
                path = f"space.edge_ops.{kind}"
                require(len(lists) == edges, path, len(lists), f"{edges} lists, one an edge")
                for edge, names in enumerate(lists):
                    require(len(names) > 0, f"{path}[{edge}]", names, "at least one operation an edge")
                    for name in names:
                        if name not in self.ops:
                            raise unknown(f"{path}[{edge}]", name, self.ops)


@dataclass(frozen=True)
class MethodConfig:
    """The search method: a row of the registry, or `path.py:factory`, and the factory's keyword arguments."""

    strategy: str = "prdarts"  # a name of `prdarts strategies` | path.py:factory
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the strategy's factory


@dataclass(frozen=True)
class WeightsConfig:
    """SGD for the weights: clip by global norm -> coupled weight decay -> momentum -> learning rate."""

    learning_rate: float = 0.025  # at epoch 0
    learning_rate_min: float = 0.001  # the cosine's other end
    momentum: float = 0.9  # decay of the velocity
    nesterov: bool = True  # the look-ahead form of momentum
    weight_decay: float = 5e-4  # coupled L2 on every weight, BN and biases included
    clip_norm: float = 5.0  # global norm of the gradient of the weights; inf = no clipping
    transform: str = ""  # path.py:factory(config) -> an optax transformation in place of all of the above

    def __post_init__(self) -> None:
        finite(self, "weights.", but=("clip_norm",))
        minimum(self, "weights.", learning_rate=0, learning_rate_min=0, weight_decay=0)
        require(0 <= self.momentum < 1, "weights.momentum", self.momentum, "in [0, 1)")
        require(self.clip_norm > 0, "weights.clip_norm", self.clip_norm, "> 0 (inf = no clipping)")


@dataclass(frozen=True)
class ArchConfig:
    """Adam for the architecture parameters, with coupled weight decay."""

    learning_rate: float = 3e-4  # constant
    beta1: float = 0.5  # decay of the first moment
    beta2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 1e-3  # coupled L2
    transform: str = ""  # path.py:factory(config) -> an optax transformation in place of all of the above

    def __post_init__(self) -> None:
        finite(self, "arch.")
        minimum(self, "arch.", learning_rate=0, beta1=0, beta2=0, weight_decay=0)
        require(self.beta1 < 1, "arch.beta1", self.beta1, "in [0, 1)")
        require(self.beta2 < 1, "arch.beta2", self.beta2, "in [0, 1)")
        require(self.eps > 0, "arch.eps", self.eps, "> 0")


@dataclass(frozen=True)
class DataConfig:
    """The data and its augmentation. Where it lies (`run.data_dir`) is not part of what is computed."""

    source: str = "tfds:cifar10"  # digits | tfds:NAME | npz:FILE | folder:DIR
    examples: int = 0  # use at most so many training images, a seeded random subset; 0 = all
    crop_padding: int = 4  # random crop after zero padding by so many pixels; 0 = none
    flip: bool = True  # random horizontal flip
    cutout: int = 0  # side of the square set to zero after normalisation; 0 = none

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        kinds = ("digits", "tfds", "npz", "folder")
        if kind not in kinds or (kind == "digits") != (rest == ""):
            raise UserError(
                f"data.source: {self.source!r} is not a source; allowed: digits | tfds:NAME | npz:FILE | folder:DIR"
            )
        require(self.examples == 0 or self.examples >= 2, "data.examples", self.examples, "0 (all) | >= 2")
        minimum(self, "data.", crop_padding=0, cutout=0)


@dataclass(frozen=True)
class RunConfig:
    """How it is run: not part of what is computed, free to change between a start and its resumption."""

    workdir: str = ""  # default: runs/<command>-<preset>-seed<N>
    data_dir: str = ""  # TFDS data_dir; default: the environment's TFDS_DATA_DIR
    devices: str = "all"  # N | all
    checkpoint_every: int = 1  # epochs between checkpoints
    checkpoint_minutes: float = 10.0  # and at the latest after so many minutes
    steps_per_dispatch: int = 10  # steps in one call of the compiled program
    time_limit: float = 0.0  # minutes after which the run stops with a checkpoint; 0 = none
    overwrite: bool = False  # start again in a workdir that holds another run
    progress: str = "auto"  # auto | bar | lines | off
    tensorboard: bool = False  # mirror the metrics to WORKDIR/tensorboard
    log_every: int = 10  # steps between `step` rows in metrics.jsonl

    def __post_init__(self) -> None:
        if self.devices != "all":
            require(self.devices.isdecimal() and int(self.devices) > 0, "run.devices", self.devices, ">= 1 | all")
        finite(self, "run.")
        minimum(
            self, "run.", checkpoint_every=1, checkpoint_minutes=0, steps_per_dispatch=1, time_limit=0, log_every=1
        )
        if self.progress not in ("auto", "bar", "lines", "off"):
            raise unknown("run.progress", self.progress, ("auto", "bar", "lines", "off"))


@dataclass(frozen=True)
class SearchConfig:
    """A search. Defaults are the preset `paper`: PR-DARTS on CIFAR-10 as published.

    >>> SearchConfig().space.cells
    8
    >>> SearchConfig(epochs=0)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: epochs: 0 is not possible; allowed: >= 1
    """

    space: SpaceConfig = SpaceConfig()
    method: MethodConfig = field(default_factory=MethodConfig)
    weights: WeightsConfig = WeightsConfig()
    arch: ArchConfig = ArchConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    epochs: int = 200  # over which tau and the learning rate go to their ends
    batch_size: int = 128  # global, of each of the two halves
    seed: int = 0  # of every random number: initialisation, split, batches, augmentation, gates
    dtype: str = "float32"  # of activations; parameters, BN statistics and architecture parameters stay float32
    local_batch_norm: bool = False  # BN statistics of each device's part of the batch, not of the whole batch
    evaluate_every: int = 0  # epochs between full evaluations with the expected gates; 0 = never

    def __post_init__(self) -> None:
        minimum(self, "", epochs=1, batch_size=1, evaluate_every=0)
        check_seed(self.seed)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.run.devices != "all":
            devices = int(self.run.devices)
            require(self.batch_size % devices == 0, "batch_size", self.batch_size, f"a multiple of {devices} (devices)")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain JSON types.

    >>> to_dict(ArchConfig())["beta1"]
    0.5
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: Mapping[str, Any], path: str = "") -> Any:
    """The inverse of `to_dict`; unknown names and wrong types are one clear error.

    >>> from_dict(SearchConfig, to_dict(SearchConfig())) == SearchConfig()
    True
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path.rstrip('.') or 'config'}: {values!r} is not possible; allowed: a section with names")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise unknown(f"{path}{name}".rpartition(".")[0] or "config", name, hints)
    made = {name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()}
    return kind(**made)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` (JSON type or command-line string) as the type `hint`."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, f"{path}.")  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: {value!r} is not possible; allowed: a list")
        return tuple(_convert(item, part, f"{path}[{i}]") for i, part in enumerate(value))
    if origin in (typing.Union, types.UnionType) or hint is Any or origin is not None:
        return value
    return convert_scalar(hint, value, path)


def convert_scalar(hint: type, value: Any, path: str) -> Any:
    """A scalar of type bool, int, float or str from a JSON value or a command-line string.

    >>> convert_scalar(float, "3e-4", "arch.learning_rate"), convert_scalar(bool, "false", "data.flip")
    (0.0003, False)
    """
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[str(value).lower()]
        if hint is int:
            number = _whole(value) if isinstance(value, str) else value
            if isinstance(value, bool) or int(number) != number:
                raise ValueError
            return int(number)
        if hint is float:
            number = float(value)
            if isinstance(value, bool) or number != number:
                raise ValueError
            return number
        if hint is str:
            if not isinstance(value, str):
                raise ValueError
            return value
    except (ValueError, KeyError, TypeError, OverflowError):
        kinds = {bool: "true | false", int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{path}: {value!r} is not possible; allowed: {kinds[hint]}") from None
    return value


def _whole(text: str) -> int | float:
    try:
        return int(text)  # a float would round numbers above 2^53
    except ValueError:
        return float(text)  # "1e3"


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf field of a config class as (dotted path, type, default).

    >>> [path for path, _, _ in fields(SearchConfig)][:2]
    ['space.cells', 'space.channels']
    """
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            default = f.default if f.default is not dataclasses.MISSING else {}
            yield f"{prefix}{f.name}", hint, default


def comments(kind: type) -> dict[str, str]:
    """The comment beside each field of a config class, by dotted path: the one place where a field is explained.

    Args:
      kind: a dataclass whose fields stand one a line.

    >>> comments(SearchConfig)["space.channels"]
    'C of the first cells'
    """
    found: dict[str, str] = {}
    hints = typing.get_type_hints(kind)
    beside = {}
    # A class may extend another one, whose fields come first.
    for owner in reversed([one for one in kind.__mro__ if dataclasses.is_dataclass(one)]):
        for line in inspect.getsource(owner).splitlines():
            code, _, comment = line.partition("  # ")
            beside[code.strip().partition(":")[0]] = comment.strip()
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            found |= {f"{f.name}.{path}": text for path, text in comments(hint).items()}  # type: ignore[arg-type]
        else:
            found[f.name] = beside[f.name]
    return found


def get(config: Any, path: str) -> Any:
    """The value at a dotted path.

    >>> get(SearchConfig(), "weights.momentum")
    0.9
    """
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def replace(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with the values at dotted paths changed, converted and validated.

    >>> replace(SearchConfig(), {"space.cells": 6, "seed": "3"}).space.cells
    6
    """
    nested = dataclasses.asdict(config)
    hints = {path: hint for path, hint, _ in fields(type(config))}
    for path, value in changes.items():
        head, _, option = path.partition("method.options.")
        if not head and option:
            nested["method"]["options"] = {**nested["method"]["options"], option: value}
            continue
        if path not in hints:
            raise unknown("field", path, hints)
        section = nested
        *parents, last = path.split(".")
        for name in parents:
            section = section[name]
        section[last] = value
    return from_dict(type(config), nested)


def computed(config: Any) -> dict[str, Any]:
    """What is computed: the flat fields that must be equal for a run to be resumed (all but `run`)."""
    flat = {path: get(config, path) for path, _, _ in fields(type(config)) if not path.startswith("run.")}
    options = flat.pop("method.options", {})
    flat |= {f"method.options.{name}": value for name, value in options.items()}
    return json.loads(json.dumps(flat))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Human-readable differences of two flat configs: 'field: OLD in the workdir, NEW now'.

    >>> differences({"seed": 0}, {"seed": 1})
    ['seed: 0 in the workdir, 1 now']
    """
    names = sorted(old.keys() | new.keys())
    return [
        f"{n}: {old.get(n, 'absent')!r} in the workdir, {new.get(n, 'absent')!r} now"
        for n in names
        if n not in old or n not in new or old[n] != new[n]
    ]
