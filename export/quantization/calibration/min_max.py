"""Smallest and largest values of a tensor, or of its channels, over images: overall, and averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["MinMax"]

Array: TypeAlias = npt.NDArray[np.float64]


class MinMax:
    """Smallest and largest values along an axis, of all images together and as sums over images, in float64."""

    def __init__(self, *, axis: int | None) -> None:
        self._axis = axis
        self._count = 0
        self._ends: list[Array] = []  # low and high of all, sums of low and high

    def add(self, values: npt.NDArray[Any]) -> None:
        """Take in the values of one image."""
        if self._axis is None:
            rows = values.reshape(-1, 1)
        else:
            rows = np.moveaxis(values, self._axis, -1).reshape(-1, values.shape[self._axis])
        if not rows.size:
            raise ValueError("holds no value")
        low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("holds values that are not finite")
        if not self._count:
            self._ends = [low, high, low, high]
        else:
            lowest, highest, low_sum, high_sum = self._ends
            self._ends = [np.minimum(lowest, low), np.maximum(highest, high), low_sum + low, high_sum + high]
        self._count += 1

    def ends(self, *, averaged: bool) -> tuple[Array, Array]:
        """Return the low and the high end, each over all images or as the mean of the images' own."""
        lowest, highest, low_sum, high_sum = self._ends
        return (low_sum / self._count, high_sum / self._count) if averaged else (lowest, highest)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return what `restore` takes."""
        return {"count": np.array([self._count], np.int64), "ends": np.stack(self._ends)}

    def restored(self, state: Mapping[str, npt.NDArray[Any]]) -> MinMax:
        """Return one of this axis that holds `state`; raises ValueError or KeyError where it is none."""
        made = MinMax(axis=self._axis)
        if state["ends"].shape[0] != 4 or state["ends"].ndim != 2 or state["ends"].dtype != np.float64:
            raise ValueError("it does not hold the ends of ranges")
        made._count, made._ends = int(state["count"][0]), list(state["ends"])
        return made
