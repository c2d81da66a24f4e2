"""MLPerf's server scenario: queries of one image by a Poisson process, and the highest rate that holds a bound."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vit_edge.errors import VitEdgeError
from vit_edge.progress import Progress, silent
from vit_edge.runtime.benchmark.candidate import Round
from vit_edge.runtime.benchmark.scenarios import SideBySide
from vit_edge.runtime.benchmark.statistics import Floats, latency
from vit_edge.runtime.engines.protocol import EngineOptions, Model

__all__ = ["ServerCandidate", "Trial", "arrivals", "search_in_turns"]

# Halvings: the rate is found to 1/256 of what the workers could answer if queries came when they are free.
_STEPS = 8
_MOST_FAILED = 5
_PERCENTILE = 0.99
# The first rate is half of this many times what the warm-up promises.
_ABOVE_CAPACITY = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One rate that was tried: whether the 99th percentile held the bound. One that cannot any more is cut short."""

    rate_per_s: float
    holds: bool
    p99_ms: float
    num_queries: int
    seconds: float
    is_cut_short: bool


class ServerCandidate(SideBySide):
    """Workers behind one queue; a query's latency counts from the moment that the Poisson process set for it."""

    def __init__(
        self, path: str, model: Model, engine: str, options: EngineOptions, *, latency_bound_ms: float
    ) -> None:
        super().__init__(path, model, engine, options, 1)
        self.latency_bound_ms = latency_bound_ms
        self.trials: list[Trial] = []
        self._held, self._broke = 0.0, 0.0

    def warm_up(self) -> None:
        """Warm up, and take from it where to begin."""
        super().warm_up()
        if self.warmed is not None:
            self._broke = _ABOVE_CAPACITY * len(self.classifiers) * self.warmed.num_queries / self.warmed.seconds

    @property
    def throughput_per_s(self) -> float:
        """Return the highest rate that held the bound, 0 where none did."""
        return self._held

    @property
    def costs_ms(self) -> list[Floats]:
        return [np.array([1000 / self._held])] if self._held else []

    def sample(self, seconds: float, queries: int) -> None:
        """Try one rate, in the middle between the highest that held and the lowest that did not.

        Where 1/32 of what the workers can answer does not hold, no rate does, and nothing more is tried.
        """
        if not self._held and len(self.trials) >= _MOST_FAILED:
            return
        rate = (self._held + self._broke) / 2
        due_s = arrivals(rate, seconds=seconds, queries=queries, seed=len(self.trials))
        served = _Served(self, due_s)
        samples_ns = served.run()
        observed = latency(samples_ns)
        holds = not served.is_cut_short and observed.p99 <= self.latency_bound_ms
        trial = Trial(
            rate_per_s=rate,
            holds=holds,
            p99_ms=observed.p99,
            num_queries=len(samples_ns),
            seconds=served.seconds,
            is_cut_short=served.is_cut_short,
        )
        self.trials.append(trial)
        if holds:
            self._held = rate
        else:
            self._broke = rate
        if holds or not self._held:
            # The samples of the highest rate that held, or of the last that did not where none did.
            self.rounds = [Round(samples_ns=samples_ns, num_images=len(samples_ns), wall_s=served.seconds)]


def arrivals(rate_per_s: float, *, seconds: float, queries: int, seed: int) -> Floats:
    """Return when queries come, in seconds: a Poisson process, at least so many queries for at least so long."""
    random, most = np.random.default_rng(seed), max(queries, int(2 * rate_per_s * seconds) + 100)
    due_s: Floats = np.cumsum(random.exponential(1 / rate_per_s, most))
    return due_s[: max(queries, int(np.searchsorted(due_s, seconds)) + 1)]


def search_in_turns(
    candidates: Sequence[ServerCandidate],
    *,
    min_seconds: float,
    min_queries: int,
    progress: Progress = silent,
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Warm every candidate up, then try one rate of each after the other."""
    for candidate in candidates:
        candidate.warm_up()
    for number in range(_STEPS):
        for candidate in candidates:
            candidate.sample(min_seconds, min_queries)
        after_round()
        progress("searching the rate", number + 1, _STEPS)


class _Served:
    """One trial: whoever issues queries when they are due, and the workers that answer them."""

    def __init__(self, candidate: ServerCandidate, due_s: Floats) -> None:
        self._candidate, self._due_s = candidate, due_s
        self._bound_ns = candidate.latency_bound_ms * 1e6
        self._most_late = len(due_s) - int(np.ceil(_PERCENTILE * len(due_s)))
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._found: list[list[int]] = [[] for _ in candidate.classifiers]
        self._late = [0] * len(candidate.classifiers)
        self._failed: list[VitEdgeError] = []
        self._started_ns = 0
        self.is_cut_short, self.seconds = False, 0.0

    def run(self) -> list[int]:
        """Return the latencies in nanoseconds."""
        workers = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(len(self._found))]
        self._started_ns = time.perf_counter_ns() + 1_000_000
        for worker in workers:
            worker.start()
        for number, due_s in enumerate(self._due_s):
            wait_s = (self._started_ns - time.perf_counter_ns()) / 1e9 + due_s
            if wait_s > 0:
                time.sleep(wait_s)
            if self._is_over():
                break
            self._queue.put(number)
        for _ in workers:
            self._queue.put(None)
        for worker in workers:
            worker.join()
        if self._failed:
            raise self._failed[0]
        self.is_cut_short = self.is_cut_short or sum(map(len, self._found)) < len(self._due_s)
        self.seconds = (time.perf_counter_ns() - self._started_ns) / 1e9
        return [sample for samples in self._found for sample in samples]

    def _is_over(self) -> bool:
        """Return whether more queries were late than may be: what comes after cannot make it good."""
        return sum(self._late) > self._most_late or bool(self._failed)

    def _work(self, number: int) -> None:
        classifier, batches = self._candidate.classifiers[number], itertools.cycle(self._candidate.prepared)
        try:
            while (query := self._queue.get()) is not None:
                if self._is_over() and self._found[number]:
                    self.is_cut_short = True  # what waits behind it is not answered
                    continue
                classifier.run(next(batches))
                taken_ns = int(time.perf_counter_ns() - self._started_ns - self._due_s[query] * 1e9)
                self._found[number].append(taken_ns)
                self._late[number] += taken_ns > self._bound_ns
        except VitEdgeError as error:
            self._failed.append(error)
