"""The parts of the module for browsers give in Node.js, without any package, what Python gives: bit for bit."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.conftest import ROOT
from vit_edge.errors import ImageRejected
from vit_edge.image import Pixels, Preprocessing, decode
from vit_edge.model_file.artifact import MANIFEST_KEY, open_model
from vit_edge.runtime.bundle.decoding_probes import decoding_probes, resizes_tall_images_vertically_first
from vit_edge.runtime.checks.golden import Tolerance, differences, golden_images

PARTS = ROOT / "runtime" / "bundle" / "web" / "vit-edge"
SCRIPT = ROOT / "tests" / "support" / "pixels.mjs"
Ask = Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask() -> Ask:
    """Return a function that runs commands in one process of Node.js."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")

    def run(commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        lines = "".join(f"{json.dumps(command)}\n" for command in commands)
        done = subprocess.run([node, SCRIPT, PARTS], input=lines, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def pixels_of(text: str, *shape: int) -> Pixels:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def random_image(height: int, width: int, seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


RESIZES: list[dict[str, Any]] = [
    {"resize": 37, "crop": (32, 32)},
    {"resize": 36, "crop": (31, 34), "crop_rounding": "floor"},
    {"resize": 33, "crop": (32, 32)},
    {"resize": (40, 29), "crop": (33, 28)},
    {"resize": (21, 34), "crop": (21, 34), "keep_ratio": True},
]
SIZES = [(37, 61), (300, 211), (16, 20), (33, 33), (96, 47), (8, 160)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_every_resize_and_crop_gives_the_pixels_of_pillow(ask: Ask, interpolation: Any) -> None:
    cases = [(size, Preprocessing(**form, interpolation=interpolation)) for size in SIZES for form in RESIZES]
    images = [random_image(*size, seed=seed) for seed, (size, _) in enumerate(cases)]
    found = ask(
        [
            {
                "command": "fit",
                "data": encoded(image.tobytes()),
                "height": image.shape[0],
                "width": image.shape[1],
                "preprocessing": preprocessing.to_dict(),
                "order": {"tallFirst": resizes_tall_images_vertically_first()},
            }
            for image, (_, preprocessing) in zip(images, cases, strict=True)
        ]
    )
    for image, (_, preprocessing), answer in zip(images, cases, found, strict=True):
        expected = preprocessing.fit(Image.fromarray(image))
        np.testing.assert_array_equal(pixels_of(answer["result"], *expected.shape), expected)


def test_both_orders_of_the_passes_are_those_of_pillow_in_two_steps(ask: Ask) -> None:
    image, preprocessing = random_image(96, 47, seed=2), Preprocessing(resize=37, crop=(32, 32))
    height, width = preprocessing.resized(96, 47)
    common = {"command": "fit", "data": encoded(image.tobytes()), "height": 96, "width": 47}
    common["preprocessing"] = preprocessing.to_dict()
    found = ask([{**common, "order": {"tallFirst": order}} for order in (True, False)])
    pixels = [pixels_of(answer["result"], 32, 32, 3) for answer in found]
    for half, made in (((47, height), pixels[0]), ((width, 96), pixels[1])):
        first = Image.fromarray(image).resize(half, Image.Resampling.BICUBIC)
        whole = first.resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(made, preprocessing.fit(whole))
    assert (pixels[0] != pixels[1]).any()


def test_every_turn_is_that_of_exif_transpose(ask: Ask) -> None:
    image = random_image(9, 13, seed=1)
    common = {"command": "upright", "data": encoded(image.tobytes()), "height": 9, "width": 13}
    found = ask([{**common, "orientation": orientation} for orientation in range(1, 9)])
    for orientation, answer in enumerate(found, start=1):
        tagged = Image.fromarray(image)
        tagged.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(tagged))
        turned = answer["result"]
        shape = turned["height"], turned["width"], 3
        np.testing.assert_array_equal(pixels_of(turned["data"], *shape), expected)


def test_every_color_under_every_alpha_is_that_of_alpha_composite(ask: Ask) -> None:
    colors, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.dstack((colors, 255 - colors, colors // 2, alphas)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    (answer,) = ask([{"command": "composite", "data": encoded(rgba.tobytes())}])
    np.testing.assert_array_equal(pixels_of(answer["result"], 256, 256, 3), np.asarray(decode(buffer.getvalue())))


def test_normalised_values_are_the_floats_of_numpy(ask: Ask) -> None:
    preprocessing, image = Preprocessing(resize=16, crop=(16, 16)), np.arange(768, dtype=np.int64).astype(np.uint8)
    common = {"command": "normalised", "data": encoded(image.tobytes())}
    (answer,) = ask([{**common, "preprocessing": preprocessing.to_dict()}])
    expected = preprocessing.normalise(image.reshape(1, 16, 16, 3))
    assert base64.b64decode(answer["result"]) == expected.tobytes()


def test_golden_inputs_are_the_same(ask: Ask) -> None:
    seeds = [0, 1, 5, 3001, 2**30 + 7]
    found = ask([{"command": "mosaic", "seed": seed, "height": 21, "width": 34} for seed in seeds])
    expected = golden_images(seeds, height=21, width=34)
    np.testing.assert_array_equal([pixels_of(answer["result"], 21, 34, 3) for answer in found], expected)


def test_a_file_without_metadata_decodes_to_the_same_pixels_and_has_its_kind(ask: Ask) -> None:
    probes = decoding_probes()
    found = [answer["result"] for answer in ask([{"command": "image", "data": probe["data"]} for probe in probes])]
    for probe, file in zip(probes, found, strict=True):
        whole = Image.open(io.BytesIO(base64.b64decode(probe["data"])))
        bare = Image.open(io.BytesIO(base64.b64decode(file["data"])))
        assert file["kind"] == probe["kind"]
        assert (file["width"], file["height"], file["orientation"]) == (*whole.size, whole.getexif().get(0x0112, 1))
        assert "icc_profile" not in bare.info
        assert dict(bare.getexif()) == {}
        np.testing.assert_array_equal(np.asarray(bare.convert("RGBA")), np.asarray(whole.convert("RGBA")))


def tagged_files() -> dict[str, bytes]:
    """Return images that say in every place how they are to be turned."""
    image = Image.fromarray(random_image(12, 17, seed=4))
    exif, empty = Image.Exif(), Image.Exif()
    exif[0x0112], empty[0x010F] = 6, "maker"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    profile = "\nexif\n      " + f"{len(exif.tobytes())}\n" + exif.tobytes().hex() + "\n"
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"
    files = {}
    for kind in ("JPEG", "PNG", "WEBP"):
        files[f"{kind} exif"] = saved(image, kind, exif=exif)
        files[f"{kind} exif without it"] = saved(image, kind, exif=empty)
        files[f"{kind} big-endian"] = saved(image, kind, exif=big_endian)
    files["JPEG xmp"], files["WEBP xmp"] = saved(image, "JPEG", xmp=xmp), saved(image, "WEBP", xmp=xmp)
    files["JPEG xmp and exif"] = saved(image, "JPEG", xmp=xmp, exif=exif)
    files["JPEG strange value"] = saved(
        image, "JPEG", exif=big_endian.replace(b"\0\x03\0\0\0\0\0\0", b"\0\x09\0\0\0\0\0\0")
    )
    for name, is_packed in (("plain", False), ("packed", True)):
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=is_packed)
        files[f"PNG xmp {name}"] = saved(image, "PNG", pnginfo=texts)
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Raw profile type exif", profile, zip=is_packed)
        files[f"PNG profile {name}"] = saved(image, "PNG", pnginfo=texts)
    return files


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_orientation_is_read_from_every_place_where_pillow_reads_it(ask: Ask) -> None:
    files = tagged_files()
    found = ask([{"command": "image", "data": encoded(data)} for data in files.values()])
    expected = {}
    for name, data in files.items():
        value = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
        expected[name] = value if 2 <= value <= 8 else 1
    assert set(expected.values()) == {1, 3, 6, 8}
    assert {name: answer["result"]["orientation"] for name, answer in zip(files, found, strict=True)} == expected


def test_files_cut_short_anywhere_are_refused_as_in_python(ask: Ask) -> None:
    image = Image.fromarray(random_image(24, 31, seed=5))
    whole = [saved(image, "JPEG"), saved(image, "JPEG", progressive=True), saved(image, "PNG"), saved(image, "WEBP")]
    cut = [data[: len(data) * part // 16] for data in whole for part in range(1, 16)]
    for data in cut:
        with pytest.raises(ImageRejected):
            decode(data)
    found = ask([{"command": "image", "data": encoded(data)} for data in cut])
    assert {answer.get("code") for answer in found} == {"image-rejected"}


def png_of(width: int, height: int) -> bytes:
    """Return the beginning of a PNG that says it has this size."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big") + end


def test_sizes_and_formats_that_python_refuses_are_refused_before_they_are_decoded(ask: Ask) -> None:
    image = Image.fromarray(random_image(24, 31, seed=6))
    exif = saved(image, "WEBP", exif=b"Exif\0\0not a TIFF header")
    other = [b"", b"hello", saved(image, "BMP"), saved(image, "GIF"), saved(image, "TIFF"), exif]
    sizes = [png_of(7, 90), png_of(8000, 8000), png_of(31_000, 2000), png_of(400, 19)]
    found = ask([{"command": "image", "data": encoded(data)} for data in (*other, *sizes)])
    assert [answer.get("code") for answer in found] == ["image-rejected"] * len(found)
    assert "8000 x 8000 pixels; at most 50000000 pixels" in found[-3]["message"]
    for data in (exif, *sizes):
        with pytest.raises(ImageRejected):
            decode(data)


def test_a_tolerance_decides_as_in_python(ask: Ask) -> None:
    random = np.random.default_rng(7)
    expected = random.normal(0, 3, (4, 6)).astype(np.float32)
    tolerances = [
        Tolerance(spread=1e-2, least_spread=1.0),
        Tolerance(absolute=0.02, relative=1e-3),
        Tolerance(sqnr_db=40.0, top1_gap=0.0),
        Tolerance(spread=1e-4, sqnr_db=20.0, top1_gap=0.5),
    ]
    cases = [
        (tolerance, (expected + random.normal(0, noise, expected.shape)).astype(np.float32))
        for tolerance in tolerances
        for noise in (0, 1e-5, 5e-3, 0.05, 2.0)
    ]
    bounds = ("absolute", "relative", "spread", "least_spread", "sqnr_db", "top1_gap")
    found = ask(
        [
            {
                "command": "compare",
                "expected": expected.tolist(),
                "found": other.tolist(),
                "tolerance": {name: getattr(tolerance, name) for name in bounds},
            }
            for tolerance, other in cases
        ]
    )
    verdicts = [not differences(expected, other, tolerance) for tolerance, other in cases]
    assert 4 <= sum(verdicts) < len(verdicts) - 4
    assert ["code" not in answer for answer in found] == verdicts


def test_a_model_file_is_read_and_one_changed_bit_is_refused(ask: Ask, small_model: Path) -> None:
    model = open_model(small_model / "m.onnx")
    text: bytes = next(entry.value for entry in model.proto.metadata_props if entry.key == MANIFEST_KEY).encode()
    about = {"sha256": model.sha256, "manifest": [model.data.rindex(text), len(text)]}
    changed = bytearray(model.data)
    changed[len(changed) // 2] ^= 1
    resealed = model.with_manifest(replace(model.manifest, name="another"))
    files = [model.data, bytes(changed), model.data[:-1], model.data[:-83], resealed, b""]
    found = ask([{"command": "model", "data": encoded(data), "about": about} for data in files])
    assert found[0]["result"] == {"name": model.manifest.name, "sqnr": True}
    assert [answer.get("code") for answer in found[1:]] == ["not-trusted"] * 5
