"""The derived network as a static plan: which layer reads which state, cell after cell. No arrays.

The network that runs and the counts of parameters and multiply-adds are both read off this plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import NamedTuple, TypeVar

from prdarts_jax.errors import UserError, unknown
from prdarts_jax.network.layers import (
    AUX_STRIDES,
    Layer,
    auxiliary_fits,
    auxiliary_head,
    cifar_stem,
    classifier,
    imagenet_stem0,
    imagenet_stem1,
    operation,
    preprocess,
)
from prdarts_jax.ops.primitives import Primitive
from prdarts_jax.space.genotype import CELL_INPUTS, Genotype

STEMS = tuple(AUX_STRIDES)
State = TypeVar("State")  # an array, or its shape


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
    def body(self) -> tuple[object, ...]:
        """What follows the preprocessing: hashable, and equal for cells that may share a compiled body."""
        return self.nodes, self.concat

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
    def drops(self) -> int:
        """How many operation outputs drop-path may drop."""
        return sum(edge.drop is not None for edge in self.edges)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layer of every entry in the parameters."""
        return {edge.name: edge.layer for edge in self.edges}


class NetworkPlan(NamedTuple):
    """The whole network."""

    stem: tuple[tuple[str, Layer], ...]  # one layer for both cell inputs, or one each
    cells: tuple[CellPlan, ...]
    auxiliary: Layer | None  # after cell `auxiliary_after`
    auxiliary_after: int
    classifier: Layer

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first, one past the last) of each maximal run of neighbouring cells with equal bodies."""
        starts = [i for i, cell in enumerate(self.cells) if i == 0 or cell.body != self.cells[i - 1].body]
        return tuple(zip(starts, [*starts[1:], len(self.cells)], strict=True))


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

    Raises:
      UserError: a value out of range, an operation that is not in `primitives`, a cell without output.
    """
    for name, value, least in (("cells", cells, 3), ("channels", channels, 2), ("classes", classes, 1)):
        if value < least:
            raise UserError(f"{name}: {value} is too few; allowed: an integer >= {least}")
    if stem not in STEMS:
        raise unknown("stem", stem, STEMS)
    genotype.validate_ops(primitives)
    first: tuple[tuple[str, Layer], ...]
    if stem == "cifar":
        first = (("stem", cifar_stem(in_channels, channels)),)
        before_last = last = 3 * channels
    else:
        first = (("stem0", imagenet_stem0(in_channels, channels)), ("stem1", imagenet_stem1(channels)))
        before_last = last = channels
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
    return NetworkPlan(
        stem=first,
        cells=tuple(plans),
        auxiliary=auxiliary_head(plans[second_reduction].channels_out, classes, stem) if auxiliary else None,
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


def wire(
    cell: CellPlan,
    inputs: tuple[State, State],
    run: Callable[[Edge, State], State],
    add: Callable[[State, State], State],
    concatenate: Callable[[list[State]], State],
) -> State:
    """What a cell does with its states, whatever a state is: an array that is computed or a shape that is counted."""
    states: list[State | None] = [run(edge, inputs[edge.source]) for edge in cell.preprocess]
    for node in cell.nodes:
        terms = []
        for edge in node:
            source = states[edge.source]
            assert source is not None
            terms.append(run(edge, source))
        states.append(reduce(add, terms) if terms else None)
    return concatenate([state for n in cell.concat if (state := states[n]) is not None])


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
    if not all(auxiliary_fits(-(-size // reduction), stem) for size in (height, width)):
        fitting = [size for size in range(1, 16 * reduction) if auxiliary_fits(-(-size // reduction), stem)]
        raise UserError(
            f"auxiliary: images of {height}x{width} do not fit the auxiliary head; allowed: "
            f"{fitting[0]}..{fitting[-1]} pixels (stem {stem}), or no auxiliary head"
        )
