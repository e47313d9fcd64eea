"""A directory of image files, one subdirectory a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prdarts_jax.data.arrays import Arrays, stratified_split
from prdarts_jax.data.cache import cached, file_identity
from prdarts_jax.data.records import FileRecords, read_images, read_shape
from prdarts_jax.errors import UserError

# Other files in a class directory (Thumbs.db, notes) are not images and are passed over.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})
# Part of the data's identity: another seed is another test set.
SPLIT_SEED = 20201


@dataclass(frozen=True)
class Folder:
    """The files of a set; listed, not opened."""

    root: Path
    train: FileRecords
    test: FileRecords  # empty where `train` stands alone
    class_names: tuple[str, ...]  # K names, sorted

    @property
    def name(self) -> str:
        """What reports call the set."""
        return self.root.resolve().name

    @property
    def files(self) -> list[str]:
        """The training files, then the test files."""
        return [*self.train.files, *self.test.files]

    def records(self) -> tuple[FileRecords, FileRecords]:
        """The training and the test images."""
        return self.train, self.test

    def decoded_bytes(self) -> int:
        """What the images would take in memory if every one had the size of the first."""
        return len(self.files) * int(np.prod(read_shape(self.files[0])))

    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) that all images share; C = 1 where all of them are grey, else 3 (transparency is dropped).

        Raises:
            UserError: an unreadable image, or images of different sizes.
        """
        height, width, channels = read_shape(self.files[0])
        for file in self.files[1:]:
            *size, file_channels = read_shape(file)
            if size != [height, width]:
                raise UserError(
                    f"{file}: image size {size[1]}x{size[0]} differs from {width}x{height} of "
                    f"{self.files[0]}; allowed: one size for all images, or data.image_size in a training"
                )
            channels = max(channels, file_channels)
        return height, width, channels

    def load(self, cache_dir: Path | None = None) -> Arrays:
        """The decoded set, from the cache where it is there.

        Args:
            cache_dir: where the decoded arrays are kept.

        Raises:
            UserError: see `shape`.
        """
        key = file_identity(f"folder split {SPLIT_SEED}", self.root, map(Path, self.files))
        return cached(f"folder-{self.name}", key, self._decode, cache_dir)

    def _decode(self) -> Arrays:
        # Headers first: sizes and modes are known before the memory for all pixels is taken.
        shape = self.shape()
        train, test = (read_images(part, shape, np.arange(len(part))) for part in self.records())
        return Arrays(*train, *test, self.class_names)

    def identity(self) -> tuple[int, list[list[str | int]]]:
        """What a streamed set is known by: where the test files begin; the name, size and label of each file."""
        labels = np.concatenate([self.train.labels, self.test.labels]).tolist()
        rows = zip(map(Path, self.files), labels, strict=True)
        return len(self.train), [[f.relative_to(self.root).as_posix(), f.stat().st_size, k] for f, k in rows]


def find(directory: Path) -> Folder:
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
    number = {name: k for k, name in enumerate(names)}
    train, test = (
        FileRecords(
            [file for files in split.values() for file in files],
            np.array([number[name] for name, files in split.items() for _ in files], np.int32),
        )
        for split in (classes, test_classes)
    )
    if not has_train:
        # A fifth of each class, at least one image, but never the last image of a class.
        counts = [min(max(1, round(len(files) / 5)), len(files) - 1) for files in classes.values()]
        train, test = (
            FileRecords([train.files[i] for i in part.tolist()], train.labels[part])
            for part in stratified_split(train.labels, counts, SPLIT_SEED)
        )
    return Folder(directory, train, test, names)


def _class_files(where: str, root: Path) -> dict[str, list[str]]:
    classes = {}
    for directory in sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")):
        files = [f for f in directory.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
        if not files:
            allowed = " ".join(sorted(SUFFIXES))
            raise UserError(f"{where}: class directory {directory} has no images; allowed: at least one of {allowed}")
        classes[directory.name] = [str(file) for file in sorted(files)]
    return classes
