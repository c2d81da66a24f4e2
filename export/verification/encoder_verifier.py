"""Does a quantized encoder find the same neighbours as its reference? Both run on the same images, in every engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vit_edge.data import refuse_overlap, set_hash
from vit_edge.errors import DataRejected, printable
from vit_edge.export.verification.encoder_results import (
    AnyVerification,
    EncoderResult,
    EncoderVerification,
    MovedImage,
)
from vit_edge.export.verification.neighbours import BUDGET_NEIGHBOURS, PairedVectors, compare_vectors
from vit_edge.export.verification.paired_run import EvaluatedImages
from vit_edge.export.verification.request import Model, VerificationRequest, check_kind, open_request, opened
from vit_edge.export.verification.verdict import SEVERITY, certifiable, decide_encoder
from vit_edge.export.verification.verifier import near_copies, run_verification
from vit_edge.progress import Progress, silent

__all__ = ["run_any_verification", "run_encoder_verification", "verify_encoder"]

_NUM_MOVED = 20
# Among fewer images ten neighbours are half of all: chance alone keeps them.
_FEWEST_IMAGES = 2 * BUDGET_NEIGHBOURS + 1


def verify_encoder(
    model: Model,
    *,
    reference: Model,
    data: str | os.PathLike[str],
    min_neighbours: float | None = None,
    max_drop_points: float | None = None,
    unlabelled: bool = False,
    engines: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> EncoderVerification:
    """Return how the encoder `model` compares with its float32 `reference` on the images in `data`.

        >>> verify_encoder("encoder.int8.onnx", reference="encoder.onnx", data="images/test")
        <EncoderVerification ... on ... images in ...: ... % of 10 neighbours kept, at least ...>

    Both are paths or files that `open_model` opened. For each image, the ten nearest of the other images are found with
    the vectors of either file. The verdict is `pass` if in every engine the 95 % lower bound of the share that stays
    the same is at least `min_neighbours` percent (default: 90). With labels and `max_drop_points`, the upper bound of
    the drop of k-NN accuracy has to be within that too. It is `fail` if the measured figures are beyond the budget, and
    else `inconclusive`. Raises DataRejected, ModelRejected, NotTrusted, GoldenMismatch, UsageError.
    """
    candidate = opened(model)
    check_kind(candidate, is_encoder=True)
    request = open_request(
        candidate,
        reference=reference,
        data=data,
        min_neighbours=min_neighbours,
        max_drop_points=max_drop_points,
        unlabelled=unlabelled,
        engines=tuple(engines),
        threads=threads,
    )
    return run_encoder_verification(request, progress=progress)


def run_any_verification(request: VerificationRequest, *, progress: Progress = silent) -> AnyVerification:
    """Return the verification of a classifier or of an encoder, for a request that was opened before."""
    run = run_encoder_verification if request.model.manifest.is_encoder else run_verification
    return run(request, progress=progress)


def run_encoder_verification(request: VerificationRequest, *, progress: Progress = silent) -> EncoderVerification:
    """Return what `verify_encoder` returns, for a request that was opened before."""
    results = list[EncoderResult]()
    for number, engine in enumerate(request.engines):
        run = _run_both(request, engine, progress)
        if number == 0:
            refuse_overlap((request.model.manifest.quantization or {}).get("images", ()), run.images.path_of)
            _check_number(run)
        results.append(_result(run, request))
    return EncoderVerification(
        verdict=max((r.verdict for r in results), key=SEVERITY.__getitem__),
        max_drop_points=request.budget.max_drop_points,
        min_neighbours=request.budget.min_neighbours,
        certifiable=certifiable(results[0].images, request.budget),
        labels="all" if request.labels == "all" else "none",
        data=request.data,
        data_sha256=set_hash(run.images.hashes),
        models_sha256=request.models_sha256,
        near_copies=near_copies(request.model, run.images),
        results=tuple(results),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """The vectors of both files in one engine, and the images that they belong to."""

    engine: str
    images: EvaluatedImages
    vectors: PairedVectors


def _run_both(request: VerificationRequest, engine: str, progress: Progress) -> _Run:
    reference = request.reference_run
    pairs = reference.outputs(request.model, engine=engine, progress=progress, candidate=request.open_candidate)
    before, after = zip(*pairs, strict=True)
    vectors = PairedVectors(reference_BD=np.concatenate(before), candidate_BD=np.concatenate(after))
    return _Run(engine=engine, images=reference.evaluated, vectors=vectors)


def _check_number(run: _Run) -> None:
    count = len(run.images.paths)
    if count < _FEWEST_IMAGES:
        reason = (
            f"there are {count} different images; ten neighbours of each say something among {_FEWEST_IMAGES} or more"
        )
        raise DataRejected("cannot verify on these images", reason=reason, remedy="give more images")


def _result(run: _Run, request: VerificationRequest) -> EncoderResult:
    images, hashes = run.images, run.images.hashes
    labels_B = images.labels_B if request.labels == "all" else None
    # A hash of pixels has nothing to do with the class of an image, its folder does.
    shuffled = sorted(range(len(hashes)), key=hashes.__getitem__)
    found, kept_B = compare_vectors(run.vectors, labels_B, order=shuffled)
    verdict, needed = decide_encoder(found, kept_B[shuffled], request.budget)
    cosines_B = run.vectors.cosines
    moved = tuple(
        MovedImage(
            path=printable(images.paths[i]),
            pixels_sha256=hashes[i],
            cosine=float(cosines_B[i]),
            kept_percent=float(kept_B[i] * 100),
        )
        for i in np.argsort(cosines_B, kind="stable")[:_NUM_MOVED]
    )
    figures = {field.name: getattr(found, field.name) for field in fields(found)}
    return EncoderResult(**figures, engine=run.engine, verdict=verdict, images_needed=needed, moved=moved)
