"""Wrong input and failing disks, from the command line through the real search: one line, the right exit status."""

from __future__ import annotations

import importlib.util
import os
import shutil
import types

import jax
import pytest
import search_cases
from search_cases import EPOCH_STEPS, FLAGS, final_state, one_error, rows, words

from prdarts_jax import cli
from prdarts_jax.errors import UserError
from prdarts_jax.run import workdir
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.space.genotype import Genotype


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


NAN_AT = EPOCH_STEPS + 4  # in the second epoch, in the middle of a dispatch

POISON = f"""
import jax.numpy as jnp, optax

def _transform(at):
    def update(grads, state, params=None):
        count, poisoned = state
        factor = jnp.where(count == poisoned, jnp.nan, -1e-3)
        return optax.tree.scale(factor, grads), (count + 1, poisoned)
    return optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.int32(at)), update)

def late(config):
    return _transform({NAN_AT - 1})
"""


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return search_cases.write_npz(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "digit"], ["preset: ", "'digit'", "did you mean 'digits'?"]),
        (["--strategy", "prdart"], ["method.strategy: ", "'prdart'", "did you mean 'prdarts'?"]),
        (["--strategy", "absent.py:factory"], ["method.strategy: ", "no file 'absent.py'"]),
        (["--weight-tx", "absent.py:factory"], ["weights.transform: ", "no file 'absent.py'"]),
        (["--arch-tx", "absent.py:factory"], ["arch.transform: ", "no file 'absent.py'"]),
        (["--space.primitives", "absent.py"], ["space.primitives: ", "no file 'absent.py'"]),
        (["--epohcs", "3"], ["unknown --epohcs", "did you mean --epochs?"]),
        (["--method.lamda1", "3"], ["'lamda1'", "did you mean 'lambda1'?"]),
        (["--cells", "2"], ["space.cells: 2 ", ">= 3"]),
        (["--epochs", "0"], ["epochs: 0 ", ">= 1"]),
        (["--space.ops", "none,sep_conv_4x4"], ["space.ops: ", "'sep_conv_4x4'", "did you mean"]),
        (["--method.executed_ops", "4"], ["method.options.executed_ops: 4 ", "1 to 3"]),
        (["--method.executed_ops", "0"], ["method.options.executed_ops: 0 ", "1 to 3"]),
        (["--method.a", "0"], ["method.options.a", " 0.0", "< 0"]),
        (["--method.b", "1"], ["method.options.b", " 1.0", "> 1"]),
        (["--method.tau_min", "0"], ["method.options.tau_min: 0.0 ", "0.001 to 1e+06"]),
        (["--method.tau_max", "-1"], ["method.options.tau_max: -1.0 ", "0.001 to 1e+06"]),
        (["--method.lambda1", "inf"], ["method.options.lambda1: inf ", "a finite number"]),
        (["--seed", "99999999999999999999"], ["seed: 99999999999999999999 ", "0..4294967295"]),
        (["--data.examples", "1"], ["data.examples: 1 ", "0 (all) | >= 2"]),
        (["--weights.momentum", "1"], ["weights.momentum: 1.0 ", "in [0, 1)"]),
        (["--batch-size", "57"], ["batch_size: 57 ", "56 examples"]),
        (["--devices", "4", "--batch-size", "6"], ["batch_size: 6 ", "multiple of 4"]),
        (["--devices", "all", "--batch-size", "6"], ["batch_size: 6 ", "multiple of 4"]),
        (["--devices", "5", "--batch-size", "10"], ["run.devices: 5 ", "1..4"]),
        (["--devices", "none"], ["run.devices: 'none' "]),
        (["--lowering", "wave"], ["run.lowering: ", "'wave'", "did you mean 'waves'"]),
        (["--lowering", "kernels", "--devices", "2"], ["run.lowering: 'kernels' ", "of one device"]),
        (["--lowering", "kernels", "--dtype", "bfloat16"], ["run.lowering: 'kernels' ", "float32"]),
        (["--data", "npz:absent.npz"], ["data.source: ", "absent.npz", "no such file"]),
        (["--data", "digit"], ["data.source: 'digit' "]),
        (["--data.crop_padding", "-1"], ["data.crop_padding: -1 "]),
        (["--data.cutout", "99"], ["data.cutout: 99 "]),
        (["--workdir", "/dev/null/run"], ["workdir: ", "/dev/null is not a folder"]),
        (["--workdir", "/dev/null"], ["workdir: ", "/dev/null is not a folder"]),
        (["--workdir", "/proc/run"], ["workdir: ", "/proc cannot be written"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_impossible_input(npz, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir(tmp_path))
    command = words(tmp_path / "runs" / "w", npz)
    if "--space.ops" in flags:
        command = [word for word in command if "executed_ops" not in word]
    one_error(capsys, [*command, *flags], 2, *said)
    assert set(os.listdir(tmp_path)) == before


def test_a_missing_data_set_is_not_fetched(tmp_path, capsys):
    flags = {name: value for name, value in FLAGS.items() if name != "data.source"}
    command = ["search", "--preset", "cifar10-small", "--workdir", str(tmp_path / "w")]
    command += [f"--{path}={value}" for path, value in flags.items()]
    one_error(capsys, [*command, "--data-dir", str(tmp_path)], 2, "cifar10", "prdarts data prepare")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("content", "said"), [("x = 1 / 0\n", "mine.py:1: ZeroDivisionError"), ("y = 1\n", "no 'f'")])
def test_a_broken_user_file(npz, tmp_path, capsys, content, said):
    (tmp_path / "mine.py").write_text(content)
    for flag in ("strategy", "weight-tx", "arch-tx"):
        one_error(capsys, [*words(tmp_path / "w", npz), f"--{flag}", f"{tmp_path}/mine.py:f"], 2, said)
    assert os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.parametrize("flag", ["strategy", "weight-tx", "arch-tx"])
def test_a_factory_of_something_else(npz, tmp_path, capsys, flag):
    (tmp_path / "mine.py").write_text("def f(config=None, *, space=None):\n    return 5\n")
    field = {"strategy": "method.strategy", "weight-tx": "weights.transform", "arch-tx": "arch.transform"}[flag]
    command = [word for word in words(tmp_path / "w", npz) if "method." not in word]
    one_error(capsys, [*command, f"--{flag}", f"{tmp_path}/mine.py:f"], 2, f"{field}: ", "int; allowed: ")
    assert os.listdir(tmp_path) == ["mine.py"]


BOOM = """
import jax.numpy as jnp, optax
from prdarts_jax.ops.primitives import Primitive
from prdarts_jax.strategies.darts import darts

def boom(*args, **kwargs):
    raise RuntimeError("boom")

from prdarts_jax.bilevel import joint

def factory(config=None, *, space=None):
    return boom()

def _with(**functions):
    return lambda *, space: darts(space=space)._replace(**functions)

schedule = _with(schedule=boom)
init = _with(init=boom)
sample = _with(sample=boom)
evaluated = lambda *, space: _with(sample=lambda *a: boom() if a[-1] == "eval" else darts(space=space).sample(*a))(
    space=space
)
objective = _with(objective=boom)
weight_objective = _with(weight_objective=boom)
rule = _with(rule=boom)
probabilities = _with(probabilities=boom)
derive = _with(derive=boom)
scores = _with(scores=boom)
select = _with(select=boom)
late = _with(schedule=lambda epoch, epochs: {} if epoch == 0 else boom())
uneven = _with(schedule=lambda epoch, epochs: {"arch_on": 1.0} if epoch == 0 else {})
cut = _with(memory=jnp.int32(0), rule=joint(lambda state, found, batch: state.memory + 0.5))
no_genotype = _with(derive=lambda arch: 3)
no_view = _with(at_epoch=lambda: None)
of_three = _with(at_epoch=lambda arch, metrics, epoch: None)
narrow = _with(probabilities=lambda arch, progress: {k: v[:, 1:] for k, v in arch.items()})

def update(config):
    return optax.GradientTransformation(lambda params: (), boom)

def begin(config):
    return optax.GradientTransformation(boom, lambda updates, state, params=None: (updates, state))

def _primitive(apply):
    return Primitive("conv", lambda channels, stride: {}, apply)

PRIMITIVES = {
    "raises": _primitive(boom),
    "forgets_stride": _primitive(lambda params, x, stride, leaves: x),
    "half": _primitive(lambda params, x, stride, leaves: x[:, ::stride, ::stride].astype(jnp.float16)),
    "nothing": _primitive(lambda params, x, stride, leaves: None),
    "two_minds": _primitive(lambda params, x, stride, leaves: x[:, ::stride, ::stride])._replace(
        units=lambda params, stride: ()
    ),
}
"""
BOOM_LINE = 7


@pytest.mark.parametrize(
    ("flag", "name", "said"),
    [
        ("strategy", "factory", f"method.strategy: FILE:{BOOM_LINE}: RuntimeError: boom"),
        ("weight-tx", "factory", f"weights.transform: FILE:{BOOM_LINE}: RuntimeError: boom"),
        ("arch-tx", "factory", f"arch.transform: FILE:{BOOM_LINE}: RuntimeError: boom"),
        *(
            ("strategy", name, f"method.strategy: FILE:{BOOM_LINE}: RuntimeError: boom")
            for name in (
                "schedule",
                "init",
                "sample",
                "evaluated",
                "objective",
                "weight_objective",
                "rule",
                "probabilities",
                "scores",
                "select",
                "derive",
                "late",
            )
        ),
        ("strategy", "uneven", "method.strategy: schedule has arch_on in one of the epochs 0 and 1 alone"),
        ("strategy", "cut", "method.strategy: a step makes float32[] of memory, which was int32[]"),
        ("strategy", "no_genotype", "method.strategy: derive gives a int; allowed: a Genotype"),
        ("strategy", "no_view", "method.strategy: at_epoch takes (); allowed: (view)"),
        ("strategy", "of_three", "method.strategy: at_epoch takes (arch, metrics, epoch); allowed: (view)"),
        ("strategy", "narrow", "method.strategy: probabilities have shapes {'normal': (2, 2), 'reduce': (2, 2)}"),
        *(
            (flag, name, f"{field}: FILE:{BOOM_LINE}: RuntimeError: boom")
            for flag, field in (("weight-tx", "weights.transform"), ("arch-tx", "arch.transform"))
            for name in ("update", "begin")
        ),
    ],
)
def test_user_code_that_fails_later_is_one_line_before_anything_is_written(npz, tmp_path, capsys, flag, name, said):
    (tmp_path / "mine.py").write_text(BOOM)
    command = words(tmp_path / "w", npz)
    if flag == "strategy":
        command = [word for word in command if "method." not in word]
    said = said.replace("FILE", str(tmp_path / "mine.py"))
    one_error(capsys, [*command, f"--{flag}", f"{tmp_path}/mine.py:{name}"], 2, f"error: {said}")
    assert os.listdir(tmp_path) == ["mine.py"]


# A method as version 0.1.0 had it, whole and as changes of another one.
OLD = """
import jax.numpy as jnp
from prdarts_jax.strategies.base import Strategy, init_normal
from prdarts_jax.strategies.darts import darts

def whole(*, space):
    made = darts(space=space)
    return Strategy(
        init=lambda key: init_normal(key, space, 1e-3),
        schedule=lambda epoch, epochs: {},
        sample=lambda key, arch, numbers: made.sample(key, arch, (), numbers, "arch"),
        expected=lambda arch, numbers: made.sample(None, arch, (), numbers, "eval"),
        penalty=lambda arch, gates, numbers: (jnp.zeros(()), {}),
        probabilities=made.probabilities,
        derive=made.derive,
    )

def _with(**functions):
    return lambda *, space: darts(space=space)._replace(**functions)

expected = _with(expected=lambda arch, numbers: None)
penalty = _with(penalty=lambda arch, gates, numbers: (jnp.zeros(()), {}))
end_epoch = _with(end_epoch=lambda arch, metrics, epoch: None)
traits = _with(traits=None)
"""


@pytest.mark.parametrize(
    ("name", "field"),
    [("whole", "expected"), *((field, field) for field in ("expected", "penalty", "end_epoch", "traits"))],
)
def test_a_method_of_the_first_version_is_told_the_new_fields(npz, tmp_path, capsys, name, field):
    (tmp_path / "mine.py").write_text(OLD)
    command = [word for word in words(tmp_path / "w", npz) if "method." not in word]
    said = [f"error: method.strategy: a Strategy has no field '{field}' any more; allowed: "]
    said += ["sample(..., role) for expected", "objective for penalty", "at_epoch for end_epoch", "rule for traits"]
    one_error(capsys, [*command, "--strategy", f"{tmp_path}/mine.py:{name}"], 2, *said)
    assert os.listdir(tmp_path) == ["mine.py"]


def test_the_traits_of_the_first_version_are_told_the_rule(npz, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from prdarts_jax.strategies.base import Strategy, Traits\n")
    command = [word for word in words(tmp_path / "w", npz) if "method." not in word]
    said = f"error: method.strategy: {tmp_path}/mine.py:1: ImportError: "
    one_error(capsys, [*command, "--strategy", f"{tmp_path}/mine.py:f"], 2, said, "Traits(order", "rule=alternating(")
    assert os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", f"space.primitives: FILE:{BOOM_LINE}: RuntimeError: boom"),
        ("forgets_stride", "'forgets_stride' gives float32[2,8,8,8] for float32[2,8,8,8] at stride 2; allowed: "),
        ("half", "'half' gives float16[2,8,8,8] for float32[2,8,8,8] at stride 1; allowed: float32[2,8,8,8]"),
        ("two_minds", "units and apply of 'two_minds' differ at stride 2; allowed: the same"),
        ("nothing", "'nothing' gives a NoneType for float32[2,8,8,8] at stride 1; allowed: float32[2,8,8,8]"),
    ],
)
def test_a_primitive_of_another_shape(npz, tmp_path, capsys, name, said):
    (tmp_path / "mine.py").write_text(BOOM)
    command = [*words(tmp_path / "w", npz), "--space.primitives", f"{tmp_path}/mine.py"]
    said = said.replace("FILE", str(tmp_path / "mine.py"))
    one_error(capsys, [*command, f"--space.ops=none,skip_connect,{name}"], 2, "error: space.primitives: ", said)
    assert os.listdir(tmp_path) == ["mine.py"]


