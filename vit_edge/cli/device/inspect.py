"""`vit-edge inspect`."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_edge.cli.output import Result, command, file_argument, make_table, megabytes
from vit_edge.errors import ModelRejected, require
from vit_edge.machine.int8_engines import engine_advice
from vit_edge.machine.releases import oldest_release
from vit_edge.machine.targets import TARGETS, target_name

if TYPE_CHECKING:
    from vit_edge.model_file.artifact import Manifest, ModelFile
    from vit_edge.model_file.openvino_ir import IrModel

_HASH = re.compile("[0-9a-f]{64}")
_WHAT = {
    "classification": "{} classes",
    "binary": "{} classes of one logit",
    "multi-label": "{} labels at once",
    "regression": "regression, outputs: {}",
}


@command("inspect")
@file_argument("file")
def inspect(file: Path) -> Result:
    """Check the seal and the operators of FILE, and show its size, input, labels, accuracy and more.

    FILE is an ONNX model file of vit-edge, or the .xml of OpenVINO's IR (the seal covers both of its files).

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
        reason = f"the manifest is malformed ({type(error).__name__}: {error})"
        raise ModelRejected("cannot inspect", file=file, reason=reason, remedy="export it again") from error
    table = make_table("", ("field", "value"), list(summary.items()))
    return Result(data=data, shown=[_headline(manifest, data), table, f"SHA-256: {data['sha256']}"])


def _headline(manifest: Manifest, data: dict[str, Any]) -> str:
    height, width = manifest.preprocessing.crop
    size, gives = megabytes(data["size_bytes"]), _WHAT[manifest.task].format(len(manifest.labels))
    if manifest.is_encoder:
        gives = f"encoder, vectors of {manifest.num_values} values"
    what = f"{manifest.name}, {manifest.precision}, {size}, {height}x{width} pixels, {gives}"
    return f"The seal is intact: {what}."


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
        "engine_advice": _advice(model.manifest),
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
        "engine_advice": None,
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


def _advice(manifest: Manifest) -> str | None:
    """Return which engine to use on which class of CPU, if the file leaves a choice."""
    return engine_advice(target_name(manifest.quantization)) if manifest.precision == "int8" else None


def _summary(manifest: Manifest, data: dict[str, Any]) -> dict[str, str]:
    """Return the fields for people: what an application needs first, then how the file was made."""
    golden, quantization = manifest.golden or {}, manifest.quantization or {}
    engines = sorted({name for entry in golden.get("expected", ()) for name in entry["engines"]})
    return {
        "name": manifest.name,
        "size": megabytes(data["size_bytes"]),
        "precision": manifest.precision,
        "input": data.get("input") or _text(manifest.input),
        "outputs": "; ".join([data["output"], *data["more_outputs"]] if "output" in data else manifest.outputs),
        **_gives(manifest),
        "accuracy": _evaluation(manifest.evaluation),
        "preprocessing": _text(manifest.preprocessing.to_dict()),
        "target": data["target"]["implies"] if data["target"] else "any CPU",
        **({"engine": data["engine_advice"]} if data["engine_advice"] else {}),
        "quantization": _text(_without_lists(quantization)) if quantization else "none",
        "calibration images": str(len(quantization.get("images", ()))),
        "architecture": _text(manifest.architecture),
        **(_graph_summary(data) if "operators" in data else {}),
        "golden vectors": f"{len(golden.get('seeds', ()))} inputs and {len(golden.get('images', ()))} images, for "
        + (" and ".join(engines) or "no engine"),
        "license": manifest.license or "not stated",
        "provenance": _text(manifest.provenance),
    }


def _gives(manifest: Manifest) -> dict[str, str]:
    """Return the classes of a classifier, or the form of an encoder's vector."""
    labels = list(manifest.labels)
    if manifest.embedding is not None:
        length = "length 1" if manifest.embedding.get("normalized") else "not normalized"
        return {"embedding": f"{manifest.num_values} values, {length}"}
    return {
        "task": manifest.task,
        "labels": f"{len(labels)}: {', '.join(labels[:10])}{' ...' if len(labels) > 10 else ''}",
    }


