"""Seconds of one bilevel step, and what comes before the first one: tracing and compilation. No peer yet."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import bilevel, strategies
from prdarts_jax.bilevel import Batch, Batches
from prdarts_jax.config import OPS, ArchConfig, SpaceConfig, WeightsConfig
from prdarts_jax.space import Space

FEW = ("none", "skip_connect", "sep_conv_3x3")  # the smoke scale is there to run, not to measure
# case -> strategy, operations, cells, channels, image side, batch, timed steps
CASES = {
    "smoke": {"prdarts-3": ("prdarts", FEW, 3, 4, 8, 4, 2)},
    "full": {
        "prdarts-6": ("prdarts", OPS, 6, 16, 32, 32, 10),
        "prdarts-8": ("prdarts", OPS, 8, 16, 32, 32, 10),
        "darts-dense-8": ("darts", OPS, 8, 16, 32, 32, 5),
    },
}


def rows(scale: str) -> Iterator[dict[str, Any]]:
    """One row a case: {case, batch, seconds, seconds_min, seconds_max, trace, compile, memory_peak_gb}."""
    for case, (name, ops, cells, channels, side, batch, repeats) in CASES[scale].items():
        space = Space.create(SpaceConfig(cells=cells, channels=channels, ops=ops), classes=10, in_channels=3)
        strategy = strategies.get(name, space=space)
        parts = {
            "space": space,
            "strategy": strategy,
            "weight_tx": bilevel.weight_transform(WeightsConfig()),
            "arch_tx": bilevel.arch_transform(ArchConfig()),
        }
        state = jax.jit(lambda key, parts=parts: bilevel.init_state(key, **parts))(jax.random.key(0))
        batches = Batches(
            *(
                Batch(jax.random.normal(jax.random.key(i), (batch, side, side, 3)), jnp.arange(batch) % 10)
                for i in range(2)
            )
        )
        progress = {k: np.float32(v) for k, v in strategy.schedule(100, 200).items()}
        began = time.perf_counter()
        lowered = jax.jit(bilevel.make_search_step(**parts), donate_argnums=0).lower(
            state, batches, jax.random.key(0), progress
        )
        traced = time.perf_counter()
        step = lowered.compile()
        compiled = time.perf_counter()
        seconds = []
        for i in range(repeats + 1):
            start = time.perf_counter()
            state, _ = step(state, batches, jax.random.key(i), progress)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
        seconds = seconds[1:]
        yield {
            "case": case,
            "batch": batch,
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "trace_s": round(traced - began, 2),
            "compile_s": round(compiled - traced, 2),
            "memory_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
