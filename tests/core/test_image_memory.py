"""The memory that decoding needs, measured in a process for every kind of image: at most 12 bytes a pixel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_edge.cli import main
from vit_edge.errors import ImageRejected, UsageError
from vit_edge.image import LIMIT_VARIABLE, Limits, Preprocessing, decode, decode_for
from vit_edge.runtime import Pool, load

SIZE = (4000, 3000)
# What a file may add: its bytes, and Pillow's own copy of them; and what a process needs however small the image is.
FILE_COPIES, BASE_BYTES = 2, 4_000_000
MEASURED = """
import sys
from vit_edge.image import Preprocessing
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
preprocessing = Preprocessing(resize=256, crop=(224, 224))
preprocessing.pixels(sys.argv[1])
before = peak()
preprocessing.pixels(sys.argv[2])
print(peak() - before)
"""


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def grey_16_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


KINDS: dict[str, Callable[[Image.Image, Path], None]] = {
    "RGB.png": lambda image, path: image.convert("RGB").save(path, compress_level=1),
    "RGBA.png": lambda image, path: image.save(path, compress_level=1),
    "RGBA turned.png": lambda image, path: image.save(path, compress_level=1, exif=turned()),
    "grey and alpha.png": lambda image, path: image.convert("LA").save(path, compress_level=1),
    "palette.png": lambda image, path: image.convert("RGB").convert("P").save(path, compress_level=1),
    "transparent palette.png": lambda image, path: (
        image.convert("RGB").convert("P").save(path, compress_level=1, transparency=3)
    ),
    "16 bit.png": lambda image, path: grey_16_bit(image).save(path, compress_level=1),
    "RGB turned.jpg": lambda image, path: image.convert("RGB").save(path, exif=turned()),
    "progressive.jpg": lambda image, path: image.convert("RGB").save(path, progressive=True, subsampling=0),
    "CMYK progressive.jpg": lambda image, path: image.convert("CMYK").save(path, progressive=True, subsampling=0),
    "still.webp": lambda image, path: image.convert("RGB").save(path, method=0, quality=10),
    "lossless.webp": lambda image, path: image.save(path, lossless=True, method=0, quality=0),
    "animated.webp": lambda image, path: image.save(
        path, save_all=True, append_images=[image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], method=0, quality=0
    ),
    "one strip.tif": lambda image, path: image.save(path, compression="tiff_lzw", tiffinfo={278: SIZE[1]}),
    "CMYK.tif": lambda image, path: image.convert("CMYK").save(path, compression="tiff_adobe_deflate"),
    "RGB.bmp": lambda image, path: image.convert("RGB").save(path),
}


def rough(size: tuple[int, int]) -> Image.Image:
    """Return an RGBA image of large squares: few bytes in a file, and all its pixels are in memory."""
    squares = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    return Image.fromarray(squares).resize(size, Image.Resampling.NEAREST)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_needs_at_most_12_bytes_a_pixel(tmp_path: Path, kind: str) -> None:
    small, large = tmp_path / f"small {kind}", tmp_path / kind
    KINDS[kind](rough((40, 30)), small)
    KINDS[kind](rough(SIZE), large)
    # As in examples/service: else glibc keeps up to 32 MB of what was freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(small), str(large)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    num_pixels, file_bytes = SIZE[0] * SIZE[1], large.stat().st_size
    found = (int(done.stdout) - FILE_COPIES * file_bytes - BASE_BYTES) / num_pixels
    assert found <= 12, f"{found:.2f} bytes a pixel"


def test_limits_are_settable_by_call_and_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.zeros((1000, 1100, 3), np.uint8)
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    with pytest.raises(ImageRejected, match="1100 x 1000 pixels; at most 1,000,000 pixels"):
        preprocessing.pixels(pixels)
    monkeypatch.setenv(LIMIT_VARIABLE, "1.2")
    assert preprocessing.pixels(pixels).shape == (16, 16, 3)
    monkeypatch.setenv(LIMIT_VARIABLE, "many")
    with pytest.raises(UsageError, match=f"{LIMIT_VARIABLE} is 'many'"):
        decode(pixels)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "8"])
def test_a_limit_that_is_no_positive_number_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="max_pixels is"):
        Limits(max_pixels=wrong)  # type: ignore[arg-type]


def test_an_image_that_grows_when_it_is_resized_is_limited_too() -> None:
    """A hostile manifest asks for 30,000 x 30,000 pixels, or for a short side that makes the long one very long."""
    with pytest.raises(ValueError, match="over 50,000,000 pixels"):
        Preprocessing(resize=30_000, crop=(224, 224))
    with pytest.raises(ImageRejected, match="100000 x 5000 pixels"):
        Preprocessing(resize=5000, crop=(224, 224)).pixels(np.zeros((8, 160, 3), np.uint8))


def test_classify_and_load_take_a_limit(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rough((1100, 1000)).save(tmp_path / "a.png")
    arguments = ["classify", str(small_model / "m.onnx"), str(tmp_path / "a.png"), "--engine", "onnxruntime"]
    assert main([*arguments, "--max-image-megapixels", "1"]) == 3
    assert "1100 x 1000 pixels; at most 1,000,000 pixels" in capsys.readouterr().err
    assert main([*arguments, "--max-image-megapixels", "1.2"]) == 0
    limits = Limits(max_side=1000)
    refused = pytest.raises(ImageRejected, match="1,000 a side")
    with load(small_model / "m.onnx", engine="onnxruntime", limits=limits) as first, first.twin() as other, refused:
        other(tmp_path / "a.png")
    with Pool(small_model / "m.onnx", engine="onnxruntime", workers=1, limits=limits) as pool, refused:
        pool.submit(tmp_path / "a.png").result()


def test_a_file_over_the_limit_of_bytes_is_refused(tmp_path: Path) -> None:
    rough((64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ImageRejected, match="at most 100 are read"):
        decode_for(None, tmp_path / "a.png", limits=Limits(max_file_bytes=100))
