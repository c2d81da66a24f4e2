"""Small images of every kind that a page reads, with the pixels that they must give.

Browsers decode some kinds in other ways than Pillow, or not at all. A page decodes these images when it loads, and
refuses a kind that gives other pixels there.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from vit_edge.image import Pixels, decode, pixel_hash
from vit_edge.runtime.checks.golden import golden_images

__all__ = ["decoding_probes", "resizes_tall_images_vertically_first"]

_HEIGHT, _WIDTH, _SEED = 24, 41, 3
_ORIENTATION, _QUARTER_TURN = 0x0112, 6
_PNG_COLORS = {1: 0, 2: 4, 3: 2, 4: 6}  # the color type for each number of channels


def decoding_probes() -> list[dict[str, str]]:
    """Return `kind`, `data` (base64) and `sha256` (of the decoded RGB pixels) of each image."""
    return [
        {"kind": kind, "data": base64.b64encode(data).decode("ascii"), "sha256": pixel_hash(np.asarray(decode(data)))}
        for kind, data in _images()
    ]


def resizes_tall_images_vertically_first() -> bool:
    """Return whether the installed Pillow does; 13.0 began to, for images that lose over twice as many rows as columns.

    The two passes round to 8 bits, so their order shows: by up to 9 of 255 with bicubic.
    """
    image = Image.fromarray(golden_images([_SEED], height=90, width=_WIDTH)[0])
    first = image.resize((image.width, 30), Image.Resampling.BICUBIC)
    expected = first.resize((40, 30), Image.Resampling.BICUBIC)
    return image.resize((40, 30), Image.Resampling.BICUBIC).tobytes() == expected.tobytes()


def _images() -> Iterator[tuple[str, bytes]]:
    pixels = golden_images([_SEED], height=_HEIGHT, width=_WIDTH)[0]
    color = Image.fromarray(pixels)
    yield from _jpegs(color)
    yield from _pngs(pixels, color)
    yield from _webps(pixels, color)


def _jpegs(color: Image.Image) -> Iterator[tuple[str, bytes]]:
    for subsampling in (0, 1, 2):
        yield "color JPEG", _saved(color, "JPEG", quality=90, subsampling=subsampling)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    exif = Image.Exif()
    exif[_ORIENTATION] = _QUARTER_TURN
    yield "color JPEG", _saved(color, "JPEG", quality=75, progressive=True, exif=exif, icc_profile=profile)
    yield "gray JPEG", _saved(color.convert("L"), "JPEG", quality=90)
    yield "CMYK JPEG", _saved(Image.merge("CMYK", [*color.split(), color.convert("L")]), "JPEG", quality=90)


def _pngs(pixels: Pixels, color: Image.Image) -> Iterator[tuple[str, bytes]]:
    gray, alpha = color.convert("L"), Image.fromarray(pixels[..., 0])
    yield "gray PNG", _saved(gray, "PNG")
    yield "gray PNG", _saved(gray.convert("1"), "PNG")
    yield "gray PNG with alpha", _saved(Image.merge("LA", (gray, alpha)), "PNG")
    yield "gray PNG with alpha", _saved(gray, "PNG", transparency=int(np.asarray(gray)[3, 3]))
    yield "palette PNG", _saved(color.quantize(16), "PNG")
    yield "palette PNG with alpha", _saved(color.quantize(32), "PNG", transparency=bytes(range(0, 256, 8)))
    yield "color PNG", _saved(color, "PNG")
    yield "color PNG with alpha", _saved(Image.merge("RGBA", (*color.split(), alpha)), "PNG")
    yield "color PNG with alpha", _saved(color, "PNG", transparency=tuple(pixels[3, 3].tolist()))
    deep = np.dstack((pixels, pixels[..., 0])).astype(np.uint16) * 251 + 77
    for name, channels in (("gray PNG", 1), ("gray PNG with alpha", 2), ("color PNG", 3), ("color PNG with alpha", 4)):
        yield f"16-bit {name}", _png_of_16_bits(deep[..., :channels])


def _webps(pixels: Pixels, color: Image.Image) -> Iterator[tuple[str, bytes]]:
    with_alpha = Image.merge("RGBA", (*color.split(), Image.fromarray(pixels[..., 0])))
    for name, lossless in (("lossy WebP", False), ("lossless WebP", True)):
        yield name, _saved(color, "WEBP", lossless=lossless, quality=80)
        yield f"{name} with alpha", _saved(with_alpha, "WEBP", lossless=lossless, quality=80, exact=True)
    frames = [color.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    yield "animated WebP", _saved(color, "WEBP", save_all=True, append_images=frames, lossless=True)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_of_16_bits(pixels: npt.NDArray[np.uint16]) -> bytes:
    """Return a PNG of uint16 [height, width, channels]; Pillow writes 16 bits for gray only."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLORS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
