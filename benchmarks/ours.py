"""Our side of each comparison: a factory gives a function of n that runs n steps and waits for the last."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.cases import DepthwiseCase, SearchCase, TrainCase
from prdarts_jax import optimizers, strategies
from prdarts_jax.bilevel import Batches
from prdarts_jax.config.search import ArchConfig, SpaceConfig, WeightsConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.devices import sharding
from prdarts_jax.searching.step import init_state, make_search_step
from prdarts_jax.space import Space, supernet

Steps = Callable[[int], None]
Clock = dict[str, float]  # seconds of each stage before the first step
POOL = 4  # batches that take turns


def _batch(seed: int, batch: int, side: int, dtype: Any = jnp.float32) -> Batch:
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(batch, side, side, 3)), dtype)
    return Batch(images, jnp.asarray(rng.integers(0, 10, batch), jnp.int32))


def lowering_of(mesh: Mesh, cell: str = "auto") -> Any:
    """What a program of a mesh is lowered for, its mixed cells as they are by themselves or as another lowering."""
    found = sharding.lowering_of(mesh)
    return found if cell == "auto" else found._replace(cell=cell)


def search_parts(case: SearchCase) -> dict[str, Any]:
    """Space, strategy and transformations of a case."""
    config = SpaceConfig(
        cells=case.cells, channels=case.channels, ops=case.ops, head_norm=case.head_norm, partial=case.partial
    )
    space = Space.create(config, classes=10, in_channels=3)
    method, options = case.method, {}
    if method == "prdarts":
        options = {"executed_ops": case.executed, "op_subsample": case.subsample}
    elif method == "darts2":
        method, options = "darts", {"order": 2}
    elif method == "snas":
        options = {"image": case.side}
    return {
        "space": space,
        "strategy": strategies.get(method, space=space, **options),
        "weight_tx": optimizers.weight_transform(WeightsConfig()),
        "arch_tx": optimizers.arch_transform(ArchConfig()),
    }


def numbers_of(case: SearchCase, strategy: Any) -> dict[str, np.float32]:
    """The numbers of a late epoch, in which both groups move, at the temperature of the case."""
    numbers = strategy.schedule(9, 10)
    return {name: np.float32(case.tau if name == "tau" else value) for name, value in numbers.items()}


def compiled(program: Any, *args: Any) -> tuple[Any, Clock]:
    """The executable of a jitted program, and what tracing and compiling (or loading) took."""
    began = time.perf_counter()
    lowered = program.lower(*args)
    traced = time.perf_counter()
    executable = lowered.compile()
    return executable, {"trace_s": traced - began, "compile_s": time.perf_counter() - traced}


def search(dtype: str = "float32", **fields: Any) -> tuple[Steps, Clock]:
    """The bilevel step of a `SearchCase`; gates are drawn afresh in each step."""
    case = SearchCase(**fields)
    parts = search_parts(case)
    mesh = sharding.make_mesh(jax.devices()[: case.devices])
    began = time.perf_counter()
    initial = jax.jit(lambda key: init_state(key, **parts))
    states = [initial(key) for key in jax.random.split(jax.random.key(0), case.members)]
    if case.closed:
        # So far below zero that sigmoid((noise + beta) / tau) is 0: the strategy itself then makes the gates exactly 0.
        shut = np.arange(parts["space"].num_edges) < round(case.closed * parts["space"].num_edges)
        states = [
            state.replace(arch={k: jnp.where(shut[:, None], -1e4 * case.tau, v) for k, v in state.arch.items()})
            for state in states
        ]
    states = jax.block_until_ready(sharding.replicate(mesh, states))
    clock = {"init_s": time.perf_counter() - began}
    pool = [_batch(i, case.batch, case.side, dtype) for i in range(POOL)]
    numbers = numbers_of(case, parts["strategy"])
    apply = partial(supernet.apply, lowering=lowering_of(mesh, case.lowering))
    step = make_search_step(**parts, axis_name=sharding.axis_of(mesh), apply=apply)

    def one(state: Any, pool: Batch, i: jax.Array) -> tuple[Any, Any]:
        train, val = (jax.tree.map(lambda a, at=at: a[at % POOL], pool) for at in (i, i + 1))
        return step(state, Batches(train, val), jax.random.key(i), numbers)

    run, stages = _dispatched(one, states, pool, mesh)
    return run, clock | stages


def _dispatched(
    step: Callable[[Any, Batch, jax.Array], tuple[Any, Any]], states: list[Any], pool: list[Batch], mesh: Mesh
) -> tuple[Steps, Clock]:
    """Steps as the library runs them, several a dispatch in one loop. step: (state, batches, number) -> state.

    The states take turns at the one compiled program.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pool)

    def dispatch(state: Any, pool: Batch, first: jax.Array, count: jax.Array) -> Any:
        return lax.fori_loop(0, count, lambda i, state: step(state, pool, first + i)[0], state)

    whole, split = PartitionSpec(), PartitionSpec(None, sharding.AXIS)
    mapped = sharding.map_over(mesh, dispatch, (whole, split, whole, whole), whole)
    stacked = jax.device_put(stacked, NamedSharding(mesh, split)) if mesh.size > 1 else stacked
    numbers = sharding.replicate(mesh, [jnp.int32(0), jnp.int32(0)])
    executable, stages = compiled(jax.jit(mapped, donate_argnums=0), states[0], stacked, *numbers)
    states, done = list(states), 0

    def run(count: int) -> None:
        nonlocal done
        for i, state in enumerate(states):
            numbers = sharding.replicate(mesh, [jnp.int32(done), jnp.int32(count)])
            states[i] = executable(state, stacked, *numbers)
        done += count
        jax.block_until_ready(states)

    return run, stages


