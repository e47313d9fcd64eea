"""The search network: stem, cells of mixed edges, head. Plain functions over a plain dict of weights.

Neighbouring cells that are equal share an entry of the weights, stacked on a leading axis, and are run by one
`lax.scan`: what is traced, compiled, drawn, updated and saved does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from prdarts_jax.gates import Gates
from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.layer_set import LayerSet, fast_layers, reference_layers
from prdarts_jax.ops.layers import (
    Weight,
    conv,
    draw,
    factorized_reduce,
    linear,
)
from prdarts_jax.ops.lowering import ANYWHERE, Lowering
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.noise import Noise, cell_noise
from prdarts_jax.space.spec import Space

if TYPE_CHECKING:
    from jaxtyping import Float, PRNGKeyArray

Weights = dict[str, Any]
Pair = tuple[jax.Array, jax.Array]  # outputs of the last two cells


def _affine_weights(channels: int) -> dict[str, Weight]:
    return {"scale": Weight((channels,), constant=1.0), "bias": Weight((channels,), constant=0.0)}


def _affine(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    scale, bias = (params[name].reshape(1, 1, 1, -1) for name in ("scale", "bias"))
    return (x.astype(wide_dtype(x)) * scale + bias).astype(x.dtype)


def _preprocess_weights(channels_in: int, channels: int, reduces: bool) -> dict[str, Weight]:
    if not reduces:
        return {"pointwise": Weight((channels_in, channels), channels_in)}
    half = channels // 2
    return {
        "first": Weight((channels_in, half), channels_in),
        "second": Weight((channels_in, channels - half), channels_in),
    }


def _cell_weights(space: Space, cells: range) -> dict[str, Any]:
    """Of a run of equal cells; with a leading axis over them where there are several."""
    cell = space.layout[cells[0]]
    one = {
        "preprocess0": _preprocess_weights(cell.channels_in[0], cell.channels, cell.previous_reduced),
        "preprocess1": _preprocess_weights(cell.channels_in[1], cell.channels, False),
        "edges": declare_edges(space, cell.kind, cell.channels),
    }
    if len(cells) == 1:
        return one
    return jax.tree.map(lambda w: w._replace(shape=(len(cells), *w.shape)), one, is_leaf=_is_declaration)


def _is_declaration(node: Any) -> bool:
    return isinstance(node, Weight)


def declare(space: Space) -> dict[str, Any]:
    """The weights of the search network as `Weight` declarations: {"stem": ..., "cells": [...], "head": ...}.

    "cells" has an entry for each of `space.runs`, with a leading axis over its cells where there are several.
    """
    wide = 3 * space.channels
    features = space.nodes * space.layout[-1].channels
    declared: dict[str, Any] = {
        "stem": {"conv": Weight((3, 3, space.in_channels, wide), 9 * space.in_channels), **_affine_weights(wide)},
        "cells": [_cell_weights(space, cells) for cells in space.runs],
        "head": {"kernel": Weight((features, space.classes), features), "bias": Weight((space.classes,), features)},
    }
    if space.head_norm:
        declared["head"]["norm"] = _affine_weights(features)
    return declared


def init(key: PRNGKeyArray, space: Space) -> Weights:
    """Weights of the search network; architecture parameters are not among them.

    Every convolution and the linear layer: uniform in +-1/sqrt(fan_in); BN scale 1, bias 0.

    Args:
      key: PRNG key.
      space: the search space.

    Returns:
      {"stem": ..., "cells": [...], "head": ...} of float32 arrays as declared by `declare`; the edges of a cell are
      stacked on an axis, and equal neighbouring cells on another before it (`by_cell` takes them apart).

    >>> weights = jax.eval_shape(lambda key: init(key, Space(head_norm=False)), jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(weights))
    1930618
    """
    return draw(key, declare(space))


def by_cell(weights: Weights, space: Space) -> list[dict[str, Any]]:
    """The weights of every cell of the network, in order: the entries of `weights["cells"]` without an axis over cells.

    Args:
      weights: as made by `init`, or a tree of the same structure (gradients).
      space: the search space.

    >>> space = Space(cells=11)
    >>> weights = jax.eval_shape(lambda key: by_cell(init(key, space), space), jax.random.key(0))
    >>> len(weights), weights[6]["preprocess0"]["pointwise"].shape
    (11, (128, 32))
    """
    cells: list[dict[str, Any]] = []
    for run, entry in zip(space.runs, weights["cells"], strict=True):
        several = [jax.tree.map(lambda a, row=row: a[row], entry) for row in range(len(run))]
        cells += several if len(run) > 1 else [entry]
    return cells


class _Mode(NamedTuple):
    """Fast (custom rules, executed operations only) or reference (plain autodiff, dense)."""

    layers: LayerSet
    nodes: Callable[..., jax.Array]  # (edge weights, gates of a cell, s0, s1, space, kind, noise) -> [N,B,h,w,C]
    scans: bool  # whether equal cells are run by a scan


def _preprocess(params: Weights, x: jax.Array, mode: _Mode) -> jax.Array:
    """ReLU, 1x1 convolution (or FactorizedReduce), BN."""
    if "pointwise" in params:
        return mode.layers.pointwise("bn", x, params["pointwise"])
    return mode.layers.norm("bn", factorized_reduce(jax.nn.relu(x), params["first"], params["second"]))


def _run(
    params: Weights, gates: Gates, pair: Pair, cells: range, space: Space, mode: _Mode, noise: Noise | None
) -> Pair:
    """Equal cells, one after the other."""
    kind = space.layout[cells[0]].kind

    def one(pair: Pair, of: tuple[Weights, Any]) -> tuple[Pair, None]:
        params, i = of
        s0, s1 = (_preprocess(params[f"preprocess{n}"], x, mode) for n, x in enumerate(pair))
        own = None if noise is None else cell_noise(noise, space, i)
        nodes = mode.nodes(params["edges"], gates.of_cell(kind, i), s0, s1, space=space, kind=kind, noise=own)
        # One transposition: the gradient of a concatenation of slices would be a sum of N padded arrays.
        return (pair[1], jnp.moveaxis(nodes, 0, 3).reshape(*nodes.shape[1:4], -1)), None

    if len(cells) == 1:
        return one(pair, (params, cells[0]))[0]
    return lax.scan(one, pair, (params, jnp.arange(cells.start, cells.stop)))[0]


def _forward(
    weights: Weights, gates: Gates, images: jax.Array, space: Space, mode: _Mode, noise: Noise | None
) -> tuple[jax.Array, dict[str, Any]]:
    stem = weights["stem"]
    x = _affine(stem, mode.layers.norm("bn", conv(images, stem["conv"])))
    pair = x, x
    if mode.scans:
        for cells, params in zip(space.runs, weights["cells"], strict=True):
            pair = _run(params, gates, pair, cells, space, mode, noise)
    else:
        for i, params in enumerate(by_cell(weights, space)):
            pair = _run(params, gates, pair, range(i, i + 1), space, mode, noise)
    last = pair[1]
    head = weights["head"]
    if space.head_norm:
        last = jax.nn.relu(_affine(head["norm"], mode.layers.norm("bn", last)))
    features = jnp.mean(last.astype(wide_dtype(last)), axis=(1, 2))
    return linear(features, head["kernel"], head["bias"]), {"features": features}


def apply(
    weights: Weights,
    gates: Gates,
    images: Float[jax.Array, "B H W {space.in_channels}"],
    *,
    space: Space,
    axis_name: str | None = None,
    noise: Noise | None = None,
    lowering: Lowering = ANYWHERE,
) -> tuple[Float[jax.Array, "B {space.classes}"], dict[str, Any]]:
    """Logits of the search network under sampled gates; only the executed operations are computed.

    Args:
      weights: as made by `init`.
      gates: a sample of the strategy; leaves may carry a leading axis over the cells of the network.
      images: [B,H,W,C_in], normalised; their dtype is the compute dtype.
      space: the search space.
      axis_name: mapped axis over which the batch is split (batch normalisation is over all of it).
      noise: drop-path and dropout of the cells; None: nothing random is inside the network.
      lowering: what the program is lowered for; a known platform is traced alone.

    Returns:
      (logits float32[B,classes], {"features": float32[B, N*4C]}). Reverse-mode derivatives.
    """

    def nodes(edges: Any, gates: Gates, s0: jax.Array, s1: jax.Array, *, kind: str, **static: Any) -> jax.Array:
        multipliers = None if gates.edges is None else gates.edges[kind]
        static |= {"kind": kind, "axis_name": axis_name, "multipliers": multipliers, "lowering": lowering}
        return mixed_nodes(edges, *gates.terms(kind), s0, s1, **static)

    layers = fast_layers(axis_name, own_kernels=lowering.own_kernels)
    return _forward(weights, gates, images, space, _Mode(layers, nodes, scans=True), noise)


def apply_reference(
    weights: Weights,
    gates: Gates,
    images: Float[jax.Array, "B H W {space.in_channels}"],
    *,
    space: Space,
    axis_name: str | None = None,
    noise: Noise | None = None,
) -> tuple[Float[jax.Array, "B {space.classes}"], dict[str, Any]]:
    """The same logits from all operations (masked by the gates) with plain autodiff: any order and mode of derivative.

    Slow to compile (every operation of every edge is unrolled): for tests and for exact second order on small spaces.
    """

    def nodes(edges: Any, gates: Gates, s0: jax.Array, s1: jax.Array, *, kind: str, **static: Any) -> jax.Array:
        multipliers = None if gates.edges is None else gates.edges[kind]
        static |= {"kind": kind, "axis_name": axis_name, "multipliers": multipliers}
        return mixed_nodes_reference(edges, gates.dense(kind), s0, s1, **static)

    return _forward(weights, gates, images, space, _Mode(reference_layers(axis_name), nodes, scans=False), noise)
