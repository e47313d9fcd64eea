"""Checkpoints of the DARTS family's PyTorch programs: their names, written here from torch.nn, and the same outputs."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from oracles import quick_jit

from prdarts_jax.cli import export as cli_export
from prdarts_jax.data.sources import NORMALIZATION
from prdarts_jax.errors import UserError
from prdarts_jax.interop import export, import_torch
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.space.genotype import Genotype

if os.environ.get("CI") == "true":
    import torch
else:
    torch = pytest.importorskip("torch", reason="needs torch")
from torch import nn

pytestmark = pytest.mark.reference
torch.set_num_threads(1)  # the tests already keep every core busy, and its threads would spin while they wait

CHANNELS, CELLS, CLASSES = 4, 3, 7
# conv_7x1_1x7 in both cells, two operations on one input, three pairs a node, a partial concat.
SEVEN = Genotype(
    [[("conv_7x1_1x7", 0), ("dil_conv_5x5", 0), ("avg_pool_3x3", 1)], [("sep_conv_7x7", 2)]],
    [3],
    [[("conv_7x1_1x7", 1), ("skip_connect", 0)], [("skip_connect", 2), ("max_pool_3x3", 1)]],
    [2, 3],
)


# --- networks with the names of the programs --------------------------------------------------------------------------


def convolution(c_in: int, c_out: int, k: int | tuple[int, int], **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, bias=False, **options)


def half_block(c: int, k: int, stride: int, dilation: int) -> list[nn.Module]:
    depthwise = {"stride": stride, "padding": dilation * (k // 2), "dilation": dilation, "groups": c}
    return [nn.ReLU(), convolution(c, c, k, **depthwise), convolution(c, c, 1), nn.BatchNorm2d(c)]


class Sequence(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        self.conv_1 = convolution(c_in, c // 2, 1, stride=2)
        self.conv_2 = convolution(c_in, c // 2, 1, stride=2)
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return self.bn(torch.cat((self.conv_1(x), self.conv_2(x[..., 1:, 1:])), 1))


def relu_conv_bn(c_in: int, c: int) -> nn.Module:
    return Sequence(nn.ReLU(), convolution(c_in, c, 1), nn.BatchNorm2d(c))


def operation(name: str, c: int, stride: int) -> nn.Module:
    if name == "skip_connect":
        return FactorizedReduce(c, c) if stride == 2 else nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "conv_7x1_1x7":
        wide = convolution(c, c, (1, 7), stride=(1, stride), padding=(0, 3))
        tall = convolution(c, c, (7, 1), stride=(stride, 1), padding=(3, 0))
        return nn.Sequential(nn.ReLU(), wide, tall, nn.BatchNorm2d(c))
    k = int(name[-1])
    if name.startswith("dil"):
        return Sequence(*half_block(c, k, stride, 2))
    return Sequence(*half_block(c, k, stride, 1), *half_block(c, k, 1, 1))


class Cell(nn.Module):
    def __init__(self, genotype: Genotype, kind: str, inputs: tuple[int, int], c: int, previous_reduced: bool) -> None:
        super().__init__()
        self.preprocess0 = (FactorizedReduce if previous_reduced else relu_conv_bn)(inputs[0], c)
        self.preprocess1 = relu_conv_bn(inputs[1], c)
        self.nodes, self.concat = genotype.cell(kind)
        flat = [pair for node in self.nodes for pair in node]
        self._ops = nn.ModuleList(
            operation(name, c, 2 if kind == "reduce" and source < 2 else 1) for name, source in flat
        )

    def forward(self, before_last: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        states, run = [self.preprocess0(before_last), self.preprocess1(last)], iter(self._ops)
        for node in self.nodes:
            outputs = [next(run)(states[source]) for _, source in node]
            states.append(sum(outputs[1:], outputs[0]))
        return torch.cat([states[n] for n in self.concat], 1)


class Auxiliary(nn.Module):
    def __init__(self, c: int, stride: int, second_norm: bool) -> None:
        super().__init__()
        layers = [nn.ReLU(), nn.AvgPool2d(5, stride), convolution(c, 128, 1), nn.BatchNorm2d(128)]
        layers += [nn.ReLU(), convolution(128, 768, 2), *([nn.BatchNorm2d(768)] if second_norm else []), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(768, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Program(nn.Module):
    """NetworkCIFAR or NetworkImageNet; unlike there, the auxiliary head runs in evaluation too."""

    def __init__(self, genotype: Genotype, stem: str, auxiliary: bool = True, second_norm: bool = True) -> None:
        super().__init__()
        c = CHANNELS
        self.imagenet = stem == "imagenet"
        if self.imagenet:
            first = [convolution(3, c // 2, 3, stride=2, padding=1), nn.BatchNorm2d(c // 2), nn.ReLU()]
            self.stem0 = nn.Sequential(*first, convolution(c // 2, c, 3, stride=2, padding=1), nn.BatchNorm2d(c))
            self.stem1 = nn.Sequential(nn.ReLU(), convolution(c, c, 3, stride=2, padding=1), nn.BatchNorm2d(c))
            inputs = (c, c)
        else:
            self.stem = nn.Sequential(convolution(3, 3 * c, 3, padding=1), nn.BatchNorm2d(3 * c))
            inputs = (3 * c, 3 * c)
        self.cells, previous_reduced = nn.ModuleList(), self.imagenet
        self.auxiliary_head = None
        for i in range(CELLS):
            kind = "reduce" if i in (CELLS // 3, 2 * CELLS // 3) else "normal"
            c = 2 * c if kind == "reduce" else c
            self.cells.append(Cell(genotype, kind, inputs, c, previous_reduced))
            inputs, previous_reduced = (inputs[1], c * len(genotype.cell(kind)[1])), kind == "reduce"
            if auxiliary and i == 2 * CELLS // 3:
                self.auxiliary_head = Auxiliary(inputs[1], 2 if self.imagenet else 3, second_norm)
        self.classifier = nn.Linear(inputs[1], CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        s0 = self.stem0(x) if self.imagenet else self.stem(x)
        s1 = self.stem1(s0) if self.imagenet else s0
        extra = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if i == 2 * CELLS // 3 and self.auxiliary_head is not None:
                extra = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), extra


def program(genotype: Genotype, stem: str = "cifar", **options: Any) -> Program:
    """With weights and running statistics that are nowhere at their initial values."""
    model = Program(genotype, stem, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(11)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 1.5 / np.sqrt(max(np.prod(tensor.shape[1:]), 1))
                tensor.uniform_(-scale, scale, generator=generator)
    return model


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return program(Genotype.named("PRDARTS"), auxiliary=False).state_dict()


def arrays(state_dict: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state_dict.items()}


# --- the same outputs -------------------------------------------------------------------------------------------------

CASES = {
    "PRDARTS, CIFAR": (Genotype.named("PRDARTS"), "cifar", True),
    "DARTS_V2, CIFAR": (Genotype.named("DARTS_V2"), "cifar", True),
    "conv_7x1_1x7, CIFAR": (SEVEN, "cifar", True),
    "conv_7x1_1x7, ImageNet": (SEVEN, "imagenet", True),
    "DARTS_V2, ImageNet, one BN in the auxiliary head": (Genotype.named("DARTS_V2"), "imagenet", False),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_program(case: str, tmp_path: Path) -> None:
    genotype, stem, second_norm = CASES[case]
    model = program(genotype, stem, second_norm=second_norm)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    converted = import_torch.convert(import_torch.load_state_dict(tmp_path / "weights.pt"), genotype)
    sizes = {"channels": CHANNELS, "cells": CELLS, "classes": CLASSES, "stem": stem}
    assert converted.network == {**sizes, "auxiliary": True, "auxiliary_second_norm": second_norm}
    assert converted.channels == 3 and converted.notes == ()
    net = DerivedNetwork(genotype, **converted.network)
    export.check_variables(net, converted.variables, 3, "converted")

    pixels = 32 if stem == "cifar" else 224
    images = np.random.default_rng(1).normal(size=(2, pixels, pixels, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    found = quick_jit(net.apply)(converted.variables, images)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.numpy()
        assert theirs.std() > 1e-2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def test_every_tensor_arrives(small: dict[str, torch.Tensor]) -> None:
    """Each number of the checkpoint, counters apart, is in the variables as often as there."""
    variables = import_torch.convert(arrays(small), Genotype.named("PRDARTS")).variables
    theirs = [tensor.flatten() for name, tensor in small.items() if not name.endswith("num_batches_tracked")]
    ours = [np.ravel(leaf) for leaf in jax.tree.leaves(variables)]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    assert np.array_equal(np.sort(np.concatenate(ours)), np.sort(torch.cat(theirs).numpy()))


# --- files ------------------------------------------------------------------------------------------------------------


WRAPPERS = (None, "net", "state_dict", "model_state_dict", "model", "network", "base-model")
PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.net.")


@pytest.mark.parametrize(
    ("wrapper", "prefix"), [*((wrapper, "module.") for wrapper in WRAPPERS), *(("state_dict", p) for p in PREFIXES)]
)
def test_wrappers(wrapper: str | None, prefix: str, small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    saved: Any = {f"{prefix}{name}": tensor for name, tensor in small.items()}
    if wrapper is not None:
        saved = {"epoch": torch.tensor(600), "best_acc_top1": 97.5, "optimizer": {"state": {}}, wrapper: saved}
    torch.save(saved, tmp_path / "a.pt")
    loaded = import_torch.load_state_dict(tmp_path / "a.pt")
    assert loaded.keys() == small.keys()
    assert all(np.array_equal(loaded[name], small[name].numpy()) for name in small)


def test_weights_beside_the_network_of_a_lightning_module_are_named(
    small: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    saved = {f"model.{name}": tensor for name, tensor in small.items()} | {"criterion.weight": torch.ones(7)}
    torch.save({"state_dict": saved}, tmp_path / "a.pt")
    loaded = import_torch.load_state_dict(tmp_path / "a.pt")
    assert loaded.keys() == small.keys() | {"criterion.weight"}
    with pytest.raises(UserError, match=r"it has besides criterion\.weight"):
        import_torch.convert(loaded, Genotype.named("PRDARTS"))


def test_values_beside_the_weights_that_run_no_code(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """What programs save beside them, with the names of NumPy 2 and NumPy 1 for the module of a scalar."""
    args = argparse.Namespace(lr=0.025, save=tmp_path, accuracy=np.float64(97.5), epochs=np.int64(600), tuple=(1, "a"))
    beside = {"args": args, "best": np.float32(97.5), "seen": np.bool_(True), "losses": np.arange(3.0)}
    beside |= {"commit": np.str_("abc"), "when": np.datetime64("2020-01-01"), "classes": np.array(["a", "bc"])}
    torch.save(beside | {"state_dict": small}, tmp_path / "a.pt")
    assert import_torch.load_state_dict(tmp_path / "a.pt").keys() == small.keys()
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "old.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert import_torch.load_state_dict(tmp_path / "old.pt").keys() == small.keys()


def test_a_whole_network_and_a_program_say_how_to_save_them(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    torch.save({"net": network}, tmp_path / "a.pt")
    with pytest.raises(
        UserError, match=r"\(torch.nn.modules.linear.Linear\), which are not unpickled.*x.state_dict\(\)"
    ):
        import_torch.load_state_dict(tmp_path / "a.pt")
    torch.jit.trace(network, torch.ones(1, 2)).save(tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"is a TorchScript program.*torch.jit.load\(FILE\).state_dict\(\)") as caught:
        import_torch.load_state_dict(tmp_path / "b.pt")
    assert "\n" not in str(caught.value)


def test_formats_of_numbers_and_of_files(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Half precision is widened; checkpoints older than 1.6 and without counters are read."""
    torch.save({name: tensor.bfloat16() for name, tensor in small.items()}, tmp_path / "half.pt")
    half = import_torch.load_state_dict(tmp_path / "half.pt")
    assert half["classifier.weight"].dtype == np.float32
    np.testing.assert_array_equal(half["stem.0.weight"], small["stem.0.weight"].bfloat16().float().numpy())
    old = {name: tensor for name, tensor in small.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    genotype = Genotype.named("PRDARTS")
    found = import_torch.convert(import_torch.load_state_dict(tmp_path / "old.pt"), genotype).variables
    jax.tree.map(np.testing.assert_array_equal, found, import_torch.convert(arrays(small), genotype).variables)


def test_tensors_that_are_no_plain_arrays_are_named(tmp_path: Path) -> None:
    for name, tensor, said in (
        ("a", torch.eye(2).to_sparse(), "torch.sparse_coo"),
        ("c", torch.zeros(2, device="meta"), "on device meta"),
    ):
        torch.save({name: tensor}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=f"a.pt' holds '{name}', .*{said}.*allowed: dense tensors"):
            import_torch.load_state_dict(tmp_path / "a.pt")
    torch.save({"stem.0.weight": torch.ones(1), "history": np.array([None])}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"other objects than tensors \(numpy.dtypes.ObjectDType\)"):
        import_torch.load_state_dict(tmp_path / "a.pt")


class Intruder:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_nothing_but_tensors_is_unpickled(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save({"state_dict": small, "args": Intruder(target)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Intruder(target)))
    for name, said in (("a.pt", r"holds other objects than tensors \(.*\), which are not"), ("b.pt", "cannot be read")):
        with pytest.raises(UserError, match=said) as caught:
            import_torch.load_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value) and not target.exists()


def test_files_that_hold_no_state_dict(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for saved, said in (
        ([torch.ones(2)], "holds no state_dict"),
        ({}, "holds no state_dict"),
        ({"epoch": 3, "weights": dict(small)}, "holds epoch, weights, which are no tensors"),
    ):
        torch.save(saved, tmp_path / "a.pt")
        with pytest.raises(UserError, match=said):
            import_torch.load_state_dict(tmp_path / "a.pt")
    with pytest.raises(UserError, match="no file"):
        import_torch.load_state_dict(tmp_path / "absent.pt")
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04 junk")
    with pytest.raises(UserError, match="cannot be read"):
        import_torch.load_state_dict(tmp_path / "junk.pt")


def test_without_torch_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"absent \(pip install torch\)"):
        import_torch.load_state_dict(tmp_path / "a.pt")


# --- other names ------------------------------------------------------------------------------------------------------


def test_keys_must_be_those_of_the_network(small: dict[str, torch.Tensor]) -> None:
    genotype, weights = Genotype.named("PRDARTS"), arrays(small)

    def refused(change: dict[str, np.ndarray | None], said: str, genotype: Genotype = genotype, **options: Any) -> None:
        changed = {name: array for name, array in {**weights, **change}.items() if array is not None}
        with pytest.raises(UserError, match=said) as caught:
            import_torch.convert(changed, genotype, **options)
        assert "\n" not in str(caught.value)

    refused({"cells.2.extra.weight": np.ones(3)}, "it has besides cells.2.extra.weight; allowed")
    refused({"stem.1.bias": None, "cells.0.preprocess1.op.1.weight": None}, "lacks cells.0.preprocess1.*, stem.1.bias;")
    refused({"global_pooling.num_batches_tracked": np.array(1)}, "besides global_pooling.num_batches_tracked")
    refused({"classifier.weight": None}, "classifier.weight is missing")
    refused({"stem.0.weight": None}, "stem.0.weight is missing")
    refused({}, "stem: 'imagenet', but the names are those of 'cifar'", stem="imagenet")
    refused({}, "stem: unknown value 'mnist'", stem="mnist")
    refused({}, "lacks .* and [0-9]+ more; it has besides .* and [0-9]+ more", Genotype.named("DARTS_V2"))
    wider = np.ones((5, 5, 1, 1), np.float32)
    refused({"cells.0.preprocess1.op.1.weight": wider}, r"preprocess1.op.1.weight of shape \[5, 5, 1, 1\] does not fit")
    refused({"classifier.bias": np.full(CLASSES, np.nan, np.float32)}, "classifier.bias holds NaN")


def test_weights_of_edges_that_leave_an_empty_node_are_left_out() -> None:
    nodes = [[], [("sep_conv_3x3", 0), ("sep_conv_3x3", 2), ("skip_connect", 1)]]
    genotype = Genotype(nodes, [3], nodes, [3])
    found = arrays(program(genotype, auxiliary=False).state_dict())
    converted = import_torch.convert(found, genotype)
    (note,) = converted.notes
    assert "cells.0._ops.1." in note and "of edges that leave a node without operations" in note
    live = [key for key in found if "._ops.1." not in key and not key.endswith("num_batches_tracked")]
    assert len(jax.tree.leaves(converted.variables)) == len(live)
    with pytest.raises(UserError, match=r"it has besides cells\.0\._ops\.9"):
        import_torch.convert(found | {"cells.0._ops.9.op.1.weight": np.ones(1)}, genotype)


def test_a_wrapped_conv_7x1_1x7_is_the_same() -> None:
    plain = arrays(program(SEVEN, auxiliary=False).state_dict())
    pattern = re.compile(r"(_ops\.\d+)\.(?=\d)")
    wrapped = {pattern.sub(r"\1.op.", name): array for name, array in plain.items()}
    assert wrapped.keys() != plain.keys()
    found, expected = (import_torch.convert(weights, SEVEN).variables for weights in (wrapped, plain))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_half_a_second_norm_of_the_auxiliary_head_is_refused() -> None:
    weights = arrays(program(SEVEN).state_dict())
    del weights["auxiliary_head.features.6.running_var"]
    with pytest.raises(UserError, match=r"it lacks auxiliary_head\.features\.6\.running_var;"):
        import_torch.convert(weights, SEVEN)
    weights = arrays(program(SEVEN, auxiliary=False).state_dict())
    network = import_torch.convert(weights, SEVEN).network
    assert (network["auxiliary"], network["auxiliary_second_norm"]) == (False, True)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_workdir(
    small: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"net": small}, tmp_path / "a.pt")
    words = [str(tmp_path / "a.pt"), "--genotype", "PRDARTS", "--workdir", str(tmp_path / "runs" / "a")]
    assert cli_export.import_command(words) == 0
    assert capsys.readouterr().out.startswith("3 cells, 4 channels, 7 classes, stem cifar\nwritten: ")
    genotype = Genotype.named("PRDARTS")
    loaded = export.load_network(tmp_path / "runs" / "a")
    assert loaded.net == DerivedNetwork(genotype, CHANNELS, CELLS, CLASSES)
    expected = import_torch.convert(arrays(small), genotype).variables
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
    assert loaded.description["image"] == [32, 32, 3]
    assert (tuple(loaded.description["mean"]), tuple(loaded.description["std"])) == NORMALIZATION["cifar10"]
    assert Genotype.load(tmp_path / "runs" / "a") == genotype

    with pytest.raises(UserError, match=r"holds network.safetensors already; allowed: another folder, or --overwrite"):
        cli_export.import_command(words)
    again = [*words, "--overwrite", "--mean", "0,0,0", "--std", "1,1,2", "--image-size", "16"]
    assert cli_export.import_command(again) == 0
    description = export.load_network(tmp_path / "runs" / "a").description
    assert (description["mean"], description["std"], description["image"]) == ([0, 0, 0], [1, 1, 2], [16, 16, 3])


def test_mistakes_of_the_command_create_nothing(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(small, tmp_path / "a.pt")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    words = [str(tmp_path / "a.pt"), "--genotype", "PRDARTS", "--workdir", str(tmp_path / "new")]
    for change, said in (
        (["--genotype", "PRDART"], "did you mean 'PRDARTS'"),
        (["--genotype", "PDARTS"], "these are not the weights of the genotype's network"),
        (["--stem", "imagenet"], "stem: 'imagenet'"),
        (["--mean", "0.5"], "mean: 1 values for 3 channels"),
        (["--mean", "a,b,c"], "--mean: 'a,b,c'"),
        (["--std", "1,1,0"], "--std: 1,1,0"),
        (["--image-size", "3.5"], "--image-size: 3.5"),
        (["--workdir", str(tmp_path / "search"), "--overwrite"], "holds config.json already; allowed: another folder$"),
        (["--workdir", str(tmp_path / "a.pt" / "x")], "workdir: "),
    ):
        with pytest.raises(UserError, match=said):
            cli_export.import_command([*words, *change])
    assert sorted(tmp_path.rglob("*")) == before
