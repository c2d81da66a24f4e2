"""Is the candidate as accurate as its reference? Both on the same images, in the engines that ship, with a bound."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt

from vit_edge.data import refuse_overlap, set_hash
from vit_edge.errors import DataRejected, InputError, UsageError, printable, require
from vit_edge.export.verification.flips import (
    Change,
    FlipLabels,
    changes,
    class_titles,
    flips_csv,
    may_write_flips,
    read_flips,
)
from vit_edge.export.verification.paired_run import (
    EvaluationImages,
    OpenCandidate,
    PairedRun,
    ReferenceRun,
    find_evaluation_images,
    run_both,
)
from vit_edge.export.verification.verdict import SEVERITY, Budget, Outlook, Verdict, judge, outlook
from vit_edge.files import sha256_hex, write_atomic
from vit_edge.metrics import Comparison, compare_answers
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engines.protocol import chosen_engines
from vit_edge.similarity import near_duplicates

__all__ = [
    "ClassLoss",
    "EngineResult",
    "Labels",
    "Verdict",
    "Verification",
    "certifiable",
    "check_comparable",
    "verify",
    "verify_models",
    "write_flips",
]

Labels = Literal["all", "flips", "none"]
DEFAULT_MAX_DROP_POINTS = 1.0
_NUM_NAMED = 20
# Fewer images than this cannot tell wrong labels from bad luck.
_ENOUGH_TO_DOUBT = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLoss:
    """A class that lost right answers; how many images it has, and right ones, where all are labelled."""

    label: str
    lost: int
    images: int | None
    reference_right: int | None
    candidate_right: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResult(Comparison):
    """Candidate against reference in one engine; shares are in percent, drops in percentage points."""

    engine: str
    verdict: Verdict
    images_needed: int | None
    worst_classes: tuple[ClassLoss, ...]
    changed: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The verdict over all engines (the worst of them), what was asked, and what each engine gave.

    `labels` says whether all images have one, those of a flips file, or none: then each changed answer counts as
    lost. `near_copies` are images that look like a calibration image encoded again.
    """

    verdict: Verdict
    max_drop_points: float | None
    min_agreement: float | None
    at_best: Outlook
    labels: Labels
    data: str
    data_sha256: str
    models_sha256: str
    near_copies: tuple[str, ...]
    results: tuple[EngineResult, ...]

    @property
    def decisive(self) -> EngineResult:
        """Return the result of the engine that decided: the worst verdict, then the largest bound."""
        return max(self.results, key=lambda r: (SEVERITY[r.verdict], r.drop_upper_bound_points, r.num_changed))

    @property
    def num_unlabelled(self) -> int:
        """Return how many different images changed their answer in some engine and have no label."""
        return len({change.pixels_sha256 for r in self.results for change in r.changed if change.label is None})

    @property
    def best_certifiable_points(self) -> float:
        """Return the smallest drop that these images can certify: the bound where not one answer changes."""
        return self.at_best.best_points


def verify(
    model: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str],
    data: str | os.PathLike[str],
    max_drop_points: float | None = None,
    min_agreement: float | None = None,
    unlabelled: bool = False,
    flips: str | os.PathLike[str] | None = None,
    carry_labels: bool = False,
    engines: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
    candidate: OpenCandidate | None = None,
) -> Verification:
    """Return how the file `model` compares with the file `reference` on the images of `data`.

    It passes where in every engine (default: all installed) the 95 % upper bound of the accuracy drop is at most
    `max_drop_points` (default: 1) and that of the agreement at least `min_agreement` percent, if given; it fails where
    the figures seen are not; else it is inconclusive. Without labels agreement is judged alone where only that is
    given; else each changed answer counts as lost until `flips`, a file of `write_flips`, has its label (with
    `carry_labels` one of other models). With `candidate` the model answers where this opens it, on a device. Raises
    DataRejected, ModelRejected, NotTrusted, GoldenMismatch, UsageError.
    """
    return verify_models(
        open_model(model),
        reference=open_model(reference),
        data=data,
        max_drop_points=max_drop_points,
        min_agreement=min_agreement,
        unlabelled=unlabelled,
        flips=flips,
        carry_labels=carry_labels,
        engines=engines,
        threads=threads,
        progress=progress,
        candidate=candidate,
    )


