"""What is measured, as plain data. Imports neither jax nor torch: each library lives in a process of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from prdarts_jax.config.search import OPS

METHODS = ("darts2", "snas", "gdas", "pc-darts", "fair-darts")  # beside prdarts and darts; darts2: of second order
FEW = ("none", "skip_connect", "sep_conv_3x3")  # the smoke scale is there to run, not to measure
TAU = 5.0  # halfway through a search from 10 to 0.1


class SearchCase(NamedTuple):
    """A bilevel search step."""

    method: str = "prdarts"  # prdarts | darts | one of METHODS
    cells: int = 8
    channels: int = 16
    ops: tuple[str, ...] = OPS
    side: int = 32  # of the images, pixels
    batch: int = 32
    executed: int = 2  # K of prdarts
    tau: float = TAU  # of the methods that draw gates
    partial: int = 1  # of C channels C / partial are mixed
    closed: float = 0.0  # share of the edges whose gates are exactly zero
    subsample: str = "topk_gate"  # prdarts: topk_gate | all
    devices: int = 1  # ours only: over which the batch is split
    members: int = 1  # ours only: searches that share the compiled step; a step is then one of each
    lowering: str = "auto"  # ours only: of the mixed cell; auto, or another one that the library has

    @property
    def head_norm(self) -> bool:
        """PR-DARTS normalises before the pooling, DARTS does not."""
        return self.method == "prdarts"


class TrainCase(NamedTuple):
    """A training step of a derived network, with auxiliary head and drop-path."""

    genotype: str = "PRDARTS"
    cells: int = 20
    channels: int = 36
    side: int = 32
    batch: int = 16
    drop_path: float = 0.1


class DepthwiseCase(NamedTuple):
    """A depthwise convolution, forward and both gradients."""

    side: int
    channels: int
    kernel: int
    batch: int = 32
    stride: int = 1
    dilation: int = 1


def _case(method: str, ops: tuple[str, ...] = OPS, **fields: Any) -> SearchCase:
    """As the method is published: Fair DARTS has no `none`, PC-DARTS mixes a quarter of the channels."""
    if method == "fair-darts":
        ops = tuple(name for name in ops if name != "none")
    return SearchCase(
        method, ops=ops, tau=0.5 if method == "snas" else TAU, partial=4 if method == "pc-darts" else 1, **fields
    )


SEARCH = {
    "smoke": {
        "prdarts-3": SearchCase(cells=3, channels=4, ops=FEW, side=8, batch=4),
        **{f"{method}-3": _case(method, FEW, cells=3, channels=4, side=8, batch=4) for method in ("snas", "pc-darts")},
    },
    "full": {
        "prdarts-6": SearchCase(cells=6),
        "prdarts-8": SearchCase(cells=8),
        "darts-dense-8": SearchCase("darts", cells=8),
        **{f"{method}-8": _case(method, cells=8) for method in METHODS},
    },
}
TRAIN = {
    "smoke": {"derived-3": TrainCase(cells=3, channels=4, batch=4)},
    "full": {"derived-20": TrainCase()},
}
DEPTHWISE = {
    "smoke": {"8x8x4-k3": DepthwiseCase(8, 4, 3, batch=2)},
    "full": {
        "32x32x16-k3": DepthwiseCase(32, 16, 3),
        "32x32x16-k5": DepthwiseCase(32, 16, 5),
        "16x16x32-k5": DepthwiseCase(16, 32, 5),
        "8x8x64-k5": DepthwiseCase(8, 64, 5),
    },
}
BATCHES = {"smoke": (4,), "full": (32, 64)}  # of the search step
