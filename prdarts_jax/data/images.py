"""Image files to pixels with Pillow; the errors name the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from prdarts_jax.errors import UserError

# What Pillow raises for a damaged or a foreign file.
DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"})


def read_header(file: Path) -> tuple[tuple[int, int], bool]:
    """Size (width, height) of an image, and whether it is grey, without decoding its pixels.

    Raises:
        UserError: not a readable image, or not 8 bits a channel.
    """
    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
    except DAMAGE as error:
        raise unreadable(str(file), error) from error
    if mode not in _GREY_MODES | _COLOUR_MODES:
        raise UserError(f"{file}: pixel format {mode!r} is not 8 bits a channel; allowed: 8-bit grey or colour")
    return size, mode in _GREY_MODES


def common_header(files: Sequence[Path]) -> tuple[tuple[int, int], bool]:
    """Size (width, height) that all images share, and whether every one of them is grey.

    Raises:
        UserError: see `read_header`; another size.
    """
    size, grey = read_header(files[0])
    for file in files[1:]:
        other, other_grey = read_header(file)
        if other != size:
            raise UserError(
                f"{file}: image size {other[0]}x{other[1]} differs from {size[0]}x{size[1]} of "
                f"{files[0]}; allowed: one size for all images, or data.image_size in a training"
            )
        grey = grey and other_grey
    return size, grey


def read_image(file: Path | IO[bytes], where: str, *, grey: bool) -> Image.Image:
    """A decoded image with one channel or three.

    Raises:
        UserError: an unreadable image, named by `where`, or one of more than 8 bits a channel.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in _GREY_MODES | _COLOUR_MODES:
                raise UserError(
                    f"{where}: pixel format {image.mode!r} is not 8 bits a channel; allowed: 8-bit grey or colour"
                )
            return image.convert("L" if grey else "RGB")
    except UserError:  # a ValueError itself
        raise
    except DAMAGE as error:
        raise unreadable(where, error) from error


def unreadable(where: str, error: BaseException) -> UserError:
    """The error for an image that Pillow cannot decode."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{where}: not a readable image ({reason}); allowed: an image file that Pillow can decode")
