"""The derived network: a genotype's cells, stacked and trained from scratch, as a flax.linen Module.

The parameters have one entry a cell. Neighbouring cells that are equal but for their weights and their inputs are run
by one `lax.scan` over their stacked entries, so that the compiler sees five cells instead of twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import unfreeze
from jax import lax

from prdarts_jax.errors import UserError
from prdarts_jax.network.counts import Profile, profile
from prdarts_jax.network.layers import (
    Layer,
    TreePath,
    batch_norm,
    constants,
    dense_preprocess,
    preprocess,
    running_statistics,
    variables_of,
    widened,
)
from prdarts_jax.network.plan import CellPlan, Edge, NetworkPlan, check_auxiliary, make_plan, wire
from prdarts_jax.ops.drop_path import drop_path, drop_path_draws
from prdarts_jax.ops.layer_set import composed_pointwise, composed_separable, fast_layers
from prdarts_jax.ops.layers import draw
from prdarts_jax.ops.primitives import PRIMITIVES, Params, Primitive
from prdarts_jax.ops.separable import WORTH_KEEPING, Affine, Unit, pointwise_unit, separable_units
from prdarts_jax.space.genotype import Genotype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["DerivedNetwork", "Profile", "drop_path", "drop_path_draws", "profile"]

Pair = tuple[jax.Array, jax.Array]


# --- what is computed, as pure functions ------------------------------------------------------------------------------


class How(NamedTuple):
    """How layers are run, whatever they compute: the fields of `DerivedNetwork` of these names."""

    axis_name: str | None = None
    own_kernels: bool = True


def _run_layer(
    layer: Layer, params: Params, statistics: Params, x: jax.Array, *, train: bool, how: How
) -> tuple[jax.Array, Params]:
    """(y, the running statistics afterwards)."""
    after: Params = {}
    fast = fast_layers(own_kernels=how.own_kernels)

    def norm(name: str, x: jax.Array) -> jax.Array:
        y, after[name] = batch_norm(x, params[name], statistics[name], train=train, **how._asdict())
        return y

    def separable(names: Sequence[str], x: jax.Array, units: Sequence[Unit]) -> jax.Array:
        y, moments = separable_units(x, units, [Affine(**params[name]) for name in names], **how._asdict())
        b, h, w, _ = x.shape
        for name, unit, of_unit in zip(names, units, moments, strict=True):
            h, w = -(-h // unit.stride), -(-w // unit.stride)
            after[name] = running_statistics(b * h * w, of_unit, statistics[name], axis_name=how.axis_name)
        return y

    def pointwise(name: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
        y, moments = pointwise_unit(x, matrix, Affine(**params[name]), **how._asdict())
        after[name] = running_statistics(math.prod(y.shape[:3]), moments, statistics[name], axis_name=how.axis_name)
        return y

    if not train:
        separable, pointwise = composed_separable(fast.depthwise, norm), composed_pointwise(norm)
    return layer.apply(params, x, fast._replace(norm=norm, separable=separable, pointwise=pointwise)), after


def _run_cell(
    plan: CellPlan,
    params: Params,
    statistics: Params,
    inputs: Pair,
    draws: jax.Array | None,
    rate: jax.Array | None,
    *,
    train: bool,
    how: How,
) -> tuple[jax.Array, Params]:
    """(output of the cell, its running statistics afterwards); `draws` [B, width] of drop-path, or None without it."""
    after: Params = {}

    def run(edge: Edge, x: jax.Array) -> jax.Array:
        weights, running = params.get(edge.name, {}), statistics.get(edge.name, {})
        y, new = _run_layer(edge.layer, weights, running, x, train=train, how=how)
        if new:
            after[edge.name] = new
        if edge.drop is None or draws is None or rate is None:
            return y
        return drop_path(y, draws[:, edge.drop], rate)

    return wire(plan, inputs, run), after


# --- the modules ------------------------------------------------------------------------------------------------------


def _with_variables(
    module: nn.Module,
    layers: Mapping[TreePath, Layer],
    run: Callable[[Params, Params], tuple[jax.Array, Params]],
    *,
    train: bool,
) -> jax.Array:
    """y of `run(params, statistics) -> (y, statistics afterwards)` with the variables of a module.

    A module without variables makes them as the layers declare. All its weights come from one draw: hundreds of small
    ones would take half a minute to compile.
    """
    declared = traverse_util.unflatten_dict(variables_of(layers))
    weights = declared.get("params", {})
    drawn = draw(module.make_rng("params"), weights) if module.is_initializing() else None

    def initial(_: jax.Array, name: str) -> Any:
        return constants(weights[name]) if drawn is None else drawn[name]

    params = {name: module.param(name, initial, name) for name in weights}
    statistics = {
        name: module.variable("batch_stats", name, constants, norms)
        for name, norms in declared.get("batch_stats", {}).items()
    }
    y, after = run(params, {name: variable.value for name, variable in statistics.items()})
    if train and not module.is_initializing():
        for name, new in after.items():
            statistics[name].value = new
    return y


class Part(nn.Module):
    """A part that is one layer: a stem, the classifier, the auxiliary head."""

    layer: Layer
    how: How = How()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B,H,W,C] -> what the layer computes."""
        run = partial(_run_layer, self.layer, x=x, train=train, how=self.how)
        return _with_variables(self, {(): self.layer}, run, train=train)


