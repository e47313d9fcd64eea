"""Nothing of a set is dropped or taken for something else without a line: folders, pixel formats, orientation, axes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_cases import one_line, random_image
from PIL import Image

from prdarts_jax.data import records, sources
from prdarts_jax.data.arrays import as_images


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)


def load(root: Path) -> sources.Dataset:
    return sources.load(f"folder:{root}", cache_dir=root.with_name("cache"))


def png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel, as the standard writes it; Pillow can write grey ones only."""
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Arrays


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_are_refused_with_what_to_type(tmp_path, channels):
    images, labels = random_image(40, channels, 32, 28), np.arange(40) % 4
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    for call in (
        lambda: sources.load(f"npz:{tmp_path}/a.npz"),
        lambda: sources.from_arrays("mine", images, labels),
        lambda: sources.from_arrays(
            "mine", images.transpose(0, 2, 3, 1), labels, test_images=images, test_labels=labels
        ),
    ):
        said = one_line(call, f"[40, {channels}, 32, 28]", "images.transpose(0, 2, 3, 1)")
        assert "images" in said
    typed = images.transpose(0, 2, 3, 1)  # what the line says
    assert sources.from_arrays("mine", typed, labels).image == (32, 28, channels)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (2, 1, 8, 1), (2, 4, 4, 3), (2, 3, 9, 4), (2, 8, 8, 2), (2, 3, 9)])
def test_small_images_with_their_channels_last_are_taken(shape):
    assert as_images("a", random_image(*shape)).shape[:3] == shape[:3]


def test_arrays_that_are_not_read_are_named(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=random_image(4, 8, 8), labels=np.arange(4) % 2, val_images=np.zeros(3))
    sources.load(f"npz:{tmp_path}/a.npz")
    assert "not read: val_images" in capsys.readouterr().err


# Folders


@pytest.mark.parametrize(
    ("left_out", "allowed"),
    [
        ("train/a/more/x.png", "images directly in it"),
        ("train/a/more/still/x.JPG", "images directly in it"),
        ("test/b/more/x.png", "images directly in it"),
        ("train/x.png", "train/CLASS/x.png"),
        ("valid/a/x.png", "rename its directory"),
        ("Test/a/x.png", "rename its directory"),
        ("extra/x.png", "rename its directory"),
        ("x.png", "move it elsewhere"),
    ],
)
def test_an_image_that_would_be_left_out_is_named(tmp_path, left_out, allowed):
    root = tmp_path / "set"
    for part in ("train/a", "train/b", "test/a", "test/b"):
        save(root / part / "0.png", random_image(4, 5, 3))
    load(root)
    path = root / left_out
    save(path, random_image(4, 5, 3))
    one_line(lambda: load(root), str(path), allowed)


def test_an_image_beside_or_below_classes_without_train_is_named(tmp_path):
    root = tmp_path / "set"
    for name in "ab":
        save(root / name / "0.png", random_image(4, 5, 3))
    for path in (root / "x.png", root / "a" / "more" / "x.png"):
        save(path, random_image(4, 5, 3))
        one_line(lambda path=path: load(root), str(path))
        path.unlink()


def test_what_is_passed_over_is_a_line(tmp_path, capsys):
    root = tmp_path / "set"
    for part in ("train/a", "train/b", "test/a", "val/a"):
        save(root / part / "0.png", random_image(4, 5, 3))
    data = load(root)
    assert "val is not used: 'test' has the test images" in capsys.readouterr().err
    (root / "train" / "a" / "notes.txt").touch()
    (root / "train" / "list.csv").touch()
    (root / "test" / "a" / "1.heic").touch()
    save(root / "train" / "a" / ".ipynb_checkpoints" / "0.png", random_image(4, 5, 3))
    assert load(root).digest == data.digest
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "4 files that are no images are passed over (the first: " in said[1]


def test_other_files_below_a_class_are_a_line(tmp_path, capsys):
    """Images of a format that is not read, perhaps."""
    for name in ("a/0.png", "a/1.jfif", "b/0.png", "b/1.png"):
        save(tmp_path / "set" / name, random_image(8, 8, 3), format="JPEG" if name.endswith("jfif") else "PNG")
    (tmp_path / "set/a/more").mkdir()
    (tmp_path / "set/a/more/x.heic").touch()
    assert len(load(tmp_path / "set").train_images) == 2
    assert "1 files that are no images are passed over (the first: " in (said := capsys.readouterr().err)
    assert "a/more/x.heic" in said


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        save(tmp_path / "set" / name, random_image(8, 8, 3))
    (tmp_path / "set/a/z.png").symlink_to("nowhere")
    one_line(lambda: load(tmp_path / "set"), "a/z.png", "No such file")


