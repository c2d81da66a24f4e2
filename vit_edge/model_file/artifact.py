"""A model file: one sealed `.onnx` that carries its preprocessing, labels, golden vectors and origin.

The manifest is the metadata property `vit_edge.manifest` (JSON). The file ends in one more serialized ModelProto that
holds only `vit_edge.seal`, the SHA-256 of every byte before it: protobuf merges the two, so every ONNX reader still
loads the file, and a changed bit anywhere is found before an engine sees it. The seal is integrity, not origin.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from vit_edge.errors import ModelRejected, NotTrusted, escaped, printable
from vit_edge.files import kind_of, read_file, sha256_hex
from vit_edge.image import Pixels, Preprocessing
from vit_edge.model_file.golden_fields import check_golden_fields
from vit_edge.model_file.onnx_schema import parse, property_bytes
from vit_edge.model_file.tasks import ACTIVATION_OF, Activation, Task
from vit_edge.model_file.weights import checked_weights, is_plain_name

if TYPE_CHECKING:
    import onnx

__all__ = [
    "MANIFEST_KEY",
    "MODEL_BYTES",
    "MOST_BATCH",
    "MOST_OUTPUTS",
    "PIXELS_INPUT",
    "PRODUCER",
    "SCHEMA",
    "SEAL_KEY",
    "FilePrecision",
    "Manifest",
    "ModelFile",
    "open_model",
    "pack",
    "reseal",
    "seal",
    "seal_state",
    "unsealed",
    "warn_of_assumed",
]

SCHEMA = 1
MANIFEST_KEY = "vit_edge.manifest"
SEAL_KEY = "vit_edge.seal"
PRODUCER = "vit-edge"

# The contract's input; `--input float32-nchw` gives the other.
PIXELS_INPUT = {"name": "images", "dtype": "uint8", "layout": "NHWC"}
# Every output that a graph may have; the golden vectors and the runtime read the first: logits, or of an encoder the
# embedding.
_OUTPUTS_OF = {
    "logits": {"logits", "probabilities", "top5", "top5_probabilities", "features", "attention"},
    "embedding": {"embedding", "tokens", "attention"},
}
MOST_OUTPUTS = max(map(len, _OUTPUTS_OF.values()))
_LARGEST_WIDTH = 65_536
# 64 golden inputs of 21,841 classes for two engines, and eight images of 1 MB, are 26 million; parsed, each is bytes.
_MOST_CHARACTERS = 2**25
MOST_BATCH = 1024
# "int8" has constant ranges; "int8-dynamic" computes the ranges of activations at run time.
FilePrecision: TypeAlias = Literal["float32", "float16", "int8", "int8-dynamic"]

_SEAL_PREFIX = property_bytes(SEAL_KEY, "0" * 64)[:-64]
_SEAL_BYTES = len(_SEAL_PREFIX) + 64
# One protobuf message holds at most 2 GiB; larger networks have one file of weights in the same folder.
MODEL_BYTES = 2**31 - 1
_log = logging.getLogger(__name__)
_OPTIONAL_TEXT, _OPTIONAL_OBJECT = (str, NoneType), (Mapping, NoneType)
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "architecture": (Mapping,),
    "provenance": (Mapping,),
    "input": (Mapping,),
    "license": _OPTIONAL_TEXT,
    "base_model": _OPTIONAL_TEXT,
    "quantization": _OPTIONAL_OBJECT,
    "evaluation": _OPTIONAL_OBJECT,
    "golden": _OPTIONAL_OBJECT,
    "macs": _OPTIONAL_OBJECT,
    "weights": _OPTIONAL_OBJECT,
    "embedding": _OPTIONAL_OBJECT,
}
# Keys of manifests that were written before a term changed, and the keys that mean the same now.
_RENAMED = {
    "golden": {"pictures": "images"},
    "quantization": {"float_products": "float32_ops"},
    "evaluation": {"rungs": "steps"},
}
_RENAMED_FORMS = {"deploy": "fused", "elsewhere": "third-party"}  # of provenance.form


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a model file says of itself; keys that this version does not know are kept in `unknown`.

    The file of an encoder has no labels but `embedding`: the `width` of its vector, and whether the graph normalises it
    to length 1 (`normalized`).
    """

    name: str
    architecture: Mapping[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    precision: FilePrecision
    provenance: Mapping[str, Any]
    input: Mapping[str, Any] = field(default_factory=lambda: dict(PIXELS_INPUT))
    outputs: tuple[str, ...] = ("logits",)
    activation: Activation = "softmax"
    task: Task = "classification"
    license: str | None = None
    base_model: str | None = None
    quantization: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    golden: Mapping[str, Any] | None = None
    macs: Mapping[str, int] | None = None  # multiply-accumulates for one image, by precision
    weights: Mapping[str, Any] | None = None  # the file next to the model, of a network over 2 GiB
    assumed: tuple[str, ...] = ()  # not specified, and filled in by default
    embedding: Mapping[str, Any] | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(f"the manifest's {name} is {type(getattr(self, name)).__name__}")
        if self.precision not in get_args(FilePrecision):
            raise ValueError(f"the manifest's precision is {self.precision!r}")
        if self.task not in get_args(Task):
            raise ValueError(f"the manifest's task is {self.task!r}")
        if self.activation not in ACTIVATION_OF[self.task]:
            raise ValueError(f"the manifest's activation is {self.activation!r}, its task {self.task!r}")
        layout = {key: self.input.get(key) for key in ("dtype", "layout")}
        if layout not in ({"dtype": "uint8", "layout": "NHWC"}, {"dtype": "float32", "layout": "NCHW"}):
            raise ValueError(f"the manifest's input is {dict(self.input)}; neither uint8 NHWC nor float32 NCHW")
        if self.batch is not None and (not isinstance(self.batch, int) or not 1 <= self.batch <= MOST_BATCH):
            raise ValueError(f"the manifest's batch is {self.batch!r}")
        self._check_outputs()
        if not all(isinstance(name, str) for name in self.assumed):
            raise ValueError("the manifest's list of what was assumed is not a list of texts")
        if self.weights is not None and not is_plain_name(self.weights.get("file")):
            file_name = self.weights.get("file")
            raise ValueError(f"the manifest's weights are in {file_name!r}, not in a file of the same folder")
        if not all(isinstance(number, int) and number >= 0 for number in (self.macs or {}).values()):
            raise ValueError(f"the manifest's multiply-accumulates are {dict(self.macs or {})!r}")
        if not isinstance(self.provenance.get("form"), str | None):
            raise ValueError(f"the manifest's form is {type(self.provenance['form']).__name__}")
        images = (self.quantization or {}).get("images", [])
        if not isinstance(images, list) or not all(isinstance(digest, str) for digest in images):
            raise ValueError("the manifest's calibration images are not a list of hashes")

    def _check_outputs(self) -> None:
        first = "embedding" if self.is_encoder else "logits"
        if self.outputs[:1] != (first,) or not set(self.outputs) <= _OUTPUTS_OF[first]:
            raise ValueError(f"the manifest's outputs are {self.outputs!r}; the first is {first!r}")
        if self.is_encoder == bool(self.labels) or not all(isinstance(label, str) for label in self.labels):
            needed = "a classifier has a list of texts, an encoder none"
            raise ValueError(f"the manifest's labels do not fit its outputs: {needed}")
        if self.task != "classification" and (self.is_encoder or (self.task == "binary" and len(self.labels) != 2)):
            raise ValueError(f"the manifest's labels do not fit its task, {self.task!r}")
        if not 1 <= self.num_values <= _LARGEST_WIDTH:
            raise ValueError(f"the width of the manifest's embedding is {self.num_values}")

    @property
    def is_encoder(self) -> bool:
        """Return whether the model gives a vector for each image, not classes."""
        return self.embedding is not None

    @property
    def chooses_class(self) -> bool:
        """Return whether the largest logit of an image is its prediction."""
        return not self.is_encoder and self.task in ("classification", "binary")

    @property
    def output(self) -> str:
        """Return the output that golden vectors and the runtime read: "logits" or "embedding"."""
        return self.outputs[0]

    @property
    def num_values(self) -> int:
        """Return how many values that output has for each image: classes, or the width of the embedding."""
        return len(self.labels) if self.embedding is None else int(self.embedding["width"])

    @property
    def batch(self) -> int | None:
        """Return the batch that the graph is fixed at, or None where any batch runs."""
        batch: int | None = self.input.get("batch")
        return batch

    def network_input(self, images_NHWC: Pixels) -> Pixels | npt.NDArray[np.float32]:
        """Return what the graph takes for these pixels: the pixels themselves, or normalised float32 NCHW."""
        return images_NHWC if self.input["dtype"] == "uint8" else self.preprocessing.normalise(images_NHWC)

    def to_json(self) -> str:
        """Return the manifest as JSON with sorted keys: equal manifests give equal text."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        known["preprocessing"] = self.preprocessing.to_dict()
        for name in ("labels", "assumed", "outputs"):
            known[name] = list(known[name])
        defaults: dict[str, Any] = {
            "assumed": [],
            "macs": None,
            "weights": None,
            "activation": "softmax",
            "task": "classification",
            "embedding": None,
        }
        known = {name: value for name, value in known.items() if name not in defaults or value != defaults[name]}
        return json.dumps({**self.unknown, **known, "schema": SCHEMA}, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Return the manifest in `text`; raises ValueError that says what is wrong with it."""
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"the manifest has {len(text):,} characters; at most {_MOST_CHARACTERS:,} are read")
        try:
            values = json.loads(text)
            json.dumps(values, ensure_ascii=False).encode("utf-8")  # no halves of characters: nothing could print them
        except RecursionError as error:
            raise ValueError("the manifest is nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError("the manifest is not a JSON object")
        schema = values.pop("schema", None)
        if not isinstance(schema, int) or schema < 1:
            raise ValueError(f"the manifest's schema is {schema!r}, not a positive integer")
        if schema > SCHEMA:
            raise ValueError(
                f"the manifest has schema {schema}; this vit-edge reads up to {SCHEMA}: install a newer one"
            )
        names = {f.name for f in fields(cls)} - {"unknown"}
        known = {key: _in_current_terms(key, values.pop(key)) for key in names & values.keys()}
        try:
            known["preprocessing"] = Preprocessing.from_dict(known["preprocessing"])
            for name in {"labels", "assumed", "outputs"} & known.keys():
                if not isinstance(known[name], list):
                    raise ValueError(f"the manifest's {name} are not a list")
                known[name] = tuple(known[name])
            if known["precision"] == "int8" and (known.get("quantization") or {}).get("scheme") == "dynamic":
                known["precision"] = "int8-dynamic"  # as files were written before the two had names of their own
            manifest = cls(**known, unknown=values)
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"the manifest is incomplete ({error})") from error
        if manifest.golden is not None:
            check_golden_fields(manifest.golden, crop=manifest.preprocessing.crop)
        return manifest


