"""The devices that can be asked for by name, and what each engine calls them. What runs is read back by the engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vit_edge.errors import EngineUnavailable

__all__ = ["DEVICES", "Device", "FloatPrecision", "known_as", "unavailable"]

FloatPrecision: TypeAlias = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What ONNX Runtime calls its provider for this device, and OpenVINO the device; None where it has none."""

    onnxruntime: str | None = None
    openvino: str | None = None
    # What its float parts are computed in where nothing else is asked for.
    float_precision: FloatPrecision = "float32"


# Names of the providers: ONNX Runtime, "Execution Providers"; of the devices: OpenVINO, "Inference Devices and Modes".
# An NPU computes in float16 only.
DEVICES: dict[str, Device] = {
    "cpu": Device(onnxruntime="CPUExecutionProvider", openvino="CPU"),
    "cuda": Device(onnxruntime="CUDAExecutionProvider"),
    "tensorrt": Device(onnxruntime="TensorrtExecutionProvider"),
    "openvino": Device(onnxruntime="OpenVINOExecutionProvider"),
    "coreml": Device(onnxruntime="CoreMLExecutionProvider"),
    "qnn": Device(onnxruntime="QNNExecutionProvider"),
    "directml": Device(onnxruntime="DmlExecutionProvider"),
    "xnnpack": Device(onnxruntime="XnnpackExecutionProvider"),
    "webgpu": Device(onnxruntime="WebGpuExecutionProvider"),
    "gpu": Device(openvino="GPU"),
    "npu": Device(openvino="NPU", float_precision="float16"),
    "auto": Device(openvino="AUTO"),
}
# OpenVINO numbers several devices of one kind: "gpu.1".
_NUMBERED = re.compile(r"(gpu|npu)\.(\d{1,2})")


def known_as(device: str, engine: str) -> tuple[str, Device] | None:
    """Return the engine's own name of `device` and what is known of it, or None where the engine has no such device."""
    numbered = _NUMBERED.fullmatch(device)
    entry = DEVICES.get(numbered[1] if numbered else device)
    name: str | None = None if entry is None else getattr(entry, engine, None)
    if entry is None or name is None:
        return None
    return (f"{name}.{numbered[2]}" if numbered else name), entry


def unavailable(device: str, there_is: str) -> EngineUnavailable:
    """Return the error for a device that is not here: what was asked for, and what there is."""
    known = device in DEVICES or _NUMBERED.fullmatch(device) is not None
    reason = f"the device {device!r} {'is not here' if known else 'is not known'}; here there is {there_is}"
    names = "" if known else f" ({', '.join(DEVICES)} are known)"
    otherwise = "let `load` and `classify` run it on the CPU (allow_fallback=True, --allow-fallback)"
    remedy = f"choose one of these{names}, or {otherwise}"
    return EngineUnavailable("cannot load", reason=reason, remedy=remedy)
