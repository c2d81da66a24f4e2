"""The slot of a pool that holds the model version which serves, and closes a replaced version after its last use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from vit_edge.runtime.classifier import Classifier
from vit_edge.runtime.loaded_model import LoadedModel

__all__ = ["ModelSlot", "ModelVersion"]

_Loaded = TypeVar("_Loaded", bound=LoadedModel)


class ModelVersion(Generic[_Loaded]):
    """One loaded model with a twin for each worker: threads must not share OpenVINO's requests."""

    def __init__(self, first: _Loaded, *, workers: int) -> None:
        self.first = first
        self.classifiers = [first, *(first.twin() for _ in range(workers - 1))]
        self.users, self.is_replaced = 0, False

    def close(self) -> None:
        """Free the model."""
        for classifier in self.classifiers:
            classifier.close()


class ModelSlot:
    """The model version that serves; earlier versions stay open while a request uses them."""

    def __init__(self, version: ModelVersion[Classifier]) -> None:
        self._lock = threading.Lock()
        self._current = version

    @property
    def current(self) -> ModelVersion[Classifier]:
        """Return the version that takes new requests."""
        return self._current

    @contextmanager
    def in_use(self) -> Iterator[ModelVersion[Classifier]]:
        """Yield the version that serves now; it stays open until the block ends."""
        with self._lock:
            version = self._current
            version.users += 1
        try:
            yield version
        finally:
            with self._lock:
                version.users -= 1
                done = version.is_replaced and version.users == 0
            if done:
                version.close()

    def replace(self, version: ModelVersion[Classifier] | None) -> None:
        """Let `version` serve from now on, or nothing; the previous version closes after its last use."""
        with self._lock:
            before = self._current
            before.is_replaced = True
            done = before.users == 0
            if version is not None:
                self._current = version
        if done:
            before.close()
