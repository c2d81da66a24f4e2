"""Export a network to a model file: fused inference graph, traced, proven against PyTorch, then written."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

import vit_edge
from vit_edge.checkpoint import Checkpoint
from vit_edge.data import find_images, stream_pixels
from vit_edge.errors import MissingExtra, UsageError
from vit_edge.export.graph.macs import macs_per_image
from vit_edge.export.parity.divergence import describe_first_apart
from vit_edge.export.parity.golden_vectors import choose_seeds, golden_header
from vit_edge.export.parity.isolated_run import load_elsewhere
from vit_edge.export.parity.parity import PARITY_COLUMNS, Parity, Reference, check_parity, float32_tolerance, nearest
from vit_edge.export.sources.opener import open_network
from vit_edge.export.sources.torch_network import TorchNetwork
from vit_edge.export.tracing.external_data import move_weights_out
from vit_edge.export.tracing.formats import may_write_format
from vit_edge.export.tracing.hf_folder import folder_of, require_expressible
from vit_edge.export.tracing.network import (
    EXTRAS,
    Network,
    exact_logits,
    from_checkpoint,
    from_module,
    from_torch_network,
    reference_extras,
    reference_logits,
    reference_model,
    traced_form,
)
from vit_edge.export.tracing.openvino_ir import convert_to_ir
from vit_edge.export.tracing.options import ExportOptions
from vit_edge.export.tracing.outputs import finish
from vit_edge.export.tracing.tracer import trace
from vit_edge.files import is_file, sha256_hex, write_folder
from vit_edge.image import Pixels, Preprocessing
from vit_edge.machine.releases import highest_versions
from vit_edge.model_file.artifact import PIXELS_INPUT, Manifest, ModelFile, open_model, pack
from vit_edge.model_file.tasks import Activation
from vit_edge.model_file.weights import weights_entry
from vit_edge.model_file.writing import write_ir, write_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.golden import Tolerance, expectation, golden_images
from vit_edge.runtime.checks.operators import check_graph
from vit_edge.runtime.engines.protocol import Logits, installed_engines
from vit_edge.runtime.notebook import html_table
from vit_edge.runtime.onnx_import.head import add_zero_logit, drop_activation
from vit_edge.vit import VisionTransformer

__all__ = ["ExportResult", "export_onnx"]

_ENGINES = ("onnxruntime", "openvino")
_STAGES = ("tracing", "golden vectors", "parity", "writing")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ExportResult:
    """The file written, and how near each engine comes to PyTorch."""

    model: Path
    sha256: str
    size_bytes: int
    parity: tuple[Parity, ...]

    def __repr__(self) -> str:
        return f"<ExportResult {self.model}: {self.size_bytes / 1e6:.2f} MB, {nearest(self.parity)}>"

    def _repr_html_(self) -> str:
        return html_table(f"{self.model}, compared with PyTorch", PARITY_COLUMNS, [one.row() for one in self.parity])


def export_onnx(
    source: str | os.PathLike[str] | Checkpoint | TorchNetwork | nn.Module,
    *,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    activation: Activation | None = None,
    name: str | None = None,
    assumed: Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Write the model file `out`, proven before it appears, from any source or torch image classifier.

        >>> export_onnx("run/best.safetensors", out="vit.onnx")
        <ExportResult vit.onnx: ... MB, onnxruntime ... dB, openvino ... dB>

    `source` is what `vit_edge.export.sources.opener.open_network` opens, or what it returns.
    `labels` take the place of those in a checkpoint; a module has no labels, preprocessing or name of its own, and
    `assumed` names what of these was not known. Parity also runs on the images in `data`. Raises CheckpointRejected,
    UsageError (also where `out` exists, unless `force`), VerificationFailed where ONNX Runtime or OpenVINO gives other
    logits than PyTorch, MissingExtra where either is not installed.
    """
    _require_engines()
    options = options or ExportOptions()
    real_images = [] if data is None else find_images(data)
    made_from = source if is_file(source) else None
    target = may_write_format(out, options, force=force, made_from=made_from)  # type: ignore[arg-type]
    if isinstance(source, nn.Module):
        network = from_module(
            source, preprocessing=preprocessing, labels=labels, activation=activation, name=name, assumed=assumed
        )
    else:
        if preprocessing is not None or activation is not None or name is not None or assumed:
            reason = "preprocessing, activation, name and assumed are for a module; any other source has them"
            raise UsageError("cannot export", reason=reason, remedy="give them to `open_network`")
        opened = source if isinstance(source, Checkpoint | TorchNetwork) else open_network(source)
        network = from_checkpoint(opened) if isinstance(opened, Checkpoint) else from_torch_network(opened)
        network = network.with_labels(labels)
    return _export(network, target, options, real_images, progress)


