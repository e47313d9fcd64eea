"""The probe of a search: losses, gradients and Hessian products on validation images, for `Strategy.at_epoch`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax.bilevel import SearchState
from prdarts_jax.data.augment import normalize
from prdarts_jax.data.batches import Images, padded_batches
from prdarts_jax.devices import sharding
from prdarts_jax.gates import Gates
from prdarts_jax.ops.losses import cross_entropy
from prdarts_jax.ops.precision import at_precision
from prdarts_jax.space import supernet
from prdarts_jax.strategy import Arch, Numbers


class NetworkProbe:
    """See `strategy.Probe`. Of several devices each computes its part of a batch, with batch statistics of the whole.

    Args:
      programs: of the search; they keep what the probe compiles.
      state: of the search.
      numbers: of the epoch.
      indices: of the validation images.
      images: all images, on the devices.
      batch_size: global.
    """

    def __init__(
        self, programs: Any, state: SearchState, numbers: Numbers, indices: np.ndarray, images: Images, batch_size: int
    ) -> None:
        self._programs, self._mesh, self._numbers, self._images = programs, programs.mesh, numbers, images
        self._indices, self._size, self._given = indices, batch_size, state

    @functools.cached_property
    def _state(self) -> SearchState:
        """The state on the devices of the programs; a member of a population computes on one of its own."""
        there = jax.tree.leaves(self._given.weights)[0].sharding.device_set == set(self._mesh.devices.flat)
        return self._given if there else sharding.replicate(self._mesh, self._given)

    def loss(self, arch: Arch, *, batches: int | None = 1) -> float:
        """Cross-entropy at the gates of role "eval"."""
        return float(self._whole("loss", (arch,), batches))

    def grad(self, arch: Arch, *, batches: int | None = 1) -> Arch:
        """The gradient of `loss` in the architecture."""
        return jax.device_get(self._whole("grad", (arch,), batches))

    def hvp(self, arch: Arch, vector: Arch, *, radius: float | None = None, batches: int | None = 1) -> Arch:
        """The Hessian of `loss` times a vector; exact, or as a central difference of `grad` at +- radius."""
        if radius is None:
            return jax.device_get(self._whole("hvp", (arch, vector), batches))
        step = radius / max(float(optax.global_norm(vector)), float(np.finfo(np.float32).tiny))
        up, down = (
            self.grad(jax.tree.map(lambda a, v, s=s: a + np.float32(s * step) * v, arch, vector), batches=batches)
            for s in (1, -1)
        )
        return jax.tree.map(lambda u, d: (u - d) / np.float32(2 * step), up, down)

    def gates_loss(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        """Cross-entropy at given gates."""
        return float(self._counted(gates, batches, first)[0])

    def gates_accuracy(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        """Share of images classified correctly at given gates."""
        return float(self._counted(gates, batches, first)[1])

    # Inside.

    def _place(self, orders: Any) -> Any:
        return sharding.place(self._mesh, orders, PartitionSpec(None, sharding.AXIS))

    def _whole(self, what: str, point: tuple[Any, ...], batches: int | None) -> Any:
        """A mean over full batches: a derivative has no images that do not count."""
        full = len(self._indices) // self._size
        number = full if batches is None else min(batches, full)
        order = self._indices[: number * self._size].reshape(number, self._size)
        program = self._programs.probe(what)
        point = sharding.replicate(self._mesh, point)
        return program(self._state, point, self._place(order), self._numbers, self._images)

    def _counted(self, gates: Gates, batches: int | None, first: int) -> Any:
        order, mask = (np.roll(rows, -first, axis=0) for rows in padded_batches(len(self._indices), self._size))
        chosen = self._place((self._indices[order][:batches], mask[:batches]))
        gates = sharding.replicate(self._mesh, dataclasses.replace(gates, stats={}))
        return self._programs.at_gates(self._state, gates, *chosen, self._images)


def probe_program(problem: Any, mesh: Mesh, what: str) -> Callable[..., Any]:
    """The jitted program (state, point, indices [S,B], numbers, images) -> mean over S batches.

    Args:
      problem: of the search.
      mesh: of the program.
      what: "loss" or "grad" of the point (arch,), "hvp" of (arch, vector).
    """
    axis = sharding.axis_of(mesh)
    norm_axis = None if problem.local_batch_norm else axis
    # Second derivatives are those of plain JAX operations: the rules of the fast path have none.
    lowered = functools.partial(supernet.apply, lowering=problem.lowering(mesh))
    apply = supernet.apply_reference if what == "hvp" else lowered

    def program(state: SearchState, point: Any, indices: jax.Array, numbers: Numbers, data: Images) -> Any:
        def loss(arch: Arch, index: jax.Array) -> jax.Array:
            gates = problem.strategy.sample(jax.random.key(0), arch, state.memory, numbers, "eval")
            images = normalize(data.images[index], problem.mean, problem.std, problem.dtype)
            logits, _ = apply(state.weights, gates, images, space=problem.space, axis_name=norm_axis)
            return cross_entropy(logits, data.labels[index])

        def value(index: jax.Array) -> Any:
            if what == "loss":
                return loss(point[0], index)
            gradient = jax.grad(lambda arch: loss(arch, index))
            return gradient(point[0]) if what == "grad" else jax.jvp(gradient, (point[0],), (point[1],))[1]

        def add(total: Any, index: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value(index)), None

        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(value, indices[0]))
        total, _ = lax.scan(add, zero, indices)
        return sharding.mean_over(axis, jax.tree.map(lambda leaf: leaf / indices.shape[0], total))

    everywhere, batch = sharding.REPLICATED, PartitionSpec(None, sharding.AXIS)
    specs = (everywhere, everywhere, batch, everywhere, everywhere)
    return jax.jit(sharding.map_over(mesh, at_precision(problem.precision, program), specs, everywhere))
