"""From a config (and objects of the caller) to the parts of a search, each with the digest that resume compares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from prdarts_jax import optimizers
from prdarts_jax.config import userfile
from prdarts_jax.config.schema import require
from prdarts_jax.config.search import MethodConfig, SearchConfig
from prdarts_jax.config.userfile import UserObject
from prdarts_jax.data.augment import check_augment
from prdarts_jax.data.batches import check_batch, held_out_digest, hold_out, split_indices
from prdarts_jax.data.sources import Dataset, load
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.ops import kernels
from prdarts_jax.run import provenance
from prdarts_jax.run.metrics import check_tensorboard
from prdarts_jax.searching.own_code import ARCH, METHOD, WEIGHTS, try_out
from prdarts_jax.searching.program import SearchProblem
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import composition, registry
from prdarts_jax.strategy import Strategy

Transformation: TypeAlias = optax.GradientTransformation | Callable[[SearchConfig], optax.GradientTransformation]


class SearchInputs(NamedTuple):
    """The parts of a search."""

    problem: SearchProblem
    dataset: Dataset
    mesh: Mesh
    remake: Callable[[Space, Mapping[str, Any]], Strategy]  # the method on the space, and with the options, of a stage
    digests: dict[str, str]  # what a config cannot hold: data, and the caller's own code


def prepare(
    config: SearchConfig,
    *,
    weight_tx: Transformation | None = None,
    arch_tx: Transformation | None = None,
    strategy: Strategy | Callable[..., Strategy] | None = None,
    data: Dataset | None = None,
    like: SearchInputs | None = None,
) -> SearchInputs:
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
    mesh = sharding.make_mesh(sharding.choose_devices(config.run.devices))
    _check_lowering(config, mesh)
    dataset = _checked_data(config, data if like is None else like.dataset, mesh)
    primitives = userfile.user_primitives(config.space.primitives, "space.primitives")
    space = _space(config, primitives, dataset.num_classes, dataset.image[2]) if like is None else like.problem.space
    parts = {
        METHOD: _method(config, space, strategy),
        WEIGHTS: optimizers.transformation(
            config, "weights", weight_tx, lambda: optimizers.weight_transform(config.weights)
        ),
        ARCH: optimizers.transformation(config, "arch", arch_tx, lambda: optimizers.arch_transform(config.arch)),
    }
    problem = SearchProblem(
        space=space,
        strategy=parts[METHOD].value,
        weight_tx=parts[WEIGHTS].value,
        arch_tx=parts[ARCH].value,
        data=config.data,
        mean=dataset.mean,
        std=dataset.std,
        dtype=config.dtype,
        local_batch_norm=config.local_batch_norm,
        precision=config.precision,
        cell=config.run.lowering,
    )
    # What is the library's has its tests, and tracing a large network costs seconds.
    arguments = zip(parts, (strategy, weight_tx, arch_tx), strict=True)
    own = {field: parts[field].value for field, given in arguments if given is not None or parts[field].digest}
    problem = _on_plain_parameters(problem, own)
    check_first_stage(config, problem.strategy)
    digests = {field: part.digest for field, part in {"space.primitives": primitives, **parts}.items() if part.digest}
    if like is None:
        digests = try_out(problem, mesh, dataset.image, config.epochs, primitives.value, own) | digests
    else:
        digests = {field: like.digests[field] for field in own} | digests
    held_out = held_out_digest(dataset.train_size, config.data.holdout, config.data.holdout_seed)
    remake = functools.partial(_method_of_stage, config, strategy)
    return SearchInputs(problem, dataset, mesh, remake, {"data": dataset.digest, **held_out, **digests})


def _on_plain_parameters(problem: SearchProblem, own: Mapping[str, Any]) -> SearchProblem:
    """The problem, its caller's optimizers taking plain parameters."""
    shapes: dict[str, Callable[..., Any]] = {
        WEIGHTS: functools.partial(supernet.init, space=problem.space),
        ARCH: problem.strategy.init,
    }
    for field, attribute in ((WEIGHTS, "weight_tx"), (ARCH, "arch_tx")):
        if field in own:
            with userfile.errors_of({field: own[field]}):
                parameters = jax.eval_shape(shapes[field], jax.random.key(0))
                tx = optimizers.on_plain_parameters(getattr(problem, attribute), parameters)
            problem = problem._replace(**{attribute: tx})
    return problem


def check_first_stage(config: SearchConfig, strategy: Strategy) -> None:
    """Looks at what a strategy makes of the epochs of a search before anything runs.

    Raises:
      UserError: there are too few epochs, or too many.
    """
    first = userfile.call(strategy.stage_epochs, config.epochs, field=METHOD)
    require(1 <= first <= config.epochs, f"{METHOD}.stage_epochs", first, f"1..{config.epochs}, the epochs")
    check_schedule(strategy, first)


def check_schedule(strategy: Strategy, epochs: int) -> None:
    """Calls the schedule of a stage for each of its epochs: a compiled step takes the same numbers in all of them.

    Raises:
      UserError: it raises, or a number is there in some epochs alone.
    """
    names = [set(userfile.call(strategy.schedule, epoch, epochs, field=METHOD)) for epoch in range(epochs)]
    for epoch, found in enumerate(names):
        if found != names[0]:
            some = f"{' | '.join(sorted(found ^ names[0]))} in one of the epochs 0 and {epoch} alone"
            raise UserError(f"{METHOD}: schedule has {some}; allowed: the same names in every epoch of a stage")


