"""Image sets that are read while they are used, and the choice between them and sets that stay on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from prdarts_jax.data import folder_source, tfds_source
from prdarts_jax.data.arrays import statistics
from prdarts_jax.data.sources import IMAGENET, Dataset, load, published
from prdarts_jax.errors import UserError

if TYPE_CHECKING:
    from prdarts_jax.config.train import TrainDataConfig
    from prdarts_jax.data.records import ArrayRecords, FileRecords, PreparedRecords, Records

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
    kind, _, rest = data.source.partition(":")
    if given is not None or kind in ("digits", "npz"):
        dataset = load(data.source, data_dir) if given is None else given
        size = (dataset.train_size + dataset.test_size) * int(np.prod(dataset.image))
        return from_memory(dataset, data.image_size) if _is_streamed(data, size) else dataset
    if kind == "folder":
        listing = folder_source.find(Path(rest).expanduser())
        size = 0 if data.image_size or data.stream != "auto" else _folder_bytes(listing)
        return stream_folder(listing, data.image_size) if _is_streamed(data, size) else load(data.source, data_dir)
    with tfds_source.quiet():
        prepared = tfds_source.find(rest, Path(data_dir).expanduser() if data_dir else tfds_source.default_data_dir())
        size = 0 if data.image_size or data.stream != "auto" else _prepared_bytes(rest, prepared)
        if _is_streamed(data, size):
            return stream_prepared(rest, prepared, data.image_size)
    return load(data.source, data_dir)


def _is_streamed(data: TrainDataConfig, size: int) -> bool:
    return data.image_size > 0 or data.stream == "always" or (data.stream == "auto" and size > data.resident_gb * 2**30)


def describe(dataset: AnyDataset) -> str:
    """Which way a set takes, in words.

    >>> describe(load("digits"))
    'data: 1437 + 360 images of 8x8x1 stay on the device (0.1 MiB)'
    """
    shape = "x".join(map(str, dataset.image))
    images = f"data: {dataset.train_size} + {dataset.test_size} images of {shape}"
    if isinstance(dataset, StreamedDataset):
        return f"{images} are streamed"
    size = dataset.train_images.nbytes + dataset.test_images.nbytes
    return f"{images} stay on the device ({size / 2**20:.1f} MiB)"


# --- the sources ------------------------------------------------------------------------------------------------------


def from_memory(dataset: Dataset, image_size: int = 0) -> StreamedDataset:
    """A set in memory as a streamed one: the same images, mean, deviation and digest.

    Args:
      dataset: with one channel or three.
      image_size: side of the crops, which have three channels; 0 = the images as they are.
    """
    from prdarts_jax.data.records import ArrayRecords

    channels = dataset.image[2]
    if channels not in (1, 3):
        raise UserError(f"{dataset.name}: {channels} channels cannot be streamed; allowed: 1 (grey) | 3 (RGB)")
    grey = channels == 1 and not image_size
    train, test = (
        ArrayRecords(dataset.name, images, labels, grey)
        for images, labels in (
            (dataset.train_images, dataset.train_labels),
            (dataset.test_images, dataset.test_labels),
        )
    )
    mean, std = dataset.mean, dataset.std
    if image_size and channels == 1:
        mean, std = mean * 3, std * 3
    image = (image_size, image_size, 3) if image_size else dataset.image
    return StreamedDataset(dataset.name, train, test, image, dataset.class_names, mean, std, dataset.digest)


def stream_folder(listing: folder_source.Listing, image_size: int = 0) -> StreamedDataset:
    """Image files as a streamed set.

    Args:
      listing: of `folder_source.find`.
      image_size: side of the crops of images of any size, in RGB; 0 = images of one size, as they are.

    Raises:
      UserError: without `image_size`, images of different sizes.
    """
    from prdarts_jax.data.images import common_header
    from prdarts_jax.data.records import FileRecords

    files = [*listing.train_files, *listing.test_files]
    (width, height), grey = ((image_size, image_size), False) if image_size else common_header(files)
    train = FileRecords([*map(str, listing.train_files)], listing.train_labels, grey)
    test = FileRecords([*map(str, listing.test_files)], listing.test_labels, grey)
    labels = [*listing.train_labels.tolist(), *listing.test_labels.tolist()]
    identity = [
        [file.relative_to(listing.root).as_posix(), file.stat().st_size, label]
        for file, label in zip(files, labels, strict=True)
    ]
    mean, std = _normalization("folder", train, image_size)
    return StreamedDataset(
        listing.root.resolve().name,
        train,
        test,
        (height, width, 1 if grey else 3),
        listing.class_names,
        mean,
        std,
        _digest([*listing.class_names], len(listing.train_files), identity),
    )


def stream_prepared(name: str, prepared: tfds_source.Prepared, image_size: int = 0) -> StreamedDataset:
    """A set prepared for TFDS as a streamed one.

    Args:
      name: NAME[/CONFIG][:VERSION].
      prepared: of `tfds_source.find`.
      image_size: side of the crops of images of any size, in RGB; 0 = images of one size, as they are.

    Raises:
      UserError: not stored as array_record, or images of an unknown size without `image_size`.
    """
    _check_format(name, prepared)
    shape = prepared.builder.info.features[prepared.image_key].shape
    if not image_size and None in shape[:2]:
        shape = (*np.asarray(_split(name, prepared, "train", grey=False).read(0)[0]).shape[:2], shape[2])
    grey = shape[2] == 1 and not image_size
    train = _split(name, prepared, "train", grey=grey)
    test = _test(name, prepared, grey=grey)
    mean, std = published(name) or _normalization(name, train, image_size)
    identity = [[file.relative_to(prepared.root).as_posix(), file.stat().st_size] for file in sorted(prepared.files)]
    image = (image_size, image_size, 3) if image_size else (shape[0], shape[1], 1 if grey else 3)
    names = prepared.class_names
    digest = _digest([*names], prepared.builder.info.full_name, identity)
    return StreamedDataset(name, train, test, image, names, mean, std, digest)


def _check_format(name: str, prepared: tfds_source.Prepared) -> None:
    import tensorflow_datasets as tfds

    stored = prepared.builder.info.file_format
    if stored != tfds.core.FileFormat.ARRAY_RECORD:
        shown = stored.value if stored is not None else "an unknown format"
        raise UserError(
            f"tfds:{name}: stored as {shown}, which cannot be streamed; allowed: array_record, which "
            f"`tfds convert_format --dataset_dir={prepared.root} --out_file_format=array_record --out_path=DIR` writes "
            "where TensorFlow is installed"
        )


def _split(name: str, prepared: tfds_source.Prepared, split: str, *, grey: bool) -> PreparedRecords:
    import tensorflow_datasets as tfds

    from prdarts_jax.data.records import PreparedRecords

    where = f"tfds:{name}: split {split!r}"
    try:
        data = prepared.builder.as_data_source(split=split, decoders={prepared.image_key: tfds.decode.SkipDecoding()})
        found = len(data)
    except Exception as error:  # missing or damaged files surface as whatever array_record raises
        why = tfds_source.reason(error)
        raise UserError(f"{where}: cannot be read from {prepared.root} ({why}); allowed: an undamaged set") from error
    if found != prepared.count(split):
        raise UserError(
            f"{where}: {found} examples in {prepared.root}, but its dataset_info.json says {prepared.count(split)}; "
            "allowed: a completely prepared set"
        )
    return PreparedRecords(where, data, prepared.image_key, prepared.label_key, len(prepared.class_names), grey)


def _test(name: str, prepared: tfds_source.Prepared, *, grey: bool) -> PreparedRecords | ArrayRecords:
    """The records of `test`, else of `validation`: ImageNet's `test` carries -1 for every label."""
    from prdarts_jax.data.records import ArrayRecords

    for split in ("test", "validation"):
        if prepared.count(split):
            records = _split(name, prepared, split, grey=grey)
            if int(records.data[0][prepared.label_key]) >= 0:
                return records
    return ArrayRecords(name, np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0,), np.int32), grey)


