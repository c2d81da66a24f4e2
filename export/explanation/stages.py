"""A quantized file made again, one algorithm after another, from its float file and what its manifest says of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vit_edge.data import find_images, stream_pixels
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export.quantization.algorithms.recipes import ALGORITHMS, EFFORTS
from vit_edge.export.quantization.calibrated_graph import CalibratedGraph, Plan, calibrate
from vit_edge.export.quantization.calibration.cache import CalibrationCache
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.calibration.observers import METHODS
from vit_edge.export.quantization.qdq.placement import Scheme
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.image import pixel_hash
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent

__all__ = ["Recorded", "RemadeStage", "calibration_images", "recorded", "remade_stages"]

_SCHEME = "static QDQ"
# What changes the network itself, in any engine, and how.
_NOTES = {
    "repq": "the channels of a normalised tensor get one range; exact in float",
    "value-scaling": "the channels that a projection reads get nearer ranges; exact in float",
    "range-search": "ranges searched against the output of each block",
    "rounding": "weights rounded together, so that their errors make up for each other",
    "bias-correction": "what outputs lack on average goes into the biases",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a manifest says of how its file was quantized: the whole plan, and the products that stayed float."""

    plan: Plan
    float32_ops: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemadeStage:
    """One stage: its name, what changed in it, and its network; `graph` is quantized but for the products `left`."""

    name: str
    note: str
    calibrated: CalibratedGraph
    left: frozenset[str]

    def model(self, candidate: ModelFile) -> ModelFile:
        """Return the network as a model file that takes and gives what `candidate` does."""
        graph = self.calibrated.quantized(self.left)
        if candidate.manifest.batch is not None:
            fix_batch(graph.graph, candidate.manifest.batch)
        manifest = replace(candidate.manifest, golden=None, evaluation=None)
        return ModelFile.from_graph(graph, manifest)


def recorded(model: ModelFile) -> Recorded:
    """Return how `model` was quantized; raises UsageError where its manifest does not say it."""
    says: Mapping[str, Any] = model.manifest.quantization or {}
    try:
        scheme, algorithms, method = says["scheme"], says["algorithms"], says["ranges"]["method"]
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
        reason = f"its manifest does not say how it was quantized ({error or type(error).__name__})"
        remedy = "leave --calibration out, or give a file that `vit-edge quantize` of this version wrote"
        raise UsageError("cannot make its stages again", file=model.source, reason=reason, remedy=remedy) from error
    return Recorded(plan=plan, float32_ops=left)


def calibration_images(
    model: ModelFile, folder: str | os.PathLike[str], *, progress: Progress = silent
) -> tuple[Path, ...]:
    """Return the images in `folder`; raises DataRejected unless they are those that calibrated `model`, by hash."""
    paths = find_images(folder)
    found = set[str]()
    for position, pixels in stream_pixels(paths, model.manifest.preprocessing):
        progress("reading calibration images", position, len(paths))
        found.add(pixel_hash(pixels))
    progress("reading calibration images", len(paths), len(paths))
    asked = set((model.manifest.quantization or {}).get("images", ()))
    if found != asked:
        reason = f"{len(asked - found)} of the {len(asked)} images that calibrated {model.source} are not there"
        if found - asked:
            reason += f", and {len(found - asked)} others are"
        remedy = "give the folder that `vit-edge quantize --calibration` was given"
        raise DataRejected("cannot make its stages again", file=folder, reason=reason, remedy=remedy)
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
        name = "+ mixed-precision" if by else "+ float products"
        note = f"{len(left)} of {len(found.ops)} products stay float"
        yield RemadeStage(name=name, note=note, calibrated=found, left=left)


def _plain_note(plan: Plan, num_ops: int) -> str:
    bits, kind = plan.scheme.weight_bits, plan.scheme.activation
    return f"{num_ops} products: {bits}-bit weights to the nearest, {kind} inputs, ranges by {plan.method}"
