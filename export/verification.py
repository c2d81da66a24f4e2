"""Is the candidate as accurate as its reference? Both on the same pictures, in the engines that ship, with a bound."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vit_edge.artifact import ModelFile, open_model
from vit_edge.data import EVALUATION_SPLITS, LabelledImages, read_labelled, refuse_overlap, set_hash, stream_pixels
from vit_edge.errors import DataRejected, InputError, UsageError, require
from vit_edge.image import pixel_hash
from vit_edge.metrics import best_certifiable_points, compare, images_needed
from vit_edge.progress import Progress, silent
from vit_edge.runtime.classifier import Classifier
from vit_edge.runtime.engine import EngineOptions, Logits, chosen_engines, refuse_null
from vit_edge.runtime.loading import load_model

__all__ = ["EngineResult", "Verdict", "Verification", "verify", "verify_models"]

Verdict = Literal["pass", "fail", "inconclusive"]
DEFAULT_MAX_DROP_POINTS = 1.0
_BATCH = 16
# 0.01 points need 30,000 pictures of which not one changes.
_SMALLEST_DROP_POINTS = 0.01
_NUM_NAMED = 20
# Fewer pictures than this cannot tell wrong labels from bad luck.
_ENOUGH_TO_DOUBT = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResult:
    """Candidate against reference in one engine; shares are in percent, drops in percentage points."""

    engine: str
    images: int
    reference_top1: float
    candidate_top1: float
    drop_points: float
    drop_upper_bound_points: float
    worse: int
    better: int
    mcnemar_p: float
    agreement: float
    agreement_interval: tuple[float, float]
    sqnr_db: float
    verdict: Verdict
    images_needed: int | None
    changed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The verdict over all engines (the worst of them), and what each found."""

    verdict: Verdict
    max_drop_points: float
    min_agreement: float | None
    best_certifiable_points: float
    data_sha256: str
    results: tuple[EngineResult, ...]

    @property
    def decisive(self) -> EngineResult:
        """Return the result of the engine that decided: the worst verdict, then the largest bound."""
        return max(self.results, key=lambda r: (_SEVERITY[r.verdict], r.drop_upper_bound_points))


_SEVERITY: dict[Verdict, int] = {"pass": 0, "inconclusive": 1, "fail": 2}


def verify(
    model: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str],
    data: str | os.PathLike[str],
    max_drop_points: float = DEFAULT_MAX_DROP_POINTS,
    min_agreement: float | None = None,
    engines: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Return how the file `model` compares with the file `reference` on the labelled pictures of `data`.

    It passes where the one-sided 95 % upper bound of the accuracy drop is at most `max_drop_points` in every engine
    (default: all installed) and, if given, agreement is at least `min_agreement` percent; it fails where the drop seen
    is larger; else it is inconclusive, with the number of pictures needed. Raises DataRejected, ModelRejected,
    NotTrusted, GoldenMismatch.
    """
    return verify_models(
        open_model(model),
        reference=open_model(reference),
        data=data,
        max_drop_points=max_drop_points,
        min_agreement=min_agreement,
        engines=engines,
        threads=threads,
        progress=progress,
    )


def verify_models(
    model: ModelFile,
    *,
    reference: ModelFile,
    data: str | os.PathLike[str],
    max_drop_points: float = DEFAULT_MAX_DROP_POINTS,
    min_agreement: float | None = None,
    engines: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Return what `verify` returns, for files that were opened already."""
    if not _SMALLEST_DROP_POINTS <= max_drop_points < 100:
        raise UsageError("cannot verify", reason=f"max drop is {max_drop_points}", remedy="give 0.01 to 100 points")
    if min_agreement is not None and not 0 <= min_agreement <= 100:
        raise UsageError("cannot verify", reason=f"min agreement is {min_agreement}", remedy="give a percentage")
    _check_comparable(model, reference)
    made_from = model.manifest.provenance.get("float_model_sha256")
    if made_from not in (None, reference.sha256):
        _log.warning("%s was not made from %s, by the hash in its manifest", model.source, reference.source)
    images = read_labelled(data, splits=EVALUATION_SPLITS, class_names=reference.manifest.labels)
    chosen = chosen_engines(engines)
    results, hashes = [], {}
    for name in chosen:
        refuse_null(name)
        options = EngineOptions(threads=threads)
        with (
            load_model(reference, engine=name, options=options) as expected,
            load_model(model, engine=name, options=options) as candidate,
        ):
            run = _run(images, expected, candidate, f"verifying in {name}", progress)
        hashes = run.hashes
        _check_disjoint(model, hashes)
        _check_reference(run, reference)
        results.append(_judge(name, run, max_drop_points, min_agreement))
    return Verification(
        verdict=max((r.verdict for r in results), key=_SEVERITY.__getitem__),
        max_drop_points=max_drop_points,
        min_agreement=min_agreement,
        best_certifiable_points=best_certifiable_points(results[0].images),
        data_sha256=set_hash(list(hashes)),
        results=tuple(results),
    )


