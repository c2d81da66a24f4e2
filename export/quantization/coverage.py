"""How much of a quantized file an engine really runs in INT8, read from the graph that the engine runs.

A file full of QuantizeLinear proves nothing: an engine that does not recognise a pattern converts the integers back and
multiplies in float32, silently. So the file is loaded as in use, and its ops are looked up in the engine's own graph.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from vit_edge.errors import EngineUnavailable, require
from vit_edge.export.graph.macs import PRODUCTS, macs_by_node
from vit_edge.files import temporary_folder
from vit_edge.machine.int8_engines import why_float32
from vit_edge.machine.targets import target_name
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.engines.protocol import EngineOptions

__all__ = [
    "LEAST_PERCENT",
    "Coverage",
    "Float32Op",
    "RunningNode",
    "coverage",
    "nodes_in_onnxruntime",
    "nodes_in_openvino",
    "running_nodes",
]

# Below it the warning: what is left float then costs more than a few per cent of time.
LEAST_PERCENT = 95.0
_ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")
# What computes products in ONNX Runtime's optimised graphs.
_ORT_INTEGER = frozenset({"ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"})
_ORT_INTEGER |= {"QGemm", "QLinearConv", "QLinearMatMul"}
_ORT_FLOAT = frozenset(["Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv"])
# It numbers the nodes that its layout transformer makes anew, and marks those with channels in blocks.
_ORT_SUFFIX = re.compile(r"(_token_\d+|_nchwc)+$")
# It marks what it takes apart: the product without its bias, the scales behind it.
_OV_SUFFIX = re.compile(r"(/WithoutBiases|/Dequantization\w+|_original)+$")
_OV_PRODUCTS = frozenset(["Convolution", "FullyConnected", "MatMul"])
_OV_INTEGER = ("i8", "u8")
# Such as a sum and an activation.
_MOST_FUSED = 3
_NUM_NAMED = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Float32Op:
    """A product with a constant weight that stayed float: its node, and billions of multiply-accumulates an image."""

    node: str
    gmac: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What one engine computes in integers, in billions of multiply-accumulates (GMAC) for one image.

    `weight_gmac` is that of all products with constant weights, `total_gmac` adds attention's. `alone` names the
    QuantizeLinear and DequantizeLinear nodes that no integer kernel took in: each is a pass over memory.
    """

    engine: str
    version: str
    num_ops: int
    num_integer: int
    integer_gmac: float
    weight_gmac: float
    total_gmac: float
    float32_ops: tuple[Float32Op, ...]
    alone: tuple[str, ...]

    @property
    def percent(self) -> float:
        """Return the share of multiplications with constant weights that are integer, 0 to 100."""
        return 100 * (self.integer_gmac / self.weight_gmac) if self.weight_gmac else 0.0

    @property
    def percent_of_all(self) -> float:
        """Return the share of all multiplications that are integer, attention's among them, 0 to 100."""
        return 100 * (self.integer_gmac / self.total_gmac) if self.total_gmac else 0.0


def coverage(model: ModelFile, engine: str) -> Coverage:
    """Return what `engine`, "onnxruntime" or "openvino", computes in integers once it has loaded `model`.

    A warning with the names of the nodes is logged below 95 % of the multiplications with constant weights. Where
    shapes are not known every product counts the same. Raises ModelRejected where the engine cannot load the file,
    EngineUnavailable where there is no such engine, MissingExtra where it is not installed.
    """
    if engine not in _LOOKUPS:
        reason = f"{engine!r} gives no optimized graph"
        raise EngineUnavailable("cannot measure the coverage", reason=reason, remedy=f"choose {' or '.join(_LOOKUPS)}")
    version = str(require(engine, extra=engine, what="measure the coverage").__version__)
    proto = model.graph()
    weights = _weights(proto.graph)
    ops = {_name(node): node for node in proto.graph.node if _name(node) in weights}
    is_integer, alone = _LOOKUPS[engine](model, proto, ops)
    macs = macs_by_node(proto) or {_name(node): 1 for node in proto.graph.node if node.op_type in PRODUCTS}
    left = [Float32Op(node=name, gmac=macs[name] / 1e9) for name in ops if not is_integer[name]]
    found = Coverage(
        engine=engine,
        version=version.split("-", maxsplit=1)[0],
        num_ops=len(ops),
        num_integer=sum(is_integer.values()),
        integer_gmac=sum(macs[name] for name in ops if is_integer[name]) / 1e9,
        weight_gmac=sum(macs[name] for name in ops) / 1e9,
        total_gmac=sum(macs.values()) / 1e9,
        float32_ops=tuple(sorted(left, key=lambda op: -op.gmac)),
        alone=tuple(alone),
    )
    # Known of the engine and this CPU, and said with the file: which engine to use.
    is_known = not found.num_integer and why_float32(engine, target_name(model.manifest.quantization)) is not None
    if not is_known:
        _warn(found, model.source)
    return found


