"""A classifier made elsewhere, answering as it came: what the same network has to answer in any other form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from vit_edge.errors import ModelRejected
from vit_edge.export.graph.editing import with_outputs
from vit_edge.export.onnx_import.interface import ThirdPartyInput
from vit_edge.export.onnx_import.sandbox import probe
from vit_edge.image import Pixels, Preprocessing
from vit_edge.machine.cpu import usable_threads
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import Logits

__all__ = ["ThirdPartyReference"]

Array: TypeAlias = npt.NDArray[Any]


class ThirdPartyReference:
    """The file as it came, in ONNX Runtime, one image at a time."""

    def __init__(self, original: onnx.ModelProto, entry: ThirdPartyInput, preprocessing: Preprocessing) -> None:
        self.entry = entry
        self._original, self._preprocessing = original, preprocessing
        self._logits = ""
        self._session: Any = None

    def feed(self, images_NHWC: Pixels) -> dict[str, Array]:
        """Return what the graph takes for pixels."""
        return {self.entry.name: self.entry.of(images_NHWC, self._preprocessing)}

    def images(self, count: int) -> Pixels:
        """Return so many different images."""
        height, width = self._preprocessing.crop
        return golden_images(range(count), height=height, width=width)

    def values(self, names: Sequence[str]) -> tuple[int, dict[str, Array]]:
        """Return a batch that the file takes, and tensors at it, run apart; ModelRejected where it does not run."""
        for size in (self.entry.fixed,) if self.entry.fixed else (2, 1):
            found = probe(with_outputs(self._original, names), [self.feed(self.images(size))], names)[0]
            if not isinstance(found, str):
                return size, found
        reason, remedy = f"ONNX Runtime cannot run it: {found}", "give the size of images that it takes"
        raise ModelRejected("cannot take the network", reason=reason, remedy=remedy)

    def answer_with(self, logits: str) -> None:
        """Answer with this tensor from now on."""
        self._logits, self._session = logits, None

    def __call__(self, images_NHWC: Pixels) -> Logits:
        """Return the logits, float32 [batch, classes]."""
        if self._session is None:  # it ran apart before: it neither crashes nor hangs
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = 4
            settings.intra_op_num_threads = usable_threads()
            data = with_outputs(self._original, [self._logits])
            self._session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        copies = self.entry.fixed or 1
        rows = []
        for image_HWC in images_NHWC:
            feed = self.feed(np.repeat(image_HWC[None], copies, axis=0))
            rows.append(np.asarray(self._session.run([self._logits], feed)[0], np.float32).reshape(copies, -1)[0])
        return np.stack(rows)