def test_a_primitive_of_another_shape_in_a_training(tmp_path, capsys):
    """Refused where the genotype uses it with stride 2, and not for operations the genotype does not use."""
    (tmp_path / "mine.py").write_text(BOOM)
    node = ((("forgets_stride", 0), ("skip_connect", 1)),)
    (tmp_path / "cell.json").write_text(Genotype(node, (2,), node, (2,)).to_json())
    command = ["train", "--preset", "digits", "--genotype", f"{tmp_path}/cell.json", "--workdir", f"{tmp_path}/w"]
    said = "network.primitives: 'forgets_stride' gives ", "at stride 2; allowed: "
    one_error(capsys, [*command, "--network.primitives", f"{tmp_path}/mine.py"], 2, *said)
    assert sorted(os.listdir(tmp_path)) == ["cell.json", "mine.py"]


def test_an_argument_that_fails_names_its_line(tmp_path):
    def factory(*, space):
        raise RuntimeError("boom")

    with pytest.raises(UserError, match=r"^method\.strategy: .*test_search_errors\.py:\d+: RuntimeError: boom$"):
        search_cases.search(tmp_path / "w", given={"strategy": factory})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["search", "train"])
def test_tensorboard_without_its_package(npz, tmp_path, monkeypatch, capsys, command):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else found(name))
    flags = ["--workdir", str(tmp_path / "w"), "--tensorboard", "true", "--data.crop_padding", "1"]
    genotype = ["--genotype", "PRDARTS"] if command == "train" else []
    one_error(capsys, [command, "--preset", "digits", *genotype, *flags], 2, "run.tensorboard: True ", "tensorboardX")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_nan_stops_the_run(npz, tmp_path, capsys):
    """The metric and the step are named, and the checkpoint before it is whole.

    That a NaN in the first step leaves no checkpoint is seen at the failing member in test_population.py.
    """
    (tmp_path / "mine.py").write_text(POISON)
    workdir = tmp_path / "w"
    command = [*words(workdir, npz), f"--weight-tx={tmp_path}/mine.py:late"]
    # The poisoned update is that of step NAN_AT, and its own norm says so before anything is saved.
    one_error(capsys, command, 1, f"update_norm/weights is nan at step {NAN_AT}", "earlier checkpoints are kept")
    assert Checkpointer(workdir / "checkpoints").steps() == [EPOCH_STEPS]
    state = final_state(workdir)
    assert int(state.state.step) == EPOCH_STEPS
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    assert [row["step"] for row in rows(workdir, "step")] == list(range(1, NAN_AT))
    assert not (workdir / "genotype.json").exists()
    one_error(capsys, command, 1, f"update_norm/weights is nan at step {NAN_AT}")  # it resumes, and says the same


