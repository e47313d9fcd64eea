"""Image folders and the cache of decoded arrays."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from data_cases import forbid_decoding, one_line, random_image

from prdarts_jax.config.places import cache_folder
from prdarts_jax.data import cache, sources


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write_image(path: Path, pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folder_with_train_and_test(tmp_path, cache_dir):
    root = tmp_path / "set"
    train = [write_image(root / "train" / c / f"{i}.png", random_image(4, 5, 3)) for c in "ba" for i in range(2)]
    test = write_image(root / "test" / "b" / "x.PNG", random_image(4, 5, 3))
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    data = sources.load(f"folder:{root}", cache_dir=cache_dir)
    assert data.name == "set" and data.class_names == ("a", "b")
    np.testing.assert_array_equal(data.train_images, np.stack([train[2], train[3], train[0], train[1]]))
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(data.test_images, test[None])
    assert data.test_labels.tolist() == [1]


def test_folder_without_test_and_grey_images(tmp_path, cache_dir):
    for c in "ab":
        write_image(tmp_path / "g" / "train" / c / "0.png", random_image(4, 5))
    data = sources.load(f"folder:{tmp_path / 'g'}", cache_dir=cache_dir)
    assert data.train_images.shape == (2, 4, 5, 1) and data.test_images.shape == (0, 4, 5, 1)


def test_folder_mixing_grey_and_transparent_images_is_colour(tmp_path, cache_dir):
    grey = write_image(tmp_path / "m" / "a" / "0.png", random_image(4, 5))
    rgba = write_image(tmp_path / "m" / "b" / "0.png", random_image(4, 5, 4))
    data = sources.load(f"folder:{tmp_path / 'm'}", cache_dir=cache_dir)
    np.testing.assert_array_equal(data.train_images[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(data.train_images[1], rgba[..., :3])


def test_folder_of_classes_is_split_80_20_in_each_class_and_always_alike(tmp_path, cache_dir):
    images = {}
    for c, count in (("cat", 10), ("dog", 5), ("emu", 1)):
        for i in range(count):
            images[write_image(tmp_path / "s" / c / f"{i:02d}.png", random_image(3, 3, 3)).tobytes()] = c
    data = sources.load(f"folder:{tmp_path / 's'}", cache_dir=cache_dir)
    assert np.bincount(data.train_labels).tolist() == [8, 4, 1]
    assert np.bincount(data.test_labels, minlength=3).tolist() == [2, 1, 0]
    rows = [
        *zip(data.train_images, data.train_labels, strict=True),
        *zip(data.test_images, data.test_labels, strict=True),
    ]
    assert {i.tobytes(): data.class_names[k] for i, k in rows} == images
    again = sources.load(f"folder:{tmp_path / 's'}", cache_dir=tmp_path / "other")
    assert again.digest == data.digest


FOLDER_MISTAKES = [
    "missing",
    "empty class",
    "empty test class",
    "one class",
    "test only",
    "stranger",
    "size",
    "garbage",
    "truncated",
    "16 bit",
]


def folder_mistake(root: Path, case: str) -> tuple[str, ...]:
    for c in "ab":
        write_image(root / "train" / c / "0.png", random_image(4, 5, 3))
    if case == "missing":
        os.rename(root, root.with_name("elsewhere"))
        return ("no such directory", str(root))
    if case == "empty class":
        (root / "train" / "c").mkdir()
        return ("class directory", str(root / "train" / "c"), "no images")
    if case == "empty test class":
        (root / "test" / "a").mkdir(parents=True)
        return (str(root / "test" / "a"), "no images")
    if case == "one class":
        (root / "train" / "b" / "0.png").unlink()
        (root / "train" / "b").rmdir()
        return ("1 class", "at least 2")
    if case == "test only":
        os.rename(root / "train", root / "test")
        return ("'test' without 'train'",)
    if case == "stranger":
        write_image(root / "test" / "z" / "0.png", random_image(4, 5, 3))
        return ("test class 'z'", "a | b")
    if case == "size":
        write_image(root / "train" / "b" / "1.png", random_image(5, 4, 3))
        return (str(root / "train" / "b" / "1.png"), "4x5", "5x4")
    if case == "garbage":
        (root / "train" / "b" / "1.png").write_bytes(b"not a picture")
        return (str(root / "train" / "b" / "1.png"), "not a readable image")
    if case == "truncated":
        whole = (root / "train" / "b" / "0.png").read_bytes()
        (root / "train" / "b" / "1.png").write_bytes(whole[:-30])
        return (str(root / "train" / "b" / "1.png"), "not a readable image")
    assert case == "16 bit"
    write_image(root / "train" / "b" / "1.png", np.zeros((4, 5), np.uint16))
    return (str(root / "train" / "b" / "1.png"), "8 bits a channel")


@pytest.mark.parametrize("case", FOLDER_MISTAKES)
def test_folder_mistakes(tmp_path, cache_dir, case):
    root = tmp_path / "set"
    words = folder_mistake(root, case)
    one_line(lambda: sources.load(f"folder:{root}", cache_dir=cache_dir), *words)
    assert not cache_dir.exists()


@pytest.fixture
def small_folder(tmp_path) -> Path:
    for c in "ab":
        for i in range(3):
            write_image(tmp_path / "small" / c / f"{i}.png", random_image(4, 5, 3))
    return tmp_path / "small"


def test_second_load_reads_the_cache(small_folder, cache_dir, monkeypatch):
    first = sources.load(f"folder:{small_folder}", cache_dir=cache_dir)
    forbid_decoding(monkeypatch)
    second = sources.load(f"folder:{small_folder}", cache_dir=cache_dir)
    assert second.digest == first.digest and second.class_names == first.class_names
    assert [p.suffix for p in cache_dir.iterdir()] == [".npz"]


def test_changed_file_is_decoded_again(small_folder, cache_dir):
    first = sources.load(f"folder:{small_folder}", cache_dir=cache_dir)
    write_image(small_folder / "a" / "0.png", random_image(4, 5, 3))
    os.utime(small_folder / "a" / "0.png", ns=(1, 1))
    assert sources.load(f"folder:{small_folder}", cache_dir=cache_dir).digest != first.digest


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "other content"])
def test_damaged_cache_is_ignored_and_replaced(small_folder, cache_dir, damage, caplog):
    first = sources.load(f"folder:{small_folder}", cache_dir=cache_dir)
    (path,) = cache_dir.iterdir()
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        at = whole.index(first.train_images.tobytes()) + 7
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "text":
        path.write_bytes(b"text")
    elif damage == "empty":
        path.write_bytes(b"")
    else:  # a valid archive whose images are not those of the digest: only the digest can tell
        with np.load(path) as stored:
            fields = dict(stored)
        fields["train_images"] = fields["train_images"] ^ 1
        np.savez(path, **fields)
    with caplog.at_level(logging.WARNING):
        assert sources.load(f"folder:{small_folder}", cache_dir=cache_dir).digest == first.digest
    assert "damaged and ignored" in caplog.text
    caplog.clear()
    assert sources.load(f"folder:{small_folder}", cache_dir=cache_dir).digest == first.digest
    assert not caplog.text


def test_unwritable_cache_is_not_fatal(small_folder, tmp_path, caplog):
    (tmp_path / "file").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        data = sources.load(f"folder:{small_folder}", cache_dir=tmp_path / "file" / "cache")
    assert data.num_classes == 2 and "cannot be written" in caplog.text


def test_failed_write_leaves_no_file(small_folder, cache_dir, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    with caplog.at_level(logging.WARNING):
        sources.load(f"folder:{small_folder}", cache_dir=cache_dir)
    assert "No space left" in caplog.text and not list(cache_dir.iterdir())


def test_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("data") == tmp_path / "prdarts_jax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("data") == tmp_path / ".cache" / "prdarts_jax" / "data"