def verify_models(
    model: ModelFile,
    *,
    reference: ModelFile,
    data: str | os.PathLike[str],
    max_drop_points: float | None = None,
    min_agreement: float | None = None,
    unlabelled: bool = False,
    flips: str | os.PathLike[str] | None = None,
    carry_labels: bool = False,
    engines: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
    candidate: OpenCandidate | None = None,
    reference_run: ReferenceRun | None = None,
) -> Verification:
    """Return what `verify` returns, for files that were opened already.

    With `reference_run`, of the same reference and data, what an earlier verification decoded and computed is used.
    """
    check_comparable(model, reference)
    asked = _Asked.of(data, reference, max_drop_points, min_agreement, unlabelled=unlabelled, flips=flips is not None)
    models_sha256 = sha256_hex(f"{model.sha256} {reference.sha256}".encode())
    given = _given(flips, reference, None if carry_labels else models_sha256)
    runs, results = list[PairedRun](), list[EngineResult]()
    shared = reference_run or ReferenceRun(reference, asked.images, threads=threads)
    for run in _each_engine(model, shared, engines=engines, progress=progress, candidate=candidate):
        runs.append(run)
        results.append(_result(run, given, asked, strict=not carry_labels))
    return Verification(
        verdict=max((r.verdict for r in results), key=SEVERITY.__getitem__),
        max_drop_points=asked.budget.max_drop_points,
        min_agreement=asked.budget.min_agreement,
        at_best=outlook(results[0].images, asked.budget),
        labels=asked.labels,
        data=os.fspath(data),
        data_sha256=set_hash(runs[0].hashes),
        models_sha256=models_sha256,
        near_copies=_near_copies(model, runs[0]),
        results=tuple(results),
    )


def certifiable(
    data: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    max_drop_points: float | None = None,
    min_agreement: float | None = None,
    unlabelled: bool = False,
    flips: bool = False,
) -> tuple[Labels, Budget, Outlook]:
    """Return what a verification on these images would judge, and what it can certify at best, before it runs."""
    source = open_model(reference, warn=False)
    asked = _Asked.of(data, source, max_drop_points, min_agreement, unlabelled=unlabelled, flips=flips)
    return asked.labels, asked.budget, outlook(asked.images.num_images, asked.budget)


