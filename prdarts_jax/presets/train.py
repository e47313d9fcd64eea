"""Presets of a training, and where each value of its config comes from: defaults < the preset < flags.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prdarts_jax.config import schema
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.errors import unknown
from prdarts_jax.presets.merge import Preset, Resolved, combine, table

__all__ = ["PRESETS", "Preset", "Resolved", "resolve", "table"]

_CIFAR100 = {"data.source": "tfds:cifar100"}
_IMAGENET = {
    "data.source": "tfds:imagenet2012",
    "data.crop_padding": 0,
    "data.cutout": 0,
    "data.image_size": 224,
    "data.brightness": 0.4,
    "data.contrast": 0.4,
    "data.saturation": 0.4,
    "data.hue": 0.2,
    "network.channels": 48,
    "network.cells": 14,
    "network.stem": "imagenet",
    "epochs": 250,
    "drop_path": 0.0,
    "label_smoothing": 0.1,
    "weights.learning_rate": 0.1,
    "weights.schedule": "linear",
    "weights.weight_decay": 3e-5,
}

PRESETS: Mapping[str, Preset] = {
    "cifar10": Preset("CIFAR-10, 20 cells of 36 channels, 600 epochs"),
    "cifar100": Preset("CIFAR-100, the same recipe", settings=_CIFAR100),
    "released-cifar10": Preset(
        "CIFAR-10 as the program of PR-DARTS' authors does it",
        settings={"drop_path": 0.3, "network.auxiliary": False},
    ),
    "released-cifar100": Preset(
        "CIFAR-100 as the program of PR-DARTS' authors does it",
        settings={**_CIFAR100, "drop_path": 0.4, "network.auxiliary": False},
    ),
    "imagenet": Preset("ImageNet, 14 cells of 48 channels, 250 epochs", settings=_IMAGENET),
    "released-imagenet": Preset(
        "ImageNet as the program of PR-DARTS' authors does it",
        settings={**_IMAGENET, "batch_size": 256, "label_smoothing": 0.2},
    ),
    "digits": Preset(
        "the 8x8 digits inside scikit-learn: minutes on two cores, nothing to download",
        settings={
            "data.source": "digits",
            "data.crop_padding": 1,
            "data.flip": False,
            "data.cutout": 0,
            "network.channels": 8,
            "network.cells": 5,
            "network.auxiliary": False,
            "epochs": 40,
            "batch_size": 32,
            "drop_path": 0.0,
        },
    ),
    "cifar10-small": Preset(
        "CIFAR-10 at a scale for two cores: a fifth of the images, a narrow and shallow network",
        settings={
            "data.examples": 10_000,
            "data.cutout": 0,
            "network.channels": 8,
            "network.cells": 5,
            "network.auxiliary": False,
            "epochs": 20,
            "batch_size": 64,
            "drop_path": 0.0,
            "evaluate_every": 5,
        },
    ),
}


def resolve(preset: str = "cifar10", flags: Mapping[str, Any] | None = None) -> Resolved[TrainConfig]:
    """The config of a training, and the source of each of its values.

    Args:
      preset: a name of `PRESETS`.
      flags: dotted config path -> value or command-line string.

    Raises:
      UserError: an unknown preset or path, or a value that is not possible.

    >>> made = resolve("digits", {"epochs": "3"})
    >>> made.config.epochs, made.sources["epochs"], made.sources["data.source"], made.sources["weights.momentum"]
    (3, 'flag', 'preset digits', 'default')
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    values, sources = combine(TrainConfig, {f"preset {preset}": PRESETS[preset].settings, "flag": flags or {}})
    return Resolved(schema.replace(TrainConfig(), values), sources)