def _check_lowering(config: SearchConfig, mesh: Mesh) -> None:
    """CPU kernels run a cell of float32 whose statistics are those of one device."""
    if config.run.lowering != "kernels":
        return
    alone = mesh.size == 1 or config.local_batch_norm
    served = sharding.lowering_of(mesh).own_kernels and kernels.kernels().loaded
    where = "on a CPU with a C++ compiler, of one device or --local-batch-norm, with --dtype float32"
    holds = served and alone and config.dtype == "float32"
    require(holds, "run.lowering", config.run.lowering, f"auto | scan | waves; kernels {where}")


def _checked_data(config: SearchConfig, data: Dataset | None, mesh: Mesh) -> Dataset:
    """The images of a search, if they can be batched and augmented as the config says."""
    dataset = data if data is not None else load(config.data.source, config.run.data_dir or None)
    check_augment(dataset.image[:2], crop_padding=config.data.crop_padding, cutout=config.data.cutout)
    check_batch(config.batch_size, min(map(len, halves(config, dataset.train_size))), mesh.size)
    return dataset


def _space(config: SearchConfig, primitives: UserObject, classes: int, channels: int) -> Space:
    return Space.create(config.space, classes=classes, in_channels=channels, user=primitives.value)


def _method_of_stage(
    config: SearchConfig, argument: Strategy | Callable[..., Strategy] | None, space: Space, options: Mapping[str, Any]
) -> Strategy:
    """The method of a search again, on the space of a later stage."""
    if isinstance(argument, Strategy):
        raise UserError(f"{METHOD}: a Strategy cannot be made again for a new stage; allowed: its factory")
    return _method(config, space, argument, options).value


def _method(
    config: SearchConfig,
    space: Space,
    argument: Strategy | Callable[..., Strategy] | None,
    changes: Mapping[str, Any] | None = None,
) -> UserObject:
    """The strategy of a search, transforms included; with the digest of the user's file if it is from one."""
    transforms = config.method.transforms
    if isinstance(argument, Strategy):
        return UserObject(composition.transformed(argument, transforms))
    name, digest = config.method.strategy, ""
    if argument is not None:
        made = userfile.call(argument, space=space, **(changes or {}), field=METHOD)
    else:
        factory = functools.partial(registry.factory(name), space=space)
        options = registry.resolve_options(name, {**config.method.options, **(changes or {})})
        if userfile.is_path(name):
            digest = userfile.load(name, METHOD).digest
            made = userfile.call(functools.partial(factory, **options), field=METHOD)
        else:
            made = factory(**options)
    if not isinstance(made, Strategy):
        raise UserError(f"{METHOD}: {name!r} made a {type(made).__name__}; allowed: a factory of a Strategy")
    return UserObject(composition.transformed(made, transforms), digest)


def check_method(config: SearchConfig) -> None:
    """Makes the space and the strategy of a config, without data, and throws them away.

    Raises:
      UserError: an option of the method, an operation or a file of the user that is not possible.
    """
    primitives = userfile.user_primitives(config.space.primitives, "space.primitives")
    _method(config, _space(config, primitives, classes=2, channels=1), None)


def halves(config: SearchConfig, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images for the weights and of those for the architecture: disjoint parts, or one set twice.

    The split is a seeded permutation, so the beginnings of its parts are random subsets (`data.examples`).
    """
    data, (kept, _) = config.data, hold_out(examples, config.data.holdout, config.data.holdout_seed)
    parts = split_indices(len(kept), config.seed, shares=data.shares)
    if data.examples:
        # Of `data.examples` images each part has its share; one shared set has all of them.
        of_all = (1.0, 1.0) if data.shares is None else [share / sum(data.shares) for share in data.shares]
        sizes = [int(data.examples * share + 1e-9) for share in of_all]
        parts = parts[0][: sizes[0]], parts[1][: sizes[1]]
    return kept[parts[0]], kept[parts[1]]


def with_method(config: SearchConfig, strategy: Strategy | Callable[..., Strategy] | None) -> SearchConfig:
    """The config with the method of the caller in the place of its own, so that config.json says what ran."""
    if strategy is None:
        return config
    if isinstance(strategy, Strategy):  # its functions are defined inside its factory
        name = getattr(strategy.sample, "__qualname__", "strategy").partition(".")[0]
    else:
        name = getattr(strategy, "__name__", type(strategy).__name__)
    return dataclasses.replace(config, method=MethodConfig(f"argument:{name}", transforms=config.method.transforms))


def document(config: SearchConfig, inputs: SearchInputs, sources: Mapping[str, str] | None) -> dict[str, Any]:
    """The content of config.json."""
    space = inputs.problem.space
    edges, ops = [list(edge) for edge in space.edges], list(space.ops)
    return provenance.document("search", config, inputs, sources, edges=edges, ops=ops)


def compared(document: Mapping[str, Any]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed run must share: what is computed.

    Data is compared by its digest, not by where it lies; the user's own code by the digest of its file, or of what it
    computes (`own_code`).
    """
    files = ("data.source", "space.primitives", "weights.transform", "arch.transform")
    flat = provenance.compared(document, SearchConfig, files)
    if userfile.is_path(flat["method.strategy"]):
        flat["method.strategy"] = flat["method.strategy"].rpartition(":")[2]
    return flat
