"""Image classification sets of TensorFlow Datasets that are already prepared on disk; nothing here downloads."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prdarts_jax.config.places import expanded
from prdarts_jax.data.arrays import Arrays
from prdarts_jax.data.batches import Images
from prdarts_jax.data.cache import cached, file_identity
from prdarts_jax.data.records import read_image
from prdarts_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from PIL.Image import Image

# NAME[/CONFIG][:VERSION]. A namespace ('huggingface:...') is left out: TFDS resolves it over the network.
_NAME = re.compile(r"[a-zA-Z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")
_PREPARABLE = ("cifar10", "cifar100")
_ARRAY_RECORD = "array_record"
_CHUNK = 1000


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS reports absent sets, missing OpenCV and the like through absl's log; our errors say it in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class PreparedRecords:
    """Records of a TFDS data source (array_record) whose images are left encoded."""

    source: str  # name and split
    data: Any  # of `as_data_source` with SkipDecoding for the image
    image_key: str
    label_key: str
    classes: int

    def __len__(self) -> int:
        return len(self.data)

    def example(self, index: int) -> dict[str, Any]:
        """The stored features of a record.

        Raises:
          UserError: a damaged file.
        """
        # Damaged files surface as whatever array_record and protobuf raise.
        try:
            with quiet():
                return self.data[index]
        except Exception as error:
            why = first_line(error)[:200]
            raise UserError(f"{self.name(index)}: cannot be read ({why}); allowed: an undamaged set") from error

    def read(self, index: int, channels: int = 3) -> tuple[Image, int]:
        """See `Records`."""
        example = self.example(index)
        label = int(example[self.label_key])
        if not 0 <= label < self.classes:
            raise UserError(f"{self.name(index)}: label {label} is out of range; allowed: 0..{self.classes - 1}")
        return read_image(io.BytesIO(example[self.image_key]), self.name(index), channels), label

    def name(self, index: int) -> str:
        """The split and the number of the record."""
        return f"{self.source}: record {index}"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A set of images and labels that lies on the disk; its description is read, not its images."""

    name: str  # NAME[/CONFIG][:VERSION]
    builder: tfds.core.DatasetBuilder
    image_key: str
    label_key: str

    @property
    def root(self) -> Path:
        """The directory of its files."""
        return Path(os.fspath(self.builder.data_path))

    @property
    def files(self) -> list[Path]:
        """Its files, sorted."""
        return sorted(file for file in self.root.iterdir() if file.is_file())

    @property
    def file_format(self) -> str:
        """The format of the files, as TFDS calls it."""
        stored = self.builder.info.file_format
        return stored.value if stored is not None else "an unknown format"

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        feature = self.builder.info.features[self.label_key]
        return tuple(feature.names or map(str, range(feature.num_classes)))

    def count(self, split: str) -> int:
        """Examples of a split; 0 where there is none."""
        splits = self.builder.info.splits
        return splits[split].num_examples if split in splits else 0

    @property
    def test_splits(self) -> list[str]:
        """The splits that may be the test set, the best first: ImageNet's `test` carries -1 for every label."""
        return [split for split in ("test", "validation") if self.count(split)]

    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) as the set's features say, or as the first image is where they leave it open.

        Raises:
            UserError: the first image cannot be read.
        """
        height, width, channels = self.builder.info.features[self.image_key].shape
        if height is None or width is None:
            width, height = self._records("train").read(0)[0].size
        return height, width, channels

    def decoded_bytes(self) -> int:
        """What the images would take in memory if every one had the size of the first.

        0 where the size is not known and the set cannot be streamed: decoding it says so, or succeeds.
        """
        known = None not in self.builder.info.features[self.image_key].shape[:2]
        if not known and self.file_format != _ARRAY_RECORD:
            return 0
        count = self.count("train") + (self.count("test") or self.count("validation"))
        return count * int(np.prod(self.shape()))

    # --- the stream

    @quiet()
    def records(self) -> tuple[PreparedRecords, PreparedRecords]:
        """The training images, and those of the first test split that has labels (none where no split has).

        Raises:
            UserError: not stored as array_record, or missing or damaged files.
        """
        if self.file_format != _ARRAY_RECORD:
            raise UserError(
                f"tfds:{self.name}: stored as {self.file_format}, which cannot be streamed; allowed: array_record, "
                f"which `tfds convert_format --dataset_dir={self.root} --out_file_format=array_record --out_path=DIR` "
                "writes where TensorFlow is installed"
            )
        train = self._records("train")
        for test in map(self._records, self.test_splits):
            if int(test.example(0)[self.label_key]) >= 0:
                return train, test
        return train, dataclasses.replace(train, data=())

    def _records(self, split: str) -> PreparedRecords:
        import tensorflow_datasets as tfds

        with self._readable(split):
            data = self.builder.as_data_source(split=split, decoders={self.image_key: tfds.decode.SkipDecoding()})
            self._check_count(split, len(data))
        return PreparedRecords(self._where(split), data, self.image_key, self.label_key, len(self.class_names))

    def identity(self) -> tuple[str, list[list[str | int]]]:
        """What a streamed set is known by: its full name; the name and size of each file."""
        rows: list[list[str | int]] = [[f.relative_to(self.root).as_posix(), f.stat().st_size] for f in self.files]
        return self.builder.info.full_name, rows

    # --- the set in memory

    @quiet()
    def load(self, cache_dir: Path | None = None) -> Arrays:
        """The decoded set, from the cache where it is there; the splits as of `records`.

        TFDS decodes it: its arrays, which have any number of channels, are what a checkpoint's digest was made of. Data
        prepared as array_record is read without TensorFlow; tfrecord needs TensorFlow.

        Args:
            cache_dir: where the decoded arrays are kept.

        Raises:
            UserError: missing or damaged files, images of different sizes, or tfrecord files without TensorFlow.
        """
        name = f"tfds {self.builder.info.full_name} {self.image_key} {self.label_key}"
        return cached(f"tfds-{self.name}", file_identity(name, self.root, self.files), self._decode, cache_dir)

    def _decode(self) -> Arrays:
        train = self._decode_split("train")
        for test in map(self._decode_split, self.test_splits):
            if test.labels.min() >= 0:
                return Arrays(*train, *test, self.class_names)
        return Arrays(*train, train.images[:0].copy(), train.labels[:0].copy(), self.class_names)

    def _decode_split(self, split: str) -> Images:
        where, count = self._where(split), self.count(split)
        images, labels, seen = np.empty(0, np.uint8), np.empty(count, np.int32), 0
        for example in self._examples(split):
            image = np.asarray(example[self.image_key])
            if image.dtype != np.uint8:
                raise UserError(f"{where}: image dtype {image.dtype} is not allowed; allowed: uint8 (0..255)")
            if not seen:
                images = np.empty((count, *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{where}: image {seen} is {list(image.shape)}, the first is {list(images.shape[1:])}; "
                    "allowed: sets whose images share one size, or data.image_size in a training"
                )
            if seen < count:
                images[seen], labels[seen] = image, example[self.label_key]
            seen += 1
        self._check_count(split, seen)
        return Images(images, labels)

    def _examples(self, split: str) -> Iterator[dict[str, Any]]:
        import tensorflow_datasets as tfds

        with self._readable(split):
            if self.file_format == _ARRAY_RECORD:
                source = self.builder.as_data_source(split=split)
                # Many records a call: half the time of one by one.
                for start in range(0, len(source), _CHUNK):
                    yield from source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
            elif importlib.util.find_spec("tensorflow") is None:
                raise UserError(
                    f"{self._where(split)}: stored as {self.file_format}, which only TensorFlow reads, and TensorFlow "
                    "is not installed; install tensorflow or prepare the set as array_record (prdarts data prepare, "
                    "tfds convert_format)"
                )
            else:
                yield from tfds.as_numpy(self.builder.as_dataset(split=split, shuffle_files=False))

    # --- messages

    def _where(self, split: str) -> str:
        return f"tfds:{self.name}: split {split!r}"

    @contextlib.contextmanager
    def _readable(self, split: str) -> Iterator[None]:
        """Missing or damaged files surface as whatever array_record, Pillow or TensorFlow raise."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            why = first_line(error)[:200]
            raise UserError(
                f"{self._where(split)}: cannot be read from {self.root} ({why}); allowed: an undamaged set"
            ) from error

    def _check_count(self, split: str, seen: int) -> None:
        if not seen or seen != self.count(split):
            raise UserError(
                f"{self._where(split)}: {seen} examples in {self.root}, but its dataset_info.json says "
                f"{self.count(split)}; allowed: a completely prepared set"
            )


