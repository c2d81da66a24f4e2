"""Both models on the same images in one engine: what each predicts, and on which images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.data import EVALUATION_SPLITS, lies_loose, read_labelled, read_unlabelled, stream_pixels
from vit_edge.errors import DataRejected
from vit_edge.image import Pixels, pixel_hash
from vit_edge.metrics import UNKNOWN, Logits, PairedAnswers, join_answers, pair_answers
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress
from vit_edge.runtime.classifier import Classifier
from vit_edge.runtime.engines.protocol import EngineOptions, refuse_null
from vit_edge.runtime.loading import load_model
from vit_edge.similarity import fingerprint

__all__ = ["EvaluationImages", "OpenCandidate", "PairedRun", "Predictor", "find_evaluation_images", "run_both"]

_BATCH = 16
_log = logging.getLogger(__name__)


class Predictor(Protocol):
    """Anything that gives logits: a classifier here, or a model on a device."""

    def logits(self, images_NHWC: Pixels) -> Logits:
        """Return float32 logits [batch, classes] from uint8 RGB images [batch, height, width, 3]."""


# Given the name of an engine, the candidate loaded in it, on a device for example.
OpenCandidate: TypeAlias = Callable[[str], AbstractContextManager[Predictor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationImages:
    """The evaluation images, sorted, and the class of each; UNKNOWN if they are used without labels."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    @property
    def labelled(self) -> bool:
        """Return whether their labels are known."""
        return UNKNOWN not in self.labels

    @property
    def num_images(self) -> int:
        """Return how many there are; duplicates and unreadable images are not known yet."""
        return len(self.paths)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedRun:
    """The predictions of both models in one engine; each distinct image once, with the hash of its pixels."""

    engine: str
    answers: PairedAnswers
    paths: tuple[Path, ...]
    hashes: tuple[str, ...]
    fingerprints: tuple[str, ...]
    labels_B: npt.NDArray[np.int64]

    @property
    def path_of(self) -> dict[str, Path]:
        """Return the path of each image by its hash."""
        return dict(zip(self.hashes, self.paths, strict=True))

    @property
    def images(self) -> EvaluationImages:
        """Return the images that were run: unreadable ones and duplicates are left out."""
        return EvaluationImages(paths=self.paths, labels=tuple(int(label) for label in self.labels_B))


def find_evaluation_images(
    data: str | os.PathLike[str], class_names: Sequence[str], *, unlabelled: bool
) -> EvaluationImages:
    """Return the images in `data`, with labels unless `unlabelled` or not in class folders; raises DataRejected."""
    try:
        if not unlabelled and not lies_loose(data, splits=EVALUATION_SPLITS):
            found = read_labelled(data, splits=EVALUATION_SPLITS, class_names=class_names)
            return EvaluationImages(paths=found.paths, labels=found.labels)
    except DataRejected as error:
        read_unlabelled(data, splits=EVALUATION_SPLITS)  # raises what is wrong with more than the labels
        error.remedy += "; or use the images without labels (--unlabelled)"
        raise
    paths = read_unlabelled(data, splits=EVALUATION_SPLITS)
    return EvaluationImages(paths=paths, labels=(UNKNOWN,) * len(paths))


def run_both(
    images: EvaluationImages,
    model: ModelFile,
    reference: ModelFile,
    *,
    engine: str,
    threads: int | None,
    progress: Progress,
    candidate: OpenCandidate | None = None,
) -> PairedRun:
    """Return what `model` and its `reference` predict on the images in one engine; duplicates count once.

    With `candidate` the model runs where that opens it; the reference always runs here. Raises DataRejected if images
    cannot be used, and what `load_model` raises.
    """
    refuse_null(engine)
    options, kept = EngineOptions(threads=threads), _Kept()
    with (
        load_model(reference, engine=engine, options=options) as expected,
        candidate(engine) if candidate else load_model(model, engine=engine, options=options) as predictor,
    ):
        kept.stream(images.paths, expected, predictor, lambda done, of: progress(f"verifying in {engine}", done, of))
    num_copies = kept.num_seen - len(kept.hashes)
    if num_copies:
        _log.warning("%d images are duplicates of others and were counted once", num_copies)
    positions = list(kept.hashes.values())
    return PairedRun(
        engine=engine,
        answers=join_answers(kept.answers),
        paths=tuple(images.paths[position] for position in positions),
        hashes=tuple(kept.hashes),
        fingerprints=tuple(kept.fingerprints),
        labels_B=np.array([images.labels[position] for position in positions], dtype=np.int64),
    )


class _Kept:
    """What is kept of the images so far; pixels only until their batch has run."""

    def __init__(self) -> None:
        self.hashes: dict[str, int] = {}
        self.fingerprints: list[str] = []
        self.batch: list[Pixels] = []
        self.answers: list[PairedAnswers] = []
        self.num_seen = 0

    def stream(
        self,
        paths: Sequence[Path],
        reference: Classifier,
        candidate: Predictor,
        progress: Callable[[int, int], None],
    ) -> None:
        for position, pixels in stream_pixels(paths, reference.manifest.preprocessing):
            progress(position, len(paths))
            if self.add(position, pixels) and len(self.batch) == _BATCH:
                self.answer(reference, candidate)
        self.answer(reference, candidate)
        progress(len(paths), len(paths))

    def add(self, position: int, pixels: Pixels) -> bool:
        """Return whether the image is a new one: duplicates prove nothing more."""
        self.num_seen += 1
        digest = pixel_hash(pixels)
        if digest in self.hashes:
            return False
        self.hashes[digest] = position
        self.fingerprints.append(fingerprint(pixels))
        self.batch.append(pixels)
        return True

    def answer(self, reference: Classifier, candidate: Predictor) -> None:
        if self.batch:
            images_NHWC = np.stack(self.batch)
            self.answers.append(pair_answers(reference.logits(images_NHWC), candidate.logits(images_NHWC)))
            self.batch.clear()
