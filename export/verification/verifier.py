"""Is a candidate as accurate as its reference? Both run on the same images, in the engines that ship."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from vit_edge.data import refuse_overlap, set_hash
from vit_edge.data.near_duplicates import near_duplicates
from vit_edge.errors import DataRejected, printable, require
from vit_edge.export.verification.flips import changes, class_titles, flips_csv, may_write_flips
from vit_edge.export.verification.paired_run import EvaluatedImages, PairedRun, run_both
from vit_edge.export.verification.request import Model, VerificationRequest, check_kind, open_request, opened
from vit_edge.export.verification.results import ClassLoss, EngineResult, Verification
from vit_edge.export.verification.scored_run import ScoredRun, run_scored, scored_result
from vit_edge.export.verification.verdict import SEVERITY, decide
from vit_edge.files import write_atomic
from vit_edge.metrics import compare_answers
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent

__all__ = ["near_copies", "run_verification", "verify", "write_flips"]

_NUM_NAMED = 20
# With fewer images, wrong labels look like bad luck.
_ENOUGH_TO_DOUBT = 20
_log = logging.getLogger(__name__)


def verify(
    model: Model,
    *,
    reference: Model,
    data: str | os.PathLike[str],
    max_drop_points: float | None = None,
    min_agreement: float | None = None,
    unlabelled: bool = False,
    flips: str | os.PathLike[str] | None = None,
    carry_labels: bool = False,
    engines: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Return how the candidate `model` compares with its float32 `reference` on the images in `data`.

        >>> found = verify("model.int8.onnx", reference="model.onnx", data="images/test", max_drop_points=0.5)
        >>> found
        <Verification ... on ... images in ...: drop ... points, at most ..., agreement ... %>
        >>> found.verdict in ("pass", "fail", "inconclusive")
        True

    Both models are paths or files that `open_model` opened. The verdict is `pass` if in every engine (default: all
    installed) the 95 % upper bound of the accuracy drop is at most `max_drop_points` (default: 1), and the lower bound
    of the agreement is at least `min_agreement` percent, if given. It is `fail` if the measured figures exceed the
    budget, and else `inconclusive`. Without labels, agreement alone decides if only that is given; otherwise each
    changed prediction counts as lost until `flips`, a file of `write_flips`, has its label (with `carry_labels` a file
    of other models). Raises DataRejected, ModelRejected, NotTrusted, GoldenMismatch, UsageError.
    """
    candidate = opened(model)
    check_kind(candidate, is_encoder=False)
    request = open_request(
        candidate,
        reference=reference,
        data=data,
        max_drop_points=max_drop_points,
        min_agreement=min_agreement,
        unlabelled=unlabelled,
        flips=flips,
        carry_labels=carry_labels,
        engines=tuple(engines),
        threads=threads,
    )
    return run_verification(request, progress=progress)


def run_verification(request: VerificationRequest, *, progress: Progress = silent) -> Verification:
    """Return what `verify` returns, for a request that was opened before."""
    runs, results = list[PairedRun | ScoredRun](), list[EngineResult]()
    for run in _each_engine(request, progress):
        runs.append(run)
        results.append(_result(run, request) if isinstance(run, PairedRun) else scored_result(run, request))
    return Verification(
        verdict=max((r.verdict for r in results), key=SEVERITY.__getitem__),
        max_drop_points=request.budget.max_drop_points,
        min_agreement=request.budget.min_agreement,
        certifiable=request.certifiable_on(results[0].images),
        labels=request.labels,
        data=request.data,
        data_sha256=set_hash(runs[0].hashes),
        models_sha256=request.models_sha256,
        near_copies=near_copies(request.model, runs[0]),
        results=tuple(results),
    )


