"""What the tests of the sources share."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prdarts_jax.data import folder_source, tfds_source
from prdarts_jax.errors import UserError

_RNG = np.random.default_rng(0)


def one_line(call: Callable[[], object], *words: str) -> str:
    """The UserError of `call`: one line that holds every word and says what is allowed."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "allowed:"):
        assert word in message, message
    return message


def random_image(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 256, shape).astype(np.uint8)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder_source.Folder, "_decode", fail)
    monkeypatch.setattr(tfds_source.Prepared, "_decode", fail)


def write_tfds(data_dir: Path, name: str, splits: dict, shape=(None, None, 3), classes=2, label="label") -> None:
    """Prepares a set of one's own as array_record: {split: [(pixels, label)]}."""
    import tensorflow_datasets as tfds

    def examples(rows):
        for index, (pixels, k) in enumerate(rows):
            png = io.BytesIO()
            Image.fromarray(pixels.squeeze()).save(png, "png")
            yield index, {"image": io.BytesIO(png.getvalue()), label: k}

    def info(self):
        target = tfds.features.ClassLabel(num_classes=classes) if label == "label" else tfds.features.Text()
        features = {"image": tfds.features.Image(shape=shape, encoding_format="png"), label: target}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    members = {
        "name": name,
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, _: {split: examples(rows) for split, rows in splits.items()},
        "_generate_examples": lambda self: iter(()),
    }
    with tfds.core.registered.skip_registration():
        builder_class = type("Mine", (tfds.core.GeneratorBasedBuilder,), members)
    tfds.disable_progress_bar()
    builder_class(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