class Cell(nn.Module):
    """One cell of the derived network."""

    plan: CellPlan
    how: How = How()

    @nn.compact
    def __call__(
        self,
        before_last: jax.Array,
        last: jax.Array,
        *,
        train: bool,
        draws: jax.Array | None = None,
        rate: jax.Array | None = None,
    ) -> jax.Array:
        """c_{k-2}, c_{k-1} -> c_k, all [B,H,W,C] of their own H, W, C."""
        run = partial(
            _run_cell,
            self.plan,
            inputs=(before_last, last),
            draws=draws,
            rate=rate,
            train=train,
            how=self.how,
        )
        return _with_variables(self, self.plan.layers, run, train=train)


class DerivedNetwork(nn.Module):
    """The network that is trained from scratch and evaluated with the cells of a genotype.

    `init(key, images)` gives {"params", "batch_stats"}; `apply(variables, images, train=True, mutable=["batch_stats"])`
    gives ((logits, auxiliary logits), new statistics). Both trees have the entries stem (stem0, stem1 for ImageNet),
    cell_0 .. cell_{cells-1}, classifier and, if asked for, auxiliary. Parameters and running statistics are float32.

    Attributes:
      genotype: the two cells.
      channels: C of the first cell; doubled at cells//3 and 2*cells//3.
      cells: number of cells.
      classes: outputs of the classifier.
      stem: "cifar": 3x3 convolution to 3C, BN. "imagenet": three convolutions of stride 2.
      auxiliary: whether there is an auxiliary head after the second reduction cell.
      dtype: of the computation; BN statistics, the classifier and its inputs are float32 at least.
      axis_name: mapped axis over which the batch is split, for the statistics of BN.
      own_kernels: whether the CPU kernels of `ops/kernels.py` may be used. A program that leaves this process cannot
        have them.
      scan_cells: whether equal neighbouring cells are run by a scan (the same numbers up to rounding, faster to
        compile); without it `capture_intermediates` sees every cell.
      recompute: whether such a scan keeps only the inputs of its cells for the backward pass and computes the rest
        again: less memory, and measured not slower on CPU. Not over `axis_name`, where the all-reduces of the
        statistics would run again.
      primitives: (name, Primitive) pairs the genotype's operations refer to.
      auxiliary_second_norm: whether a BN follows the second convolution of the auxiliary head; the ImageNet programs
        of DARTS, PC-DARTS and Fair DARTS have none.

    Source: Liu et al., "DARTS: Differentiable Architecture Search" (ICLR 2019): its evaluation networks.

    >>> net = DerivedNetwork(Genotype.named("PRDARTS"), channels=4, cells=3)
    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> variables = net.init(jax.random.key(0), images)
    >>> (logits, auxiliary), _ = net.apply(variables, images, train=True, mutable=["batch_stats"])
    >>> logits.shape, auxiliary, sorted(variables["params"])
    ((2, 10), None, ['cell_0', 'cell_1', 'cell_2', 'classifier', 'stem'])
    """

    genotype: Genotype
    channels: int = 36
    cells: int = 20
    classes: int = 10
    stem: str = "cifar"
    auxiliary: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    own_kernels: bool = True
    scan_cells: bool = True
    recompute: bool = False
    primitives: tuple[tuple[str, Primitive], ...] = tuple(PRIMITIVES.items())
    auxiliary_second_norm: bool = True

    def plan(self, in_channels: int = 3) -> NetworkPlan:
        """The static plan of the network, for images of so many channels."""
        return make_plan(
            self.genotype,
            channels=self.channels,
            cells=self.cells,
            classes=self.classes,
            stem=self.stem,
            auxiliary=self.auxiliary,
            in_channels=in_channels,
            primitives=dict(self.primitives),
            auxiliary_second_norm=self.auxiliary_second_norm,
        )

    @nn.compact
    def __call__(
        self,
        images: Float[jax.Array, "B H W C"],
        *,
        train: bool = False,
        drop_path: Float[jax.Array, ""] | float | None = None,
        positions: Int[jax.Array, "#B"] | None = None,
    ) -> tuple[Float[jax.Array, "B {self.classes}"], Float[jax.Array, "B {self.classes}"] | None]:
        """Logits of normalised images.

        Args:
          images: [B,H,W,C_in].
          train: BN with the statistics of the batch, which update "batch_stats" (make it mutable).
          drop_path: rate in [0,1) at which every operation output of a sample but identities is dropped; needs `train`
            and rngs={"drop_path": key}, the same key on all devices. An array may change without recompilation.
          positions: int[B], of the samples in the global batch; default 0..B-1.

        Returns:
          (logits float32[B,classes], the auxiliary head's or None).

        Raises:
          UserError: a field out of range, or images that do not fit the auxiliary head.
        """
        if images.ndim != 4:
            raise UserError(f"images: an array of shape {images.shape}; allowed: [batch, height, width, channels]")
        plan = self.plan(images.shape[3])
        if plan.auxiliary is not None:
            check_auxiliary(self.stem, *images.shape[1:3])
        how = How(None if self.is_initializing() else self.axis_name, self.own_kernels)
        draws = rate = None
        width = max(cell.drops for cell in plan.cells)
        if train and drop_path is not None and width:
            rate = jnp.asarray(drop_path, jnp.float32)
            positions = jnp.arange(images.shape[0]) if positions is None else positions
            by_sample = drop_path_draws(self.make_rng("drop_path"), positions, (len(plan.cells), width))
            draws = jnp.moveaxis(by_sample, 1, 0)

        states = [images.astype(self.dtype)]
        for name, layer in plan.stem:
            states.append(Part(layer, how, name=name)(states[-1], train=train))
        pair, auxiliary = (states[-len(plan.stem)], states[-1]), None
        for first, end in plan.runs:
            cells = range(first, end)
            # Cells without variables make them one after the other, or say which are missing.
            ready = not self.is_initializing() and all(
                self.has_variable(collection, f"cell_{i}") for collection in ("params", "batch_stats") for i in cells
            )
            if self.scan_cells and ready and len(cells) > 1:
                pair = self._scan(plan, cells, pair, None if draws is None else draws[first:end], rate, train, how)
            else:
                for i in cells:
                    cell = Cell(plan.cells[i], how, name=f"cell_{i}")
                    pair = pair[1], cell(*pair, train=train, draws=None if draws is None else draws[i], rate=rate)
            if plan.auxiliary is not None and first <= plan.auxiliary_after < end:
                auxiliary = Part(plan.auxiliary, how, name="auxiliary")(pair[1], train=train)
        return Part(plan.classifier, how, name="classifier")(pair[1], train=train), auxiliary

    def _scan(
        self,
        plan: NetworkPlan,
        cells: range,
        pair: Pair,
        draws: jax.Array | None,
        rate: jax.Array | None,
        train: bool,
        how: How,
    ) -> Pair:
        """Runs equal cells by a scan over their stacked variables."""
        # The inputs of the first cells differ from the rest in channels, or in size: as 1x1 convolutions of one width
        # (zeros where there is no input) all the cells are the same.
        first = plan.cells[cells[0]]
        width = max(first.channels_out, *(plan.cells[i].width for i in cells))
        dense = preprocess(width, first.channels, False)
        cell = first._replace(preprocess=(Edge("preprocess0", 0, dense), Edge("preprocess1", 1, dense)))

        def stacked(collection: str) -> Params:
            entries = [dict(unfreeze(self.get_variable(collection, f"cell_{i}"))) for i in cells]
            if collection == "params":
                for entry in entries:
                    entry |= {name: dense_preprocess(entry[name], width) for name in ("preprocess0", "preprocess1")}
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *entries)

        def body(pair: Pair, inputs: tuple[Params, Params, jax.Array | None]) -> tuple[Pair, Params]:
            params, statistics, draws = inputs
            y, after = _run_cell(cell, params, statistics, pair, draws, rate, train=train, how=how)
            return (pair[1], widened(y, width, False)), after

        if self.recompute and train and self.axis_name is None:
            policy = jax.checkpoint_policies.save_only_these_names(WORTH_KEEPING)
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        wide = widened(pair[0], width, first.halves), widened(pair[1], width, False)
        pair, after = lax.scan(body, wide, (stacked("params"), stacked("batch_stats"), draws))
        if train:
            for row, i in enumerate(cells):
                self.put_variable("batch_stats", f"cell_{i}", jax.tree.map(lambda leaf, row=row: leaf[row], after))
        return pair[0][..., : first.channels_out], pair[1][..., : first.channels_out]
