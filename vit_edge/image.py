"""From an image to the pixels a network sees: decoded, oriented, resized and cropped in one place for every stage.

Training's evaluation, calibration, verification, the runtime and the benchmark all call `Preprocessing.pixels`, and the
settings travel in the model file, so an image gives the same pixels everywhere.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from vit_edge.errors import ImageRejected, UsageError, printable
from vit_edge.files import kind_of, read_file, sha256_hex

__all__ = [
    "BACKGROUND",
    "FORMATS",
    "LIMIT_VARIABLE",
    "Color",
    "Decoding",
    "ImageSource",
    "Interpolation",
    "Limits",
    "Pixels",
    "Preprocessing",
    "decode",
    "decode_for",
    "pixel_hash",
]

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | Pixels"
# The channels of an array in their order: OpenCV gives "bgr", picamera2 "bgra" too.
Color: TypeAlias = Literal["rgb", "bgr", "rgba", "bgra"]
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
# "fast" lets the JPEG decoder leave out what the resize would average away: the nearest scale above its size.
Decoding: TypeAlias = Literal["full", "fast"]

# Only these decoders are tried: Pillow registers over 40, and one of them starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# Transparent pixels show this colour.
BACKGROUND = (255, 255, 255)

# Overrides `Limits.max_pixels` where no limits are given.
LIMIT_VARIABLE = "VIT_EDGE_MAX_IMAGE_MEGAPIXELS"

_MAX_SIDE = 30_000
_MIN_SIDE = 8
_MAX_ASPECT = 20
# What is converted at a time: a second copy of these rows is made, not of the image.
_ROWS = 64

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Where R, G, B and alpha lie in an array.
_CHANNELS: dict[str, list[int]] = {"rgb": [0, 1, 2], "bgr": [2, 1, 0], "rgba": [0, 1, 2, 3], "bgra": [2, 1, 0, 3]}
# EXIF 2.3, tag Orientation: these values turn an image by a quarter.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is decoded at most; raises UsageError if a limit is not positive.

    Decoding needs up to 12 bytes a pixel, and the file. An 81-megapixel PNG of 0.2 MB passes Pillow without a warning.
    """

    max_pixels: int = 50_000_000
    max_side: int = _MAX_SIDE
    max_file_bytes: int = 100 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_side", "max_file_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                reason = f"{name} is {value!r}"
                raise UsageError("cannot limit the images", reason=reason, remedy="give a whole number over 0")

    @classmethod
    def of_megapixels(cls, megapixels: float | str, *, name: str = "max_image_megapixels") -> Limits:
        """Return the default limits with another number of pixels; raises UsageError that cites `name`."""
        try:
            return cls(max_pixels=int(float(megapixels) * 1_000_000))
        except (OverflowError, ValueError) as error:
            reason = f"{name} is {megapixels!r}"
            raise UsageError("cannot limit the images", reason=reason, remedy="give a number, such as 50") from error

    @classmethod
    def default(cls) -> Limits:
        """Return the limits that hold where none are given: those of the environment, else 50 megapixels."""
        megapixels = os.environ.get(LIMIT_VARIABLE)
        return cls.of_megapixels(megapixels, name=LIMIT_VARIABLE) if megapixels else cls()


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How an image becomes the network's input; raises ValueError where the fields disagree.

    `resize` is the short side in pixels (the aspect ratio is kept), or (height, width) to squash to; with `keep_ratio`
    the image covers (height, width), as timm resizes for inputs that are not square. `crop` is the (height, width) cut
    from the centre, which is the network's input size; half pixels of its offset go to the even number ("half-even",
    torchvision) or down ("floor", transformers). `mean` and `std` belong to RGB in [0, 1].
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    keep_ratio: bool = False
    crop_rounding: Literal["half-even", "floor"] = "half-even"

    def __post_init__(self) -> None:
        for name in ("crop", "mean", "std"):  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))
        resize = self.resize if isinstance(self.resize, int) else tuple(self.resize)
        object.__setattr__(self, "resize", resize)
        sides = (resize, resize) if isinstance(resize, int) else resize
        if len(self.crop) != 2 or len(sides) != 2 or min(*self.crop, *sides) < 1:
            raise ValueError(f"resize {self.resize} and crop {self.crop} must be positive pixel counts")
        if sides[0] < self.crop[0] or sides[1] < self.crop[1]:
            raise ValueError(f"crop {self.crop} is larger than the image resized to {self.resize}")
        if max(*self.crop, *sides) > _MAX_SIDE or not all(isinstance(side, int) for side in (*self.crop, *sides)):
            raise ValueError(f"resize {self.resize} and crop {self.crop} must be whole numbers up to {_MAX_SIDE:,}")
        if sides[0] * sides[1] > Limits().max_pixels:
            raise ValueError(f"resize {self.resize} makes over {Limits().max_pixels:,} pixels of an image")
        if not isinstance(self.keep_ratio, bool) or (self.keep_ratio and isinstance(resize, int)):
            raise ValueError(f"keep_ratio {self.keep_ratio!r} needs a resize of (height, width)")
        if self.crop_rounding not in ("half-even", "floor"):
            raise ValueError(f"crop_rounding {self.crop_rounding!r}; choose half-even or floor")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}; choose one of {', '.join(_INTERPOLATIONS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(np.isfinite([*self.mean, *self.std])):
            raise ValueError(f"mean {self.mean} and std {self.std} must be three finite numbers each, for R, G and B")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Return the settings that `to_dict` gave; raises ValueError or TypeError on missing or unknown fields."""
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; rules of other libraries only if they are not the usual ones."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        usual = {"keep_ratio": False, "crop_rounding": "half-even"}
        return {key: value for key, value in values.items() if key not in usual or value != usual[key]}

    def pixels(self, source: ImageSource) -> Pixels:
        """Return uint8 [height, width, 3] RGB, resized and cropped; raises ImageRejected, or TypeError."""
        return self.fit(decode(source))

    def fit(self, image: Image.Image, *, upright: tuple[int, int] | None = None) -> Pixels:
        """Return uint8 [height, width, 3] from a decoded RGB image, resized and cropped.

        `upright` is the (height, width) of the image where it was decoded at a smaller scale.
        """
        height, width = self.resized(*(upright or (image.height, image.width)))
        if height * width > Limits().max_pixels:
            reason = f"resized for the network, the image would have {width} x {height} pixels"
            raise _rejected("the image given", reason, "crop the image first")
        if (width, height) != image.size:
            image = image.resize((width, height), _INTERPOLATIONS[self.interpolation])
        halve = math.floor if self.crop_rounding == "floor" else round  # Python's round: half to even
        top, left = halve((height - self.crop[0]) / 2), halve((width - self.crop[1]) / 2)
        image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.array(image, dtype=np.uint8)

    def normalise(self, images_NHWC: Pixels) -> npt.NDArray[np.float32]:
        """Return float32 [batch, 3, height, width], (x / 255 - mean) / std: the classic input of a network."""
        scaled = images_NHWC.astype(np.float32) / np.float32(255)
        normalised = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image is resized to before the crop."""
        if not isinstance(self.resize, int):
            if not self.keep_ratio:
                return self.resize
            ratio = min(height / self.resize[0], width / self.resize[1])  # as timm's ResizeKeepRatio
            return round(height / ratio), round(width / ratio)
        # The long side is rounded down, as torchvision's Resize does.
        if width <= height:
            return int(self.resize * height / width), self.resize
        return self.resize, int(self.resize * width / height)


def decode(source: ImageSource, *, color: Color = "rgb") -> Image.Image:
    """Return an RGB image, upright (EXIF orientation applied), alpha composited on white.

    An image is a path, the bytes of a file, an open binary file, a PIL image, or uint8 pixels [height, width, 3 or 4],
    whose channels are those of `color`. An RGB image that was given is returned as it is. Raises ImageRejected (limits,
    format, damage), or TypeError for anything else.
    """
    return decode_for(None, source, color=color)[0]


def decode_for(
    preprocessing: Preprocessing | None, source: ImageSource, *, color: Color = "rgb", limits: Limits | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Return what `decode` does, and the (height, width) of the upright image; raises as it does.

    With `preprocessing` a JPEG file is decoded at the smallest scale (1/2, 1/4, 1/8) that is not below what that
    resizes to. An image that was opened by somebody else is not touched.
    """
    limits = limits or Limits.default()
    name, image = _open(source, color, limits)
    try:
        _check_size(image, name, limits)
        upright = _upright(image)
        if preprocessing is not None and not isinstance(source, Image.Image):
            _scale_down(image, preprocessing.resized(*upright))
        if getattr(image, "is_animated", False):
            _log.warning("%s has several frames; only the first is used", name)
        if image.mode == "I" and image.format == "PNG":  # a 16-bit grey PNG, in Pillow before 10.3
            image = image.convert("I;16")
        image = _loaded(image, is_ours=not isinstance(source, Image.Image))
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, name), upright
    except ImageRejected:
        raise
    # Pillow's decoders raise struct.error, TypeError, IndexError, SyntaxError, ValueError, RuntimeError and more.
    except Exception as error:
        reason = f"the image is damaged or incomplete ({type(error).__name__}: {error})"
        raise _rejected(name, reason, "copy or export it again") from error


def pixel_hash(pixels: Pixels) -> str:
    """Return the SHA-256 of the pixels and their shape: equal exactly where two images are equal to the network."""
    return sha256_hex(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes())


def _upright(image: Image.Image) -> tuple[int, int]:
    """Return the height and width that the image has when it is upright."""
    is_turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
    return (image.width, image.height) if is_turned else (image.height, image.width)


def _scale_down(image: Image.Image, needed: tuple[int, int]) -> None:
    """Tell the decoder of a JPEG file which (height, width) of the upright image is needed; others ignore it."""
    is_turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
    height, width = reversed(needed) if is_turned else needed
    image.draft(None, (width, height))


def _loaded(image: Image.Image, *, is_ours: bool) -> Image.Image:
    """Return the image decoded.

    Pillow's WebP decoder keeps two frames besides the bytes and the pixels of the one that is read, 16 bytes a pixel:
    the decoder of an image that only we use is freed before there is another copy.
    """
    decoder = getattr(image, "_decoder", None) if is_ours and image.format == "WEBP" else None
    if decoder is None:
        image.load()
        return image
    frame = decoder.get_next()
    if frame is None:
        raise ValueError("the first frame cannot be decoded")
    kind, size, info = getattr(image, "rawmode"), image.size, image.info  # noqa: B009 - only WebP has it
    image._decoder = decoder = None  # type: ignore[attr-defined]
    loaded = Image.frombuffer(kind, size, frame[0], "raw", kind, 0, 1)
    loaded.info.update(info)
    return loaded


def _open(source: ImageSource, color: Color, limits: Limits) -> tuple[str, Image.Image]:
    if color not in _CHANNELS:
        raise TypeError(f"color is {color!r}; choose one of {', '.join(_CHANNELS)}")
    if isinstance(source, np.ndarray):
        return "the array given", _from_array(source, color)
    if color != "rgb":
        raise TypeError(f"color is {color!r}, but the image is no array: all others say themselves what they hold")
    if isinstance(source, Image.Image):
        return "the image given", source
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = "the bytes given", bytes(source)
    elif isinstance(source, str | os.PathLike):
        name = printable(source)
        data = read_file(source, what="image", max_bytes=limits.max_file_bytes, error=ImageRejected)
    elif hasattr(source, "read"):
        name = "the file given"
        try:
            if hasattr(source, "seekable") and source.seekable():  # a BytesIO that was just written stands at its end
                source.seek(0)
            data = source.read(limits.max_file_bytes)
        except (OSError, ValueError) as error:  # it is closed, or its disk fails
            raise _rejected(name, f"the file cannot be read ({error})", "open it again") from error
        if not isinstance(data, bytes):
            raise TypeError("image is a file opened as text; open it with mode 'rb'")
    else:
        raise TypeError(
            f"image is {type(source).__name__}; "
            "give a path, bytes, a binary file, a PIL image or uint8 [height, width, 3]"
        )
    return name, _open_bytes(data, name)


def _open_bytes(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        kind = kind_of(data)
        if isinstance(error, Image.DecompressionBombError):
            raise _rejected(name, "the image has far too many pixels", "scale it down first") from error
        if kind is not None and "image" not in kind[0]:
            raise _rejected(name, kind[0], kind[1]) from error
        reason = f"the file is not an image that can be read ({', '.join(FORMATS)})"
        raise _rejected(name, reason, "convert it to one of these") from error


def _from_array(pixels: Pixels, color: Color) -> Image.Image:
    channels = _CHANNELS[color]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != len(channels):
        expected = f"uint8 [height, width, {len(channels)}] for color={color!r}"
        others = [name for name, order in _CHANNELS.items() if pixels.ndim == 3 and len(order) == pixels.shape[2]]
        hint = f", or say its color: {' or '.join(others)}" if others and pixels.dtype == np.uint8 else ""
        raise TypeError(f"image is {pixels.dtype} {list(pixels.shape)}; give {expected}{hint}")
    if 0 in pixels.shape:
        raise _rejected("the array given", "the image has no pixels", "give at least one row and one column")
    return Image.fromarray(np.ascontiguousarray(pixels[..., channels]))


def _check_size(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if long > limits.max_side or width * height > limits.max_pixels:
        limit = f"at most {limits.max_pixels:,} pixels and {limits.max_side:,} a side are decoded"
        raise _rejected(name, f"the image has {width} x {height} pixels; {limit}", "scale it down first")
    if short < _MIN_SIDE or long > _MAX_ASPECT * short:
        limit = f"at least {_MIN_SIDE} a side and at most {_MAX_ASPECT} times as long as wide can be judged"
        raise _rejected(name, f"the image has {width} x {height} pixels; {limit}", "leave it out")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return the image in RGB, converted by bands of rows: only the image and the result are in memory."""
    if image.mode in ("I", "F"):
        reason = f"the image's colour mode is {image.mode} (32 bits a pixel), which has no known range"
        raise _rejected(name, reason, "convert it to 8 or 16 bits a channel")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    converted = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        box = (0, top, image.width, min(top + _ROWS, image.height))
        converted.paste(_rows_to_rgb(image.crop(box)), box)
    return converted


def _rows_to_rgb(rows: Image.Image) -> Image.Image:
    if rows.mode.startswith("I;16"):
        grey = np.asarray(rows, dtype=np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if rows.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in rows.info:
        opaque = rows.convert("RGBA")
        background = Image.new("RGBA", opaque.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, opaque).convert("RGB")
    return rows.convert("RGB")


def _rejected(name: str, reason: str, remedy: str) -> ImageRejected:
    return ImageRejected("cannot use the image", file=name, reason=reason, remedy=remedy)
