"""One name of a source in, one checked image set as uint8 arrays out."""

from __future__ import annotations

import dataclasses
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from prdarts_jax.config.places import expanded
from prdarts_jax.data import folder_source, tfds_source
from prdarts_jax.data.arrays import (
    Arrays,
    as_images,
    as_labels,
    check,
    digest,
    statistics,
    stratified_split,
)
from prdarts_jax.errors import UserError, first_line, warn

ALLOWED = "digits | tfds:NAME | npz:FILE | folder:DIR"

# Published figures, kept so that results compare with other programs; every other set uses its own training images.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet2012": IMAGENET,
    "imagenet2012_subset": IMAGENET,
    "imagenet_resized": IMAGENET,
}

# The 360 test digits are part of the benchmark: changing either constant makes results incomparable.
DIGITS_TEST_PER_CLASS = 36
DIGITS_SPLIT_SEED = 1797


# eq=False: field-wise == of arrays has no truth value; two sets are the same where their digests are.
@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """An image set in memory; the arrays are read-only."""

    name: str
    train_images: np.ndarray  # uint8 [N, H, W, C]
    train_labels: np.ndarray  # int32 [N], 0..K-1
    test_images: np.ndarray  # uint8 [M, H, W, C]; M may be 0
    test_labels: np.ndarray  # int32 [M]
    class_names: tuple[str, ...]  # K names
    mean: tuple[float, ...]  # [C], of images scaled to 0..1
    std: tuple[float, ...]  # [C]
    digest: str  # SHA-256 of the four arrays

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    @property
    def train_size(self) -> int:
        """N."""
        return len(self.train_images)

    @property
    def test_size(self) -> int:
        """M; may be 0."""
        return len(self.test_images)


# A set of files, before its images are read: into memory by `load`, or one by one (see `stream_source`).
Stored: TypeAlias = folder_source.Folder | tfds_source.Prepared


def load(source: str, data_dir: str | None = None, *, cache_dir: Path | None = None) -> Dataset:
    """The image set that `source` names, checked; never downloads.

    - `digits`: the 1797 real 8x8 digits inside scikit-learn; a fixed stratified 360 (36 a class) are the test set.
    - `tfds:NAME[/CONFIG][:VERSION]`: a set already prepared for TensorFlow Datasets.
    - `npz:FILE`: `images` and `labels`, optionally `test_images` and `test_labels`.
    - `folder:DIR`: train/CLASS and test/CLASS, or CLASS with a fixed stratified 80/20 split.

    Decoded `tfds` and `folder` sets are cached as arrays.

    Args:
        source: see above.
        data_dir: the TFDS data directory; default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
        cache_dir: default `$XDG_CACHE_HOME/prdarts_jax/data` or `~/.cache/prdarts_jax/data`.

    Raises:
        UserError: one line that names the file or field, the value and what is allowed.

    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.test_images.shape, digits.num_classes
    ((1437, 8, 8, 1), (360, 8, 8, 1), 10)
    """
    kind, _, rest = source.partition(":")
    if source == "digits":
        return _dataset("digits", source, _load_digits())
    if kind == "npz" and rest:
        path = expanded(rest, "data.source")
        return _dataset(path.stem, source, _load_npz(path))
    return load_stored(source, find(source, data_dir), cache_dir)


def find(source: str, data_dir: str | None = None) -> Stored:
    """The files of a source `tfds:NAME` or `folder:DIR`; arguments and errors as of `load`."""
    kind, _, rest = source.partition(":")
    if kind == "tfds" and rest:
        return tfds_source.find(rest, data_dir)
    if kind == "folder" and rest:
        return folder_source.find(expanded(rest, "data.source"))
    hint = f"; did you mean 'tfds:{source}'?" if source in NORMALIZATION else ""
    raise UserError(f"data.source: {source!r} is not a source{hint}; allowed: {ALLOWED}")


def load_stored(source: str, stored: Stored, cache_dir: Path | None = None) -> Dataset:
    """As `load`, for a source whose files have been found."""
    return _dataset(stored.name, source, stored.load(cache_dir), published(source))


