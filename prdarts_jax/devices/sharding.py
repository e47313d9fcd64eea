"""Devices and meshes: the only module that knows them.

A program is written for one device with an optional `axis_name`; `map_over` maps it over a mesh axis with the semantics
of `jax.pmap` (`jax.shard_map` with check_vma=False; with the default the gradients of replicated weights would come out
multiplied by the number of devices).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prdarts_jax.errors import UserError
from prdarts_jax.ops.lowering import Lowering

AXIS = "data"
REPLICATED = PartitionSpec()


def visible() -> list[jax.Device]:
    """The devices that JAX sees, of all processes.

    Raises:
      UserError: none can be used: the platform that is asked for is not here, or its driver or plugin fails.

    >>> visible() == jax.devices()
    True
    """
    try:
        found = jax.devices()
        if found[0].platform != "cpu":  # a driver that is too old for this jaxlib fails at the first program
            jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(0)))
    except (RuntimeError, AssertionError) as error:  # the second one, without a word, for CUDA without a GPU
        asked = getattr(jax.config, "jax_platforms", None)
        said = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0][:300].rstrip(".")
        said = said or f"JAX sees no {asked} device"
        where = f"JAX_PLATFORMS: {asked!r}" if asked else "devices: JAX"
        raise UserError(
            f"{where} cannot be used here: {said}; allowed: a platform whose devices and driver are here "
            "(JAX_PLATFORMS=cpu always is)"
        ) from error
    return found


def choose_devices(spec: str) -> list[jax.Device]:
    """The devices of a run: all visible ones, or the first N of them; of several processes, as many of each.

    Raises:
      UserError: more than there are, or no multiple of the processes.

    >>> len(choose_devices("1"))
    1
    """
    here, processes = visible(), jax.process_count()
    if spec == "all":
        return here
    count = int(spec)
    if count > len(here):
        raise UserError(f"run.devices: {spec} is more than there are; allowed: 1..{len(here)} | all")
    if processes == 1:
        return here[:count]
    of_each = [[d for d in here if d.process_index == process] for process in range(processes)]
    if count % processes or count // processes > min(map(len, of_each)):
        have = "+".join(str(len(own)) for own in of_each)
        raise UserError(
            f"run.devices: {spec} is not possible with {processes} processes of {have} devices; "
            "allowed: as many of each | all"
        )
    return [device for own in of_each for device in own[: count // processes]]


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A one-dimensional mesh with the axis `data`."""
    return Mesh(np.array(devices), (AXIS,))


def axis_of(mesh: Mesh) -> str | None:
    """The axis name a per-device program reduces over: None on a single device, which needs no collective."""
    return AXIS if mesh.size > 1 else None


def lowering_of(mesh: Mesh) -> Lowering:
    """What a program of this mesh is lowered for: its own devices, which need not be those of this process.

    >>> lowering_of(make_mesh(jax.devices()[:1])).platform
    'cpu'
    """
    return Lowering(mesh.devices.flat[0].platform)


def map_over(mesh: Mesh, program: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The per-device `program` over the mesh; on a single device the program itself."""
    if mesh.size == 1:
        return program
    return jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays, the same on every process, on all devices of the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(tree, NamedSharding(mesh, REPLICATED))
    return place(mesh, jax.tree.map(np.asarray, tree), REPLICATED)


def place(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Host arrays for a mapped program: each process puts its own parts of them on its own devices.

    Args:
      mesh: of the program.
      tree: NumPy arrays, the same on every process.
      spec: how the program splits them.

    Returns:
      the tree itself on a single process, where the call of the program places it.
    """
    if jax.process_count() == 1:
        return tree
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def split_batch(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays [B/P,...], this process's part of a global batch, as global arrays [B,...] over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda part: jax.make_array_from_process_local_data(sharding, part), tree)


def describe(mesh: Mesh) -> list[str]:
    """The devices in words, for config.json and reports.

    >>> describe(make_mesh(jax.devices()[:1]))
    ['cpu:0 (cpu)']
    """
    if jax.process_count() == 1:
        return [f"{d.platform}:{d.id} ({d.device_kind})" for d in mesh.devices.flat]
    seen: dict[int, int] = {}  # ids are those of the whole job: devices are numbered within their process instead
    lines = []
    for d in mesh.devices.flat:
        number = seen[d.process_index] = seen.get(d.process_index, -1) + 1
        lines.append(f"process {d.process_index}, {d.platform}:{number} ({d.device_kind})")
    return lines


def mean_over(axis_name: str | None, tree: Any) -> Any:
    """The mean of a tree over a mapped axis; None on one device, where there is nothing to do."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def on_mesh(mesh: Mesh, shapes: Any) -> Any:
    """Abstract arrays with the sharding of a replicated tree: what a checkpoint is restored into."""
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
