"""How often values occur, in bounded memory and one pass, and the ranges that entropy, percentile and MSE choose.

Bins are as wide as a power of two and begin at its multiples. Where new values need more of them, the width doubles and
bins join in pairs, exactly. So the histogram is a function of the values alone: neither their order nor how they were
divided changes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr

__all__ = ["BINS", "Histogram", "entropy_range", "mse_range", "percentile_range"]

Counts: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

# At most, and never less than about half of it: 16 to 32 for each step of an 8-bit range. 64 KiB a tensor.
BINS = 8192
_LOWEST_EXPONENT = -126
_NUM_CANDIDATES = 128
# What a level that has no value of its own is given, so that the divergence stays finite.
_SMOOTHING = 1e-4


@dataclass(slots=True)
class Histogram:
    """Counts of bins 2^exponent wide, the first at `first` x 2^exponent, over a range that includes zero."""

    exponent: int = _LOWEST_EXPONENT
    first: int = 0
    low: float = 0.0
    high: float = 0.0
    counts: Counts = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count float32 values of any shape; raises ValueError where one is not finite, or there is none."""
        if not values.size:
            raise ValueError("holds no value")
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("holds values that are not finite")
        self._cover(min(self.low, low), max(self.high, high))
        # Exact: a power of two.
        # In float64, where no small value becomes zero: that would be the bin next to its own.
        bins = np.floor(values.ravel() * np.float64(2.0**-self.exponent)).astype(np.int64) - self.first
        self.counts += np.bincount(bins, minlength=len(self.counts))

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> Floats:
        """Return the edges of all bins, one more than there are bins."""
        return np.arange(self.first, self.first + len(self.counts) + 1, dtype=np.float64) * self.width

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return what `restored` takes."""
        place = np.array([self.exponent, self.first], np.int64)
        return {"counts": self.counts, "place": place, "extremes": np.array([self.low, self.high], np.float64)}

    def restored(self, state: Mapping[str, npt.NDArray[Any]]) -> Histogram:
        """Return the histogram that gave `state`; raises ValueError or KeyError where none did."""
        exponent, first = (int(value) for value in state["place"])
        low, high = (float(value) for value in state["extremes"])
        counts = np.array(state["counts"], np.int64)
        made = Histogram(exponent=exponent, first=first, low=low, high=high, counts=counts)
        span = (math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent)))
        if counts.shape != (span[1] - span[0] + 1,) or first != span[0] or len(counts) > BINS or np.min(counts) < 0:
            raise ValueError("the counts do not fit their range")
        return made

    def _cover(self, low: float, high: float) -> None:
        """Widen the range, and the bins where there would be too many."""
        exponent = self.exponent
        if high > low:  # a power below what fits, at most; then up to what does
            exponent = max(exponent, math.frexp((high - low) / BINS)[1] - 2)
        while _last(high, exponent) - _last(low, exponent) >= BINS:
            exponent += 1
        joined = exponent - self.exponent
        first = _last(low, exponent)
        counts = np.zeros(_last(high, exponent) - first + 1, np.int64)
        # Shifting rounds down, so each old bin finds the one that contains it.
        old = (self.first + np.flatnonzero(self.counts)) >> min(joined, 62)
        np.add.at(counts, old - first, self.counts[self.counts > 0])
        self.exponent, self.first, self.counts, self.low, self.high = exponent, first, counts, low, high


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """Return the range that holds `percentile` % of the values; of the rest, half may lie on each side."""
    counts, edges = histogram.counts, histogram.edges
    cut = int(counts.sum()) * (100 - percentile) / 200
    above = np.flatnonzero(np.cumsum(counts) > cut)
    below = np.flatnonzero(np.cumsum(counts[::-1])[::-1] > cut)
    if not len(above):  # nothing was counted
        return histogram.low, histogram.high
    low, high = float(edges[above[0]]), float(edges[below[-1] + 1])
    return max(min(low, 0.0), histogram.low), min(max(high, 0.0), histogram.high)


def entropy_range(histogram: Histogram, levels: int) -> tuple[float, float]:
    """Return the range whose `levels` lose least information: the smallest Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT" (2017): what lies outside counts for the outermost bins of the reference,
    and not for the quantized distribution. The candidates reach as far below zero as above it, or to the end.
    """
    counts, zero = histogram.counts, -histogram.first
    reach = max(zero, len(counts) - zero)
    least = min((levels + 1) // 2, reach)
    candidates = np.unique(np.linspace(least, reach, _NUM_CANDIDATES).astype(int))
    spans = [(max(0, zero - int(k)), min(len(counts), zero + int(k))) for k in candidates]
    low, high = spans[int(np.argmin([_divergence(counts, start, end, levels) for start, end in spans]))]
    edges = histogram.edges
    return max(float(edges[low]), histogram.low), min(float(edges[high]), histogram.high)


def mse_range(histogram: Histogram, levels: int) -> tuple[float, float]:
    """Return the range of the smallest mean squared error, `levels` steps wide: both ends drawn in, then each alone."""
    filled = histogram.counts > 0
    if not filled.any():
        return histogram.low, histogram.high
    values, counts = (histogram.edges[:-1] + histogram.width / 2)[filled], histogram.counts[filled]
    low, high = histogram.low, histogram.high
    fractions = np.linspace(1, 0, _NUM_CANDIDATES, endpoint=False, dtype=np.float64)
    for draw in (_both, _low, _high):
        candidates = list(draw(low, high, fractions))
        errors = [_squared_error(values, counts, *candidate, levels) for candidate in candidates]
        low, high = candidates[int(np.argmin(errors))]
    return low, high


def _last(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _divergence(counts: Counts, start: int, end: int, levels: int) -> float:
    """Return the divergence of the values from what `levels` of the bins from `start` to `end` tell of them."""
    inside = counts[start:end]
    reference = inside.astype(np.float64)
    reference[0] += counts[:start].sum()
    reference[-1] += counts[end:].sum()
    filled = reference > 0
    starts = np.unique(np.linspace(0, len(inside), levels, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, len(inside)))
    shares = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(inside > 0, starts, dtype=np.int64), 1)
    spread = np.repeat(shares, sizes) * (inside > 0)
    spread = spread / max(spread.sum(), 1) * (1 - _SMOOTHING) + filled * _SMOOTHING / filled.sum()
    return float(rel_entr(reference / reference.sum(), spread).sum())


def _squared_error(values: Floats, counts: Counts, low: float, high: float, levels: int) -> float:
    scale = (high - low) / levels
    if scale <= 0:
        return float(counts @ values**2)
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(values / scale) + zero, 0, levels) - zero) * scale
    return float(counts @ (values - rounded) ** 2)


def _both(low: float, high: float, fractions: Floats) -> Iterator[tuple[float, float]]:
    for reach in (fractions * max(-low, high)).tolist():
        yield max(low, -reach), min(high, reach)


def _low(low: float, high: float, fractions: Floats) -> Iterator[tuple[float, float]]:
    for fraction in fractions.tolist():
        yield fraction * low, high


def _high(low: float, high: float, fractions: Floats) -> Iterator[tuple[float, float]]:
    for fraction in fractions.tolist():
        yield low, fraction * high
