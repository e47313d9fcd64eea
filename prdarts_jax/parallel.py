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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prdarts_jax.errors import UserError

AXIS = "data"
REPLICATED = PartitionSpec()


def choose_devices(spec: str) -> list[jax.Device]:
    """The devices of a run: all visible ones, or the first N of them.

    Raises:
      UserError: more than there are.

    >>> len(choose_devices("1"))
    1
    """
    visible = jax.devices()
    if spec == "all":
        return visible
    if int(spec) > len(visible):
        raise UserError(f"run.devices: {spec} is more than there are; allowed: 1..{len(visible)} | all")
    return visible[: int(spec)]


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A one-dimensional mesh with the axis `data`."""
    return Mesh(np.array(devices), (AXIS,))


def axis_of(mesh: Mesh) -> str | None:
    """The axis name a per-device program reduces over: None on a single device, which needs no collective."""
    return AXIS if mesh.size > 1 else None


def map_over(mesh: Mesh, program: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The per-device `program` over the mesh; on a single device the program itself."""
    if mesh.size == 1:
        return program
    return jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays on all devices of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def describe(mesh: Mesh) -> list[str]:
    """The devices in words, for config.json and reports.

    >>> describe(make_mesh(jax.devices()[:1]))
    ['cpu:0 (cpu)']
    """
    return [f"{d.platform}:{d.id} ({d.device_kind})" for d in mesh.devices.flat]
