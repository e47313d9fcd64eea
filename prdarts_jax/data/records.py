"""Labelled images that are read one by one, decoded by Pillow, and the arrays made of them. Picklable, for workers.

The errors name the image. Pillow is imported when the first image is read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from prdarts_jax.data.batches import Images
from prdarts_jax.errors import RunError, UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the channels of a set
_GREY_MODES = frozenset({"1", "L", "LA"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA"})
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange height and width
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"})


class Records(Protocol):
    """A sequence of labelled images of any size."""

    def __len__(self) -> int:
        """How many."""

    def read(self, index: int, channels: int = 3) -> tuple[Image, int]:
        """The image with one channel (Pillow's mode L) or three (RGB), and its label.

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

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, channels: int = 3) -> tuple[Image, int]:
        """See `Records`."""
        return read_image(self.files[index], self.files[index], channels, upright=True), int(self.labels[index])

    def name(self, index: int) -> str:
        """The path of the file."""
        return self.files[index]


@dataclass(frozen=True)
class ArrayRecords:
    """Images in memory. A worker process gets a copy of all of them."""

    source: str
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, channels: int = 3) -> tuple[Image, int]:
        """See `Records`."""
        from PIL import Image

        pixels = self.images[index]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return image.convert(_MODES[channels]), int(self.labels[index])

    def name(self, index: int) -> str:
        """The source and the row."""
        return f"{self.source}: image {index}"


@dataclass(frozen=True)
class Selection:
    """Some of a sequence of images."""

    records: Records
    indices: np.ndarray  # int [n]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, channels: int = 3) -> tuple[Image, int]:
        """See `Records`."""
        return self.records.read(int(self.indices[index]), channels)

    def name(self, index: int) -> str:
        """As in the sequence that they are of."""
        return self.records.name(int(self.indices[index]))


class Header(NamedTuple):
    """What the head of an image file says."""

    shape: tuple[int, int, int]  # (H, W, C) as it is shown, C = 1 where it is grey and 3 otherwise
    left_out: frozenset[str]  # what of it is not read, in words


def read_header(file: str) -> Header:
    """The head of an image file; pixels are decoded for some palettes alone.

    Raises:
      UserError: not a readable image, or not 8 bits a channel.
    """
    with _opened(file, file) as image:
        width, height = image.size
        # Pillow turns a TIFF by itself.
        if image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _LYING:
            width, height = height, width
        left_out = {
            "the transparency": image.mode in _ALPHA_MODES or "transparency" in image.info,
            "all frames but the first": getattr(image, "is_animated", False),
            "colours as they are stored (they become RGB)": image.mode in ("CMYK", "LAB", "HSV"),
        }
        shape = (height, width, 1 if _is_grey(image) else 3)
    return Header(shape, frozenset(name for name, true in left_out.items() if true))


def _is_grey(image: Image) -> bool:
    """Whether an image shows greys alone: by its pixel format, or by the colours of its palette that it uses."""
    if image.mode not in ("P", "PA"):
        return image.mode in _GREY_MODES
    palette = np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
    grey = (palette == palette[:, :1]).all(axis=1)
    if grey.all():
        return True
    used = np.unique(np.asarray(image).reshape(image.height, image.width, -1)[..., 0])
    return bool(grey[used[used < len(grey)]].all())


def read_image(file: str | IO[bytes], where: str, channels: int, *, upright: bool = False) -> Image:
    """A decoded image with one channel (Pillow's mode L) or three (RGB).

    Args:
      file: the image.
      where: what errors call it.
      channels: 1 | 3.
      upright: whether it is turned as its EXIF orientation says, as cameras expect it to be shown.

    Raises:
      UserError: an unreadable image, or one of more than 8 bits a channel.
    """
    from PIL import ImageOps

    with _opened(file, where) as image:
        return (ImageOps.exif_transpose(image) if upright else image).convert(_MODES[channels])


def _deeper(image: Image) -> str:
    """The stored format of an image of more than 8 bits a channel, which Pillow would cut without a word; else ''."""
    for codec, _, _, args in getattr(image, "tile", ()):
        values = args if isinstance(args, tuple) else (args,)
        words = [value for value in values if isinstance(value, str)]
        if deep := [word for word in words if re.search(r";(12|16|32)", word)]:
            return repr(deep[0])
        largest = max((value for value in values if isinstance(value, int)), default=0)
        if codec.startswith("ppm") and largest > 255:
            return f"PPM with values up to {largest}"
    return ""


@contextlib.contextmanager
def _opened(file: str | IO[bytes], where: str) -> Iterator[Image]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            stored = _deeper(image) if image.mode in _GREY_MODES | _COLOUR_MODES else repr(image.mode)
            if stored:
                raise UserError(
                    f"{where}: pixel format {stored} is not 8 bits a channel; allowed: 8-bit grey or colour "
                    "(convert it, then the rounding is yours)"
                )
            yield image
    except UserError:  # a ValueError itself
        raise
    # What Pillow raises for a damaged or a foreign file.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where}: not a readable image ({first_line(error)}); allowed: an image file that Pillow can decode"
        ) from error


def read_images(
    records: Records,
    shape: tuple[int, int, int],
    indices: np.ndarray,
    transform: Callable[[Image, int], np.ndarray] | None = None,
) -> Images:
    """Some images of a set as arrays, in the order of the indices.

    Args:
      records: of the set.
      shape: (H, W, C) of an image of the result; C = 1 makes every image grey, C = 3 RGB.
      indices: int [B].
      transform: from an image and its place among the indices to its pixels; default: the pixels as they are.

    Returns:
      uint8 [B, H, W, C] and int32 [B].

    Raises:
      UserError: an image that cannot be read, or one of another size.
      RunError: any other error, in one line that names the image.
    """
    images, labels = np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int32)
    for place, index in enumerate(indices.tolist()):
        try:
            image, labels[place] = records.read(index, shape[2])
            pixels = np.asarray(image) if transform is None else transform(image, place)
        except UserError:
            raise
        except Exception as error:
            raise failure(records.name(index), error) from error
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.shape != shape:
            raise UserError(
                f"{records.name(index)}: image {list(pixels.shape)}, others are {list(shape)}; "
                "allowed: one size for all images, or data.image_size"
            )
        images[place] = pixels
    return Images(images, labels)


def failure(where: str, error: Exception) -> RunError:
    """One line for an unexpected error, which may be one that pickle refuses and that cannot leave a worker itself."""
    return RunError(f"{where}: {type(error).__name__} ({first_line(error)[:200]}); what was saved is kept")
