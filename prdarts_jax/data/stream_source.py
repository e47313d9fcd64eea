"""Image sets that are read while they are used, and the choice between them and sets that stay on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from prdarts_jax.data.arrays import statistics
from prdarts_jax.data.folder_source import Folder
from prdarts_jax.data.records import ArrayRecords, Selection, read_images
from prdarts_jax.data.sources import IMAGENET, Dataset, Stored, find, load, load_stored, published
from prdarts_jax.errors import UserError

if TYPE_CHECKING:
    from prdarts_jax.config.train import TrainDataConfig
    from prdarts_jax.data.records import Records

STATISTICS_IMAGES = 1024  # training images that mean and deviation are measured on, where nothing is published
_STATISTICS_SEED = 1024


# eq=False: as of Dataset.
@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataset:
    """An image set of which only names and labels are in memory."""

    name: str
    train: Records
    test: Records  # may be empty
    image: tuple[int, int, int]  # (H, W, C) as the network sees it
    class_names: tuple[str, ...]  # K names
    mean: tuple[float, ...]  # [C], of images scaled to 0..1
    std: tuple[float, ...]  # [C]
    digest: str  # of arrays in memory as Dataset; of files SHA-256 over names, sizes and labels, not over their pixels

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def train_size(self) -> int:
        """N."""
        return len(self.train)

    @property
    def test_size(self) -> int:
        """M; may be 0."""
        return len(self.test)


AnyDataset: TypeAlias = Dataset | StreamedDataset


def measured_on(dataset: AnyDataset, indices: np.ndarray) -> AnyDataset:
    """The set with some of its training images in the place of its test images.

    Args:
      dataset: in memory or streamed.
      indices: int [m], of training images.

    >>> measured_on(load("digits"), np.arange(7)).test_size
    7
    """
    if isinstance(dataset, StreamedDataset):
        return dataclasses.replace(dataset, test=Selection(dataset.train, indices))
    images, labels = dataset.train_images[indices], dataset.train_labels[indices]
    return dataclasses.replace(dataset, test_images=images, test_labels=labels)


def choose(data: TrainDataConfig, data_dir: str | None = None, given: Dataset | None = None) -> AnyDataset:
    """The image set of a training: decoded on the device, or streamed.

    Streamed are: a set whose images are cropped to `data.image_size`; with `data.stream` always any set; with auto a
    set whose decoded images would take more than `data.resident_gb`.

    Args:
      data: of the config.
      data_dir: see `load`.
      given: a set in memory, in place of the source.

    Raises:
      UserError: one line that names the file or field, the value and what is allowed.
    """
    if given is None and data.source.startswith(("tfds:", "folder:")):
        stored = find(data.source, data_dir)
        if _is_streamed(data, stored.decoded_bytes):
            return from_files(data.source, stored, data.image_size)
        return load_stored(data.source, stored)
    dataset = load(data.source) if given is None else given
    return from_memory(dataset, data.image_size) if _is_streamed(data, lambda: _bytes(dataset)) else dataset


def _is_streamed(data: TrainDataConfig, decoded_bytes: Callable[[], int]) -> bool:
    above = data.stream == "auto" and not data.image_size and decoded_bytes() > data.resident_gb * 2**30
    return above or data.image_size > 0 or data.stream == "always"


def _bytes(dataset: Dataset) -> int:
    return dataset.train_images.nbytes + dataset.test_images.nbytes


def describe(dataset: AnyDataset) -> str:
    """Which way a set takes, in words.

    >>> describe(load("digits"))
    'data: 1437 + 360 images of 8x8x1 stay on the device (0.1 MiB)'
    """
    shape = "x".join(map(str, dataset.image))
    images = f"data: {dataset.train_size} + {dataset.test_size} images of {shape}"
    if isinstance(dataset, StreamedDataset):
        return f"{images} are streamed"
    return f"{images} stay on the device ({_bytes(dataset) / 2**20:.1f} MiB)"


def from_memory(dataset: Dataset, image_size: int = 0) -> StreamedDataset:
    """A set in memory as a streamed one: the same images, mean, deviation and digest.

    Args:
      dataset: with one channel or three.
      image_size: side of the crops, which have three channels; 0 = the images as they are.
    """
    name, channels = dataset.name, dataset.image[2]
    if channels not in (1, 3):
        raise UserError(f"{name}: {channels} channels cannot be streamed; allowed: 1 (grey) | 3 (RGB)")
    train = ArrayRecords(name, dataset.train_images, dataset.train_labels)
    test = ArrayRecords(name, dataset.test_images, dataset.test_labels)
    image, mean, std = dataset.image, dataset.mean, dataset.std
    if image_size:
        image, mean, std = (image_size, image_size, 3), mean * (3 // channels), std * (3 // channels)
    return StreamedDataset(name, train, test, image, dataset.class_names, mean, std, dataset.digest)


def from_files(source: str, stored: Stored, image_size: int = 0) -> StreamedDataset:
    """A set of files as a streamed one.

    Args:
      source: as in the config.
      stored: its files.
      image_size: side of the crops of images of any size, in RGB; 0 = images of one size, as they are.

    Raises:
      UserError: files that cannot be read or streamed; without `image_size`, images of different sizes.
    """
    train, test = stored.records()
    height, width, channels = (image_size, image_size, 3) if image_size else stored.shape()
    image = (height, width, 1 if channels == 1 else 3)
    figures = published(source) or (IMAGENET if image_size else None)
    mean, std = figures or _measured("folder" if isinstance(stored, Folder) else stored.name, train, image)
    # Compared on resume: the form of this text may not change.
    identity = json.dumps(["files", list(stored.class_names), *stored.identity()])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return StreamedDataset(stored.name, train, test, image, stored.class_names, mean, std, digest)


def _measured(where: str, train: Records, image: tuple[int, int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a fixed sample of the training images, which have one size."""
    order = np.random.RandomState(_STATISTICS_SEED).permutation(len(train))
    # All of them, in their order, if they are few: then the figures are those of the set on the device.
    return statistics(where, read_images(train, image, np.sort(order[:STATISTICS_IMAGES])).images)
