"""The search space as a static, hashable description: nodes, edges, operations, groups, the layout of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from prdarts_jax.config.search import OPS, SpaceConfig
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.ops.primitives import PRIMITIVES, Primitive

CELL_TYPES = ("normal", "reduce")


class CellSpec(NamedTuple):
    """Static facts of one cell of the network."""

    kind: str  # "normal" | "reduce"
    channels: int  # C inside the cell; it outputs nodes * C
    channels_in: tuple[int, int]  # of c_{k-2} and c_{k-1}
    previous_reduced: bool  # c_{k-2} is twice as large as c_{k-1} and passes a FactorizedReduce


class EdgeGroup(NamedTuple):
    """Edges of a cell that share a stride; their weights are stacked on a leading axis."""

    name: str  # key in the weight tree: "stride1" | "stride2"
    stride: int
    edges: tuple[int, ...]  # indices into Space.edges


@dataclass(frozen=True)
class Space:
    """A cell-based search space.

    Attributes:
      nodes: intermediate nodes N of a cell; node n (numbered from 2) has an edge from every earlier one.
      ops: operation names, in the order of the columns of beta.
      edge_ops: (normal, reduce) x edge -> allowed names; () allows all everywhere.
      cells, channels: depth and width of the search network; reductions at cells//3 and 2*cells//3.
      classes, in_channels: of the data.
      head_norm, pool_norm: see `SpaceConfig`.
      partial: K; the first C/K channels of an edge go through its operations (`space/partial.py`).
      primitives: the table the names refer to.
    """

    nodes: int = 4
    ops: tuple[str, ...] = OPS
    edge_ops: tuple[tuple[tuple[str, ...], ...], ...] = ()
    cells: int = 8
    channels: int = 16
    classes: int = 10
    in_channels: int = 3
    head_norm: bool = True
    pool_norm: bool = True
    partial: int = 1
    primitives: tuple[tuple[str, Primitive], ...] = tuple(PRIMITIVES.items())

    @classmethod
    def create(
        cls, config: SpaceConfig, *, classes: int, in_channels: int, user: Mapping[str, Primitive] | None = None
    ) -> Space:
        """The space of a config and a data set; `user` primitives extend or replace the built-in ones.

        >>> Space.create(SpaceConfig(cells=6), classes=10, in_channels=3).reductions
        (2, 4)
        """
        table = {**PRIMITIVES, **(user or {})}
        for name in config.ops:
            if name not in table:
                raise unknown("space.ops", name, table)
        for name, primitive in (user or {}).items():
            if not isinstance(primitive, Primitive):
                raise UserError(f"space.primitives: {name!r} is {type(primitive).__name__}; allowed: a Primitive")
        return cls(
            nodes=config.nodes,
            ops=config.ops,
            edge_ops=config.edge_ops,
            cells=config.cells,
            channels=config.channels,
            classes=classes,
            in_channels=in_channels,
            head_norm=config.head_norm,
            pool_norm=config.pool_norm,
            partial=config.partial,
            primitives=tuple((name, table[name]) for name in config.ops),
        )

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) pairs, node-major: (0,2)(1,2)(0,3)(1,3)(2,3)..."""
        return tuple((j, n) for n in range(2, 2 + self.nodes) for j in range(n))

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.edges)

    @property
    def num_ops(self) -> int:
        """O."""
        return len(self.ops)

    @cached_property
    def table(self) -> dict[str, Primitive]:
        """The primitive of every name."""
        return dict(self.primitives)

    @cached_property
    def allowed(self) -> dict[str, np.ndarray]:
        """bool[E,O] per cell type: which operations an edge may choose."""
        if not self.edge_ops:
            return {kind: np.ones((self.num_edges, self.num_ops), bool) for kind in CELL_TYPES}
        return {
            kind: np.array([[name in names for name in self.ops] for names in lists])
            for kind, lists in zip(CELL_TYPES, self.edge_ops, strict=True)
        }

    def group(self, name: str) -> np.ndarray:
        """bool[O]: the operations of a group ("none" | "skip" | "pool" | "conv").

        >>> Space().group("pool").sum().item()
        2
        """
        return np.array([self.table[op].group == name for op in self.ops])

    @cached_property
    def path_edges(self) -> tuple[int, ...]:
        """Edges of the path 1 -> 2 -> 3 -> ...: from the previous cell through all intermediate nodes (eq. 8)."""
        return tuple(self.edges.index((n - 1, n)) for n in range(2, 2 + self.nodes))

    @property
    def reductions(self) -> tuple[int, int]:
        """Positions of the two reduction cells."""
        return self.cells // 3, 2 * self.cells // 3

    @cached_property
    def layout(self) -> tuple[CellSpec, ...]:
        """The cells of the network. Channels double at the reductions; the stem gives 3 C.

        >>> [cell.kind[0] for cell in Space().layout], [cell.channels for cell in Space().layout]
        (['n', 'n', 'r', 'n', 'n', 'r', 'n', 'n'], [16, 16, 32, 32, 32, 64, 64, 64])
        """
        specs, channels = [], self.channels
        before_last, last, previous_reduced = 3 * self.channels, 3 * self.channels, False
        for i in range(self.cells):
            reduces = i in self.reductions
            channels *= 2 if reduces else 1
            kind = "reduce" if reduces else "normal"
            specs.append(CellSpec(kind, channels, (before_last, last), previous_reduced))
            before_last, last, previous_reduced = last, self.nodes * channels, reduces
        return tuple(specs)

    @cached_property
    def runs(self) -> tuple[range, ...]:
        """The cells of the network in runs of neighbours that are equal but for their weights.

        >>> [len(run) for run in Space(cells=20).runs]
        [1, 1, 4, 1, 1, 5, 1, 1, 5]
        """
        starts = [i for i, cell in enumerate(self.layout) if i == 0 or cell != self.layout[i - 1]]
        return tuple(range(*ends) for ends in zip(starts, [*starts[1:], self.cells], strict=True))

    def edge_groups(self, kind: str) -> tuple[EdgeGroup, ...]:
        """The edges of a cell type by stride: in a reduction cell the edges from the two inputs have stride 2."""
        if kind == "normal":
            return (EdgeGroup("stride1", 1, tuple(range(self.num_edges))),)
        outer = tuple(e for e, (j, _) in enumerate(self.edges) if j < 2)
        inner = tuple(e for e, (j, _) in enumerate(self.edges) if j >= 2)
        groups = (EdgeGroup("stride2", 2, outer), EdgeGroup("stride1", 1, inner))
        return tuple(group for group in groups if group.edges)

    def rows(self, kind: str, group: EdgeGroup) -> dict[str, tuple[int, ...]]:
        """For every operation the edges of the group that may use it; row r of its stack belongs to the r-th."""
        allowed = self.allowed[kind]
        return {op: tuple(e for e in group.edges if allowed[e, o]) for o, op in enumerate(self.ops)}
