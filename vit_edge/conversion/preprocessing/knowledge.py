"""What is known of a network in addition to its tensors, from which source, and which source counts; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vit_edge.image import Interpolation, Preprocessing
from vit_edge.vit_config import Activation, Pooling

__all__ = ["CLIP", "HALF", "IMAGENET", "Facts", "Geometry", "Knowledge", "Triple", "size_of", "three"]

Triple = tuple[float, float, float]

# (mean, std): torchvision's and DeiT's; Google's; CLIP's (arXiv:2103.00020, its published code).
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How an image is brought to the network's size: resized in pixels for one `crop`, or by the crop's fraction.

    Without a crop, `resize` is right for every size. With `fraction`, the image is resized to the crop divided by it,
    rounded down as timm does, and covers both sides of an input that is not square. `squash` gives up the aspect ratio.
    Another size of network keeps the proportion.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    fraction: float = 1.0
    squash: bool = False
    keep_ratio: bool = False
    crop_rounding: Literal["half-even", "floor"] = "half-even"

    def __post_init__(self) -> None:
        if self.resize is None and self.crop is not None:
            raise ValueError(f"crop {self.crop} needs resize")
        if not 0.05 <= self.fraction <= 1.0:
            raise ValueError(f"the crop is {self.fraction} of the resized image; it must be between 0.05 and 1")

    def resize_for(self, image_size: tuple[int, int]) -> int | tuple[int, int]:
        """Return `Preprocessing.resize` for a network of this input size."""
        if self.resize is not None:
            if self.crop in (None, image_size):
                return self.resize
            assert self.crop is not None
            if isinstance(self.resize, int):
                return max(image_size) * self.resize // max(self.crop)
            height, width = (new * old // cut for new, old, cut in zip(image_size, self.resize, self.crop, strict=True))
            return height, width
        height, width = (math.floor(side / self.fraction) for side in image_size)
        return height if height == width and not self.squash else (height, width)

    def keeps_ratio(self, image_size: tuple[int, int]) -> bool:
        """Return `Preprocessing.keep_ratio` for a network of this input size."""
        by_fraction = self.resize is None and not self.squash and isinstance(self.resize_for(image_size), tuple)
        return self.keep_ratio or by_fraction

    def preprocessing(
        self, image_size: tuple[int, int], *, interpolation: Interpolation, mean: Triple, std: Triple
    ) -> Preprocessing:
        """Return the settings for a network of this input size; raises ValueError if they disagree."""
        return Preprocessing(
            resize=self.resize_for(image_size),
            crop=image_size,
            interpolation=interpolation,
            mean=mean,
            std=std,
            keep_ratio=self.keeps_ratio(image_size),
            crop_rounding=self.crop_rounding,
        )

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Geometry:
        """Return the geometry of settings that are complete."""
        return cls(
            resize=preprocessing.resize,
            crop=preprocessing.crop,
            keep_ratio=preprocessing.keep_ratio,
            crop_rounding=preprocessing.crop_rounding,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What one source specifies; a field is None if the source does not.

    `image_size` is what the position embeddings were made for, `input_size` what the network is used at where that
    differs. `bgr` is whether the library turns the colours round before the network. `shape` has widths and counts by
    the field of ViTConfig, to be held against the tensors. With `assumed`, no source specified them: the values are
    usable and every command warns of them.
    """

    origin: str
    assumed: bool = False
    name: str | None = None
    image_size: tuple[int, int] | None = None
    input_size: tuple[int, int] | None = None
    num_heads: int | None = None
    activation: Activation | None = None
    layer_norm_eps: float | None = None
    pooling: Pooling | None = None
    position_slots: Literal["all", "patches"] | None = None
    layer_scale: float | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: str | None = None
    geometry: Geometry | None = None
    bgr: bool | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    license: str | None = None
    base_model: str | None = None
    shape: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """All sources, the one that counts most first; the last may be assumptions."""

    facts: tuple[Facts, ...]

    def source_of(self, name: str) -> Facts | None:
        """Return the first source that specifies the field."""
        return next((facts for facts in self.facts if getattr(facts, name) is not None), None)

    def value(self, name: str) -> Any:
        """Return what counts for the field, or None if no source specifies it."""
        source = self.source_of(name)
        return None if source is None else getattr(source, name)

    def specifies(self, name: str) -> bool:
        """Return whether a source specifies the field, and does not assume it."""
        source = self.source_of(name)
        return source is not None and not source.assumed


def size_of(value: Any) -> tuple[int, int]:
    """Return (height, width) of a number or a pair; raises ValueError."""
    sides = (value, value) if type(value) is int else tuple(value) if isinstance(value, list | tuple) else ()
    if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
        return sides[0], sides[1]
    raise ValueError(f"{value!r} is no size; it has to be pixels, or height and width")


def three(values: Any) -> Triple:
    """Return the numbers for R, G and B from three, or from one for all; raises ValueError."""
    if isinstance(values, int | float) and not isinstance(values, bool):
        values = [values] * 3
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{values!r} are not three numbers, for R, G and B")
    first, second, third = (float(value) for value in values)
    return first, second, third
