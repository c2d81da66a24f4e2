"""Import a third-party ONNX classifier: a model file with a dynamic batch, compared with the file it was made from.

Its input becomes one of the two that model files have, its output the logits. Then each engine is compared with the
unchanged file, as an export is compared with PyTorch. What the user does not specify is refused, or marked as assumed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from vit_edge.export.onnx_import.reference import ThirdPartyReference
from vit_edge.export.parity.golden_vectors import choose_seeds, golden_header
from vit_edge.export.parity.isolated_run import load_elsewhere
from vit_edge.export.parity.parity import PARITY_COLUMNS, Parity, check_parity, float32_tolerance, nearest
from vit_edge.files import kind_of, may_write, read_file, sha256_hex
from vit_edge.image import Pixels, Preprocessing
from vit_edge.model_file.artifact import (
    MODEL_BYTES,
    PRODUCER,
    Manifest,
    ModelFile,
    open_model,
    seal_state,
    warn_of_assumed,
)
from vit_edge.model_file.onnx_schema import parse
from vit_edge.model_file.tasks import Activation, binary_labels, settled_task
from vit_edge.model_file.writing import write_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.golden import expectation, golden_images
from vit_edge.runtime.checks.load_policy import current_policy
from vit_edge.runtime.checks.operators import check_graph
from vit_edge.runtime.engines.protocol import installed_engines
from vit_edge.runtime.notebook import html_table
from vit_edge.runtime.onnx_import.external_weights import take_in_weights
from vit_edge.runtime.onnx_import.head import add_zero_logit, one_value, set_output, settled_activation
from vit_edge.runtime.onnx_import.importer import parsed
from vit_edge.runtime.onnx_import.interface import Layout, read_input, set_input

__all__ = ["ImportResult", "Layout", "import_onnx", "is_third_party_onnx"]

_STAGES = 3
_VERSIONS = {"vit_edge": vit_edge.__version__, "onnx": onnx.__version__}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ImportResult:
    """The model file, how close each engine is to the file it was made from, and how the graph was changed."""

    model: ModelFile
    parity: tuple[Parity, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        name, size = self.model.manifest.name, f"{len(self.model.data) / 1e6:.2f} MB"
        return f"<ImportResult {name!r}: {size}, {nearest(self.parity)}, {len(self.notes)} changes>"

    def _repr_html_(self) -> str:
        caption = f"{self.model.manifest.name}, compared with the file it was made from"
        return html_table(caption, PARITY_COLUMNS, [one.row() for one in self.parity])


def is_third_party_onnx(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a third-party ONNX file; False if there is no such file."""
    try:
        data = read_file(path, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)
        return seal_state(data) == "third-party" and kind_of(data) is None and bool(parse(data).graph.node)
    except (InputError, ValueError):
        return False


def import_onnx(
    source: str | os.PathLike[str] | bytes,
    *,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    layout: Layout | None = None,
    output: str | None = None,
    activation: Activation | None = None,
    name: str | None = None,
    assumed: Sequence[str] = (),
    real_images: Iterable[Pixels] = (),
    progress: Progress = silent,
) -> ImportResult:
    """Return a third-party ONNX classifier as a model file, checked in each installed engine; with `out`, write it.

        >>> from vit_edge.image import Preprocessing
        >>> names = Path("labels.txt").read_text().split()
        >>> preprocessing = Preprocessing(resize=(32, 32), crop=(32, 32))
        >>> import_onnx("other.onnx", preprocessing=preprocessing, labels=names, out="imported.onnx")
        <ImportResult 'other': ... MB, onnxruntime ... dB, openvino ... dB, ... changes>

    - `preprocessing` normalises the float32 input (mean 0 and std 1/255 leave pixels as they are); uint8 inputs get
      pixels. `layout` is needed only if neither the shape nor the graph shows it.
    - `output` names the logits if they are not the first output [batch, classes].
    - `activation` is what turns the logits into probabilities; a Softmax or Sigmoid that ends the graph is found.
    - `assumed` names settings that were not specified; the file keeps the list.

    An engine that gives other logits is left out with a warning; ONNX Runtime must give the same. Raises ModelRejected,
    UsageError if an argument does not fit the graph, VerificationFailed.
    """
    made_from = None if isinstance(source, bytes) else source
    target = None if out is None else may_write(Path(out), force=force, made_from=made_from)
    given = _Given(
        preprocessing=preprocessing,
        labels=tuple(labels),
        layout=layout,
        output=output,
        activation=activation,
        name=name,
        assumed=tuple(assumed),
    )
    file, notes = "the bytes given" if isinstance(source, bytes) else printable(source), list[str]()
    with _cannot_import(file):
        finished, parity = _checked(source, file, given, notes, real_images, progress)
    if target is not None:
        write_model(target, finished)
    warn_of_assumed(assumed, file)
    for note in notes:
        _log.warning("%s: %s", file, note)
    return ImportResult(model=replace(finished, source=file), parity=tuple(parity), notes=tuple(notes))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """What a third-party file does not say itself."""

    preprocessing: Preprocessing
    labels: tuple[str, ...]
    layout: Layout | None
    output: str | None
    activation: Activation | None
    name: str | None
    assumed: tuple[str, ...]


