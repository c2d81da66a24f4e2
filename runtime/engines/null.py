"""An engine that computes nothing: what the harness itself costs, and tests of everything around an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vit_edge.image import Pixels
from vit_edge.runtime.engines.protocol import Array, EngineOptions, Logits, Model, batch_of

__all__ = ["ENGINE", "NullEngine", "devices_here"]


class NullEngine:
    """Answers every image with the same values: all zero."""

    name = "null"
    version = "1"
    device = "cpu"
    float_precision = "none"
    threads = 1
    placement: Mapping[str, int] | None = None
    fallback: str | None = None
    int8_fallback: str | None = None

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self.batch_size = batch_of(model.manifest, options)
        self._num_values = model.manifest.num_values

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return zeros [batch, classes or width]."""
        return np.zeros((len(images_NHWC), self._num_values), dtype=np.float32)

    def tensors(self, images: Array, names: Sequence[str]) -> list[Array]:
        """Return the same for every name."""
        return [np.zeros((len(images), self._num_values), dtype=np.float32) for _ in names]

    def twin(self) -> NullEngine:
        """Return itself: there is nothing to share."""
        return self

    def close(self) -> None:
        """Do nothing."""


def devices_here() -> list[str]:
    """Return the one device there is."""
    return ["cpu"]


ENGINE = NullEngine