@quiet()
def find(name: str, data_dir: str | None = None) -> Prepared:
    """A prepared set, before any image of it is read.

    Args:
        name: NAME[/CONFIG][:VERSION] of TFDS.
        data_dir: the TFDS data directory; default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
        UserError: an unknown or absent set, one without images and labels, or without a split `train`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"data.source: 'tfds:{name}' is not a set's name; allowed: tfds:NAME[/CONFIG][:VERSION]")
    import tensorflow_datasets as tfds

    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    builder = _builder(name, expanded(directory, "run.data_dir"))
    features, splits = builder.info.features, builder.info.splits
    keys = builder.info.supervised_keys or ("image", "label")
    fitting = (
        len(keys) == 2
        and all(isinstance(k, str) and k in features for k in keys)
        and isinstance(features[keys[0]], tfds.features.Image)
        and isinstance(features[keys[1]], tfds.features.ClassLabel)
    )
    if not fitting:
        raise UserError(
            f"tfds:{name}: features {sorted(features)} are not an image and a class label; "
            "allowed: image classification sets"
        )
    if "train" not in splits:
        raise UserError(f"tfds:{name}: no split 'train' among {sorted(splits)}; allowed: sets with a training split")
    return Prepared(name, builder, *keys)


def _builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=str(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"data.source: 'tfds:{name}' is neither a set of TFDS nor one prepared in {data_dir}; "
            "allowed: the name of a prepared set"
        ) from error
    # An unknown version is an AssertionError of TFDS, an unknown config a ValueError, a set with extra dependencies
    # an ImportError.
    except (AssertionError, ValueError, ImportError) as error:
        raise UserError(
            f"data.source: 'tfds:{name}' cannot be opened ({first_line(error)[:200]}); "
            "allowed: tfds:NAME[/CONFIG][:VERSION] as TFDS knows them"
        ) from error
    if not builder.is_prepared():
        how = f"tfds build {name} --data_dir {data_dir} --file_format=array_record (needs TensorFlow and network)"
        if builder.name in _PREPARABLE:
            how = f"prdarts data prepare {builder.name} --archive FILE --data-dir {data_dir}"
        raise UserError(f"data.source: 'tfds:{name}' is not prepared in {data_dir}; get it with: {how}")
    return builder
