"""A fake official archive goes through `prepare` and comes back from `tfds:NAME`, both without TensorFlow."""

from __future__ import annotations

import io
import logging
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from prdarts_jax.data import prepare as prepare_module
from prdarts_jax.data import sources
from prdarts_jax.data.prepare import prepare
from prdarts_jax.errors import RunError, UserError

RNG = np.random.default_rng(1)
LABELS = {"cifar10": (10,), "cifar100": (20, 100)}
NAMES = {count: [f"name{count}_{i}" for i in range(count)] for count in (10, 20, 100)}


def fake_members(name: str, per_file: int) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The members of an archive, and by split the images [N,32,32,3] and the labels that belong to them."""
    if name == "cifar10":
        folder, meta = "cifar-10-batches-bin", {"batches.meta.txt": 10}
        files = {f"data_batch_{i}.bin": "train" for i in range(1, 6)} | {"test_batch.bin": "test"}
    else:
        folder, meta = "cifar-100-binary", {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
        files = {"train.bin": "train", "test.bin": "test"}
    members = {f"{folder}/{file}": ("\n".join(NAMES[count]) + "\n\n").encode() for file, count in meta.items()}
    splits: dict[str, list] = {"train": [], "test": []}
    for file, split in files.items():
        data = b""
        for i in range(per_file):
            image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            labels = [i % count for count in LABELS[name]]
            # The format, written out: label bytes, then the red plane row by row, the green, the blue.
            data += bytes(labels) + b"".join(image[:, :, c].tobytes() for c in range(3))
            splits[split].append((image, labels[-1]))
        members[f"{folder}/{file}"] = data
    members[f"{folder}/readme.html"] = b"<html>"
    return members, splits


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for file, data in members.items():
            info = tarfile.TarInfo(file)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("name", "per_file"), [("cifar10", 20), ("cifar100", 100)])
def test_round_trip(tmp_path, name, per_file, capfd):
    members, splits = fake_members(name, per_file)
    archive = write_tar(tmp_path / "a.tar.gz", members)
    written = prepare(name, archive, tmp_path / "new" / "data", check_digest=False)
    assert written == tmp_path / "new" / "data" / name / "3.0.2"
    data = sources.load(f"tfds:{name}", str(tmp_path / "new" / "data"), cache_dir=tmp_path / "cache")
    assert list(data.class_names) == NAMES[LABELS[name][-1]]
    for images, labels, expected in (
        (data.train_images, data.train_labels, splits["train"]),
        (data.test_images, data.test_labels, splits["test"]),
    ):
        found = sorted((i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True))
        assert found == sorted((i.tobytes(), k) for i, k in expected)
    assert (data.mean, data.std) == sources.NORMALIZATION[name]
    assert [p.name for p in (tmp_path / "new" / "data").iterdir()] == [name]
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")  # neither TFDS's progress bars nor its banners


def test_written_files_are_those_of_the_tfds_builder(tmp_path):
    import tensorflow_datasets as tfds

    members, splits = fake_members("cifar100", 100)
    prepare("cifar100", write_tar(tmp_path / "a.tar.gz", members), tmp_path / "data", check_digest=False)
    features = tfds.builder("cifar100", data_dir=str(tmp_path / "data")).info.features
    assert sorted(features) == ["coarse_label", "id", "image", "label"]
    assert features["coarse_label"].names == NAMES[20]
    source = tfds.data_source("cifar100", data_dir=str(tmp_path / "data"), split="test")
    for example in (source[i] for i in (0, 17, 99)):
        index = int(example["id"].decode().removeprefix("test_"))
        np.testing.assert_array_equal(example["image"], splits["test"][index][0])
        assert (example["coarse_label"], example["label"]) == (index % 20, index % 100)


def test_unofficial_archive_is_a_warning_and_only_when_asked(tmp_path, caplog):
    members, _ = fake_members("cifar10", 10)
    archive = write_tar(tmp_path / "a.tar.gz", members)
    with caplog.at_level(logging.WARNING):
        prepare("cifar10", archive, tmp_path / "one", check_digest=False)
        assert not caplog.text
        prepare("cifar10", archive, tmp_path / "two")
    assert "50 train and 10 test images" in caplog.text and "is not that of the official" in caplog.text


def refused(tmp_path: Path, archive: Path, *words: str, name: str = "cifar10") -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(name, archive, tmp_path / "made" / "data", check_digest=False)
    message = str(caught.value)
    assert "\n" not in message and "allowed:" in message
    for word in words:
        assert word in message, message
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_in_the_archive(tmp_path):
    members, _ = fake_members("cifar10", 10)
    folder = "cifar-10-batches-bin"
    refused(tmp_path, tmp_path / "none.tar.gz", "none.tar.gz", "no such file")
    (tmp_path / "text").write_text("not an archive")
    refused(tmp_path, tmp_path / "text", "not a complete tar archive")
    whole = write_tar(tmp_path / "good.tar.gz", members).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, tmp_path / "cut", "not a complete tar archive")
    refused(tmp_path, tmp_path / "good.tar.gz", "no member cifar-100-binary/", name="cifar100")

    def changed(file: str, data: bytes | None) -> Path:
        rest = {k: v for k, v in members.items() if k != f"{folder}/{file}"}
        return write_tar(tmp_path / "changed", rest if data is None else rest | {f"{folder}/{file}": data})

    batch = members[f"{folder}/data_batch_3.bin"]
    refused(tmp_path, changed("data_batch_3.bin", None), f"no member {folder}/data_batch_3.bin")
    refused(tmp_path, changed("data_batch_3.bin", batch[:-1]), "data_batch_3.bin has 30729 bytes", "multiple of 3073")
    refused(tmp_path, changed("data_batch_3.bin", b""), "data_batch_3.bin has 0 bytes")
    refused(tmp_path, changed("data_batch_3.bin", b"\x0a" + batch[1:]), "data_batch_3.bin holds label 10", "0..9")
    refused(tmp_path, changed("batches.meta.txt", b"a\nb\n"), "batches.meta.txt has 2 class names", "10")


def test_unknown_name_and_unusable_data_dir(tmp_path):
    members, _ = fake_members("cifar10", 10)
    archive = write_tar(tmp_path / "a.tar.gz", members)
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        prepare("cifar-10", archive, tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data-dir: .*cannot be used.*allowed: a writable directory"):
        prepare("cifar10", archive, tmp_path / "file" / "data", check_digest=False)


def test_prepared_set_is_never_overwritten(tmp_path):
    members, _ = fake_members("cifar10", 10)
    archive = write_tar(tmp_path / "a.tar.gz", members)
    written = prepare("cifar10", archive, tmp_path / "data", check_digest=False)
    before = {p: p.stat().st_mtime_ns for p in written.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        prepare("cifar10", archive, tmp_path / "data", check_digest=False)
    assert {p: p.stat().st_mtime_ns for p in written.iterdir()} == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error, expected):
    members, _ = fake_members("cifar10", 10)
    archive = write_tar(tmp_path / "a.tar.gz", members)
    write = prepare_module._write

    def fail_late(*args):
        write(*args)
        raise error

    monkeypatch.setattr(prepare_module, "_write", fail_late)
    with pytest.raises(expected):
        prepare("cifar10", archive, tmp_path / "new" / "data", check_digest=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]
