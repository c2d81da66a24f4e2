"""An ONNX image classifier made elsewhere as a model file of ours: what nobody told stays unknown, or is refused.

Its input becomes one of the two that model files have, its output the logits; its batch is freed where the graph
allows. Then it is held against the file it came from, engine by engine, as an export is held against PyTorch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

import vit_edge
from vit_edge.errors import InputError, ModelRejected, UsageError, VerificationFailed, printable
from vit_edge.export.graph.macs import macs_per_image
from vit_edge.export.onnx_import.batch import choose_output, settle_batch
from vit_edge.export.onnx_import.cleanup import dangers, tidy
from vit_edge.export.onnx_import.external_weights import with_weights
from vit_edge.export.onnx_import.interface import Layout, ThirdPartyInput, input_of, set_interface
from vit_edge.export.onnx_import.reference import ThirdPartyReference
from vit_edge.export.parity.golden_vectors import choose_seeds, golden_header
from vit_edge.export.parity.isolated_run import load_elsewhere
from vit_edge.export.parity.parity import Parity, check_parity, float32_tolerance
from vit_edge.files import kind_of, read_file, sha256_hex
from vit_edge.image import Pixels, Preprocessing
from vit_edge.model_file.artifact import PRODUCER, Manifest, ModelFile, open_model, seal_state, warn_of_assumed
from vit_edge.model_file.onnx_schema import parse
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.golden import expectation, golden_images
from vit_edge.runtime.checks.operators import check_graph
from vit_edge.runtime.engines.protocol import installed_engines

__all__ = ["Adoption", "Layout", "adopt", "is_third_party_onnx"]

_MAX_BYTES = 2**31 - 1
_STAGES = 3
_VERSIONS = {"vit_edge": vit_edge.__version__, "onnx": onnx.__version__}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adoption:
    """The model file, how near each engine comes to the file it was made from, and what was done to the graph."""

    model: ModelFile
    parity: tuple[Parity, ...]
    notes: tuple[str, ...]


def is_third_party_onnx(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is an ONNX file that does not look like a model file of ours; False where nothing is."""
    try:
        data = read_file(path, what="model file", max_bytes=_MAX_BYTES, error=ModelRejected)
        return seal_state(data) == "third-party" and kind_of(data) is None and bool(parse(data).graph.node)
    except (InputError, ValueError):
        return False


def adopt(
    path: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    layout: Layout | None = None,
    output: str | None = None,
    name: str | None = None,
    assumed: Sequence[str] = (),
    real_images: Iterable[Pixels] = (),
    progress: Progress = silent,
) -> Adoption:
    """Return the float32 classifier in the ONNX file `path` as a model file in memory, proven in each installed engine.

    The graph takes images as float32, normalised as `preprocessing` says (mean 0 and std 1/255 are pixels as they
    are), or as uint8; `layout` is told where its shape does not show it. `output` names the logits where the first
    output [batch, classes] is not them. `assumed` names what of this nobody knew, and is kept in the file. An engine
    that gives other answers is left out with a warning; ONNX Runtime has to give the same.

    Raises ModelRejected with the operator where there is one that no classifier has, UsageError where what is told does
    not fit the graph, VerificationFailed.
    """
    told = _Told(
        preprocessing=preprocessing,
        labels=tuple(labels),
        layout=layout,
        output=output,
        name=name,
        assumed=tuple(assumed),
    )
    notes: list[str] = []
    try:
        progress("taking the network", 0, _STAGES)
        model, reference = _taken(path, told, notes)
        progress("taking the network", 1, _STAGES)
        finished, parity = _proven(model, reference, real_images, notes)
        progress("taking the network", 2, _STAGES)
        for engine in sorted({result.engine for result in parity}):
            load_elsewhere(finished, engine=engine)
        progress("taking the network", 3, _STAGES)
    except (ModelRejected, UsageError, VerificationFailed) as error:
        error.file = error.file if error.file not in (None, "the bytes given") else printable(path)
        raise
    warn_of_assumed(assumed, path)
    for note in notes:
        _log.warning("%s: %s", printable(path), note)
    return Adoption(model=replace(finished, source=printable(path)), parity=tuple(parity), notes=tuple(notes))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """What the file does not say itself."""

    preprocessing: Preprocessing
    labels: tuple[str, ...]
    layout: Layout | None
    output: str | None
    name: str | None
    assumed: tuple[str, ...]


