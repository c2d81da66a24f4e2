"""The float16 file of a float32 file: half the bytes, proven equal to 50 dB before it is written."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import onnx

from vit_edge.export.graph.float16 import STORAGE_NOT_SPEED, to_float16
from vit_edge.export.parity.golden_vectors import golden_inputs, promised_engines
from vit_edge.export.parity.isolated_run import load_elsewhere
from vit_edge.export.parity.parity import check_parity
from vit_edge.export.tracing.external_data import move_weights_in
from vit_edge.model_file.artifact import Manifest, ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.golden import Tolerance, expectation
from vit_edge.runtime.engines.protocol import EngineOptions, Logits, make_engine

__all__ = ["to_float16_file"]

_STAGES = 3
# At 50 dB the noise is 0.3 % of the logits' size; a gap that it closes by chance has to be far smaller than 2 %.
_SQNR_DB, _GAP = 50.0, 0.02
_log = logging.getLogger(__name__)


def to_float16_file(source: ModelFile, *, progress: Progress = silent) -> ModelFile:
    """Return the float16 file of a float32 model file, with its golden inputs and the logits for them.

    Raises VerificationFailed if a weight is too large for float16, or an engine of the float32 file is less accurate
    than 50 dB.
    """
    _log.warning(STORAGE_NOT_SPEED)
    progress("float16", 0, _STAGES)
    model, engines = _converted(source), promised_engines(source)

    progress("float16", 1, _STAGES)
    images_NHWC = golden_inputs(source)
    reference = make_engine(engines[0], source, EngineOptions())
    expected_BK = reference.run(images_NHWC)
    tolerance = _tolerance(expected_BK, source.manifest)
    check_parity(
        model,
        lambda images: {source.manifest.output: reference.run(images)},
        images_NHWC=images_NHWC,
        engines=engines,
        tolerance=tolerance,
    )
    reference.close()

    progress("float16", 2, _STAGES)
    entry = expectation(expected_BK, engines=engines, tolerance=tolerance, output=source.manifest.output)
    golden = {**(source.manifest.golden or {}), "expected": [entry]}
    finished = open_model(model.with_manifest(replace(model.manifest, golden=golden)), warn=False)
    for engine in engines:
        load_elsewhere(finished, engine=engine)
    progress("float16", 3, _STAGES)
    return finished


def _converted(source: ModelFile) -> ModelFile:
    graph = source.graph()
    del graph.graph.value_info[:]
    move_weights_in(graph.graph, source.weights)
    to_float16(graph.graph)
    macs = source.manifest.macs
    manifest = replace(
        source.manifest,
        precision="float16",
        macs=macs and {"float16": sum(macs.values())},
        evaluation=None,
        golden=None,
        weights=None,
        provenance={**source.manifest.provenance, "float_model_sha256": source.sha256, "onnx": onnx.__version__},
    )
    return ModelFile.from_graph(graph, manifest)


def _tolerance(logits_BK: Logits, manifest: Manifest) -> Tolerance:
    """Return the tolerance of a float16 file: 50 dB, and equal classes if the gap is over 2 % of the largest logit."""
    if manifest.is_encoder:
        return Tolerance(sqnr_db=_SQNR_DB)
    return Tolerance(sqnr_db=_SQNR_DB, top1_gap=_GAP * float(np.abs(logits_BK).max()))
