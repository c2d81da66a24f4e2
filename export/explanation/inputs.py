"""What an explanation needs, opened and checked before the work starts: files, images, the source network."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vit_edge.errors import InputError, UsageError
from vit_edge.export.explanation.stages import calibration_images, recorded
from vit_edge.export.verification.paired_run import find_evaluation_images
from vit_edge.export.verification.request import Model, check_comparable, opened
from vit_edge.files import is_file
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engines.protocol import chosen_engines, refuse_null
from vit_edge.runtime.loading import admit

if TYPE_CHECKING:
    from vit_edge.export.tracing.network import Network

__all__ = ["ExplanationOptions", "Preparation", "prepare_explanation"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplanationOptions:
    """What to explain with; stages without their inputs are left out.

    `checkpoint` is the source of the float32 file (with `weights` for a factory, `like` for third-party weights),
    `calibration` the folder of the calibration images. `num_images` of the images are run, evenly spaced.
    """

    checkpoint: str | None = None
    weights: str | os.PathLike[str] | None = None
    like: str | None = None
    calibration: str | os.PathLike[str] | None = None
    num_images: int = 64
    engines: tuple[str, ...] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            reason = f"the number of images is {self.num_images}"
            raise UsageError("cannot explain", reason=reason, remedy="give 1 or more")
        for engine in self.engines:
            refuse_null(engine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Everything that an explanation needs, opened and checked."""

    model: ModelFile
    reference: ModelFile
    images: tuple[Path, ...]
    network: Network | None
    calibration: tuple[Path, ...] | None
    options: ExplanationOptions


def prepare_explanation(
    model: Model,
    *,
    reference: Model,
    data: str | os.PathLike[str],
    options: ExplanationOptions,
    progress: Progress = silent,
) -> Preparation:
    """Return the inputs of `explain`, checked; raises every error that can be known before the work.

    DataRejected if the images in `options.calibration` are not the calibration images of `model`, by hash.
    """
    candidate, source = opened(model), opened(reference)
    check_comparable(candidate, source)
    for file in (candidate, source):
        if file.weights is not None:
            reason = "the weights are in a second file, being over 2 GiB; layers are compared within one file"
            raise UsageError("cannot explain", file=file.source, reason=reason, remedy="`vit-edge verify` alone")
    if options.checkpoint is not None and source.manifest.is_encoder:
        reason = "the file is an encoder; its float32 file is the first stage"
        raise UsageError("cannot explain", file=source.source, reason=reason, remedy="leave out --checkpoint")
    engines = [*dict.fromkeys(("onnxruntime", *chosen_engines(options.engines)))]
    for file in (candidate, source):
        admit(file, engines=engines, golden=False)  # a damaged file is what it explains
    found = find_evaluation_images(data, source.manifest.labels, unlabelled=True).paths
    number = min(options.num_images, len(found))
    calibration = None
    if options.calibration is not None:
        recorded(candidate)
        calibration = calibration_images(candidate, options.calibration, progress=progress)
    return Preparation(
        model=candidate,
        reference=source,
        images=tuple(found[position * len(found) // number] for position in range(number)),
        network=None if options.checkpoint is None else _network(options, source),
        calibration=calibration,
        options=options,
    )


def _network(options: ExplanationOptions, reference: ModelFile) -> Network:
    """Return the network of the checkpoint; settings that it does not specify come from the reference file."""
    from vit_edge.convert import open_source
    from vit_edge.export.sources.factory import is_factory, make_network
    from vit_edge.export.tracing.network import from_checkpoint, from_module

    source, manifest = options.checkpoint or "", reference.manifest
    if is_file(source) and Path(source).suffix.lower() == ".onnx":
        reason, remedy = (
            "an ONNX file is not a checkpoint",
            "leave out --checkpoint; the reference is the first stage then",
        )
        raise UsageError("cannot explain", file=source, reason=reason, remedy=remedy)
    if is_factory(source):
        module = make_network(source, weights=options.weights)
        network = from_module(
            module, preprocessing=manifest.preprocessing, labels=manifest.labels, name=source.partition(":")[2]
        )
    elif options.weights is not None:
        reason = "--weights is for package.module:factory; any other source holds its weights"
        raise UsageError("cannot explain", file=source, reason=reason, remedy="leave out --weights")
    else:
        network = from_checkpoint(open_source(source, like=options.like))
    _check_network(network, source, reference)
    return network


def _check_network(network: Network, source: str, reference: ModelFile) -> None:
    manifest = reference.manifest
    size, num_classes = network.preprocessing.crop, len(network.labels)
    if size != manifest.preprocessing.crop or num_classes != len(manifest.labels):
        reason = f"the network has {size} pixels and {num_classes} classes; {reference.source} has "
        reason += f"{manifest.preprocessing.crop} and {len(manifest.labels)}"
        remedy = "give the checkpoint that the reference was exported from"
        raise InputError("cannot explain with the checkpoint", file=source, reason=reason, remedy=remedy)
    if network.preprocessing != manifest.preprocessing:
        _log.warning(
            "the preprocessing of %s differs from that of %s; the checkpoint keeps its normalization",
            source,
            reference.source,
        )
    for key in ("checkpoint_sha256", "weights_sha256"):
        own, theirs = network.provenance.get(key), manifest.provenance.get(key)
        if own is not None and theirs is not None and own != theirs:
            _log.warning("%s was not exported from %s, according to the hash in its manifest", reference.source, source)
