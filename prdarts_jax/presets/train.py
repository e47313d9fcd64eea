"""Presets of a training, and where each value of its config comes from: defaults < the preset < flags.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prdarts_jax.config import schema
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.errors import unknown
from prdarts_jax.presets.merge import DARTS, OURS, PAPER, RELEASED, Preset, Resolved, combine, table

__all__ = ["PRESETS", "PROVENANCE", "Preset", "Resolved", "resolve", "table"]

# Of the values of the recipes for CIFAR and ImageNet; not named here: ours.
PROVENANCE: Mapping[str, str] = {
    "network.channels": PAPER,
    "network.cells": PAPER,
    "network.stem": DARTS,
    "network.auxiliary": DARTS,
    "network.auxiliary_second_norm": RELEASED,
    "weights.learning_rate": RELEASED,
    "weights.schedule": RELEASED,
    "weights.warmup_epochs": RELEASED,
    "weights.momentum": RELEASED,
    "weights.nesterov": RELEASED,
    "weights.weight_decay": RELEASED,
    "weights.clip_norm": RELEASED,
    "data.source": PAPER,
    "data.crop_padding": DARTS,
    "data.flip": DARTS,
    "data.cutout": DARTS,
    "data.image_size": DARTS,
    "data.test_resize": DARTS,
    "data.min_area": DARTS,
    "data.brightness": DARTS,
    "data.contrast": DARTS,
    "data.saturation": DARTS,
    "data.hue": DARTS,
    "epochs": PAPER,
    "batch_size": PAPER,
    "drop_path": PAPER,
    "auxiliary_weight": DARTS,
    "label_smoothing": DARTS,
}
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
    "label_smoothing": 0.1,
    "weights.learning_rate": 0.1,
    "weights.schedule": "linear",
    "weights.weight_decay": 3e-5,
}


def _released(summary: str, base: Mapping[str, Any], own: Mapping[str, Any]) -> Preset:
    """The recipe `base` with what the released program has of its own."""
    return Preset(summary, settings={**base, **own}, provenance={**PROVENANCE, **dict.fromkeys(own, RELEASED)})


PRESETS: Mapping[str, Preset] = {
    "cifar10": Preset("CIFAR-10, 20 cells of 36 channels, 600 epochs", provenance=PROVENANCE),
    "cifar100": Preset("CIFAR-100, the same recipe", settings=_CIFAR100, provenance=PROVENANCE),
    "released-cifar10": _released(
        "CIFAR-10 as the program of PR-DARTS' authors does it",
        {},
        {"drop_path": 0.3, "network.auxiliary": False},
    ),
    "released-cifar100": _released(
        "CIFAR-100 as the program of PR-DARTS' authors does it",
        _CIFAR100,
        {"drop_path": 0.4, "network.auxiliary": False},
    ),
    "imagenet": _released("ImageNet, 14 cells of 48 channels, 250 epochs", _IMAGENET, {"drop_path": 0.0}),
    "released-imagenet": _released(
        "ImageNet as the program of PR-DARTS' authors does it",
        _IMAGENET,
        {"drop_path": 0.0, "batch_size": 256, "label_smoothing": 0.2},
    ),
    "darts-imagenet": Preset(
        "ImageNet as the program of DARTS does it",
        settings={**_IMAGENET, "drop_path": 0.0, "weights.schedule": "step", "network.auxiliary_second_norm": False},
        provenance=dict.fromkeys(PROVENANCE, DARTS),
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
    (3, 'flag', 'preset digits (ours)', 'default (released program)')
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    values, sources = combine(TrainConfig, {f"preset {preset}": chosen.settings, "flag": flags or {}})
    for path, place in sources.items():
        if place == "default":
            sources[path] = f"{place} ({(chosen.provenance or PROVENANCE).get(path, OURS)})"
        elif place != "flag":
            sources[path] = f"{place} ({chosen.provenance.get(path, OURS)})"
    return Resolved(schema.replace(TrainConfig(), values), sources)
