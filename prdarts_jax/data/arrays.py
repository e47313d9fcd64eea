"""What every source hands over: four arrays and the class names, with the checks that all sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prdarts_jax.errors import UserError


class Arrays(NamedTuple):
    """A decoded image set; M = 0 where a source has no test images."""

    train_images: np.ndarray  # uint8 [N, H, W, C]
    train_labels: np.ndarray  # int32 [N], each in 0..K-1
    test_images: np.ndarray  # uint8 [M, H, W, C]
    test_labels: np.ndarray  # int32 [M]
    class_names: tuple[str, ...]  # K names


def as_images(where: str, images: np.ndarray) -> np.ndarray:
    """Checked images [N, H, W, C]; a grey set [N, H, W] gets its channel axis.

    Args:
        where: file and field, for the message.
        images: uint8 [N, H, W, C] or [N, H, W].

    Returns:
        uint8 [N, H, W, C], contiguous.

    Raises:
        UserError: another rank or dtype, an empty axis, or [N, C, H, W].

    >>> as_images("a.npz: images", np.zeros((2, 8, 8), np.uint8)).shape
    (2, 8, 8, 1)
    """
    if images.ndim not in (3, 4):
        raise UserError(f"{where}: shape {list(images.shape)} has rank {images.ndim}; allowed: [N,H,W,C] or [N,H,W]")
    if images.dtype != np.uint8:
        raise UserError(f"{where}: dtype {images.dtype} is not allowed; allowed: uint8 (0..255)")
    if 0 in images.shape:
        raise UserError(f"{where}: shape {list(images.shape)} has an empty axis; allowed: at least one image and pixel")
    # An image 1, 3 or 4 pixels high whose rows are longer and whose channels are many: no, the channels came first.
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise UserError(
            f"{where}: shape {list(images.shape)} has its channels first; allowed: [N,H,W,C] "
            "(images.transpose(0, 2, 3, 1))"
        )
    return np.ascontiguousarray(images if images.ndim == 4 else images[..., None])


def as_labels(where: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Checked labels [N] as int32.

    Args:
        where: file and field, for the message.
        labels: any integer dtype, [N].
        count: N, the number of images they belong to.

    Raises:
        UserError: not integers, not a vector, not one label an image, negative, or beyond int32.

    >>> as_labels("a.npz: labels", np.array([0, 1], np.int64), 2).dtype
    dtype('int32')
    """
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: dtype {labels.dtype} is not an integer type; allowed: integers 0..K-1")
    if labels.ndim != 1:
        raise UserError(f"{where}: shape {list(labels.shape)} has rank {labels.ndim}; allowed: [N]")
    if len(labels) != count:
        raise UserError(f"{where}: {len(labels)} labels for {count} images; allowed: one label an image")
    if count and (labels.min() < 0 or labels.max() > np.iinfo(np.int32).max):
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{where}: label {bad} is out of range; allowed: integers 0..K-1")
    return np.ascontiguousarray(labels, np.int32)


def check(where: str, arrays: Arrays) -> None:
    """The checks that need the whole set: one image shape, every class present in training, no unknown test label.

    Raises:
        UserError: one line that names `where`, the value and what is allowed.
    """
    classes = len(arrays.class_names)
    if classes < 2:
        raise UserError(f"{where}: {classes} class; allowed: at least 2 classes")
    # Images without end in a few classes cost nothing here, but one stray huge label must not allocate its bincount.
    if (top := int(arrays.train_labels.max())) >= classes:
        raise UserError(f"{where}: training label {top} is out of range; allowed: 0..{classes - 1}")
    counts = np.bincount(arrays.train_labels, minlength=classes)
    if empty := np.flatnonzero(counts == 0).tolist():
        raise UserError(
            f"{where}: class {empty[0]} ({arrays.class_names[empty[0]]!r}) has no training images; "
            f"allowed: at least one in each of the {classes} classes"
        )
    if not len(arrays.test_images):
        return
    if arrays.test_images.shape[1:] != arrays.train_images.shape[1:]:
        raise UserError(
            f"{where}: test images are {list(arrays.test_images.shape[1:])}; "
            f"allowed: the training images' {list(arrays.train_images.shape[1:])}"
        )
    if (top := int(arrays.test_labels.max())) >= classes:
        raise UserError(f"{where}: test label {top} is out of range; allowed: 0..{classes - 1}")


def digest(arrays: Arrays) -> str:
    """SHA-256 over the dtype, shape and bytes of the four arrays: the identity of the data in a checkpoint.

    Returns:
        64 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for array in arrays[:4]:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def statistics(where: str, images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel, images scaled to 0..1.

    From the 256 exact counts of the pixel values, so the figures depend on neither summation order nor machine.

    Args:
        where: source, for the message.
        images: uint8 [N, H, W, C].

    Returns:
        mean [C], std [C].

    Raises:
        UserError: a constant channel, which no normalisation can divide by.

    >>> statistics("example", np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    values = np.arange(256) / 255.0
    mean, std = [], []
    for channel in range(images.shape[-1]):
        # One image block at a time: bincount converts its input to int64, eight times the memory of the pixels.
        counts = np.zeros(256, np.int64)
        for block in np.array_split(images[..., channel], max(1, len(images) // 4096)):
            counts += np.bincount(block.ravel(), minlength=256)
        share = counts / counts.sum()
        centre = float(share @ values)
        spread = float(np.sqrt(share @ (values - centre) ** 2))
        if not spread > 1e-6:
            raise UserError(f"{where}: channel {channel} of the training images is constant; allowed: varying pixels")
        mean.append(centre)
        std.append(spread)
    return tuple(mean), tuple(std)


def stratified_split(labels: np.ndarray, test_counts: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed split into training and test indices, `test_counts[k]` test examples of class k.

    Args:
        labels: int [N], each in 0..K-1.
        test_counts: K counts.
        seed: the constant of the source; another seed is another data set.

    Returns:
        Ascending train indices and test indices, together 0..N-1.

    >>> train, test = stratified_split(np.array([0, 0, 1, 1]), [1, 1], seed=0)
    >>> sorted([*train.tolist(), *test.tolist()]), np.array([0, 0, 1, 1])[test].tolist()
    ([0, 1, 2, 3], [0, 1])
    """
    # RandomState is frozen by numpy's policy; the stream of default_rng may change between numpy versions.
    rng = np.random.RandomState(seed)
    test = [rng.permutation(np.flatnonzero(labels == k))[:count] for k, count in enumerate(test_counts)]
    chosen = np.zeros(len(labels), bool)
    chosen[np.concatenate(test)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
