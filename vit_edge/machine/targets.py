"""Targets: what the hardware that a file is quantized for asks of its integers. Boards are in docs/quantization.md.

Where the demands come from, documentation as of 2026:
- x86: ONNX Runtime, "Quantize ONNX Models", data type selection: VPMADDUBSW saturates; CPUs with VNNI and ARM do not.
- ARM: onnxruntime#9902 (UDOT for uint8 by int8, weights flipped once; SDOT for int8 by int8), #17160 (I8MM, the same).
- OpenVINO, "NPU Device": only static shapes. NNCF's hardware description of the NPU: weights symmetric, 8 bits.
- TensorRT, "Working with Quantized Types": symmetric only; its ONNX parser refuses a zero point that is not 0.
- ONNX Runtime, "QNN Execution Provider": no dynamic shapes, a dynamic batch neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from vit_edge.errors import InputError, UsageError
from vit_edge.files import is_file, read_file
from vit_edge.machine import cpu
from vit_edge.machine.int8_engines import lacks_int8_matmul

__all__ = [
    "DEFAULT_TARGET",
    "TARGETS",
    "Resolved",
    "Target",
    "choose",
    "choose_target",
    "mismatch",
    "resolve_target",
    "target",
    "target_name",
]

DEFAULT_TARGET = "portable"
_REPORT_SCHEMA = 1
_REPORT_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a kind of hardware asks of an INT8 file.

    `activation` "uint8" has a zero point, "int8" is symmetric with zero point 0. `static_batch` None keeps the batch
    dynamic. `instructions`: any one of these makes integer products exact and fast; empty where none is needed.
    `verified` is whether vit-edge ran its files on such hardware. `limits` is what else the hardware's tools ask.
    `channels_first` is whether products are written as 1x1 convolutions, for kernels that only convolutions have.
    """

    name: str
    weight_bits: int
    activation: Literal["uint8", "int8"]
    static_batch: int | None
    device: str
    engines: tuple[str, ...]
    instructions: tuple[str, ...]
    verified: bool
    reason: str
    limits: tuple[str, ...] = ()
    channels_first: bool = False

    def __post_init__(self) -> None:
        if self.weight_bits not in (7, 8) or self.activation not in ("uint8", "int8"):
            raise ValueError(f"the target {self.name} asks for {self.weight_bits} bits, {self.activation}")

    @property
    def symmetric_activations(self) -> bool:
        """Return whether the zero point of activations has to be 0."""
        return self.activation == "int8"

    @property
    def label(self) -> str:
        """Return the name, marked if it was not tested on such hardware."""
        return self.name if self.verified else f"{self.name} (unverified)"

    def describe(self, *, batch_size: int | None = None) -> str:
        """Return in one line what the target implies, of a file whose batch is fixed where `batch_size` is given."""
        fixed = batch_size or self.static_batch
        batch = "any batch" if fixed is None else f"batch fixed at {fixed}"
        kind = "symmetric int8" if self.symmetric_activations else "uint8"
        form = ", 1x1 convolutions" if self.channels_first else ""
        return f"{self.label}: {self.weight_bits}-bit weights, {kind} activations{form}, {batch}, for {self.device}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A target, why it is right, and whether it was named, chosen for this machine or from a device's report."""

    target: Target
    chosen_from: Literal["name", "auto", "file"]
    reason: str


