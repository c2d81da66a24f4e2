"""Triton Inference Server: `models/NAME/config.pbtxt`, the model in version 1, labels, and golden inputs to warm up.

The fields are those of `model_config.proto` in triton-inference-server/common.
"""

from __future__ import annotations

import json

from vit_edge.model_file.artifact import MOST_BATCH
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.repository.served_model import MODELS, ServedModel

__all__ = ["triton_files"]

_MOST_BATCH = 64
# One batch may wait half as long as one image takes; this long if that was never measured.
_DEFAULT_DELAY_US = 1000
_THREADS = {"onnxruntime": "intra_op_thread_count", "openvino": "INFERENCE_NUM_THREADS"}
_DATATYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


def triton_files(served: ServedModel) -> dict[str, bytes]:
    """Return the files of the repository below its folder."""
    folder = f"{MODELS}/{served.name}"
    return {
        **{f"{folder}/1/{name}": data for name, data in served.model_files.items()},
        f"{folder}/labels.txt": "".join(f"{label}\n" for label in served.manifest.labels).encode(),
        f"{folder}/warmup/golden": _golden_input(served),
        f"{folder}/config.pbtxt": _config(served).encode(),
    }


def _config(served: ServedModel) -> str:
    """Return the model's configuration in the text format of protobuf."""
    manifest = served.manifest
    name, datatype = manifest.input.get("name", "images"), _DATATYPES[manifest.input["dtype"]]
    file = "model.xml" if isinstance(served.model, IrModel) else "model.onnx"
    dims = ", ".join(map(str, _dims(served)))
    return f"""\
name: {_text(served.name)}
backend: {_text(served.engine)}
default_model_filename: {_text(file)}
max_batch_size: {min(_MOST_BATCH, MOST_BATCH)}
input [
  {{ name: {_text(name)}, data_type: {datatype}, dims: [ {dims} ] }}
]
output [
  {{ name: "logits", data_type: TYPE_FP32, dims: [ {len(manifest.labels)} ], label_filename: "labels.txt" }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {_delay_us(served)}
}}
instance_group [
  {{ count: {served.instances}, kind: KIND_CPU }}
]
parameters {{
  key: {_text(_THREADS[served.engine])}
  value: {{ string_value: "{served.threads}" }}
}}
model_warmup [
  {{
    name: "golden input"
    batch_size: 1
    inputs {{
      key: {_text(name)}
      value: {{ data_type: {datatype}, dims: [ {dims} ], input_data_file: "golden" }}
    }}
  }}
]
"""


def _dims(served: ServedModel) -> tuple[int, ...]:
    height, width = served.manifest.preprocessing.crop
    return (height, width, 3) if served.manifest.input["dtype"] == "uint8" else (3, height, width)


def _delay_us(served: ServedModel) -> int:
    return _DEFAULT_DELAY_US if served.p50_ms is None else max(1, round(served.p50_ms * 1000 / 2))


def _golden_input(served: ServedModel) -> bytes:
    """Return the first golden input as the network takes it: the server runs it before it is ready."""
    height, width = served.manifest.preprocessing.crop
    seed = (served.manifest.golden or {})["seeds"][0]
    return served.manifest.network_input(golden_images([seed], height=height, width=width)).tobytes()


def _text(value: str) -> str:
    """Return a text in quotes; the text format of protobuf reads JSON's escapes of ASCII."""
    return json.dumps(value)
