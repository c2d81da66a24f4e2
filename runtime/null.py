"""An engine that computes nothing: what the harness itself costs, and tests of everything around an engine."""

from __future__ import annotations

import numpy as np

from vit_edge.image import Pixels
from vit_edge.onnx_schema import parse
from vit_edge.runtime.engine import EngineOptions, Logits

__all__ = ["ENGINE", "NullEngine"]


class NullEngine:
    """Answers every image with the same logits: all zero."""

    name = "null"
    version = "1"
    device = "cpu"
    float_precision = "none"
    threads = 1

    def __init__(self, model: bytes, _options: EngineOptions) -> None:
        self._num_classes = parse(model).graph.output[0].type.tensor_type.shape.dim[1].dim_value

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return zeros [batch, classes]."""
        return np.zeros((len(images_NHWC), self._num_classes), dtype=np.float32)

    def close(self) -> None:
        """Do nothing."""


ENGINE = NullEngine
