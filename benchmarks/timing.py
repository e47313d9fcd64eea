"""Alternating timings: the machine's drift meets both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the sides in turn, after one call of each that does not count."""
    for call in sides.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Speedup of ours over the peer, pair by pair: median, minimum and maximum."""
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    return {
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "seconds_ours": statistics.median(ours),
        "seconds_peer": statistics.median(peer),
    }