def _warn(found: Coverage, source: str) -> None:
    if found.percent >= LEAST_PERCENT:
        return
    named = ", ".join(op.node for op in found.float32_ops[:_NUM_NAMED])
    more = len(found.float32_ops) - _NUM_NAMED
    _log.warning(
        "%s: in %s %.1f %% of the multiplications with weights run in INT8, less than %g %%; in float32: %s%s",
        source,
        found.engine,
        found.percent,
        LEAST_PERCENT,
        named or "none",
        f" and {more} more" if more > 0 else "",
    )


def _in_onnxruntime(
    model: ModelFile, proto: onnx.ModelProto, ops: Mapping[str, onnx.NodeProto]
) -> tuple[dict[str, bool], list[str]]:
    """Return which products are integer, and which roundings stand alone, in the graph that ONNX Runtime optimised."""
    from vit_edge.runtime.engines.ort import make_session

    with temporary_folder() as folder:
        path = Path(folder) / "optimised.onnx"
        make_session(model, EngineOptions(threads=1), optimised=path)
        optimised = onnx.load(path).graph
    found = nodes_in_onnxruntime(optimised, proto.graph)
    is_integer = {name: bool(found[name]) and all(node.op_type in _ORT_INTEGER for node in found[name]) for name in ops}
    return is_integer, list(_alone_in_onnxruntime(optimised))


