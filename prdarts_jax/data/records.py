"""Images that are read one by one: files, records of a prepared set, or rows of an array. Picklable, for workers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from prdarts_jax.data.images import read_image
from prdarts_jax.data.tfds_source import quiet, reason
from prdarts_jax.errors import UserError


class Records(Protocol):
    """A sequence of labelled images of any size."""

    def __len__(self) -> int:
        """How many."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image, grey (mode L) or RGB, and its label.

        Raises:
          UserError: it cannot be read; one line that names it.
        """

    def name(self, index: int) -> str:
        """What messages call it."""


@dataclass(frozen=True)
class FileRecords:
    """Image files."""

    files: Sequence[str]  # not paths: pickle is 40 times slower with those, and a worker gets a million
    labels: np.ndarray  # int32 [N]
    grey: bool

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See `Records`."""
        return read_image(Path(self.files[index]), self.name(index), grey=self.grey), int(self.labels[index])

    def name(self, index: int) -> str:
        """The path of the file."""
        return self.files[index]


@dataclass(frozen=True)
class ArrayRecords:
    """Images in memory. A worker process gets a copy of all of them."""

    source: str
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]
    grey: bool

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See `Records`."""
        pixels = self.images[index]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return image.convert("L" if self.grey else "RGB"), int(self.labels[index])

    def name(self, index: int) -> str:
        """The source and the row."""
        return f"{self.source}: image {index}"


@dataclass(frozen=True)
class PreparedRecords:
    """Records of a TFDS data source (array_record) whose images are left encoded."""

    source: str  # name and split
    data: Any  # of `as_data_source` with SkipDecoding for the image
    image_key: str
    label_key: str
    classes: int
    grey: bool

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See `Records`."""
        where = self.name(index)
        # Damaged files surface as whatever array_record and protobuf raise.
        try:
            with quiet():
                example = self.data[index]
        except Exception as error:
            raise UserError(f"{where}: cannot be read ({reason(error)}); allowed: an undamaged set") from error
        label = int(example[self.label_key])
        if not 0 <= label < self.classes:
            raise UserError(f"{where}: label {label} is out of range; allowed: 0..{self.classes - 1}")
        return read_image(io.BytesIO(example[self.image_key]), where, grey=self.grey), label

    def name(self, index: int) -> str:
        """The split and the number of the record."""
        return f"{self.source}: record {index}"
