"""What a verification needs, opened, listed and checked once, before any image is decoded."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vit_edge.errors import InputError, UsageError
from vit_edge.export.verification.flips import FlipLabels, read_flips
from vit_edge.export.verification.paired_run import (
    EvaluationImages,
    OpenCandidate,
    ReferenceRun,
    find_evaluation_images,
)
from vit_edge.export.verification.verdict import Budget, Certifiable, certifiable, certifiable_scores
from vit_edge.files import sha256_hex
from vit_edge.model_file.artifact import Manifest, ModelFile, open_model
from vit_edge.runtime.engines.protocol import chosen_engines

__all__ = [
    "Labels",
    "Model",
    "VerificationRequest",
    "check_comparable",
    "check_kind",
    "open_request",
    "opened",
    "what_certifies",
]

Labels = Literal["all", "flips", "none"]
Path: TypeAlias = str | os.PathLike[str]
Model: TypeAlias = Path | ModelFile
DEFAULT_MAX_DROP_POINTS = 1.0
DEFAULT_MIN_NEIGHBOURS = 90.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationRequest:
    """Two opened model files, the evaluation images and what is known of their labels, and the accuracy budget.

    The same request serves another candidate of the same reference: `dataclasses.replace(request, model=...)` shares
    what `reference_run` decoded and computed. With
    `open_candidate` the candidate runs wherever that opens it, on a device for example; the reference runs here.
    """

    model: ModelFile
    reference: ModelFile
    data: str
    images: EvaluationImages
    labels: Labels
    budget: Budget
    reference_run: ReferenceRun
    flips: FlipLabels | None = None
    carry_labels: bool = False
    engines: tuple[str, ...] = ()
    open_candidate: OpenCandidate | None = None

    @property
    def models_sha256(self) -> str:
        """Return one hash of both files."""
        return models_sha256(self.model, self.reference)

    @property
    def certifiable(self) -> Certifiable:
        """Return what these images can certify if no prediction changes, before any of them is run."""
        return self.certifiable_on(self.images.num_images)

    def certifiable_on(self, images: int) -> Certifiable:
        """Return what this many images can certify."""
        return what_certifies(self.model.manifest, images, self.budget, is_labelled=self.labels == "all")


def what_certifies(manifest: Manifest, images: int, budget: Budget, *, is_labelled: bool) -> Certifiable:
    """Return what this many images can certify of such a model if nothing changes."""
    if manifest.chooses_class or manifest.is_encoder:
        return certifiable(images, budget)
    return certifiable_scores(images, budget, is_labelled=is_labelled)


def open_request(
    model: Model,
    *,
    reference: Model,
    data: Path,
    max_drop_points: float | None = None,
    min_agreement: float | None = None,
    min_neighbours: float | None = None,
    unlabelled: bool = False,
    flips: Path | None = None,
    carry_labels: bool = False,
    engines: tuple[str, ...] = (),
    threads: int | None = None,
) -> VerificationRequest:
    """Return a request whose files exist, belong together and have evaluation images; parameters as for `verify`."""
    candidate, source = opened(model), opened(reference)
    check_comparable(candidate, source)
    _check_limits(candidate, min_agreement, min_neighbours)
    if flips is not None and source.manifest.task in ("multi-label", "regression"):
        reason, remedy = (
            f"flips files are for one class of several; the file is {source.manifest.task}",
            "leave them out",
        )
        raise UsageError("cannot verify", file=candidate.source, reason=reason, remedy=remedy)
    images = find_evaluation_images(
        data, source.manifest.labels, unlabelled=unlabelled or flips is not None, task=source.manifest.task
    )
    labels: Labels = "flips" if flips is not None else "all" if images.labelled else "none"
    budget = _budget(candidate, labels, max_drop_points, min_agreement, min_neighbours)
    both = None if carry_labels else models_sha256(candidate, source)
    return VerificationRequest(
        model=candidate,
        reference=source,
        data=os.fspath(data),
        images=images,
        labels=labels,
        budget=budget,
        reference_run=ReferenceRun(source, images, threads=threads),
        flips=None if flips is None else read_flips(flips, source.manifest.labels, models_sha256=both),
        carry_labels=carry_labels,
        engines=chosen_engines(engines),
    )


def check_kind(model: ModelFile, *, is_encoder: bool) -> None:
    """Raise UsageError if the file is an encoder and a classifier is compared, or the other way round."""
    if model.manifest.is_encoder and not is_encoder:
        reason, remedy = "the file is an encoder", "use verify_encoder"
    elif is_encoder and not model.manifest.is_encoder:
        reason, remedy = "the file is a classifier, not an encoder", "use verify"
    else:
        return
    raise UsageError("cannot verify", file=model.source, reason=reason, remedy=remedy)


def _check_limits(model: ModelFile, min_agreement: float | None, min_neighbours: float | None) -> None:
    """Raise UsageError if a limit is for the other kind of file."""
    if model.manifest.is_encoder and min_agreement is not None:
        reason, remedy = "the file is an encoder and makes no predictions that could agree", "use --min-neighbours"
    elif not model.manifest.is_encoder and min_neighbours is not None:
        reason, remedy = "min neighbours is for encoders; the file is a classifier", "use --max-drop, --min-agreement"
    else:
        return
    raise UsageError("cannot verify", file=model.source, reason=reason, remedy=remedy)


def _budget(
    model: ModelFile,
    labels: Labels,
    max_drop_points: float | None,
    min_agreement: float | None,
    min_neighbours: float | None,
) -> Budget:
    """Return the budget, with the default of classifiers or encoders; raises UsageError."""
    if not model.manifest.is_encoder:
        # Agreement alone decides only if nothing else was requested and there are no labels.
        if max_drop_points is None and (labels != "none" or min_agreement is None):
            max_drop_points = DEFAULT_MAX_DROP_POINTS
        return Budget(max_drop_points=max_drop_points, min_agreement=min_agreement)
    if max_drop_points is None and min_neighbours is None:
        min_neighbours = DEFAULT_MIN_NEIGHBOURS
    problem = None
    if labels == "flips":
        problem = ("the file is an encoder and has no changed predictions to label", "leave --flips out")
    elif max_drop_points is not None and labels != "all":
        problem = ("a drop of k-NN accuracy needs labelled images", "use --min-neighbours, or labelled images")
    if problem is not None:
        raise UsageError("cannot verify", file=model.source, reason=problem[0], remedy=problem[1])
    return Budget(max_drop_points=max_drop_points, min_neighbours=min_neighbours)


def opened(model: Model) -> ModelFile:
    """Return the model file at a path; one that is already open is returned as it is."""
    return model if isinstance(model, ModelFile) else open_model(model)


def models_sha256(model: ModelFile, reference: ModelFile) -> str:
    """Return one hash of a candidate and its reference."""
    return sha256_hex(f"{model.sha256} {reference.sha256}".encode())


def check_comparable(model: ModelFile, reference: ModelFile) -> None:
    """Raise UsageError or InputError unless `reference` is float32 and has the labels and preprocessing of `model`."""
    if reference.manifest.precision != "float32":
        reason = f"the file is {reference.manifest.precision}; a reference is float32"
        remedy = "give the file that `vit-edge export` wrote"
        raise UsageError("cannot use the reference", file=reference.source, reason=reason, remedy=remedy)
    for name in ("labels", "preprocessing", "embedding", "task"):
        if getattr(model.manifest, name) != getattr(reference.manifest, name):
            reason = f"the {name} differ from those of {reference.source}"
            remedy = "give the float32 file that this one was made from"
            raise InputError("cannot compare the models", file=model.source, reason=reason, remedy=remedy)
    made_from = model.manifest.provenance.get("float_model_sha256")
    if made_from not in (None, reference.sha256):
        _log.warning("%s was not made from %s, according to the hash in its manifest", model.source, reference.source)