def nodes_in_onnxruntime(optimised: onnx.GraphProto, graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return, for each product of `graph` with a constant weight, what computes it in the graph ONNX Runtime made."""
    by_name: dict[str, list[onnx.NodeProto]] = {}
    by_weight: dict[str, list[onnx.NodeProto]] = {}
    origins = _origins(optimised)
    for node in optimised.node:
        if node.op_type in _ORT_INTEGER | _ORT_FLOAT:
            by_name.setdefault(_ORT_SUFFIX.sub("", node.name), []).append(node)
            for weight in {origin for name in node.input for origin in origins.get(name, ())}:
                by_weight.setdefault(weight, []).append(node)
    found = {}
    for name, weights in _weights(graph).items():
        found[name] = by_name.get(name) or [node for weight in weights for node in by_weight.get(weight, ())]
    # A convolution that took in what follows it goes by the name of that, its weights laid out anew.
    after = _sole_readers(graph)
    for name in (name for name, nodes in found.items() if not nodes):
        later = [node for node in after(name) if node not in found]
        found[name] = next((by_name[node] for node in later if node in by_name), [])
    return found


def _sole_readers(graph: onnx.GraphProto) -> Callable[[str], list[str]]:
    """Return what tells the nodes that follow one, each the only reader of the one before: as many as are fused."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes = {_name(node): node for node in graph.node}

    def after(name: str) -> list[str]:
        found: list[str] = []
        while len(found) < _MOST_FUSED and len(following := readers.get(nodes[name].output[0], [])) == 1:
            name = _name(following[0])
            found.append(name)
        return found

    return after


def _alone_in_onnxruntime(optimised: onnx.GraphProto) -> Iterator[str]:
    """Yield every DequantizeLinear that is left, and every QuantizeLinear that only such nodes read."""
    readers: dict[str, set[str]] = {}
    for node in optimised.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for node in optimised.node:
        only_back = readers.get(node.output[0], set()) <= {"DequantizeLinear"}
        if node.op_type == "DequantizeLinear" or (node.op_type == "QuantizeLinear" and only_back):
            yield _ORT_SUFFIX.sub("", _name(node))


def _in_openvino(
    model: ModelFile, proto: onnx.ModelProto, ops: Mapping[str, onnx.NodeProto]
) -> tuple[dict[str, bool], list[str]]:
    """Return which products are integer, and which roundings stand alone, in the graph that OpenVINO runs."""
    from vit_edge.runtime.engines.ov import compile_model

    running = list(running_nodes(compile_model(model, EngineOptions(threads=1)).get_runtime_model()))
    found = nodes_in_openvino(running, proto.graph)
    is_integer = {name: bool(found[name]) and all(entry.is_integer for entry in found[name]) for name in ops}
    names = {name for node in proto.graph.node if node.op_type in _ROUNDINGS for name in (_name(node), node.output[0])}
    alone: dict[str, None] = {}
    for entry in running:
        back_to_float = entry.kind not in _OV_PRODUCTS and not entry.gives_integers
        rounding = [name for name in entry.names if name in names and back_to_float]
        alone |= dict.fromkeys(rounding)
    return is_integer, list(alone)


def nodes_in_openvino(running: Sequence[RunningNode], graph: onnx.GraphProto) -> dict[str, list[RunningNode]]:
    """Return, for each product of `graph` with a constant weight, what computes it in the graph OpenVINO runs.

    A product may go by the name of the Add of its bias.
    """
    computing = [entry for entry in running if entry.kind in _OV_PRODUCTS]
    constants, weights = _origins(graph), _weights(graph)
    biased = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    found = {}
    for node in graph.node:
        if _name(node) in weights:
            added = biased.get(node.output[0])
            own = [node] if added is None or not any(name in constants for name in added.input) else [node, added]
            names = {name for entry in own for name in (_name(entry), entry.output[0])}
            found[_name(node)] = [entry for entry in computing if entry.made_of(names)]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningNode:
    """One node of the graph that OpenVINO runs: what it is, whether its inputs are integers, what of the file it is.

    A product whose weights alone are integers also has that precision, but a kernel for float: its inputs are rounded
    anew at every run, by ranges of their own.
    """

    kind: str
    is_integer: bool
    gives_integers: bool
    names: tuple[str, ...]

    def made_of(self, names: Collection[str]) -> bool:
        """Return whether it computes the product of the file that goes by any of `names`."""
        return any(_OV_SUFFIX.sub("", name) in names for name in self.names)


def running_nodes(graph: Any) -> Iterator[RunningNode]:
    """Yield the nodes of the graph that OpenVINO runs, its name for each the first of `names`."""
    for node in graph.get_ordered_ops():
        said = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
        kernel, precision = (said.get(key, "").lower() for key in ("primitiveType", "runtimePrecision"))
        yield RunningNode(
            kind=said.get("layerType", ""),
            is_integer=precision in _OV_INTEGER and kernel.endswith(_OV_INTEGER),
            gives_integers=set(said.get("outputPrecisions", "").lower().split(",")) <= set(_OV_INTEGER),
            names=(node.get_friendly_name(), *said.get("originalLayersNames", "").split(",")),
        )


_LOOKUPS = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}


def _weights(graph: onnx.GraphProto) -> dict[str, Sequence[str]]:
    """Return for each product with one constant operand the constants which that is made of."""
    origins = _origins(graph)
    found = {}
    for node in graph.node:
        constant = [origins[name] for name in node.input[:2] if name in origins]
        if node.op_type in PRODUCTS and len(constant) == 1:
            found[_name(node)] = constant[0]
    return found


def _origins(graph: onnx.GraphProto) -> dict[str, Sequence[str]]:
    """Return for each tensor that depends on no input the first constant that it is made of, as a list of one."""
    origins: dict[str, Sequence[str]] = {tensor.name: [tensor.name] for tensor in graph.initializer}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if not inputs or all(name in origins for name in inputs):
            origins |= dict.fromkeys(node.output, origins[inputs[0]] if inputs else [node.output[0]])
    return origins


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])
