"""python -m benchmarks.bench_scaling [--scale smoke|full]: step time on 1..n devices, and what a step exchanges.

Two kinds of rows. `counts`: the all-reduces and all-gathers of one step and the bytes that a device puts into them,
counted in its traced program: scans by their length, switches as the least, the mean and the most of their branches.
`time`: seconds of a step and efficiency, with the global batch fixed (strong) and with the batch of a device fixed
(weak). On CPU several devices exist with

    XLA_FLAGS=--xla_force_host_platform_device_count=4 PJRT_NPROC=16 python -m benchmarks.bench_scaling

and share the cores: such rows show the cost of splitting, not a speedup.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax import optimizers, strategies
from prdarts_jax.bilevel import Batches
from prdarts_jax.config.search import OPS, ArchConfig, SpaceConfig, WeightsConfig
from prdarts_jax.config.train import NetworkConfig, TrainConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.devices import sharding
from prdarts_jax.searching.step import init_state, make_search_step
from prdarts_jax.space import Space
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program

WHOLE, SPLIT = PartitionSpec(), PartitionSpec(sharding.AXIS)
_EXCHANGES = ("psum", "psum2", "psum_invariant", "all_gather")  # the first three: what lax.pmean is traced to


class Case(NamedTuple):
    """A step to count or to time."""

    strategy: str  # of the search; "" = a training
    cells: int
    channels: int
    side: int
    batch: int  # global
    ops: tuple[str, ...] = OPS


FEW = ("none", "skip_connect", "sep_conv_3x3")
COUNTED = {
    "smoke": {"search-smoke": Case("prdarts", 3, 4, 8, 4, FEW)},
    "full": {
        "search-paper": Case("prdarts", 8, 16, 32, 128),
        "search-darts": Case("darts", 8, 16, 32, 64),
        "train-cifar10": Case("", 20, 36, 32, 128),
    },
}
TIMED = {
    "smoke": {"search-smoke": (Case("prdarts", 3, 4, 8, 4, FEW), 2)},
    "full": {"search-digits": (Case("prdarts", 5, 8, 8, 32), 10)},
}


class Total(NamedTuple):
    """Exchanges of devices in one execution of a program, and their bytes: least, mean and most over its branches."""

    count: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __add__(self, other: Any) -> Total:
        pairs = zip(self, other, strict=True)
        return Total(*(tuple(a + b for a, b in zip(one, two, strict=True)) for one, two in pairs))  # type: ignore

    def times(self, n: float) -> Total:
        return Total(*(tuple(n * a for a in one) for one in self))  # type: ignore


def synchronisations(jaxpr: Any) -> Total:
    """The exchanges of devices in a traced program. A loop of unknown length counts once.

    Those that do not wait for one another count as one, as XLA combines them: the count is that of synchronisations.
    """
    total, waiting = Total(), None  # waiting: what depends on the exchange that later ones could still join
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, {v for v in eqn.invars if not hasattr(v, "val")}
        if name in _EXCHANGES:
            size = float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.invars))
            if waiting is None or inputs & waiting:
                total, waiting = total + Total((1.0,) * 3), set()
            total += Total(size=(size,) * 3)
            waiting |= set(eqn.outvars)
            continue
        platforms = eqn.params.get("branches_platforms")
        if name == "cond" and platforms is not None:  # a lowering per platform: that of accelerators
            inner = synchronisations(eqn.params["branches"][platforms.index(None)].jaxpr)
        elif name == "cond":
            found = [synchronisations(branch.jaxpr) for branch in eqn.params["branches"]]
            inner = Total(*(_spread([getattr(one, part) for one in found]) for part in ("count", "size")))
        else:
            inner = sum((synchronisations(sub) for sub in _inside(eqn.params.values())), Total())
            inner = inner.times(eqn.params["length"] * _real(eqn)) if name == "scan" else inner
        total += inner
        if inner.count[2]:
            waiting = None
        elif waiting is not None and inputs & waiting:
            waiting |= set(eqn.outvars)
    return total


def _real(scan: Any) -> float:
    """The share of the terms that a cell's scans run which are not there to fill up: `space.cell` says it."""
    said = re.search(r"(\d+)_of_(\d+)_terms\W*$", str(scan.source_info.name_stack))
    return int(said[1]) / int(said[2]) if said else 1.0


