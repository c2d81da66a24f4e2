"""Latencies that were observed, their percentiles, and how sure a ratio of two candidates is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Latency", "Ratio", "change", "latency", "quantiles_ms", "ratio"]

Floats: TypeAlias = npt.NDArray[np.float64]
_RESAMPLES, _CONFIDENCE = 9_999, 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Observed times of one query in milliseconds; percentiles are samples that occurred (nearest rank)."""

    min: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How many times as fast: by the medians, by the minima, and the median of the rounds with its 95 % interval."""

    by_median: float
    by_min: float
    by_round: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.by_median:.2f} / {self.by_min:.2f} / {self.by_round:.2f} ({low:.2f} to {high:.2f})"


def latency(samples_ns: Sequence[int] | npt.NDArray[Any]) -> Latency:
    """Return the percentiles of what was observed, given in nanoseconds."""
    ordered_ms = np.sort(np.asarray(samples_ns, dtype=np.float64)) / 1e6
    p50, p90, p99 = (_nearest_rank(ordered_ms, share) for share in (0.5, 0.9, 0.99))
    return Latency(min=float(ordered_ms[0]), p50=p50, p90=p90, p99=p99)


def quantiles_ms(samples_ns: Sequence[int] | npt.NDArray[Any]) -> tuple[float, ...]:
    """Return the 0th, 1st ... 100th percentile in milliseconds, each a sample that occurred."""
    ordered_ms = np.sort(np.asarray(samples_ns, dtype=np.float64)) / 1e6
    return tuple(_nearest_rank(ordered_ms, percent / 100) for percent in range(101))


def ratio(base: Sequence[Floats] | Floats, candidate: Sequence[Floats] | Floats) -> Ratio:
    """Return how many times as fast the candidate is as the base, each given as the samples of every round.

    Rounds are compared in pairs, as both were measured one after the other: drift cancels. The interval is a percentile
    bootstrap of the rounds' ratios.
    """
    by_round_R = _medians(base) / _medians(candidate)
    all_base, all_candidate = np.concatenate(list(base)), np.concatenate(list(candidate))
    return Ratio(
        by_median=float(np.median(all_base) / np.median(all_candidate)),
        by_min=float(all_base.min() / all_candidate.min()),
        by_round=float(np.median(by_round_R)),
        interval=_interval(_resampled(by_round_R, seed=0)),
    )


def change(old_R: Sequence[float], new_R: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return new over old by the medians of their rounds, and its 95 % interval; they are resampled apart."""
    old, new = np.asarray(old_R, dtype=np.float64), np.asarray(new_R, dtype=np.float64)
    found = _resampled(new, seed=0) / _resampled(old, seed=1)
    return float(np.median(new) / np.median(old)), _interval(found)


def _nearest_rank(ordered: Floats, share: float) -> float:
    return float(ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)])


def _medians(rounds: Sequence[Floats] | Floats) -> Floats:
    return np.array([np.median(samples) for samples in rounds])


def _resampled(values_R: Floats, *, seed: int) -> Floats:
    """Return medians of as many values drawn with replacement, always the same draws."""
    drawn = np.random.default_rng(seed).integers(0, len(values_R), (_RESAMPLES, len(values_R)))
    found: Floats = np.median(values_R[drawn], axis=1)
    return found


def _interval(medians: Floats) -> tuple[float, float]:
    low, high = np.quantile(medians, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
