"""Latencies of several candidates in one process, in turn, how sure their ratios are, and whether it was quiet."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.runtime.benchmark import machine_noise
from vit_edge.runtime.benchmark.machine_noise import Noise
from vit_edge.runtime.benchmark.statistics import Ratio, ratio

__all__ = ["WARM_UP", "Load", "Ratio", "Samples", "Watch", "count", "ratio", "take_turns"]

Load = Noise

# Milliseconds [candidates, rounds, queries].
Samples: TypeAlias = npt.NDArray[np.float64]

WARM_UP = 30
# Asked first in every block and not measured: the candidate before has pushed these weights out of the caches.
_UNMEASURED = 3


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


class Watch(machine_noise.Watch):
    """Watch the machine from now until `stop`."""

    def stop(self) -> Noise:
        """Return what there was, and say on stderr where it was not quiet."""
        load = super().stop()
        if not load.is_quiet:
            print(f"warning: {load}", file=sys.stderr, flush=True)
        return load
