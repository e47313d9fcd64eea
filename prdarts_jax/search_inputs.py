"""From a config (and objects of the caller) to the parts of a search, each with the digest that resume compares."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from prdarts_jax import bilevel, parallel, strategies, userfile
from prdarts_jax import config as cfg
from prdarts_jax.config import MethodConfig, SearchConfig
from prdarts_jax.data.augment import check_augment
from prdarts_jax.data.batches import check_batch, split_indices
from prdarts_jax.data.sources import Dataset, load
from prdarts_jax.errors import UserError
from prdarts_jax.search_program import Problem
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.base import Strategy

_PACKAGES = ("prdarts-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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
) -> Inputs:
    """Loads and checks everything a search needs. Nothing is written to the disk but the cache of decoded images.

    Args:
      config: of the search.
      weight_tx, arch_tx: in place of the config's optimizers: a transformation, or a function of the config.
      strategy: in place of the config's method: a Strategy, or a function of `space` that makes one.
      data: in place of the config's source.

    Raises:
      UserError: anything that is not possible, named by its field.
    """
    digests: dict[str, str] = {}
    mesh = parallel.make_mesh(parallel.choose_devices(config.run.devices))
    dataset = data if data is not None else load(config.data.source, config.run.data_dir or None)
    digests["data"] = dataset.digest
    images = dataset.train_images
    check_augment(images.shape[1:3], crop_padding=config.data.crop_padding, cutout=config.data.cutout)
    check_batch(config.batch_size, len(halves(config, len(images))[0]), mesh.size)

    primitives = None
    if config.space.primitives:
        module = userfile.load_module(config.space.primitives, "space.primitives")
        primitives, digests["space.primitives"] = getattr(module.value, "PRIMITIVES", None), module.digest
        if not isinstance(primitives, Mapping):
            raise UserError(
                f"space.primitives: {config.space.primitives!r} has no dict PRIMITIVES; allowed: name -> Primitive"
            )
    space = Space.create(config.space, classes=dataset.num_classes, in_channels=images.shape[3], user=primitives)
    problem = Problem(
        space=space,
        strategy=_strategy(config, space, strategy, digests),
        weight_tx=_transform(config, "weights", weight_tx, digests),
        arch_tx=_transform(config, "arch", arch_tx, digests),
        data=config.data,
        mean=dataset.mean,
        std=dataset.std,
        dtype=config.dtype,
    )
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
    function = strategy.sample if isinstance(strategy, Strategy) else strategy
    name = getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
    return dataclasses.replace(config, method=MethodConfig(f"argument:{name}"))


def _strategy(
    config: SearchConfig, space: Space, given: Strategy | Callable[..., Strategy] | None, digests: dict[str, str]
) -> Strategy:
    name = config.method.strategy
    if isinstance(given, Strategy):
        digests["method.strategy"] = _source_digest(given.sample)
        return given
    if given is not None:
        digests["method.strategy"] = _source_digest(given)
        made = given(space=space)
    else:
        if userfile.is_path(name):
            digests["method.strategy"] = userfile.load(name, "method.strategy").digest
        made = strategies.get(name, space=space, **config.method.options)
    if not isinstance(made, Strategy):
        raise UserError(f"method.strategy: {name!r} made a {type(made).__name__}; allowed: a factory of a Strategy")
    return made


def _transform(config: SearchConfig, group: str, given: Any, digests: dict[str, str]) -> optax.GradientTransformation:
    section = getattr(config, group)
    field = f"{group}.transform"
    if given is None and section.transform:
        loaded = userfile.load(section.transform, field)
        given, digests[field] = loaded.value, loaded.digest
    elif given is not None:
        digests[field] = _source_digest(given)
    if given is None:
        made = bilevel.weight_transform(config.weights) if group == "weights" else bilevel.arch_transform(config.arch)
    else:
        made = given if isinstance(given, optax.GradientTransformation) else given(config)
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"{field}: got a {type(made).__name__}; allowed: an optax transformation, or a function of the config"
        )
    return made


def _source_digest(value: Any) -> str:
    """SHA-256 of the source of a function (of a transformation: of its update), as far as Python can show it."""
    function = value.update if isinstance(value, optax.GradientTransformation) else value
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def document(config: SearchConfig, inputs: Inputs, sources: Mapping[str, str] | None) -> dict[str, Any]:
    """The content of config.json."""
    space = inputs.problem.space
    return {
        "schema_version": cfg.SCHEMA_VERSION,
        "kind": "search",
        "config": cfg.to_dict(config),
        "sources": dict(sources or {}),
        "digests": inputs.digests,
        "data": {
            "name": inputs.dataset.name,
            "classes": list(inputs.dataset.class_names),
            "mean": list(inputs.dataset.mean),
            "std": list(inputs.dataset.std),
        },
        "edges": [list(edge) for edge in space.edges],
        "ops": list(space.ops),
        "versions": versions(),
        "devices": parallel.describe(inputs.mesh),
        "platform": {"backend": jax.default_backend(), "cores": _cores(), "devices": inputs.mesh.size},
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compared(document: Mapping[str, Any]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed run must share: what is computed.

    Data is compared by its digest, not by where it lies; the user's own code by the digest of its source.
    """
    flat = cfg.computed(cfg.from_dict(SearchConfig, document["config"]))
    for field in ("data.source", "space.primitives", "weights.transform", "arch.transform"):
        flat.pop(field)
    if userfile.is_path(flat["method.strategy"]):
        flat["method.strategy"] = flat["method.strategy"].rpartition(":")[2]
    return flat | {f"digest of {name}": value for name, value in document["digests"].items()}


def tolerance(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why a resumed run may differ in its last bits from one that was not interrupted; empty if it may not.

    >>> tolerance({"platform": {"cores": 2}}, {"platform": {"cores": 4}})
    ['cores 2 -> 4']
    """
    before = {**old.get("versions", {}), **old.get("platform", {})}
    after = {**new.get("versions", {}), **new.get("platform", {})}
    return [f"{k} {before.get(k)} -> {after.get(k)}" for k in sorted(before | after) if before.get(k) != after.get(k)]