def test_a_test_directory_without_classes_is_no_test_set(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "val/a/0.png"):
        save(tmp_path / "set" / name, random_image(8, 8, 3))
    (tmp_path / "set/test").mkdir()
    one_line(lambda: load(tmp_path / "set"), "set/test has no class directory")


# Pixels


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_never_cut_to_eight(tmp_path, colour_type, channels):
    path = tmp_path / "x.png"
    path.write_bytes(png(np.full((4, 5, channels), 0x1234, np.uint16), colour_type))
    for call in (lambda: records.read_header(str(path)), lambda: records.read_image(str(path), str(path), 3)):
        one_line(call, str(path), "not 8 bits a channel")


def test_sixteen_bits_in_other_files(tmp_path):
    (tmp_path / "x.ppm").write_bytes(b"P6\n2 1\n65535\n" + bytes(range(12)))
    one_line(lambda: records.read_header(str(tmp_path / "x.ppm")), "65535", "not 8 bits")
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12)]
    ends = 8 + 2 + 12 * len(tags) + 4
    values = {258: ends, 273: ends + 6}
    rows = b"".join(struct.pack("<HHII", tag, kind, n, values.get(tag, value)) for tag, kind, n, value in tags)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + struct.pack("<I3H", 0, 16, 16, 16) + bytes(range(12))
    (tmp_path / "x.tif").write_bytes(tiff)
    one_line(lambda: records.read_header(str(tmp_path / "x.tif")), "16", "not 8 bits")


def test_a_palette_of_greys_is_one_channel(tmp_path):
    grey = random_image(4, 5)
    colour = Image.fromarray(grey).convert("P")  # whose palette is a ramp of greys
    root = tmp_path / "set"
    save(root / "a" / "0.png", colour)
    partly = Image.fromarray(grey // 2, "P")  # 128 colours are used; the others are none of the greys
    partly.putpalette([v for k in range(128) for v in (k, k, k)] + [255, 0, 7] * 128)
    save(root / "b" / "0.png", partly)
    data = load(root)
    assert data.image == (4, 5, 1)
    np.testing.assert_array_equal(data.train_images[..., 0], np.stack([grey, grey // 2]))
    partly.putpixel((0, 0), 200)
    save(root / "b" / "0.png", partly)
    assert records.read_header(str(root / "b" / "0.png")).shape == (4, 5, 3)


def test_transparency_and_frames_are_a_line(tmp_path, capsys):
    root = tmp_path / "set"
    save(root / "a" / "0.png", random_image(4, 5, 4))
    frames = [Image.fromarray(random_image(4, 5, 3)) for _ in range(2)]
    save(root / "b" / "0.gif", frames[0], save_all=True, append_images=frames[1:])
    load(root)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" of ")[0].rpartition(": ")[2] for line in said] == [
        "all frames but the first",
        "the transparency",
    ]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_orientation_is_applied(tmp_path, suffix, orientation, turned):
    """The stored pixels, turned by quarters counter-clockwise as EXIF 2.3 says of each value."""
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255  # the corner that tells how it lies
    tags = Image.Exif()
    tags[0x0112] = orientation
    root = tmp_path / "set"
    for name in "ab":
        save(root / name / f"0.{suffix}", stored, exif=tags)
    expected = np.rot90(stored, turned)
    data = load(root)
    assert data.image == expected.shape
    assert np.abs(data.train_images[0].astype(int) - expected).mean() < 8  # JPEG and WebP are not exact
    buffer = io.BytesIO((root / "a" / f"0.{suffix}").read_bytes())
    assert records.read_image(buffer, "x", 3, upright=True).size == expected.shape[1::-1]


@pytest.mark.parametrize(("mode", "said"), [("RGB", False), ("L", False), ("CMYK", True)])
def test_colours_that_become_rgb_are_named(tmp_path, mode, said):
    file = tmp_path / "a.jpg"
    Image.new(mode, (4, 4)).save(file)
    found = records.read_header(str(file)).left_out
    assert any("become RGB" in words for words in found) is said
