"""Latencies of several candidates in one process, in turn, how sure their ratios are, and whether it was quiet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.machine import noise as machine_noise
from vit_edge.machine.noise import Noise
from vit_edge.runtime.benchmark.candidate import UNMEASURED
from vit_edge.runtime.benchmark.statistics import Ratio, ratio
from vit_edge.runtime.benchmark.timing import time_calls, turns

__all__ = ["WARM_UP", "Load", "Ratio", "Samples", "Watch", "block", "count", "ratio", "take_turns"]

Load = Noise

# Milliseconds [candidates, rounds, queries].
Samples: TypeAlias = npt.NDArray[np.float64]

WARM_UP = 30


def count(text: str) -> int:
    """Return a count from the command line."""
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count from 1 to 100,000")
    return int(text)


def take_turns(ask: Sequence[Callable[[int], object]], *, rounds: int, queries: int, warm_up: int = WARM_UP) -> Samples:
    """Return every sample of every candidate, measured in turns after a warm-up."""
    for one in ask:
        for number in range(warm_up):
            one(number)
    samples_CRQ = np.empty((len(ask), rounds, queries))
    for number, order in enumerate(turns(len(ask), rounds)):
        for position in order:
            samples_CRQ[position, number] = block(ask[position], queries)
    return samples_CRQ


def block(ask: Callable[[int], object], queries: int) -> Samples:
    """Return the milliseconds of `queries` calls, after a few that are not measured, as `Candidate.sample` does."""
    for number in range(UNMEASURED):
        ask(number)
    return np.array(time_calls(ask, queries=queries)) / 1e6


class Watch(machine_noise.Watch):
    """Watch the machine from now until `stop`."""

    def stop(self) -> Noise:
        """Return what there was, and say on stderr where it was not quiet."""
        load = super().stop()
        if not load.is_quiet:
            print(f"warning: {load}", file=sys.stderr, flush=True)
        return load
