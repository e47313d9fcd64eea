"""What a search computes and how it is run, as frozen dataclasses with their checks.

`SearchConfig` holds two kinds of fields. Everything but `run` says *what is computed*: it is compared on resume and a
difference is refused. `run` says *how* (paths, devices, intervals, logging) and may change between starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prdarts_jax.config.schema import POSITIVE, SEED, SHARE, Limit, batch_for, check, finite, require, require_names
from prdarts_jax.errors import UserError

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
PRECISIONS = ("default", "tf32", "bf16", "highest")
ARCH_OPTIMIZERS = ("adam", "sgd")
LOWERINGS = ("auto", "scan", "waves", "kernels")
CLIP_NORM = Limit("> 0 (inf = no clipping)", POSITIVE.holds)


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
    partial: int = 1  # K: the first C/K channels of an edge go through its operations, the others pass by; 1 = all
    primitives: str = ""  # FILE.py with PRIMITIVES = {name: Primitive(...)} of the user

    def __post_init__(self) -> None:
        check(self, "space.", cells=3, channels=1, nodes=1, partial=1)
        divides = self.channels % self.partial == 0
        require(divides, "space.partial", self.partial, f"a divisor of space.channels ({self.channels})")
        require(len(self.ops) >= 1, "space.ops", self.ops, "at least one operation")
        require(len(set(self.ops)) == len(self.ops), "space.ops", ",".join(self.ops), "each operation once")
        require(set(self.ops) != {"none"}, "space.ops", "none", "at least one operation besides none")
        if not self.primitives:
            require_names("space.ops", self.ops, OPS)
        if self.edge_ops:
            edges = sum(2 + n for n in range(self.nodes))
            require(len(self.edge_ops) == 2, "space.edge_ops", len(self.edge_ops), "a list for normal and for reduce")
            for kind, lists in zip(("normal", "reduce"), self.edge_ops, strict=True):
                path = f"space.edge_ops.{kind}"
                require(len(lists) == edges, path, len(lists), f"{edges} lists, one an edge")
                for edge, names in enumerate(lists):
                    require(len(names) > 0, f"{path}[{edge}]", names, "at least one operation an edge")
                    require_names(f"{path}[{edge}]", names, self.ops)


@dataclass(frozen=True)
class MethodConfig:
    """The search method: a row of the registry, or `path.py:factory`, and the factory's keyword arguments."""

    strategy: str = "prdarts"  # a name of `prdarts strategies` | path.py:factory
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the strategy's factory
    transforms: tuple[str, ...] = ()  # NAME:option=value,... of each transform, the first one innermost (--with)


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
        check(self, "weights.", learning_rate=0, learning_rate_min=0, weight_decay=0)
        check(self, "weights.", momentum=SHARE, clip_norm=CLIP_NORM)


@dataclass(frozen=True)
class ArchConfig:
    """Adam or SGD for the architecture: clip by global norm -> coupled weight decay -> moments -> learning rate."""

    optimizer: str = "adam"  # adam | sgd
    learning_rate: float = 3e-4  # constant
    beta1: float = 0.5  # of adam: decay of the first moment
    beta2: float = 0.999  # of adam: decay of the second moment
    eps: float = 1e-8  # of adam: added to the root of the second moment
    momentum: float = 0.0  # of sgd: decay of the velocity
    weight_decay: float = 1e-3  # coupled L2
    clip_norm: float = float("inf")  # global norm of the gradient of the architecture; inf = no clipping
    transform: str = ""  # path.py:factory(config) -> an optax transformation in place of all of the above

    def __post_init__(self) -> None:
        finite(self, "arch.", but=("clip_norm",))
        check(self, "arch.", optimizer=ARCH_OPTIMIZERS, learning_rate=0, beta1=0, beta2=0, weight_decay=0)
        check(self, "arch.", beta1=SHARE, beta2=SHARE, eps=POSITIVE, momentum=SHARE, clip_norm=CLIP_NORM)