_ALL = (
    Target(
        name="portable",
        weight_bits=7,
        activation="uint8",
        static_batch=None,
        device="any CPU",
        engines=("onnxruntime", "openvino"),
        instructions=(),
        verified=True,
        reason="the sum of two uint8 times signed 7-bit weights fits the 16-bit sums of x86 CPUs without VNNI",
    ),
    Target(
        name="x86-vnni",
        weight_bits=8,
        activation="uint8",
        static_batch=None,
        device="x86 CPUs with VNNI",
        engines=("onnxruntime", "openvino"),
        instructions=cpu.VNNI,
        verified=True,
        reason="VNNI and AMX sum four uint8 times int8 in 32 bits, so all 8 bits of a weight can be used",
    ),
    Target(
        name="openvino-avx2",
        weight_bits=7,
        activation="uint8",
        static_batch=1,
        device="x86 CPUs with AVX2 and no VNNI, through OpenVINO",
        engines=("openvino",),
        instructions=("avx2",),
        verified=False,
        reason="OpenVINO gains from INT8 without VNNI in convolutions only, so each MatMul is a 1x1 convolution",
        limits=("ONNX Runtime runs the file in float32: it needs integers at both sides of a convolution",),
        channels_first=True,
    ),
    Target(
        name="arm-dotprod",
        weight_bits=8,
        activation="uint8",
        static_batch=None,
        device="64-bit ARM CPUs with dot products",
        engines=("onnxruntime",),
        instructions=("asimddp", "i8mm"),
        verified=False,
        reason="UDOT, or UMMLA of I8MM, sums 8-bit multiplications in 32 bits; the sign of weights is flipped at load",
        limits=("int8 activations are no faster: SDOT and SMMLA do the same work, and lose half of one-sided ranges",),
    ),
    Target(
        name="openvino-npu",
        weight_bits=8,
        activation="int8",
        static_batch=1,
        device="the NPU of Intel Core Ultra, through OpenVINO",
        engines=("openvino",),
        instructions=(),
        verified=False,
        reason="the compiler takes static shapes only; integers of zero point 0 need no correction of the sums",
        limits=("float parts run in float16: verify on the device",),
    ),
    Target(
        name="tensorrt",
        weight_bits=8,
        activation="int8",
        static_batch=None,
        device="NVIDIA GPUs with int8 Tensor cores, through TensorRT",
        engines=("tensorrt",),
        instructions=(),
        verified=False,
        reason="TensorRT's integers are symmetric: its ONNX parser refuses a zero point that is not 0",
        limits=(
            "a dynamic batch needs an optimization profile (trtexec --minShapes --optShapes --maxShapes)",
            "its QuantizeLinear and DequantizeLinear take int8, not uint8",
            "Jetson's DLA takes static shapes only",
        ),
    ),
    Target(
        name="qnn",
        weight_bits=8,
        activation="int8",
        static_batch=1,
        device="the NPU of Qualcomm Snapdragon, through QNN",
        engines=("onnxruntime-qnn",),
        instructions=(),
        verified=False,
        reason="QNN compiles static shapes only, and weights with a scale for each channel have to be symmetric int8",
        limits=(
            "what its compiler does not take runs on the CPU unless session.disable_cpu_ep_fallback is 1",
            "ONNX Runtime's page lists MatMul with pairs of uint8 or uint16: look which ones it takes",
        ),
    ),
)
TARGETS: Mapping[str, Target] = MappingProxyType({entry.name: entry for entry in _ALL})


def target(name: str) -> Target:
    """Return the target of this name; raises UsageError that lists them."""
    if name not in TARGETS:
        remedy = f"choose {', '.join(TARGETS)}, auto, or a file from `vit-edge doctor --json`"
        raise UsageError("cannot quantize", reason=f"no target is named {name!r}", remedy=remedy)
    return TARGETS[name]


def resolve_target(text: str | os.PathLike[str]) -> Resolved:
    """Return the target that `--target` means: a name, "auto" for this machine, or the path of a device's report.

    A report is what `vit-edge doctor --json` printed on the device. Raises UsageError and InputError.
    """
    name = os.fspath(text)
    if name in TARGETS:
        return Resolved(target=TARGETS[name], chosen_from="name", reason=TARGETS[name].reason)
    if name == "auto":
        installed = importlib.util.find_spec("openvino") is not None
        engines = [{"name": "openvino", "installed": installed, "error": None}]
        chosen, reason = choose({"cpu": cpu.cpu_report(), "engines": engines})
        return Resolved(target=chosen, chosen_from="auto", reason=reason)
    if not (name.lower().endswith(".json") or Path(name).name != name or is_file(name)):
        target(name)
    report = _read_report(name)
    try:
        chosen, reason = choose(report)
    except InputError as error:
        raise _not_a_report(name, error.reason) from error
    return Resolved(target=chosen, chosen_from="file", reason=reason)


def choose_target(report: Mapping[str, Any]) -> Target:
    """Return the target for the CPU that a report of `vit-edge doctor` describes; raises InputError."""
    return choose(report)[0]


def choose(report: Mapping[str, Any]) -> tuple[Target, str]:
    """Return what `choose_target` does, and why.

    It is a CPU's: that is where vit-edge's runtime runs a file. Targets for NPUs and GPUs are given by name. One for
    OpenVINO is chosen only if the report has that engine.
    """
    machine, present, complete = _cpu_of(report)
    has = [name for name in (*cpu.VNNI, "i8mm", "asimddp") if name in present]
    if cpu.is_x86(machine) and any(name in cpu.VNNI for name in has):
        return TARGETS["x86-vnni"], f"the CPU has {has[0]}: {TARGETS['x86-vnni'].reason}"
    if cpu.is_arm(machine) and any(name in TARGETS["arm-dotprod"].instructions for name in has):
        return TARGETS["arm-dotprod"], f"the CPU has {has[0]}: {TARGETS['arm-dotprod'].reason}"
    found = cpu.Instructions(names=present, complete=complete)
    if "avx2" in present and lacks_int8_matmul(machine, found) and _has_openvino(report):
        return TARGETS["openvino-avx2"], f"the CPU has AVX2 and OpenVINO: {TARGETS['openvino-avx2'].reason}"
    if cpu.is_x86(machine):
        why = "the CPU has no VNNI" if complete else "this system does not report whether the CPU has VNNI"
        return TARGETS["portable"], f"{why}: 8-bit weights could saturate in 16-bit sums, 7-bit ones cannot"
    why = "has no dot products of 8 bits" if cpu.is_arm(machine) else f"is neither x86 nor ARM ({machine})"
    return TARGETS["portable"], f"the CPU {why}: 7-bit weights answer the same everywhere"


