"""What a trained network is taken away as: a program that runs without this library, or a flat file of its weights.

The program (`stablehlo`) is serialised by jax.export with the weights inside: uint8 images in, logits out, any batch
size. The flat file (`safetensors`) has one tensor a variable, and a description from which the network is rebuilt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prdarts_jax.data.augment import normalize
from prdarts_jax.errors import RunError, UserError, unknown
from prdarts_jax.network.layers import variables_of
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.ops.primitives import PRIMITIVES, Primitive
from prdarts_jax.run.workdir import atomic_write_bytes, atomic_write_text
from prdarts_jax.space.genotype import Genotype

SCHEMA_VERSION = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
NETWORK_FILE = "network.safetensors"  # in a workdir: the network itself, when there is no run behind it
_KEY = "prdarts_jax"  # safetensors metadata: strings only, so one JSON document under one key
# Of DerivedNetwork, that a description repeats.
_FIELDS = ("channels", "cells", "classes", "stem", "auxiliary", "auxiliary_second_norm")
_SEPARATOR = "/"


class Network(NamedTuple):
    """A network that was read from a file."""

    net: DerivedNetwork
    variables: dict[str, Any]  # {"params", "batch_stats"}, NumPy arrays
    description: dict[str, Any]  # see `describe`


# --- the description --------------------------------------------------------------------------------------------------


def describe(
    net: DerivedNetwork,
    image: Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """All that a user of the weights has to know, as JSON values.

    Args:
      net: the network.
      image: (H, W, C) of an image.
      mean, std: [C], of images scaled to 0..1, as the network was trained.
      class_names: one a class; empty: unknown.

    Returns:
      {"schema_version", "genotype", "channels", "cells", "classes", "stem", "auxiliary", "auxiliary_second_norm",
      "image", "mean", "std", "class_names", "own_operations"}: the last are the names whose operations are not those of
      this library.

    Raises:
      UserError: lengths that do not fit each other.

    >>> net = DerivedNetwork(Genotype.named("PRDARTS"), channels=4, cells=3)
    >>> describe(net, (8, 8, 1), mean=(0.5,), std=(0.25,))["channels"]
    4
    """
    if len(image) != 3 or any(size < 1 for size in image):
        raise UserError(f"image: {list(image)}; allowed: height, width, channels, each >= 1")
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != image[2]:
            raise UserError(f"{name}: {len(value)} values for {image[2]} channels; allowed: one a channel")
    if class_names and len(class_names) != net.classes:
        raise UserError(f"class_names: {len(class_names)} for {net.classes} classes; allowed: one a class, or none")
    used = {op for nodes in (net.genotype.normal, net.genotype.reduce) for node in nodes for op, _ in node}
    own = [op for op, primitive in net.primitives if op in used and primitive is not PRIMITIVES.get(op)]
    return {
        "schema_version": SCHEMA_VERSION,
        "genotype": json.loads(net.genotype.to_json()),
        **{field: getattr(net, field) for field in _FIELDS},
        "image": [int(size) for size in image],
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "class_names": [str(name) for name in class_names],
        "own_operations": sorted(own),
    }


def rebuild(description: Mapping[str, Any], primitives: Mapping[str, Primitive] | None = None) -> DerivedNetwork:
    """The network of a description.

    Args:
      description: see `describe`.
      primitives: operations by name beside, or in place of, those of this library.

    Raises:
      UserError: a field is missing, the description is of another version, or it names an operation of its user's own
        that is not among the primitives.

    >>> net = DerivedNetwork(Genotype.named("PDARTS"), channels=4, cells=3, auxiliary=True)
    >>> rebuild(describe(net, (32, 32, 3), mean=(0,) * 3, std=(1,) * 3)) == net
    True
    """
    version = description.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"schema_version: {version!r} of the network is unknown; allowed: {SCHEMA_VERSION}")
    description = {"auxiliary_second_norm": True, **description}  # files of version 0.1.0 do not say it
    for field in ("genotype", *_FIELDS, "image", "mean", "std"):
        if field not in description:
            raise UserError(f"{field}: missing in the description of the network; allowed: what `describe` gives")
    primitives = primitives or {}
    for name in description.get("own_operations", ()):
        if name not in primitives:
            raise UserError(
                f"own_operations: {name!r} of the network is no operation of this library; "
                "allowed: primitives={...} with it, or the workdir of its training"
            )
    fields = {field: description[field] for field in _FIELDS}
    table = tuple({**PRIMITIVES, **primitives}.items())
    return DerivedNetwork(Genotype.from_json(description["genotype"]), **fields, primitives=table)


# --- a program --------------------------------------------------------------------------------------------------------


def stablehlo(
    variables: Mapping[str, Any],
    net: DerivedNetwork,
    image: Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    platforms: Sequence[str] = ("cpu",),
) -> bytes:
    """The evaluated network as a serialised program: uint8 [batch,H,W,C], 0..255, to logits float32 [batch,classes].

        logits = net((x / 255 - mean) / std)         running statistics in BN, no auxiliary head, weights inside

    It runs with JAX alone: `jax.export.deserialize(bytearray(data)).call(images)`, for any batch size.

    Args:
      variables: {"params", "batch_stats"} of the network.
      net: the network.
      image: (H, W, C).
      mean, std: [C], of images scaled to 0..1.
      platforms: where the program is to run, of cpu | cuda | rocm | tpu; none of them has to be present here.

    Raises:
      UserError: an unknown platform, figures that do not fit the image.

    >>> net = DerivedNetwork(Genotype([[("skip_connect", 0)]], [2], [[("max_pool_3x3", 0)]], [2]), channels=2, cells=3)
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> data = stablehlo(variables, net, (8, 8, 1), mean=(0.5,), std=(0.25,))
    >>> jax.export.deserialize(bytearray(data)).call(np.zeros((3, 8, 8, 1), np.uint8)).shape
    (3, 10)
    """
    describe(net, image, mean=mean, std=std)
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown("platforms", platform, PLATFORMS)
    if not platforms:
        raise UserError(f"platforms: none; allowed: at least one of {' | '.join(PLATFORMS)}")
    evaluated = net.clone(auxiliary=False, axis_name=None, own_kernels=False)
    inside = {
        collection: {name: tree for name, tree in variables[collection].items() if name != "auxiliary"}
        for collection in ("params", "batch_stats")
    }

    def logits(images: jax.Array) -> jax.Array:
        return evaluated.apply(inside, normalize(images, mean, std))[0].astype(jnp.float32)

    (batch,) = jax_export.symbolic_shape("batch")
    argument = jax.ShapeDtypeStruct((batch, *image), jnp.uint8)
    return bytes(jax_export.export(jax.jit(logits), platforms=tuple(platforms))(argument).serialize())


def write_stablehlo(
    path: Path,
    variables: Mapping[str, Any],
    net: DerivedNetwork,
    description: Mapping[str, Any],
    *,
    platforms: Sequence[str] = ("cpu",),
) -> Path:
    """Writes the program, and beside it FILE.json: the description, the platforms, what goes in and what comes out.

    Args:
      path: of the program.
      variables: {"params", "batch_stats"} of the network.
      net: the network; its dtype is that of the computation.
      description: see `describe`.
      platforms: see `stablehlo`.

    Returns:
      The path of the JSON file.

    Raises:
      UserError: as `stablehlo`.
      RunError: a file cannot be written; none is left half-written.

    >>> import tempfile
    >>> net = DerivedNetwork(Genotype([[("skip_connect", 0)]], [2], [[("max_pool_3x3", 0)]], [2]), channels=2, cells=3)
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     description = describe(net, (8, 8, 1), mean=(0.5,), std=(0.25,))
    ...     write_stablehlo(Path(folder) / "net.stablehlo", variables, net, description).name
    'net.stablehlo.json'
    """
    image, mean, std = (description[name] for name in ("image", "mean", "std"))
    data = stablehlo(variables, net, image, mean=mean, std=std, platforms=platforms)
    contract = {
        "format": "jax.export",
        "platforms": list(platforms),
        "input": {"dtype": "uint8", "shape": ["batch", *image], "meaning": "pixels 0..255, not normalised"},
        "output": {"dtype": "float32", "shape": ["batch", description["classes"]], "meaning": "logits"},
    }
    beside = Path(f"{path}.json")
    atomic_write_bytes(path, data)
    atomic_write_text(beside, json.dumps({**description, **contract}, indent=1) + "\n")
    return beside


# --- a flat file ------------------------------------------------------------------------------------------------------


def safetensors(variables: Mapping[str, Any], path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes all variables to one safetensors file, under their path in the tree: "params/cell_0/preprocess0/bn/scale".

    Args:
      variables: a tree of dicts with arrays, such as {"params", "batch_stats"}.
      path: of the file; replaced if it is there.
      metadata: JSON values, such as those of `describe`.

    Raises:
      RunError: the file cannot be written; nothing is left half-written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors({"params": {"w": jnp.ones(2)}}, Path(folder) / "a.safetensors", {"classes": 10})
    ...     load_safetensors(Path(folder) / "a.safetensors")
    ({'params': {'w': array([1., 1.], dtype=float32)}}, {'classes': 10})
    """
    flat = traverse_util.flatten_dict(dict(variables), sep=_SEPARATOR)
    # The format stores the bytes of the buffer: a transposed view would come back as another array.
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in flat.items()}
    atomic_write_bytes(path, save(tensors, metadata={_KEY: json.dumps(dict(metadata))}))