def _in_current_terms(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    renamed = _RENAMED.get(name, {})
    current = {renamed.get(key, key): part for key, part in value.items()}
    if name == "provenance" and isinstance(form := current.get("form"), str):
        current["form"] = _RENAMED_FORMS.get(form, form)
    return current


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """The verified bytes of a model file, and what they say: engines load these bytes, never the path again."""

    data: bytes
    proto: Any
    manifest: Manifest
    source: str
    weights: bytes | None = None  # of the file next to the model, for a network over 2 GiB
    is_third_party: bool = False  # opened with labels and preprocessing from the user: no golden vectors are expected

    @classmethod
    def from_graph(cls, graph: Any, manifest: Manifest, *, weights: bytes | None = None) -> ModelFile:
        """Return the sealed model file of a ModelProto; equal graphs and manifests give equal bytes."""
        return open_model(pack(graph.SerializeToString(deterministic=True), manifest), weights=weights, warn=False)

    def graph(self) -> onnx.ModelProto:
        """Return the graph as a new onnx.ModelProto to work on, without the manifest and the seal."""
        import onnx  # the runtime, which uses `proto`, has no onnx package

        model = onnx.load_model_from_string(self.data)
        del model.metadata_props[:]
        return model

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, seal included."""
        return sha256_hex(self.data)

    def with_manifest(self, manifest: Manifest) -> bytes:
        """Return the bytes of the same graph under another manifest, sealed."""
        body = memoryview(self.data)[:-_SEAL_BYTES]  # what was opened has its seal
        own = property_bytes(MANIFEST_KEY, self.manifest.to_json())
        if body[-len(own) :] == own:  # as `pack` leaves it: no second copy of the weights is parsed
            return pack(body[: -len(own)], manifest)
        proto = parse(bytes(body))
        kept = [entry for entry in proto.metadata_props if entry.key != MANIFEST_KEY]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        return pack(proto.SerializeToString(deterministic=True), manifest)


def pack(graph: bytes | memoryview, manifest: Manifest) -> bytes:
    """Return a model file: the serialized ModelProto `graph`, the manifest, the seal; ModelRejected over 2 GiB."""
    data = _sealed(graph, property_bytes(MANIFEST_KEY, manifest.to_json()))
    if len(data) > MODEL_BYTES:
        reason = f"the file would have {len(data):,} bytes; one ONNX file holds at most {MODEL_BYTES:,}"
        raise ModelRejected(
            "cannot make the model file", reason=reason, remedy="put the weights in a file next to the model"
        )
    return data


def seal(body: bytes) -> bytes:
    """Return `body`, the bytes of an unsealed model file, with its seal appended (83 bytes)."""
    return _sealed(body)


def _sealed(*parts: bytes | memoryview) -> bytes:
    """Return the parts as one with its seal: joined once, as a copy of a large network costs its size in memory."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join((*parts, property_bytes(SEAL_KEY, digest.hexdigest())))


def unsealed(data: bytes) -> bytes:
    """Return `data` without its seal, whether the seal is right or not; unchanged where there is none."""
    return data[:-_SEAL_BYTES] if data[-_SEAL_BYTES:-64] == _SEAL_PREFIX else data


def seal_state(data: bytes) -> Literal["intact", "broken", "missing", "third-party"]:
    """Return whether the seal holds: "missing" if the file looks like ours, "third-party" if it does not."""
    if data[-_SEAL_BYTES:-64] == _SEAL_PREFIX:
        digest = hashlib.sha256(memoryview(data)[:-_SEAL_BYTES]).hexdigest()
        return "intact" if data[-64:] == digest.encode() else "broken"
    # One flipped bit can hide one of these marks, never all: it looks like ours by any that is left.
    ours = any(mark.encode() in data for mark in (MANIFEST_KEY, SEAL_KEY)) or PRODUCER.encode() in data[:64]
    return "missing" if ours else "third-party"


def open_model(
    source: str | os.PathLike[str] | bytes, *, weights: bytes | None = None, warn: bool = True, check: bool = True
) -> ModelFile:
    """Return a model file, read once, its seal checked before anything in it is used.

    The weights of a network over 2 GiB are read from a file next to the model, or given with its bytes; the seal
    covers them by their hash. With `warn` the log says what in the file was assumed; without `check` no hash is
    computed, for files that cannot have changed. Raises ModelRejected where it is no model file of vit-edge,
    NotTrusted where its seal is broken or missing.
    """
    if isinstance(source, bytes):
        name, data = "the bytes given", source
    else:
        name = printable(source)
        data = read_file(source, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)
    if check or data[-_SEAL_BYTES:-64] != _SEAL_PREFIX:
        _check_seal(data, name)
    try:
        proto = parse(data)
        properties = {entry.key: entry.value for entry in proto.metadata_props}
        if MANIFEST_KEY not in properties:
            raise ValueError("the file has a seal but no manifest")
        manifest = Manifest.from_json(properties[MANIFEST_KEY])
    except ValueError as error:
        raise _rejected(name, str(error), "export it again with `vit-edge export`") from error
    if manifest.weights is not None:
        place = None if isinstance(source, bytes) else Path(source)
        weights = checked_weights(manifest.weights, weights, name, place=place, check=check)
    if warn:
        warn_of_assumed(manifest.assumed, name)
    return ModelFile(data=data, proto=proto, manifest=manifest, source=name, weights=weights)


def warn_of_assumed(assumed: Sequence[str], source: str | os.PathLike[str]) -> None:
    """Log a warning where something about the network in `source` was assumed and not specified."""
    if assumed:
        advice = "convert the weights again with the settings of training, or infer them with `vit-edge convert --data`"
        names = escaped(", ".join(assumed), keep="")
        _log.warning("%s: assumed, not specified: %s; %s", printable(source), names, advice)


def reseal(path: str | os.PathLike[str]) -> ModelFile:
    """Return the file at `path` as it is, under a new seal; raises ModelRejected where it has no manifest of ours.

    Editors that rewrite the file move the old seal among the other properties: every property of that name is dropped.
    """
    name = printable(path)
    data = read_file(path, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)
    try:
        proto = parse(data)
    except ValueError as error:
        kind = kind_of(data) or ("the file is not an ONNX model", "make a model file with `vit-edge export`")
        raise _rejected(name, *kind) from error
    kept = [entry for entry in proto.metadata_props if entry.key != SEAL_KEY]
    if not any(entry.key == MANIFEST_KEY for entry in kept):
        raise _rejected(
            name, "the file has no manifest: it was not made by vit-edge", "make a model file with `vit-edge export`"
        )
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    try:
        manifest = Manifest.from_json(next(entry.value for entry in kept if entry.key == MANIFEST_KEY))
    except ValueError as error:
        raise _rejected(name, str(error), "export it again with `vit-edge export`") from error
    weights = checked_weights(manifest.weights, None, name, place=Path(path)) if manifest.weights else None
    return open_model(seal(proto.SerializeToString(deterministic=True)), weights=weights)


def _check_seal(data: bytes, name: str) -> None:
    state = seal_state(data)
    if state == "intact":
        return
    kind = kind_of(data)
    if kind is not None and state == "third-party":
        raise _rejected(name, kind[0], kind[1])
    if state == "broken":
        reason = "the file's bytes are not those that were sealed: it was changed or damaged"
    elif state == "missing":
        reason = "the file's seal is missing: it was cut short, changed or damaged"
    else:
        if _is_onnx(data):
            remedy = "specify its preprocessing and labels, or make a model file with `vit-edge export`"
            raise _rejected(name, "the file was not made by vit-edge", remedy)
        raise _rejected(name, "the file is not an ONNX model", "make a model file with `vit-edge export`")
    remedy = "copy it again from where it was made; `vit-edge seal` re-seals a deliberate edit"
    raise NotTrusted("will not load the model file", file=name, reason=reason, remedy=remedy)


def _is_onnx(data: bytes) -> bool:
    try:
        return bool(parse(data).graph.node)
    except ValueError:
        return False


def _rejected(name: str, reason: str, remedy: str) -> ModelRejected:
    return ModelRejected("cannot use the model file", file=name, reason=reason, remedy=remedy)