@pytest.mark.slow
def test_a_full_disk(npz, tmp_path, monkeypatch, capsys):
    """Found at the second checkpoint: the first one stays, and the same command goes on once there is room."""
    command = words(tmp_path / "w", npz)
    assert cli.main([*command, "--run.time_limit=1e-9"]) == 0
    full = types.SimpleNamespace(f_bavail=0, f_frsize=4096, f_files=0, f_favail=0)
    with monkeypatch.context() as patch:
        patch.setattr(workdir.os, "statvfs", lambda _: full)
        one_error(capsys, command, 1, "No space left on device", "the last good checkpoint is step 3")
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps() == [3]
    assert cli.main(command) == 0


def test_a_damaged_config(npz, tmp_path, capsys):
    command = words(tmp_path / "w", npz)
    assert cli.main([*command, "--run.time_limit=1e-9"]) == 0
    path = tmp_path / "w" / "config.json"
    whole = path.read_text()
    for content in (whole[: len(whole) // 2], '{"schema_version": 1, "kind": "search", "config": {"cells": 3}}'):
        path.write_text(content)
        one_error(capsys, command, 2, "config.json is ", " config of a search", "--overwrite")
    assert cli.main([*command, "--overwrite", "--run.time_limit=1e-9"]) == 0
    shutil.rmtree(tmp_path / "w")
