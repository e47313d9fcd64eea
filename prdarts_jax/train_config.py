"""What a training of a derived network computes, in the manner of `config.py`. Imports neither jax nor numpy.

Everything but `run` is compared on resume, with the digests of the data and of the genotype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prdarts_jax.config import DTYPES, DataConfig, RunConfig, check_seed, finite, minimum, require
from prdarts_jax.errors import unknown
from prdarts_jax.schedules import KINK

STEMS = ("cifar", "imagenet")
SCHEDULES = ("cosine", "linear")
SCALE_BATCH = 128  # the batch whose learning rate `weights.scale_lr` scales from


@dataclass(frozen=True)
class NetworkConfig:
    """The network of the genotype's cells."""

    channels: int = 36  # C of the first cells
    cells: int = 20  # reductions at cells//3 and 2*cells//3
    stem: str = "cifar"  # cifar (3x3 convolution) | imagenet (three convolutions of stride 2)
    auxiliary: bool = True  # a second classifier after the second reduction cell, in training alone
    primitives: str = ""  # FILE.py with PRIMITIVES = {name: Primitive(...)} of the user

    def __post_init__(self) -> None:
        minimum(self, "network.", channels=2, cells=3)  # the ImageNet stem halves the channels
        if self.stem not in STEMS:
            raise unknown("network.stem", self.stem, STEMS)


@dataclass(frozen=True)
class SgdConfig:
    """SGD for the weights: clip by global norm -> coupled weight decay -> momentum -> learning rate."""

    learning_rate: float = 0.025  # at epoch 0, without warm-up
    schedule: str = "cosine"  # cosine (to 0) | linear (with a kink five epochs before the end); by epoch
    warmup_epochs: int = 0  # epochs e < W with the schedule's rate times (e + 1)/W
    scale_lr: bool = False  # learning rate times batch_size / 128
    momentum: float = 0.9  # decay of the velocity
    nesterov: bool = False  # the look-ahead form of momentum
    weight_decay: float = 3e-4  # coupled L2 on every weight, BN and biases included
    clip_norm: float = 5.0  # global norm of the gradient; inf = no clipping
    transform: str = ""  # path.py:factory(config) -> an optax transformation in place of all of the above

    def __post_init__(self) -> None:
        finite(self, "weights.", but=("clip_norm",))
        minimum(self, "weights.", learning_rate=0, warmup_epochs=0, weight_decay=0)
        require(0 <= self.momentum < 1, "weights.momentum", self.momentum, "in [0, 1)")
        require(self.clip_norm > 0, "weights.clip_norm", self.clip_norm, "> 0 (inf = no clipping)")
        if self.schedule not in SCHEDULES:
            raise unknown("weights.schedule", self.schedule, SCHEDULES)


@dataclass(frozen=True)
class TrainConfig:
    """A training. Defaults are the preset `cifar10`: the recipe of DARTS and PR-DARTS for CIFAR-10.

    >>> TrainConfig().network.cells
    20
    >>> TrainConfig(drop_path=1.0)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: drop_path: 1.0 is not possible; allowed: in [0, 1)
    """

    network: NetworkConfig = NetworkConfig()
    weights: SgdConfig = SgdConfig()
    data: DataConfig = field(default_factory=lambda: DataConfig(cutout=16))
    run: RunConfig = field(default_factory=RunConfig)
    epochs: int = 600  # over which the learning rate goes to its end and drop-path to its own
    batch_size: int = 128  # global; that of evaluations too
    seed: int = 0  # of every random number: initialisation, batches, augmentation, drop-path
    dtype: str = "float32"  # of activations; parameters and BN statistics stay float32
    drop_path: float = 0.2  # rate p of drop-path at the end of its linear ramp p e/E; 0 = none
    auxiliary_weight: float = 0.4  # of the auxiliary head's loss
    label_smoothing: float = 0.0  # s: targets (1 - s) one-hot + s / classes
    ema: float = 0.0  # decay d of the averaged weights d ema + (1 - d) weights, evaluated too; 0 = none
    local_batch_norm: bool = False  # BN statistics of each device's part of the batch, not of the whole batch
    evaluate_every: int = 1  # epochs between evaluations on the test images, the last one always; 0 = never

    def __post_init__(self) -> None:
        finite(self, "")
        minimum(self, "", epochs=1, batch_size=1, auxiliary_weight=0, evaluate_every=0)
        check_seed(self.seed)
        for name in ("drop_path", "label_smoothing", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "in [0, 1)")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.weights.schedule == "linear":
            require(self.epochs > KINK, "epochs", self.epochs, f"> {KINK} with weights.schedule linear")
        require(
            self.weights.warmup_epochs <= self.epochs,
            "weights.warmup_epochs",
            self.weights.warmup_epochs,
            f"0..{self.epochs} (epochs)",
        )
        if self.run.devices != "all":
            devices = int(self.run.devices)
            require(self.batch_size % devices == 0, "batch_size", self.batch_size, f"a multiple of {devices} devices")
