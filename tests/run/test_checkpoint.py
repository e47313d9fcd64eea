"""Checkpoints: every bit comes back, and damage is found and survived."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import State, bits, odd_floats, restore_with_warnings, state_at
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run.checkpoint import Checkpointer, flatten_digests


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 and 2; tests copy it before they damage it."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpointer(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {"epoch": step})
    return directory


@pytest.fixture
def copied(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def largest_file(step_directory: Path) -> Path:
    return max((path for path in step_directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# Round trip.


@pytest.mark.parametrize("abstract", [False, True])
def test_every_bit_comes_back(tmp_path: Path, abstract: bool) -> None:
    state = state_at(5)
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(5, state, {"epoch": 2, "history": [0.1, None, {"a": "b"}]})
        target = jax.eval_shape(lambda: state_at(0)) if abstract else state_at(0)
        restored = checkpoints.restore_latest(target)
    assert restored is not None
    assert restored.step == 5 and restored.info == {"epoch": 2, "history": [0.1, None, {"a": "b"}]}
    assert bits(restored.state) == bits(state)
    assert isinstance(restored.state, State) and all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored.state))


def test_other_kinds_of_leaf(tmp_path: Path) -> None:
    state = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 5),
        "host": np.arange(4.0),  # float64
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "python": (7, 0.1, True),
        "int8": jnp.array([-128, 127], jnp.int8),
    }
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(0, state, {})
        got = checkpoints.restore_latest(state).state
        abstract = checkpoints.restore_latest({**state, "keys": jax.eval_shape(lambda: state["keys"])}).state
    assert got["python"] == (7, 0.1, True) and [type(x) for x in got["python"]] == [int, float, bool]
    assert isinstance(got["host"], np.ndarray) and got["host"].dtype == np.float64
    assert got["empty"].shape == (0, 3) and got["none"] is None
    for name in ("key", "keys", "host", "int8"):
        assert bits(got[name]) == bits(state[name])
        assert jax.tree.leaves(got[name])[0].dtype == state[name].dtype
    assert bits(abstract["keys"]) == bits(state["keys"])


def test_a_leaf_that_is_no_number_is_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "c") as checkpoints, pytest.raises(TypeError, match="'a/name' is a str"):
        checkpoints.save(0, {"a": {"name": "x"}, "w": jnp.ones(1)}, {})
    assert not (tmp_path / "c").exists()


def test_weak_types_survive(tmp_path: Path) -> None:
    state = {"rate": jnp.asarray(0.1), "strong": jnp.asarray(0.1, jnp.float32)}
    assert state["rate"].weak_type
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(0, state, {})
        got = checkpoints.restore_latest(state).state
    assert got["rate"].weak_type and not got["strong"].weak_type and bits(got) == bits(state)


@pytest.mark.multidevice
def test_replicated_state_takes_the_shardings_of_the_target(tmp_path: Path) -> None:
    devices = np.array(jax.devices())
    four, two = (NamedSharding(Mesh(devices[:n], ("data",)), P()) for n in (4, 2))
    split = NamedSharding(Mesh(devices[:2], ("data",)), P("data"))
    state = jax.device_put(state_at(1), four)
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        on_two = checkpoints.restore_latest(jax.device_put(state_at(0), two)).state
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=two), state)
        abstract.weights["normal"][0] = jax.ShapeDtypeStruct((200, 3), jnp.float32, sharding=split)
        on_split = checkpoints.restore_latest(abstract).state
    assert bits(on_two) == bits(state) == bits(on_split)
    assert {leaf.sharding for leaf in jax.tree.leaves(on_two)} == {two}
    assert on_split.weights["normal"][0].sharding == split


def test_donation_right_after_save_is_safe(tmp_path: Path) -> None:
    state = {"w": jnp.arange(200_000, dtype=jnp.float32)}
    expected = bits(state)
    overwrite = jax.jit(lambda s: {"w": s["w"] * -1.0}, donate_argnums=0)
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = overwrite(state)
        target = {"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}
        got = checkpoints.restore_latest(target).state
        assert bits(got) == expected
        assert bits(overwrite(got)) == bits(state)  # and what was restored can be donated


def test_digests_see_bits_dtype_and_shape() -> None:
    x = np.float32([0.0, 1.5])
    assert flatten_digests({"a": x})["a"] == hashlib.sha256(b"float32[2]" + x.tobytes()).hexdigest()
    variants = [x, -x, x.reshape(1, 2), x.view(np.int32), x.astype(jnp.bfloat16), odd_floats()[:2], odd_floats()[1:3]]
    digests = {flatten_digests([v])["0"] for v in variants}
    assert len(digests) == len(variants)
    assert list(flatten_digests(state_at(0)))[:2] == ["weights/mask", "weights/normal/0"]


# Which checkpoints there are.


def test_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer(Path("relative/c"), keep=2) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore_latest(state_at(0)) is None
        assert not Path("relative").exists()  # looking makes nothing
        for step in (1, 2, 10, 11):
            checkpoints.save(step, state_at(step), {"epoch": step})
            if step == 10:
                assert {1, 2} <= set(checkpoints.steps())  # nothing older goes before the newer one is complete
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11]
    assert sorted(os.listdir(tmp_path / "relative/c")) == ["10", "11"]


def test_saving_a_step_again_replaces_it(copied: Path) -> None:
    with Checkpointer(copied) as checkpoints:
        inode = (copied / "2").stat().st_ino
        checkpoints.save(2, state_at(2), {"epoch": 2})
        checkpoints.wait()
        assert (copied / "2").stat().st_ino == inode  # nothing differs: nothing is written
        checkpoints.save(2, state_at(2), {"epoch": 2, "finished": True})
    assert sorted(os.listdir(copied)) == ["1", "2"]
    restored = Checkpointer(copied).restore_latest(state_at(0))
    assert restored is not None and restored.info["finished"] and bits(restored.state) == bits(state_at(2))


def test_a_kill_while_a_step_is_replaced_loses_nothing(copied: Path) -> None:
    (copied / "2").rename(copied / "replaced-2")
    (copied / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(copied) as checkpoints:
        restored = checkpoints.restore_latest(state_at(0))
        assert restored is not None and restored.step == 2 and bits(restored.state) == bits(state_at(2))
        checkpoints.save(3, state_at(3), {})
    assert sorted(os.listdir(copied)) == ["2", "3"]


# Damage.


def test_what_is_newer_than_the_restored_one_makes_room(copied: Path) -> None:
    shutil.rmtree(copied / "2" / "state")
    with Checkpointer(copied, warn=lambda line: None) as checkpoints:
        restored = checkpoints.restore_latest(state_at(0))
        assert restored is not None and restored.step == 1
        assert checkpoints.steps() == [1]
        assert (copied / "2").is_dir()  # reading alone moves nothing
        checkpoints.save(2, state_at(20), {"epoch": 2, "again": True})
    assert sorted(os.listdir(copied)) == ["1", "2", "set-aside-2"]
    again = Checkpointer(copied).restore_latest(state_at(0))
    assert again is not None and again.info == {"epoch": 2, "again": True}


def assert_survived(directory: Path, reason: str = "") -> None:
    restored, lines = restore_with_warnings(directory)
    assert restored is not None and restored.step == 1 and bits(restored.state) == bits(state_at(1))
    assert len(lines) == 1 and "\n" not in lines[0], lines
    assert lines[0].startswith(f"checkpoint at step 2 in {directory} cannot be used: ") and reason in lines[0]


@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_bit_anywhere_is_found(copied: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = sorted(path for path in (copied / "2").rglob("*") if path.is_file())
    file = largest_file(copied / "2") if seed < 8 else rng.choice(files)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    assert_survived(copied)


@pytest.mark.parametrize("seed", range(12))
def test_leaf_digests_alone_never_let_a_wrong_number_through(copied: Path, seed: int) -> None:
    (copied / "2" / "SHA256SUMS").unlink()
    file = largest_file(copied / "2" / "state")
    content = bytearray(file.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 0x10
    file.write_bytes(content)
    restored, lines = restore_with_warnings(copied)
    assert restored is not None
    assert bits(restored.state) == bits(state_at(restored.step))
    assert len(lines) == (restored.step == 1)


def test_a_wrong_number_with_matching_file_digests_is_found_by_its_leaf(copied: Path) -> None:
    """The one damage orbax restores silently: uncompressed array data of another value."""
    document = json.loads((copied / "2/info/metadata").read_text())
    document["leaves"]["step"]["sha256"] = "0" * 64
    del document["sha256"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copied / "2/info/metadata").write_text(json.dumps(document))
    (copied / "2/SHA256SUMS").unlink()
    assert_survived(copied, "leaf step differs from its digest")


@pytest.mark.parametrize("name", ["info/metadata", "state/_METADATA", "state/manifest.ocdbt", "LARGEST"])
@pytest.mark.parametrize("how", ["half", "zero", "missing"])
@pytest.mark.parametrize("with_sums", [True, False])
def test_truncated_and_missing_files(copied: Path, name: str, how: str, with_sums: bool) -> None:
    file = largest_file(copied / "2") if name == "LARGEST" else copied / "2" / name
    if how == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if how == "half" else 0)
    if with_sums:
        assert_survived(copied)
        return
    (copied / "2/SHA256SUMS").unlink()
    if (name, how) == ("state/_METADATA", "missing"):  # orbax does without it when it is given the tree
        restored, lines = restore_with_warnings(copied)
        assert restored.step == 2 and bits(restored.state) == bits(state_at(2)) and lines == []
    else:
        assert_survived(copied)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_sums(copied: Path, size: int) -> None:
    file = copied / "2/SHA256SUMS"
    os.truncate(file, size % file.stat().st_size)
    assert_survived(copied, "SHA256SUMS")


@pytest.mark.parametrize(
    ("missing", "reason"), [("state", "no state"), ("info", "no info"), (".", "no info and no state")]
)
def test_missing_items_and_the_empty_step(copied: Path, missing: str, reason: str) -> None:
    shutil.rmtree(copied / "2" / missing)
    (copied / "2").mkdir(exist_ok=True)
    assert_survived(copied, reason)


def test_after_damage_the_same_step_can_be_saved_again(copied: Path) -> None:
    shutil.rmtree(copied / "2" / "state")
    lines: list[str] = []
    with Checkpointer(copied, warn=lines.append) as checkpoints:
        checkpoints.restore_latest(state_at(0))
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state_at(2), {"epoch": 2})
    restored, again = restore_with_warnings(copied)
    assert restored.step == 2 and bits(restored.state) == bits(state_at(2)) and again == []


def test_all_damaged_is_one_line(copied: Path) -> None:
    for step in (1, 2):
        shutil.rmtree(copied / str(step) / "state")
    with pytest.raises(RunError) as caught:
        restore_with_warnings(copied)
    message = str(caught.value)
    assert "\n" not in message and "step 2: " in message and "step 1: " in message and str(copied) in message
    assert (copied / "1").is_dir() and (copied / "2").is_dir()


def test_another_structure_is_no_damage(two_steps: Path) -> None:
    good = state_at(0)
    targets = {
        r"leaf step is int32\[\] there and int32\[2\] here": good.replace(step=jnp.zeros(2, jnp.int32)),
        r"leaf step is int32\[\] there and float32\[\] here": good.replace(step=jnp.zeros(())),
        "it has no leaf weights/new": good.replace(weights={**good.weights, "new": jnp.ones(1)}),
        "its leaf weights/mask is unknown here": good.replace(
            weights={k: v for k, v in good.weights.items() if k != "mask"}
        ),
    }
    lines: list[str] = []
    for message, target in targets.items():
        with pytest.raises(UserError, match=f"step 2 in .*{message}"):
            Checkpointer(two_steps, warn=lines.append).restore_latest(target)
    assert lines == []
