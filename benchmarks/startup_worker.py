"""One start, as a user makes it: `python -m benchmarks.startup_worker '{"kind": ..., "began": ...}'`; a JSON line.

The stages of `prdarts_jax.search` and `prdarts_jax.train` up to the first step, in order, on images in memory. Nothing
heavy is imported before the clock runs: `began` is time.time() just before the process was started.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    given = json.loads(sys.argv[1])
    clock = {"python_s": time.time() - given["began"]}
    last = time.time()

    def lap(name: str) -> None:
        nonlocal last
        now = time.time()
        clock[name], last = now - last, now

    import jax
    import numpy as np

    from prdarts_jax.devices import sharding
    from prdarts_jax.ops import kernels
    from prdarts_jax.searching import inputs as search_inputs
    from prdarts_jax.searching import loop as search_loop
    from prdarts_jax.searching import program as search_program
    from prdarts_jax.training import inputs as train_inputs
    from prdarts_jax.training import loop as train_loop
    from prdarts_jax.training import program as train_program

    del search_loop, train_loop  # what a run imports, too
    lap("import_s")
    kernels.kernels()
    lap("kernels_s")

    from prdarts_jax.data.batches import Images
    from prdarts_jax.data.sources import from_arrays
    from prdarts_jax.space.genotype import Genotype

    rng, side, batch = np.random.default_rng(0), given["side"], given["batch"]
    images = rng.integers(0, 256, (given["images"], side, side, 3), dtype=np.uint8)
    dataset = from_arrays("random", images, (np.arange(len(images)) % 10).astype(np.int32))
    config = _config(given)
    key, length = jax.random.key(0), 4
    if given["kind"] == "search":
        inputs: Any = search_inputs.prepare(config, data=dataset)
        halves = search_inputs.halves(config, len(images))
        numbers = inputs.problem.strategy.schedule(0, 2) | {"weight_learning_rate": 0.025, "arch_learning_rate": 3e-4}
        program: Any = search_program
        order: Any = search_program.Orders(*(half[: length * batch].reshape(length, batch) for half in halves))
    else:
        inputs = train_inputs.prepare(config, Genotype.named(given["genotype"]), data=dataset)
        numbers = {"learning_rate": 0.025, "drop_path": 0.1}
        program, order = train_program, np.arange(length * batch).reshape(length, batch).astype(np.int32)
    progress = {name: np.float32(value) for name, value in numbers.items()}
    data = sharding.replicate(inputs.mesh, Images(dataset.train_images, dataset.train_labels))
    lap("prepare_s")
    if given["kind"] == "search":
        programs = search_program.SearchPrograms(inputs.problem, inputs.mesh, images.shape[1:])
        carry: Any = sharding.replicate(inputs.mesh, programs.initial(key, progress))
    else:
        carry = train_program.initial_carry(inputs.problem, inputs.mesh, key, images.shape[1:])
    jax.block_until_ready(carry)
    lap("init_s")
    positions = np.arange(batch, dtype=np.int32)
    args = (np.int32(1), np.bool_(True), order, positions, key, progress, data)
    lowered = program.make_dispatch(inputs.problem, inputs.mesh).lower(carry, *args)
    lap("trace_s")
    step = lowered.compile()
    lap("compile_s")
    jax.block_until_ready(step(carry, *args))
    lap("first_step_s")

    from benchmarks.worker import peak_gb

    rounded = {name: round(value, 2) for name, value in clock.items()}
    print(json.dumps({**rounded, "total_s": round(time.time() - given["began"], 2), "memory_gb": round(peak_gb(), 2)}))


def _config(given: dict[str, Any]) -> Any:
    from prdarts_jax import presets
    from prdarts_jax.presets import train as train_presets

    flags = {"batch_size": given["batch"], "space.cells": given["cells"], "space.channels": given["channels"]}
    if given["kind"] == "search":
        return presets.resolve("paper", flags=flags | {"space.ops": given["ops"]}).config
    flags = {name.replace("space", "network"): value for name, value in flags.items()}
    return train_presets.resolve("cifar10", flags=flags | {"evaluate_every": 0}).config


if __name__ == "__main__":
    main()
