"""What an epoch of a search takes beside its steps: data, metrics, logging, checkpoint.

The search itself is run on images in memory. An epoch's time goes from its first dispatch to the next epoch's. Its
steps are what a dispatch computes without the loading of images, which is timed by itself: so

    overhead = (epoch - dispatches + steps * loading) / (dispatches - steps * loading)

The epochs here are shorter than those of a real search, which makes the share of the checkpoint larger:
`overhead_full` is the same with what happens once an epoch spread over the 195 steps of CIFAR-10 at batch 128.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.comparisons import Options, Row
from benchmarks.race import ROOT, environment

FULL_EPOCH = 195  # steps: 25000 images of each half at batch 128


def rows(options: Options) -> Iterator[Row]:
    """One search of a few epochs a case."""
    for name, case in cases.SEARCH[options.scale].items():
        if case.method != "prdarts" or not options.wants(name, case.batch, ""):
            continue
        steps, epochs = (4, 3) if options.scale == "smoke" else (40, 4)
        given = {**case._asdict(), "steps": steps, "epochs": epochs}
        command = [sys.executable, "-m", "benchmarks.overhead", json.dumps(given)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
        yield {"case": name, "batch": case.batch, **json.loads(done.stdout.splitlines()[-1])}


def measure(given: dict[str, Any]) -> Row:
    """Runs the search in this process; the row's numbers."""
    import io

    import jax
    import numpy as np

    from prdarts_jax import presets
    from prdarts_jax.data.sources import from_arrays
    from prdarts_jax.searching import loop as search_loop

    side, batch, steps = given["side"], given["batch"], given["steps"]
    images = np.random.default_rng(0).integers(0, 256, (2 * steps * batch, side, side, 3), dtype=np.uint8)
    dataset = from_arrays("random", images, (np.arange(len(images)) % 10).astype(np.int32))
    flags = {"batch_size": batch, "space.cells": given["cells"], "space.channels": given["channels"]}
    flags |= {"space.ops": ",".join(given["ops"]), "epochs": given["epochs"], "run.progress": "off"}
    if side < 32:
        flags["data.crop_padding"] = 1
    config = presets.resolve("paper", flags=flags).config
    dispatches: list[list[tuple[float, float]]] = []
    real = search_loop._Search.dispatch

    def timed(self: Any, carry: Any, count: Any, fresh: Any, *rest: Any) -> Any:
        began = time.perf_counter()
        found = jax.block_until_ready(real(self, carry, count, fresh, *rest))
        if bool(fresh):
            dispatches.append([])
        dispatches[-1].append((began, time.perf_counter()))
        return found

    search_loop._Search.dispatch = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        search_loop.search(config, Path(folder) / "run", data=dataset, out=io.StringIO())
    loading = _loading(config, dataset, batch)
    starts = [epoch[0][0] for epoch in dispatches]
    # The first epoch compiles, and the last one is followed by the report.
    whole = [b - a for a, b in pairwise(starts[1:])]
    inside = [sum(end - begin for begin, end in epoch) for epoch in dispatches[1:-1]]
    gaps = [b - a for epoch in dispatches[1:-1] for (_, a), (b, _) in pairwise(epoch)]
    between = statistics.mean(gaps) if gaps else 0.0
    epoch_s, dispatch_s = statistics.median(whole), statistics.median(inside)
    step_s = dispatch_s / steps - loading
    outside = epoch_s - dispatch_s
    once = outside - between * (len(dispatches[1]) - 1)  # checkpoint, rows, the order of the next epoch
    share = (outside + steps * loading) / (steps * step_s)
    spread = once / (FULL_EPOCH * step_s) + (between / config.run.steps_per_dispatch + loading) / step_s
    return {
        "steps": steps,
        "epoch_s": round(epoch_s, 3),
        "step_s": round(step_s, 4),
        "loading_s": round(loading, 5),
        "once_an_epoch_s": round(once, 4),
        "between_dispatches_s": round(between, 5),
        "overhead": round(share, 4),
        "overhead_full": round(spread, 4),
    }


def _loading(config: Any, dataset: Any, batch: int) -> float:
    """Seconds of gathering and augmenting the two batches of a step, measured alone."""
    import jax
    import numpy as np

    from prdarts_jax.data.augment import load_images

    def both(key: Any, data: Any, index: Any) -> Any:
        keys = jax.random.split(key)
        options = {"data": config.data, "mean": dataset.mean, "std": dataset.std, "dtype": config.dtype}
        return [load_images(k, data[i], np.arange(batch), **options) for k, i in zip(keys, index, strict=True)]

    load = jax.jit(both)
    index = np.arange(2 * batch).reshape(2, batch)
    data, key, seconds = jax.device_put(dataset.train_images), jax.random.key(0), []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(load(key, data, index))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
