"""Images in, labels out: a loaded model with its preprocessing and labels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np

from vit_edge.errors import Closed, InputError, UsageError, VerificationFailed
from vit_edge.image import Color, Decoding, ImageSource, Limits, Pixels, decode_for
from vit_edge.machine.cpu import instruction_set
from vit_edge.machine.targets import mismatch, target_name
from vit_edge.metrics import activated
from vit_edge.model_file.artifact import Manifest
from vit_edge.runtime.engines.protocol import Engine, Logits, answers
from vit_edge.runtime.notebook import html_table

__all__ = ["Answer", "Classifier", "Prediction", "Prepared", "Timings", "check_top"]

# Larger batches run in parts: memory grows with a batch, speed no longer.
_MOST_AT_ONCE = 64


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An image as the network takes it, uint8 RGB [height, width, 3], and how long that took."""

    pixels: Pixels
    decode_ms: float
    resize_ms: float
    waited_ms: float = 0.0


def check_top(top: object) -> None:
    """Raise UsageError unless `top` is a whole number of at least 1."""
    if not isinstance(top, int) or top < 1:
        raise UsageError("cannot classify", reason=f"top is {top!r}", remedy="give 1 or more")


class Classifier:
    """A loaded model with its preprocessing and labels; usable from several threads, not across a fork.

    `vit_edge.runtime.load` makes it.

        >>> with load("model.int8.onnx") as classifier:
        ...     classifier("image.jpg", top=3)
        <Prediction '...': ...%, '...': ...%, '...': ...%; ... ms>
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        *,
        sha256: str,
        decoding: Decoding = "full",
        limits: Limits | None = None,
        checked: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine, self._manifest, self._sha256 = engine, manifest, sha256
        self._decoding, self._limits, self._checked = decoding, limits, dict(checked or {})
        self._pid, self._closed = os.getpid(), False

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the label of every class, in the order of the logits."""
        return self._manifest.labels

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the model file: preprocessing, labels, provenance and more."""
        return self._manifest

    def __call__(self, source: ImageSource, *, top: int = 5, color: Color = "rgb") -> Prediction:
        """Return the `top` most likely labels of one image; raises ImageRejected if the image cannot be read.

        An image is a path, the bytes of a file, a binary file, a PIL image, or uint8 pixels [height, width, 3 or 4]
        whose channels are those of `color`: OpenCV gives "bgr", picamera2 "bgr" or "bgra". An array with another number
        of channels raises TypeError. The image is never changed.
        """
        return self.predict([self.prepare(source, color=color)], tops=[top])[0]

    def classify_batch(self, images: Iterable[ImageSource], *, top: int = 5, color: Color = "rgb") -> list[Prediction]:
        """Return one prediction for each image, computed in batches of 64: memory does not grow with their number."""
        if isinstance(images, str | bytes | bytearray | os.PathLike) or not isinstance(images, Iterable):
            raise TypeError(f"images is {type(images).__name__}; give a list of images")
        check_top(top)
        left, found = iter(images), list[Prediction]()
        while part := list(islice(left, _MOST_AT_ONCE)):
            prepared = [self.prepare(source, color=color) for source in part]
            found += self.predict(prepared, tops=[top] * len(prepared))
        return found

    def prepare(self, source: ImageSource, *, color: Color = "rgb") -> Prepared:
        """Return an image as the network takes it; raises as a call does."""
        started = time.perf_counter()
        preprocessing = self._manifest.preprocessing
        scaled = preprocessing if self._decoding == "fast" else None
        image, upright = decode_for(scaled, source, color=color, limits=self._limits)
        decoded = time.perf_counter()
        pixels = preprocessing.fit(image, upright=upright)
        resize_ms = (time.perf_counter() - decoded) * 1000
        return Prepared(pixels=pixels, decode_ms=(decoded - started) * 1000, resize_ms=resize_ms)

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
        return self._run(images_NHWC, self._engine.run, len(self.labels))

    def features(self, images_NHWC: Pixels) -> Logits:
        """Return float32 [batch, width], what the head reads, for uint8 RGB images [batch, height, width, 3].

        Raises UsageError if the file has no features: export it with `vit-edge export --outputs logits,features`.
        """
        if "features" not in self._manifest.outputs:
            has = ", ".join(self._manifest.outputs)
            remedy = "export it again with --outputs logits,features"
            raise UsageError("cannot compute features", reason=f"the file has only the outputs {has}", remedy=remedy)
        return self._run(images_NHWC, self._features, 0)

    def _features(self, images_NHWC: Pixels) -> Logits:
        return np.asarray(answers(self._engine, self._manifest, images_NHWC, ["features"])[0], dtype=np.float32)

    def _run(self, images_NHWC: Pixels, run: Callable[[Pixels], Logits], width: int) -> Logits:
        self._check_usable()
        images_NHWC = self._validated(images_NHWC)
        if not len(images_NHWC):
            return np.zeros((0, width), dtype=np.float32)
        parts = [run(images_NHWC[i : i + _MOST_AT_ONCE]) for i in range(0, len(images_NHWC), _MOST_AT_ONCE)]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        broken = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(broken):
            reason = f"the output for image {broken[0]} of {len(found)} is not finite"
            raise VerificationFailed("cannot use the output of the model", reason=reason, remedy="export it again")
        return found

    def describe(self) -> dict[str, Any]:
        """Return what really runs, as JSON-ready values.

        `engine`, `device`, `float_precision` and `threads` are read back from the engine; `placement` is the
        number of nodes of the graph on each of its devices, or "unknown" where it is too old to tell; `fallback` why it
        is not the device that was asked for, else None; `int8_fallback` why the ops of an INT8 file run in float32,
        else None; `target_warning` what differs between the CPU that the file was quantized for and this one, else
        None; `verified` how the file was checked when it was loaded.
        """
        engine, manifest = self._engine, self._manifest
        target = target_name(manifest.quantization)
        return {
            "name": manifest.name,
            "sha256": self._sha256,
            "precision": manifest.precision,
            "engine": engine.name,
            "engine_version": engine.version,
            "device": engine.device,
            "float_precision": engine.float_precision,
            "threads": engine.threads,
            "batch_size": engine.batch_size,
            "placement": "unknown" if engine.placement is None else dict(engine.placement),
            "fallback": engine.fallback,
            "int8_fallback": engine.int8_fallback,
            "instruction_set": instruction_set(),
            "decode": self._decoding,
            "target": target,
            "target_warning": mismatch(target) if target else None,
            **self._checked,
        }

    def twin(self) -> Classifier:
        """Return another classifier over the same loaded model, for another thread; each is closed on its own."""
        self._check_usable()
        return Classifier(
            self._engine.twin(),
            self._manifest,
            sha256=self._sha256,
            decoding=self._decoding,
            limits=self._limits,
            checked=self._checked,
        )

    def close(self) -> None:
        """Free the model; the second call does nothing, nor does one in a child after a fork."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._engine.close()

    def __repr__(self) -> str:
        manifest, engine = self._manifest, self._engine
        height, width = manifest.preprocessing.crop
        if self._closed:
            return f"<Classifier {manifest.name!r}, closed>"
        runs = f"{engine.name} {engine.version} on {engine.device}, threads={engine.threads}"
        return (
            f"<Classifier {manifest.name!r}, {manifest.precision}, {height}x{width}, {len(self.labels)} labels, {runs}>"
        )

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), value) for name, value in self.describe().items() if value is not None]
        return html_table(f"Classifier with {len(self.labels)} labels", ("field", "value"), rows)

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self, probabilities_K: Logits, top: int) -> tuple[Answer, ...]:
        # A stable sort: equal probabilities come in class order everywhere.
        best = np.argsort(-probabilities_K, kind="stable")[:top]
        return tuple(
            Answer(label=self.labels[int(i)], index=int(i), probability=float(probabilities_K[int(i)])) for i in best
        )

    def _check_usable(self) -> None:
        if self._closed:
            raise Closed("cannot classify", reason="the model is closed", remedy="load the model again")
        if os.getpid() != self._pid:
            reason = "the model was loaded before a fork, and engines do not survive one"
            raise Closed(
                "cannot classify", reason=reason, remedy="load the model in the child process, or start it with spawn"
            )

    def _validated(self, images_NHWC: Pixels) -> Pixels:
        if not isinstance(images_NHWC, np.ndarray):
            raise TypeError(f"images_NHWC is {type(images_NHWC).__name__}; give a uint8 numpy array")
        shape = (*self._manifest.preprocessing.crop, 3)
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != shape:
            got = f"{images_NHWC.dtype} {list(images_NHWC.shape)}"
            hint = "the channels come last" if images_NHWC.shape[1:2] == (3,) else "use Preprocessing.pixels"
            reason = f"got {got}; expected uint8 [batch, {shape[0]}, {shape[1]}, 3]"
            raise InputError("cannot use the images", reason=reason, remedy=hint)
        return np.ascontiguousarray(images_NHWC)