def write_flips(verification: Verification, path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write the images whose prediction changed, to be labelled, and return their number.

    Columns: file (relative to the data), both predictions and margins, label (empty unless known), engines, hashes.
    Raises UsageError if the file exists; labels that are filled in are not overwritten, even with `force`.
    """
    target = may_write_flips(path, force=force)
    found = {r.engine: r.changed for r in verification.results}
    write_atomic(target, flips_csv(found, folder=verification.data, models_sha256=verification.models_sha256))
    return verification.num_changed


def near_copies(model: ModelFile, run: EvaluatedImages) -> tuple[str, ...]:
    """Return the images that look like a re-encoded calibration image, with a warning."""
    calibration = (model.manifest.quantization or {}).get("fingerprints")
    if not calibration:  # a file of an older version has none
        return ()
    try:
        positions = sorted({position for _, position in near_duplicates(calibration, run.fingerprints)})
    except (TypeError, ValueError) as error:
        _log.warning("%s: the fingerprints of the calibration images cannot be used (%s)", model.source, error)
        return ()
    paths = tuple(printable(run.paths[position]) for position in positions)
    if paths:
        named = ", ".join(paths[:_NUM_NAMED]) + (" ..." if len(paths) > _NUM_NAMED else "")
        _log.warning("%d evaluation images look like re-encoded calibration images: %s", len(paths), named)
    return paths


def _each_engine(request: VerificationRequest, progress: Progress) -> Iterator[PairedRun | ScoredRun]:
    """Yield the predictions in one engine after another, on the very same images; the first run checks these."""
    for number, engine in enumerate(request.engines):
        run = _run(request, engine, progress)
        if number == 0:
            refuse_overlap((request.model.manifest.quantization or {}).get("images", ()), run.path_of)
            if request.images.labelled and isinstance(run, PairedRun):
                _check_reference(run, request.reference)
        yield run


def _run(request: VerificationRequest, engine: str, progress: Progress) -> PairedRun | ScoredRun:
    if not request.model.manifest.chooses_class:
        return run_scored(request, engine, progress)
    return run_both(
        request.reference_run, request.model, engine=engine, progress=progress, candidate=request.open_candidate
    )


def _result(run: PairedRun, request: VerificationRequest) -> EngineResult:
    flips, titles = request.flips, class_titles(request.reference.manifest.labels)
    labels_B = run.labels_B if flips is None else flips.of(run)
    found, changed = compare_answers(run.answers, labels_B), changes(run, labels_B, titles)
    if flips is not None and not request.carry_labels:
        flips.check(run, changed)
    verdict, needed = decide(found, request.budget)
    figures = {field.name: getattr(found, field.name) for field in fields(found)}
    return EngineResult(
        **figures,
        engine=run.engine,
        verdict=verdict,
        images_needed=needed,
        worst_classes=_worst_classes(run, labels_B, titles),
        changed=changed,
    )


def _worst_classes(run: PairedRun, labels_B: npt.NDArray[np.int64], titles: Sequence[str]) -> tuple[ClassLoss, ...]:
    """Return the classes that lost correct predictions, those that lost most first."""
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


def _check_reference(run: PairedRun, reference: ModelFile) -> None:
    """Raise DataRejected if the float32 model is no better than chance, or far below what its manifest records."""
    right, num_classes = int(np.sum(run.answers.reference_BT[:, 0] == run.labels_B)), len(reference.manifest.labels)
    stats = require("scipy.stats", extra="export", what="verify")
    by_chance = stats.binomtest(right, len(run.labels_B), 1 / num_classes, alternative="greater").pvalue
    if len(run.labels_B) >= _ENOUGH_TO_DOUBT and num_classes > 1 and by_chance > 0.05:
        raise _wrong_labels(reference, f"correct on {right} of {len(run.labels_B)} images, no better than chance")
    recorded = (reference.manifest.evaluation or {}).get("top1")
    if not isinstance(recorded, int | float) or not 0 < recorded <= 100:
        return
    # Harder images cost some points; only wrong labels or preprocessing cost more than half.
    below_half = stats.binomtest(right, len(run.labels_B), recorded / 200, alternative="less").pvalue
    if below_half < 0.05:
        figures = f"correct on {right} of {len(run.labels_B)} images, far below the {recorded:.1f} % in its manifest"
        raise _wrong_labels(reference, figures)


def _wrong_labels(reference: ModelFile, figures: str) -> DataRejected:
    remedy = "check the labels and the preprocessing: compare the class names with those of `vit-edge inspect`"
    reason = f"the float32 reference is {figures}"
    return DataRejected("cannot verify on these images", file=reference.source, reason=reason, remedy=remedy)
