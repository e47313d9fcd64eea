"""Image classification sets of TensorFlow Datasets that are already prepared on disk; nothing here downloads."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prdarts_jax.data.arrays import Arrays
from prdarts_jax.data.cache import cached, file_identity
from prdarts_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# NAME[/CONFIG][:VERSION]. A namespace ('huggingface:...') is left out: TFDS resolves it over the network.
_NAME = re.compile(r"[a-zA-Z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")
_PREPARABLE = ("cifar10", "cifar100")
_CHUNK = 1000


def default_data_dir() -> Path:
    """`$TFDS_DATA_DIR`, else TFDS's own default `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


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


def load_tfds(name: str, data_dir: Path, cache_dir: Path | None = None) -> Arrays:
    """The splits `train` and `test` (else `validation`, where `test` is absent or has no labels) of a prepared set.

    Data prepared as array_record is read without TensorFlow; tfrecord needs TensorFlow.

    Args:
        name: NAME[/CONFIG][:VERSION] of TFDS.
        data_dir: the TFDS data directory.
        cache_dir: where the decoded arrays are kept.

    Raises:
        UserError: an unknown or absent set, one without images and labels, images of different sizes, or tfrecord
            files without TensorFlow.
    """
    with quiet():
        found = find(name, data_dir)
        builder, image_key, label_key = found.builder, found.image_key, found.label_key
        root, files = found.root, found.files
        key = file_identity(f"tfds {builder.info.full_name} {image_key} {label_key}", root, files)
        return cached(f"tfds-{name}", key, lambda: _decode(name, builder, image_key, label_key), cache_dir)


class Prepared(NamedTuple):
    """A set of images and labels that lies on the disk."""

    builder: tfds.core.DatasetBuilder
    image_key: str
    label_key: str
    root: Path
    files: list[Path]

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        feature = self.builder.info.features[self.label_key]
        return tuple(feature.names or map(str, range(feature.num_classes)))

    def count(self, split: str) -> int:
        """Examples of a split; 0 where there is none."""
        splits = self.builder.info.splits
        return splits[split].num_examples if split in splits else 0


def find(name: str, data_dir: Path) -> Prepared:
    """A prepared set, before any image of it is read.

    Raises:
        UserError: an unknown or absent set, one without images and labels, or without a split `train`.
    """
    builder = _prepared_builder(name, data_dir)
    image_key, label_key = _keys(name, builder)
    if "train" not in builder.info.splits:
        splits = sorted(builder.info.splits)
        raise UserError(f"tfds:{name}: no split 'train' among {splits}; allowed: sets with a training split")
    root = Path(os.fspath(builder.data_path))
    return Prepared(builder, image_key, label_key, root, [f for f in root.iterdir() if f.is_file()])


def _prepared_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    if not _NAME.fullmatch(name):
        raise UserError(f"data.source: 'tfds:{name}' is not a set's name; allowed: tfds:NAME[/CONFIG][:VERSION]")
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
            f"data.source: 'tfds:{name}' cannot be opened ({reason(error)}); "
            "allowed: tfds:NAME[/CONFIG][:VERSION] as TFDS knows them"
        ) from error
    if not builder.is_prepared():
        base = builder.name
        how = f"prdarts data prepare {base} --archive FILE --data-dir {data_dir}"
        if base not in _PREPARABLE:
            how = f"tfds build {name} --data_dir {data_dir} --file_format=array_record (needs TensorFlow and network)"
        raise UserError(f"data.source: 'tfds:{name}' is not prepared in {data_dir}; get it with: {how}")
    return builder


def _keys(name: str, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features = builder.info.features
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
    return keys[0], keys[1]


def _decode(name: str, builder: tfds.core.DatasetBuilder, image_key: str, label_key: str) -> Arrays:
    label_feature = builder.info.features[label_key]
    class_names = tuple(label_feature.names or map(str, range(label_feature.num_classes)))
    train = _read_split(name, builder, "train", image_key, label_key)
    for split in ("test", "validation"):
        if split in builder.info.splits and builder.info.splits[split].num_examples:
            test = _read_split(name, builder, split, image_key, label_key)
            # ImageNet's test split carries -1 for every label: nothing can be measured on it.
            if test[1].min() >= 0:
                return Arrays(*train, *test, class_names)
    images, labels = train
    return Arrays(images, labels, images[:0].copy(), labels[:0].copy(), class_names)


def _read_split(
    name: str, builder: tfds.core.DatasetBuilder, split: str, image_key: str, label_key: str
) -> tuple[np.ndarray, np.ndarray]:
    where = f"tfds:{name}: split {split!r}"
    count = builder.info.splits[split].num_examples
    examples = _examples(where, builder, split)
    images: np.ndarray | None = None
    labels = np.empty(count, np.int32)
    seen = 0
    while True:
        # Damaged files and undecodable images surface as whatever array_record, Pillow or TensorFlow raise.
        try:
            example = next(examples, None)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{where}: cannot be read from {builder.data_path} ({reason(error)}); allowed: an undamaged set"
            ) from error
        if example is None or seen == count:
            break
        image = np.asarray(example[image_key])
        if image.dtype != np.uint8:
            raise UserError(f"{where}: image dtype {image.dtype} is not allowed; allowed: uint8 (0..255)")
        if images is None:
            images = np.empty((count, *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{where}: image {seen} is {list(image.shape)}, the first is {list(images.shape[1:])}; "
                "allowed: sets whose images share one size, or data.image_size in a training"
            )
        images[seen] = image
        labels[seen] = example[label_key]
        seen += 1
    if images is None or seen != count or example is not None:
        raise UserError(
            f"{where}: {seen} examples in {builder.data_path}, but its dataset_info.json says {count}; "
            "allowed: a completely prepared set"
        )
    return images, labels


def _examples(where: str, builder: tfds.core.DatasetBuilder, split: str) -> Iterator[dict[str, Any]]:
    import tensorflow_datasets as tfds

    file_format = builder.info.file_format
    if file_format == tfds.core.FileFormat.ARRAY_RECORD:
        source = builder.as_data_source(split=split)
        # Many records a call: half the time of one by one.
        for start in range(0, len(source), _CHUNK):
            yield from source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
        return
    stored = file_format.value if file_format is not None else "an unknown format"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{where}: stored as {stored}, which only TensorFlow reads, and TensorFlow is not installed; "
            "install tensorflow or prepare the set as array_record (prdarts data prepare, tfds convert_format)"
        )
    examples: Iterable[dict[str, Any]] = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    yield from examples


def reason(error: BaseException) -> str:
    """The first line of an error of another library."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
