"""The mixed cell in waves: all edges that leave complete nodes at once, without a conditional and without a loop.

    wave 1: the edges from both inputs; wave m: those from node m, which is complete by then

What edges from one source have in common is computed once: the identity, and both pools with their normalisation. The
executed convolutions of all edges of a wave are computed side by side (`ops/side_by_side.py`), each in a slot of its
own: K of them an edge, whose kernels are gathered from the stacks, or, where that is not more, one for each convolution
that there is, and nothing is gathered. A slot computes the unit that its operation does not have as well, and what
executes nothing computes zeros; the gates take these out. Statistics of a unit of all slots are one collective a wave.

For devices on which starting an operation takes longer than computing it. Plain automatic differentiation, but for the
rules of the layers; reverse mode only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.layer_set import fast_layers
from prdarts_jax.ops.layers import Reduction
from prdarts_jax.ops.pools import Pool, avg_pool_by, max_pool
from prdarts_jax.ops.primitives import Params
from prdarts_jax.ops.separable import Unit
from prdarts_jax.ops.side_by_side import (
    Slots,
    Statistics,
    embedded,
    from_slots,
    from_sources,
    reduced,
    statistics,
)
from prdarts_jax.space.noise import CellNoise
from prdarts_jax.space.partial import head, passed, scaled, shuffled, tail
from prdarts_jax.space.spec import EdgeGroup, Space
from prdarts_jax.space.terms import CellProgram, CellWeights, apply_op, output_shape, runs, units_of


class Wave(NamedTuple):
    """The edges from complete nodes, those of a source one after the other."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    edges: tuple[int, ...]  # of source i to target t: edges[i T + t]
    group: EdgeGroup


def waves_of(space: Space, kind: str) -> list[Wave]:
    """The waves of a cell, in order.

    >>> [(wave.sources, wave.targets) for wave in waves_of(Space(nodes=3), "normal")]
    [((0, 1), (2, 3, 4)), ((2,), (3, 4)), ((3,), (4,))]
    """
    waves = []
    for sources in ((0, 1), *((n,) for n in range(2, 1 + space.nodes))):
        targets = tuple(range(sources[-1] + 1, 2 + space.nodes))
        edges = tuple(space.edges.index((j, n)) for j in sources for n in targets)
        group = next(group for group in space.edge_groups(kind) if edges[0] in group.edges)
        waves.append(Wave(sources, targets, edges, group))
    return waves


# --- the weights of a group of edges, in the order of the waves -------------------------------------------------------

_Found = list[Unit] | Pool | Reduction | None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _taken(a: jax.Array, rows: tuple[int, ...], places: tuple[int, ...]) -> jax.Array:
    """a[rows]; row r is taken for the edge at places[r]. What stands for an edge without a row is multiplied by 0."""
    return a if rows == places == tuple(range(len(rows))) else a[np.asarray(rows)]


# A row belongs to one edge: its gradient is gathered too, where autodiff would scatter.
_taken.defvjp(
    lambda a, rows, places: (_taken(a, rows, places), None),
    lambda rows, places, _, ct: (ct[np.asarray(places)],),
)


def _operations(
    program: CellProgram, group: EdgeGroup, stacks: dict[str, Params], order: tuple[int, ...]
) -> dict[str, _Found]:
    """What the operations of a group are made of; weights [edges, ...], an edge after the other in this order."""
    found: dict[str, _Found] = {}
    for op, members in program.space.rows(program.kind, group).items():
        if not runs(program, group)[op]:
            continue
        rows = tuple(members.index(e) if e in members else 0 for e in order)
        places = tuple(order.index(e) for e in members)

        take = partial(_taken, rows=rows, places=places)
        parts = units_of(program, group, op, stacks)
        if isinstance(parts, Reduction):
            parts = Reduction(*map(take, parts))
        elif isinstance(parts, list):
            square = all(u.depthwise.shape[1] == u.depthwise.shape[2] and u.depthwise.shape[1] % 2 for u in parts)
            units = [u._replace(depthwise=take(u.depthwise), matrix=take(u.matrix)) for u in parts]
            parts = units if square else None
        found[op] = parts
    return found


def _cut(parts: _Found, edges: slice) -> _Found:
    """Of the edges of a wave."""
    if isinstance(parts, Reduction):
        return Reduction(*(a[edges] for a in parts))
    if isinstance(parts, list):
        return [u._replace(depthwise=u.depthwise[edges], matrix=u.matrix[edges]) for u in parts]
    return parts


# --- what the gates of a wave say -------------------------------------------------------------------------------------


