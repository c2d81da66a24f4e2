"""A quantized file made again, one algorithm after another, from its float32 file and its manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vit_edge.data import find_images, stream_pixels
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export.quantization.algorithms.recipes import ALGORITHMS, EARLIER_NAMES, EFFORTS
from vit_edge.export.quantization.calibrated_graph import CalibratedGraph, Plan, calibrate
from vit_edge.export.quantization.calibration.cache import CalibrationCache
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.calibration.observers import EARLIER_METHODS, METHODS
from vit_edge.export.quantization.qdq.placement import Scheme
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.image import pixel_hash
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent

__all__ = ["Recorded", "RemadeStage", "calibration_images", "recorded", "remade_stages"]

_SCHEME = "static QDQ"
# What each algorithm changes.
_NOTES = {
    "repq": "one range for all channels of a normalized tensor; exact in float32",
    "cross-layer-equalization": "similar ranges for the channels that a projection reads; exact in float32",
    "range-search": "ranges that minimize the error at the output of each block",
    "gptq-rounding": "weights rounded jointly, so that their errors cancel",
    "bias-correction": "the mean error of each output goes into its bias",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """How a file was quantized according to its manifest: the whole plan, and the ops that stayed in float32."""

    plan: Plan
    float32_ops: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemadeStage:
    """One stage: its name, what changed, and its network, quantized except for the ops `left`."""

    name: str
    note: str
    calibrated: CalibratedGraph
    left: frozenset[str]

    def model(self, candidate: ModelFile) -> ModelFile:
        """Return the network as a model file with the inputs and outputs of `candidate`."""
        graph = self.calibrated.quantized(self.left)
        if candidate.manifest.batch is not None:
            fix_batch(graph.graph, candidate.manifest.batch)
        manifest = replace(candidate.manifest, golden=None, evaluation=None)
        return ModelFile.from_graph(graph, manifest)


def recorded(model: ModelFile) -> Recorded:
    """Return how `model` was quantized; raises UsageError if the manifest does not say how."""
    says: Mapping[str, Any] = model.manifest.quantization or {}
    try:
        scheme, method = says["scheme"], says["ranges"]["method"]
        method = EARLIER_METHODS.get(method, method)
        algorithms = [EARLIER_NAMES.get(name, name) for name in says["algorithms"]]
        left = frozenset(says["float32_ops"])
        if scheme != _SCHEME or method not in METHODS or not set(algorithms) <= set(ALGORITHMS):
            raise ValueError(f"{scheme!r}, ranges by {method!r}, {algorithms!r}")
        if not all(isinstance(name, str) for name in left):
            raise TypeError("float32_ops")
        plan = Plan(
            algorithms=tuple(name for name in ALGORITHMS if name in algorithms),
            effort=EFFORTS[says["effort"]],
            scheme=Scheme(weight_bits=says["weights"]["bits"], activation=says["activations"]["dtype"]),
            method=method,
        )
    except (KeyError, TypeError, UsageError, ValueError) as error:
        reason = f"the manifest does not say how the file was quantized ({error or type(error).__name__})"
        remedy = "leave out --calibration, or quantize again with this version"
        raise UsageError(
            "cannot repeat the quantization of", file=model.source, reason=reason, remedy=remedy
        ) from error
    return Recorded(plan=plan, float32_ops=left)


def calibration_images(
    model: ModelFile, folder: str | os.PathLike[str], *, progress: Progress = silent
) -> tuple[Path, ...]:
    """Return the images in `folder`; raises DataRejected unless they are the calibration images of `model`, by hash."""
    paths = find_images(folder)
    found = set[str]()
    for position, pixels in stream_pixels(paths, model.manifest.preprocessing):
        progress("reading calibration images", position, len(paths))
        found.add(pixel_hash(pixels))
    progress("reading calibration images", len(paths), len(paths))
    expected = set((model.manifest.quantization or {}).get("images", ()))
    if found != expected:
        reason = f"{len(expected - found)} of the {len(expected)} calibration images of {model.source} are missing"
        if found - expected:
            reason += f", and the folder holds {len(found - expected)} others"
        remedy = "give the folder that `vit-edge quantize --calibration` used"
        raise DataRejected("cannot repeat the quantization with", file=folder, reason=reason, remedy=remedy)
    return paths


def remade_stages(
    model: ModelFile, reference: ModelFile, paths: Sequence[Path], *, progress: Progress = silent
) -> Iterator[RemadeStage]:
    """Yield the file's quantization stage by stage: first ranges and nearest weights alone, then each algorithm on top.

    Products that stayed float do so in the last stage; the others are as `calibrate` makes them of these images.
    """
    record, found = recorded(model), None
    steps = tuple(name for name in record.plan.algorithms if name in _NOTES)
    graph = reference.graph()
    cache = CalibrationCache(preprocessing=reference.manifest.preprocessing)
    for number in range(len(steps) + 1):
        name = f"+ {steps[number - 1]}" if number else "INT8, plain"

        def report(stage: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {stage}", done, total)

        images = CalibrationImages(paths, reference.manifest, progress=report)
        plan = replace(record.plan, algorithms=steps[:number])
        found = calibrate(graph, images, plan, cache=cache, progress=report)
        note = _NOTES[steps[number - 1]] if number else _plain_note(record.plan, len(found.ops))
        yield RemadeStage(name=name, note=note, calibrated=found, left=frozenset())
    if record.float32_ops and found is not None:
        left, by = record.float32_ops, "mixed-precision" in record.plan.algorithms
        name = "+ mixed-precision" if by else "+ float32 ops"
        note = f"{len(left)} of {len(found.ops)} ops stay in float32"
        yield RemadeStage(name=name, note=note, calibrated=found, left=left)


def _plain_note(plan: Plan, num_ops: int) -> str:
    bits, kind = plan.scheme.weight_bits, plan.scheme.activation
    return f"{num_ops} ops: {bits}-bit weights, rounded to nearest; {kind} inputs, ranges by {plan.method}"