def target_name(quantization: Mapping[str, Any] | None) -> str | None:
    """Return the name of the target in a manifest's `quantization`, or None if it has none."""
    name = (quantization or {}).get("target")
    return name if isinstance(name, str) else None


def mismatch(name: str) -> str | None:
    """Return what to warn of where a file for the target `name` runs on this CPU; None where there is nothing."""
    if name not in TARGETS:
        return f"its target {name!r} is not known to this vit-edge: a newer one could compare it with this CPU"
    wanted, found = TARGETS[name], cpu.instructions()
    if wanted.weight_bits == 8 and cpu.is_x86() and not found.names & set(cpu.VNNI):
        return _saturates(name, complete=found.complete)
    if wanted.name != DEFAULT_TARGET and not wanted.instructions:
        return f"it was quantized for {wanted.device}, and runs on the CPU here: {_better_here(name)}"
    if not wanted.instructions or found.names & set(wanted.instructions):
        return None
    if cpu.is_arm() and not found.names & set(TARGETS["arm-dotprod"].instructions):
        why = "this CPU has no dot products of 8 bits: predictions stay right, but INT8 gains little"
        return f"its target is {name}; {why}; compare with the float file: vit-edge benchmark"
    return f"its target is {name}, and this CPU is {cpu.instruction_set()}: {_better_here(name)}"


def _saturates(name: str, *, complete: bool) -> str:
    remedy = "quantize with --target portable"
    if not complete:
        why = "this system does not report VNNI; without VNNI 8-bit weights saturate, and predictions differ"
        return f"its target is {name}; {why} from those verified; run `vit-edge verify` here, or {remedy}"
    why = "this CPU has no VNNI: 8-bit weights saturate here: predictions differ from those verified"
    return f"its target is {name}; {why}; {remedy}"


def _better_here(name: str) -> str:
    chosen = choose_target({"cpu": cpu.cpu_report()})
    return f"{name} was not measured there; for this CPU, quantize with --target {chosen.name}"


def _has_openvino(report: Mapping[str, Any]) -> bool:
    engines = report.get("engines")
    entries = [entry for entry in engines if isinstance(entry, Mapping)] if isinstance(engines, list) else []
    return any(e.get("name") == "openvino" and e.get("installed") and not e.get("error") for e in entries)


def _cpu_of(report: Mapping[str, Any]) -> tuple[str, frozenset[str], bool]:
    """Return (machine, instructions, whether the list is complete) of a report; raises InputError."""
    found = report.get("cpu")
    if not isinstance(found, Mapping):
        raise _not_a_report(None, "the report has no CPU (cpu)")
    machine, names = found.get("machine"), found.get("instructions")
    if not isinstance(machine, str) or not machine:
        raise _not_a_report(None, "the report has no CPU type (cpu.machine)")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _not_a_report(None, "the report does not list the CPU's instructions (cpu.instructions)")
    return machine, frozenset(names), found.get("instructions_complete") is True


def _read_report(path: str) -> Mapping[str, Any]:
    data = read_file(path, what="device's report", max_bytes=_REPORT_BYTES)
    try:
        report = json.loads(data)  # as bytes: PowerShell's `>` writes UTF-16
    except (ValueError, RecursionError) as error:
        raise _not_a_report(path, f"the report is not JSON ({error})"[:200]) from error
    if not isinstance(report, dict) or report.get("command") != "doctor":
        raise _not_a_report(path, "the report is not what `vit-edge doctor --json` prints")
    schema = report.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise _not_a_report(path, f"the report's schema is {schema!r}")
    if schema > _REPORT_SCHEMA:
        reason = f"the report has schema {schema}; this vit-edge reads up to {_REPORT_SCHEMA}"
        raise InputError("cannot choose a target", file=path, reason=reason, remedy="install a newer vit-edge")
    return report


def _not_a_report(path: str | None, reason: str) -> InputError:
    remedy = "on the device, run `vit-edge doctor --json > device.json`, and give that file"
    return InputError("cannot choose a target", file=path, reason=reason, remedy=remedy)
