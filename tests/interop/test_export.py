"""What is taken away: the program runs with jax alone and computes the same, the flat file gives back the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from oracles import quick_jit
from safetensors.numpy import save_file

from prdarts_jax.cli import export as cli_export
from prdarts_jax.errors import UserError
from prdarts_jax.interop import export
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.space.genotype import Genotype

IMAGE, MEAN, STD = (8, 8, 3), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# Every kind of lowering: depthwise and dense convolutions, both pools, a strided skip, two equal cells (one scan).
TINY = Genotype(
    [[("sep_conv_3x3", 1), ("skip_connect", 0)], [("max_pool_3x3", 2), ("dil_conv_3x3", 0)]],
    [2, 3],
    [[("skip_connect", 0), ("avg_pool_3x3", 1)]],
    [2],
)


class Trained(NamedTuple):
    net: DerivedNetwork
    variables: dict[str, Any]
    description: dict[str, Any]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A network whose variables, running statistics too, are nowhere at their initial values."""
    net = DerivedNetwork(TINY, channels=4, cells=6, classes=5)
    assert (0, 2) in net.plan().runs
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32))

    def values(shape: jax.ShapeDtypeStruct, low: float) -> np.ndarray:
        fan_in = max(np.prod(shape.shape[:-1]), 1)
        return (rng.uniform(low, 1.5, shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    variables = {
        "params": jax.tree.map(lambda shape: values(shape, -1.5), shapes["params"]),
        "batch_stats": jax.tree.map(lambda shape: values(shape, 0.5), shapes["batch_stats"]),
    }
    names = [f"class {i}" for i in range(5)]
    return Trained(net, variables, export.describe(net, IMAGE, mean=MEAN, std=STD, class_names=names))


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same_bits(a: Any, b: Any) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())


# --- the program ------------------------------------------------------------------------------------------------------

ALONE = """
import sys, numpy as np, jax
program = jax.export.deserialize(bytearray(open("net.stablehlo", "rb").read()))
batches = np.load("images.npz")
np.savez("logits.npz", **{name: program.call(batches[name]) for name in batches})
ours = {name.split(".")[0] for name in sys.modules} & {"prdarts_jax", "flax", "optax", "orbax", "chex"}
assert not ours, ours
"""


def test_the_program_runs_with_jax_alone(trained: Trained, tmp_path: Path) -> None:
    beside = export.write_stablehlo(tmp_path / "net.stablehlo", trained.variables, trained.net, trained.description)
    rng = np.random.default_rng(1)
    batches = {f"of{n}": rng.integers(0, 256, (n, *IMAGE), np.uint8) for n in (2, 7)}
    np.savez(tmp_path / "images.npz", **batches)
    # `jax.export` is a submodule that `import jax` alone does not load in every version.
    code = ALONE.replace("import sys, numpy as np, jax", "import sys, numpy as np, jax, jax.export")
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    found = np.load(tmp_path / "logits.npz")
    plain = trained.net.clone(scan_cells=False)
    apply = quick_jit(lambda images: plain.apply(trained.variables, images)[0])
    for name, images in batches.items():
        normalised = (images / 255.0 - np.array(MEAN)) / np.array(STD)
        expected = np.asarray(apply(jnp.asarray(normalised, jnp.float32)))
        assert found[name].dtype == np.float32 and np.std(expected) > 1e-2
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)

    contract = json.loads(beside.read_text())
    assert beside.name == "net.stablehlo.json"
    assert contract["input"]["shape"] == ["batch", *IMAGE] and contract["output"]["shape"] == ["batch", 5]
    assert (contract["mean"], contract["std"]) == (list(MEAN), list(STD))
    assert contract["class_names"] == trained.description["class_names"] and contract["platforms"] == ["cpu"]


def test_a_program_for_several_platforms_and_without_the_auxiliary_head(trained: Trained) -> None:
    net = DerivedNetwork(TINY, channels=4, cells=3, auxiliary=True)
    rng = np.random.default_rng(0)
    flat = {name: rng.uniform(0.5, 1, shape.shape).astype(np.float32) for name, shape in export.shapes(net).items()}
    variables = export.traverse_util.unflatten_dict(flat, sep="/")
    platforms = ("cpu", "cuda", "tpu")
    data = export.stablehlo(variables, net, (32, 32, 3), mean=MEAN, std=STD, platforms=platforms)
    program = jax.export.deserialize(bytearray(data))
    assert program.platforms == platforms
    assert [str(size) for size in program.in_avals[0].shape] == ["batch", "32", "32", "3"]
    assert program.in_avals[0].dtype == jnp.uint8 and len(program.out_avals) == 1
    head = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]["auxiliary"]))
    assert head > 1e6 > len(data)


# --- the flat file ----------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    export.safetensors(trained.variables, path, trained.description)
    variables, description = export.load_safetensors(path)
    same_bits(variables, trained.variables)
    assert description == trained.description
    loaded = export.load_network(path)
    assert loaded.net == trained.net
    same_bits(loaded.variables, trained.variables)
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_names_are_paths_in_the_tree(trained: Trained, tmp_path: Path) -> None:
    """Read by the package itself, as another program would."""
    export.safetensors(trained.variables, tmp_path / "a", trained.description)
    with safetensors.safe_open(tmp_path / "a", framework="numpy") as file:
        names = set(file.keys())
        depthwise = file.get_tensor("params/cell_0/node2_0_sep_conv_3x3/depthwise1")
    assert depthwise.shape == (3, 3, 4)
    assert np.array_equal(depthwise, trained.variables["params"]["cell_0"]["node2_0_sep_conv_3x3"]["depthwise1"])
    assert {"params/classifier/kernel", "params/stem/bn/scale", "batch_stats/cell_5/preprocess1/bn/var"} <= names
    assert len(names) == len(jax.tree.leaves(trained.variables))


