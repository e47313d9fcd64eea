"""The derived network as a static plan: which layer reads which state, cell after cell.

The network that runs and the counts of parameters and multiply-adds are both read off this plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prdarts_jax.errors import UserError, unknown
from prdarts_jax.network.layers import (
    AUX_POOL,
    AUX_STRIDES,
    Layer,
    TreePath,
    auxiliary_head,
    classifier,
    operation,
    preprocess,
    stem_layer,
)
from prdarts_jax.ops.primitives import Primitive
from prdarts_jax.space.genotype import CELL_INPUTS, Genotype

STEMS = tuple(AUX_STRIDES)


class Edge(NamedTuple):
    """One (operation, input) pair of a node, or the preprocessing of a cell input."""

    name: str  # its entry in the parameters of the cell
    source: int  # the state it reads
    layer: Layer
    drop: int | None = None  # its column among the drop-path draws of a cell; None: never dropped


class CellPlan(NamedTuple):
    """A cell of the network."""

    kind: str  # "normal" | "reduce"
    preprocess: tuple[Edge, Edge]
    halves: bool  # c_{k-2} is twice as large as c_{k-1}
    nodes: tuple[tuple[Edge, ...], ...]  # without edges: the node does not exist
    concat: tuple[int, ...]  # existing states only
    channels: int
    channels_out: int

    @property
    def width(self) -> int:
        """Channels of the widest input, with a FactorizedReduce counted as a 1x1 convolution of twice the channels."""
        first, second = (edge.layer.channels_in for edge in self.preprocess)
        return max(2 * first if self.halves else first, second)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Everything with an entry in the parameters."""
        return (*self.preprocess, *(edge for node in self.nodes for edge in node))

    @property
    def layers(self) -> dict[TreePath, Layer]:
        """The layer of every edge under its path in the parameters of the cell."""
        return {(edge.name,): edge.layer for edge in self.edges}

    @property
    def drops(self) -> int:
        """How many operation outputs drop-path may drop."""
        return sum(edge.drop is not None for edge in self.edges)


