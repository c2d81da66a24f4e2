"""Where the nodes of a session ran, by the profile of one run: what a provider says of itself was seen to be wrong.

WebGPU's list of assigned nodes named 4 of 62, all on the CPU; QNN named itself first while every node ran there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Placement", "read_placement"]

_CPU = "CPUExecutionProvider"
_KERNEL = "_kernel_time"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How many nodes each provider ran, and the share of the multiply-accumulates that did not run on the CPU."""

    nodes: Mapping[str, int]
    share: float


def read_placement(profile: Path, *, macs: int | None) -> Placement:
    """Return the placement from a profile that ONNX Runtime wrote of one run.

    `macs` are those of the run. If they are unknown, they are counted in the profile: nodes that a provider compiled
    into one are missing there, so that its share is too low rather than too high.
    """
    events = [event for event in json.loads(profile.read_bytes()) if str(event.get("name", "")).endswith(_KERNEL)]
    of_provider = Counter[str]()
    for event in events:
        of_provider[event["args"]["provider"]] += _macs(event["args"])
    nodes = Counter[str](event["args"]["provider"] for event in events)
    total = macs or sum(of_provider.values())
    # Without any product the nodes have to do.
    on_cpu = of_provider[_CPU] / total if total else nodes[_CPU] / max(1, sum(nodes.values()))
    return Placement(nodes=dict(nodes), share=max(0.0, 1.0 - on_cpu))


def _macs(args: Mapping[str, Any]) -> int:
    """Return the multiply-accumulates of one node, from its shapes: its outputs times the length of each sum."""
    kind, inputs, outputs = args["op_name"], _shapes(args["input_type_shape"]), _shapes(args["output_type_shape"])
    if "Conv" in kind:
        kernel = next((shape for shape in inputs[1:] if len(shape) > 2), [])
        return math.prod(outputs[0]) * math.prod(kernel[1:]) if kernel else 0
    if "MatMul" in kind or "Gemm" in kind:
        return math.prod(outputs[0]) * inputs[0][-1] if inputs[0] else 0
    return 0


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> list[list[int]]:
    """Return the shapes of the tensors of a node: the profile has each as {type: shape}."""
    return [list(shape) for entry in entries for shape in entry.values()]
