"""The depthwise convolution, forward and backward, against flax.linen's nn.Conv (XLA's grouped convolution)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.timing import alternate, compare
from prdarts_jax.ops.depthwise import depthwise_conv

CASES = {"smoke": [(8, 4, 3, 2)], "full": [(32, 16, 3, 32), (32, 16, 5, 32), (16, 32, 5, 32), (8, 64, 5, 32)]}


def rows(scale: str) -> Iterator[dict[str, Any]]:
    """One row a case: {case, batch, peer, speedup, speedup_min, speedup_max, seconds_ours, seconds_peer}."""
    for size, channels, kernel, batch in CASES[scale]:
        seconds = _alternate(size, channels, kernel, batch, repeats=3 if scale == "smoke" else 15)
        case = f"{size}x{size}x{channels}-k{kernel}"
        yield {"case": case, "batch": batch, "peer": "flax-conv", **compare(seconds["ours"], seconds["peer"])}


def _alternate(size: int, channels: int, kernel: int, batch: int, repeats: int) -> dict[str, list[float]]:
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels))
    weight = jax.random.normal(jax.random.key(1), (kernel, kernel, channels))
    layer = nn.Conv(channels, (kernel, kernel), feature_group_count=channels, use_bias=False)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(depthwise_conv(x, w) ** 2)

    def peer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(layer.apply({"params": {"kernel": w[:, :, None, :]}}, x) ** 2)

    mine, theirs = jax.jit(jax.grad(ours, (0, 1))), jax.jit(jax.grad(peer, (0, 1)))
    return alternate({"ours": lambda: mine(x, weight), "peer": lambda: theirs(x, weight)}, repeats)
