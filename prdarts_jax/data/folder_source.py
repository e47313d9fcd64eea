"""A directory of image files, one subdirectory a class, decoded with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prdarts_jax.data.arrays import Arrays, stratified_split
from prdarts_jax.data.cache import cached, file_identity
from prdarts_jax.errors import UserError

# Other files in a class directory (Thumbs.db, notes) are not images and are passed over.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})
# Part of the data's identity: another seed is another test set.
SPLIT_SEED = 20201
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"})


def load_folder(directory: Path, cache_dir: Path | None = None) -> Arrays:
    """The set under `directory`: train/CLASS and test/CLASS, or CLASS with a fixed stratified 80/20 split.

    Classes are the sorted names of the directories. A set whose images are all grey has one channel, any other three
    (transparency is dropped). A `train` directory without a `test` beside it gives an empty test set.

    Args:
        directory: the root.
        cache_dir: where the decoded arrays are kept.

    Raises:
        UserError: a missing directory, an empty or unknown class, an unreadable image, images of different sizes.
    """
    where = f"folder:{directory}"
    if not directory.is_dir():
        raise UserError(f"data.source: {where}: no such directory; allowed: train/CLASS and test/CLASS, or CLASS")
    train_dir, test_dir = directory / "train", directory / "test"
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
    test_files, test_labels = _flatten(test_classes, names)
    key = file_identity(f"folder split {SPLIT_SEED}", directory, [*files, *test_files])

    def decode() -> Arrays:
        images = _decode([*files, *test_files])
        if has_train:
            n = len(files)
            return Arrays(images[:n], labels, images[n:], test_labels, names)
        counts = np.bincount(labels, minlength=len(names))
        # A fifth of each class, at least one image, but never the last image of a class.
        held = [min(max(1, round(int(c) / 5)), int(c) - 1) for c in counts]
        train, test = stratified_split(labels, held, SPLIT_SEED)
        return Arrays(images[train], labels[train], images[test], labels[test], names)

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
    from PIL import Image

    # Headers first: sizes and modes are known before the memory for all pixels is taken.
    sizes, grey = [], True
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
                mode = image.mode
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(file, error) from error
        if mode not in _GREY_MODES | _COLOUR_MODES:
            raise UserError(f"{file}: pixel format {mode!r} is not 8 bits a channel; allowed: 8-bit grey or colour")
        if sizes[-1] != sizes[0]:
            raise UserError(
                f"{file}: image size {sizes[-1][0]}x{sizes[-1][1]} differs from {sizes[0][0]}x{sizes[0][1]} of "
                f"{files[0]}; allowed: one size for all images"
            )
        grey = grey and mode in _GREY_MODES
    width, height = sizes[0]
    pixels = np.empty((len(files), height, width, 1 if grey else 3), np.uint8)
    for row, file in zip(pixels, files, strict=True):
        try:
            with Image.open(file) as image:
                row[...] = np.asarray(image.convert("L" if grey else "RGB")).reshape(row.shape)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(file, error) from error
    return pixels


def _unreadable(file: Path, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{file}: not a readable image ({reason}); allowed: an image file that Pillow can decode")