def _graph_summary(data: dict[str, Any]) -> dict[str, str]:
    sizes = {kind: megabytes(size) for kind, size in (data["size_by_kind"] or {}).items()}
    return {
        "parameters": _or_unknown(data["parameters"], "{:,}"),
        "GMAC per image": _or_unknown(data["gmac_per_image"], "{:.3f}"),
        "operators": ", ".join(f"{count} {name}" for name, count in data["operators"].items()),
        "size by kind of tensor": _text(sizes) or "not known",
        "IR version": f"{data['ir_version']}, opset {_text(data['opset'])}",
        "oldest ONNX Runtime": data["oldest_onnxruntime"] or "none known",
    }


def _text(value: Any) -> str:
    """Return JSON values as text: names and values, without braces and quotes."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{str(key).replace('_', ' ')} {_nested(entry)}"
            for key, entry in value.items()
            if entry not in (None, [], {}, "")
        )
    if isinstance(value, list | tuple):
        return " x ".join(map(_text, value)) if all(isinstance(one, int) for one in value) else _joined(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:12]}..." if isinstance(value, str) and _HASH.fullmatch(value) else str(value)


def _nested(value: Any) -> str:
    return f"({_text(value)})" if isinstance(value, Mapping) else _text(value)


def _joined(values: Any) -> str:
    return ", ".join(_nested(value) for value in values)


def _without_lists(quantization: Any) -> dict[str, Any]:
    lists = ("fingerprints", "images", "openvino_skips", "openvino_rounds")
    return {
        key: value["method"] if key == "ranges" else value for key, value in quantization.items() if key not in lists
    }


def _evaluation(evaluation: Any) -> str:
    if not evaluation:
        return "not evaluated: vit-edge quantize --data leaves an evaluation in the file"
    if "results" not in evaluation:
        return _text(evaluation)
    return "; ".join(f"{r['engine']}: {_same(r)}, {r['images']} images" for r in evaluation["results"])


def _same(result: Any) -> str:
    if "neighbours" in result:
        kept = ", ".join(f"{each['percent']:.2f} % at k = {each['k']}" for each in result["neighbours"])
        return f"neighbours kept {kept}, cosine {result['cosine_mean']:.4f}"
    return f"{_top1(result)}agreement {result['agreement']:.2f} %"


def _top1(result: Any) -> str:
    """Return the accuracy of both files, or nothing if the images had no labels."""
    if (scores := result.get("scores")) is not None:
        name, unit = ("error", "") if scores["task"] == "regression" else ("right labels", " %")
        known = scores["reference"] is not None
        return f"{name} {scores['candidate']:.5g}{unit} (float32 {scores['reference']:.5g}{unit}), " if known else ""
    if result["candidate_top1"] is None:
        return ""
    return f"top-1 {result['candidate_top1']:.2f} % (float32 {result['reference_top1']:.2f} %), "


def _opset(model: ModelFile) -> int:
    return next(int(entry.version) for entry in model.proto.opset_import if entry.domain in ("", "ai.onnx"))


def _costs(model: ModelFile) -> dict[str, Any]:
    """Return parameters, multiplications and sizes; shape inference needs the onnx package, which devices lack."""
    if importlib.util.find_spec("onnx") is None:
        return {"parameters": None, "gmac_per_image": None, "size_by_kind": None}
    require("onnx", extra="export", what="count parameters")
    from vit_edge.export.graph.macs import costs

    found = costs(model.graph())
    gmac = None if found.macs_per_image is None else found.macs_per_image / 1e9
    return {"parameters": found.parameters, "gmac_per_image": gmac, "size_by_kind": dict(found.size_by_kind)}


def _or_unknown(value: float | None, form: str) -> str:
    if value is not None:
        return form.format(value)
    if importlib.util.find_spec("onnx") is None:
        return 'not known: pip install "vit-edge[export]"'
    return "not known: the shapes in the graph are incomplete"


def _shape(value: Any) -> str:
    tensor = value.type.tensor_type
    names = {1: "float32", 2: "uint8", 7: "int64", 10: "float16"}
    dims = ", ".join(str(d.dim_param or d.dim_value) for d in tensor.shape.dim)
    return f"{value.name}: {names.get(tensor.elem_type, tensor.elem_type)} [{dims}]"
