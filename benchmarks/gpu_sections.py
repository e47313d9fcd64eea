"""The parts of `bench_gpu`, each run in a process of its own: `python -m benchmarks.gpu_sections NAME JSON`.

A JSON line a number: {section, what, value, unit, ...}; a row of the correctness has `ok`. Needs jax, flax, optax,
chex and orbax-checkpoint, and torch for the peers alone.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.cases import DEPTHWISE, DepthwiseCase, SearchCase, TrainCase

Row = dict[str, Any]
PRECISIONS = ("float32", "tf32", "bfloat16")
_MATMUL = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
# Largest error relative to the largest value: of a sum of some hundred products in each precision.
TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}
EPOCHS, EPOCH_STEPS = 200, 195  # of the paper's search: 25000 images of each half, batch 128


def _dtype(precision: str) -> str:
    return "bfloat16" if precision == "bfloat16" else "float32"


def _median(run: Callable[[int], None], steps: int, blocks: int = 3) -> float:
    """Seconds a step: the median of blocks of steps, after one step that does not count."""
    run(1)
    seconds = []
    for _ in range(blocks):
        began = time.perf_counter()
        run(steps)
        seconds.append((time.perf_counter() - began) / steps)
    return statistics.median(seconds)


def _memory() -> float | None:
    """Peak of the device's memory in GB, where the platform says."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def _precision(name: str) -> contextlib.AbstractContextManager[None]:
    import jax

    return jax.default_matmul_precision(_MATMUL[name])