def _export(
    network: Network, target: Path, options: ExportOptions, real_images: Sequence[Path], progress: Progress
) -> ExportResult:
    if options.format == "huggingface":
        require_expressible(network.architecture, network.preprocessing)
    if options.is_encoder and network.ends_in_activation:
        reason = f"the network ends in {network.final_activation}: its output is no embedding"
        raise UsageError("cannot export", file=network.name, reason=reason, remedy="return the features from forward()")
    progress("tracing", 0, len(_STAGES))
    traced = _traced(network, options, target)

    manifest, weights, macs = (
        replace(_manifest(network, options, traced.width), weights=traced.entry),
        traced.weights,
        traced.macs,
    )
    manifest = replace(manifest, macs=None if macs is None else {"float32": macs})
    model = open_model(pack(traced.graph, manifest), weights=weights, warn=False)
    del traced  # it and the model hold all weights each
    check_graph(model)

    progress("golden vectors", 1, len(_STAGES))
    golden = _golden(network, options, macs)

    progress("parity", 2, len(_STAGES))
    parity = check_parity(
        model,
        _reference(network, options),
        images_NHWC=golden.images_NHWC,
        engines=_ENGINES,
        real_images=(pixels for _, pixels in stream_pixels(real_images, network.preprocessing)) if real_images else (),
        tolerance=golden.tolerance,
        first_apart=partial(_explain, network, options),
    )

    progress("writing", 3, len(_STAGES))
    manifest = replace(manifest, golden=golden.fields)
    data_bytes = model.with_manifest(manifest)
    del model
    finished = open_model(data_bytes, weights=weights, warn=False)
    for engine in _ENGINES:
        load_elsewhere(finished, engine=engine)
    sha256, size_bytes = _write(finished, target, options, golden)
    progress("writing", 4, len(_STAGES))
    return ExportResult(model=target, sha256=sha256, size_bytes=size_bytes, parity=tuple(parity))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Golden:
    """The golden inputs with PyTorch's logits, and how near others have to come; `fields` is what the manifest says."""

    images_NHWC: Pixels
    expected_BK: Logits
    tolerance: Tolerance
    fields: Mapping[str, object]


def _golden(network: Network, options: ExportOptions, macs: int | None) -> _Golden:
    height, width = network.preprocessing.crop
    reference = _reference_output(network, options)
    seeds = choose_seeds(reference, height=height, width=width, macs_per_image=macs)
    images_NHWC = golden_images(seeds, height=height, width=width)
    expected_BK = reference(images_NHWC)
    exact_BK = exact_logits(reference_model(network, options), network.preprocessing, images_NHWC)
    exact_BK = None if exact_BK is None else exact_BK * _columns(network, options)
    tolerance = float32_tolerance(expected_BK, exact_BK)
    expected = expectation(expected_BK, engines=_ENGINES, tolerance=tolerance, output=options.outputs[0])
    fields = {**golden_header(seeds, network.preprocessing), "expected": [expected]}
    return _Golden(images_NHWC=images_NHWC, expected_BK=expected_BK, tolerance=tolerance, fields=fields)


def _write(model: ModelFile, target: Path, options: ExportOptions, golden: _Golden) -> tuple[str, int]:
    """Write the model in its format; return the hash that names it, and its size in bytes."""
    if options.format == "openvino":
        xml, weights = convert_to_ir(
            model, images_NHWC=golden.images_NHWC, expected_BK=golden.expected_BK, tolerance=golden.tolerance
        )
        write_ir(target, xml, weights)
        return sha256_hex(xml), len(xml) + len(weights)
    if options.format == "huggingface":
        files = folder_of(model)
        write_folder(target, files)
        return model.sha256, sum(len(data) for data in files.values())
    write_model(target, model)
    return model.sha256, len(model.data) + len(model.weights or b"")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Traced:
    """The finished graph, serialized, without a manifest; for one over 2 GiB also the weights and their entry."""

    graph: bytes
    width: int
    macs: int | None
    weights: bytes | None
    entry: Mapping[str, Any] | None