def load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the variables as a tree of NumPy arrays, the metadata) of a file that `safetensors` wrote: exactly what went in.

    Raises:
      UserError: no such file, or no safetensors file of this library.

    >>> load_safetensors(Path("absent.safetensors"))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: safetensors: no file 'absent.safetensors'
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"safetensors: no file {str(path)!r}")
    try:
        with safe_open(path, framework="numpy") as file:
            document = (file.metadata() or {}).get(_KEY)
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"safetensors: {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if document is None:
        raise UserError(f"safetensors: {str(path)!r} has no metadata {_KEY!r}; allowed: a file of prdarts export")
    return traverse_util.unflatten_dict(flat, sep=_SEPARATOR), json.loads(document)


def save_network(
    workdir: Path, net: DerivedNetwork, variables: Mapping[str, Any], description: Mapping[str, Any]
) -> None:
    """Writes network.safetensors and genotype.json into a workdir, which is made if absent.

    Args:
      workdir: the folder.
      net: the network.
      variables: {"params", "batch_stats"} of it.
      description: see `describe`.

    Raises:
      UserError: variables that are not those of the network; nothing is created then.
      RunError: a file cannot be written.

    >>> import tempfile
    >>> net = DerivedNetwork(Genotype([[("skip_connect", 0)]], [2], [[("max_pool_3x3", 0)]], [2]), channels=2, cells=3)
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_network(Path(folder), net, variables, describe(net, (8, 8, 1), mean=(0.5,), std=(0.25,)))
    ...     load_network(Path(folder)).net == net
    True
    """
    workdir = Path(workdir)
    check_variables(net, variables, description["image"][2], "variables")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{workdir} could not be made: {error.strerror or error}") from error
    atomic_write_text(workdir / "genotype.json", net.genotype.to_json() + "\n")
    safetensors(variables, workdir / NETWORK_FILE, description)


