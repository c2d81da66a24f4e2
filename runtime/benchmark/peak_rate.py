"""The highest rate of multiplications that an engine reaches here: large square products and nothing else.

It is no figure of a data sheet: it is what this engine's own kernels do at their best, on this machine, with as many
threads, measured now. A network cannot do better in this engine; better kernels could.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_edge.errors import VitEdgeError
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import Manifest, ModelFile
from vit_edge.model_file.onnx_schema import FLOAT, INT64, UINT8, parse
from vit_edge.runtime.benchmark.timing import time_calls
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import EngineOptions, make_engine

__all__ = ["Peak", "measure_peak", "share_of_peak"]

# 512 rows through four matrices of 768 by 768, which is about what a batch of ViT-B gives an engine to do.
_SIDE, _WIDTH, _IMAGES, _LAYERS = 32, 768, 128, 4
_GMAC = _IMAGES * (_SIDE * _SIDE * 3 // _WIDTH) * _WIDTH * _WIDTH * _LAYERS / 1e9
_SECONDS, _RUNS = 0.4, 5
_INT8, _INT = 3, 2  # TensorProto.DataType, AttributeProto.AttributeType


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Billions of multiply-accumulates a second: the fastest of many runs; None where the engine cannot run it."""

    engine: str
    device: str
    threads: int
    integer_gmac_per_s: float | None
    float_gmac_per_s: float | None


def measure_peak(engine: str, options: EngineOptions) -> Peak:
    """Return what the engine reaches with these options, both with float32 and with QDQ INT8 (u8 by s8) products."""
    return Peak(
        engine=engine,
        device=options.device,
        threads=options.num_threads,
        integer_gmac_per_s=_rate(engine, options, in_integers=True),
        float_gmac_per_s=_rate(engine, options, in_integers=False),
    )


def share_of_peak(macs: Mapping[str, int], peak: Peak, milliseconds: float) -> float | None:
    """Return the share of an image's time that its multiplications alone would take at the peak; 1 leaves nothing.

    `macs` are the manifest's: multiply-accumulates of one image by precision.
    """
    least_s, quantized = 0.0, macs.get("int8", 0) / 1e9
    pairs = (quantized, peak.integer_gmac_per_s), (sum(macs.values()) / 1e9 - quantized, peak.float_gmac_per_s)
    for gmac, rate in pairs:
        if gmac and not rate:
            return None
        least_s += gmac / rate if rate else 0.0
    return least_s * 1000 / milliseconds


def _rate(engine: str, options: EngineOptions, *, in_integers: bool) -> float | None:
    images = golden_images(range(_IMAGES), height=_SIDE, width=_SIDE)
    try:
        loaded = make_engine(engine, _model(in_integers=in_integers), options)
    except VitEdgeError:  # a provider without one of these operators
        return None
    try:
        taken_ns = time_calls(lambda _: loaded.tensors(images, ["logits"]), seconds=_SECONDS, queries=_RUNS)
        return _GMAC / (min(taken_ns) / 1e9)
    except VitEdgeError:
        return None
    finally:
        loaded.close()


def _model(*, in_integers: bool) -> ModelFile:
    """Return a chain of products over rows of pixels, in the form that the runtime loads."""
    proto = parse(b"")
    proto.ir_version = 8
    proto.opset_import.add(domain="", version=17)
    graph, random = proto.graph, np.random.default_rng(0)
    graph.name = "peak"
    _value(graph.input, "images", UINT8, ["batch", _SIDE, _SIDE, 3])
    _value(graph.output, "logits", FLOAT, ["rows", _WIDTH])
    _tensor(graph, "rows", INT64, np.array([-1, _WIDTH], dtype="<i8"))
    graph.node.add(op_type="Cast", name="cast", input=["images"], output=["pixels"]).attribute.add(
        name="to", i=FLOAT, type=_INT
    )
    graph.node.add(op_type="Reshape", name="reshape", input=["pixels", "rows"], output=["x0"])
    for number in range(_LAYERS):
        weight = random.normal(0, _WIDTH**-0.5, (_WIDTH, _WIDTH))
        last = number == _LAYERS - 1
        _op(graph, number, weight, out="logits" if last else f"x{number + 1}", in_integers=in_integers)
    data = proto.SerializeToString()
    return ModelFile(data=data, proto=proto, manifest=_manifest(), source="the products that the peak is measured by")


def _op(graph: Any, number: int, weight: Any, *, out: str, in_integers: bool) -> None:
    left, right = f"x{number}", f"w{number}"
    if not in_integers:
        _tensor(graph, right, FLOAT, weight.astype("<f4"))
    else:
        for kind, scale, zero, dtype in ((left, 2.0, 128, UINT8), (right, 0.15 / 127, 0, _INT8)):
            _tensor(graph, f"{kind}.scale", FLOAT, np.array(scale, dtype="<f4"))
            _tensor(graph, f"{kind}.zero", dtype, np.array(zero, dtype="u1" if dtype == UINT8 else "i1"))
        _tensor(graph, f"{right}.q", _INT8, np.clip(np.rint(weight / (0.15 / 127)), -127, 127).astype("i1"))
        _rounding(graph, "QuantizeLinear", left, left, f"{left}.q")
        _rounding(graph, "DequantizeLinear", left, f"{left}.q", f"{left}.dq")
        _rounding(graph, "DequantizeLinear", right, f"{right}.q", f"{right}.dq")
        left, right = f"{left}.dq", f"{right}.dq"
    graph.node.add(op_type="MatMul", name=f"product{number}", input=[left, right], output=[out])


def _rounding(graph: Any, kind: str, of: str, source: str, out: str) -> None:
    graph.node.add(op_type=kind, name=out, input=[source, f"{of}.scale", f"{of}.zero"], output=[out])


def _tensor(graph: Any, name: str, dtype: int, values: Any) -> None:
    graph.initializer.add(name=name, data_type=dtype, dims=values.shape, raw_data=values.tobytes())


def _value(values: Any, name: str, dtype: int, shape: list[int | str]) -> None:
    tensor = values.add(name=name).type.tensor_type
    tensor.elem_type = dtype
    for size in shape:
        tensor.shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))


def _manifest() -> Manifest:
    preprocessing = Preprocessing(
        resize=_SIDE, crop=(_SIDE, _SIDE), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return Manifest(
        name="peak",
        architecture={},
        preprocessing=preprocessing,
        labels=("nothing",),
        precision="float32",
        provenance={},
    )
