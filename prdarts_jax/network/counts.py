"""Parameters and multiply-adds of the derived network, counted from the network itself."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prdarts_jax.errors import unknown
from prdarts_jax.network.layers import Layer, abstract, shape_leaves
from prdarts_jax.network.plan import CellPlan, Edge, NetworkPlan, make_plan, wire
from prdarts_jax.ops.primitives import PRIMITIVES
from prdarts_jax.space.genotype import Genotype


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


class Profile(NamedTuple):
    """What a network costs."""

    params: int  # weights, without the auxiliary head
    params_with_aux: int
    macs: int  # multiply-adds of convolutions and linear layers, one image, without the auxiliary head


def profile(
    genotype: Genotype, dataset: str = "cifar10", *, channels: int | None = None, cells: int | None = None
) -> Profile:
    """Parameters and multiply-adds of a genotype's network at the scale of a data set.

    Args:
      genotype: the two cells.
      dataset: "cifar10" | "cifar100" (C = 36, 20 cells, 32 pixels) | "imagenet" (C = 48, 14 cells, 224 pixels).
      channels: another C.
      cells: another depth.

    Raises:
      UserError: unknown data set, an operation without a definition, a value out of range.

    >>> profile(Genotype.named("PRDARTS"))
    Profile(params=3444814, params_with_aux=3921240, macs=529769088)
    """
    if dataset not in SCALES:
        raise unknown("dataset", dataset, SCALES)
    scale = SCALES[dataset]
    plan = make_plan(
        genotype,
        channels=scale.channels if channels is None else channels,
        cells=scale.cells if cells is None else cells,
        classes=scale.classes,
        stem=scale.stem,
        auxiliary=True,
        in_channels=3,
        primitives=PRIMITIVES,
    )
    assert plan.auxiliary is not None
    layers = [layer for _, layer in plan.stem] + [layer for cell in plan.cells for layer in cell.layers.values()]
    params = sum(_parameters(layer) for layer in [*layers, plan.classifier])
    return Profile(params, params + _parameters(plan.auxiliary), _network_macs(plan, scale.pixels))


@cache
def _parameters(layer: Layer) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(layer.declared)))


class _Shape(NamedTuple):
    height: int
    width: int
    channels: int


def _network_macs(plan: NetworkPlan, pixels: int) -> int:
    total = 0

    def run(layer: Layer, x: _Shape) -> _Shape:
        nonlocal total
        macs, out = _layer_macs(layer, x.height, x.width)
        total += macs
        return out

    def cell_output(cell: CellPlan, inputs: tuple[_Shape, _Shape]) -> _Shape:
        def edge(edge: Edge, x: _Shape) -> _Shape:
            return run(edge.layer, x)

        return wire(cell, inputs, edge, _same, _joined)

    states = [_Shape(pixels, pixels, plan.stem[0][1].channels_in)]
    for _, layer in plan.stem:
        states.append(run(layer, states[-1]))
    before_last, last = states[-len(plan.stem)], states[-1]
    for cell in plan.cells:
        before_last, last = last, cell_output(cell, (before_last, last))
    run(plan.classifier, last)
    return total


def _same(a: _Shape, b: _Shape) -> _Shape:
    assert a == b
    return a


def _joined(states: list[_Shape]) -> _Shape:
    return states[0]._replace(channels=sum(state.channels for state in states))


@cache
def _layer_macs(layer: Layer, height: int, width: int) -> tuple[int, _Shape]:
    """Multiply-adds of a layer for one image of this size, and the shape it gives. Few layers differ: cached."""
    x = jax.ShapeDtypeStruct((1, height, width, layer.channels_in), jnp.float32)
    traced = jax.make_jaxpr(lambda params, x: layer.apply(params, x, shape_leaves(lambda _, x: x)))(
        abstract(layer.weights), x
    )
    out = traced.out_avals[0].shape
    return jaxpr_macs(traced.jaxpr), _Shape(*(out[1:] if len(out) == 4 else (1, 1, out[1])))


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
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += jaxpr_macs(inner)
    return total
