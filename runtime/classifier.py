"""Pictures in, labels out: a loaded model with its preprocessing and labels."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import numpy as np

from vit_edge.artifact import Manifest
from vit_edge.cpu import instruction_set
from vit_edge.errors import InputError, UsageError, VerificationFailed
from vit_edge.image import Picture, Pixels
from vit_edge.metrics import softmax
from vit_edge.runtime.engine import Engine, Logits
from vit_edge.targets import mismatch, target_name

__all__ = ["Answer", "Classifier", "Prediction"]

# Larger batches run in parts: memory grows with a batch, speed no longer.
_MOST_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One label, its class index and its probability in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The likeliest answers for one picture, the likeliest first, and where the time went."""

    answers: tuple[Answer, ...]
    prepare_ms: float
    inference_ms: float

    @property
    def label(self) -> str:
        """Return the likeliest label."""
        return self.answers[0].label

    @property
    def probability(self) -> float:
        """Return the probability of the likeliest label."""
        return self.answers[0].probability

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON-ready values."""
        return {**asdict(self), "answers": [asdict(answer) for answer in self.answers]}


class Classifier:
    """A model ready to answer; made by `vit_edge.runtime.load`, usable from several threads, not across a fork."""

    def __init__(self, engine: Engine, manifest: Manifest, *, sha256: str) -> None:
        self._engine, self._manifest, self._sha256 = engine, manifest, sha256
        self._pid, self._closed = os.getpid(), False

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the label of every class, in the order of the logits."""
        return self._manifest.labels

    @property
    def manifest(self) -> Manifest:
        """Return what the model file says of itself."""
        return self._manifest

    def __call__(self, picture: Picture, *, top: int = 5) -> Prediction:
        """Return the `top` likeliest labels of one picture; raises ImageRejected where it cannot be used.

        A picture is a path, the bytes of a file, a binary file, a PIL image, or uint8 RGB pixels [height, width, 3].
        """
        return self.classify_batch([picture], top=top)[0]

    def classify_batch(self, pictures: Sequence[Picture], *, top: int = 5) -> list[Prediction]:
        """Return one prediction for each picture, computed together; times are per picture."""
        if not pictures:
            return []
        started = time.perf_counter()
        images_NHWC = np.stack([self._manifest.preprocessing.pixels(picture) for picture in pictures])
        prepared = time.perf_counter()
        probabilities_BK = softmax(self.logits(images_NHWC))
        finished = time.perf_counter()
        prepare_ms = (prepared - started) * 1000 / len(pictures)
        inference_ms = (finished - prepared) * 1000 / len(pictures)
        return [
            Prediction(answers=self._answers(row_K, top), prepare_ms=prepare_ms, inference_ms=inference_ms)
            for row_K in probabilities_BK
        ]

    def logits(self, images_NHWC: Pixels) -> Logits:
        """Return float32 logits [batch, classes] from uint8 RGB images [batch, height, width, 3]; batch 0 gives none.

        Raises TypeError or InputError on anything else: engines cast silently what they should refuse.
        """
        self._check_usable()
        images_NHWC = self._checked(images_NHWC)
        if not len(images_NHWC):
            return np.zeros((0, len(self.labels)), dtype=np.float32)
        parts = [
            self._engine.run(images_NHWC[i : i + _MOST_AT_ONCE]) for i in range(0, len(images_NHWC), _MOST_AT_ONCE)
        ]
        logits_BK = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not np.isfinite(logits_BK).all():
            raise VerificationFailed(
                "the model gave no answer", reason="a logit is not finite", remedy="export it again"
            )
        return logits_BK

    def describe(self) -> dict[str, Any]:
        """Return what really runs: engine, device, precision, threads, instruction set, and whether its target fits.

        `target_warning` is what differs between the CPU that the file was quantized for and this one, else None.
        """
        target = target_name(self._manifest.quantization)
        return {
            "name": self._manifest.name,
            "sha256": self._sha256,
            "precision": self._manifest.precision,
            "engine": self._engine.name,
            "engine_version": self._engine.version,
            "device": self._engine.device,
            "float_precision": self._engine.float_precision,
            "threads": self._engine.threads,
            "instruction_set": instruction_set(),
            "target": target,
            "target_warning": mismatch(target) if target else None,
        }

    def close(self) -> None:
        """Free the model; the second call does nothing."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self, probabilities_K: Logits, top: int) -> tuple[Answer, ...]:
        # A stable sort: equal probabilities come in class order everywhere.
        best = np.argsort(-probabilities_K, kind="stable")[: max(1, top)]
        return tuple(
            Answer(label=self.labels[int(i)], index=int(i), probability=float(probabilities_K[int(i)])) for i in best
        )

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError("cannot classify", reason="the model is closed", remedy="load it again")
        if os.getpid() != self._pid:
            reason = "the model was loaded before a fork, and engines do not survive one"
            raise UsageError("cannot classify", reason=reason, remedy="load it in the child, or start with spawn")

    def _checked(self, images_NHWC: Pixels) -> Pixels:
        if not isinstance(images_NHWC, np.ndarray):
            raise TypeError(f"images_NHWC is {type(images_NHWC).__name__}; give a uint8 numpy array")
        shape = (*self._manifest.preprocessing.crop, 3)
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != shape:
            got = f"{images_NHWC.dtype} {list(images_NHWC.shape)}"
            hint = "the channels come last" if images_NHWC.shape[1:2] == (3,) else "use Preprocessing.pixels"
            reason = f"got {got}; expected uint8 [batch, {shape[0]}, {shape[1]}, 3]"
            raise InputError("cannot use the images", reason=reason, remedy=hint)
        return np.ascontiguousarray(images_NHWC)
