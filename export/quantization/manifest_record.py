"""What a manifest says about a quantization and its verification; it holds no path of this machine."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from vit_edge.export.quantization.accuracy_budget import SearchTrace
from vit_edge.export.quantization.calibrated_graph import CalibratedGraph
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.calibration.observers import Range
from vit_edge.export.quantization.options import QuantizationOptions
from vit_edge.export.quantization.qdq.dynamic_ranges import BATCH
from vit_edge.export.verification.results import Verification
from vit_edge.files import finite
from vit_edge.machine.targets import Target
from vit_edge.model_file.artifact import ModelFile, open_model

__all__ = ["record_of", "with_evaluation"]

# Of a verification: paths of this machine, and what is too long or of no use later.
_NOT_KEPT = ("changed", "images_needed", "worst_classes")


def record_of(
    target: Target,
    found: CalibratedGraph,
    left: frozenset[str],
    images: CalibrationImages,
    options: QuantizationOptions,
) -> dict[str, Any]:
    """Return the manifest's `quantization`; nothing in it depends on this machine's folders."""
    scheme = found.scheme
    known = sorted(set(zip(images.hashes, images.fingerprints, strict=True)))
    symmetric = scheme.activation == "int8"
    ranges = {"method": options.ranges, "values": {name: _rounded(r) for name, r in found.ranges.items()}}
    return {
        "scheme": "dynamic" if found.dynamic else "static QDQ",
        "target": target.name,
        "batch": BATCH if found.dynamic else target.static_batch,
        "recipe": options.recipe,
        "effort": options.effort,
        "algorithms": list(found.applied),
        "weights": {"dtype": "int8", "bits": scheme.weight_bits, "granularity": "per-channel", "symmetric": True},
        "activations": {"dtype": scheme.activation, "granularity": "per-tensor", "symmetric": symmetric},
        "float32_ops": sorted(left),
        "openvino_rounds": {name: float(np.float32(peak)) for name, peak in found.openvino_rounds.items()},
        "ranges": {"method": "at run time"} if found.dynamic else ranges,
        "images": [digest for digest, _ in known],
        "fingerprints": [text for _, text in known],
    }


def _rounded(observed: Range) -> list[float]:
    return [float(np.float32(observed.low)), float(np.float32(observed.high))]


def with_evaluation(model: ModelFile, verification: Verification | None, trace: SearchTrace | None) -> ModelFile:
    """Return the file with its figures in the manifest, and a verdict if there was an accuracy search."""
    if verification is None:
        return model
    results = []
    for result in verification.results:
        fields = {name: value for name, value in asdict(result).items() if name not in _NOT_KEPT}
        results.append(fields if trace else {name: value for name, value in fields.items() if name != "verdict"})
    evaluation: dict[str, Any] = {"data_sha256": verification.data_sha256, "results": results}
    if trace is not None:
        evaluation |= {
            "verdict": verification.verdict,
            "max_drop_points": verification.max_drop_points,
            "min_agreement": verification.min_agreement,
            "steps": [asdict(step) for step in trace.steps],
            "cut_short": trace.cut_short,
        }
    manifest = replace(model.manifest, evaluation=finite(evaluation))
    return open_model(model.with_manifest(manifest), warn=False)