def write_flips(verification: Verification, path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write the images whose answer changed, to be labelled, and return their number.

    Columns: file (relative to the data), both answers and margins, label (empty unless known), engines, hashes. Raises
    UsageError where the file exists; labels that someone filled in are not overwritten even with `force`.
    """
    target = may_write_flips(path, force=force)
    found = {r.engine: r.changed for r in verification.results}
    write_atomic(target, flips_csv(found, folder=verification.data, models_sha256=verification.models_sha256))
    return len({change.pixels_sha256 for entries in found.values() for change in entries})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """The images that judge, what is known of their labels, and what is judged; `titles` are the classes' names."""

    images: EvaluationImages
    labels: Labels
    budget: Budget
    titles: tuple[str, ...]

    @classmethod
    def of(
        cls,
        data: str | os.PathLike[str],
        reference: ModelFile,
        max_drop_points: float | None,
        min_agreement: float | None,
        *,
        unlabelled: bool,
        flips: bool,
    ) -> _Asked:
        names = reference.manifest.labels
        images = find_evaluation_images(data, names, unlabelled=unlabelled or flips)
        labels: Labels = "flips" if flips else "all" if images.labelled else "none"
        # Agreement alone is judged only where it is all that was asked for, and no label is there.
        if max_drop_points is None and (labels != "none" or min_agreement is None):
            max_drop_points = DEFAULT_MAX_DROP_POINTS
        budget = Budget(max_drop_points=max_drop_points, min_agreement=min_agreement)
        return cls(images=images, labels=labels, budget=budget, titles=class_titles(names))


def _each_engine(
    model: ModelFile,
    reference: ReferenceRun,
    *,
    engines: Sequence[str],
    progress: Progress,
    candidate: OpenCandidate | None,
) -> Iterator[PairedRun]:
    """Yield the answers in one engine after another, on the very same images; the first run checks these."""
    for number, engine in enumerate(chosen_engines(engines)):
        run = run_both(reference, model, engine=engine, progress=progress, candidate=candidate)
        if number == 0:
            refuse_overlap((model.manifest.quantization or {}).get("images", ()), run.path_of)
            if reference.images.labelled:
                _check_reference(run, reference.reference)
        yield run


def _given(flips: str | os.PathLike[str] | None, reference: ModelFile, models_sha256: str | None) -> FlipLabels | None:
    return None if flips is None else read_flips(flips, reference.manifest.labels, models_sha256=models_sha256)


def _result(run: PairedRun, given: FlipLabels | None, asked: _Asked, *, strict: bool) -> EngineResult:
    labels_B = run.labels_B if given is None else given.of(run)
    found, changed = compare_answers(run.answers, labels_B), changes(run, labels_B, asked.titles)
    if given is not None and strict:
        given.check(run, changed)
    verdict, needed = judge(found, asked.budget)
    figures = {field.name: getattr(found, field.name) for field in fields(found)}
    return EngineResult(
        **figures,
        engine=run.engine,
        verdict=verdict,
        images_needed=needed,
        worst_classes=_worst_classes(run, labels_B, asked.titles),
        changed=changed,
    )


def _worst_classes(run: PairedRun, labels_B: npt.NDArray[np.int64], titles: Sequence[str]) -> tuple[ClassLoss, ...]:
    """Return the classes that lost right answers, those that lost most first."""
    num_classes, complete = len(titles), bool((labels_B >= 0).all())
    known_B = np.where(labels_B >= 0, labels_B, num_classes)

    def count(of_B: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(known_B[of_B], minlength=num_classes + 1)[:num_classes]

    before_K = count(run.answers.reference_BT[:, 0] == known_B)
    after_K = count(run.answers.candidate_BT[:, 0] == known_B)
    images_K, lost_K = count(np.ones(len(known_B), dtype=np.bool_)), before_K - after_K
    worst = [int(k) for k in np.argsort(-lost_K, kind="stable")[:_NUM_NAMED] if lost_K[k] > 0]
    return tuple(
        ClassLoss(
            label=titles[k],
            lost=int(lost_K[k]),
            images=int(images_K[k]) if complete else None,
            reference_right=int(before_K[k]) if complete else None,
            candidate_right=int(after_K[k]) if complete else None,
        )
        for k in worst
    )


def check_comparable(model: ModelFile, reference: ModelFile) -> None:
    """Raise UsageError or InputError where these are not a file and the float32 file that it was made from."""
    if reference.manifest.precision != "float32":
        reason = f"its precision is {reference.manifest.precision}; a reference is float32"
        remedy = "give the file that `vit-edge export` wrote"
        raise UsageError("cannot compare with", file=reference.source, reason=reason, remedy=remedy)
    for name in ("labels", "preprocessing"):
        if getattr(model.manifest, name) != getattr(reference.manifest, name):
            reason = f"its {name} are not those of {reference.source}"
            remedy = "compare a file with the one it was made from"
            raise InputError("cannot compare the models", file=model.source, reason=reason, remedy=remedy)
    made_from = model.manifest.provenance.get("float_model_sha256")
    if made_from not in (None, reference.sha256):
        _log.warning("%s was not made from %s, by the hash in its manifest", model.source, reference.source)


def _near_copies(model: ModelFile, run: PairedRun) -> tuple[str, ...]:
    """Return the images that look like one that calibrated, encoded again; with a warning."""
    calibration = (model.manifest.quantization or {}).get("fingerprints")
    if not calibration:  # a file of an older version has none
        return ()
    try:
        positions = sorted({position for _, position in near_duplicates(calibration, run.fingerprints)})
    except (TypeError, ValueError) as error:
        _log.warning("%s: its fingerprints of calibration images cannot be used (%s)", model.source, error)
        return ()
    paths = tuple(printable(run.paths[position]) for position in positions)
    if paths:
        named = ", ".join(paths[:_NUM_NAMED]) + (" ..." if len(paths) > _NUM_NAMED else "")
        message = "%d of the images that judge look like calibration images that were encoded again: %s"
        _log.warning(message, len(paths), named)
    return paths


def _check_reference(run: PairedRun, reference: ModelFile) -> None:
    """Raise DataRejected where even the float model is no better than chance: then INT8 is not to blame."""
    right, num_classes = int(np.sum(run.answers.reference_BT[:, 0] == run.labels_B)), len(reference.manifest.labels)
    stats = require("scipy.stats", extra="export", what="verify")
    by_chance = stats.binomtest(right, len(run.labels_B), 1 / num_classes, alternative="greater").pvalue
    if len(run.labels_B) >= _ENOUGH_TO_DOUBT and num_classes > 1 and by_chance > 0.05:
        reason = f"the reference is right on {right} of {len(run.labels_B)}, no better than chance"
        remedy = "the labels or the preprocessing are wrong: check the names of the classes and the manifest"
        raise DataRejected("cannot verify on these images", reason=reason, remedy=remedy)
