"""Thousands of small images made from some photographs, and files that only look like images."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_QUALITY = 85
_HOSTILE_SIDE = 60_000


def write_images(photographs: Sequence[Path], folder: Path, numbers: Sequence[int]) -> None:
    """Write JPEGs of 96 to 160 pixels a side, crops of the photographs, 1,000 in each folder; a number is a seed."""
    for number in numbers:
        path = image_path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(number)
        with Image.open(photographs[number % len(photographs)]) as opened:
            photograph = opened.convert("RGB")
        scale = random.uniform(0.5, 1.0)
        width, height = (max(1, int(side * scale)) for side in photograph.size)
        left, top = (
            int(random.integers(0, whole - part + 1))
            for whole, part in zip(photograph.size, (width, height), strict=True)
        )
        size = tuple(int(side) for side in random.integers(96, 161, 2))
        photograph.resize((size[0], size[1]), box=(left, top, left + width, top + height)).save(path, quality=_QUALITY)


def image_path(folder: Path, number: int) -> Path:
    """Return where the image of a number is."""
    return folder / f"{number // 1000:03}" / f"{number:06}.jpg"


def spoil(folder: Path, numbers: Sequence[int]) -> None:
    """Replace these images by files that cannot be used, of one kind after the other."""
    for place, number in enumerate(numbers):
        path = image_path(folder, number)
        KINDS[place % len(KINDS)](path, path.read_bytes())


def _write(content: Callable[[bytes], bytes]) -> Callable[[Path, bytes], None]:
    return lambda path, good: _overwrite(path, content(good))


def _overwrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _sparse(path: Path, good: bytes) -> None:
    """Make a file that claims two terabytes, none of them on the disk."""
    _overwrite(path, good)
    os.truncate(path, 2**41)


def _link_to_nothing(path: Path, _good: bytes) -> None:
    path.unlink()
    path.symlink_to("gone.jpg")


def _png_of_60000_pixels_a_side(_good: bytes) -> bytes:
    """Return a PNG of 10 kB that takes 11 GB decoded."""
    header = _HOSTILE_SIDE.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(10_000_000), 9)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    parts = (
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _huge_but_right(_good: bytes) -> bytes:
    """Return a JPEG of 100 megapixels: twice what is permitted."""
    buffer = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(buffer, "JPEG", quality=20)
    return buffer.getvalue()


_HUGE = _huge_but_right(b"")
KINDS: tuple[Callable[[Path, bytes], None], ...] = (
    _write(lambda _: b""),
    _write(lambda good: good[: len(good) // 2]),
    _write(lambda good: good[:40]),
    _write(lambda good: b"<html>" + good),
    _write(lambda good: bytes(len(good))),
    _write(lambda _: np.random.default_rng(0).bytes(5_000)),
    _write(lambda _: b"GIF89a" + bytes(2_000)),
    _write(_png_of_60000_pixels_a_side),
    _write(lambda _: _HUGE),
    _write(lambda _: b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    _sparse,
    _link_to_nothing,
)
