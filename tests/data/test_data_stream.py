"""Streamed batches: the same bits whatever reads them; every image once; the choice, the identity, the errors."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_cases import one_line, random_image, write_tfds
from PIL import Image

from prdarts_jax.config.train import TrainDataConfig
from prdarts_jax.data import prefetch, sources, stream_source
from prdarts_jax.data.batches import epoch_order
from prdarts_jax.data.tfds_source import PreparedRecords
from prdarts_jax.errors import RunError, UserError

IMAGENET = TrainDataConfig(image_size=12, crop_padding=0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
TRAIN, TEST, BATCH, EPOCHS = 13, 5, 4, 3


def write_folder(root, sizes=((20, 31), (18, 14), (40, 25)), test="test"):
    for split, count in (("train", TRAIN), (test, TEST)):
        for i in range(count):
            path = root / split / f"c{i % 2}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random_image(*sizes[i % len(sizes)], 3)).save(path / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("set"))


def _set(folder, data=IMAGENET):
    data = dataclasses.replace(data, source=f"folder:{folder}")
    return stream_source.choose(data), data


def _train(folder, **more):
    dataset, data = _set(folder)
    return prefetch.train_batches(dataset, data, np.arange(TRAIN), batch_size=BATCH, epochs=EPOCHS, seed=5, **more)


def _all(batches, **options):
    with prefetch.prefetched(batches, tuple, **options) as items:
        return [(images.copy(), labels.copy()) for images, labels in items]


def _same(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (other, others) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(images, other)
        np.testing.assert_array_equal(labels, others)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_the_start_change_no_bit(folder, workers):
    batches = _train(folder)
    plain = [batches[step] for step in range(len(batches))]  # no pipeline at all
    assert len(plain) == EPOCHS * (TRAIN // BATCH)
    _same(_all(batches, workers=workers, start=4), plain[4:])  # in the middle of the second epoch
    assert len({images.tobytes() for images, _ in plain}) == len(plain)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_read_their_columns_of_the_global_batch(folder, count):
    whole = _train(folder)
    parts = [_train(folder, process_index=p, process_count=count) for p in range(count)]
    for step in (0, 5):
        found = [part[step] for part in parts]
        _same([tuple(np.concatenate(kind) for kind in zip(*found, strict=True))], [whole[step]])


def test_batches_hold_the_images_of_the_common_order(folder, tmp_path):
    root = write_folder(tmp_path / "one", sizes=((6, 7),))
    dataset, data = _set(root, TrainDataConfig(stream="always"))
    batches = prefetch.train_batches(dataset, data, np.arange(TRAIN), batch_size=BATCH, epochs=2, seed=5)
    resident = sources.load(f"folder:{root}", cache_dir=tmp_path / "cache")
    orders = np.concatenate([epoch_order(np.arange(TRAIN), BATCH, 5, epoch, "train") for epoch in range(2)])
    _same(list(batches), [(resident.train_images[order], resident.train_labels[order]) for order in orders])
    assert (dataset.mean, dataset.std) == (resident.mean, resident.std)
    assert dataset.image == resident.image and dataset.class_names == resident.class_names


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_every_test_image_counts_once(folder, batch):
    dataset, data = _set(folder)
    found = _all(prefetch.test_batches(dataset, data, batch_size=batch), workers=0)
    images = np.concatenate([images for images, _ in found])[:TEST]
    labels = np.concatenate([labels for _, labels in found])
    assert len(labels) == -(-TEST // batch) * batch
    one = _all(prefetch.test_batches(dataset, data, batch_size=1), workers=0)
    _same([(images, labels[:TEST])], [tuple(np.concatenate(kind) for kind in zip(*one, strict=True))])


def test_a_prepared_set_of_any_size_is_streamed(tmp_path):
    rows = {split: [(random_image(14 + i, 20, 3), i % 2) for i in range(n)] for split, n in (("train", 6), ("test", 3))}
    rows["validation"], rows["test"] = rows["test"], [(random_image(14, 14, 3), -1)]
    write_tfds(tmp_path, "mine", rows)
    data = dataclasses.replace(IMAGENET, source="tfds:mine")
    dataset = stream_source.choose(data, str(tmp_path))
    assert (dataset.train_size, dataset.test_size, dataset.image) == (6, 3, (12, 12, 3))  # the hidden split is left
    batches = prefetch.train_batches(dataset, data, np.arange(6), batch_size=3, epochs=1, seed=0)
    _same(_all(batches, workers=1), list(batches))
    expected = {(np.asarray(Image.fromarray(pixels)).tobytes(), k) for pixels, k in rows["train"]}
    assert {(np.asarray(image).tobytes(), k) for image, k in map(dataset.train.read, range(6))} == expected
    assert "tensorflow" not in sys.modules


def test_the_budget_decides(folder, tmp_path):
    root = write_folder(tmp_path / "one", sizes=((6, 7),))
    size = (TRAIN + TEST) * 6 * 7 * 3 / 2**30
    for resident_gb, stream_, kind in (
        (size, "auto", sources.Dataset),
        (size * 0.99, "auto", stream_source.StreamedDataset),
        (0.0, "never", sources.Dataset),
        (4.0, "always", stream_source.StreamedDataset),
    ):
        found, _ = _set(root, TrainDataConfig(resident_gb=resident_gb, stream=stream_))
        assert isinstance(found, kind)
    assert isinstance(_set(folder)[0], stream_source.StreamedDataset)


def test_val_is_the_test_set_where_there_is_no_other(tmp_path):
    assert _set(write_folder(tmp_path / "v", test="val"))[0].test_size == TEST


def test_the_identity_is_names_sizes_and_labels(tmp_path):
    root = write_folder(tmp_path / "a")
    first = _set(root)[0].digest
    root.rename(tmp_path / "b")
    assert _set(tmp_path / "b")[0].digest == first  # where it lies does not matter
    (tmp_path / "b" / "train" / "c0" / "00.png").rename(tmp_path / "b" / "train" / "c1" / "00.png")
    assert _set(tmp_path / "b")[0].digest != first


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, workers):
    root = write_folder(tmp_path / "a")
    bad = root / "train" / "c0" / "04.png"
    bad.write_bytes(bad.read_bytes()[:60])
    message = one_line(lambda: _all(_train(root), workers=workers), str(bad), "not a readable image")
    assert message.count("allowed") == 1


class _Unpicklable(Exception):
    def __init__(self):
        super().__init__(threading.Lock())


class _NeverUnpickled(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one}\n{other}")


@dataclasses.dataclass(frozen=True)
class _Failing:
    """Images of which the third cannot be had, if there is an error."""

    error: str
    side: int = 12
    count: int = 4

    def __len__(self):
        return self.count

    def name(self, index):
        return f"image {index}"

    def read(self, index, channels):
        if index == 2 and self.error == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif index == 2 and self.error:
            raise _Unpicklable if self.error == "unpicklable" else _NeverUnpickled(self.error, "more")
        return Image.new("RGB", (self.side, self.side)), index


@pytest.mark.timeout(60, method="thread")  # a worker that cannot hand its error over would be waited for without an end
@pytest.mark.parametrize(
    ("error", "workers", "said"),
    [
        ("unpicklable", 1, r"image 2: _Unpicklable \(<unlocked _thread\.lock .*>\); what was saved is kept"),
        ("two words", 0, r"image 2: _NeverUnpickled \(two words\); what was saved is kept"),
        ("two words", 1, r"image 2: _NeverUnpickled \(two words\); what was saved is kept"),
        ("killed", 1, r"run\.workers: a worker process did not start or was ended from outside; .*"),
        ("killed", 3, r"run\.workers: a worker process did not start or was ended from outside; .*"),
    ],
    ids=["unpicklable", "thread", "not-unpickled", "killed", "killed-of-three"],
)
def test_every_failure_of_a_worker_is_one_line(error, workers, said):
    batches = prefetch.TestBatches(_Failing(error), (12, 12, 3), 1, IMAGENET)
    found = []
    with pytest.raises(RunError) as caught, prefetch.prefetched(batches, tuple, workers=workers) as items:
        for _, labels in items:
            found += labels.tolist()
    assert re.fullmatch(said, str(caught.value)), caught.value
    assert found == [0, 1] or (error == "killed" and found == [0, 1][: len(found)])  # it may end before it sent them


def test_a_stream_is_left_at_once_with_large_batches_on_their_way():
    batches = prefetch.TestBatches(_Failing("", side=1024, count=40), (1024, 1024, 3), 1, TrainDataConfig())
    with prefetch.prefetched(batches, tuple, workers=2) as items:
        assert next(items)[1].tolist() == [0]
        began = time.monotonic()
    assert time.monotonic() - began < 10


@pytest.mark.timeout(60, method="thread")
def test_an_error_outside_the_images_is_one_line(folder):
    wrong = dataclasses.replace(_train(folder), seed=_Unpicklable)
    with pytest.raises(RunError, match=r"^batch 0: TypeError "):
        _all(wrong, workers=1)


def test_a_damaged_record_is_named():
    rows = [{"image": b"no image", "label": 1}]
    records = PreparedRecords("tfds:mine: split 'train'", rows, "image", "label", classes=2)
    one_line(lambda: records.read(0), "tfds:mine: split 'train': record 0: not a readable image")


def test_other_errors(tmp_path, folder):
    one_line(lambda: _set(folder, TrainDataConfig(stream="always")), ".png: image size", "one size for all images")
    rows = {"train": [(random_image(6, 6, 3), 0), (random_image(6, 6, 3), 1)], "test": [(random_image(7, 6, 3), 1)]}
    write_tfds(tmp_path, "mine", rows)
    data = TrainDataConfig(source="tfds:mine", stream="always")
    dataset = stream_source.choose(data, str(tmp_path))
    one_line(lambda: prefetch.test_batches(dataset, data, batch_size=1)[0], "split 'test': record 0: image [7, 6, 3]")
    for wrong in (
        {"stream": "sometimes"},
        {"image_size": 8},  # with the padded crop of CIFAR
        {"image_size": 8, "crop_padding": 0, "stream": "never"},
        {"image_size": 8, "crop_padding": 0, "test_resize": 7},
        {"brightness": 0.4},
        {"hue": 0.6, "image_size": 8, "crop_padding": 0},
        {"min_area": 0.0},
    ):
        with pytest.raises(UserError, match=r"^data\.\w+: .*allowed: "):
            TrainDataConfig(**wrong)


_READER = """
import sys, time
import numpy as np
from prdarts_jax.config.train import TrainDataConfig
from prdarts_jax.data import prefetch, stream_source

if __name__ == "__main__":
    data = TrainDataConfig(source="folder:" + sys.argv[1], image_size=12, crop_padding=0)
    found = stream_source.choose(data)
    batches = prefetch.train_batches(found, data, np.arange(4), batch_size=1, epochs=10**6, seed=0)
    with prefetch.prefetched(batches, tuple, workers=2) as items:
        for _ in range(6):  # both workers have begun
            next(items)
        print("reading", flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the workers in /proc")
def test_workers_end_with_a_killed_parent(folder, tmp_path):
    (tmp_path / "reader.py").write_text(_READER)
    here = {**os.environ, "PYTHONPATH": str(Path(prefetch.__file__).parents[2])}
    command = [sys.executable, "reader.py", str(folder)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=here)

    def children():
        """Workers of this one test, known by the folder they run in."""
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{pid}/cwd") == str(tmp_path) and int(pid) != process.pid:
                    spawned = "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
                    found += [int(pid)] if spawned else []
            except OSError:
                continue
        return found

    try:
        assert process.stdout.readline() == b"reading\n"
        assert len(children()) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    until = time.monotonic() + 30
    while children() and time.monotonic() < until:
        time.sleep(0.1)
    assert children() == []
