"""Latencies of several candidates in one process, in turn, how sure their ratios are, and whether it was quiet."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

# Milliseconds [candidates, rounds, queries].
Samples: TypeAlias = npt.NDArray[np.float64]

WARM_UP = 30
# Asked first in every block and not measured: the candidate before has pushed these weights out of the caches.
_UNMEASURED = 3
# What others may take of a core, and what this process must get of the time: beyond these the figures are marked.
_QUIET_CORES = 0.05
_QUIET_SHARE = 0.98


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


def count(text: str) -> int:
    """Return a count from the command line."""
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count from 1 to 100,000")
    return int(text)


def take_turns(ask: Sequence[Callable[[int], object]], *, rounds: int, queries: int, warm_up: int = WARM_UP) -> Samples:
    """Return every sample: each candidate once a round, the first one round later the next, every second backwards."""
    for one in ask:
        for number in range(warm_up):
            one(number)
    samples_CRQ = np.empty((len(ask), rounds, queries))
    for number in range(rounds):
        order = [(number + position) % len(ask) for position in range(len(ask))]
        for position in order if number % 2 == 0 else reversed(order):
            samples_CRQ[position, number] = _block(ask[position], queries)
    return samples_CRQ


def _block(ask: Callable[[int], object], queries: int) -> list[float]:
    for number in range(_UNMEASURED):
        ask(number)
    taken_ns = []
    for number in range(queries):
        started = time.perf_counter_ns()
        ask(number)
        taken_ns.append(time.perf_counter_ns() - started)
    return [nanoseconds / 1e6 for nanoseconds in taken_ns]


def ratio(base_RQ: npt.NDArray[np.float64], candidate_RQ: npt.NDArray[np.float64]) -> Ratio:
    """Return how many times as fast the candidate is as the base; the interval is a percentile bootstrap of rounds."""
    from scipy import stats

    by_round_R = np.median(base_RQ, axis=1) / np.median(candidate_RQ, axis=1)
    low = high = float(by_round_R[0])
    if len(by_round_R) > 1:
        found = stats.bootstrap((by_round_R,), np.median, method="percentile", random_state=0).confidence_interval
        low, high = float(found.low), float(found.high)
    return Ratio(
        by_median=float(np.median(base_RQ) / np.median(candidate_RQ)),
        by_min=float(base_RQ.min() / candidate_RQ.min()),
        by_round=float(np.median(by_round_R)),
        interval=(low, high),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What this process got of the machine while it measured, and what others took; None where the system tells not."""

    wall_s: float
    own_cpu_s: float
    load_average: tuple[float, float]  # of the last minute, before and after
    other_cores: float | None  # of other processes, and of the host where it takes cores away

    @property
    def is_quiet(self) -> bool:
        """Return whether one thread had a core for itself and nearly nothing else ran."""
        alone = self.load_average[1] < 1.3 if self.other_cores is None else self.other_cores < _QUIET_CORES
        return alone and self.own_cpu_s >= _QUIET_SHARE * self.wall_s

    def __str__(self) -> str:
        others = "not known" if self.other_cores is None else f"{self.other_cores:.2f} of a core"
        share = f"own CPU time {100 * self.own_cpu_s / self.wall_s:.0f} % of {self.wall_s:.0f} s"
        said = (
            f"{share}, other processes {others}, load average {self.load_average[0]:.1f} to {self.load_average[1]:.1f}"
        )
        return said if self.is_quiet else f"**the machine was not quiet, measure again: {said}**"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return {**asdict(self), "quiet": self.is_quiet, "said": str(self)}


class Watch:
    """Watch the machine from now until `stop`."""

    def __init__(self) -> None:
        self._average = os.getloadavg()[0]
        self._busy_s, self._wall_s, self._own_s = _busy_s(), time.perf_counter(), time.process_time()

    def stop(self) -> Load:
        """Return what there was, and say on stderr where it was not quiet."""
        wall_s, own_s = time.perf_counter() - self._wall_s, time.process_time() - self._own_s
        busy_s, others = _busy_s(), None
        if busy_s is not None and self._busy_s is not None:
            others = max(0.0, busy_s - self._busy_s - own_s) / wall_s
        averages = (self._average, os.getloadavg()[0])
        load = Load(wall_s=wall_s, own_cpu_s=own_s, load_average=averages, other_cores=others)
        if not load.is_quiet:
            print(f"warning: {load}", file=sys.stderr, flush=True)
        return load


def _busy_s() -> float | None:
    """Return the seconds that all CPUs were in use, in the kernel and stolen by the host included, or None."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    except OSError:
        return None
    # cpu user nice system idle iowait irq softirq steal: in ticks, proc_stat(5)
    ticks = [int(field) for field in first[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
