"""The Open Inference Protocol v2 over HTTP, without a server: requests and responses as bytes, for either side.

Tensors travel in JSON, or as raw little-endian bytes after it (the binary data extension, which `tritonclient[http]`
uses by default). The input is `images`, uint8 [batch, height, width, 3] after preprocessing; the output is `logits`,
float32 [batch, classes].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vit_edge.errors import InputError
from vit_edge.image import Pixels
from vit_edge.metrics import Logits
from vit_edge.model_file.artifact import Manifest

__all__ = [
    "HEADER_LENGTH",
    "UNREADABLE",
    "InferRequest",
    "encode_request",
    "model_metadata",
    "read_logits",
    "read_request",
    "respond",
    "server_metadata",
    "server_name",
]

# The number of bytes of JSON in front of the raw tensors; without it the whole body is JSON.
HEADER_LENGTH = "Inference-Header-Content-Length"
INPUT, OUTPUT = "images", "logits"
_VERSION = "1"
# What JSON of another shape, or numbers out of range, raise while they are read.
UNREADABLE = (AttributeError, LookupError, OverflowError, RecursionError, StopIteration, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """Images as the network takes them, the client's id, and whether it wants raw bytes back."""

    images: Pixels
    id: str | None
    is_binary: bool


def server_name(name: str) -> str:
    """Return a model name that every server and Kubernetes accept: lower-case letters, digits and hyphens."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain[:50].strip("-") or "model"


def server_metadata(version: str) -> dict[str, Any]:
    """Return what `GET /v2` responds."""
    return {"name": "vit-edge", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(manifest: Manifest) -> dict[str, Any]:
    """Return what `GET /v2/models/NAME` responds."""
    height, width = manifest.preprocessing.crop
    return {
        "name": server_name(manifest.name),
        "versions": [_VERSION],
        "platform": "vit-edge",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, height, width, 3]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(manifest.labels)]}],
    }


def read_request(body: bytes, header_length: str | None, manifest: Manifest) -> InferRequest:
    """Return what the body of `POST /v2/models/NAME/infer` asks for; raises InputError with the reason."""
    try:
        header, raw = _split(body, header_length)
        (tensor,) = header["inputs"]
        images = _tensor(tensor, raw, "UINT8", np.dtype(np.uint8))
        outputs = header.get("outputs") or [{"name": OUTPUT, **_defaults(header)}]
        names, identity = [output["name"] for output in outputs], header.get("id")
        is_binary = bool(outputs[0].get("parameters", {}).get("binary_data", False))
    except UNREADABLE as error:
        raise _refused(f"the body cannot be read ({type(error).__name__}: {str(error)[:100]})") from error
    if tensor.get("name") != INPUT or names != [OUTPUT]:
        raise _refused(f"the model has the input {INPUT!r} and the output {OUTPUT!r}, no others")
    if images.shape[1:] != (*manifest.preprocessing.crop, 3):
        expected = [-1, *manifest.preprocessing.crop, 3]
        raise _refused(f"{INPUT!r} has the shape {list(images.shape)}; the model takes {expected}")
    return InferRequest(images=images, id=None if identity is None else str(identity), is_binary=is_binary)


def respond(request: InferRequest, logits_BK: Logits, *, name: str) -> tuple[bytes, dict[str, str]]:
    """Return the body of the response, and its headers."""
    tensor: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(logits_BK.shape)}
    named = {"model_name": name, "model_version": _VERSION, **({} if request.id is None else {"id": request.id})}
    if not request.is_binary:
        tensor["data"] = [float(value) for value in logits_BK.ravel()]
        return json.dumps({**named, "outputs": [tensor]}).encode(), {"Content-Type": "application/json"}
    return _with_raw({**named, "outputs": [tensor]}, tensor, logits_BK.astype("<f4"))


def encode_request(tensor: npt.NDArray[Any], *, name: str, datatype: str) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request for the logits of `tensor`, the input `name`, and its headers."""
    entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(tensor.shape)}
    outputs = [{"name": OUTPUT, "parameters": {"binary_data": True}}]
    return _with_raw({"inputs": [entry], "outputs": outputs}, entry, tensor)


def read_logits(body: bytes, header_length: str | None) -> Logits:
    """Return the logits in the body of a response; raises one of UNREADABLE if there are none."""
    header, raw = _split(body, header_length)
    entry = next(output for output in header["outputs"] if output["name"] == OUTPUT)
    return _tensor(entry, raw, "FP32", np.dtype("<f4")).astype(np.float32)


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    length = len(body) if header_length is None else int(header_length)
    if not 0 <= length <= len(body):
        raise ValueError(f"{HEADER_LENGTH} is {length}, the body has {len(body)} bytes")
    header = json.loads(body[:length])
    if not isinstance(header, dict):
        raise TypeError("the JSON is no object")
    return header, memoryview(body)[length:]


def _tensor(entry: Mapping[str, Any], raw: memoryview, datatype: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the one tensor of a body, from its raw bytes or from JSON; raises ValueError, KeyError or TypeError."""
    if entry["datatype"] != datatype:
        raise ValueError(f"the datatype is {entry['datatype']}, not {datatype}")
    shape = _shape(entry["shape"])
    size_bytes = entry.get("parameters", {}).get("binary_data_size")
    if size_bytes is not None:
        if size_bytes != len(raw):
            raise ValueError(f"binary_data_size is {size_bytes}, {len(raw)} bytes follow the JSON")
        return np.frombuffer(raw, dtype).reshape(shape)
    values = np.asarray(entry["data"])
    if values.dtype.kind not in "iuf" or (dtype.kind == "u" and not _are_bytes(values)):
        raise ValueError(f"the data are not {datatype}")
    return values.astype(dtype).reshape(shape)


def _are_bytes(values: npt.NDArray[Any]) -> bool:
    return values.dtype.kind in "iu" and (values.size == 0 or bool(values.min() >= 0 and values.max() <= 255))


def _shape(shape: Sequence[Any]) -> list[int]:
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"the shape is {shape}")
    return list(shape)


def _with_raw(
    header: Mapping[str, Any], entry: dict[str, Any], tensor: npt.NDArray[Any]
) -> tuple[bytes, dict[str, str]]:
    """Return JSON followed by the bytes of one tensor, whose entry in it learns its size."""
    raw = np.ascontiguousarray(tensor).tobytes()
    entry["parameters"] = {"binary_data_size": len(raw)}
    text = json.dumps(header).encode()
    return text + raw, {HEADER_LENGTH: str(len(text)), "Content-Type": "application/octet-stream"}


def _defaults(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request that names no outputs wants of them."""
    wants_raw = header.get("parameters", {}).get("binary_data_output", False)
    return {"parameters": {"binary_data": bool(wants_raw)}}


def _refused(reason: str) -> InputError:
    return InputError("cannot run the request", reason=reason, remedy="see /v2/models/NAME for the tensors")
