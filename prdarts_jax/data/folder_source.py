"""A directory of image files, one subdirectory a class, decoded with Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from prdarts_jax.data.arrays import Arrays, stratified_split
from prdarts_jax.data.cache import cached, file_identity
from prdarts_jax.errors import UserError

# Other files in a class directory (Thumbs.db, notes) are not images and are passed over.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})
# Part of the data's identity: another seed is another test set.
SPLIT_SEED = 20201


class Listing(NamedTuple):
    """The files of a set, before any of them is opened."""

    root: Path
    train_files: list[Path]
    train_labels: np.ndarray  # int32 [N]
    test_files: list[Path]
    test_labels: np.ndarray  # int32 [M]; M = 0 where `train` stands alone
    class_names: tuple[str, ...]  # K names, sorted


def find(directory: Path) -> Listing:
    """The files under `directory`: train/CLASS and test/CLASS, or CLASS with a fixed stratified 80/20 split.

    Classes are the sorted names of the directories. `val` counts as `test` where there is no `test`. A `train`
    directory without either gives an empty test set.

    Args:
        directory: the root.

    Raises:
        UserError: a missing directory, an empty or unknown class.
    """
    where = f"folder:{directory}"
    if not directory.is_dir():
        raise UserError(f"data.source: {where}: no such directory; allowed: train/CLASS and test/CLASS, or CLASS")
    train_dir, test_dir = directory / "train", directory / "test"
    if train_dir.is_dir() and not test_dir.is_dir():
        test_dir = directory / "val"  # the name ImageNet's folders have
    has_train, has_test = train_dir.is_dir(), test_dir.is_dir()
    if has_test and not has_train:
        raise UserError(f"{where}: 'test' without 'train'; allowed: train/CLASS and test/CLASS, or CLASS")
    classes = _class_files(where, train_dir if has_train else directory)
    names = tuple(classes)
    if len(names) < 2:
        raise UserError(f"{where}: {len(names)} class {list(names)}; allowed: at least 2 class directories")
    test_classes = _class_files(where, test_dir) if has_test else {}
    if strangers := [name for name in test_classes if name not in classes]:
        raise UserError(f"{where}: test class {strangers[0]!r} is not a training class; allowed: {' | '.join(names)}")
    files, labels = _flatten(classes, names)
    if has_train:
        return Listing(directory, files, labels, *_flatten(test_classes, names), names)
    counts = np.bincount(labels, minlength=len(names))
    # A fifth of each class, at least one image, but never the last image of a class.
    held = [min(max(1, round(int(c) / 5)), int(c) - 1) for c in counts]
    train, test = stratified_split(labels, held, SPLIT_SEED)
    kept, left = [files[i] for i in train.tolist()], [files[i] for i in test.tolist()]
    return Listing(directory, kept, labels[train], left, labels[test], names)


def load_folder(directory: Path, cache_dir: Path | None = None) -> Arrays:
    """The decoded set under `directory`, see `find`.

    A set whose images are all grey has one channel, any other three (transparency is dropped).

    Args:
        directory: the root.
        cache_dir: where the decoded arrays are kept.

    Raises:
        UserError: see `find`; an unreadable image, images of different sizes.
    """
    found = find(directory)
    files, count = [*found.train_files, *found.test_files], len(found.train_files)
    key = file_identity(f"folder split {SPLIT_SEED}", directory, files)

    def decode() -> Arrays:
        images = _decode(files)
        return Arrays(images[:count], found.train_labels, images[count:], found.test_labels, found.class_names)

    return cached(f"folder-{directory.resolve().name}", key, decode, cache_dir)


def _class_files(where: str, root: Path) -> dict[str, list[Path]]:
    classes = {}
    for directory in sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")):
        files = [f for f in directory.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
        if not files:
            allowed = " ".join(sorted(SUFFIXES))
            raise UserError(f"{where}: class directory {directory} has no images; allowed: at least one of {allowed}")
        classes[directory.name] = sorted(files)
    return classes


def _flatten(classes: dict[str, list[Path]], names: tuple[str, ...]) -> tuple[list[Path], np.ndarray]:
    files = [file for name in names for file in classes.get(name, [])]
    labels = [k for k, name in enumerate(names) for _ in classes.get(name, [])]
    return files, np.array(labels, np.int32)


def _decode(files: list[Path]) -> np.ndarray:
    from prdarts_jax.data.images import common_header, read_image

    # Headers first: sizes and modes are known before the memory for all pixels is taken.
    (width, height), grey = common_header(files)
    pixels = np.empty((len(files), height, width, 1 if grey else 3), np.uint8)
    for row, file in zip(pixels, files, strict=True):
        row[...] = np.asarray(read_image(file, str(file), grey=grey)).reshape(row.shape)
    return pixels
