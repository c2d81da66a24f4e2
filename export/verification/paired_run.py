"""Both models on the same images in one engine: what each predicts, and on which images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.data import EVALUATION_SPLITS, lies_loose, read_labelled, read_unlabelled, stream_pixels
from vit_edge.data.near_duplicates import fingerprint
from vit_edge.data.truths import read_label_sets, read_values
from vit_edge.errors import DataRejected
from vit_edge.image import Pixels, Preprocessing, pixel_hash
from vit_edge.metrics import NO_CLASS, UNKNOWN, Logits, PairedAnswers, join_answers, pair_answers
from vit_edge.model_file.artifact import ModelFile
from vit_edge.model_file.tasks import Task
from vit_edge.progress import Progress
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines, refuse_null
from vit_edge.runtime.loading import load_model

__all__ = [
    "EvaluatedImages",
    "EvaluationImages",
    "OpenCandidate",
    "PairedRun",
    "Predictor",
    "ReferenceRun",
    "find_evaluation_images",
    "run_both",
]

_BATCH = 16
# 1,700 images of 224x224 with their logits: more than most accuracy budgets need, and little of a workstation's memory.
_MOST_KEPT_BYTES = 2**28
_log = logging.getLogger(__name__)


class Predictor(Protocol):
    """Anything that gives logits or embeddings: a model loaded here, or on a device."""

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return float32 [batch, classes or width] from uint8 RGB images [batch, height, width, 3]."""


