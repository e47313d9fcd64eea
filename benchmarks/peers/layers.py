"""The operations of the DARTS space as torch modules, NCHW tensors of either memory format.

Submodules carry the names of our parameters, so that `weights.load` can copy one tree into the other. In the search a
normalisation has neither affine weights nor running statistics; in the derived network it has both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.BatchNorm2d]


def search_norm(channels: int) -> nn.BatchNorm2d:
    """Batch statistics, always; nothing to learn and nothing to remember."""
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def affine_norm(channels: int) -> nn.BatchNorm2d:
    """The stem's and the head's in the search: batch statistics, affine."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def pointwise(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)


def depthwise(channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)


class ReLUConvNorm(nn.Module):
    """ReLU, 1x1 convolution, normalisation: the preprocessing of a cell input."""

    def __init__(self, c_in: int, c_out: int, norm: Norm) -> None:
        super().__init__()
        self.pointwise, self.bn = pointwise(c_in, c_out), norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(F.relu(x)))


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2, the second shifted by one pixel, concatenated; normalisation."""

    def __init__(self, c_in: int, c_out: int, norm: Norm) -> None:
        super().__init__()
        self.first, self.second = pointwise(c_in, c_out // 2, 2), pointwise(c_in, c_out - c_out // 2, 2)
        self.bn = norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)) if x.shape[2] % 2 or x.shape[3] % 2 else x
        return self.bn(torch.cat([self.first(x), self.second(x[:, :, 1:, 1:])], 1))


class Separable(nn.Module):
    """(ReLU, depthwise, pointwise, normalisation) twice; the stride on the first."""

    def __init__(self, channels: int, kernel: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.depthwise1, self.pointwise1 = depthwise(channels, kernel, stride), pointwise(channels, channels)
        self.depthwise2, self.pointwise2 = depthwise(channels, kernel), pointwise(channels, channels)
        self.bn1, self.bn2 = norm(channels), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.pointwise1(self.depthwise1(F.relu(x))))
        # In place: nobody else reads the normalised tensor, and its normalisation keeps its own input.
        return self.bn2(self.pointwise2(self.depthwise2(F.relu(x, inplace=True))))


class Dilated(nn.Module):
    """ReLU, depthwise of dilation 2, pointwise, normalisation."""

    def __init__(self, channels: int, kernel: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.depthwise = depthwise(channels, kernel, stride, 2)
        self.pointwise, self.bn = pointwise(channels, channels), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(F.relu(x))))


def operation(name: str, channels: int, stride: int, norm: Norm, *, pool_norm: bool) -> nn.Module | None:
    """An operation of an edge, or None for `none`, which is never computed."""
    if name == "none":
        return None
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, norm)
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        pool: nn.Module = nn.MaxPool2d(3, stride, 1)
        if name.startswith("avg"):
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(pool, norm(channels)) if pool_norm else pool
    kind, _, size = name.rpartition("_")
    made = {"sep_conv": Separable, "dil_conv": Dilated}[kind]
    return made(channels, int(size[0]), stride, norm)