def _checked(
    source: str | os.PathLike[str] | bytes,
    file: str,
    given: _Given,
    notes: list[str],
    real_images: Iterable[Pixels],
    progress: Progress,
) -> tuple[ModelFile, Sequence[Parity]]:
    """Return the finished file, which loads in each engine that gives the logits of the source, and the parities."""
    progress("importing", 0, _STAGES)
    model, reference = _imported(source, file, given, notes)
    progress("importing", 1, _STAGES)
    finished, parity = _proven(model, reference, real_images, notes)
    progress("importing", 2, _STAGES)
    for engine in sorted({result.engine for result in parity}):
        load_elsewhere(finished, engine=engine)
    progress("importing", 3, _STAGES)
    return finished, parity


@contextmanager
def _cannot_import(file: str) -> Iterator[None]:
    """Say in each refusal that the file cannot be imported, and name it."""
    try:
        yield
    except (ModelRejected, UsageError, VerificationFailed) as error:
        error.what = "cannot import" if error.what == "cannot load" else error.what
        error.file = error.file if error.file not in (None, "the bytes given") else file
        error.remedy = error.remedy.replace("{file}", file)
        raise


def _imported(
    source: str | os.PathLike[str] | bytes, file: str, given: _Given, notes: list[str]
) -> tuple[ModelFile, ThirdPartyReference]:
    """Return the file with the interface of a model file, without golden vectors, and the unchanged network."""
    data, hashes = _read(source)
    original, graph = _parsed(data)
    entry = read_input(graph.graph, given.preprocessing, layout=given.layout)
    reference = ThirdPartyReference(original, entry, given.preprocessing)
    output, found = choose_output(graph, reference, given.output, len(given.labels), notes)
    activation = settled_activation(given.activation, found)
    task = settled_task(given.activation, found, output.num_classes)
    if task is None:
        raise one_value()
    graph, batch = settle_batch(graph, output, reference)
    if batch is not None:
        notes.append(f"the batch size stays {batch}: no other runs, or gives the same logits")
    fields = set_input(graph.graph, entry, given.preprocessing, batch)
    set_output(graph.graph, output, batch)
    if task == "binary":
        add_zero_logit(graph.graph)
        reference.give_zero_logit()
    graph.producer_name, graph.producer_version = PRODUCER, vit_edge.__version__
    manifest = Manifest(
        name=given.name or printable(Path(file).stem),
        architecture={"family": "onnx", "producer": original.producer_name},
        preprocessing=given.preprocessing,
        labels=binary_labels(given.labels) if task == "binary" else given.labels,
        precision="float32",
        input=fields,
        activation="softmax" if task == "binary" else activation,
        task=task,
        assumed=given.assumed,
        provenance={**hashes, "form": "plain", "changes": list(notes), **_VERSIONS},
    )
    model = ModelFile.from_graph(graph, manifest)
    _check_operators(model)
    return model, reference


def _parsed(data: bytes) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the graph unchanged and tidied; raises ModelRejected if a part of it cannot be read."""
    try:
        return onnx.load_model_from_string(data), tidy(onnx.load_model_from_string(data))
    except (DecodeError, IndexError, TypeError, ValueError) as error:
        reason = f"a part of the file cannot be read ({' '.join(str(error).split())[:200]})"
        raise _rejected(reason, "copy the file again, or export it again") from error


def _check_operators(model: ModelFile) -> None:
    try:
        check_graph(model, allow_ops=current_policy().allow_ops)
    except ModelRejected as error:
        raise _rejected(error.reason, "export the model again with operators of image classifiers") from error


def _proven(
    model: ModelFile,
    reference: ThirdPartyReference,
    real_images: Iterable[Pixels],
    notes: list[str],
) -> tuple[ModelFile, list[Parity]]:
    """Return the file with golden vectors, and the parity of each engine that gives the same logits as its source."""
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
            notes.append(f"{engine} is not verified: {found}")
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


def _read(source: str | os.PathLike[str] | bytes) -> tuple[bytes, dict[str, Any]]:
    """Return an ONNX file with its weights inside, safe to give to an engine, and the hashes of what was read."""
    data = source
    if not isinstance(data, bytes):
        data = read_file(data, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)
    if seal_state(data) != "third-party":
        raise _rejected("the file is a model file of vit-edge", "use the file as it is, without an import")
    proto, hashes = parsed(data), {"source_sha256": sha256_hex(data)}
    weights = take_in_weights(proto, source)
    for danger in dangers(proto):
        raise _rejected(danger, "export the model again, as a plain image classifier")
    if weights:
        return proto.SerializeToString(deterministic=True), {**hashes, "source_weights_sha256": weights}
    return data, hashes


def _parity(
    model: ModelFile, reference: ThirdPartyReference, engine: str, images_NHWC: Pixels, real_images: Sequence[Pixels]
) -> list[Parity] | str:
    """Return the parity of one engine, or why its logits differ; raises VerificationFailed for ONNX Runtime."""
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
    return ModelRejected("cannot import", reason=reason, remedy=remedy)
