"""From a config and a genotype to the parts of a training, each with the digest that resume compares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from prdarts_jax import optimizers
from prdarts_jax.config import userfile
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data.augment import check_augment
from prdarts_jax.data.batches import check_batch, held_out_digest, hold_out, split_indices
from prdarts_jax.data.sources import Dataset
from prdarts_jax.data.stream_source import AnyDataset, StreamedDataset, choose
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.network.plan import check_auxiliary
from prdarts_jax.ops.check import check_primitives
from prdarts_jax.ops.primitives import PRIMITIVES, Primitive
from prdarts_jax.run import provenance
from prdarts_jax.run.metrics import check_tensorboard
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES
from prdarts_jax.training.program import TrainProblem

Transformation: TypeAlias = optax.GradientTransformation | Callable[[TrainConfig], optax.GradientTransformation]


class TrainInputs(NamedTuple):
    """The parts of a training."""

    problem: TrainProblem
    genotype: Genotype
    dataset: AnyDataset
    mesh: Mesh
    digests: dict[str, str]  # what a config cannot hold: data, genotype, and source of the user's own code


def prepare(
    config: TrainConfig,
    genotype: Genotype | str | Path,
    *,
    weight_tx: Transformation | None = None,
    data: Dataset | None = None,
) -> TrainInputs:
    """Loads and checks everything a training needs. Nothing is written to the disk but the cache of decoded images.

    Args:
      config: of the training.
      genotype: a Genotype, or what `Genotype.load` takes.
      weight_tx: in place of the config's optimizer: a transformation, or a function of the config.
      data: in place of the config's source.

    Raises:
      UserError: anything that is not possible, named by its field.
    """
    check_tensorboard(config.run)
    genotype = genotype if isinstance(genotype, Genotype) else Genotype.load(genotype)
    mesh = sharding.make_mesh(sharding.choose_devices(config.run.devices))
    operations = userfile.user_primitives(config.network.primitives, "network.primitives")
    genotype.validate_ops({**PRIMITIVES, **operations.value})
    dataset = _checked_data(config, choose(config.data, config.run.data_dir or None, data), mesh)
    optimizer = optimizers.transformation(config, "weights", weight_tx, lambda: optimizers.sgd(config))
    normalization = (dataset.mean, dataset.std)
    problem = make_problem(
        config, genotype, dataset.num_classes, normalization, tx=optimizer.value, operations=operations.value
    )
    problem.network.plan(dataset.image[2])  # a genotype whose cell has no output is refused here
    check_primitives(
        {name: one for name, one in operations.value.items() if one is not PRIMITIVES.get(name)},
        _uses(genotype),
        channels=2 * config.network.channels,
        size=dataset.image[:2],
        dtype=config.dtype,
        field="network.primitives",
    )
    program = ""
    if weight_tx is not None or optimizer.digest:
        problem, program = with_own_optimizer(problem, dataset.image)
    digests = {
        "genotype": hashlib.sha256(genotype.to_json().encode()).hexdigest(),
        "data": dataset.digest,
        **held_out_digest(dataset.train_size, config.data.holdout, config.data.holdout_seed),
        "network.primitives": operations.digest,
        "weights.transform": optimizer.digest or program,
    }
    return TrainInputs(problem, genotype, dataset, mesh, {field: text for field, text in digests.items() if text})


def _checked_data(config: TrainConfig, dataset: AnyDataset, mesh: Mesh) -> AnyDataset:
    """The images of a training, if they can be batched, augmented and evaluated as the config says."""
    height, width, _ = dataset.image
    check_augment((height, width), crop_padding=config.data.crop_padding, cutout=config.data.cutout)
    check_batch(config.batch_size, len(examples(config, dataset.train_size)), mesh.size)
    if config.network.auxiliary:
        check_auxiliary(config.network.stem, height, width)
    if config.evaluate_every and not dataset.test_size:
        raise UserError(
            f"data.source: {dataset.name!r} has no test images, by which a training is measured; "
            "allowed: a set with test images, or --evaluate-every 0"
        )
    return dataset


def with_own_optimizer(problem: TrainProblem, image: tuple[int, ...]) -> tuple[TrainProblem, str]:
    """The problem with the caller's own optimizer on plain parameters, and the SHA-256 of what that computes.

    Raises:
      UserError: what it raises, in one line.
    """
    images = jax.ShapeDtypeStruct((2, *image), np.dtype(problem.network.dtype))
    shapes = jax.eval_shape(problem.network.init, jax.random.key(0), images)["params"]
    with userfile.errors_of({"weights.transform": problem.tx}):
        tx = optimizers.on_plain_parameters(problem.tx, shapes)
        return problem._replace(tx=tx), hashlib.sha256(optimizers.program_text(tx, shapes).encode()).hexdigest()


def examples(config: TrainConfig, count: int) -> np.ndarray:
    """Indices int32[n] of the training images that are used: all that are not held out, or a seeded random subset.

    >>> len(examples(TrainConfig(), 7))
    7
    """
    used = config.data.examples
    kept, _ = hold_out(count, config.data.holdout, config.data.holdout_seed)
    if not used or used >= len(kept):
        return kept
    return kept[np.concatenate(split_indices(len(kept), config.seed))[:used]]


def _uses(genotype: Genotype) -> set[tuple[str, int]]:
    """(operation, stride) of the edges of a genotype: those from the inputs of a reduction cell have stride 2."""
    normal, reduce = ([pair for node in genotype.cell(kind)[0] for pair in node] for kind in CELL_TYPES)
    return {(op, 1) for op, _ in normal} | {(op, 2 if source < 2 else 1) for op, source in reduce}


def make_problem(
    config: TrainConfig,
    genotype: Genotype,
    classes: int,
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    tx: optax.GradientTransformation | None = None,
    operations: Mapping[str, Primitive] | None = None,
) -> TrainProblem:
    """The static parts of a training, without its data.

    Args:
      config: of the training.
      genotype: of the cells.
      classes: K.
      normalization: (mean, std) of the training images.
      tx: the optimizer; default: the config's SGD.
      operations: the user's, by name, which extend or replace the built-in ones; `prepare` alone
        loads those of the config's file.
    """
    network = DerivedNetwork(
        genotype,
        channels=config.network.channels,
        cells=config.network.cells,
        classes=classes,
        stem=config.network.stem,
        auxiliary=config.network.auxiliary,
        dtype=config.dtype,
        primitives=tuple({**PRIMITIVES, **(operations or {})}.items()),
        auxiliary_second_norm=config.network.auxiliary_second_norm,
    )
    return TrainProblem(
        network=network,
        tx=optimizers.sgd(config) if tx is None else tx,
        data=config.data,
        mean=normalization[0],
        std=normalization[1],
        drop_path=config.drop_path > 0,
        auxiliary_weight=config.auxiliary_weight,
        label_smoothing=config.label_smoothing,
        ema=config.ema,
        local_batch_norm=config.local_batch_norm,
        precision=config.precision,
    )


def document(config: TrainConfig, inputs: TrainInputs, sources: Mapping[str, str] | None) -> dict[str, Any]:
    """The content of config.json."""
    image, streamed = list(inputs.dataset.image), isinstance(inputs.dataset, StreamedDataset)
    return provenance.document("train", config, inputs, sources, image=image, streamed=streamed)


def compared(document: Mapping[str, Any]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed run must share: what is computed."""
    return provenance.compared(document, TrainConfig, ("data.source", "network.primitives", "weights.transform"))
