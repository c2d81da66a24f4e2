"""What INT8 products give by ONNX's own definition, and whether this machine's CPU sums them exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from vit_edge.machine.cpu import VNNI, instructions, is_x86


def sums_exactly(bits: int) -> bool:
    """Return whether engines on this CPU sum products of uint8 and weights of so many bits without saturating.

    x86 without VNNI sums two products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not.
    """
    return bits <= 7 or not is_x86() or bool(instructions().names & set(VNNI))


needs_vnni = pytest.mark.skipif(not sums_exactly(8), reason="8-bit weights saturate on an x86 CPU without VNNI")


def run_as_defined(model: onnx.ModelProto, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the first output, every operator computed in numpy as ONNX defines it: the same on any CPU."""
    return np.asarray(ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})[0])
