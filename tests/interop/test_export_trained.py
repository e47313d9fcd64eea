"""What `prdarts export` takes from the workdir of a training: its newest weights, and the operations it ran with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import train_cases
from search_cases import one_error
from train_cases import TEST, digits

from prdarts_jax import cli
from prdarts_jax.interop import export
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import evaluation

# An operation in place of one of ours: three times the input, negated, every second pixel where the stride is 2.
OWN = """
from prdarts_jax.ops.primitives import Primitive
PRIMITIVES = {NAME: Primitive("pool", lambda channels, stride: {}, lambda p, x, stride, leaves: -3.0 * x[:, ::stride, ::stride])}
"""  # noqa: E501 (one statement of a user's file)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training that keeps averaged weights."""
    folder = tmp_path_factory.mktemp("averaged")
    npz = train_cases.write_npz(folder / "digits.npz")
    with train_cases.shared_programs():
        assert cli.main(train_cases.words(folder / "w", npz)) == 0
    return folder / "w"


def _accuracy(program: Path) -> float:
    run = jax.export.deserialize(bytearray(program.read_bytes())).call
    logits = np.asarray(run(digits().test_images))
    return float(np.mean(logits.argmax(axis=1) == digits().test_labels))


@pytest.mark.parametrize("name", [pytest.param("max_pool_3x3", marks=pytest.mark.slow), "mine"])
def test_operations_of_the_user_come_along(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a name of their own, and under one of ours."""
    (tmp_path / "own.py").write_text(OWN.replace("NAME", repr(name)))
    npz = train_cases.write_npz(tmp_path / "digits.npz")
    flags = {"network__primitives": str(tmp_path / "own.py"), "epochs": 1, "ema": 0.0}
    words = train_cases.words(tmp_path / "w", npz, **flags)
    mine = Genotype([[("sep_conv_3x3", 0), ("skip_connect", 1)]], [2], [[(name, 0), ("skip_connect", 1)]], [2])
    (tmp_path / "genotype.json").write_text(mine.to_json())
    assert cli.main(words) == 0
    command = ["export", str(tmp_path / "w"), "--platforms=cpu", "--format"]
    assert cli.main([*command, "stablehlo", "--out", str(tmp_path / "net.hlo")]) == 0
    found = evaluation.evaluate(tmp_path / "w", devices="1")
    assert _accuracy(tmp_path / "net.hlo") == found.figures.accuracy
    assert cli.main([*command, "safetensors", "--out", str(tmp_path / "net.st")]) == 0
    capsys.readouterr()
    alone = ["export", str(tmp_path / "net.st"), "--platforms=cpu", "--format=stablehlo", "--out"]
    one_error(capsys, [*alone, str(tmp_path / "b.hlo")], 2, f"own_operations: {name!r}", "the workdir of its training")
    assert not (tmp_path / "b.hlo").exists()
    (tmp_path / "own.py").write_text(OWN.replace("NAME", repr(name)).replace("-3.0", "-2.0"))
    said = "own.py' is not what the training ran with"
    one_error(capsys, [*command, "stablehlo", "--out", str(tmp_path / "c.hlo")], 2, "network.primitives: ", said)
    one_error(capsys, ["evaluate", str(tmp_path / "w")], 2, "network.primitives: ", said)


def test_averaged_weights(averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = train_cases.final_state(averaged).state
    for flag, wanted in (["--ema"], state.ema), ([], state.variables):
        out = tmp_path / f"{len(flag)}.st"
        assert cli.main(["export", str(averaged), "--format=safetensors", "--out", str(out), *flag]) == 0
        loaded = export.load_network(out)
        expected = {"params": wanted.params, "batch_stats": wanted.batch_stats}
        for a, b in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    command = ["export", str(tmp_path / "0.st"), "--format=safetensors", "--out", str(tmp_path / "c.st")]
    one_error(capsys, [*command, "--ema"], 2, "--ema: a file or an import holds one set of weights")


def test_a_training_that_is_not_finished(averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = shutil.copytree(averaged, tmp_path / "w")
    finished = export.load_network(workdir)
    (workdir / export.NETWORK_FILE).unlink()
    shutil.rmtree(workdir / "checkpoints" / str(train_cases.TOTAL))
    capsys.readouterr()
    assert cli.main(["export", str(workdir), "--format=safetensors", "--out", str(tmp_path / "a.st")]) == 0
    assert "note: the training is not finished: weights after epoch 2" in capsys.readouterr().err
    found = export.load_network(tmp_path / "a.st")
    assert found.description == finished.description and found.net == finished.net
    kernel = found.variables["params"]["classifier"]["kernel"]
    assert np.any(kernel != finished.variables["params"]["classifier"]["kernel"])


def test_folders_of_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("seed0", "seed1"):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "config.json").write_text("{}")
    out = tmp_path / "out.st"
    command = ["export", str(tmp_path), "--format=safetensors", "--out", str(out)]
    one_error(capsys, command, 2, "one of its seeds, seed0")
    one_error(capsys, ["evaluate", str(tmp_path)], 2, "allowed: one of its seeds, seed0, seed1")
    words = ["import-torch", str(tmp_path / "absent.pt"), "--genotype=PRDARTS", "--workdir", str(tmp_path)]
    one_error(capsys, words, 2, "holds seed0/config.json already; allowed: another folder")


def test_classes_in_another_order_are_no_figures(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(averaged, tmp_path / "w")
    document: dict[str, Any] = json.loads((workdir / "config.json").read_text())
    document["data"]["classes"] = [f"c{i}" for i in range(10)]
    (workdir / "config.json").write_text(json.dumps(document))
    images = digits().test_images
    for subset in ("train", "test"):
        for k in range(10):
            folder = tmp_path / "set" / subset / (f"c{k}" if k else "z0")
            folder.mkdir(parents=True)
            _png(folder / "a.png", images[k])
    command = ["evaluate", str(workdir), "--devices=1", "--data", f"folder:{tmp_path / 'set'}"]
    one_error(capsys, command, 2, "has class 'c1' as number 0; allowed: the classes the network was trained with")
    assert TEST and not (workdir / "evaluation.json").exists()


def _png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(image[..., 0]).save(path)