def _copy_speed(megabytes: int, steps: int) -> float:
    """GB/s, read and written, of a copy of a large array."""
    import jax
    import jax.numpy as jnp

    size = megabytes * 2**20 // 4
    x = jnp.ones((size,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)

    def run(count: int) -> None:
        for _ in range(count):
            y = copy(x)
        jax.block_until_ready(y)

    return 2 * x.nbytes / _median(run, steps) / 1e9


def bandwidth(given: Mapping[str, Any]) -> Iterator[Row]:
    """What a copy of a large array reaches: the measure that the other figures are held against."""
    yield {"what": "copy", "value": _copy_speed(given["megabytes"], given["steps"]), "unit": "GB/s"}


def error_of(found: Any, exact: Any, floor: float = 0.0) -> float:
    """Largest error of several arrays relative to the largest value of each; infinite if a number is not finite.

    >>> import numpy as np
    >>> error_of([np.array([1.0]), np.array([np.nan])], [np.array([1.0]), np.array([2.0])])
    inf
    """
    import numpy as np

    pairs = [(np.asarray(f, np.float64), np.asarray(e, np.float64)) for f, e in zip(found, exact, strict=True)]
    if not all(np.isfinite(f).all() for f, _ in pairs):
        return float("inf")
    return max(float(np.max(np.abs(f - e)) / (np.max(np.abs(e)) + floor)) for f, e in pairs)


def _judged(what: str, error: Callable[[], float], limit: float) -> Row:
    """A row of the correctness; what cannot be computed is not correct either, and costs no other row."""
    try:
        value, failure = error(), {}
    except Exception as e:  # out of memory, no such instruction, a compiler's bug
        value, failure = float("inf"), {"failure": f"{type(e).__name__}: {str(e)[:200]}"}
    finite = value if value < float("inf") else None  # JSON has no infinity
    return {"what": what, "value": finite, "unit": "", "ok": value <= limit, **failure}


def _both_ways(x: Any, kernel: Any, ct: Any, stride: int, dilation: int) -> Any:
    """(y, dx, dk) of a depthwise convolution."""
    import jax

    from prdarts_jax.ops.depthwise import depthwise_conv

    def run(x: Any, kernel: Any, ct: Any) -> Any:
        y, pull = jax.vjp(lambda x, k: depthwise_conv(x, k, stride=stride, dilation=dilation), x, kernel)
        return (y, *pull(ct.astype(y.dtype)))

    return jax.jit(run)(x, kernel, ct)


def _error_of_lowering(name: str, precision: str, arrays: Any, exact: Any, window: tuple[int, int]) -> float:
    import jax.numpy as jnp

    from benchmarks.lowerings import using

    with using(name), _precision(precision):
        x, kernel, ct = (jnp.asarray(a, jnp.float32) for a in arrays)
        return error_of(_both_ways(x.astype(_dtype(precision)), kernel, ct, *window), exact)


def correctness(given: Mapping[str, Any]) -> Iterator[Row]:
    """Every lowering in every precision against float64 on the CPU: forward, both gradients, strides, dilations."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.lowerings import LIBRARY, LOWERINGS

    rng = np.random.default_rng(0)
    size, channels = given["side"], given["channels"]
    cpu = jax.local_devices(backend="cpu")[0]
    for kernel, stride, dilation in given["shapes"]:
        out = -(-size // stride)
        arrays = (
            rng.normal(size=(4, size, size, channels)),
            rng.normal(size=(kernel, kernel, channels)),
            rng.normal(size=(4, out, out, channels)),
        )
        with jax.enable_x64(True), jax.default_device(cpu):
            exact = [np.asarray(leaf) for leaf in _both_ways(*map(jnp.asarray, arrays), stride, dilation)]
        for name in (LIBRARY, *LOWERINGS):
            for precision in PRECISIONS:
                what = f"error, {name}, {precision}, {kernel}x{kernel}/{stride} dilation {dilation}"
                error = partial(_error_of_lowering, name, precision, arrays, exact, (stride, dilation))
                yield _judged(what, error, TOLERANCE[precision])


def step_correctness(given: Mapping[str, Any]) -> Iterator[Row]:
    """The loss and the gradients of a small search network on the device against the CPU, in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.ours import lowering_of, search_parts
    from prdarts_jax.devices import sharding
    from prdarts_jax.ops.losses import cross_entropy
    from prdarts_jax.space import supernet

    case = SearchCase(**given["case"])
    parts = search_parts(case)
    space, strategy = parts["space"], parts["strategy"]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(case.batch, case.side, case.side, 3)).astype(np.float32)
    labels = rng.integers(0, 10, case.batch).astype(np.int32)

    def program(lowering: Any, key: Any, images: Any, labels: Any) -> Any:
        weights, arch = supernet.init(key, space), strategy.init(key)

        def loss(weights: Any, arch: Any) -> Any:
            numbers = strategy.schedule(0, 2) | {"tau": case.tau}
            arrays = {name: jnp.float32(value) for name, value in numbers.items()}
            gates = strategy.sample(key, arch, (), arrays, "arch")
            logits, _ = supernet.apply(weights, gates, images, space=space, lowering=lowering)
            return cross_entropy(logits, labels)

        return jax.value_and_grad(loss, (0, 1))(weights, arch)

    results = []
    for cell, device in [(case.lowering, jax.local_devices()[0]), ("auto", jax.local_devices(backend="cpu")[0])]:
        lowering = lowering_of(sharding.make_mesh([device]), cell)
        with jax.default_device(device), _precision("float32"):
            found = jax.jit(partial(program, lowering))(jax.random.key(0), images, labels)
            results.append([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)])
    what = f"error of loss and gradients, search network, cell {case.lowering}"
    yield _judged(what, lambda: error_of(*results, floor=1e-3), 1e-2)


def depthwise(given: Mapping[str, Any]) -> Iterator[Row]:
    """Every lowering in every precision: seconds of forward and both gradients, and the bytes that have to move.

    The bytes a second are given as a share of a copy's too; arrays that fit into a cache can have more than 1.
    """
    from benchmarks import ours
    from benchmarks.lowerings import LIBRARY, LOWERINGS, using

    copy = _copy_speed(given["megabytes"], given["steps"])
    for name, case in DEPTHWISE[given["scale"]].items():
        fields = DepthwiseCase(*case)._replace(batch=given["batch"])
        images = fields.batch * fields.side**2 * fields.channels
        for lowering in (LIBRARY, *LOWERINGS):
            for precision in given["precisions"]:
                what = f"{name}, batch {fields.batch}, {lowering}, {precision}"
                try:
                    with using(lowering), _precision(precision):
                        run, _ = ours.depthwise(dtype=_dtype(precision), loop=True, **fields._asdict())
                        seconds = _median(run, given["steps"])
                except Exception as e:  # it costs no other lowering
                    yield {"what": what, "value": None, "unit": "us", "failure": f"{type(e).__name__}: {str(e)[:200]}"}
                    continue
                yield {"what": what, "value": 1e6 * seconds, "unit": "us"}
                # Read x, write y; read x and the cotangent, write dx.
                moved = 5 * images * (2 if precision == "bfloat16" else 4)
                yield {"what": f"{what}: bytes moved", "value": moved / seconds / 1e9, "unit": "GB/s"}
                yield {"what": f"{what}: of a copy's speed", "value": moved / seconds / 1e9 / copy, "unit": ""}


