"""Images in, labels out: a loaded model with its preprocessing and labels."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vit_edge.errors import UsageError
from vit_edge.image import Color, ImageSource, Pixels
from vit_edge.metrics import activated
from vit_edge.runtime.engines.protocol import Logits
from vit_edge.runtime.loaded_model import LoadedModel, Prepared
from vit_edge.runtime.notebook import html_table

__all__ = ["Answer", "Classifier", "Prediction", "Timings", "as_classifier", "check_top"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One label, its class index and its probability in [0, 1].

    A model whose manifest has the activation "none" gives plain values: `probability` is the value then.
    """

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """The time of each stage of one prediction in milliseconds; in a batch, the share of each image.

    `decode_ms` reads and decodes the image, `resize_ms` fits it to the network, `inference_ms` is the engine,
    `answer_ms` turns logits into labels; `waited_ms` is the time in the queue of a `Pool`.
    """

    decode_ms: float
    resize_ms: float
    inference_ms: float
    answer_ms: float
    waited_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Return the sum of all stages."""
        return self.waited_ms + self.decode_ms + self.resize_ms + self.inference_ms + self.answer_ms


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Prediction:
    """The most likely labels of one image, the most likely first, and the time of each stage."""

    answers: tuple[Answer, ...]
    timings: Timings

    @property
    def label(self) -> str:
        """Return the likeliest label."""
        return self.answers[0].label

    @property
    def probability(self) -> float:
        """Return the probability of the likeliest label."""
        return self.answers[0].probability

    def __repr__(self) -> str:
        named = ", ".join(f"{answer.label!r}: {answer.probability:.1%}" for answer in self.answers)
        return f"<Prediction {named}; {self.timings.total_ms:.1f} ms>"

    def _repr_html_(self) -> str:
        rows = [(answer.label, f"{answer.probability:.1%}") for answer in self.answers]
        return html_table(f"{self.timings.total_ms:.1f} ms", ("label", "probability"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON-ready values: `label`, `probability`, `answers`, `timings`."""
        answers = [asdict(answer) for answer in self.answers]
        timings = {**asdict(self.timings), "total_ms": self.timings.total_ms}
        return {"label": self.label, "probability": self.probability, "answers": answers, "timings": timings}


def check_top(top: object) -> None:
    """Raise UsageError unless `top` is a whole number of at least 1."""
    if not isinstance(top, int) or top < 1:
        raise UsageError("cannot classify", reason=f"top is {top!r}", remedy="give 1 or more")


class Classifier(LoadedModel):
    """A loaded model with its preprocessing and labels; usable from several threads, not across a fork.

    `vit_edge.runtime.load` makes it.

        >>> with load("model.int8.onnx") as classifier:
        ...     classifier("image.jpg", top=3)
        <Prediction '...': ...%, '...': ...%, '...': ...%; ... ms>
    """

    _verb = "classify"

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the label of every class, in the order of the logits."""
        return self._manifest.labels

    def __call__(self, source: ImageSource, *, top: int = 5, color: Color = "rgb") -> Prediction:
        """Return the `top` most likely labels of one image; raises ImageRejected if the image cannot be read.

        An image is a path, the bytes of a file, a binary file, a PIL image, or uint8 pixels [height, width, 3 or 4]
        whose channels are those of `color`: OpenCV gives "bgr", picamera2 "bgr" or "bgra". An array with another number
        of channels raises TypeError. The image is never changed.
        """
        return self.predict([self.prepare(source, color=color)], tops=[top])[0]

    def classify_batch(self, images: Iterable[ImageSource], *, top: int = 5, color: Color = "rgb") -> list[Prediction]:
        """Return one prediction for each image, computed in batches of 64: memory does not grow with their number."""
        check_top(top)
        parts = self._parts(images, color)
        return [found for part in parts for found in self.predict(part, tops=[top] * len(part))]

    def predict(self, prepared: Sequence[Prepared], *, tops: Sequence[int]) -> list[Prediction]:
        """Return one prediction for each prepared image, with the number of labels in `tops`, computed together."""
        for top in tops:
            check_top(top)
        if not prepared:
            return []
        started = time.perf_counter()
        logits_BK = self.logits(np.stack([one.pixels for one in prepared]))
        inferred = time.perf_counter()
        named = [
            self._answers(row_K, top)
            for row_K, top in zip(activated(logits_BK, self._manifest.activation), tops, strict=True)
        ]
        inference_ms = (inferred - started) * 1000 / len(prepared)
        answer_ms = (time.perf_counter() - inferred) * 1000 / len(prepared)
        timings = [
            Timings(
                decode_ms=one.decode_ms,
                resize_ms=one.resize_ms,
                inference_ms=inference_ms,
                answer_ms=answer_ms,
                waited_ms=one.waited_ms,
            )
            for one in prepared
        ]
        return [Prediction(answers=each, timings=times) for each, times in zip(named, timings, strict=True)]

    def logits(self, images_NHWC: Pixels) -> Logits:
        """Return float32 logits [batch, classes] from uint8 RGB images [batch, height, width, 3]; batch 0 gives none.

        Raises TypeError or InputError on anything else: engines cast such input silently.
        """
        return self.run(images_NHWC)

    def features(self, images_NHWC: Pixels) -> Logits:
        """Return float32 [batch, width], what the head reads, for uint8 RGB images [batch, height, width, 3].

        Raises UsageError if the file has no features: export it with `vit-edge export --outputs logits,features`.
        """
        return self._output("features", images_NHWC)

    def _answers(self, probabilities_K: Logits, top: int) -> tuple[Answer, ...]:
        # A stable sort: equal probabilities come in class order everywhere.
        best = np.argsort(-probabilities_K, kind="stable")[:top]
        return tuple(
            Answer(label=self.labels[int(i)], index=int(i), probability=float(probabilities_K[int(i)])) for i in best
        )


def as_classifier(model: LoadedModel, source: str) -> Classifier:
    """Return the model if it is a classifier; an encoder is closed, and raises UsageError."""
    if isinstance(model, Classifier):
        return model
    model.close()
    remedy = "use `vit-edge embed`, or load(...).embed(image) in Python"
    raise UsageError("cannot classify", file=source, reason="the file is an encoder and has no classes", remedy=remedy)
