"""Several searches at once, one a device: their dispatch mapped over a mesh axis `search`.

No number passes between the devices: each computes its own search, at its own step, with its own key and numbers, and
one without work does nothing. Searches are never batched: under `vmap` a switch runs all its branches, and the sparse
path of the search network is a switch.

An array [d, ...] of one search is the part of its device in an array [n d, ...] that is split over the axis, so that
passing from one to the other copies nothing. Scalars, which have no axis to be split, pass through the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prdarts_jax.data.batches import Images
from prdarts_jax.data.sources import Dataset
from prdarts_jax.run.digests import is_key
from prdarts_jax.run.loop import Done, Work
from prdarts_jax.searching.program import SearchCarry, SearchProblem, dispatch_program

AXIS = "search"


class SideBySide:
    """Computes one dispatch of up to n searches on n devices, with one compiled program.

    Args:
      problem: what the searches share.
      devices: one a search.
      dataset: its training images are put on every device.
    """

    def __init__(self, problem: SearchProblem, devices: Sequence[jax.Device], dataset: Dataset) -> None:
        self.devices = tuple(devices)
        self._problem, self._mesh = problem, Mesh(np.array(self.devices), (AXIS,))
        self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))
        images = Images(dataset.train_images, dataset.train_labels)
        self._images = jax.device_put(images, NamedSharding(self._mesh, PartitionSpec()))
        self._resting: list[Any] = [None] * len(self.devices)  # the carry on a device that has nothing to compute
        self.program: Any = None  # the jitted program, once a carry has been seen

    def __call__(self, works: Sequence[Work | None]) -> list[Done | None]:
        """The dispatches that the searches of the devices ask for; None where there is none.

        The carries are donated. Those that come back hold arrays on their device, and scalars on the host.
        """
        some = next(work for work in works if work is not None)
        kinds = jax.tree.map(_kind, some.carry)
        if self.program is None:
            self.program = _mapped(self._problem, self._mesh, kinds)
        full = [some if work is None else work for work in works]
        carries = [self._rest(i, some.carry) if work is None else work.carry for i, work in enumerate(works)]
        numbers = {name: np.array([work.numbers[name] for work in full], np.float32) for name in some.numbers}
        joined, rows = self.program(
            jax.tree.map(self._join, kinds, *carries),
            np.array([0 if work is None else work.steps for work in works], np.int32),
            np.array([work is not None and bool(work.fresh) for work in works]),
            jax.tree.map(lambda *orders: np.stack(orders), *(work.batches for work in full)),
            some.loop.positions,
            np.stack([np.asarray(jax.random.key_data(work.loop.key)) for work in full]),
            numbers,
            self._images,
        )
        host = {name: np.asarray(value) for name, value in rows.items()}
        columns = jax.tree.map(self._cut, kinds, joined)
        parts = [jax.tree.map(lambda _, column, i=i: column.parts[i], kinds, columns) for i in range(len(self.devices))]
        self._resting = [part if work is None else None for work, part in zip(works, parts, strict=True)]
        return [
            None if work is None else (parts[i], {name: value[i] for name, value in host.items()})
            for i, work in enumerate(works)
        ]

    def _rest(self, i: int, like: SearchCarry) -> SearchCarry:
        """A carry for a device without a search: the one that lies there, or a copy of another."""
        if self._resting[i] is not None:
            return self._resting[i]

        def copy(leaf: Any) -> Any:
            host = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            placed = jax.device_put(host, self.devices[i])
            return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf)) if is_key(leaf) else placed

        return jax.tree.map(copy, like)

    def _join(self, kind: _Kind, *leaves: Any) -> jax.Array:
        if kind.scalar:
            return jax.device_put(np.stack([np.asarray(leaf) for leaf in leaves]), self._split)
        arrays = [jax.random.key_data(leaf) for leaf in leaves] if kind.key else list(leaves)
        rows, *rest = arrays[0].shape
        return jax.make_array_from_single_device_arrays((len(arrays) * rows, *rest), self._split, arrays)

    def _cut(self, kind: _Kind, joined: jax.Array) -> _Column:
        if kind.scalar:
            return _Column(list(np.asarray(joined)))
        shards = {shard.device: shard.data for shard in joined.addressable_shards}
        parts = [shards[device] for device in self.devices]
        return _Column([jax.random.wrap_key_data(part, impl=kind.key) for part in parts] if kind.key else parts)


class _Kind:
    """What a leaf of a carry is: a scalar, a random key, or an array. A leaf of trees, and equal to its like."""

    def __init__(self, scalar: bool, key: Any) -> None:
        self.scalar, self.key = scalar, key


class _Column:
    """One leaf of all searches."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts


def _kind(leaf: Any) -> _Kind:
    return _Kind(False, jax.random.key_impl(leaf)) if is_key(leaf) else _Kind(np.ndim(leaf) == 0, None)


def _mapped(problem: SearchProblem, mesh: Mesh, kinds: Any) -> Any:
    """The jitted program over the axis: every argument but the positions and the images is split over it."""
    program = dispatch_program(problem, None, problem.lowering(mesh))

    def own(kind: _Kind, leaf: jax.Array) -> jax.Array:
        if kind.scalar:
            return leaf[0]
        return jax.random.wrap_key_data(leaf, impl=kind.key) if kind.key else leaf

    def shared(kind: _Kind, leaf: jax.Array) -> jax.Array:
        if kind.scalar:
            return leaf[None]
        return jax.random.key_data(leaf) if kind.key else leaf

    def local(
        joined: Any, count: Any, fresh: Any, orders: Any, positions: Any, key: Any, numbers: Any, images: Any
    ) -> Any:
        count, fresh, orders, key, numbers = jax.tree.map(lambda leaf: leaf[0], (count, fresh, orders, key, numbers))
        carry = jax.tree.map(own, kinds, joined)
        key = jax.random.wrap_key_data(key)
        carry, rows = program(carry, count, fresh, orders, positions, key, numbers, images)
        return jax.tree.map(shared, kinds, carry), {name: value[None] for name, value in rows.items()}

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    in_specs = (split, split, split, split, whole, split, split, whole)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(split, split), check_vma=False)
    return jax.jit(mapped, donate_argnums=0)