# --- sizes, figures, identity -----------------------------------------------------------------------------------------


def _folder_bytes(listing: folder_source.Listing) -> int:
    """What the set would take if every image had the size of the first."""
    from prdarts_jax.data.images import read_header

    (width, height), grey = read_header(listing.train_files[0])
    return (len(listing.train_files) + len(listing.test_files)) * height * width * (1 if grey else 3)


def _prepared_bytes(name: str, prepared: tfds_source.Prepared) -> int:
    import tensorflow_datasets as tfds

    shape = prepared.builder.info.features[prepared.image_key].shape
    array_record = prepared.builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    if None in shape[:2]:
        if not array_record:
            return 0  # the other way reads it, or says why it cannot
        width, height = _split(name, prepared, "train", grey=False).read(0)[0].size
        shape = (height, width, shape[2])
    count = prepared.count("train") + (prepared.count("test") or prepared.count("validation"))
    return count * int(np.prod(shape))


def _normalization(
    where: str, train: FileRecords | PreparedRecords, image_size: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's figures for its recipe; for images of one size those of a fixed sample of the training images."""
    if image_size:
        return IMAGENET
    count = len(train)
    # All of them, in their order, if they are few: then the figures are those of the set on the device.
    chosen = np.random.RandomState(_STATISTICS_SEED).permutation(count)[:STATISTICS_IMAGES]
    pixels = [np.asarray(train.read(index)[0]) for index in sorted(chosen.tolist())]
    for index, image in zip(sorted(chosen.tolist()), pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise UserError(
                f"{train.name(index)}: image {list(image.shape[:2])}, the first is {list(pixels[0].shape[:2])}; "
                "allowed: one size for all images, or data.image_size in a training"
            )
    images = np.stack(pixels)
    return statistics(where, images if images.ndim == 4 else images[..., None])


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(["files", *parts]).encode()).hexdigest()
