"""What an explanation needs, opened and checked before any of its work: files, images, the network they came from."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vit_edge.errors import InputError, UsageError
from vit_edge.export.explanation.stages import calibration_images, recorded
from vit_edge.export.verification.paired_run import find_evaluation_images
from vit_edge.export.verification.request import check_comparable
from vit_edge.files import is_file
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engines.protocol import chosen_engines, refuse_null

if TYPE_CHECKING:
    from vit_edge.export.tracing.network import Network

__all__ = ["ExplainOptions", "Preparation", "prepare_explanation"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainOptions:
    """What to explain with: each is optional, and leaves its stages out where it is missing.

    `checkpoint` is what the float file was exported from (`weights` for a factory, `like` for weights from elsewhere),
    `calibration` the folder that calibrated. `num_images` of the images are run; they explain and tune nothing.
    """

    checkpoint: str | None = None
    weights: str | os.PathLike[str] | None = None
    like: str | None = None
    calibration: str | os.PathLike[str] | None = None
    num_images: int = 64
    engines: tuple[str, ...] = ()
    threads: int | None = None
    unlabelled: bool = False

    def __post_init__(self) -> None:
        if self.num_images < 1:
            reason = f"the number of images is {self.num_images}"
            raise UsageError("cannot explain", reason=reason, remedy="give 1 or more")
        for engine in self.engines:
            refuse_null(engine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Everything that is needed, opened and checked before any of the work begins."""

    model: ModelFile
    reference: ModelFile
    images: tuple[Path, ...]
    network: Network | None
    calibration: tuple[Path, ...] | None
    options: ExplainOptions


def prepare_explanation(
    model: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str],
    data: str | os.PathLike[str],
    options: ExplainOptions = ExplainOptions(),
    progress: Progress = silent,
) -> Preparation:
    """Return what `explain` takes; raises every error that can be known before the work.

    DataRejected where the images in `options.calibration` are not those that calibrated `model`, by hash.
    """
    opened, source = open_model(model, warn=False), open_model(reference, warn=False)
    check_comparable(opened, source)
    for file in (opened, source):
        if file.weights is not None:
            reason = "its weights lie beside it, being over 2 GiB; layers are looked at within one file"
            raise UsageError("cannot explain", file=file.source, reason=reason, remedy="verify it without --explain")
    chosen_engines(options.engines)
    found = find_evaluation_images(data, source.manifest.labels, unlabelled=options.unlabelled).paths
    number = min(options.num_images, len(found))
    calibration = None
    if options.calibration is not None:
        recorded(opened)
        calibration = calibration_images(opened, options.calibration, progress=progress)
    return Preparation(
        model=opened,
        reference=source,
        images=tuple(found[position * len(found) // number] for position in range(number)),
        network=None if options.checkpoint is None else _network(options, source),
        calibration=calibration,
        options=options,
    )


def _network(options: ExplainOptions, reference: ModelFile) -> Network:
    """Return the network of the checkpoint; what it does not say itself is as the reference file says it."""
    from vit_edge.convert import open_source
    from vit_edge.export.tracing.factory import is_factory, make_network
    from vit_edge.export.tracing.network import from_checkpoint, from_module

    source, manifest = options.checkpoint or "", reference.manifest
    if is_file(source) and Path(source).suffix.lower() == ".onnx":
        reason, remedy = (
            "an ONNX file is no checkpoint",
            "leave --checkpoint out: the reference is the first stage then",
        )
        raise UsageError("cannot explain", file=source, reason=reason, remedy=remedy)
    if is_factory(source):
        module = make_network(source, weights=options.weights)
        network = from_module(
            module, preprocessing=manifest.preprocessing, labels=manifest.labels, name=source.partition(":")[2]
        )
    elif options.weights is not None:
        reason = "--weights is for package.module:factory; any other source has its own"
        raise UsageError("cannot explain", file=source, reason=reason, remedy="leave --weights out")
    else:
        network = from_checkpoint(open_source(source, like=options.like))
    _check_network(network, source, reference)
    return network


def _check_network(network: Network, source: str, reference: ModelFile) -> None:
    manifest = reference.manifest
    size, num_classes = network.preprocessing.crop, len(network.labels)
    if size != manifest.preprocessing.crop or num_classes != len(manifest.labels):
        reason = f"it takes {size} pixels and has {num_classes} classes; {reference.source}: "
        reason += f"{manifest.preprocessing.crop} and {len(manifest.labels)}"
        remedy = "give the checkpoint that this file was exported from"
        raise InputError("cannot explain with the checkpoint", file=source, reason=reason, remedy=remedy)
    if network.preprocessing != manifest.preprocessing:
        _log.warning("%s has another preprocessing than %s; its own normalisation is used", source, reference.source)
    for key in ("checkpoint_sha256", "weights_sha256"):
        own, theirs = network.provenance.get(key), manifest.provenance.get(key)
        if own is not None and theirs is not None and own != theirs:
            _log.warning("%s was not exported from %s, by the hash in its manifest", reference.source, source)
