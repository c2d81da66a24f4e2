"""One loaded model with a classifier for each worker, closed when it was replaced and nobody uses it any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vit_edge.runtime.classifier import Classifier

__all__ = ["Generation", "Holder"]


class Generation:
    """A classifier and its twins, one for each worker: OpenVINO's requests must not be shared between threads."""

    def __init__(self, first: Classifier, *, workers: int) -> None:
        self.first = first
        self.classifiers = [first, *(first.twin() for _ in range(workers - 1))]
        self.users, self.is_replaced = 0, False

    def close(self) -> None:
        """Free the model."""
        for classifier in self.classifiers:
            classifier.close()


class Holder:
    """The generation that serves, and those before it that still answer somebody."""

    def __init__(self, generation: Generation) -> None:
        self._lock = threading.Lock()
        self._current = generation

    @property
    def current(self) -> Generation:
        """Return the generation that new requests go to."""
        return self._current

    @contextmanager
    def in_use(self) -> Iterator[Generation]:
        """Yield the generation that serves now; it is not closed before the block ends."""
        with self._lock:
            generation = self._current
            generation.users += 1
        try:
            yield generation
        finally:
            with self._lock:
                generation.users -= 1
                done = generation.is_replaced and generation.users == 0
            if done:
                generation.close()

    def replace(self, generation: Generation | None) -> None:
        """Let `generation` serve from now on, or nothing; the one before closes when nobody uses it any more."""
        with self._lock:
            before = self._current
            before.is_replaced = True
            done = before.users == 0
            if generation is not None:
                self._current = generation
        if done:
            before.close()