def _traced(network: Network, options: ExportOptions, target: Path) -> _Traced:
    height, width = network.preprocessing.crop
    model = trace(
        traced_form(network, options),
        height=height,
        width=width,
        pixels=options.input == "uint8-nhwc",
        outputs=[options.outputs[0], *(name for name in EXTRAS if name in options.outputs)],
        highest_opset=highest_versions(options.min_onnxruntime)[0],
    )
    if network.ends_in_activation and drop_activation(model.graph, "logits") != network.final_activation:
        reason = f"the {network.final_activation} that ends the network is not the last operator of its graph"
        raise UsageError("cannot export", file=network.name, reason=reason, remedy="return the logits from forward()")
    if network.task == "binary" and not options.is_encoder:
        add_zero_logit(model.graph)
    gc.collect()  # the exporter leaves cycles that hold the weights once more
    model = finish(model, options, activation=network.activation)
    file = f"{target.name}.data" if options.format == "onnx" else "model.onnx.data"
    weights = move_weights_out(model.graph, file=file)
    return _Traced(
        graph=model.SerializeToString(deterministic=True),
        width=model.graph.output[0].type.tensor_type.shape.dim[1].dim_value,
        macs=macs_per_image(model),
        weights=weights,
        entry=None if weights is None else weights_entry(file, weights),
    )


def _reference(network: Network, options: ExportOptions) -> Reference:
    first, name = _reference_output(network, options), options.outputs[0]
    if not isinstance(network.model, VisionTransformer) or not set(EXTRAS) & set(options.outputs):
        return lambda images_NHWC: {name: first(images_NHWC)}
    extras = reference_extras(network.model, network.preprocessing)
    return lambda images_NHWC: {name: first(images_NHWC), **extras(images_NHWC)}


def _reference_output(network: Network, options: ExportOptions) -> Callable[[Pixels], Logits]:
    """Return the first output of the file in PyTorch, as a function of uint8 images."""
    model, columns = reference_model(network, options), _columns(network, options)
    run = reference_logits(model, network.preprocessing, ends_in_activation=network.ends_in_activation)
    return lambda images_NHWC: run(images_NHWC) * columns


def _columns(network: Network, options: ExportOptions) -> npt.NDArray[np.float32]:
    """Return what the values of the model are multiplied by: of one logit it makes two, zero and that one."""
    is_doubled = network.task == "binary" and not options.is_encoder
    return np.array([0, 1] if is_doubled else [1], np.float32)


def _explain(network: Network, options: ExportOptions, model: ModelFile, engine: str, image_NHWC: Pixels) -> str:
    others = [other for other in _ENGINES if other != engine]
    traced = traced_form(network, options)
    return describe_first_apart(model, traced, engine=engine, others=others, image_NHWC=image_NHWC)


def _manifest(network: Network, options: ExportOptions, width: int) -> Manifest:
    """Return the manifest of the file; `width` is that of its first output."""
    embedding = {"width": width, "normalized": options.normalize} if options.is_encoder else None
    is_float32 = options.input == "float32-nchw"
    layout: Mapping[str, object] = {"dtype": "float32", "layout": "NCHW"} if is_float32 else {}
    batch = {} if options.batch_size is None else {"batch": options.batch_size}
    name = {"name": "pixel_values"} if options.format == "huggingface" else {}
    is_fused = isinstance(network.model, VisionTransformer) and options.fuse
    return Manifest(
        name=network.name,
        architecture=network.architecture,
        preprocessing=network.preprocessing,
        labels=() if options.is_encoder else network.labels,
        precision="float32",
        input={**PIXELS_INPUT, **name, **layout, **batch},
        outputs=options.output_names,
        activation="none" if options.is_encoder else network.activation,
        task="classification" if options.is_encoder else network.task,
        license=network.license,
        base_model=network.base_model,
        evaluation=None if options.is_encoder else network.evaluation,
        assumed=tuple(name for name in network.assumed if not (options.is_encoder and name == "labels")),
        embedding=embedding,
        provenance={
            **network.provenance,
            "form": "fused" if is_fused else "plain",
            "vit_edge": vit_edge.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
    )


def _require_engines() -> None:
    missing = [engine for engine in _ENGINES if engine not in installed_engines()]
    if missing:
        reason = f"parity is proven in ONNX Runtime and OpenVINO; not installed: {', '.join(missing)}"
        raise MissingExtra("cannot export", reason=reason, remedy='pip install "vit-edge[export,onnxruntime]"')