def cell(given: Mapping[str, Any]) -> Iterator[Row]:
    """One mixed cell, forward and all gradients, in every lowering and precision that is given."""
    from benchmarks import ours

    for kind in given["kinds"]:
        for lowering in given["lowerings"]:
            for precision in given["precisions"]:
                case = SearchCase(**given["case"])._replace(lowering=lowering)
                what = f"one {kind} cell, K = {case.executed}, batch {case.batch}, cell {lowering}, {precision}"
                try:
                    with _precision(precision):
                        run, stages = ours.cell(kind, _dtype(precision), **case._asdict())
                        seconds = _median(run, given["steps"])
                except Exception as e:  # it costs no other lowering
                    yield {"what": what, "value": None, "unit": "ms", "failure": f"{type(e).__name__}: {str(e)[:200]}"}
                    continue
                yield {"what": what, "value": 1e3 * seconds, "unit": "ms"}
                yield {"what": f"{what}: compilation", "value": stages["compile_s"], "unit": "s"}


def search(given: Mapping[str, Any]) -> Iterator[Row]:
    """The bilevel step with one lowering in one precision."""
    from benchmarks import ours
    from benchmarks.lowerings import using

    lowering, precision = given["lowering"], given["precision"]
    with using(lowering), _precision(precision):
        run, stages = ours.search(dtype=_dtype(precision), **given["case"])
    case = SearchCase(**given["case"])
    what = f"{case.method}, {case.cells} cells, K = {case.executed}, batch {case.batch}"
    label = f"{what}, cell {case.lowering}, {lowering}, {precision}{given.get('label', '')}"
    yield {"what": label, "value": 1e3 * _median(run, given["steps"]), "unit": "ms"}
    yield {"what": f"{label}: compilation", "value": stages["compile_s"], "unit": "s"}
    yield {"what": f"{label}: peak memory", "value": _memory(), "unit": "GB"}


def train(given: Mapping[str, Any]) -> Iterator[Row]:
    """The step of the derived network in one precision."""
    from benchmarks import ours

    precision, case = given["precision"], TrainCase(**given["case"])
    with _precision(precision):
        run, stages = ours.train(dtype=_dtype(precision), **given["case"])
    label = f"{case.cells} cells, C = {case.channels}, batch {case.batch}, {precision}"
    yield {"what": label, "value": 1e3 * _median(run, given["steps"]), "unit": "ms"}
    yield {"what": f"{label}: compilation", "value": stages["compile_s"], "unit": "s"}
    yield {"what": f"{label}: peak memory", "value": _memory(), "unit": "GB"}


def _random_images(count: int, side: int) -> Any:
    import numpy as np

    from prdarts_jax.data.sources import from_arrays

    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return from_arrays("random", images, (np.arange(count) % 10).astype(np.int32))


