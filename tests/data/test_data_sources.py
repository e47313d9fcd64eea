"""Digits and .npz files: what is read equals what was written; every mistake is one line with file, value and rule."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_cases import one_line

from prdarts_jax.data import sources
from prdarts_jax.data.arrays import statistics, stratified_split

RNG = np.random.default_rng(0)


# ---- digits


def test_digits_is_the_real_set_with_a_fixed_stratified_test_set():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = sources.load("digits")
    assert (data.train_images.shape, data.test_images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert np.bincount(data.test_labels).tolist() == [36] * 10
    # Together the two parts are exactly the 1797 images with their labels, 0..16 stretched to 0..255.
    rows = zip(bunch.images, bunch.target, strict=True)
    expected = sorted((np.rint(i / 16 * 255).astype(np.uint8).tobytes(), int(t)) for i, t in rows)
    found = [(i.tobytes(), int(t)) for i, t in zip(data.train_images, data.train_labels, strict=True)]
    found += [(i.tobytes(), int(t)) for i, t in zip(data.test_images, data.test_labels, strict=True)]
    assert sorted(found) == expected
    assert data.num_classes == 10 and data.class_names == tuple("0123456789")
    np.testing.assert_allclose(data.mean[0], (data.train_images / 255.0).mean(), rtol=1e-12)
    np.testing.assert_allclose(data.std[0], (data.train_images / 255.0).std(), rtol=1e-12)
    # The split is part of the benchmark: these bits may never change.
    assert data.digest == "a2761962fa5169882cf8de01154823e68a08f71ec3bbf5d1f96e5f7b469cad3c"


def test_the_digest_is_sha256_over_dtype_shape_and_bytes():
    data = sources.load("digits")
    sha = hashlib.sha256()
    for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        sha.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    assert data.digest == sha.hexdigest()


def test_arrays_of_a_dataset_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        sources.load("digits").train_images[0] = 0


def test_importing_the_sources_imports_no_heavy_library():
    code = (
        "import sys; import prdarts_jax.data, prdarts_jax.data.batches, prdarts_jax.data.prepare;"
        "print([m for m in ('jax', 'tensorflow_datasets', 'sklearn', 'PIL', 'tensorflow') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["cifar", "digits:8", "tfds:", "npz:", "folder:", "", "hub:cifar10"])
def test_unknown_source(source):
    one_line(lambda: sources.load(source), "data.source", repr(source), "digits | tfds:NAME | npz:FILE | folder:DIR")


def test_bare_set_name_gets_a_hint():
    one_line(lambda: sources.load("cifar10"), "did you mean 'tfds:cifar10'?")


def test_stratified_split_is_fixed_disjoint_and_complete():
    labels = np.array([0] * 7 + [1] * 5 + [0] * 2)
    train, test = stratified_split(labels, [3, 2], seed=5)
    assert sorted([*train, *test]) == list(range(14))
    assert np.bincount(labels[test]).tolist() == [3, 2]
    np.testing.assert_array_equal(test, stratified_split(labels, [3, 2], seed=5)[1])
    assert any(not np.array_equal(test, stratified_split(labels, [3, 2], seed=s)[1]) for s in range(6, 10))


def test_statistics_agree_with_numpy():
    images = RNG.integers(0, 256, (9, 5, 4, 3)).astype(np.uint8)
    mean, std = statistics("x", images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


# ---- npz


def arrays(**change):
    fields = {
        "images": RNG.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8),
        "labels": np.array([0, 1, 2, 0, 1, 2], np.int64),
        "test_images": RNG.integers(0, 256, (2, 5, 4, 3)).astype(np.uint8),
        "test_labels": np.array([2, 0], np.uint8),
    }
    fields.update(change)
    return {k: v for k, v in fields.items() if v is not None}


def saved(path: Path, **change) -> str:
    np.savez(path / "set.npz", **arrays(**change))
    return f"npz:{path / 'set.npz'}"


def test_npz_round_trip(tmp_path):
    fields = arrays()
    np.savez(tmp_path / "mine.npz", **fields, extra=np.arange(3))
    data = sources.load(f"npz:{tmp_path / 'mine.npz'}")
    assert data.name == "mine" and data.class_names == ("0", "1", "2")
    for field, found in (
        ("images", data.train_images),
        ("labels", data.train_labels),
        ("test_images", data.test_images),
        ("test_labels", data.test_labels),
    ):
        np.testing.assert_array_equal(found, fields[field])
    assert (data.train_images.dtype, data.train_labels.dtype, data.test_labels.dtype) == ("uint8", "int32", "int32")
    np.testing.assert_allclose(data.std, (fields["images"] / 255).std((0, 1, 2)), rtol=1e-12)


def test_grey_npz_gets_a_channel_and_the_test_set_may_be_absent(tmp_path):
    grey = RNG.integers(0, 256, (6, 5, 4)).astype(np.uint8)
    data = sources.load(saved(tmp_path, images=grey, test_images=None, test_labels=None))
    np.testing.assert_array_equal(data.train_images[..., 0], grey)
    assert data.test_images.shape == (0, 5, 4, 1) and data.test_labels.shape == (0,)


U8 = np.uint8
NPZ_MISTAKES = {
    "no images": ({"images": None}, ["no array 'images'"]),
    "no labels": ({"labels": None}, ["no array 'labels'"]),
    "rank": ({"images": np.zeros((6, 60), U8)}, ["images", "[6, 60]", "rank 2", "[N,H,W,C]"]),
    "dtype": ({"images": np.zeros((6, 5, 4, 3), np.float32)}, ["images", "float32", "uint8"]),
    "no images at all": ({"images": np.zeros((0, 5, 4, 3), U8), "labels": np.zeros(0, int)}, ["images", "empty axis"]),
    "float labels": ({"labels": np.zeros(6)}, ["labels", "float64", "integers 0..K-1"]),
    "label matrix": ({"labels": np.zeros((6, 3), int)}, ["labels", "[6, 3]", "rank 2"]),
    "length": ({"labels": np.arange(5)}, ["labels", "5 labels for 6 images"]),
    "negative": ({"labels": np.array([0, 1, 2, 0, 1, -1])}, ["labels", "label -1 is out of range"]),
    "gap": ({"labels": np.array([0, 1, 3, 0, 1, 3])}, ["class 2", "no training images"]),
    "huge": ({"labels": np.array([0, 1, 2, 0, 1, 2**30])}, ["label 1073741824", "class 3"]),
    "beyond int32": ({"labels": np.array([0, 1, 2, 0, 1, 2**40])}, ["label 1099511627776 is out of range"]),
    "one class": ({"labels": np.zeros(6, int), "test_labels": np.zeros(2, int)}, ["1 class", "at least 2"]),
    "test label": ({"test_labels": np.array([0, 3])}, ["test label 3 is out of range", "0..2"]),
    "test shape": ({"test_images": np.zeros((2, 5, 5, 3), U8)}, ["test images", "[5, 5, 3]", "[5, 4, 3]"]),
    "test alone": ({"test_labels": None}, ["'test_images' stands alone"]),
    "test labels alone": ({"test_images": None}, ["'test_labels' stands alone"]),
    "constant": ({"images": np.full((6, 5, 4, 3), 7, U8)}, ["channel 0", "constant"]),
    "objects": ({"images": np.array([None] * 6)}, ["not a readable .npz file"]),
}


@pytest.mark.parametrize("case", NPZ_MISTAKES)
def test_npz_mistakes(tmp_path, case):
    change, words = NPZ_MISTAKES[case]
    source = saved(tmp_path, **change)
    one_line(lambda: sources.load(source), "set.npz", *words)


def test_npz_absent_or_damaged(tmp_path):
    one_line(lambda: sources.load(f"npz:{tmp_path}/none.npz"), "none.npz", "no such file")
    source = saved(tmp_path)
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(whole[: len(whole) // 2])
    one_line(lambda: sources.load(source), "set.npz", "not a readable .npz file")
    (tmp_path / "set.npz").write_bytes(b"text")
    one_line(lambda: sources.load(source), "set.npz", "not a readable .npz file")
    np.save(tmp_path / "single.npy", np.zeros(3))
    one_line(lambda: sources.load(f"npz:{tmp_path}/single.npy"), "single array")
