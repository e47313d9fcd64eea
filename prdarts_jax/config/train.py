"""What a training of a derived network computes, in the manner of `config.search`. Imports neither jax nor numpy.

Everything but `run` is compared on resume, with the digests of the data and of the genotype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prdarts_jax.config.schema import SEED, SHARE, Limit, batch_for, check, finite, require
from prdarts_jax.config.search import CLIP_NORM, DTYPES, PRECISIONS, ImagesConfig, RunConfig
from prdarts_jax.schedules import KINK, SCHEDULES

STEMS = ("cifar", "imagenet")
STREAMS = ("auto", "always", "never")
SCALE_BATCH = 128  # the batch whose learning rate `weights.scale_lr` scales from


@dataclass(frozen=True)
class NetworkConfig:
    """The network of the genotype's cells."""

    channels: int = 36  # C of the first cells
    cells: int = 20  # reductions at cells//3 and 2*cells//3
    stem: str = "cifar"  # cifar (3x3 convolution) | imagenet (three convolutions of stride 2)
    auxiliary: bool = True  # a second classifier after the second reduction cell, in training alone
    auxiliary_second_norm: bool = True  # BN after its second convolution; DARTS' ImageNet program has none
    primitives: str = ""  # FILE.py with PRIMITIVES = {name: Primitive(...)} of the user

    def __post_init__(self) -> None:
        check(self, "network.", channels=2, cells=3, stem=STEMS)  # the ImageNet stem halves the channels


@dataclass(frozen=True)
class SgdConfig:
    """SGD for the weights: clip by global norm -> coupled weight decay -> momentum -> learning rate."""

    learning_rate: float = 0.025  # at epoch 0, without warm-up
    schedule: str = "cosine"  # cosine (to 0) | linear (kinked five epochs before the end) | step (times 0.97 an epoch)
    warmup_epochs: int = 0  # epochs e < W with the schedule's rate times (e + 1)/W
    scale_lr: bool = False  # learning rate times batch_size / 128
    momentum: float = 0.9  # decay of the velocity
    nesterov: bool = False  # the look-ahead form of momentum
    weight_decay: float = 3e-4  # coupled L2 on every weight, BN and biases included
    clip_norm: float = 5.0  # global norm of the gradient; inf = no clipping
    transform: str = ""  # path.py:factory(config) -> an optax transformation in place of all of the above

    def __post_init__(self) -> None:
        finite(self, "weights.", but=("clip_norm",))
        check(self, "weights.", learning_rate=0, warmup_epochs=0, weight_decay=0)
        check(self, "weights.", momentum=SHARE, clip_norm=CLIP_NORM, schedule=SCHEDULES)


@dataclass(frozen=True)
class TrainDataConfig(ImagesConfig):
    """The data of a training: on the device or streamed, CIFAR's augmentation or ImageNet's."""

    stream: str = "auto"  # auto (above resident_gb, or with image_size) | always | never: read while used
    resident_gb: float = 4.0  # GiB that the decoded images may take on the device
    image_size: int = 0  # side of random resized crops, of images of any size; 0 = images of one size, as they are
    test_resize: int = 0  # shorter side of test images before their centre crop; 0 = image_size * 8/7 (224: 256)
    min_area: float = 0.08  # least share of the image that a random resized crop shows
    brightness: float = 0.0  # colour jitter: factor in 1 +- this; with image_size
    contrast: float = 0.0  # colour jitter: factor in 1 +- this; with image_size
    saturation: float = 0.0  # colour jitter: factor in 1 +- this; with image_size
    hue: float = 0.0  # colour jitter: share of a turn, +- this, at most 0.5; with image_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "data.", stream=STREAMS, resident_gb=0, image_size=0, test_resize=0)
        check(self, "data.", brightness=0, contrast=0, saturation=0, hue=0)
        require(self.hue <= 0.5, "data.hue", self.hue, "0..0.5")
        require(0 < self.min_area <= 1, "data.min_area", self.min_area, "in (0, 1]")
        if self.image_size:
            require(self.stream != "never", "data.stream", self.stream, "auto | always with data.image_size")
            require(self.crop_padding == 0, "data.crop_padding", self.crop_padding, "0 with data.image_size")
            least = self.image_size
            require(not 0 < self.test_resize < least, "data.test_resize", self.test_resize, f"0 | >= {least}")
        else:
            none = Limit("0 without data.image_size", lambda value: value == 0)
            check(self, "data.", test_resize=none, brightness=none, contrast=none, saturation=none, hue=none)

    @property
    def shorter_side(self) -> int:
        """Shorter side of a test image before its centre crop.

        >>> TrainDataConfig(image_size=224, crop_padding=0).shorter_side
        256
        """
        return self.test_resize or self.image_size * 8 // 7


@dataclass(frozen=True)
class TrainRunConfig(RunConfig):
    """How a training is run: not part of what is computed, free to change between a start and its resumption."""

    workers: str = "auto"  # auto (by the cores) | N processes that decode streamed images; 0 = threads of this one

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.workers == "auto" or self.workers.isdecimal(), "run.workers", self.workers, "auto | >= 0")


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
    data: TrainDataConfig = field(default_factory=lambda: TrainDataConfig(cutout=16))
    run: TrainRunConfig = field(default_factory=TrainRunConfig)
    epochs: int = 600  # over which the learning rate goes to its end and drop-path to its own
    batch_size: int = 128  # global; that of evaluations too
    seed: int = 0  # of every random number: initialisation, batches, augmentation, drop-path
    dtype: str = "float32"  # of activations; parameters and BN statistics stay float32
    precision: str = "default"  # of products of float32 arrays: default | tf32 | bf16 | highest; CPU: no effect
    drop_path: float = 0.2  # rate p of drop-path at the end of its linear ramp p e/E; 0 = none
    auxiliary_weight: float = 0.4  # of the auxiliary head's loss
    label_smoothing: float = 0.0  # s: targets (1 - s) one-hot + s / classes
    ema: float = 0.0  # decay d of the averaged weights d ema + (1 - d) weights, evaluated too; 0 = none
    local_batch_norm: bool = False  # BN statistics of each device's part of the batch, not of the whole batch
    evaluate_every: int = 1  # epochs between evaluations on the test images, the last one always; 0 = never

    def __post_init__(self) -> None:
        finite(self, "")
        check(self, "", epochs=1, batch_size=1, auxiliary_weight=0, evaluate_every=0, seed=SEED)
        check(self, "", drop_path=SHARE, label_smoothing=SHARE, ema=SHARE, dtype=DTYPES, precision=PRECISIONS)
        if self.weights.schedule == "linear":
            require(self.epochs > KINK, "epochs", self.epochs, f"> {KINK} with weights.schedule linear")
        warmup = self.weights.warmup_epochs
        require(warmup <= self.epochs, "weights.warmup_epochs", warmup, f"0..{self.epochs} (epochs)")
        check(self, "", batch_size=batch_for(self.run.devices))
