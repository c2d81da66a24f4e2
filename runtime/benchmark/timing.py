"""The one timing loop: how long each call takes, and the order in which several candidates take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

__all__ = ["time_calls", "turns"]


def time_calls(call: Callable[[int], object], *, seconds: float = 0.0, queries: int = 1) -> list[int]:
    """Return the nanoseconds of each call, at least `queries` of them and for at least `seconds`.

    `call` gets the number of the call, to choose its input.
    """
    samples_ns: list[int] = []
    end = time.perf_counter() + seconds
    while len(samples_ns) < queries or time.perf_counter() < end:
        started = time.perf_counter_ns()
        call(len(samples_ns))
        samples_ns.append(time.perf_counter_ns() - started)
    return samples_ns


def turns(candidates: int, rounds: int) -> Iterator[list[int]]:
    """Yield for each round the order of the candidates, so that drift affects all alike.

    Each round starts with the next candidate, and every second round goes backwards.
    """
    for number in range(rounds):
        order = [(number + position) % candidates for position in range(candidates)]
        yield order if number % 2 == 0 else order[::-1]
