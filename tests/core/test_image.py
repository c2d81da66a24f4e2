"""Images become the same pixels everywhere, and what is no usable image is refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from vit_edge.conversion.preprocessing.knowledge import Geometry
from vit_edge.errors import ImageRejected
from vit_edge.image import Preprocessing, decode, pixel_hash

MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(9, 90),
    width=st.integers(9, 90),
    crop=st.integers(8, 40),
    extra=st.integers(0, 20),
    mode=st.sampled_from(sorted(MODES)),
)
def test_resize_and_crop_are_those_of_torchvision(height: int, width: int, crop: int, extra: int, mode: str) -> None:
    image = Image.fromarray(noise(height, width))
    expected = reference.center_crop(reference.resize(image, [crop + extra], MODES[mode]), [crop, crop])
    found = Preprocessing(resize=crop + extra, crop=(crop, crop), interpolation=mode).pixels(image)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("size", [(50, 77), (77, 50), (101, 57), (57, 101), (45, 90), (33, 64)])
@pytest.mark.parametrize(("resize", "crop"), [(36, 32), (37, 32), (40, 33), (45, 45)])
def test_a_crop_rounded_down_is_that_of_transformers(size: tuple[int, int], resize: int, crop: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    found = Preprocessing(resize=resize, crop=(crop, crop), interpolation="bilinear", crop_rounding="floor")
    processor = transformers.CLIPImageProcessorPil if hasattr(transformers, "CLIPImageProcessorPil") else None
    processor = processor or transformers.CLIPImageProcessor
    expected = processor(
        size={"shortest_edge": resize}, crop_size={"height": crop, "width": crop}, resample=2, do_normalize=False,
        do_rescale=False,
    )(Image.fromarray(noise(*size)), return_tensors="np")["pixel_values"][0]  # fmt: skip
    np.testing.assert_array_equal(found.pixels(noise(*size)), expected.transpose(1, 2, 0))


@pytest.mark.parametrize("size", [(50, 77), (77, 50), (101, 57), (40, 40), (33, 90)])
@pytest.mark.parametrize(("input_size", "fraction"), [((32, 48), 0.9), ((48, 32), 0.875), ((32, 32), 0.9)])
def test_a_resize_that_keeps_the_ratio_is_that_of_timm(
    size: tuple[int, int], input_size: tuple[int, int], fraction: float
) -> None:
    data = pytest.importorskip("timm.data")
    transform = data.create_transform((3, *input_size), crop_pct=fraction, interpolation="bicubic", normalize=False)
    expected = np.asarray(transform(Image.fromarray(noise(*size)))).transpose(1, 2, 0)
    geometry = Geometry(fraction=fraction)
    settings = geometry.preprocessing(input_size, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    np.testing.assert_array_equal(settings.pixels(noise(*size)), expected)
    assert Preprocessing.from_dict(settings.to_dict()) == settings


def test_squashing_ignores_the_aspect_ratio() -> None:
    found = Preprocessing(resize=(16, 24), crop=(16, 24)).pixels(noise(50, 31))
    expected = Image.fromarray(noise(50, 31)).resize((24, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_normalise_is_mean_and_std_of_values_from_0_to_1() -> None:
    preprocessing = Preprocessing(resize=8, crop=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels = noise(8, 8)[None]
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    np.testing.assert_allclose(preprocessing.normalise(pixels), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_settings_survive_json() -> None:
    settings_ = Preprocessing(resize=256, crop=(224, 192), interpolation="lanczos")
    assert Preprocessing.from_dict(settings_.to_dict()) == settings_


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": 20, "crop": (24, 24)}, "larger than"),
        ({"resize": 24, "crop": (24, 0)}, "positive"),
        ({"resize": 24, "crop": (24, 24), "std": (0, 1, 1)}, "std"),
        ({"resize": 24, "crop": (24, 24), "mean": (0, 1)}, "three"),
        ({"resize": 24, "crop": (24, 24), "interpolation": "magic"}, "interpolation"),
    ],
)
def test_settings_that_disagree_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(16, 24)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose that turns the upright image as stored
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, exif=exif))), upright)


def test_transparency_shows_white() -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255
    found = np.asarray(decode(encoded(Image.fromarray(pixels))))
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == 0).all()


def test_transparency_of_a_palette_shows_white() -> None:
    image = Image.fromarray(np.zeros((8, 8), dtype=np.uint8), mode=None).convert("P")
    found = np.asarray(decode(encoded(image, transparency=image.getpixel((0, 0)))))
    assert (found == 255).all()


_WRITES_ONLY = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 cannot read the TIFF in YCbCr that it writes"
)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", pytest.param("YCbCr", marks=_WRITES_ONLY), "LA", "RGBA"])
def test_colour_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    found = decode(encoded(Image.fromarray(noise(16, 16)).convert(mode), kind))
    assert found.mode == "RGB"
    assert found.size == (16, 16)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = np.asarray(decode(encoded(Image.fromarray(grey))))
    np.testing.assert_array_equal(found[..., 0].reshape(-1), np.arange(256))


@pytest.mark.parametrize("kind", ["F", "I"])
def test_32_bit_pixels_are_refused_by_mode(kind: str) -> None:
    with pytest.raises(ImageRejected, match=f"mode is {kind}"):
        decode(encoded(Image.new(kind, (16, 16)), "TIFF"))


def _png_that_claims(width: int, height: int) -> bytes:
    """Return a small PNG whose header promises more pixels than it holds."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (encoded(Image.fromarray(noise(64, 64)))[:300], "damaged"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:700], "damaged"),
        (_png_that_claims(9000, 9000), "9000 x 9000"),
        (_png_that_claims(60000, 1), "60000 x 1"),
        (encoded(Image.new("RGB", (1, 1))), "1 x 1"),
        (encoded(Image.new("RGB", (900, 10))), "900 x 10"),
        (encoded(Image.new("RGB", (16, 16)), "GIF"), "not an image"),
        (encoded(Image.new("RGB", (16, 16)), "EPS"), "not an image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_usable_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageRejected, match=message):
        decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 40_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(ImageRejected, match="pixels"):
        decode(_png_that_claims(side, side))


@settings(max_examples=80, deadline=None)
@given(
    position=st.integers(0, 10_000), value=st.integers(0, 255), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"])
)
def test_a_damaged_image_decodes_or_is_refused_and_nothing_else(position: int, value: int, kind: str) -> None:
    data = bytearray(encoded(Image.fromarray(noise(32, 32)), kind))
    data[position % len(data)] = value
    try:
        image = decode(bytes(data))
    except ImageRejected:
        return
    assert image.mode == "RGB"


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    for name in ("fifo.png", "loop.png", "gone.png", "missing.png", "."):
        with pytest.raises(ImageRejected):
            decode(tmp_path / name)
    with pytest.raises(ImageRejected, match="not a regular file"):
        decode("/dev/zero")


def test_a_name_that_is_not_utf8_works_and_prints_escaped(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(path)).write_bytes(b"nothing")
    with pytest.raises(ImageRejected, match=r"caf\\xe9.png"):
        decode(os.fsdecode(path))


@pytest.mark.parametrize(
    "wrong", [None, 3, [1, 2], np.zeros((4, 4)), np.zeros((16, 16, 4), np.uint8), io.StringIO("x")]
)
def test_what_is_no_image_by_type_is_a_type_error(wrong: object) -> None:
    with pytest.raises(TypeError, match="image is"):
        decode(wrong)  # type: ignore[arg-type]


def test_every_kind_of_image_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise(20, 20)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    with path.open("rb") as file:
        sources = [path, str(path), path.read_bytes(), file, Image.open(path), pixels, pixels[:, ::-1][:, ::-1]]
        assert len({pixel_hash(preprocessing.pixels(source)) for source in sources}) == 1  # type: ignore[arg-type]


def test_a_binary_file_is_read_from_its_start_wherever_it_stands() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(20, 20)).save(buffer, format="PNG")  # and not rewound
    np.testing.assert_array_equal(np.asarray(decode(buffer)), noise(20, 20))


def test_settings_of_before_keep_their_rules() -> None:
    before = {"resize": 40, "crop": [32, 32], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = Preprocessing.from_dict(before)
    assert (settings.crop_rounding, settings.keep_ratio) == ("half-even", False)
    assert settings.to_dict() == before
