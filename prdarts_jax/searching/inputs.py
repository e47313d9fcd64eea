"""From a config (and objects of the caller) to the parts of a search, each with the digest that resume compares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from prdarts_jax import optimizers
from prdarts_jax.config import userfile
from prdarts_jax.config.search import MethodConfig, SearchConfig
from prdarts_jax.config.source_digest import source_digest
from prdarts_jax.data.augment import check_augment
from prdarts_jax.data.batches import check_batch, split_indices
from prdarts_jax.data.sources import Dataset, load
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.run import provenance
from prdarts_jax.run.metrics import check_tensorboard
from prdarts_jax.searching import dry_run
from prdarts_jax.searching.program import Problem
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import registry
from prdarts_jax.strategy import Strategy


class Inputs(NamedTuple):
    """The parts of a search."""

    problem: Problem
    dataset: Dataset
    mesh: Mesh
    digests: dict[str, str]  # what a config cannot hold: data, and source of the user's own code


def prepare(
    config: SearchConfig,
    *,
    weight_tx: optax.GradientTransformation | Callable[[SearchConfig], optax.GradientTransformation] | None = None,
    arch_tx: optax.GradientTransformation | Callable[[SearchConfig], optax.GradientTransformation] | None = None,
    strategy: Strategy | Callable[..., Strategy] | None = None,
    data: Dataset | None = None,
    like: Inputs | None = None,
) -> Inputs:
    """Loads and checks everything a search needs. Nothing is written to the disk but the cache of decoded images.

    Args:
      config: of the search.
      weight_tx, arch_tx: in place of the config's optimizers: a transformation, or a function of the config.
      strategy: in place of the config's method: a Strategy, or a function of `space` that makes one.
      data: in place of the config's source.
      like: of a search that differs in numbers alone: its data and space are taken, and nothing is tried again.

    Raises:
      UserError: anything that is not possible, named by its field.
    """
    check_tensorboard(config.run)
    digests: dict[str, str] = {}
    mesh = sharding.make_mesh(sharding.choose_devices(config.run.devices))
    data = like.dataset if like is not None else data
    dataset = data if data is not None else load(config.data.source, config.run.data_dir or None)
    digests["data"] = dataset.digest
    images = dataset.train_images
    check_augment(images.shape[1:3], crop_padding=config.data.crop_padding, cutout=config.data.cutout)
    check_batch(config.batch_size, len(halves(config, len(images))[0]), mesh.size)

    primitives = userfile.user_primitives(config.space.primitives, "space.primitives", digests)
    space = (
        like.problem.space
        if like is not None
        else Space.create(config.space, classes=dataset.num_classes, in_channels=images.shape[3], user=primitives)
    )
    problem = Problem(
        space=space,
        strategy=_strategy(config, space, strategy, digests),
        weight_tx=optimizers.transformation(
            config, "weights", weight_tx, lambda: optimizers.weight_transform(config.weights), digests
        ),
        arch_tx=optimizers.transformation(
            config, "arch", arch_tx, lambda: optimizers.arch_transform(config.arch), digests
        ),
        data=config.data,
        mean=dataset.mean,
        std=dataset.std,
        dtype=config.dtype,
        local_batch_norm=config.local_batch_norm,
    )
    # What is not the user's has its tests; tracing a large network costs seconds.
    made = {
        "method.strategy": problem.strategy,
        "weights.transform": problem.weight_tx,
        "arch.transform": problem.arch_tx,
    }
    given = {field: value for field, value in made.items() if field in digests}
    if like is None:
        dry_run.search(problem, mesh, images.shape[1:], config.epochs, primitives or {}, given)
    return Inputs(problem, dataset, mesh, digests)


def halves(config: SearchConfig, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images for the weights and of those for the architecture: disjoint, of one size.

    The split is a seeded permutation, so the beginnings of its halves are random subsets (`data.examples`).
    """
    used = config.data.examples // 2 or None
    weights, arch = split_indices(examples, config.seed)
    return weights[:used], arch[:used]


def with_method(config: SearchConfig, strategy: Strategy | Callable[..., Strategy] | None) -> SearchConfig:
    """The config with the method of the caller in the place of its own, so that config.json says what ran."""
    if strategy is None:
        return config
    if isinstance(strategy, Strategy):  # its functions are defined inside its factory
        name = getattr(strategy.sample, "__qualname__", "strategy").partition(".")[0]
    else:
        name = getattr(strategy, "__name__", type(strategy).__name__)
    return dataclasses.replace(config, method=MethodConfig(f"argument:{name}"))


def _strategy(
    config: SearchConfig, space: Space, given: Strategy | Callable[..., Strategy] | None, digests: dict[str, str]
) -> Strategy:
    name = config.method.strategy
    if isinstance(given, Strategy):
        digests["method.strategy"] = source_digest(given)
        return given
    if given is not None:
        digests["method.strategy"] = source_digest(given)
        made = userfile.call(given, space=space, field="method.strategy")
    else:
        factory = functools.partial(
            registry.factory(name), space=space, **registry.resolve_options(name, config.method.options)
        )
        if userfile.is_path(name):
            digests["method.strategy"] = userfile.load(name, "method.strategy").digest
            made = userfile.call(factory, field="method.strategy")
        else:
            made = factory()
    if not isinstance(made, Strategy):
        raise UserError(f"method.strategy: {name!r} made a {type(made).__name__}; allowed: a factory of a Strategy")
    return made


def check_method(config: SearchConfig) -> None:
    """Makes the space and the strategy of a config, without data, and throws them away.

    Raises:
      UserError: an option of the method, an operation or a file of the user that is not possible.
    """
    primitives = userfile.user_primitives(config.space.primitives, "space.primitives", {})
    _strategy(config, Space.create(config.space, classes=2, in_channels=1, user=primitives), None, {})


def document(config: SearchConfig, inputs: Inputs, sources: Mapping[str, str] | None) -> dict[str, Any]:
    """The content of config.json."""
    space = inputs.problem.space
    return provenance.document(
        "search",
        config,
        sources=sources,
        digests=inputs.digests,
        dataset=inputs.dataset,
        mesh=inputs.mesh,
        edges=[list(edge) for edge in space.edges],
        ops=list(space.ops),
    )


def compared(document: Mapping[str, Any]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed run must share: what is computed.

    Data is compared by its digest, not by where it lies; the user's own code by the digest of its source.
    """
    files = ("data.source", "space.primitives", "weights.transform", "arch.transform")
    flat = provenance.compared(document, SearchConfig, files)
    if userfile.is_path(flat["method.strategy"]):
        flat["method.strategy"] = flat["method.strategy"].rpartition(":")[2]
    return flat
