"""Ranges of activations from calibration images: streamed, in memory that does not grow with their number.

Every statistic is taken image by image, so a batch changes no bit of it, and can be kept on disk meanwhile, so a
calibration that was stopped goes on with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.errors import DataRejected, ModelRejected, UsageError
from vit_edge.export.graph.intermediate_tensors import Activations
from vit_edge.export.quantization.calibration.cache import (
    CacheEntry,
    CalibrationCache,
    ImageChain,
    Saved,
    calibration_key,
)
from vit_edge.export.quantization.calibration.histograms import Histogram, entropy_range, mse_range, percentile_range
from vit_edge.export.quantization.calibration.min_max import MinMax
from vit_edge.runtime.engines.protocol import Array as Image

__all__ = [
    "EARLIER_METHODS",
    "METHODS",
    "ChannelRange",
    "Method",
    "Range",
    "observe_channels",
    "observe_histograms",
    "observe_min_max",
    "observe_ranges",
    "range_of",
]

Array: TypeAlias = npt.NDArray[np.float64]
Method: TypeAlias = Literal["min-max", "moving-average", "percentile", "entropy", "mse"]
ChannelMethod: TypeAlias = Literal["min-max", "moving-average"]

METHODS: tuple[Method, ...] = get_args(Method)
# Names in manifests that were written before these had the terms of the field.
EARLIER_METHODS: dict[str, Method] = {"averaged min-max": "moving-average"}
_FROM_MIN_MAX: tuple[ChannelMethod, ...] = get_args(ChannelMethod)
# ONNX Runtime's default; a ViT's outliers carry information: 99.99 costs DeiT-tiny 10 dB.
_PERCENTILE = 99.999
_UINT8_LEVELS = 255

S = TypeVar("S", bound="_Statistic")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The values that a tensor is quantized over; always includes zero."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelRange:
    """The smallest and largest value of each channel of a tensor, float64 [channels]."""

    low_D: Array
    high_D: Array

    @property
    def varies(self) -> bool:
        """Return whether any channel varies within an image: in a tensor of one token none does."""
        size = float(np.maximum(np.abs(self.low_D), np.abs(self.high_D)).max())
        return float(np.max(self.high_D - self.low_D)) > 1e-6 * size


def observe_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[Image],
    *,
    method: Method = "moving-average",
    percentile: float = _PERCENTILE,
    levels: int = _UINT8_LEVELS,
    batch_size: int = 1,
    cache: CalibrationCache | None = None,
) -> Mapping[str, Range]:
    """Return the range of each tensor over `images`, each as the graph takes it and without a batch axis.

    "moving-average" are the means over images of their smallest and largest value: one odd image does not widen
    the range for all (DeiT-tiny: 20.2 dB against 19.5 dB for "min-max"). The others come from histograms: "percentile"
    leaves out what lies beyond `percentile` % (it ruins a ViT, whose outliers carry information), "entropy" and "mse"
    choose the ends that lose least in `levels` steps. Memory holds the tensors of one image, or 16 MB of a batch's.

    With a `cache`, `images` have to be iterable more than once. Raises DataRejected where there is no image,
    ModelRejected where the graph does not run or gives values that are not finite, UsageError.
    """
    _check(method, METHODS, batch_size=batch_size, percentile=percentile, levels=levels)
    if method in _FROM_MIN_MAX:
        averaged, overall = observe_min_max(model, tensors, images, batch_size=batch_size, cache=cache)
        return averaged if method == "moving-average" else overall
    histograms = observe_histograms(model, tensors, images, batch_size=batch_size, cache=cache)
    return {name: range_of(h, method, percentile=percentile, levels=levels) for name, h in histograms.items()}


def observe_min_max(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[Image],
    *,
    batch_size: int = 1,
    cache: CalibrationCache | None = None,
) -> tuple[Mapping[str, Range], Mapping[str, Range]]:
    """Return the "moving-average" and the "min-max" of each tensor from one pass; else as `observe_ranges`."""
    found = _observe(
        model,
        tensors,
        images,
        lambda: MinMax(axis=None),
        statistic="min-max",
        batch_size=batch_size,
        cache=cache,
    )

    def ranges(*, averaged: bool) -> Mapping[str, Range]:
        ends = {name: observer.ends(averaged=averaged) for name, observer in found.items()}
        return {name: _with_zero(float(low[0]), float(high[0])) for name, (low, high) in ends.items()}

    return ranges(averaged=True), ranges(averaged=False)


def observe_channels(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[Image],
    *,
    method: ChannelMethod = "moving-average",
    axis: int = -1,
    batch_size: int = 1,
    cache: CalibrationCache | None = None,
) -> Mapping[str, ChannelRange]:
    """Return the min-max, overall or averaged over images, of each channel of each tensor along `axis`.

    The last axis holds the channels of a Transformer's tokens, axis 1 those of a convolution. The rest is as for
    `observe_ranges`.
    """
    _check(method, _FROM_MIN_MAX, batch_size=batch_size)
    found = _observe(
        model,
        tensors,
        images,
        lambda: MinMax(axis=axis),
        statistic=f"min-max of axis {axis}",
        batch_size=batch_size,
        cache=cache,
    )
    ends = {name: observer.ends(averaged=method == "moving-average") for name, observer in found.items()}
    return {name: ChannelRange(low_D=low_D, high_D=high_D) for name, (low_D, high_D) in ends.items()}


def observe_histograms(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[Image],
    *,
    batch_size: int = 1,
    cache: CalibrationCache | None = None,
) -> Mapping[str, Histogram]:
    """Return the histogram of each tensor, from which `range_of` chooses; the rest is as for `observe_ranges`."""
    _check("entropy", METHODS, batch_size=batch_size)
    return _observe(model, tensors, images, Histogram, statistic="histogram", batch_size=batch_size, cache=cache)


def range_of(
    histogram: Histogram, method: Method, *, percentile: float = _PERCENTILE, levels: int = _UINT8_LEVELS
) -> Range:
    """Return the range that `method` chooses from a histogram; averages over images are not in it: UsageError."""
    _check(method, [name for name in METHODS if name != "moving-average"], percentile=percentile, levels=levels)
    if method == "percentile":
        return _with_zero(*percentile_range(histogram, percentile))
    if method == "min-max":
        return _with_zero(histogram.low, histogram.high)
    return _with_zero(*(entropy_range if method == "entropy" else mse_range)(histogram, levels))


class _Statistic(Protocol):
    def add(self, values: npt.NDArray[Any]) -> None: ...

    def state(self) -> dict[str, npt.NDArray[Any]]: ...

    def restored(self: S, state: Mapping[str, npt.NDArray[Any]]) -> S: ...


class _Gathering(Generic[S]):
    """The statistics of all tensors over the images so far; `is_whole` but while an image is taken in."""

    def __init__(self, tensors: Sequence[str], make: Callable[[], S]) -> None:
        self.statistics = {name: make() for name in tensors}
        self.seen = ImageChain()
        self.is_whole = True

    def add(self, image: Image, values: Sequence[npt.NDArray[Any]]) -> None:
        """Take in one image."""
        self.is_whole = False  # Ctrl-C in here would leave a part of it
        for (name, statistic), value in zip(self.statistics.items(), values, strict=True):
            self._add(name, statistic, value if value.dtype in (np.float32, np.float64) else value.astype(np.float32))
        self.seen.add(image)
        self.is_whole = True

    def _add(self, name: str, statistic: S, value: npt.NDArray[Any]) -> None:
        try:
            statistic.add(value)
        except ValueError as error:
            reason = f"at image {self.seen.num_images + 1} the tensor {name!r} {error}"
            remedy = "export the network again; a weight may be damaged, or activations overflow"
            raise ModelRejected("cannot calibrate", reason=reason, remedy=remedy) from error

    def saved(self) -> Saved:
        """Return what the cache keeps."""
        names = enumerate(self.statistics.values())
        state = {f"{number} {key}": value for number, s in names for key, value in s.state().items()}
        return Saved(num_images=self.seen.num_images, digest=self.seen.digest, state=state)

    def restore(self, saved: Saved, seen: ImageChain) -> None:
        """Take up what was saved; raises ValueError, KeyError or IndexError where it is something else."""
        parts: list[dict[str, npt.NDArray[Any]]] = [{} for _ in self.statistics]
        for name, value in saved.state.items():
            number, _, key = name.partition(" ")
            parts[int(number)][key] = value
        restored = [s.restored(part) for s, part in zip(self.statistics.values(), parts, strict=True)]
        self.statistics, self.seen = dict(zip(self.statistics, restored, strict=True)), seen


def _observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[Image],
    make: Callable[[], S],
    *,
    statistic: str,
    batch_size: int,
    cache: CalibrationCache | None,
) -> Mapping[str, S]:
    """Return the statistics of each tensor over all images, those of the cache included."""
    names = tuple(dict.fromkeys(tensors))
    gathering = _Gathering(names, make)
    stream, entry = iter(images), None
    if cache is not None:
        if stream is images:
            raise TypeError("with a cache, images have to be iterable more than once; give a list, or no cache")
        key = calibration_key(model, names, statistic=statistic, preprocessing=cache.preprocessing)
        stream, entry = _resumed(gathering, images, cache, key)
    known = gathering.seen.num_images
    activations: Activations | None = None
    try:
        while batch := list(islice(stream, batch_size)):
            activations = activations or Activations(model, names)
            for image, values in zip(batch, activations.of(batch), strict=True):
                gathering.add(image, values)
            if entry is not None:
                entry.save_sometimes(gathering.saved)
    finally:  # whatever ends it: what is there is kept
        if entry is not None and gathering.is_whole and gathering.seen.num_images > known:
            entry.save(gathering.saved())
    if not gathering.seen.num_images:
        reason = "there are no calibration images"
        raise DataRejected("cannot calibrate", reason=reason, remedy="give images like those in use")
    return gathering.statistics


def _resumed(
    gathering: _Gathering[S], images: Iterable[Image], cache: CalibrationCache, key: str
) -> tuple[Iterator[Image], CacheEntry | None]:
    """Fill `gathering` from the cache; return the images that are left to run, and the entry to keep them in."""
    stream = iter(images)
    first = next(stream, None)
    if first is None:
        return stream, None
    seen = ImageChain()
    seen.add(first)
    entry = cache.entry(key, seen.digest)
    saved = entry.read()
    if saved is None or saved.num_images < 1:
        return chain([first], stream), entry
    for image in islice(stream, saved.num_images - 1):
        seen.add(image)
    if (seen.num_images, seen.digest) != (saved.num_images, saved.digest):
        return iter(images), entry  # other images after the first: from the beginning
    try:
        gathering.restore(saved, seen)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        entry.discard(f"its statistics are not those of these tensors: {error}")
        return iter(images), entry
    return stream, entry


def _with_zero(low: float, high: float) -> Range:
    return Range(low=min(low, 0.0), high=max(high, 0.0))


def _check(
    method: str,
    methods: Sequence[str],
    *,
    batch_size: int = 1,
    percentile: float = _PERCENTILE,
    levels: int = _UINT8_LEVELS,
) -> None:
    """Raise UsageError on values out of range."""
    wrong = []
    if method not in methods:
        wrong.append((f"the method is {method!r}", f"choose from {', '.join(methods)}"))
    if batch_size < 1:
        wrong.append((f"the batch size is {batch_size}", "give 1 or more"))
    if not 50 < percentile <= 100:
        wrong.append((f"the percentile is {percentile:g}", "give a value above 50 and up to 100, such as 99.999"))
    if not 1 < levels < 2**16:
        wrong.append((f"the range has {levels} steps", "give 255 for 8 bits"))
    for reason, remedy in wrong:
        raise UsageError("cannot calibrate", reason=reason, remedy=remedy)
