"""Images and folders of images: one row for each numbered fault (31 to 43 of the list of faults).

Calibration sets that are too few or of one class (40) have their rows in tests/export/quantization, and labels that do
not match (41) theirs in tests/export/verification.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_edge.data import find_images, pixel_hashes, refuse_overlap, stream_pixels
from vit_edge.errors import DataRejected, ImageRejected
from vit_edge.image import Preprocessing, decode

PREPROCESSING = Preprocessing(resize=16, crop=(16, 16))
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encoded(kind: str = "PNG", pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, format=kind, **options)
    return made.getvalue()


def claiming(width: int, height: int) -> bytes:
    """Return a PNG whose header promises more pixels than it holds."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (header, b"IDAT" + zlib.compress(bytes(99)), b"IEND")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


REFUSED: dict[str, tuple[bytes, str]] = {
    "31 empty": (b"", "the file is empty"),
    "31 text": (b"hello", "not an image that can be read"),
    "31 PNG cut short": (encoded()[:-500], "damaged or incomplete"),
    "31 JPEG cut short": (encoded("JPEG")[:-200], "damaged or incomplete"),
    "31 WebP cut short": (encoded("WEBP")[:100], "."),
    "31 TIFF cut short": (encoded("TIFF")[:200], "."),
    "32 bomb": (claiming(20_000, 20_000), "pixels"),
    "33 GIF": (encoded("GIF"), "JPEG, PNG, WEBP, BMP, TIFF"),
    "33 EPS": (encoded("EPS"), "JPEG, PNG, WEBP, BMP, TIFF"),
    "36 one pixel": (encoded(pixels=PIXELS[:1, :1]), "1 x 1 pixels"),
    "36 one row": (claiming(29_000, 1), "29000 x 1 pixels"),
    "36 no pixels": (claiming(0, 0), "."),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fault", REFUSED)
def test_an_image_that_cannot_be_used_is_refused_with_its_path(tmp_path: Path, fault: str) -> None:
    data, reason = REFUSED[fault]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageRejected, match=reason) as caught:
        PREPROCESSING.pixels(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "error", [struct.error, TypeError, IndexError, SyntaxError, ValueError, RuntimeError, KeyError]
)
def test_fault_31_whatever_a_decoder_raises_is_an_image_rejected(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(self: Image.Image) -> None:
        raise error("x")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageRejected, match=f"damaged or incomplete.*{error.__name__}"):
        decode(encoded())


def test_fault_34_an_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded("JPEG", exif=exif)).size == (20, 24)


def test_fault_35_other_modes_are_converted_by_a_rule_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    made = io.BytesIO()
    Image.new("F", (20, 20)).save(made, format="TIFF")
    with pytest.raises(ImageRejected, match="mode is F"):
        decode(made.getvalue())
    grey = (np.arange(400, dtype=np.uint16) * 160).reshape(20, 20)
    assert np.asarray(decode(encoded(pixels=grey)))[..., 0].max() == round(399 * 160 / 257)
    clear = np.zeros((20, 20, 4), np.uint8)
    assert (np.asarray(decode(encoded(pixels=clear))) == 255).all()
    with caplog.at_level(logging.WARNING):
        decode(encoded("WEBP", save_all=True, append_images=[Image.fromarray(PIXELS[::-1].copy())]))
    assert "only the first is used" in caplog.text


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "FIFO": fifo,
    "socket": unix_socket,
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to(path.with_name("gone")),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "gone": lambda path: None,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_fault_37_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](tmp_path / "a.png")
    with pytest.raises(ImageRejected, match=r"a\.png"):
        decode(tmp_path / "a.png")


def test_faults_38_and_39_a_walk_is_sorted_counts_loops_and_takes_any_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("b.png", "a.png", os.fsdecode(b"\xff.png"))
    for name in names:
        (tmp_path / name).write_bytes(encoded())
    (tmp_path / "loop").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = find_images(tmp_path)
    assert [path.name for path in found] == sorted(names)
    assert "1 links lead back" in caplog.text
    assert [position for position, _ in stream_pixels(found, PREPROCESSING)] == [0, 1, 2]


def test_fault_42_an_image_of_both_sets_is_refused_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.bmp").write_bytes(encoded("BMP"))
    hashes = pixel_hashes([tmp_path / "a.png"], PREPROCESSING)
    with pytest.raises(DataRejected, match=r"b\.bmp"):
        refuse_overlap(list(hashes), pixel_hashes([tmp_path / "b.bmp"], PREPROCESSING))


def test_faults_40_and_43_damaged_images_are_skipped_below_one_percent_and_refused_above(tmp_path: Path) -> None:
    paths = []
    for number in range(120):
        paths.append(tmp_path / f"{number:03}.png")
        paths[-1].write_bytes(encoded() if number != 60 else b"damaged")
    positions = [position for position, _ in stream_pixels(paths, PREPROCESSING)]
    assert positions == [number for number in range(120) if number != 60]
    with pytest.raises(DataRejected, match=r"over 1 %.*060\.png"):
        list(stream_pixels(paths[50:70], PREPROCESSING))