def published(source: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Published (mean, std) of a set of TFDS; None where there are none, and for any other source.

    >>> published("tfds:cifar10:3.0.2") == NORMALIZATION["cifar10"]
    True
    """
    kind, _, name = source.partition(":")
    return NORMALIZATION.get(re.split("[/:]", name)[0]) if kind == "tfds" else None


def from_arrays(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """An image set from arrays in memory, with the checks of the other sources; for the argument `data` of a search.

    Args:
        name: what reports call it.
        images: uint8 [N, H, W, C] or [N, H, W].
        labels: integers [N], 0..K-1.
        test_images, test_labels: the same, never seen by a search.
        class_names: K names; default 0..K-1.

    Raises:
        UserError: one line that names the array, the value and what is allowed.

    >>> images = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8)
    >>> from_arrays("mine", images, np.array([0, 1, 0, 1])).train_images.shape
    (4, 8, 8, 1)
    """
    if (test_images is None) != (test_labels is None):
        raise UserError(f"{name}: test images without labels, or labels without images; allowed: both or neither")
    fields = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    # Copies: a data set is read-only, the caller's arrays are the caller's.
    return _dataset(
        name, name, _arrays(name, {k: np.array(v) for k, v in fields.items() if v is not None}, class_names)
    )


def _arrays(where: str, fields: Mapping[str, np.ndarray], class_names: Sequence[str] | None = None) -> Arrays:
    """`images` and `labels`, and `test_images` and `test_labels` where they are there, checked."""
    images = as_images(f"{where}: images", fields["images"])
    labels = as_labels(f"{where}: labels", fields["labels"], len(images))
    test_images, test_labels = images[:0].copy(), labels[:0].copy()
    if "test_images" in fields:
        test_images = as_images(f"{where}: test_images", fields["test_images"])
        test_labels = as_labels(f"{where}: test_labels", fields["test_labels"], len(test_images))
    # A stray huge label must not make as many names; `check` says which one it is.
    names = tuple(class_names or map(str, range(min(int(labels.max()) + 1, len(labels)))))
    return Arrays(images, labels, test_images, test_labels, names)


def _dataset(
    name: str,
    source: str,
    arrays: Arrays,
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    check(source, arrays)
    mean, std = normalization or statistics(source, arrays.train_images)
    for array in arrays[:4]:
        array.setflags(write=False)
    return Dataset(name, *arrays, mean=mean, std=std, digest=digest(arrays))


def _load_digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    train, test = stratified_split(labels, [DIGITS_TEST_PER_CLASS] * 10, DIGITS_SPLIT_SEED)
    return Arrays(images[train], labels[train], images[test], labels[test], tuple(map(str, range(10))))


def _load_npz(path: Path) -> Arrays:
    if not path.is_file():
        raise UserError(f"data.source: npz:{path}: no such file; allowed: a .npz file with images and labels")
    fields = _read_npz(path)
    for field in ("images", "labels"):
        if field not in fields:
            raise UserError(
                f"{path}: no array {field!r} among {sorted(fields)}; "
                "allowed: images, labels and optionally test_images, test_labels"
            )
    if ("test_images" in fields) != ("test_labels" in fields):
        present = "test_images" if "test_images" in fields else "test_labels"
        raise UserError(f"{path}: {present!r} stands alone; allowed: both test_images and test_labels, or neither")
    arrays = _arrays(str(path), fields)
    labels = arrays.train_labels
    # Each of the K = top + 1 classes needs an image.
    if (top := int(labels.max())) >= len(labels):
        missing = int(np.setdiff1d(np.arange(len(labels)), labels)[0])
        raise UserError(f"{path}: labels: label {top} but no image of class {missing}; allowed: 0..K-1 without a gap")
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: np.load leaves its own file open where the zip directory is damaged.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("a single array")
            wanted = ("images", "labels", "test_images", "test_labels")
            if others := sorted(set(archive.files).difference(wanted)):
                warn(f"npz:{path}: not read: {', '.join(others)}; read are {', '.join(wanted)}")
            return {name: archive[name] if name in wanted else np.empty(0) for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a readable .npz file ({first_line(error)}); allowed: np.savez(FILE, images=..., labels=...)"
        ) from error
