"""The float16 file of a float32 one: half the bytes, and the same answers to 50 dB, proven before it is there."""

from __future__ import annotations

import logging
from dataclasses import replace

import onnx

from vit_edge.export.graph.float16 import STORAGE_NOT_SPEED, to_half
from vit_edge.export.parity.isolated_run import load_elsewhere
from vit_edge.export.parity.parity import check_parity, half_tolerance
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.golden import expectation, golden_images
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines, make_engine

__all__ = ["halved"]

_STAGES = 3
_log = logging.getLogger(__name__)


def halved(source: ModelFile, *, progress: Progress = silent) -> ModelFile:
    """Return the float16 file of a float32 model file, with the golden inputs of that and what it answers to them.

    Raises VerificationFailed where a weight is too large for float16, or an engine that the float32 file is promised
    for comes no nearer to it than 50 dB.
    """
    _log.warning(STORAGE_NOT_SPEED)
    progress("float16", 0, _STAGES)
    graph = source.graph()
    del graph.graph.value_info[:]
    to_half(graph.graph)
    manifest = replace(
        source.manifest,
        precision="float16",
        evaluation=None,
        golden=None,
        provenance={**source.manifest.provenance, "float_model_sha256": source.sha256, "onnx": onnx.__version__},
    )
    model = ModelFile.from_graph(graph, manifest)
    golden = source.manifest.golden or {}
    promised = {name for entry in golden.get("expected", ()) for name in entry["engines"]}
    engines = [name for name in installed_engines() if name in promised]

    progress("float16", 1, _STAGES)
    height, width = source.manifest.preprocessing.crop
    images_NHWC = golden_images(golden.get("seeds", ()), height=height, width=width)
    reference = make_engine(engines[0], source, EngineOptions())
    expected_BK = reference.run(images_NHWC)
    tolerance = half_tolerance(expected_BK)
    check_parity(
        model,
        lambda images: {"logits": reference.run(images)},
        images_NHWC=images_NHWC,
        engines=engines,
        tolerance=tolerance,
    )
    reference.close()
    progress("float16", 2, _STAGES)
    entry = expectation(expected_BK, engines=engines, tolerance=tolerance)
    finished = open_model(model.with_manifest(replace(manifest, golden={**golden, "expected": [entry]})), warn=False)
    for engine in engines:
        load_elsewhere(finished, engine=engine)
    progress("float16", 3, _STAGES)
    return finished
