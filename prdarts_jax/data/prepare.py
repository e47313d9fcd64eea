"""The official CIFAR archives -> array_record files in the layout of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prdarts_jax.config.places import expanded
from prdarts_jax.data.tfds_source import quiet
from prdarts_jax.errors import RunError, UserError, first_line, unknown

log = logging.getLogger(__name__)

_PIXELS = 3 * 32 * 32


class _Layout(NamedTuple):
    """What an official archive holds; a record is one byte a label, then 3072 bytes in channel, row, column order."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[tuple[str, str, int], ...]  # feature, file of its names, number of classes; in record order
    counts: tuple[int, int]  # official numbers of train and test images
    sha256: str  # of the official archive


_LAYOUTS = {
    "cifar10": _Layout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        labels=(("label", "batches.meta.txt", 10),),
        counts=(50_000, 10_000),
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "cifar100": _Layout(
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        labels=(("coarse_label", "coarse_label_names.txt", 20), ("label", "fine_label_names.txt", 100)),
        counts=(50_000, 10_000),
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
}


class _Split(NamedTuple):
    labels: np.ndarray  # uint8 [N, number of label features]
    images: np.ndarray  # uint8 [N, 32, 32, 3]


def prepare(name: str, archive: Path, data_dir: Path, *, check_digest: bool = True) -> Path:
    """Writes `data_dir/NAME/VERSION` from the official binary archive; afterwards `tfds:NAME` reads it.

    An archive whose content is right but whose SHA-256 is not the official one (packed anew, a subset) is accepted
    with a warning on the log: what matters, the records, has been checked.

    Args:
        name: cifar10 | cifar100.
        archive: cifar-10-binary.tar.gz or cifar-100-binary.tar.gz.
        data_dir: the TFDS data directory; made if absent.
        check_digest: compare the archive's SHA-256 with the official one.

    Returns:
        The directory written.

    Raises:
        UserError: not such an archive, a damaged one, a set already prepared, or an unwritable `data_dir`; nothing is
            left on disk.
        RunError: writing failed half-way (disk full); nothing is left on disk.

    References:
        Krizhevsky 2009; the layout is that of the builders `cifar10` and `cifar100` in tensorflow_datasets.
    """
    if name not in _LAYOUTS:
        raise unknown("data prepare", name, _LAYOUTS)
    import tensorflow_datasets as tfds

    layout = _LAYOUTS[name]
    archive, data_dir = expanded(archive, "--archive"), expanded(data_dir, "--data-dir")
    with quiet():
        # The registered class gives the exact version, features and description; only its reading needs TensorFlow.
        base = tfds.builder_cls(name)
        target = data_dir / name / str(base.VERSION)
        if target.exists():
            raise UserError(f"--data-dir: {target} exists already; allowed: a data directory without {name}")
        names, splits = _read_archive(name, layout, archive)
        if check_digest:
            _warn_if_unofficial(name, layout, archive, splits)
        with (
            _new_directory(data_dir) as parent,
            tempfile.TemporaryDirectory(prefix=f".prepare-{name}-", dir=parent, ignore_cleanup_errors=True) as scratch,
        ):
            try:
                written = _write(base, Path(scratch), layout, names, splits)
                target.parent.mkdir(exist_ok=True)
                # One rename: the set is there completely or not at all, also after a kill.
                os.rename(written, target)
            # A full disk is an OSError of Python or a RuntimeError of array_record.
            except (OSError, RuntimeError) as error:
                raise RunError(f"--data-dir: writing {target} failed ({error}); nothing was kept") from error
    return target


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """`path`, made if absent; the directories made here go again where the body fails."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("not writable")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--data-dir: {path} cannot be used ({reason}); allowed: a writable directory") from error
    try:
        yield path
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _read_archive(name: str, layout: _Layout, archive: Path) -> tuple[dict[str, list[str]], dict[str, _Split]]:
    if not archive.is_file():
        raise UserError(f"--archive: {archive}: no such file; allowed: the official binary archive of {name}")
    wanted = {*layout.train, *layout.test, *(file for _, file, _ in layout.labels)}
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                if folder == layout.folder and file in wanted and (stream := tar.extractfile(member)) is not None:
                    content[file] = stream.read()
    # A truncated or damaged gzip stream is an EOFError, zlib.error or OSError, a truncated tar a ReadError.
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"--archive: {archive}: not a complete tar archive ({first_line(error)}); "
            f"allowed: the official binary archive of {name}"
        ) from error
    if missing := sorted(wanted - content.keys()):
        raise UserError(
            f"--archive: {archive}: no member {layout.folder}/{missing[0]}; "
            f"allowed: the official binary archive of {name}"
        )
    names = {}
    for feature, file, count in layout.labels:
        lines = [line.strip() for line in content[file].decode("utf-8", "replace").splitlines() if line.strip()]
        if len(set(lines)) != count or len(lines) != count:
            raise UserError(
                f"--archive: {archive}: {file} has {len(lines)} class names; allowed: {count} distinct ones"
            )
        names[feature] = lines
    splits = {}
    for split, files in (("train", layout.train), ("test", layout.test)):
        rows = np.concatenate([_rows(archive, layout, file, content[file]) for file in files])
        labels, pixels = np.split(rows, [len(layout.labels)], axis=1)
        splits[split] = _Split(labels, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return names, splits


def _rows(archive: Path, layout: _Layout, file: str, data: bytes) -> np.ndarray:
    """The records of a file, checked: uint8 [N, labels and pixels]."""
    size = len(layout.labels) + _PIXELS
    if not data or len(data) % size:
        raise UserError(f"--archive: {archive}: {file} has {len(data)} bytes; allowed: a positive multiple of {size}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    for column, (feature, _, count) in enumerate(layout.labels):
        if (top := int(rows[:, column].max())) >= count:
            raise UserError(f"--archive: {archive}: {file} holds {feature} {top}; allowed: 0..{count - 1}")
    return rows


def _warn_if_unofficial(name: str, layout: _Layout, archive: Path, splits: dict[str, _Split]) -> None:
    counts = (len(splits["train"].images), len(splits["test"].images))
    if counts != layout.counts:
        log.warning("%s: %d train and %d test images; official %s: %d and %d", archive, *counts, name, *layout.counts)
    with archive.open("rb") as stream:
        if (sha256 := hashlib.file_digest(stream, "sha256").hexdigest()) != layout.sha256:
            log.warning("%s: SHA-256 %s is not that of the official %s archive", archive, sha256, name)


def _write(base: Any, data_dir: Path, layout: _Layout, names: dict[str, list[str]], splits: dict[str, _Split]) -> Path:
    import tensorflow_datasets as tfds
    from PIL import Image

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (labels, image) in enumerate(zip(*splits[split], strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            # Encoded here, because TFDS encodes arrays with TensorFlow; keys and ids as in the original builder, so
            # that the order on disk is the same as well.
            example: dict[str, Any] = {"id": f"{split}_{index:05d}", "image": io.BytesIO(png.getvalue())}
            yield index, example | {f: int(v) for (f, _, _), v in zip(layout.labels, labels, strict=True)}

    def split_generators(self: Any, _: Any) -> dict[str, Any]:
        for feature, class_names in names.items():
            self.info.features[feature].names = class_names
        return {split: examples(split) for split in splits}

    # Registered twice, the name would clash with the builder of TFDS itself.
    with tfds.core.registered.skip_registration():
        members = {"_split_generators": split_generators, "__module__": base.__module__}
        builder_class = type(base.__name__, (base,), members)
    builder = builder_class(data_dir=str(data_dir), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(os.fspath(builder.data_path))
