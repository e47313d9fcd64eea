"""Sets prepared for TensorFlow Datasets, read without TensorFlow and never downloaded."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from data_cases import forbid_decoding, one_line, random_image, write_tfds

from prdarts_jax.data import sources
from prdarts_jax.data.arrays import statistics
from prdarts_jax.errors import UserError


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def rows(count: int, *shape: int) -> list:
    return [(random_image(*shape), i % 2) for i in range(count)]


def same_rows(images, labels, expected) -> None:
    """Equal as sets of examples: TFDS shuffles on disk."""
    found = sorted((i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True))
    assert found == sorted((i.tobytes(), int(k)) for i, k in expected)


def test_prepared_set_is_read_without_tensorflow_and_then_from_the_cache(tmp_path, cache_dir, monkeypatch):
    train, validation = rows(5, 6, 7, 1), rows(3, 6, 7, 1)
    write_tfds(tmp_path, "mine", {"train": train, "validation": validation}, (6, 7, 1))
    data = sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir)
    assert data.train_images.shape == (5, 6, 7, 1) and data.class_names == ("0", "1")
    same_rows(data.train_images, data.train_labels, train)
    same_rows(data.test_images, data.test_labels, validation)  # used, as there is no split `test`
    assert "tensorflow" not in sys.modules
    forbid_decoding(monkeypatch)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert sources.load("tfds:mine", cache_dir=cache_dir).digest == data.digest


def test_unlabelled_test_split_gives_way_to_validation(tmp_path, cache_dir):
    hidden, validation = [(random_image(4, 4, 3), -1)], rows(2, 4, 4, 3)
    write_tfds(tmp_path, "mine", {"train": rows(4, 4, 4, 3), "test": hidden, "validation": validation})
    data = sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir)
    same_rows(data.test_images, data.test_labels, validation)


def test_varying_sizes_are_refused(tmp_path, cache_dir):
    write_tfds(tmp_path, "mine", {"train": [*rows(3, 4, 4, 3), (random_image(5, 4, 3), 0)]})
    one_line(
        lambda: sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir), "tfds:mine", "[5, 4, 3]", "one size"
    )
    assert not cache_dir.exists()


def test_set_that_is_not_classification_is_refused(tmp_path, cache_dir):
    write_tfds(tmp_path, "mine", {"train": [(random_image(4, 4, 3), "a caption")]}, label="caption")
    one_line(lambda: sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir), "['caption', 'image']")


def test_missing_train_split_and_empty_class(tmp_path, cache_dir):
    write_tfds(tmp_path, "testonly", {"test": rows(2, 4, 4, 3)})
    one_line(lambda: sources.load("tfds:testonly", str(tmp_path), cache_dir=cache_dir), "no split 'train'", "['test']")
    write_tfds(tmp_path, "gap", {"train": rows(4, 4, 4, 3)}, classes=3)
    one_line(lambda: sources.load("tfds:gap", str(tmp_path), cache_dir=cache_dir), "class 2", "no training images")


def test_damaged_shard_is_one_line(tmp_path, cache_dir):
    write_tfds(tmp_path, "mine", {"train": rows(4, 4, 4, 3)})
    (shard,) = (tmp_path / "mine" / "1.0.0").glob("*array_record*")
    shard.write_bytes(shard.read_bytes()[:100])
    one_line(
        lambda: sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir), "cannot be read from", str(tmp_path)
    )


def test_absent_sets_fail_at_once_and_say_how_to_get_them(tmp_path):
    def load(name):
        return lambda: sources.load(f"tfds:{name}", str(tmp_path))

    with pytest.raises(UserError, match="prdarts data prepare cifar10 --archive FILE --data-dir") as caught:
        load("cifar10")()
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"tfds build mnist --data_dir .* --file_format=array_record"):
        load("mnist")()
    one_line(load("nosuchset"), "'tfds:nosuchset'", str(tmp_path))
    one_line(load("huggingface:mnist"), "is not a set's name", "NAME[/CONFIG][:VERSION]")
    one_line(load("../cifar10"), "is not a set's name")
    with pytest.raises(UserError, match="cannot be opened"):
        load("cifar10:9.9.9")()
    with pytest.raises(UserError, match="cannot be opened"):
        load("imagenet_resized/7x7")()
    assert not list(tmp_path.iterdir())


def as_tfrecord(tmp_path: Path) -> None:
    info = tmp_path / "mine" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))


def pretend_tensorflow(monkeypatch, present: bool) -> None:
    real = importlib.util.find_spec
    answer = object() if present else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: answer if n == "tensorflow" else real(n, *a))


def test_tfrecord_without_tensorflow_is_refused(tmp_path, cache_dir, monkeypatch):
    write_tfds(tmp_path, "mine", {"train": rows(4, 4, 4, 3)})
    as_tfrecord(tmp_path)
    pretend_tensorflow(monkeypatch, present=False)
    with pytest.raises(UserError, match=r"stored as tfrecord.*TensorFlow is not installed.*array_record"):
        sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir)


def test_tfrecord_goes_through_tensorflow_where_it_is_installed(tmp_path, cache_dir, monkeypatch):
    import tensorflow_datasets as tfds

    train = rows(4, 4, 4, 3)
    write_tfds(tmp_path, "mine", {"train": train})
    as_tfrecord(tmp_path)
    pretend_tensorflow(monkeypatch, present=True)
    calls = []

    def as_dataset(self, split, shuffle_files):
        calls.append((split, shuffle_files))
        return [{"image": image, "label": k} for image, k in train]

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
    monkeypatch.setattr(tfds, "as_numpy", lambda dataset: dataset)
    data = sources.load("tfds:mine", str(tmp_path), cache_dir=cache_dir)
    assert calls == [("train", False)]
    np.testing.assert_array_equal(data.train_images, np.stack([image for image, _ in train]))


@pytest.mark.reference
@pytest.mark.skipif(not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR is not set: no real CIFAR-10")
def test_real_cifar10():
    data = sources.load("tfds:cifar10")
    assert (data.train_images.shape, data.test_images.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    # The published figures describe these images (and not, say, images with swapped axes or channels).
    mean, std = statistics("cifar10", data.train_images)
    np.testing.assert_allclose(mean, data.mean, atol=2e-3)
    np.testing.assert_allclose(std, data.std, atol=5e-3)
