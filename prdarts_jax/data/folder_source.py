"""A directory of image files, one subdirectory a class."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prdarts_jax.data.arrays import Arrays, stratified_split
from prdarts_jax.data.cache import cached, file_identity
from prdarts_jax.data.records import FileRecords, read_header, read_images
from prdarts_jax.errors import UserError, warn

# Other files in a class directory (Thumbs.db, notes) are not images and are passed over, with a line.
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
)
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
        return len(self.files) * int(np.prod(read_header(self.files[0]).shape))

    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) that all images share; C = 1 where all of them are grey, else 3.

        Transparency and further frames are left out, with a line.

        Raises:
            UserError: an unreadable image, or images of different sizes.
        """
        height, width, channels = read_header(self.files[0]).shape
        left_out: dict[str, list[str]] = {}
        for file in self.files:
            (*size, file_channels), names = read_header(file)
            for name in names:
                left_out.setdefault(name, []).append(file)
            if size != [height, width]:
                raise UserError(
                    f"{file}: image size {size[1]}x{size[0]} differs from {width}x{height} of "
                    f"{self.files[0]}; allowed: one size for all images, or data.image_size in a training"
                )
            channels = max(channels, file_channels)
        for name, files in sorted(left_out.items()):
            warn(f"folder:{self.root}: {name} of {len(files)} images is not read (the first: {files[0]})")
        return height, width, channels

    def load(self, cache_dir: Path | None = None) -> Arrays:
        """The decoded set, from the cache where it is there.

        Args:
            cache_dir: where the decoded arrays are kept.

        Raises:
            UserError: see `shape`.
        """
        with _named_errors():
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
        with _named_errors():
            return len(self.train), [[f.relative_to(self.root).as_posix(), f.stat().st_size, k] for f, k in rows]


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """A block in which a file that is not there, where a link leads nowhere, is the user's error."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: not a readable image ({error.strerror}); allowed: a file") from error


def find(directory: Path) -> Folder:
    """The files under `directory`: train/CLASS and test/CLASS, or CLASS with a fixed stratified 80/20 split.

    Classes are the sorted names of the directories. `val` counts as `test` where there is no `test`. A `train`
    directory without either gives an empty test set. Files that are no images are passed over with a line on stderr.

    Args:
        directory: the root.

    Raises:
        UserError: a missing directory, an empty or unknown class, images that would be left out: beside or below the
            class directories, or beside `train`.
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
    passed_over: list[Path] = []
    classes = _class_files(where, train_dir if has_train else directory, passed_over)
    names = tuple(classes)
    if len(names) < 2:
        raise UserError(f"{where}: {len(names)} class {list(names)}; allowed: at least 2 class directories")
    test_classes = _class_files(where, test_dir, passed_over) if has_test else {}
    if has_test and not test_classes:
        raise UserError(f"{where}: {test_dir} has no class directory; allowed: {test_dir}/CLASS, or no such directory")
    if has_train:
        _refuse_others(where, directory, test_dir)
    if strangers := [name for name in test_classes if name not in classes]:
        raise UserError(f"{where}: test class {strangers[0]!r} is not a training class; allowed: {' | '.join(names)}")
    if passed_over:
        warn(f"{where}: {len(passed_over)} files that are no images are passed over (the first: {passed_over[0]})")
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


def _class_files(where: str, root: Path, passed_over: list[Path]) -> dict[str, list[str]]:
    """The images of each class; what else lies there is added to `passed_over`."""
    classes = {}
    for entry in sorted(root.iterdir()):
        if not entry.is_dir():
            if _is_image(entry):
                raise UserError(f"{where}: image {entry} is in no class directory; allowed: {root}/CLASS/{entry.name}")
            passed_over.append(entry)
        elif not entry.name.startswith("."):
            classes[entry.name] = _images_of(where, entry, passed_over)
        elif image := _first_image(entry):
            passed_over.append(image)
    return classes


def _images_of(where: str, directory: Path, passed_over: list[Path]) -> list[str]:
    """The images of one class."""
    files: list[Path] = []
    for entry in sorted(directory.iterdir()):
        if not entry.is_dir():
            (files if _is_image(entry) else passed_over).append(entry)
        elif image := _first_image(entry):
            if entry.name.startswith("."):
                passed_over.append(image)
                continue
            raise UserError(
                f"{where}: image {image} is in a subdirectory of the class directory {directory}; allowed: images "
                f"directly in it (move them up, or name a directory whose subdirectories are the classes)"
            )
        elif not entry.name.startswith("."):  # a format of images that is not read, perhaps
            passed_over.extend(sorted(path for path in entry.rglob("*") if not path.is_dir()))
    if not files:
        allowed = " ".join(sorted(SUFFIXES))
        raise UserError(f"{where}: class directory {directory} has no images; allowed: at least one of {allowed}")
    return [str(file) for file in files]


def _refuse_others(where: str, directory: Path, test_dir: Path) -> None:
    """Images beside `train` and the test directory would be left out: `valid` is not `val`."""
    for entry in sorted(directory.iterdir()):
        if entry.name in ("train", test_dir.name) or entry.name.startswith("."):
            continue
        image = _first_image(entry) if entry.is_dir() else entry if _is_image(entry) else None
        if image is None:
            continue
        if entry.name == "val":  # ImageNet's three parts
            warn(f"{where}: {entry} is not used: 'test' has the test images")
            continue
        raise UserError(
            f"{where}: image {image} is neither in 'train' nor in {test_dir.name!r} and would not be used; "
            "allowed: train/CLASS and test/CLASS or val/CLASS (rename its directory, or move it elsewhere)"
        )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _first_image(directory: Path) -> Path | None:
    """An image anywhere below a directory."""
    for folder, _, names in os.walk(directory):
        for name in sorted(names):
            if _is_image(Path(name)):
                return Path(folder, name)
    return None
