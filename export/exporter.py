"""Export a checkpoint to a model file: deploy form, traced, proven against PyTorch, then written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

import vit_edge
from vit_edge.artifact import PRODUCER, Manifest, ModelFile, open_model, pack
from vit_edge.checkpoint import Checkpoint, load_checkpoint
from vit_edge.errors import MissingExtra
from vit_edge.export.deploy import DeployedViT
from vit_edge.export.golden import choose_seeds, golden_header
from vit_edge.export.parity import FLOAT32_TOLERANCE, Parity, check_parity, reference_logits
from vit_edge.export.tracing import trace
from vit_edge.files import may_write, write_atomic
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engine import EngineOptions, installed_engines
from vit_edge.runtime.golden import expectation, golden_images
from vit_edge.runtime.loading import load_model

__all__ = ["ExportResult", "export_onnx"]

_ENGINES = ("onnxruntime", "openvino")
_STAGES = ("tracing", "golden vectors", "parity", "writing")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """The file written, and how near each engine comes to PyTorch."""

    model: Path
    sha256: str
    size_bytes: int
    parity: tuple[Parity, ...]


def export_onnx(
    source: str | os.PathLike[str], *, out: str | os.PathLike[str], force: bool = False, progress: Progress = silent
) -> ExportResult:
    """Write the model file `out` from the checkpoint `source`; nothing appears under its name before it is proven.

    Raises CheckpointRejected, UsageError where `out` exists (unless `force`), VerificationFailed where ONNX Runtime or
    OpenVINO gives other logits than PyTorch, MissingExtra where either is not installed.
    """
    _require_engines()
    checkpoint = load_checkpoint(source)
    target = may_write(out, force=force, made_from=source)
    height, width = checkpoint.model.config.image_size
    reference = reference_logits(checkpoint.model, checkpoint.preprocessing)

    progress("tracing", 0, len(_STAGES))
    with torch.no_grad():
        graph = trace(DeployedViT(checkpoint.model, checkpoint.preprocessing), height=height, width=width)
    graph.producer_name, graph.producer_version = PRODUCER, vit_edge.__version__

    progress("golden vectors", 1, len(_STAGES))
    seeds = choose_seeds(reference, FLOAT32_TOLERANCE, height=height, width=width)
    images_NHWC = golden_images(seeds, height=height, width=width)

    progress("parity", 2, len(_STAGES))
    manifest = _manifest(checkpoint)
    model = open_model(pack(graph.SerializeToString(deterministic=True), manifest))
    parity = check_parity(model, reference, images_NHWC=images_NHWC, engines=_ENGINES)

    progress("writing", 3, len(_STAGES))
    golden = golden_header(seeds, checkpoint.preprocessing)
    expected = expectation(reference(images_NHWC), engines=_ENGINES, tolerance=FLOAT32_TOLERANCE)
    data = model.with_manifest(replace(manifest, golden={**golden, "expected": [expected]}))
    finished = _checked(data)
    write_atomic(target, data)
    progress("writing", 4, len(_STAGES))
    return ExportResult(model=target, sha256=finished.sha256, size_bytes=len(data), parity=tuple(parity))


def _manifest(checkpoint: Checkpoint) -> Manifest:
    architecture: Mapping[str, Any] = {"family": "vit", **checkpoint.model.config.to_dict()}
    return Manifest(
        name=checkpoint.name,
        architecture=architecture,
        preprocessing=checkpoint.preprocessing,
        labels=checkpoint.labels,
        precision="float32",
        license=checkpoint.license,
        base_model=checkpoint.base_model,
        evaluation=checkpoint.evaluation,
        assumed=checkpoint.assumed,
        provenance={
            "checkpoint_sha256": checkpoint.sha256,
            "vit_edge": vit_edge.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
    )


def _checked(data: bytes) -> ModelFile:
    """Return the finished file opened again, its golden vectors run in every engine as a user's load would."""
    model = open_model(data)
    for engine in _ENGINES:
        load_model(model, engine=engine, options=EngineOptions()).close()
    return model


def _require_engines() -> None:
    missing = [engine for engine in _ENGINES if engine not in installed_engines()]
    if missing:
        reason = f"parity is proven in ONNX Runtime and OpenVINO; not installed: {', '.join(missing)}"
        raise MissingExtra("cannot export", reason=reason, remedy='pip install "vit-edge[export,onnxruntime]"')
