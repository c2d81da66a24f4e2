"""Quantize a model file to INT8 with calibration pictures, and record what it was made from and how near it comes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from vit_edge.artifact import Manifest, ModelFile, open_model, pack
from vit_edge.data import EVALUATION_SPLITS, find_images, pixel_hashes, read_labelled, refuse_overlap, stream_pixels
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export.calibration import Range, observe_channels, observe_ranges
from vit_edge.export.placement import find_products, insert_qdq
from vit_edge.export.algorithms.reparameterisation import find_norms, reparameterise
from vit_edge.export.verification import Verification, verify_models
from vit_edge.files import may_write, write_atomic
from vit_edge.image import Pixels, Preprocessing, pixel_hash
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engine import Array, EngineOptions, installed_engines, make_engine
from vit_edge.runtime.golden import Tolerance, expectation, golden_images, made_here
from vit_edge.runtime.loading import load_model

__all__ = ["TARGETS", "QuantizationResult", "Target", "quantize"]

Target = Literal["portable", "x86-vnni"]
# Bits of the weights. On x86 without VNNI, 8-bit weights saturate (6 of 64 answers changed on Haswell); 7 bits answer
# the same everywhere, cost no time and about 1 dB.
TARGETS: dict[Target, int] = {"portable": 7, "x86-vnni": 8}

# Float sums in another order move values across rounding steps: two sets of kernels on one CPU, both right, differ by
# 22.8 to 27.2 dB (DeiT-tiny, 200 photographs; ONNX Runtime against OpenVINO, OpenVINO's dynamic against static shapes).
# Answers changed only where the two largest logits were less than 0.5 apart.
_GOLDEN_TOLERANCE = Tolerance(sqnr_db=20.0, top1_gap=0.5)
_FEW_IMAGES = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationResult:
    """The file written, what calibrated it, and what verification found where labelled pictures were given."""

    model: Path
    sha256: str
    size_bytes: int
    size_ratio: float
    num_calibration_images: int
    num_products: int
    verification: Verification | None


def quantize(
    model: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    target: Target = "portable",
    force: bool = False,
    progress: Progress = silent,
) -> QuantizationResult:
    """Write the INT8 model file `out` from the float32 file `model` and the pictures in `calibration`.

    With labelled pictures `data` the result is verified on them and the figures are kept in the file; calibration
    pictures that are also in `data` are refused. Raises DataRejected, ModelRejected, NotTrusted, UsageError.
    """
    if target not in TARGETS:
        raise UsageError(
            "cannot quantize", reason=f"no target is named {target!r}", remedy=f"choose {' or '.join(TARGETS)}"
        )
    source = open_model(model)
    if source.manifest.precision != "float32":
        reason = f"its precision is {source.manifest.precision}; quantization starts from float32"
        raise UsageError(
            "cannot quantize", file=model, reason=reason, remedy="give the file that `vit-edge export` wrote"
        )
    if source.weights is not None:
        reason = "its weights lie beside it, being over 2 GiB; quantization works within one file"
        raise UsageError("cannot quantize", file=model, reason=reason, remedy="take a smaller network")
    # Loaded as a user's application would: hostile or damaged graphs end here, not in fresh golden vectors.
    load_model(source, options=EngineOptions()).close()
    paths = find_images(calibration)
    written = may_write(out, force=force, made_from=model)
    judging = _judging_hashes(source, data)

    graph = onnx.load_model_from_string(source.data)
    del graph.metadata_props[:]
    preprocessing = source.manifest.preprocessing
    hashes: list[str] = []
    pictures = _noted(_pictures("aligning norms", paths, preprocessing, progress), hashes, judging)
    graph = reparameterise(graph, observe_channels(graph, find_norms(graph), _fed(pictures, source.manifest)))
    _check_calibration(hashes, calibration)
    products = find_products(graph)
    tensors = list(dict.fromkeys(p.input for p in products if not p.takes_pixels))
    pictures = _pictures("calibrating", paths, preprocessing, progress)
    ranges = observe_ranges(graph, tensors, _fed(pictures, source.manifest))

    quantized = insert_qdq(graph, ranges, weight_bits=TARGETS[target])
    manifest = replace(
        source.manifest,
        precision="int8",
        evaluation=None,
        golden=None,
        quantization=_record(target, ranges, hashes),
        provenance={**source.manifest.provenance, "float_model_sha256": source.sha256, "onnx": onnx.__version__},
    )
    finished = _with_golden(
        open_model(pack(quantized.SerializeToString(deterministic=True), manifest), warn=False), source
    )
    verification = None
    if data is not None:
        verification = verify_models(finished, reference=source, data=data, progress=progress)
        evaluated = replace(finished.manifest, evaluation=_evaluation(verification))
        finished = open_model(finished.with_manifest(evaluated), warn=False)
    write_atomic(written, finished.data)
    return QuantizationResult(
        model=written,
        sha256=finished.sha256,
        size_bytes=len(finished.data),
        size_ratio=len(finished.data) / len(source.data),
        num_calibration_images=len(hashes),
        num_products=len(products),
        verification=verification,
    )


def _judging_hashes(source: ModelFile, data: str | os.PathLike[str] | None) -> dict[str, Path]:
    if data is None:
        return {}
    images = read_labelled(data, splits=EVALUATION_SPLITS, class_names=source.manifest.labels)
    return pixel_hashes(images.paths, source.manifest.preprocessing)


def _pictures(stage: str, paths: Sequence[Path], preprocessing: Preprocessing, progress: Progress) -> Iterator[Pixels]:
    """Yield the pixels of one calibration picture after another."""
    for position, pixels in stream_pixels(paths, preprocessing):
        progress(stage, position, len(paths))
        yield pixels
    progress(stage, len(paths), len(paths))


def _fed(pictures: Iterable[Pixels], manifest: Manifest) -> Iterator[Array]:
    """Yield what the graph takes for each picture: its pixels, or those normalised."""
    for pixels in pictures:
        yield manifest.network_input(pixels[None])[0]


def _noted(pictures: Iterable[Pixels], hashes: list[str], judging: dict[str, Path]) -> Iterator[Pixels]:
    """Yield each picture after noting its hash; one that also judges is refused."""
    for pixels in pictures:
        hashes.append(pixel_hash(pixels))
        refuse_overlap(hashes[-1:], judging)
        yield pixels


def _check_calibration(hashes: Sequence[str], folder: str | os.PathLike[str]) -> None:
    if len(hashes) > 1 and len(set(hashes)) == 1:
        reason = f"all {len(hashes)} pictures are the same"
        raise DataRejected("cannot calibrate", file=folder, reason=reason, remedy="give pictures like those in use")
    if len(hashes) < _FEW_IMAGES:
        _log.warning("few calibration pictures (%d): ranges from fewer than %d vary", len(hashes), _FEW_IMAGES)


def _evaluation(verification: Verification) -> dict[str, Any]:
    """Return what the manifest keeps of a verification: figures, no path of this machine, no verdict on a budget."""
    dropped = ("changed", "verdict", "images_needed")
    results = [{key: value for key, value in asdict(r).items() if key not in dropped} for r in verification.results]
    return {"data_sha256": verification.data_sha256, "results": results}


def _record(target: Target, ranges: Any, hashes: Sequence[str]) -> dict[str, Any]:
    return {
        "scheme": "static QDQ at the inputs of constant-weight products",
        "target": target,
        "weights": {"dtype": "int8", "bits": TARGETS[target], "granularity": "per-channel", "symmetric": True},
        "activations": {"dtype": "uint8", "granularity": "per-tensor", "symmetric": False},
        "algorithms": ["LayerNorm re-parameterisation"],
        "ranges": {"method": "averaged min-max", "values": {name: _rounded(r) for name, r in ranges.items()}},
        "images": sorted(hashes),
    }


def _rounded(observed: Range) -> list[float]:
    return [float(np.float32(observed.low)), float(np.float32(observed.high))]


def _with_golden(model: ModelFile, source: ModelFile) -> ModelFile:
    """Return the file with what each installed engine answers for the float file's golden inputs, checked by a load."""
    golden = source.manifest.golden or {}
    height, width = source.manifest.preprocessing.crop
    images_NHWC = golden_images(golden.get("seeds", ()), height=height, width=width)
    expected = []
    for name in installed_engines():
        engine = make_engine(name, model, EngineOptions())
        entry = expectation(engine.run(images_NHWC), engines=[name], tolerance=_GOLDEN_TOLERANCE)
        expected.append({**entry, "made_on": made_here(engine)})
        engine.close()
    manifest = replace(model.manifest, golden={**golden, "expected": expected})
    finished = open_model(model.with_manifest(manifest), warn=False)
    for name in installed_engines():
        load_model(finished, engine=name, options=EngineOptions()).close()
    return finished