def train(dtype: str = "float32", **fields: Any) -> tuple[Steps, Clock]:
    """The SGD step of a `TrainCase`; drop-path is drawn afresh in each step."""
    from prdarts_jax.config.train import NetworkConfig, TrainConfig
    from prdarts_jax.space.genotype import Genotype
    from prdarts_jax.training import inputs as train_inputs
    from prdarts_jax.training import program as train_program

    case = TrainCase(**fields)
    network = NetworkConfig(channels=case.channels, cells=case.cells)
    config = TrainConfig(network=network, batch_size=case.batch, dtype=dtype)
    unit = ((0.0,) * 3, (1.0,) * 3)
    problem = train_inputs.make_problem(config, Genotype.named(case.genotype), 10, unit)
    pool = [_batch(i, case.batch, case.side, dtype) for i in range(POOL)]

    def initial(key: jax.Array) -> train_program.TrainState:
        made = problem.network.init(key, jnp.zeros((2, case.side, case.side, 3), dtype))
        variables = train_program.Variables(made["params"], made["batch_stats"])
        return train_program.TrainState(jnp.zeros((), jnp.int32), variables, problem.tx.init(variables.params), None)

    began = time.perf_counter()
    state = jax.block_until_ready(jax.jit(initial)(jax.random.key(0)))
    clock = {"init_s": time.perf_counter() - began}
    positions = jnp.arange(case.batch)
    progress = {"learning_rate": np.float32(0.025), "drop_path": np.float32(case.drop_path)}
    mesh = sharding.make_mesh(jax.devices()[:1])
    step = train_program.make_step(problem, lowering=lowering_of(mesh))

    def one(state: Any, pool: Batch, i: jax.Array) -> tuple[Any, Any]:
        batch = jax.tree.map(lambda a: a[i % POOL], pool)
        return step(state, batch, positions, jax.random.key(i), progress)

    run, stages = _dispatched(one, [state], pool, mesh)
    return run, clock | stages


