"""Parameters and multiply-adds of the derived network, counted from the network itself."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.errors import unknown
from prdarts_jax.network.layers import Layer, operation
from prdarts_jax.network.plan import CellPlan, NetworkPlan, make_plan, wire
from prdarts_jax.ops.primitives import PRIMITIVES
from prdarts_jax.space.genotype import CELL_INPUTS, Genotype, names, program
from prdarts_jax.space.spec import Space


class Scale(NamedTuple):
    """How the literature scales a cell for a data set."""

    channels: int
    cells: int
    classes: int
    stem: str
    pixels: int


SCALES = {
    "cifar10": Scale(36, 20, 10, "cifar", 32),
    "cifar100": Scale(36, 20, 100, "cifar", 32),
    "imagenet": Scale(48, 14, 1000, "imagenet", 224),
}
# Methods whose ImageNet program has no BN after the second convolution of the auxiliary head.
_ONE_NORM = frozenset({"DARTS", "PC-DARTS", "Fair DARTS", "MdeNAS"})


class Profile(NamedTuple):
    """What a network costs."""

    params: int  # weights, without the auxiliary head
    params_with_aux: int
    macs: int  # multiply-adds of convolutions and linear layers, one image, without the auxiliary head


def has_second_norm(name: str, dataset: str) -> bool:
    """Whether the auxiliary head of a published cell's program has a second BN; True for any other name.

    >>> [has_second_norm(name, "imagenet") for name in ("DARTS_V2", "PRDARTS")], has_second_norm("DARTS_V2", "cifar10")
    ([False, True], True)
    """
    return dataset != "imagenet" or name not in names() or program(name) not in _ONE_NORM


def profile(
    genotype: Genotype,
    dataset: str = "cifar10",
    *,
    channels: int | None = None,
    cells: int | None = None,
    auxiliary_second_norm: bool = True,
) -> Profile:
    """Parameters and multiply-adds of a genotype's network at the scale of a data set.

    Args:
      genotype: the two cells.
      dataset: "cifar10" | "cifar100" (C = 36, 20 cells, 32 pixels) | "imagenet" (C = 48, 14 cells, 224 pixels).
      channels: another C.
      cells: another depth.
      auxiliary_second_norm: whether a BN (1,536 weights) follows the second convolution of the auxiliary head;
        `has_second_norm` knows it of the published cells.

    Raises:
      UserError: unknown data set, an operation without a definition, a value out of range.

    >>> profile(Genotype.named("PRDARTS"))
    Profile(params=3444814, params_with_aux=3921240, macs=529769088)
    """
    if dataset not in SCALES:
        raise unknown("dataset", dataset, SCALES)
    scale = SCALES[dataset]
    scale = scale._replace(
        channels=scale.channels if channels is None else channels, cells=scale.cells if cells is None else cells
    )
    image = (scale.pixels, scale.pixels, 3)
    return profile_at(genotype, scale, image, auxiliary_second_norm=auxiliary_second_norm)


def profile_at(
    genotype: Genotype, scale: Scale, image: tuple[int, int, int], *, auxiliary_second_norm: bool = True
) -> Profile:
    """Parameters and multiply-adds of a genotype's network at any scale.

    Args:
      genotype: the two cells.
      scale: of the network; its `pixels` are not read.
      image: (H, W, C) that the network sees.
      auxiliary_second_norm: as in `profile`.

    Raises:
      UserError: an operation without a definition, a value out of range.

    >>> profile_at(Genotype.named("PRDARTS"), SCALES["cifar10"], (32, 32, 3)) == profile(Genotype.named("PRDARTS"))
    True
    """
    plan = make_plan(
        genotype,
        channels=scale.channels,
        cells=scale.cells,
        classes=scale.classes,
        stem=scale.stem,
        auxiliary=True,
        in_channels=image[2],
        primitives=PRIMITIVES,
        auxiliary_second_norm=auxiliary_second_norm,
    )
    counts = {path: _layer_params(layer) for path, layer in plan.layers.items()}
    total = sum(counts.values())
    shape = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    macs = jaxpr_macs(jax.make_jaxpr(lambda x: _outline(plan, x))(shape).jaxpr)
    return Profile(total - counts[("auxiliary",)], total, macs)


class PairCosts(NamedTuple):
    """What a derived network costs, pair by pair: `fixed` + the sum over the pairs of its cells.

    Attributes:
      fixed: of stem, preprocessing and classifier.
      pairs: {"normal", "reduce"} -> float64[E,O]: of an operation on an edge, in all cells of that type together.
    """

    fixed: float
    pairs: dict[str, np.ndarray]

    def of(self, genotype: Genotype, space: Space) -> float:
        """The cost of a genotype in which every node exists.

        >>> space, cell = Space(), Genotype.named("PRDARTS")
        >>> bool(pair_costs(space, "macs").of(cell, space) == profile(cell).macs)
        True
        """
        total = self.fixed
        for kind, table in self.pairs.items():
            for node, pairs in enumerate(genotype.cell(kind)[0], start=CELL_INPUTS):
                total += sum(table[space.edges.index((j, node)), space.ops.index(op)] for op, j in pairs)
        return total


def pair_costs(
    space: Space,
    what: str,
    *,
    channels: int = 36,
    cells: int = 20,
    classes: int = 10,
    image: int = 32,
    stem: str = "cifar",
    in_channels: int = 3,
) -> PairCosts:
    """What every operation on every edge of a space costs in the derived network.

    Args:
      space: gives the edges and operations of the cells.
      what: "macs" (multiply-adds of one image) or "params".
      channels, cells, classes, image (pixels), stem, in_channels: of the derived network.

    Raises:
      UserError: a value out of range.

    >>> costs = pair_costs(Space(), "params")
    >>> float(costs.pairs["normal"][0, 3]), bool(costs.pairs["normal"][0, 4] > 0)
    (0.0, True)
    """
    node = ((space.ops[-1], 0),)
    concat = tuple(range(CELL_INPUTS, CELL_INPUTS + space.nodes))
    some = Genotype((node,) * space.nodes, concat, (node,) * space.nodes, concat)
    plan = make_plan(
        some,
        channels=channels,
        cells=cells,
        classes=classes,
        stem=stem,
        auxiliary=False,
        in_channels=in_channels,
        primitives=space.table,
    )
    pairs = {kind: np.zeros((space.num_edges, space.num_ops)) for kind in ("normal", "reduce")}
    pixels = image if stem == "cifar" else -(-image // 8)
    for cell in plan.cells:
        for e, (source, _) in enumerate(space.edges):
            stride = 2 if cell.kind == "reduce" and source < CELL_INPUTS else 1
            size = pixels if stride == 2 or cell.kind == "normal" else -(-pixels // 2)
            for o, op in enumerate(space.ops):
                layer = operation(space.table[op], cell.channels, stride)
                pairs[cell.kind][e, o] += _layer_params(layer) if what == "params" else _layer_macs(layer, size)
        pixels = -(-pixels // 2) if cell.kind == "reduce" else pixels
    if what == "params":
        total = sum(_layer_params(layer) for layer in plan.layers.values())
    else:
        x = jax.ShapeDtypeStruct((1, image, image, in_channels), jnp.float32)
        total = jaxpr_macs(jax.make_jaxpr(lambda x: _outline(plan, x))(x).jaxpr)
    costs = PairCosts(0.0, pairs)
    return costs._replace(fixed=float(total) - costs.of(some, space))


class SearchCosts(NamedTuple):
    """What every operation on every edge of every cell of a search network costs, each float64[cells,E,O].

    Attributes:
      params: weights of convolutions.
      macs: multiply-adds of one image; those of a 3x3 pool are counted as 9 an output.
      access: numbers that convolutions, pools and identities read and write, weights included.
    """

    params: np.ndarray
    macs: np.ndarray
    access: np.ndarray


def search_costs(space: Space, *, image: int = 32) -> SearchCosts:
    """The costs of the operations of a search network on images of so many pixels a side.

    >>> costs = search_costs(Space(cells=3, channels=4, ops=("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3")))
    >>> costs.params[0, 0].tolist(), costs.access[0, 0].tolist()  # 2 (9 * 4 + 4 * 4); 8 feature maps and the weights
    ([0.0, 0.0, 0.0, 104.0], [0.0, 8192.0, 8192.0, 32872.0])
    """
    shape, pixels = (space.cells, space.num_edges, space.num_ops), image
    costs = SearchCosts(np.zeros(shape), np.zeros(shape), np.zeros(shape))
    for i, cell in enumerate(space.layout):
        after = -(-pixels // 2) if cell.kind == "reduce" else pixels
        for e, (source, _) in enumerate(space.edges):
            stride = 2 if cell.kind == "reduce" and source < CELL_INPUTS else 1
            before = pixels if stride == 2 else after
            for o, op in enumerate(space.ops):
                primitive = space.table[op]
                layer = operation(primitive, cell.channels, stride)
                params = sum(math.prod(weight.shape) for weight in layer.weights.values())
                moved = cell.channels * (before**2 + after**2)
                macs, access = _layer_macs(layer, before), _layer_access(layer, before)
                if primitive.group == "pool":
                    macs += _POOL * cell.channels * after**2
                if not params and primitive.group != "none":
                    access += moved
                for table, cost in zip(costs, (params, macs, access), strict=True):
                    table[i, e, o] = cost
        pixels = after
    return costs


_POOL = 9  # pixels of a window


@cache
def _layer_access(layer: Layer, pixels: int) -> int:
    """Numbers that the convolutions of a layer read and write, as its jaxpr has them."""
    x = jax.ShapeDtypeStruct((1, pixels, pixels, layer.channels_in), jnp.float32)

    def of(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("conv_general_dilated", "dot_general"):
                total += sum(math.prod(var.aval.shape) for var in (*equation.invars, *equation.outvars))
            total += sum(of(inner) for inner in _inner(equation))
        return total

    return of(jax.make_jaxpr(layer.outline)(x).jaxpr)


def _layer_params(layer: Layer) -> int:
    return sum(math.prod(weight.shape) for name, weight in layer.variables.items() if name[0] == "params")


@cache
def _layer_macs(layer: Layer, pixels: int) -> int:
    x = jax.ShapeDtypeStruct((1, pixels, pixels, layer.channels_in), jnp.float32)
    return jaxpr_macs(jax.make_jaxpr(layer.outline)(x).jaxpr)


def _outline(plan: NetworkPlan, x: jax.Array) -> jax.Array:
    """The network without its auxiliary head, for its trace alone."""
    states = [x]
    for _, layer in plan.stem:
        states.append(layer.outline(states[-1]))
    pair = states[-len(plan.stem)], states[-1]
    for cell in plan.cells:
        pair = pair[1], _outline_cell(cell, pair)
    return plan.classifier.outline(pair[1])


@partial(jax.jit, static_argnums=0)  # equal cells are traced once
def _outline_cell(cell: CellPlan, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    return wire(cell, pair, lambda edge, x: edge.layer.outline(x))


def jaxpr_macs(jaxpr: Any) -> int:
    """Multiply-adds of all convolutions and matrix products of a jaxpr, those of inner jaxprs included.

    A convolution: outputs * kernel height * kernel width * inputs a group. A product: outputs * contracted length.

    >>> jaxpr_macs(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5))).jaxpr)
    30
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            length = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += math.prod(equation.outvars[0].aval.shape) * length
        total += sum(jaxpr_macs(inner) for inner in _inner(equation))
    return total


def _inner(equation: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    values = (getattr(value, "jaxpr", value) for value in equation.params.values())
    return [value for value in values if hasattr(value, "eqns")]
