"""How good a trained network is: loss, top-1 and top-5, accuracy of each class, calibration error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax import optimizers
from prdarts_jax.config import schema, userfile
from prdarts_jax.config.places import expanded
from prdarts_jax.config.schema import require_names
from prdarts_jax.config.train import TrainConfig, TrainDataConfig
from prdarts_jax.data import prefetch
from prdarts_jax.data.batches import Images, check_batch, held_out_digest, hold_out, padded_batches
from prdarts_jax.data.sources import Dataset
from prdarts_jax.data.stream_source import AnyDataset, StreamedDataset, choose, measured_on
from prdarts_jax.devices import processes, sharding
from prdarts_jax.errors import RunError, UserError, warn
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.workdir import NOUNS, atomic_write_json
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program
from prdarts_jax.training.program import Outputs, TrainProblem, Variables

BINS = 15  # of the calibration error
PARTS = ("test", "holdout")
_TOP = 5


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of one set of weights; accuracies are shares of 1."""

    loss: float  # mean cross-entropy in nats, without label smoothing
    accuracy: float  # top-1
    top5: float  # share of images whose class is among the five most probable
    calibration_error: float  # expected calibration error, 15 bins
    class_accuracy: tuple[float, ...]  # of each class; NaN without images of it
    class_images: tuple[int, ...]  # images of each class


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    workdir: Path
    source: str  # of the images
    part: str  # "test" | "holdout": the test images, or the training images that the training never saw
    images: int
    epoch: int | None  # epochs trained; None: imported
    step: int | None
    class_names: tuple[str, ...]
    figures: Figures
    ema: Figures | None  # of the averaged weights, where the training kept them

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        row = {
            "schema_version": schema.SCHEMA_VERSION,
            "data": self.source,
            "part": self.part,
            "images": self.images,
            "epoch": self.epoch,
            "step": self.step,
            "classes": list(self.class_names),
            **_plain(self.figures),
        }
        return row | ({"ema": _plain(self.ema)} if self.ema else {})

    def _repr_html_(self) -> str:
        from prdarts_jax.report.notebook import result_html

        return result_html(f"Evaluation: {self.images} images of {self.source}", dataclasses.asdict(self.figures))