def load_network(path: Path, primitives: Mapping[str, Primitive] | None = None) -> Network:
    """The network of a safetensors file, ready for `net.apply(variables, images)`.

    Args:
      path: the file, or a workdir that holds network.safetensors.
      primitives: see `rebuild`.

    Raises:
      UserError: no such file, no description in it, or tensors that do not fit the description.

    >>> load_network(Path("absent.safetensors"))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: safetensors: no file 'absent.safetensors'
    """
    path = Path(path)
    if path.is_dir():
        path = path / NETWORK_FILE
    variables, description = load_safetensors(path)
    net = rebuild(description, primitives)
    check_variables(net, variables, description["image"][2], str(path))
    return Network(net, variables, description)


def shapes(net: DerivedNetwork, channels: int = 3) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat name -> shape and dtype of every variable of a network, for images of so many channels.

    >>> net = DerivedNetwork(Genotype.named("PRDARTS"), channels=4, cells=3)
    >>> shapes(net)["params/stem/conv"].shape
    (3, 3, 3, 12)
    """
    declared = variables_of(net.plan(channels).layers)

    def rank(name: tuple[str, ...]) -> tuple[bool, ...]:
        # An error line names the first variable that does not fit: the parameters, the classifier and the other parts
        # beside the cells come first.
        return name[0] != "params", name[1].startswith("cell_"), name[1] != "classifier"

    return {
        _SEPARATOR.join(name): jax.ShapeDtypeStruct(declared[name].shape, jnp.float32)
        for name in sorted(declared, key=rank)
    }


def check_variables(net: DerivedNetwork, variables: Mapping[str, Any], channels: int, where: str) -> None:
    """Refuses variables that are not those of the network.

    Raises:
      UserError: names the first variable that is missing, unknown or of another shape.

    >>> check_variables(DerivedNetwork(Genotype.named("PRDARTS")), {}, 3, "a.safetensors")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: a.safetensors: params/classifier/kernel is missing; allowed: the variables of the described network
    """  # noqa: E501 (the message is one line)
    expected = shapes(net, channels)
    arrays = traverse_util.flatten_dict(dict(variables), sep=_SEPARATOR)
    for name in (*expected, *arrays):
        if name not in expected or name not in arrays:
            problem = "missing" if name in expected else "unknown"
            raise UserError(f"{where}: {name} is {problem}; allowed: the variables of the described network")
        shape = np.shape(arrays[name])
        if shape != expected[name].shape:
            raise UserError(f"{where}: {name} has shape {list(shape)}; allowed: {list(expected[name].shape)}")