def _taken(path: str | os.PathLike[str], told: _Told, notes: list[str]) -> tuple[ModelFile, ThirdPartyReference]:
    """Return the file in our form, without golden vectors, and the network as it came; notes say what was changed."""
    data, hashes = _read(path)
    original, graph = _parsed(data)
    entry = input_of(graph, told.preprocessing, told.layout)
    reference = ThirdPartyReference(original, entry, told.preprocessing)
    logits = choose_output(graph, reference, told.output, len(told.labels), notes)
    graph, batch = settle_batch(graph, logits, reference)
    if batch is not None:
        notes.append(f"its batch stays {batch}: it does not run, or answers otherwise, at another")
    set_interface(graph, logits, entry, told.preprocessing, batch)
    graph.producer_name, graph.producer_version = PRODUCER, vit_edge.__version__
    manifest = Manifest(
        name=told.name or printable(Path(path).stem),
        architecture={"family": "onnx", "producer": original.producer_name},
        preprocessing=told.preprocessing,
        labels=told.labels,
        precision="float32",
        input=_input_entry(graph, entry, batch),
        assumed=told.assumed,
        provenance={**hashes, "form": "plain", "changes": list(notes), **_VERSIONS},
    )
    model = ModelFile.from_graph(graph, manifest)
    _guard(model)
    return model, reference


def _parsed(data: bytes) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the file as it is and tidied; raises ModelRejected where a part of it cannot be read."""
    try:
        return onnx.load_model_from_string(data), tidy(onnx.load_model_from_string(data))
    except (DecodeError, IndexError, TypeError, ValueError) as error:
        reason = f"a part of it cannot be read ({' '.join(str(error).split())[:200]})"
        raise _rejected(reason, "copy it again, or export it again") from error


def _input_entry(graph: onnx.ModelProto, entry: ThirdPartyInput, batch: int | None) -> dict[str, Any]:
    layout = "NHWC" if entry.dtype == "uint8" else "NCHW"
    fixed = {} if batch is None else {"batch": batch}
    return {"name": graph.graph.input[0].name, "dtype": entry.dtype, "layout": layout, **fixed}


def _guard(model: ModelFile) -> None:
    try:
        check_graph(model)
    except ModelRejected as error:
        raise _rejected(error.reason, "export it again with the operators of image classifiers") from error


def _proven(
    model: ModelFile,
    reference: ThirdPartyReference,
    real_images: Iterable[Pixels],
    notes: list[str],
) -> tuple[ModelFile, list[Parity]]:
    """Return the file with golden vectors, and the figures of each engine that answers as the file it came from."""
    preprocessing = model.manifest.preprocessing
    height, width = preprocessing.crop
    macs = macs_per_image(model.graph())
    seeds = choose_seeds(reference, height=height, width=width, macs_per_image=macs)
    images_NHWC = golden_images(seeds, height=height, width=width)
    shown = list(real_images)
    parity: list[Parity] = []
    for engine in installed_engines():
        found = _parity(model, reference, engine, images_NHWC, shown)
        if isinstance(found, str):
            notes.append(f"it is not promised for {engine}: {found}")
        else:
            parity += found
    engines = list(dict.fromkeys(result.engine for result in parity))
    expected_BK = reference(images_NHWC)
    expected = expectation(expected_BK, engines=engines, tolerance=float32_tolerance(expected_BK))
    golden = {**golden_header(seeds, preprocessing), "expected": [expected]}
    return open_model(
        model.with_manifest(replace(model.manifest, golden=golden, macs=None if macs is None else {"float32": macs})),
        warn=False,
    ), parity


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, str]]:
    """Return an ONNX file that an engine may try, with its weights in it, and the hashes of what was read.

    Raises ModelRejected.
    """
    data = read_file(path, what="model file", max_bytes=_MAX_BYTES, error=ModelRejected)
    if seal_state(data) != "third-party":
        raise _rejected("it is a model file of vit-edge, or was one", "give it as it is: it says all this itself")
    kind = kind_of(data)
    try:
        proto = parse(data)
    except ValueError as error:
        raise _rejected(*(kind or ("it is not an ONNX model", "give an ONNX file"))) from error
    if kind is not None and not proto.graph.node:
        raise _rejected(*kind)
    hashes = {"source_sha256": sha256_hex(data)}
    if any(tensor.external_data for tensor in proto.graph.initializer):
        try:
            data, beside = with_weights(data, path)
            proto = parse(data)
        except (DecodeError, ValueError) as error:
            raise _rejected("a part of it cannot be read", "copy it again, or export it again") from error
        hashes |= {} if beside is None else {"source_weights_sha256": sha256_hex(beside)}
    for danger in dangers(proto):
        raise _rejected(danger, "export it again, as a plain image classifier")
    return data, hashes


def _parity(
    model: ModelFile, reference: ThirdPartyReference, engine: str, images_NHWC: Pixels, real_images: Sequence[Pixels]
) -> list[Parity] | str:
    """Return the figures of one engine, or why it is not promised; raises VerificationFailed for ONNX Runtime."""
    try:
        return check_parity(
            model,
            lambda images: {"logits": reference(images)},
            images_NHWC=images_NHWC,
            engines=[engine],
            real_images=real_images,
        )
    except VerificationFailed as error:
        if engine == "onnxruntime":
            raise
        return error.reason


def _rejected(reason: str, remedy: str) -> ModelRejected:
    return ModelRejected("cannot take the network", reason=reason, remedy=remedy)
