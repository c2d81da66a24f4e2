"""A small ViT's graph to calibrate, and a child process that does: shared by the tests of calibration and its cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from tests.conftest import ROOT
from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.export.quantization.qdq.placement import find_quantizable_ops
from vit_edge.export.tracing.tracer import trace
from vit_edge.runtime.checks.golden import golden_images

IMAGES = list(golden_images(range(21), height=SIZE[0], width=SIZE[1]))

# Calibrates on `count` images in a process of its own; says its ranges, or kills itself before image `stop`.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np, onnx
from vit_edge.export.quantization.calibration.observers import observe_ranges
from vit_edge.export.quantization.calibration.cache import CalibrationCache
from vit_edge.runtime.checks.golden import golden_images
model, tensor, folder, method, count, stop = sys.argv[1:]

class Images:
    def __iter__(self):
        for number in range(int(count)):
            if number == int(stop):
                os.kill(os.getpid(), signal.SIGKILL)
            yield golden_images([number % 21], height=24, width=16)[0]

cache = CalibrationCache(folder=Path(folder), snapshot_s=0) if folder else None
found = observe_ranges(onnx.load(model), tensor.split(","), Images(), method=method, batch_size=4, cache=cache)
print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sep="|")
"""


Started = Callable[..., "subprocess.Popen[str]"]


def small_graph() -> onnx.ModelProto:
    """Return the graph of a small ViT that takes pixels."""
    from vit_edge.export.tracing.fused_vit import DeployedViT

    network = DeployedViT(random_network(small_config()), PREPROCESSING, pixels=True, extras=[]).eval()
    return trace(network, height=SIZE[0], width=SIZE[1])


def inputs_of_ops(graph: onnx.ModelProto) -> list[str]:
    return [op.input for op in find_quantizable_ops(graph) if not op.takes_pixels]


def start_child(
    model: Path, tensors: Sequence[str], folder: str | Path, *, method: str = "entropy", count: int = 21, stop: int = -1
) -> subprocess.Popen[str]:
    arguments = [str(model), ",".join(tensors), str(folder), method, str(count), str(stop)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE)