def _config(case: SearchCase, precision: str, **run: Any) -> Any:
    """The search of a case on one device, its products of float32 arrays in a precision."""
    from prdarts_jax.config import schema
    from prdarts_jax.config.search import DataConfig, RunConfig, SearchConfig, SpaceConfig

    config = SearchConfig(
        space=SpaceConfig(cells=case.cells, channels=case.channels, ops=case.ops),
        data=DataConfig(crop_padding=min(4, case.side // 8)),
        run=RunConfig(devices="1", **run),
        batch_size=case.batch,
        dtype=_dtype(precision),
    )
    return config if case.lowering == "auto" else schema.replace(config, {"run.lowering": case.lowering})


def epochs(given: Mapping[str, Any]) -> Iterator[Row]:
    """Whole epochs in one dispatch of the search's own program, images on the device; the paper's search from it."""
    import jax
    import numpy as np

    from prdarts_jax.data.batches import Images
    from prdarts_jax.devices import sharding
    from prdarts_jax.searching import inputs as search_inputs
    from prdarts_jax.searching import program as search_program

    case, precision, steps = SearchCase(**given["case"]), given["precision"], given["steps"]
    dataset = _random_images(2 * steps * case.batch, case.side)
    images = dataset.train_images
    config = _config(case, precision)
    with _precision(precision):
        inputs = search_inputs.prepare(config, data=dataset)
        problem, mesh, key = inputs.problem, inputs.mesh, jax.random.key(0)
        halves = search_inputs.halves(config, len(images))
        orders = search_program.Orders(*(half.reshape(steps, case.batch) for half in halves))
        numbers = problem.strategy.schedule(0, 2) | {"weight_learning_rate": 0.025, "arch_learning_rate": 3e-4}
        numbers["tau"] = case.tau
        progress = {name: np.float32(value) for name, value in numbers.items()}
        data = sharding.replicate(mesh, Images(dataset.train_images, dataset.train_labels))
        programs = search_program.SearchPrograms(problem, mesh, images.shape[1:])
        carry, program = sharding.replicate(mesh, programs.initial(key, progress)), programs.dispatch
        positions = np.arange(case.batch, dtype=np.int32)
        args = (orders, positions, key, progress, data)
        carry, _ = program(carry, np.int32(1), np.bool_(True), *args)
        jax.block_until_ready(carry)
        began = time.perf_counter()
        carry, _ = program(carry, np.int32(steps), np.bool_(True), *args)
        jax.block_until_ready(carry)
    rate = steps / (time.perf_counter() - began)
    label = f"{case.cells} cells, batch {case.batch}, cell {case.lowering}, {precision}, {steps} steps in one dispatch"
    yield {"what": label, "value": rate, "unit": "steps/s"}
    yield {"what": f"{label}: peak memory", "value": _memory(), "unit": "GB"}
    if given.get("project"):
        hours = EPOCHS * EPOCH_STEPS / rate / 3600
        yield {"what": f"{label}: {EPOCHS} epochs of {EPOCH_STEPS} steps", "value": hours, "unit": "h"}


def piece(given: Mapping[str, Any]) -> Iterator[Row]:
    """The beginning of a whole search, as a user starts it: logs, checkpoints and all; it ends at a time limit."""
    import tempfile
    from pathlib import Path

    from prdarts_jax.run.metrics import read
    from prdarts_jax.searching import loop

    case, precision, minutes = SearchCase(**given["case"]), given["precision"], given["minutes"]
    config = _config(case, precision, progress="off", time_limit=minutes, steps_per_dispatch=given["dispatch"])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _precision(precision):
        result = loop.search(config, Path(folder) / "w", data=_random_images(given["images"], case.side))
        rows = [row for row in read(Path(folder) / "w" / "metrics.jsonl") if row["kind"] == "epoch"]
    what = f"a search of {case.cells} cells, batch {case.batch}, cell {case.lowering}, {precision}"
    yield {"what": f"{what}: {result.status} after", "value": time.perf_counter() - began, "unit": "s"}
    yield {"what": f"{what}: epochs", "value": len(rows), "unit": ""}
    if rows:
        yield {"what": f"{what}: images/s of the last epoch", "value": rows[-1]["images_per_s"], "unit": "1/s"}
        yield {"what": f"{what}: loss of the last epoch", "value": rows[-1]["train_loss"], "unit": "nats"}


def peer(given: Mapping[str, Any]) -> Iterator[Row]:
    """The same step in PyTorch on the same device, eager or compiled."""
    import torch

    from benchmarks.peers import sides

    device = "cuda" if given["platform"] == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: no peer")
    options = {"device": device, "precision": given["precision"], **given.get("options", {})}
    run, _ = getattr(sides, given["kind"])(**options, **given["case"])
    label = f"torch, {given['kind']}, {given['precision']}{', compiled' if options.get('compiled') else ''}"
    yield {"what": label, "value": 1e3 * _median(run, given["steps"]), "unit": "ms"}
    if device == "cuda":
        yield {"what": f"{label}: peak memory", "value": torch.cuda.max_memory_allocated() / 2**30, "unit": "GB"}


SECTIONS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "bandwidth": bandwidth,
    "correctness": correctness,
    "step-correctness": step_correctness,
    "depthwise": depthwise,
    "cell": cell,
    "search": search,
    "train": train,
    "epochs": epochs,
    "piece": piece,
    "peer": peer,
}


def main() -> None:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    for row in SECTIONS[name](given):
        print(json.dumps({"section": name, **row}), flush=True)


if __name__ == "__main__":
    main()