class NetworkPlan(NamedTuple):
    """The whole network."""

    stem: tuple[tuple[str, Layer], ...]  # one layer for both cell inputs, or one each
    cells: tuple[CellPlan, ...]
    auxiliary: Layer | None  # after cell `auxiliary_after`
    auxiliary_after: int
    classifier: Layer

    @property
    def layers(self) -> dict[TreePath, Layer]:
        """Every layer under its path in the parameters."""
        layers: dict[TreePath, Layer] = {(name,): layer for name, layer in self.stem}
        for i, cell in enumerate(self.cells):
            layers |= {(f"cell_{i}", *path): layer for path, layer in cell.layers.items()}
        if self.auxiliary is not None:
            layers["auxiliary",] = self.auxiliary
        return layers | {("classifier",): self.classifier}

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first, one past the last) of each maximal run of neighbouring cells that differ in their inputs only."""
        bodies = [(cell.nodes, cell.concat) for cell in self.cells]
        ends = [i for i in range(1, len(bodies)) if bodies[i] != bodies[i - 1]]
        return tuple(pairwise([0, *ends, len(bodies)]))


def make_plan(
    genotype: Genotype,
    *,
    channels: int,
    cells: int,
    classes: int,
    stem: str,
    auxiliary: bool,
    in_channels: int,
    primitives: Mapping[str, Primitive],
    auxiliary_second_norm: bool = True,
) -> NetworkPlan:
    """The plan of a genotype at a depth and width.

    Channels double at cells//3 and 2*cells//3, where the reduction cells are. A node without pairs does not exist: it
    leaves the concat, and edges from it are void (so a node of void edges does not exist either). In a reduction cell
    edges from the two inputs have stride 2.

    Args:
      genotype: the two cells.
      channels: C of the first cell.
      cells: how many, at least 3.
      classes: outputs of the classifier.
      stem: "cifar" (one 3x3 convolution to 3C) or "imagenet" (three of stride 2).
      auxiliary: whether there is an auxiliary head after the second reduction cell.
      in_channels: of the images.
      primitives: the operations by name.
      auxiliary_second_norm: whether a BN follows the second convolution of the auxiliary head.

    Raises:
      UserError: a value out of range, an operation that is not in `primitives`, a cell without output.
    """
    for name, value, least in (("cells", cells, 3), ("channels", channels, 2), ("classes", classes, 1)):
        if value < least:
            raise UserError(f"{name}: {value} is too few; allowed: an integer >= {least}")
    if stem not in STEMS:
        raise unknown("stem", stem, STEMS)
    genotype.validate_ops(primitives)
    if stem == "cifar":
        stems = {"stem": stem_layer((in_channels, 3 * channels), 1)}
    else:
        stem0 = stem_layer((in_channels, channels // 2, channels), 2)
        stems = {"stem0": stem0, "stem1": stem_layer((channels, channels), 2, relu_first=True)}
    before_last = last = 3 * channels if stem == "cifar" else channels
    previous_reduced = stem == "imagenet"  # the second stem halves the image
    second_reduction = 2 * cells // 3
    plans: list[CellPlan] = []
    for i in range(cells):
        reduces = i in (cells // 3, second_reduction)
        channels *= 2 if reduces else 1
        inputs = (preprocess(before_last, channels, previous_reduced), preprocess(last, channels, False))
        kind = "reduce" if reduces else "normal"
        plans.append(_cell(genotype, kind, inputs, previous_reduced, channels, primitives))
        before_last, last, previous_reduced = last, plans[-1].channels_out, reduces
    head = auxiliary_head(plans[second_reduction].channels_out, classes, stem, auxiliary_second_norm)
    return NetworkPlan(
        stem=tuple(stems.items()),
        cells=tuple(plans),
        auxiliary=head if auxiliary else None,
        auxiliary_after=second_reduction,
        classifier=classifier(last, classes),
    )


def _cell(
    genotype: Genotype,
    kind: str,
    inputs: tuple[Layer, Layer],
    halves: bool,
    channels: int,
    primitives: Mapping[str, Primitive],
) -> CellPlan:
    nodes, concat = genotype.cell(kind)
    exists = [True] * CELL_INPUTS
    planned: list[tuple[Edge, ...]] = []
    drops = 0
    for number, pairs in enumerate(nodes, start=CELL_INPUTS):
        edges: list[Edge] = []
        for i, (op, source) in enumerate(pairs):
            if not exists[source]:
                continue
            stride = 2 if kind == "reduce" and source < CELL_INPUTS else 1
            identity = primitives[op].group == "skip" and stride == 1
            layer = operation(primitives[op], channels, stride)
            edges.append(Edge(f"node{number}_{i}_{op}", source, layer, None if identity else drops))
            drops += not identity
        planned.append(tuple(edges))
        exists.append(bool(edges))
    concat = tuple(n for n in concat if exists[n])
    if not concat:
        raise UserError(f"genotype.{kind}_concat: no node of it has an operation; allowed: at least one that has")
    before_last, last = (Edge(f"preprocess{i}", i, layer) for i, layer in enumerate(inputs))
    return CellPlan(kind, (before_last, last), halves, tuple(planned), concat, channels, channels * len(concat))


def wire(cell: CellPlan, inputs: tuple[jax.Array, jax.Array], run: Callable[[Edge, jax.Array], jax.Array]) -> jax.Array:
    """The output of a cell from its two inputs; `run` gives what an edge makes of the state it reads."""
    states: list[Any] = [run(edge, inputs[edge.source]) for edge in cell.preprocess]
    for node in cell.nodes:
        terms = [run(edge, states[edge.source]) for edge in node]
        states.append(reduce(jnp.add, terms) if terms else None)
    return jnp.concatenate([states[n] for n in cell.concat], axis=3)


def check_auxiliary(stem: str, height: int, width: int) -> None:
    """Refuses images for which the auxiliary head does not end in one pixel.

    Raises:
      UserError: the feature map after the second reduction cell is too small or too large for the head.

    >>> check_auxiliary("cifar", 28, 28)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: auxiliary: images of 28x28 do not fit the auxiliary head; allowed: 29..40 pixels (stem cifar), or no auxiliary head
    """  # noqa: E501 (the message is one line)
    reduction = 4 if stem == "cifar" else 32
    features = {size: -(-size // reduction) for size in range(1, 16 * reduction)}  # pixels of the image, of the map
    # The pool has to give 2x2 pixels, which the head's second convolution turns into one.
    fitting = [size for size, feature in features.items() if (feature - AUX_POOL) // AUX_STRIDES[stem] + 1 == 2]
    if height not in fitting or width not in fitting:
        raise UserError(
            f"auxiliary: images of {height}x{width} do not fit the auxiliary head; allowed: "
            f"{fitting[0]}..{fitting[-1]} pixels (stem {stem}), or no auxiliary head"
        )