class _Gates(NamedTuple):
    """The terms of the edges of a wave."""

    hits: Mapping[str, jax.Array]  # operation -> bool[e,K]: which terms execute it
    values: jax.Array  # [e,K]
    images: jax.Array  # [e,1], or [e,B] under drop-path: what the output of an edge is multiplied by

    def of_terms(self, op: str) -> jax.Array:
        """[e,K]: the gates of an operation, 0 elsewhere."""
        return jnp.where(self.hits[op], self.values, jnp.zeros((), self.values.dtype))

    def of_edges(self, op: str) -> jax.Array:
        """[e]: an edge executes an operation once at most."""
        return jnp.sum(self.of_terms(op), axis=1)


def _gates(
    space: Space, kind: str, wave: Wave, values: jax.Array, executed: jax.Array, noise: CellNoise | None
) -> _Gates:
    """`values` [e,K] are of the edges of the wave."""
    edges = np.asarray(wave.edges)
    chosen, allowed = executed[edges], space.allowed[kind][edges]
    hits = {op: (chosen == o) & jnp.asarray(allowed[:, o, None]) for o, op in enumerate(space.ops)}
    dropped = noise is not None and noise.edges is not None
    images = noise.edges[edges] if dropped else jnp.ones((len(edges), 1))  # type: ignore[union-attr,index]
    return _Gates(hits, values, images.astype(values.dtype))


# --- convolutions -----------------------------------------------------------------------------------------------------


class _Lanes(NamedTuple):
    """L slots an edge, the same operations on each: terms whose kernels are gathered, or an operation a lane."""

    units: Mapping[str, list[Unit]]  # of the operations, those with the most units first
    gates: _Gates
    gathered: bool

    def count(self, depth: int) -> int:
        """L, of those that have a unit at this depth."""
        having = self._having(depth)
        return self.gates.values.shape[1] if self.gathered and having else len(having)

    def _having(self, depth: int) -> list[str]:
        return [op for op, units in self.units.items() if len(units) > depth]

    def _placed(self, op: str, depth: int, a: jax.Array) -> jax.Array:
        """[e,L,...]: weights [e,...] of an operation in the lanes that execute it, 0 in the others."""
        if self.gathered:
            hits = self.gates.hits[op]
            return jnp.where(hits.reshape(*hits.shape, *(1,) * (a.ndim - 1)), a[:, None], jnp.zeros((), a.dtype))
        return self._lane(op, depth, a)

    def _lane(self, op: str, depth: int, a: jax.Array) -> jax.Array:
        lane, count = self._having(depth).index(op), self.count(depth)
        return jnp.pad(a[:, None], [(0, 0), (lane, count - 1 - lane), *[(0, 0)] * (a.ndim - 1)])

    def slots(self, depth: int, order: Callable[[jax.Array], jax.Array]) -> Slots:
        """The units at a depth; `order` makes slots of [e,L,...]."""
        having = {op: self.units[op][depth] for op in self._having(depth)}
        sizes: dict[int, int] = {}
        for unit in having.values():
            sizes[unit.dilation] = max(sizes.get(unit.dilation, 0), unit.depthwise.shape[1])
        kernels = {
            dilation: _sum(
                self._placed(op, depth, embedded(unit.depthwise, size))
                for op, unit in having.items()
                if unit.dilation == dilation
            )
            for dilation, size in sizes.items()
        }
        matrices = _sum(self._placed(op, depth, unit.matrix) for op, unit in having.items())
        return Slots({dilation: order(kernel) for dilation, kernel in kernels.items()}, order(matrices))

    def coefficients(self, depth: int) -> jax.Array:
        """[e,L]: the gates of the operations whose last unit this is."""
        last = [op for op, units in self.units.items() if len(units) == depth + 1]
        if self.gathered:
            return _sum(self.gates.of_terms(op) for op in last)
        return _sum(self._lane(op, depth, self.gates.of_edges(op)) for op in last)

    def ends(self, depth: int) -> bool:
        """Whether a unit at this depth is the last one of an operation."""
        return any(len(units) == depth + 1 for units in self.units.values())


def _sum(terms: Any) -> Any:
    first, *others = terms
    return sum(others, first)


def _lanes(convolutions: Mapping[str, list[Unit]], gates: _Gates) -> list[_Lanes]:
    """Terms, or operations where these are not more: those whose first units have one dilation together."""
    ordered = dict(sorted(convolutions.items(), key=lambda item: -len(item[1])))
    if not ordered:
        return []
    if gates.values.shape[1] < len(ordered):
        return [_Lanes(ordered, gates, gathered=True)]
    dilations = dict.fromkeys(units[0].dilation for units in ordered.values())
    alike = ({op: units for op, units in ordered.items() if units[0].dilation == d} for d in dilations)
    return [_Lanes(units, gates, gathered=False) for units in alike]


