"""Which engine runs INT8 fast on which class of CPU.

Measured on AMD Zen 3 and on Intel with VNNI and AVX-512 masked (DeiT-tiny, batch 1, one thread, OpenVINO 2026.4, ONNX
Runtime 1.32): on x86 CPUs without VNNI an INT8 MatMul in OpenVINO is slower than a float32 one, 0.74 to 0.83 times as
fast; an INT8 convolution is faster in OpenVINO, and an INT8 MatMul in ONNX Runtime. CPUs with AVX-512 and no VNNI have
kernels of their own, not measured.
"""

from __future__ import annotations

from vit_edge.machine import cpu

__all__ = ["engine_advice", "lacks_int8_matmul", "why_float32"]

_WITHOUT_VNNI = "openvino-avx2"
_SLOWER = "this CPU has no VNNI: OpenVINO's INT8 MatMul would be slower than float32, which runs instead"
_ONE_SIDED = f"the target is {_WITHOUT_VNNI}: ONNX Runtime computes its convolutions in float32"
# Kernels of their own, with either of these.
_OTHER_KERNELS = (*cpu.VNNI, "avx512bw")


def lacks_int8_matmul(machine: str | None = None, found: cpu.Instructions | None = None) -> bool:
    """Return whether OpenVINO's INT8 MatMul is slower than float32 on a CPU, by default this one."""
    found = found or cpu.instructions()
    return cpu.is_x86(machine) and found.complete and not found.names & set(_OTHER_KERNELS)


def why_float32(engine: str, target: str | None) -> str | None:
    """Return why an engine runs the ops of an INT8 file in float32 here, if it does."""
    if engine == "openvino":
        return _SLOWER if lacks_int8_matmul() else None
    return _ONE_SIDED if target == _WITHOUT_VNNI else None


def engine_advice(target: str | None) -> str | None:
    """Return in one line which engine to use on which class of CPU for an INT8 file; None if its target decides it."""
    if target == _WITHOUT_VNNI:
        return "openvino on x86 CPUs without VNNI; onnxruntime runs the ops of this file in float32"
    if target == "portable":
        return (
            "openvino or onnxruntime on x86 CPUs with VNNI, onnxruntime on those without: there openvino runs the ops "
            f"in float32 (--target {_WITHOUT_VNNI} makes a file that it runs in INT8)"
        )
    return None