def _plain(figures: Figures) -> dict[str, Any]:
    row = dataclasses.asdict(figures)
    row["class_accuracy"] = [None if np.isnan(share) else share for share in figures.class_accuracy]
    return row


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: sum over bins of (n_b / n) |accuracy_b - confidence_b|.

    Args:
      confidence: [n], the largest probability of each image; the bins are ((b-1)/bins, b/bins].
      right: bool [n].
      bins: how many, of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), equation 3.

    >>> calibration_error(np.array([0.75, 0.75, 0.5]), np.array([True, False, True]))  # (|1 - 1.5| + |1 - 0.5|) / 3
    0.3333333333333333
    """
    confidence = np.asarray(confidence, float)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=np.asarray(right, float) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def figures(loss: np.ndarray, rank: np.ndarray, confidence: np.ndarray, labels: np.ndarray, classes: int) -> Figures:
    """The figures from those of each image, [n] each, see `train_program.Outputs`."""
    right = rank == 0
    images = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, weights=right, minlength=classes)
    shares = np.divide(hits, images, out=np.full(classes, np.nan), where=images > 0)
    return Figures(
        loss=float(np.mean(loss, dtype=np.float64)),
        accuracy=float(np.mean(right)),
        top5=float(np.mean(rank < _TOP)),
        calibration_error=calibration_error(confidence, right),
        class_accuracy=tuple(shares.tolist()),
        class_images=tuple(images.tolist()),
    )


Measure = Callable[[Variables], Figures]  # the figures of weights, which lie on the devices, on all test images


def make_measure(
    program: Callable[..., Outputs],
    dataset: AnyDataset,
    options: TrainDataConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    workers: int,
) -> Measure:
    """A function from weights to their figures on every test image, each counted exactly once.

    The last batch is filled up, and what fills it is not counted.

    Args:
      program: of `make_evaluation`, streamed if the data set is.
      dataset: with test images.
      options: how streamed images are made.
      mesh: of the program.
      batch_size: global; a multiple of the devices.
      workers: that read streamed images, see `prefetch.prefetched`.

    Returns:
      the function; it raises RunError where the loss is not finite, UserError where an image cannot be read.
    """
    order, mask = padded_batches(dataset.test_size, batch_size)

    def on_each_batch(variables: Variables) -> list[Any]:
        """Loss, rank, confidence and label of each image, [S,B], of images that are read meanwhile."""
        assert isinstance(dataset, StreamedDataset)
        index, count = jax.process_index(), jax.process_count()
        batches = prefetch.test_batches(
            dataset, options, batch_size=batch_size, process_index=index, process_count=count
        )

        def place(batch: Images) -> Images:
            return sharding.split_batch(mesh, batch)

        with prefetch.prefetched(batches, place, workers=workers) as items:
            rows = [processes.fetch((*program(variables, data), data.labels)) for data in items]
        return [np.stack(values) for values in zip(*rows, strict=True)]

    def measure(variables: Variables) -> Figures:
        if isinstance(dataset, StreamedDataset):
            loss, rank, confidence, labels = (value[mask] for value in on_each_batch(variables))
        else:
            loss, rank, confidence = (v[mask] for v in processes.fetch(program(variables, placed, resident)))
            labels = dataset.test_labels
        if not np.isfinite(mean := np.mean(loss)):  # comparisons with NaN would count as right
            raise RunError(f"test_loss is {mean}: the weights are not finite; the last good checkpoint is kept")
        return figures(loss, rank, confidence, labels, dataset.num_classes)

    if not isinstance(dataset, StreamedDataset):
        resident = sharding.replicate(mesh, Images(dataset.test_images, dataset.test_labels))
        placed = sharding.place(mesh, order, PartitionSpec(None, sharding.AXIS))
    return measure


def evaluate(
    workdir: str | Path,
    *,
    part: str = "test",
    source: str | None = None,
    data_dir: str | None = None,
    data: Dataset | None = None,
    batch_size: int | None = None,
    devices: str = "all",
    workers: str = "auto",
    weight_tx: Any = None,
) -> Evaluation:
    """Evaluates the newest good checkpoint of a training, finished or not, and writes WORKDIR/evaluation.json.

    Args:
      workdir: of the training, or one with an imported network (network.safetensors alone).
      part: "test" | "holdout": the training images that the training left out (`data.holdout`), of its own data.
      source: of the test images; default: the data it was trained on.
      data_dir: TFDS data directory; default: that of the training.
      data: in place of a source.
      batch_size: global; default: that of the training.
      devices: N | all.
      workers: auto | N processes that decode streamed images; 0 = threads of this one.
      weight_tx: the optimizer, if the training was given one as an argument (its state is in the checkpoint).

    Raises:
      UserError: no training in the workdir, no checkpoint, or data that does not fit the network.
      RunError: no checkpoint can be used, or the disk fails.
    """
    require_names("part", [part], PARTS)
    workdir = expanded(workdir, "workdir")
    mesh = sharding.make_mesh(sharding.choose_devices(devices))
    path = workdir / "network.safetensors"
    alone = path.is_file() and not (workdir / "config.json").is_file()
    net = _imported(path) if alone else restore(workdir, mesh, weight_tx)
    batch_size = net.batch_size if batch_size is None else batch_size
    check_batch(batch_size, max(batch_size, 1), mesh.size)
    name = source if source is not None else data.name if data is not None else net.source
    if name is None:
        raise UserError("--data: the network was imported and names no data; allowed: a source with test images")
    options = dataclasses.replace(net.data, source=source or net.data.source)
    dataset = choose(options, data_dir or net.data_dir or None, data)
    if data is None and source is None and dataset.digest != net.digest:
        raise UserError(
            f"data.source: {name!r} is no longer the data of the training; name the data to evaluate: --data SOURCE"
        )
    classes = net.problem.network.classes
    if part == "holdout":
        dataset = _held_out(net, dataset)
    if not dataset.test_size:
        raise UserError(f"data.source: {name!r} has no test images; allowed: a set with test images")
    if dataset.num_classes != classes or dataset.image != net.image:
        shown = f"{dataset.num_classes} classes, images {list(dataset.image)}"
        wanted = f"{classes} classes, images {list(net.image)}"
        raise UserError(f"data.source: {name!r} has {shown}; allowed: {wanted} as the network was trained with")
    if data is None:
        _same_classes(net.class_names, dataset.class_names, name)
    program = train_program.make_evaluation(net.problem, mesh, streamed=isinstance(dataset, StreamedDataset))
    measure = make_measure(
        program, dataset, options, mesh, batch_size=batch_size, workers=prefetch.worker_count(workers)
    )
    result = Evaluation(
        workdir=workdir,
        source=name,
        part=part,
        images=dataset.test_size,
        epoch=net.epoch,
        step=net.step,
        class_names=net.class_names or dataset.class_names,
        figures=measure(sharding.replicate(mesh, net.variables)),
        ema=None if net.ema is None else measure(sharding.replicate(mesh, net.ema)),
    )
    atomic_write_json(workdir / "evaluation.json", result.to_json())
    return result


def _held_out(net: Restored, dataset: AnyDataset) -> AnyDataset:
    """The set with the images that a training left out in the place of its test images."""
    if not net.held_out or dataset.digest != net.digest:
        has = "it left out none" if not net.held_out else "these are not its data"
        raise UserError(f"part: 'holdout' is of the images of a training that it left out ({has}); allowed: test")
    choice = (dataset.train_size, net.data.holdout, net.data.holdout_seed)
    if held_out_digest(*choice)["data.holdout"] != net.held_out:
        raise UserError(
            f"part: this numpy {np.__version__} chooses other images to hold out; allowed: that of training"
        )
    return measured_on(dataset, hold_out(*choice)[1])


def _same_classes(trained: Sequence[str], found: Sequence[str], name: str) -> None:
    """Label k must mean the same class: figures of others would look like those of a bad network."""
    named = all(names and not all(n.isdigit() for n in names) for names in (trained, found))  # numbers say nothing
    if named and tuple(trained) != tuple(found):
        k = next(k for k, (a, b) in enumerate(zip(trained, found, strict=True)) if a != b)
        raise UserError(
            f"data.source: {name!r} has class {found[k]!r} as number {k}; "
            f"allowed: the classes the network was trained with, in their order ({trained[k]!r})"
        )


class Restored(NamedTuple):
    """A network to evaluate, and what it was trained with."""

    problem: TrainProblem
    variables: Variables
    ema: Variables | None
    image: tuple[int, ...]  # (H, W, C)
    class_names: tuple[str, ...]  # empty: unknown
    epoch: int | None = None
    step: int | None = None
    source: str | None = None
    data: TrainDataConfig = TrainDataConfig()  # how its images are made
    digest: str = ""
    held_out: str = ""  # digest of the choice of images that it never saw; empty: none
    data_dir: str = ""
    batch_size: int = 128


def own_primitives(workdir: Path) -> Mapping[str, Any]:
    """The operations that a training took from its user's file; none without one.

    Raises:
      UserError: no training in the workdir, or the file is no longer what it ran with.
    """
    config, head = _read_config(workdir)
    field, file = "network.primitives", config.network.primitives
    primitives = userfile.user_primitives(file, field)
    if primitives.digest != head["digests"].get(field, ""):
        raise UserError(f"{field}: {file!r} is not what the training ran with; allowed: the file as it was then")
    return primitives.value


def restore(workdir: Path, mesh: Mesh | None = None, weight_tx: Any = None) -> Restored:
    """The newest good checkpoint of a training, finished or not.

    Args:
      workdir: of the training.
      mesh: the devices it is put on; default: one.
      weight_tx: the optimizer, if the training was given one as an argument (its state is in the checkpoint).

    Raises:
      UserError: no training in the workdir, or no checkpoint yet.
      RunError: no checkpoint can be used.
    """
    mesh = sharding.make_mesh(sharding.visible()[:1]) if mesh is None else mesh
    config, head = _read_config(workdir)
    # Neither is part of what the state looks like, and either may be impossible here.
    run = dataclasses.replace(config.run, devices="all")
    config = dataclasses.replace(config, run=run)
    genotype = Genotype.load(workdir / "genotype.json")
    names, image = tuple(head["data"]["classes"]), tuple(head["image"])
    normalization = (tuple(head["data"]["mean"]), tuple(head["data"]["std"]))
    operations = own_primitives(workdir)
    optimizer = optimizers.transformation(config, "weights", weight_tx, lambda: optimizers.sgd(config))
    problem = train_inputs.make_problem(
        config, genotype, len(names), normalization, tx=optimizer.value, operations=operations
    )
    if weight_tx is not None or optimizer.digest:
        problem, _ = train_inputs.with_own_optimizer(problem, image)
    target = train_program.abstract_carry(problem, mesh, jax.random.key(0), image)
    with Checkpointer(workdir / "checkpoints", warn=warn) as saved:
        found = saved.restore_latest(target)
    if found is None:
        raise UserError(f"WORKDIR: {workdir} holds no checkpoint yet; allowed: a training that has saved one")
    state = found.state.state
    return Restored(
        problem,
        state.variables,
        state.ema,
        image,
        names,
        epoch=int(found.info["epoch"]),
        step=found.step,
        source=config.data.source,
        data=config.data,
        digest=head["digests"]["data"],
        held_out=head["digests"].get("data.holdout", ""),
        data_dir=config.run.data_dir,
        batch_size=config.batch_size,
    )


def _imported(path: Path) -> Restored:
    """A network without a training behind it."""
    from prdarts_jax.interop import export

    net, variables, about = export.load_network(path)
    normalization = (tuple(about["mean"]), tuple(about["std"]))
    problem = train_inputs.make_problem(TrainConfig(), net.genotype, net.classes, normalization)._replace(network=net)
    made = Variables(variables["params"], variables["batch_stats"])
    image = tuple(about["image"])
    # A network with ImageNet's stem sees centre crops of images of any size.
    data = TrainDataConfig(image_size=image[0], crop_padding=0) if net.stem == "imagenet" else TrainDataConfig()
    return Restored(problem, made, None, image, tuple(about["class_names"]), data=data)


def _read_config(workdir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of a training, and the whole of its config.json."""
    path = workdir / "config.json"
    if not path.is_file():
        seeds = sorted(found.parent.name for found in workdir.glob("seed*/config.json"))
        allowed = f"one of its seeds, {', '.join(seeds)}" if seeds else "the workdir of a training"
        raise UserError(f"WORKDIR: {str(workdir)!r} holds no config.json; allowed: {allowed}")
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        kind = head["kind"]
        if kind == "train":
            return schema.from_dict(TrainConfig, head["config"]), head
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"WORKDIR: {path} is not the config of a training ({reason})") from None
    noun = NOUNS.get(kind, kind)
    raise UserError(f"WORKDIR: {str(workdir)!r} holds a {noun}; allowed: the workdir of a training")
