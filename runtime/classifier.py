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
from vit_edge.model_file.tasks import Task
from vit_edge.runtime.engines.protocol import Logits
from vit_edge.runtime.loaded_model import LoadedModel, Prepared
from vit_edge.runtime.notebook import html_table

__all__ = ["Answer", "Classifier", "Prediction", "Timings", "as_classifier", "check_top"]


# Of several labels at once, those that are as likely as not count as present.
_PRESENT = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One label, its class index and its probability in [0, 1].

    Of a regression, `probability` is the value, and `is_value` true.
    """

    label: str
    index: int
    probability: float
    is_value: bool = False

    @property
    def text(self) -> str:
        """Return the label with its probability, or with its value."""
        return f"{self.label} {self.probability:.6g}" if self.is_value else f"{self.label} {self.probability:.1%}"

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON-ready values: `label`, `index`, and `probability` or `value`."""
        name = "value" if self.is_value else "probability"
        return {"label": self.label, "index": self.index, name: self.probability}


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
    """The most likely labels of one image, the most likely first, and the time of each stage.

    Of a network with several labels at once, `present` are those whose probability is 50 % or more. The values of a
    regression come in their own order.
    """

    answers: tuple[Answer, ...]
    timings: Timings
    task: Task = "classification"

    @property
    def present(self) -> tuple[str, ...]:
        """Return the labels that the network gives the image: the likeliest, or all that are as likely as not."""
        if self.task != "multi-label":
            return (self.label,)
        return tuple(answer.label for answer in self.answers if answer.probability >= _PRESENT)

    @property
    def text(self) -> str:
        """Return the answers as they are printed; labels in parentheses are less likely than not."""
        absent = {answer.label for answer in self.answers} - {*self.present} if self.task == "multi-label" else set()
        return "  ".join(f"({one.text})" if one.label in absent else one.text for one in self.answers)

    @property
    def label(self) -> str:
        """Return the likeliest label."""
        return self.answers[0].label

    @property
    def probability(self) -> float:
        """Return the probability of the likeliest label."""
        return self.answers[0].probability

    def __repr__(self) -> str:
        named = ", ".join(f"{one.label!r}: {one.text[len(one.label) + 1 :]}" for one in self.answers)
        return f"<Prediction {named}; {self.timings.total_ms:.1f} ms>"

    def _repr_html_(self) -> str:
        rows = [(one.label, one.text[len(one.label) + 1 :]) for one in self.answers]
        return html_table(f"{self.timings.total_ms:.1f} ms", ("label", "probability"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON-ready values: `label`, `probability`, `answers`, `timings`.

        Several labels at once are also in `present`; a regression has `value` in place of `probability`.
        """
        first = {key: value for key, value in self.answers[0].to_dict().items() if key != "index"}
        several = {"present": list(self.present)} if self.task == "multi-label" else {}
        timings = {**asdict(self.timings), "total_ms": self.timings.total_ms}
        return {**first, **several, "answers": [answer.to_dict() for answer in self.answers], "timings": timings}


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
        task = self._manifest.task
        return [Prediction(answers=each, timings=times, task=task) for each, times in zip(named, timings, strict=True)]

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
        order_K = np.argsort(-probabilities_K, kind="stable")
        best = range(len(order_K)) if self._manifest.task == "regression" else order_K
        if self._manifest.task == "multi-label":
            top = max(top, int(np.sum(probabilities_K >= _PRESENT)))
        is_value = self._manifest.task == "regression"
        return tuple(
            Answer(
                label=self.labels[int(i)], index=int(i), probability=float(probabilities_K[int(i)]), is_value=is_value
            )
            for i in best[:top]
        )


def as_classifier(model: LoadedModel, source: str) -> Classifier:
    """Return the model if it is a classifier; an encoder is closed, and raises UsageError."""
    if isinstance(model, Classifier):
        return model
    model.close()
    remedy = "use `vit-edge embed`, or load(...).embed(image) in Python"
    raise UsageError("cannot classify", file=source, reason="the file is an encoder and has no classes", remedy=remedy)
