"""`vit-edge inspect`."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_edge.cli.output import Result, command, file_argument, make_table, megabytes
from vit_edge.errors import ModelRejected
from vit_edge.machine.releases import oldest_release
from vit_edge.machine.targets import TARGETS, target_name

if TYPE_CHECKING:
    from vit_edge.model_file.artifact import Manifest, ModelFile
    from vit_edge.model_file.openvino_ir import IrModel


@command("inspect")
@file_argument("file")
def inspect(file: Path) -> Result:
    """Show what the model file FILE says of itself and what it costs, after checking its seal and its operators.

    FILE is an ONNX file, or the .xml of OpenVINO's IR, of which the seal over both files is checked.

    \b
    Example:
      vit-edge inspect model.int8.onnx
    """
    from vit_edge.model_file.artifact import open_model
    from vit_edge.model_file.openvino_ir import open_ir
    from vit_edge.runtime.checks.operators import check_graph

    describe: Callable[[], dict[str, Any]]
    if file.suffix.lower() == ".xml":
        ir = open_ir(file)
        manifest, describe = ir.manifest, partial(_describe_ir, ir)
    else:
        model = open_model(file)
        check_graph(model)
        manifest, describe = model.manifest, partial(_describe, model)
    try:
        data = describe()
        summary = _summary(manifest, data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"its manifest is malformed ({type(error).__name__}: {error})"
        raise ModelRejected("cannot show", file=file, reason=reason, remedy="export it again") from error
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in summary.items()
    ]
    return Result(data=data, shown=[make_table(f"{file}: seal intact", ("field", "value"), rows)])


def _describe(model: ModelFile) -> dict[str, Any]:
    graph = model.proto.graph
    manifest: dict[str, Any] = json.loads(model.manifest.to_json())
    return {
        "file": model.source,
        "sha256": model.sha256,
        "size_bytes": len(model.data) + len(model.weights or b""),
        "ir_version": model.proto.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.proto.opset_import},
        "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "oldest_onnxruntime": oldest_release(opset=_opset(model), ir_version=model.proto.ir_version),
        **_costs(model),
        "input": _shape(graph.input[0]),
        "output": _shape(graph.output[0]),
        "more_outputs": [_shape(value) for value in graph.output[1:]],
        "target": _target(model.manifest),
        "manifest": manifest,
    }


def _describe_ir(model: IrModel) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(model.manifest.to_json())
    size_bytes = len(model.xml) + len(model.weights)
    target = _target(model.manifest)
    return {
        "file": model.source,
        "sha256": model.sha256,
        "size_bytes": size_bytes,
        "target": target,
        "manifest": manifest,
    }


def _target(manifest: Manifest) -> dict[str, Any] | None:
    """Return the target that the file was quantized for and what it implies, or None for a float file."""
    name = target_name(manifest.quantization)
    if name is None or name not in TARGETS:
        return None if name is None else {"name": name, "verified": False, "implies": f"{name} (unverified): not known"}
    return {
        "name": name,
        "verified": TARGETS[name].verified,
        "implies": TARGETS[name].describe(batch_size=manifest.batch),
    }


def _summary(manifest: Manifest, data: dict[str, Any]) -> dict[str, Any]:
    labels = list(manifest.labels)
    golden = manifest.golden or {}
    quantization = manifest.quantization
    return {
        "name": manifest.name,
        "size": megabytes(data["size_bytes"]),
        "sha256": data["sha256"],
        "precision": manifest.precision,
        "input": data.get("input", dict(manifest.input)),
        "outputs": [data["output"], *data["more_outputs"]] if "output" in data else list(manifest.outputs),
        "labels": f"{len(labels)}: {', '.join(labels[:10])}{' ...' if len(labels) > 10 else ''}",
        "preprocessing": manifest.preprocessing.to_dict(),
        "architecture": dict(manifest.architecture),
        "target": data["target"]["implies"] if data["target"] else "none",
        "quantization": _without_lists(quantization) if quantization else "none",
        "calibration images": len(quantization["images"]) if quantization else "none",
        "evaluation": _evaluation(manifest.evaluation),
        "golden vectors": f"{len(golden.get('seeds', ()))} inputs, {len(golden.get('images', ()))} images, for "
        + ", ".join(sorted({name for entry in golden.get("expected", ()) for name in entry["engines"]})),
        **(_graph_summary(data) if "operators" in data else {}),
        "license": manifest.license or "not stated",
        "provenance": dict(manifest.provenance),
    }


def _graph_summary(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "operators": data["operators"],
        "parameters": _or_unknown(data["parameters"], "{:,}"),
        "GMAC per image": _or_unknown(data["gmac_per_image"], "{:.3f}"),
        "size by kind of tensor": {kind: megabytes(size) for kind, size in (data["size_by_kind"] or {}).items()},
        "IR version, opset": f"{data['ir_version']}, {data['opset']}",
        "oldest ONNX Runtime": data["oldest_onnxruntime"] or "none known",
    }


def _without_lists(quantization: Any) -> dict[str, Any]:
    lists = ("fingerprints", "images", "openvino_skips")
    return {
        key: value["method"] if key == "ranges" else value for key, value in quantization.items() if key not in lists
    }


def _evaluation(evaluation: Any) -> Any:
    if not evaluation:
        return "none"
    if "results" not in evaluation:
        return evaluation
    return [
        f"{r['engine']}: {_top1(r)}agreement {r['agreement']:.2f} %, {r['images']} images"
        for r in evaluation["results"]
    ]


def _top1(result: Any) -> str:
    """Return both accuracies; nothing where the images had no labels."""
    if result["candidate_top1"] is None:
        return ""
    return f"top-1 {result['candidate_top1']:.2f} % (float {result['reference_top1']:.2f} %), "


def _opset(model: ModelFile) -> int:
    return next(int(entry.version) for entry in model.proto.opset_import if entry.domain in ("", "ai.onnx"))


def _costs(model: ModelFile) -> dict[str, Any]:
    """Return parameters, multiplications and sizes; shape inference needs the onnx package, which a device has not."""
    if importlib.util.find_spec("onnx") is None:
        return {"parameters": None, "gmac_per_image": None, "size_by_kind": None}
    from vit_edge.export.graph.macs import costs

    found = costs(model.graph())
    gmac = None if found.macs_per_image is None else found.macs_per_image / 1e9
    return {"parameters": found.parameters, "gmac_per_image": gmac, "size_by_kind": dict(found.size_by_kind)}


def _or_unknown(value: float | None, form: str) -> str:
    if value is not None:
        return form.format(value)
    if importlib.util.find_spec("onnx") is None:
        return 'not known: pip install "vit-edge[export]"'
    return "not known: the graph does not tell its shapes"


def _shape(value: Any) -> str:
    tensor = value.type.tensor_type
    names = {1: "float32", 2: "uint8", 7: "int64", 10: "float16"}
    dims = ", ".join(str(d.dim_param or d.dim_value) for d in tensor.shape.dim)
    return f"{value.name}: {names.get(tensor.elem_type, tensor.elem_type)} [{dims}]"
