"""MLPerf's scenarios (Reddi et al., ISCA 2020) by our own scheduler: what fixes the metric before the run.

single-stream: one image a query, the next when the one before is answered; latency.
multi-stream: several images a query, otherwise the same; latency.
offline: all images are there at once; images a second.
server: queries come by a Poisson process; the highest rate at which the 99th percentile holds a bound.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import Literal, TypeAlias

import numpy as np

from vit_edge.errors import VitEdgeError
from vit_edge.machine.cpu import usable_threads
from vit_edge.runtime.benchmark.candidate import Candidate, Round
from vit_edge.runtime.benchmark.statistics import Floats
from vit_edge.runtime.engines.protocol import EngineOptions, Model
from vit_edge.runtime.loaded_model import LoadedModel
from vit_edge.runtime.serving.model_slot import ModelVersion

__all__ = ["OfflineCandidate", "Scenario", "SideBySide", "workers_for"]

Scenario: TypeAlias = Literal["single-stream", "multi-stream", "offline", "server"]


def workers_for(options: EngineOptions) -> int:
    """Return how many queries to run side by side: as many as fill the usable CPUs; one on any other device."""
    return max(1, usable_threads() // options.num_threads) if options.device == "cpu" else 1


class SideBySide(Candidate):
    """A loaded model with as many twins as fill the machine, each with its own request and its own inputs."""

    def __init__(self, path: str, model: Model, engine: str, options: EngineOptions, batch_size: int) -> None:
        super().__init__(path, model, engine, options, batch_size)
        self._version = ModelVersion(self.classifier, workers=options.streams)

    @property
    def classifiers(self) -> list[LoadedModel]:
        """Return the model of each worker."""
        return self._version.classifiers

    def close(self) -> None:
        self._version.close()


class OfflineCandidate(SideBySide):
    """Every worker takes the next batch as soon as it has answered the one before: throughput is what counts."""

    def sample(self, seconds: float, queries: int) -> None:
        """Measure one round: at least so many batches in all, for at least so many seconds."""
        found: list[list[int]] = [[] for _ in range(len(self.classifiers))]
        failed: list[VitEdgeError] = []
        started = time.perf_counter()

        def work(number: int) -> None:
            classifier, batches = self.classifiers[number], itertools.cycle(self.prepared)
            try:
                while sum(map(len, found)) < queries or time.perf_counter() < started + seconds:
                    batch, before = next(batches), time.perf_counter_ns()
                    classifier.run(batch)
                    found[number].append(time.perf_counter_ns() - before)
            except VitEdgeError as error:
                failed.append(error)

        threads = [
            threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(self.classifiers))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        samples_ns = [sample for samples in found for sample in samples]
        wall_s = time.perf_counter() - started
        self.rounds.append(Round(samples_ns=samples_ns, num_images=len(samples_ns) * self.batch_size, wall_s=wall_s))

    @property
    def throughput_per_s(self) -> float:
        return sum(one.num_images for one in self.rounds) / sum(one.wall_s for one in self.rounds)

    @property
    def costs_ms(self) -> list[Floats]:
        return [np.array([one.wall_s * 1000 / one.num_images]) for one in self.rounds]