def best_possible(data: str | os.PathLike[str], reference: str | os.PathLike[str]) -> tuple[int, float]:
    """Return how many labelled pictures there are, and the smallest drop in points that they could certify."""
    labels = open_model(reference).manifest.labels
    images = read_labelled(data, splits=EVALUATION_SPLITS, class_names=labels)
    return images.num_images, best_certifiable_points(images.num_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    reference_BK: Logits
    candidate_BK: Logits
    labels_B: npt.NDArray[np.int64]
    paths: tuple[Path, ...]
    hashes: dict[str, Path]


def _run(images: LabelledImages, reference: Classifier, candidate: Classifier, stage: str, progress: Progress) -> _Run:
    logits: tuple[list[Logits], list[Logits]] = ([], [])
    positions: list[int] = []
    hashes: dict[str, Path] = {}
    batch: list[Any] = []
    num_copies = 0

    def flush() -> None:
        if batch:
            stacked = np.stack(batch)
            for classifier, kept in zip((reference, candidate), logits, strict=True):
                kept.append(classifier.logits(stacked))
            batch.clear()

    for position, pixels in stream_pixels(images.paths, reference.manifest.preprocessing):
        progress(stage, position, images.num_images)
        digest = pixel_hash(pixels)
        if digest in hashes:  # counted once: copies would prove the same thing again
            num_copies += 1
            continue
        positions.append(position)
        hashes[digest] = images.paths[position]
        batch.append(pixels)
        if len(batch) == _BATCH:
            flush()
    flush()
    progress(stage, images.num_images, images.num_images)
    if num_copies:
        _log.warning("%d pictures are copies of others and were not counted again", num_copies)
    return _Run(
        reference_BK=np.concatenate(logits[0]),
        candidate_BK=np.concatenate(logits[1]),
        labels_B=np.array([images.labels[position] for position in positions], dtype=np.int64),
        paths=tuple(images.paths[position] for position in positions),
        hashes=hashes,
    )


def _judge(engine: str, run: _Run, max_drop_points: float, min_agreement: float | None) -> EngineResult:
    found = compare(run.reference_BK, run.candidate_BK, run.labels_B)
    changed = np.flatnonzero(run.reference_BK.argmax(axis=1) != run.candidate_BK.argmax(axis=1))
    needed = None
    verdict: Verdict = "pass"
    if found.drop_points > max_drop_points or (min_agreement is not None and found.agreement < min_agreement):
        verdict = "fail"
    elif found.drop_upper_bound_points > max_drop_points:
        verdict = "inconclusive"
        needed = images_needed(found.images, worse=found.worse, better=found.better, max_drop_points=max_drop_points)
    return EngineResult(
        engine=engine,
        images=found.images,
        reference_top1=found.reference_top1,
        candidate_top1=found.candidate_top1,
        drop_points=found.drop_points,
        drop_upper_bound_points=found.drop_upper_bound_points,
        worse=found.worse,
        better=found.better,
        mcnemar_p=found.mcnemar_p,
        agreement=found.agreement,
        agreement_interval=found.agreement_interval,
        sqnr_db=found.sqnr_db,
        verdict=verdict,
        images_needed=needed,
        changed=tuple(str(run.paths[i]) for i in changed[:_NUM_NAMED]),
    )


def _check_comparable(model: ModelFile, reference: ModelFile) -> None:
    if reference.manifest.precision != "float32":
        reason = f"its precision is {reference.manifest.precision}; a reference is float32"
        remedy = "give the file that `vit-edge export` wrote"
        raise UsageError("cannot compare with", file=reference.source, reason=reason, remedy=remedy)
    for name in ("labels", "preprocessing"):
        if getattr(model.manifest, name) != getattr(reference.manifest, name):
            reason = f"its {name} are not those of {reference.source}"
            remedy = "compare a file with the one it was made from"
            raise InputError("cannot compare the models", file=model.source, reason=reason, remedy=remedy)


def _check_disjoint(model: ModelFile, hashes: dict[str, Path]) -> None:
    refuse_overlap((model.manifest.quantization or {}).get("images", ()), hashes)


def _check_reference(run: _Run, reference: ModelFile) -> None:
    """Raise DataRejected where even the float model is no better than chance: then INT8 is not to blame."""
    right, num_classes = int(np.sum(run.reference_BK.argmax(axis=1) == run.labels_B)), len(reference.manifest.labels)
    stats = require("scipy.stats", extra="export", what="verify")
    by_chance = stats.binomtest(right, len(run.labels_B), 1 / num_classes, alternative="greater").pvalue
    if len(run.labels_B) >= _ENOUGH_TO_DOUBT and num_classes > 1 and by_chance > 0.05:
        reason = f"the reference is right on {right} of {len(run.labels_B)}, no better than chance"
        remedy = "the labels or the preprocessing are wrong: check the names of the classes and the manifest"
        raise DataRejected("cannot verify on these pictures", reason=reason, remedy=remedy)