def cell(kind: str = "normal", dtype: str = "float32", **fields: Any) -> tuple[Steps, Clock]:
    """Forward and all gradients of one mixed cell of a `SearchCase`, K operations an edge, others in each step.

    Steps run in one program, each on the results of the one before, which move its inputs and weights a little.
    """
    from prdarts_jax.ops.layers import draw
    from prdarts_jax.space.cell import declare_edges, mixed_nodes

    case = SearchCase(**fields)
    space, rng = search_parts(case)["space"], np.random.default_rng(0)
    lowering = lowering_of(sharding.make_mesh(jax.devices()[:1]), case.lowering)
    side = case.side if kind == "normal" else -(-case.side // 2)
    inputs = [jnp.asarray(rng.normal(size=(case.batch, case.side, case.side, case.channels)), dtype) for _ in range(2)]
    ct = jnp.asarray(rng.normal(size=(space.nodes, case.batch, side, side, case.channels)), dtype)
    orders = [[rng.permutation(space.num_ops)[: case.executed] for _ in space.edges] for _ in range(POOL)]
    executed = jnp.asarray(orders, jnp.int32)
    values = jnp.asarray(rng.uniform(size=executed.shape[1:]), jnp.float32)
    weights = jax.jit(lambda key: draw(key, declare_edges(space, kind, case.channels)))(jax.random.key(0))

    def chain(state: Any, executed: jax.Array, ct: jax.Array, count: jax.Array) -> Any:
        def one(i: jax.Array, state: Any) -> Any:
            def nodes(weights: Any, values: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
                terms = executed[i % POOL]
                return mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind, lowering=lowering)

            y, pull = jax.vjp(nodes, *state)
            return jax.tree.map(
                lambda a, d: a + (1e-4 * d).astype(a.dtype), state, pull(ct + (1e-4 * y).astype(ct.dtype))
            )

        return lax.fori_loop(0, count, one, state)

    state = (weights, values, *inputs)
    many, stages = compiled(jax.jit(chain), state, executed, ct, jnp.int32(1))
    return lambda count: jax.block_until_ready(many(state, executed, ct, jnp.int32(count))), stages


def depthwise(layer: str = "ours", dtype: str = "float32", loop: bool = False, **fields: Any) -> tuple[Steps, Clock]:
    """Forward and both gradients of our depthwise convolution, or ("flax") of flax.linen's nn.Conv.

    `loop`: steps run in one program, each on the results of the one before; a GPU takes less for one of them than to
    be told of it. Else a program a step: in a loop XLA:CPU has a slow form of flax's convolution.
    """
    from prdarts_jax.ops.depthwise import depthwise_conv

    case = DepthwiseCase(**fields)
    rng = np.random.default_rng(0)
    out = -(-case.side // case.stride)
    x, ct = (jnp.asarray(rng.normal(size=(case.batch, n, n, case.channels)), dtype) for n in (case.side, out))
    kernel = jnp.asarray(rng.normal(size=(case.kernel, case.kernel, case.channels)), jnp.float32)

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return depthwise_conv(x, kernel, stride=case.stride, dilation=case.dilation)

    def flax(x: jax.Array, kernel: jax.Array) -> jax.Array:
        import flax.linen as nn

        conv = nn.Conv(
            case.channels,
            (case.kernel, case.kernel),
            case.stride,
            padding=case.dilation * (case.kernel - 1) // 2,
            kernel_dilation=case.dilation,
            feature_group_count=case.channels,
            use_bias=False,
        )
        return conv.apply({"params": {"kernel": kernel[:, :, None, :]}}, x)

    forward = {"ours": ours, "flax": flax}[layer]

    def both(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> Any:
        y, pull = jax.vjp(forward, x, kernel)
        return y, pull(ct)

    if loop:
        if case.stride != 1:
            raise ValueError(f"stride: {case.stride} is not possible in a loop; allowed: 1")
        kernel /= jnp.abs(kernel).sum((0, 1))  # no frequency grows from step to step

        def chain(x: jax.Array, kernel: jax.Array, ct: jax.Array, count: jax.Array) -> Any:
            def one(_: jax.Array, carry: Any) -> Any:
                y, (dx, dk) = both(carry[0], kernel, carry[2])
                return y, dk, dx

            return lax.fori_loop(0, count, one, (x, kernel, ct))

        many, stages = compiled(jax.jit(chain), x, kernel, ct, jnp.int32(1))
        return lambda count: jax.block_until_ready(many(x, kernel, ct, jnp.int32(count))), stages

    step, stages = compiled(jax.jit(both), x, kernel, ct)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(step(x, kernel, ct))

    return run, stages