# --- a wave -----------------------------------------------------------------------------------------------------------


def _window_sum(x: jax.Array, ones: jax.Array, *, stride: int) -> jax.Array:
    window, pads = (1, *ones.shape[:2], 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, window, (1, stride, stride, 1), pads)


def _pooled(pool: Pool, x: jax.Array) -> jax.Array:
    return max_pool(x, pool.stride) if pool.kind == "maximum" else avg_pool_by(x, pool.stride, _window_sum)


class _Part(NamedTuple):
    """What the targets of a wave receive a share of."""

    z: jax.Array  # [B,h,w,G L C], of every source and lane; or [B,h,w,G L T C], of every target too
    coefficients: jax.Array | None  # [e,L]; None: they receive nothing of it
    each: int  # 1, or T
    normalised: bool
    lanes: _Lanes | None = None  # whose units these are

    def received(
        self, wave: Wave, gates: _Gates, coefficients: jax.Array, found: Statistics | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The sum over sources and lanes, in the dtype of the gates: [B,h,w,T,C], and [1|B,1,1,T,C] to be added to it.

        What is to be added is 0, and stands for the mean in derivatives: its cotangent is the same for all parts.
        """
        g, t, lanes = len(wave.sources), len(wave.targets), coefficients.shape[1]
        factors = coefficients[:, :, None] * gates.images[:, None, :]  # [e,L,1|B]
        factors = jnp.transpose(factors.reshape(g, t, lanes, -1), (3, 0, 2, 1)).reshape(-1, 1, 1, g * lanes, t, 1)
        x = self.z.reshape(*self.z.shape[:3], g * lanes, self.each, -1).astype(factors.dtype)
        if found is None:
            return jnp.sum(x * factors, axis=3), None
        mean, scale = (a.reshape(-1, 1, 1, *x.shape[3:]) for a in found)
        centre, factors = lax.stop_gradient(mean), factors * scale
        return jnp.sum((x - centre) * factors, axis=3), jnp.sum((centre - mean) * factors, axis=3)


def _first_lanes(a: jax.Array, sources: int, lanes: int, count: int) -> jax.Array:
    """Of channels [..., G L T C] those of the first lanes of each source."""
    if lanes == count:
        return a
    by_lane = a.reshape(*a.shape[:-1], sources, lanes, -1)
    return by_lane[..., :count, :].reshape(*a.shape[:-1], -1)


def _alone(
    program: CellProgram, wave: Wave, op: str, gates: _Gates, weights: CellWeights, x: jax.Array, noise: Any
) -> list[list[jax.Array]]:
    """By target what an operation of which nothing is known makes on each edge, [B,h,w,C], where it is executed."""
    space, stride, channels = program.space, wave.group.stride, x.shape[3] // len(wave.sources)
    layers = fast_layers(program.axis_name, own_kernels=program.lowering.own_kernels)
    stacks, members = weights[wave.group.name].get(op, {}), space.rows(program.kind, wave.group)[op]
    coefficients = gates.of_edges(op)[:, None] * gates.images
    by_target: list[list[jax.Array]] = [[] for _ in wave.targets]
    for i, edge in enumerate(wave.edges):
        if edge not in members:
            continue
        (source, target), row = divmod(i, len(wave.targets)), members.index(edge)
        params = jax.tree.map(lambda a, row=row: a[row], stacks)
        own = x[..., source * channels : (source + 1) * channels]
        apply = partial(apply_op, space, op, stride=stride, layers=layers, noise=noise, edge=edge)
        shape = output_shape(own, stride)
        y = lax.cond(
            jnp.any(gates.hits[op][i]), apply, lambda params, x, shape=shape: jnp.zeros(shape, x.dtype), params, own
        )
        by_target[target].append(coefficients[i].reshape(-1, 1, 1, 1) * y.astype(coefficients.dtype))
    return by_target


def _wave(
    program: CellProgram,
    wave: Wave,
    operations: Mapping[str, _Found],
    gates: _Gates,
    weights: CellWeights,
    x: jax.Array,
    noise: CellNoise | None,
) -> jax.Array:
    """What the targets receive of the sources x [B,H,W,G C]: [B,h,w,T,C] in the dtype of the gates."""
    g, t, stride = len(wave.sources), len(wave.targets), wave.group.stride
    b, h, w, channels = output_shape(x, stride)
    total = jnp.zeros((b, h, w, t, channels // g), gates.values.dtype)

    def slots(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(a.reshape(g, t, *a.shape[1:]), 1, 2).reshape(-1, *a.shape[2:])

    def unit(lanes: _Lanes, z: jax.Array, depth: int) -> _Part:
        return _Part(z, lanes.coefficients(depth) if lanes.ends(depth) else None, t, True, lanes)

    parts: list[_Part] = []
    convolutions: dict[str, list[Unit]] = {}
    pools: dict[str, jax.Array] = {}
    for op, made_of in operations.items():
        once = gates.of_edges(op)[:, None]
        if made_of is None:
            by_target = _alone(program, wave, op, gates, weights, x, noise)
            sums = [_sum(made) if made else jnp.zeros_like(total[..., 0, :]) for made in by_target]
            total = total + jnp.stack(sums, axis=3)
        elif isinstance(made_of, Pool):
            pools[op] = _pooled(made_of, x).reshape(b, h, w, g, 1, -1)
        elif isinstance(made_of, Reduction):
            first, second = (a.reshape(g, t, *a.shape[1:]) for a in made_of)
            parts.append(_Part(reduced(x, first, second), once, t, True))
        elif made_of:
            convolutions[op] = made_of
        else:
            parts.append(_Part(x, once, 1, False))
    if pools:
        once = jnp.stack([gates.of_edges(op) for op in pools], axis=1)
        z = jnp.concatenate(list(pools.values()), axis=4).reshape(b, h, w, -1)
        parts.append(_Part(z, once, 1, program.space.pool_norm))
    parts += [unit(one, from_sources(x, one.slots(0, slots), g, stride), 0) for one in _lanes(convolutions, gates)]

    # A reduction of a GPU has two kernels: the second ones, over the images, are one for all arrays.
    by_image = program.lowering.platform != "tpu"
    depth, shifts = 0, [jnp.zeros((1, 1, 1, *total.shape[3:]), total.dtype)]
    while parts:
        normalised = tuple(part.z for part in parts if part.normalised)
        found = iter(statistics(normalised, program.axis_name, by_image=by_image) if normalised else ())
        after = []
        for part in parts:
            own = next(found) if part.normalised else None
            if part.coefficients is not None:
                received, shift = part.received(wave, gates, part.coefficients, own)
                total = total + received
                shifts += [] if shift is None else [shift]
            lanes = part.lanes
            if lanes is not None and own is not None and (count := lanes.count(depth + 1)):
                given, mean, scale = (_first_lanes(a, g, lanes.count(depth), count) for a in (part.z, *own))
                weighing = lanes.slots(depth + 1, slots)
                z = from_slots(given, mean, scale, weighing, own_kernels=program.lowering.own_kernels)
                after.append(unit(lanes, z, depth + 1))
        parts, depth = after, depth + 1
    return total + _sum(shifts)


# --- a cell -----------------------------------------------------------------------------------------------------------


def nodes(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array | None,
) -> jax.Array:
    """The intermediate nodes of a cell, [N,B,h,w,C]; arguments as in `mixed_nodes`, `factors` as in `factors_of`."""
    space, kind = program.space, program.kind
    waves = waves_of(space, kind)
    orders = {
        group: tuple(e for wave in waves if wave.group == group for e in wave.edges)
        for group in space.edge_groups(kind)
    }
    operations = {group: _operations(program, group, weights[group.name], order) for group, order in orders.items()}
    order = tuple(e for wave in waves for e in wave.edges)
    in_order = _taken(values, order, tuple(map(order.index, range(len(order))))).astype(wide_dtype(s0))
    whole = [s0, s1]
    beside = {} if factors is None else {j: passed(tail(space, x), waves[0].group.stride) for j, x in enumerate(whole)}
    sums, done = None, 0
    for wave in waves:
        first = orders[wave.group].index(wave.edges[0])
        edges = slice(first, first + len(wave.edges))
        allowed = space.allowed[kind][np.asarray(wave.edges)].any(axis=0)
        mine = {op: _cut(found, edges) for op, found in operations[wave.group].items() if allowed[space.ops.index(op)]}
        gates = _gates(space, kind, wave, in_order[done : done + len(wave.edges)], executed, noise)
        done += len(wave.edges)
        x = jnp.concatenate([head(space, whole[j]) for j in wave.sources], axis=3)
        received = _wave(program, wave, mine, gates, weights, x, noise)
        sums = received if sums is None else sums[..., 1:, :] + received
        node = sums[..., 0, :].astype(s0.dtype)
        if factors is not None:
            incoming = [(e, j) for e, (j, n) in enumerate(space.edges) if n == len(whole)]
            node = shuffled(space, node, _sum(scaled(factors[e], beside[j]) for e, j in incoming))
            beside[len(whole)] = tail(space, node)
        whole.append(node)
    return jnp.stack(whole[2:])
