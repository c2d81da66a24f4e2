"""The form of a manifest's golden vectors, checked before anything uses them: types, counts and sizes, by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["MOST_GOLDEN_INPUTS", "check_golden_fields"]

# Exports store 8; every load runs them all.
MOST_GOLDEN_INPUTS = 64
# 16 inputs of 1024 x 1024 pixels: an engine holds them all, and making them takes some 0.1 us for each value.
_MOST_GOLDEN_PIXELS = 2**24
# Exports store two images of 2 kB; every load decodes them.
_MOST_IMAGES, _MOST_IMAGE_CHARACTERS = 8, 1_000_000


def check_golden_fields(golden: Mapping[str, Any], *, crop: Sequence[int]) -> None:
    """Raise ValueError, which names the field, if the golden vectors are malformed or too many."""
    _expect("golden.generator", golden.get("generator"), str, "a text")
    seeds = _expect("golden.seeds", golden.get("seeds"), list, "a list of integers")
    for number, seed in enumerate(seeds):
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise ValueError(f"golden.seeds[{number}] is {_short(seed)}; an integer from 0 to 2^31 is needed")
    if not 1 <= len(seeds) <= MOST_GOLDEN_INPUTS:
        raise ValueError(f"golden.seeds has {len(seeds)} inputs; 1 to {MOST_GOLDEN_INPUTS} are read")
    pixels = len(seeds) * crop[0] * crop[1]
    if pixels > _MOST_GOLDEN_PIXELS:
        raise ValueError(f"golden.seeds makes {pixels:,} pixels; at most {_MOST_GOLDEN_PIXELS:,} are run")
    for number, entry in enumerate(_expect("golden.expected", golden.get("expected"), list, "a list")):
        _check_entry(f"golden.expected[{number}]", entry)
    images = _expect("golden.images", golden.get("images", []), list, "a list")
    if len(images) > _MOST_IMAGES:
        raise ValueError(f"golden.images has {len(images)} images; at most {_MOST_IMAGES} are read")
    for number, image in enumerate(images):
        _check_image(f"golden.images[{number}]", image)


def _check_entry(path: str, entry: object) -> None:
    fields = _expect(path, entry, Mapping, "an object")
    engines = _expect(f"{path}.engines", fields.get("engines"), list, "a list of names")
    for number, name in enumerate(engines):
        _expect(f"{path}.engines[{number}]", name, str, "a name")
    name = "embedding" if "embedding" in fields else "logits"
    _expect(f"{path}.{name}", fields.get(name), str, "base64")
    bounds = _expect(f"{path}.tolerance", fields.get("tolerance"), Mapping, "an object")
    for name, bound in bounds.items():
        is_number = isinstance(bound, int | float) and not isinstance(bound, bool) and abs(bound) < 1e9
        if bound is not None and not is_number:
            raise ValueError(f"{path}.tolerance.{name} is {_short(bound)}; a number is needed")
    if fields.get("made_on") is not None:
        _expect(f"{path}.made_on", fields["made_on"], Mapping, "an object")


def _check_image(path: str, image: object) -> None:
    fields = _expect(path, image, Mapping, "an object")
    for name in ("format", "data", "pixels_sha256"):
        text = _expect(f"{path}.{name}", fields.get(name), str, "a text")
        if len(text) > _MOST_IMAGE_CHARACTERS:
            raise ValueError(f"{path}.{name} has {len(text):,} characters; at most {_MOST_IMAGE_CHARACTERS:,} are read")


def _expect(path: str, value: object, kind: Any, needed: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{path} is {_short(value)}; {needed} is needed")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