# Given the name of an engine, the candidate loaded in it, on a device for example.
OpenCandidate: TypeAlias = Callable[[str], AbstractContextManager[Predictor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationImages:
    """The evaluation images, sorted, and the class of each; UNKNOWN if they are used without labels.

    A network that does not choose one class has `truths`: of each image a number for each label or value. The class is
    NO_CLASS then.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    truths: tuple[tuple[float, ...], ...] = ()

    @property
    def labelled(self) -> bool:
        """Return whether their labels are known."""
        return UNKNOWN not in self.labels

    @property
    def num_images(self) -> int:
        """Return how many there are; duplicates and unreadable images are not known yet."""
        return len(self.paths)

    def at(self, positions: Sequence[int]) -> EvaluationImages:
        """Return the images at these positions."""
        return EvaluationImages(
            paths=tuple(self.paths[position] for position in positions),
            labels=tuple(self.labels[position] for position in positions),
            truths=tuple(self.truths[position] for position in positions) if self.truths else (),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedImages:
    """The images that were run; each distinct one once, with the hash of its pixels."""

    paths: tuple[Path, ...]
    hashes: tuple[str, ...]
    fingerprints: tuple[str, ...]
    labels_B: npt.NDArray[np.int64]
    truth_BK: npt.NDArray[np.float64] | None = None

    @property
    def path_of(self) -> dict[str, Path]:
        """Return the path of each image by its hash."""
        return dict(zip(self.hashes, self.paths, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedRun(EvaluatedImages):
    """The predictions of both models in one engine, and the images that they belong to."""

    engine: str
    answers: PairedAnswers


def find_evaluation_images(
    data: str | os.PathLike[str], class_names: Sequence[str], *, unlabelled: bool, task: Task = "classification"
) -> EvaluationImages:
    """Return the images in `data`, with labels unless `unlabelled` or not in class folders; raises DataRejected.

    Without `class_names`, those of an encoder, any classes will do. `task` is that of the network.
    """
    try:
        if not unlabelled and task in ("multi-label", "regression") and not lies_loose(data, splits=EVALUATION_SPLITS):
            read = read_label_sets if task == "multi-label" else read_values
            truths = read(data, names=class_names, splits=EVALUATION_SPLITS)
            labels = (NO_CLASS,) * len(truths)
            return EvaluationImages(paths=tuple(truths), labels=labels, truths=tuple(truths.values()))
        if not unlabelled and not lies_loose(data, splits=EVALUATION_SPLITS):
            found = read_labelled(data, splits=EVALUATION_SPLITS, class_names=class_names or None)
            return EvaluationImages(paths=found.paths, labels=found.labels)
    except DataRejected as error:
        read_unlabelled(data, splits=EVALUATION_SPLITS)  # raises what is wrong with more than the labels
        error.remedy += "; or use the images without labels (--unlabelled)"
        raise
    paths = read_unlabelled(data, splits=EVALUATION_SPLITS)
    return EvaluationImages(paths=paths, labels=(UNKNOWN,) * len(paths))


class ReferenceRun:
    """Evaluation images and what `reference` predicts on them, for several candidates: each is decoded and run once.

    Images and logits over 256 MiB together are not kept: they are decoded and computed again for every candidate.
    """

    def __init__(self, reference: ModelFile, images: EvaluationImages, *, threads: int | None = None) -> None:
        """Decode no image yet."""
        height, width = reference.manifest.preprocessing.crop
        logits_bytes = 4 * reference.manifest.num_values * len(installed_engines())
        self.reference, self.images, self.threads = reference, images, threads
        self._keeps = images.num_images * (3 * height * width + logits_bytes) <= _MOST_KEPT_BYTES
        self._batches: list[Pixels] = []
        self._logits: dict[str, list[Logits]] = {}
        self._hashes: tuple[str, ...] = ()
        self._fingerprints: tuple[str, ...] = ()

    @property
    def hashes(self) -> tuple[str, ...]:
        """Return the pixel hash of each different image in `images`, decoding them all unless that was done."""
        if not self._hashes:
            for _ in self.batches():
                pass
        return self._hashes

    @property
    def path_of(self) -> dict[str, Path]:
        """Return the path of each different image by its pixel hash."""
        return dict(zip(self.hashes, self.images.paths, strict=True))

    def batches(self) -> Iterator[Pixels]:
        """Yield the different images, 16 at a time; raises DataRejected if images cannot be used or have changed."""
        if self._batches:
            yield from self._batches
            return
        found, kept, images = _Decoded(), [], self.images  # another thread may set the latter meanwhile
        for images_NHWC in found.stream(images.paths, self.reference.manifest.preprocessing):
            yield images_NHWC
            if self._keeps:
                kept.append(images_NHWC)
        if self._hashes and self._hashes != tuple(found.positions):
            reason, remedy = "images changed while they were read", "run it again"
            raise DataRejected("cannot verify on these images", reason=reason, remedy=remedy)
        self._batches, self._hashes, self._fingerprints = kept, tuple(found.positions), tuple(found.fingerprints)
        self.images = images.at(list(found.positions.values()))

    @contextmanager
    def predicting(self, engine: str) -> Iterator[Callable[[int, Pixels], Logits]]:
        """Give a function that returns the reference's logits for the batch of a number."""
        kept = self._logits.get(engine)
        if kept is not None:
            yield lambda number, _images_NHWC: kept[number]
            return
        computed: list[Logits] = []
        with load_model(self.reference, engine=engine, options=EngineOptions(threads=self.threads)) as classifier:

            def predict(_number: int, images_NHWC: Pixels) -> Logits:
                logits_BK = classifier.run(images_NHWC)
                if self._keeps:
                    computed.append(logits_BK)
                return logits_BK

            yield predict
        if self._keeps:
            self._logits[engine] = computed

    def outputs(
        self, model: ModelFile, *, engine: str, progress: Progress, candidate: OpenCandidate | None = None
    ) -> Iterator[tuple[Logits, Logits]]:
        """Yield what the reference and `model` give for batch after batch of different images; raises as `run_both`."""
        refuse_null(engine)
        options, done = EngineOptions(threads=self.threads), 0
        progress(f"verifying in {engine}", 0, self.images.num_images)
        with (
            self.predicting(engine) as expected,
            candidate(engine) if candidate else load_model(model, engine=engine, options=options) as predictor,
        ):
            for number, images_NHWC in enumerate(self.batches()):
                progress(f"verifying in {engine}", done, self.images.num_images)
                yield expected(number, images_NHWC), predictor.run(images_NHWC)
                done += len(images_NHWC)
        progress(f"verifying in {engine}", self.images.num_images, self.images.num_images)

    @property
    def evaluated(self) -> EvaluatedImages:
        """Return the different images, once all of them were run."""
        return EvaluatedImages(
            paths=self.images.paths,
            hashes=self._hashes,
            fingerprints=self._fingerprints,
            labels_B=np.array(self.images.labels, dtype=np.int64),
            truth_BK=np.array(self.images.truths, dtype=np.float64) if self.images.truths else None,
        )


def run_both(
    reference: ReferenceRun,
    model: ModelFile,
    *,
    engine: str,
    progress: Progress,
    candidate: OpenCandidate | None = None,
) -> PairedRun:
    """Return what `model` and its `reference` predict on the images in one engine; duplicates count once.

    With `candidate` the model runs where this opens it; the reference always runs here. Raises DataRejected if images
    cannot be used, GoldenMismatch and more if a model cannot be loaded.
    """
    outputs = reference.outputs(model, engine=engine, progress=progress, candidate=candidate)
    answers = join_answers([pair_answers(*both) for both in outputs])
    images = reference.evaluated
    known = {field.name: getattr(images, field.name) for field in fields(images)}
    return PairedRun(**known, engine=engine, answers=answers)


class _Decoded:
    """One pass over images: where each different one is, and its fingerprint; pixels only until their batch is full."""

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.fingerprints: list[str] = []

    def stream(self, paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[Pixels]:
        """Yield batches of different images; duplicates prove nothing more."""
        batch: list[Pixels] = []
        num_seen = 0
        for position, pixels in stream_pixels(paths, preprocessing):
            num_seen += 1
            digest = pixel_hash(pixels)
            if digest in self.positions:
                continue
            self.positions[digest] = position
            self.fingerprints.append(fingerprint(pixels))
            batch.append(pixels)
            if len(batch) == _BATCH:
                yield np.stack(batch)
                batch.clear()
        if batch:
            yield np.stack(batch)
        if num_seen > len(self.positions):
            _log.warning("%d images are duplicates of others and were counted once", num_seen - len(self.positions))