@dataclass(frozen=True)
class ImagesConfig:
    """The images of a run and their augmentation. Where they lie (`run.data_dir`) is not part of what is computed."""

    source: str = "tfds:cifar10"  # digits | tfds:NAME | npz:FILE | folder:DIR
    examples: int = 0  # use at most so many training images, a seeded random subset; 0 = all
    crop_padding: int = 4  # random crop after zero padding by so many pixels; 0 = none
    flip: bool = True  # random horizontal flip
    cutout: int = 0  # side of the square set to zero after normalisation; 0 = none
    holdout: float = 0.0  # training images that the run never sees: a share below 1, or how many; 0 = none
    holdout_seed: int = 0  # of the choice of those images: it does not depend on `seed`

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        if kind not in ("digits", "tfds", "npz", "folder") or (kind == "digits") != (rest == ""):
            allowed = "digits | tfds:NAME | npz:FILE | folder:DIR"
            raise UserError(f"data.source: {self.source!r} is not a source; allowed: {allowed}")
        some = Limit("0 (all) | >= 2", lambda examples: examples == 0 or examples >= 2)
        check(self, "data.", examples=some, crop_padding=0, cutout=0)
        finite(self, "data.")
        part = Limit("in [0, 1) | a whole number", lambda part: 0 <= part < 1 or (part > 0 and part == int(part)))
        check(self, "data.", holdout=part, holdout_seed=SEED)


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """The data of a search: the images, and which of them the weights and the architecture learn from."""

    split: str = "0.5,0.5"  # shares of the images for weights and for architecture | shared (one set for both)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            shares = self.shares
        except ValueError:
            shares = (0.0,)
        allowed = "shared | two shares > 0 of sum <= 1, as 0.5,0.5"
        possible = shares is None or (len(shares) == 2 and min(shares) > 0 and sum(shares) <= 1 + 1e-9)
        require(possible, "data.split", self.split, allowed)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The shares of the images for weights and architecture; None where both learn from one set.

        >>> DataConfig(split="0.8,0.2").shares
        (0.8, 0.2)
        """
        return None if self.split == "shared" else tuple(float(share) for share in self.split.split(","))


@dataclass(frozen=True)
class RunConfig:
    """How it is run: not part of what is computed, free to change between a start and its resumption."""

    workdir: str = ""  # default: runs/<command>-<preset>-seed<N>
    data_dir: str = ""  # TFDS data_dir; default: the environment's TFDS_DATA_DIR
    devices: str = "all"  # N | all
    lowering: str = "auto"  # of the mixed cell: auto (what suits the device) | scan | waves | kernels
    checkpoint_every: int = 1  # epochs between checkpoints
    checkpoint_minutes: float = 10.0  # and at the latest after so many minutes
    steps_per_dispatch: int = 10  # steps in one call of the compiled program
    time_limit: float = 0.0  # minutes after which the run stops with a checkpoint; 0 = none
    overwrite: bool = False  # start again in a workdir that holds another run
    progress: str = "auto"  # auto | bar | lines | off
    tensorboard: bool = False  # mirror the metrics to WORKDIR/tensorboard
    log_every: int = 10  # steps between `step` rows in metrics.jsonl

    def __post_init__(self) -> None:
        number = self.devices.isdecimal() and int(self.devices) > 0
        require(number or self.devices == "all", "run.devices", self.devices, ">= 1 | all")
        finite(self, "run.")
        check(self, "run.", checkpoint_every=1, checkpoint_minutes=0, steps_per_dispatch=1, time_limit=0, log_every=1)
        check(self, "run.", progress=("auto", "bar", "lines", "off"), lowering=LOWERINGS)


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
    precision: str = "default"  # of products of float32 arrays: default | tf32 | bf16 | highest; CPU: no effect
    local_batch_norm: bool = False  # BN statistics of each device's part of the batch, not of the whole batch
    evaluate_every: int = 0  # epochs between full evaluations with the expected gates; 0 = never

    def __post_init__(self) -> None:
        check(self, "", epochs=1, batch_size=1, evaluate_every=0, seed=SEED, dtype=DTYPES, precision=PRECISIONS)
        check(self, "", batch_size=batch_for(self.run.devices))