def _spread(found: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    return (
        min(one[0] for one in found),
        statistics.fmean(one[1] for one in found),
        max(one[2] for one in found),
    )


def _inside(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
        elif isinstance(value, tuple | list):
            yield from _inside(value)


class Made(NamedTuple):
    """A step with its arguments, as arrays or as shapes."""

    step: Callable[..., Any]
    in_specs: tuple[Any, ...]
    arguments: Callable[[int], tuple[Any, ...]]  # of a global batch
    params: int  # float32 numbers whose gradients are averaged


def make(case: Case, *, local: bool = False) -> Made:
    """The step of a search or of a training, per device."""
    return _search(case, local) if case.strategy else _train(case, local)


def _search(case: Case, local: bool) -> Made:
    space = Space.create(SpaceConfig(cells=case.cells, channels=case.channels, ops=case.ops), classes=10, in_channels=3)
    strategy = strategies.get(case.strategy, space=space)
    parts = {
        "space": space,
        "strategy": strategy,
        "weight_tx": optimizers.weight_transform(WeightsConfig()),
        "arch_tx": optimizers.arch_transform(ArchConfig()),
    }
    init = jax.jit(lambda key: init_state(key, **parts))
    shapes = jax.eval_shape(init, jax.random.key(0))
    progress = {k: np.float32(v) for k, v in strategy.schedule(100, 200).items()}
    step = make_search_step(**parts, axis_name=sharding.AXIS, local_batch_norm=local)

    def arguments(batch: int) -> tuple[Any, ...]:
        two = Batches(*(_batch(case, batch, i) for i in range(2)))
        return init(jax.random.key(0)), two, jax.random.key(1), progress

    params = sum(leaf.size for leaf in jax.tree.leaves((shapes.weights, shapes.arch)))
    return Made(step, (WHOLE, Batches(Batch(SPLIT, SPLIT), Batch(SPLIT, SPLIT)), WHOLE, WHOLE), arguments, params)


def _train(case: Case, local: bool) -> Made:
    config = TrainConfig(network=NetworkConfig(channels=case.channels, cells=case.cells))
    problem = train_inputs.make_problem(config, Genotype.named("PRDARTS"), 10, ((0.5,) * 3, (0.25,) * 3))
    problem = problem._replace(local_batch_norm=local, tx=optax.inject_hyperparams(optax.sgd)(learning_rate=0.025))
    mesh = sharding.make_mesh(jax.devices()[:1])
    image = (case.side, case.side, 3)
    shapes = train_program.abstract_carry(problem, mesh, jax.random.key(0), image).state
    step = train_program.make_step(problem, sharding.AXIS)
    progress = {"learning_rate": np.float32(0.025), "drop_path": np.float32(0.1)}

    def arguments(batch: int) -> tuple[Any, ...]:
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return state, _batch(case, batch, 0), jnp.arange(batch), jax.random.key(1), progress

    params = sum(leaf.size for leaf in jax.tree.leaves(shapes.variables.params))
    return Made(step, (WHOLE, Batch(SPLIT, SPLIT), SPLIT, WHOLE, WHOLE), arguments, params)


def _batch(case: Case, batch: int, seed: int) -> Batch:
    images = jax.random.normal(jax.random.key(seed), (batch, case.side, case.side, 3))
    return Batch(images, jnp.arange(batch) % 10)


def _mapped(made: Made, mesh: Mesh) -> Callable[..., Any]:
    # Not sharding.map_over: on one device it leaves the axis out, and here it is to be counted.
    return jax.shard_map(made.step, mesh=mesh, in_specs=made.in_specs, out_specs=(WHOLE, WHOLE), check_vma=False)


def counts(scale: str, only: str | None = None) -> Iterator[dict[str, Any]]:
    """One row a case and kind of batch normalisation."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    for name, case in COUNTED[scale].items():
        if only not in (None, name):
            continue
        for local in (False, True):
            made = make(case, local=local)
            traced = jax.make_jaxpr(_mapped(made, mesh))(*jax.eval_shape(lambda m=made, c=case: m.arguments(c.batch)))
            found = synchronisations(traced.jaxpr)
            yield {
                "kind": "counts",
                "case": name,
                "local_batch_norm": local,
                "parameters": made.params,
                **{f"synchronisations_{k}": v for k, v in zip(("min", "mean", "max"), found.count, strict=True)},
                **{f"bytes_{k}": v for k, v in zip(("min", "mean", "max"), found.size, strict=True)},
            }


def times(scale: str, only: str | None = None) -> Iterator[dict[str, Any]]:
    """One row a case, number of devices and way to split the batch."""
    visible = jax.devices()
    numbers = [2**i for i in range(len(visible).bit_length()) if 2**i <= len(visible)]
    for name, (case, repeats) in TIMED[scale].items():
        if only not in (None, name):
            continue
        alone = 0.0
        for n in numbers:
            for mode in ("strong", "weak") if n > 1 else ("strong",):
                batch = case.batch if mode == "strong" else case.batch * n
                if batch % n:
                    continue
                seconds = _seconds(case, sharding.make_mesh(visible[:n]), batch, repeats)
                median = statistics.median(seconds)
                alone = median if n == 1 else alone
                yield {
                    "kind": "time",
                    "case": name,
                    "devices": n,
                    "mode": mode,
                    "batch": batch,
                    "seconds": median,
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "efficiency": round(alone / median / (n if mode == "strong" else 1), 3),
                    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                }


def _seconds(case: Case, mesh: Mesh, batch: int, repeats: int) -> list[float]:
    made = make(case)
    step = jax.jit(_mapped(made, mesh), donate_argnums=0)
    state, *rest = made.arguments(batch)
    state = sharding.replicate(mesh, state)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, _metrics = step(state, *rest)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def rows(scale: str, only: str | None = None) -> Iterator[dict[str, Any]]:
    """All rows."""
    yield from counts(scale, only)
    yield from times(scale, only)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scaling")
    parser.add_argument("--scale", choices=("smoke", "full"), default="full")
    parser.add_argument("--only", choices=("counts", "times"), help="one kind of rows (default: both)")
    parser.add_argument("--case", help="one case (default: all)")
    parser.add_argument("--out", type=Path, help="a file, appended to (default: print only)")
    args = parser.parse_args()
    made = {"counts": counts, "times": times, None: rows}[args.only]
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for row in made(args.scale, args.case):
        line = json.dumps({"benchmark": "scaling", "scale": args.scale, **row, **facts})
        print(line, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
