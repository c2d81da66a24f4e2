"""An image encoded again is known, and other images are not taken for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from vit_edge.data import find_images
from vit_edge.data.near_duplicates import fingerprint, near_duplicates
from vit_edge.image import Pixels, Preprocessing

PREPROCESSING = Preprocessing(resize=256, crop=(224, 224))


def _encoded(image: Image.Image, kind: str, quality: int = 75) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind, quality=quality)
    return data.getvalue()


def _halved_and_back(image: Image.Image) -> bytes:
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)
    return _encoded(half.resize(image.size, Image.Resampling.BICUBIC), "PNG")


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG 30": lambda image: _encoded(image, "JPEG", 30),
    "JPEG 95": lambda image: _encoded(image, "JPEG", 95),
    "WebP 30": lambda image: _encoded(image, "WEBP", 30),
    "PNG": lambda image: _encoded(image, "PNG"),
    "half the size and back": _halved_and_back,
}


def _prints(images: list[Pixels]) -> list[str]:
    return [fingerprint(pixels) for pixels in images]


@pytest.mark.parametrize("how", COPIES)
def test_every_copy_of_a_photograph_is_found_and_nothing_else(shared_data: Path, how: str) -> None:
    paths = sorted((shared_data / "photos" / "calibration").glob("*.jpg"))[::4]
    originals = _prints([PREPROCESSING.pixels(path) for path in paths])
    copies = _prints([PREPROCESSING.pixels(COPIES[how](Image.open(path).convert("RGB"))) for path in paths])
    assert near_duplicates(originals, copies) == [(i, i) for i in range(len(paths))]


def test_no_two_photographs_are_taken_for_copies(shared_data: Path) -> None:
    folders = [shared_data / "photos" / name for name in ("calibration", "evaluation")]
    prints = [_prints([PREPROCESSING.pixels(path) for path in sorted(folder.glob("*.jpg"))[::3]]) for folder in folders]
    assert near_duplicates(*prints) == []


def test_digits_are_not_taken_for_each_other_and_their_copies_are_found(digits: Path) -> None:
    small = Preprocessing(resize=32, crop=(32, 32))
    calibration = find_images(ROOT / "calibration_data")
    prints = _prints([small.pixels(path) for path in calibration])
    assert near_duplicates(prints, _prints([small.pixels(path) for path in find_images(digits / "test")])) == []
    copies = _prints([small.pixels(COPIES["JPEG 30"](Image.open(path).convert("RGB"))) for path in calibration])
    assert near_duplicates(prints, copies) == [(i, i) for i in range(len(prints))]


def test_images_of_one_colour_are_no_copies_of_each_other() -> None:
    prints = _prints([np.full((32, 32, 3), grey, dtype=np.uint8) for grey in (0, 1, 1, 255)])
    assert near_duplicates(prints, prints) == []
    assert near_duplicates([], prints) == near_duplicates(prints, []) == []


def test_the_same_pixels_give_the_same_text_and_other_texts_are_refused() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    assert fingerprint(pixels) == fingerprint(pixels.copy())
    assert len(fingerprint(pixels)) == 88
    for text in ("", "A" * 87, "!" * 88, " " * 88, "A" * 84 + "===="):
        with pytest.raises(ValueError, match=r"fingerprint|base64|characters|padding|Excess|Discontinuous"):
            near_duplicates([fingerprint(pixels)], [text])
