"""A third-party classifier run as the file has it: the reference for every changed form of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from vit_edge.errors import ModelRejected
from vit_edge.export.graph.editing import with_outputs
from vit_edge.export.onnx_import.sandbox import probe
from vit_edge.image import Pixels, Preprocessing
from vit_edge.machine.cpu import usable_threads
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import Logits
from vit_edge.runtime.onnx_import.head import drop_activation
from vit_edge.runtime.onnx_import.interface import ThirdPartyInput

__all__ = ["ThirdPartyReference"]

Array: TypeAlias = npt.NDArray[Any]


class ThirdPartyReference:
    """The unchanged file in ONNX Runtime, one image at a time."""

    def __init__(self, original: onnx.ModelProto, entry: ThirdPartyInput, preprocessing: Preprocessing) -> None:
        self.entry = entry
        self._original, self._preprocessing = original, preprocessing
        self._logits = ""
        self._columns: Array = np.ones(1, np.float32)
        self._session: Any = None

    def feed(self, images_NHWC: Pixels) -> dict[str, Array]:
        """Return the inputs of the graph for uint8 images."""
        return {self.entry.name: self.entry.of(images_NHWC, self._preprocessing)}

    def images(self, count: int) -> Pixels:
        """Return `count` different images."""
        height, width = self._preprocessing.crop
        return golden_images(range(count), height=height, width=width)

    def values(self, names: Sequence[str]) -> tuple[int, dict[str, Array]]:
        """Return a batch size that runs in a sandbox, and tensors at it; raises ModelRejected if none does."""
        for size in (self.entry.batch_size,) if self.entry.batch_size else (2, 1):
            found = probe(with_outputs(self._original, names), [self.feed(self.images(size))], names)[0]
            if not isinstance(found, str):
                return size, found
        reason, remedy = (
            f"ONNX Runtime cannot run the model: {found}",
            "set crop in the preprocessing to the model's size",
        )
        raise ModelRejected("cannot import", reason=reason, remedy=remedy)

    def use_output(self, name: str, *, rank: int, before_activation: bool) -> None:
        """Return this tensor as the logits from now on, or what the activation behind it reads."""
        self._logits, self._session = name, None
        if before_activation:
            drop_activation(self._original.graph, name, rank=rank)

    def give_zero_logit(self) -> None:
        """Return two logits from now on, zero and the one of the file."""
        self._columns = np.array([0, 1], np.float32)

    def __call__(self, images_NHWC: Pixels) -> Logits:
        """Return the logits, float32 [batch, classes]."""
        if self._session is None:  # it ran in the sandbox before: no crash, no hang
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = 4
            settings.intra_op_num_threads = usable_threads()
            data = with_outputs(self._original, [self._logits])
            self._session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        copies = self.entry.batch_size or 1
        rows = []
        for image_HWC in images_NHWC:
            feed = self.feed(np.repeat(image_HWC[None], copies, axis=0))
            rows.append(np.asarray(self._session.run([self._logits], feed)[0], np.float32).reshape(copies, -1)[0])
        return np.stack(rows) * self._columns