def test_views_special_numbers_and_device_arrays_survive(tmp_path: Path) -> None:
    special = np.array([[np.nan, -0.0, np.inf], [1e-45, 1.0, -1.0]], np.float32)
    tree = {"a": {"view": special.T, "device": jnp.asarray(special)}, "scalar": np.float32(2), "n": np.arange(3)}
    export.safetensors(tree, tmp_path / "a", {"x": [1, None]})
    loaded, metadata = export.load_safetensors(tmp_path / "a")
    same_bits(loaded, tree)
    assert metadata == {"x": [1, None]}


@pytest.mark.parametrize(("name", "stem", "pixels"), [("BayesNAS_0.01", "cifar", 32), ("AmoebaNet_A", "imagenet", 224)])
def test_shapes_are_those_of_init(name: str, stem: str, pixels: int) -> None:
    net = DerivedNetwork(Genotype.named(name), channels=4, cells=5, stem=stem, auxiliary=True)
    made = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, pixels, pixels, 1), jnp.float32))
    expected = export.traverse_util.flatten_dict(made, sep="/")
    assert {k: v.shape for k, v in export.shapes(net, 1).items()} == {k: v.shape for k, v in expected.items()}


def test_a_description_says_which_auxiliary_head_there_is() -> None:
    net = DerivedNetwork(TINY, channels=4, cells=3, auxiliary=True, auxiliary_second_norm=False)
    description = export.describe(net, IMAGE, mean=MEAN, std=STD)
    rebuilt = export.rebuild(description)
    assert rebuilt == net and "params/auxiliary/bn1/scale" in export.shapes(rebuilt, 3)
    assert not any(name.startswith("params/auxiliary/bn2") for name in export.shapes(rebuilt, 3))
    del description["auxiliary_second_norm"]  # as in files of version 0.1.0, whose heads all have the second norm
    assert export.rebuild(description) == net.clone(auxiliary_second_norm=True)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_description_of_another_network_is_refused(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for change, said in (
        ({"cells": 7}, "params/cell_"),
        ({"classes": 6}, r"params/classifier/kernel has shape \[\d+, 5\]"),
        ({"cells": 5}, "cell_"),
        ({"schema_version": 2}, "schema_version: 2"),
    ):
        export.safetensors(trained.variables, path, {**trained.description, **change})
        with pytest.raises(UserError, match=said):
            export.load_network(path)
    export.safetensors(trained.variables, path, {"schema_version": 1})
    with pytest.raises(UserError, match="genotype: missing"):
        export.load_network(path)


def test_files_that_are_none_of_ours(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        export.load_safetensors(tmp_path / "absent")
    (tmp_path / "junk").write_bytes(b"no tensors at all")
    with pytest.raises(UserError, match="cannot be read"):
        export.load_safetensors(tmp_path / "junk")
    save_file({"w": np.ones(2)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="no metadata"):
        export.load_safetensors(tmp_path / "foreign")
    export.safetensors(trained.variables, tmp_path / "cut", trained.description)
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        export.load_safetensors(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": (0.5,)}, "mean: 1 values for 3 channels"),
        ({"std": (0.5,) * 4}, "std: 4 values for 3 channels"),
        ({"image": (8, 8)}, "image: "),
        ({"class_names": ["a"]}, "class_names: 1 for 5 classes"),
    ],
)
def test_descriptions_are_checked(trained: Trained, change: dict[str, Any], said: str) -> None:
    arguments = {"image": IMAGE, "mean": MEAN, "std": STD, "class_names": (), **change}
    with pytest.raises(UserError, match=said):
        export.describe(trained.net, arguments.pop("image"), **arguments)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_both_formats(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.save_network(tmp_path / "run", *trained)
    assert Genotype.load(tmp_path / "run") == TINY
    flat, program = tmp_path / "net.safetensors", tmp_path / "net.stablehlo"
    assert cli_export.export_command([str(tmp_path / "run"), "--format", "safetensors", "--out", str(flat)]) == 0
    same_bits(export.load_safetensors(flat)[0], trained.variables)
    words = [str(flat), "--format", "stablehlo", "--out", str(program), "--platforms", "cpu"]
    assert cli_export.export_command(words) == 0
    assert jax.export.deserialize(bytearray(program.read_bytes())).platforms == ("cpu",)
    assert capsys.readouterr().out.splitlines() == [f"written: {p}" for p in (flat, program, f"{program}.json")]


def test_mistakes_of_the_command_create_nothing(trained: Trained, tmp_path: Path) -> None:
    export.save_network(tmp_path / "run", *trained)
    (tmp_path / "empty").mkdir()
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    for words, said in (
        ([run, "--format", "onnx", "--out", out], "--format: unknown value 'onnx'"),
        ([run, "--format", "stablehlo", "--out", out, "--platforms", "cpu,gpu"], "platforms: unknown value 'gpu'"),
        ([run, "--format", "stablehlo", "--out", out, "--platforms", ""], "platforms: none"),
        ([run, "--format", "stablehlo", "--out", str(tmp_path / "no" / "out")], "--out: "),
        ([run, "--format", "safetensors", "--out", str(tmp_path)], "--out: "),
        ([str(tmp_path / "absent"), "--format", "safetensors", "--out", out], "WORKDIR: no directory"),
        ([str(tmp_path / "empty"), "--format", "safetensors", "--out", out], "holds no network.safetensors"),
        ([run, "--format", "safetensors"], "--out"),
    ):
        with pytest.raises(UserError, match=said):
            cli_export.export_command(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]
