"""Run as a subprocess: convert a model file to OpenVINO's IR, read it back, and write its logits.

OpenVINO names tensors after a counter of the process: only a fresh one gives the same bytes every time.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from vit_edge.errors import VerificationFailed
from vit_edge.export.parity.parity import BATCHES
from vit_edge.files import temporary_folder
from vit_edge.image import Pixels
from vit_edge.machine.telemetry import openvino_without_telemetry
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.model_file.openvino_ir import NO_SEAL, seal_ir
from vit_edge.model_file.writing import write_model
from vit_edge.runtime.checks.golden import Tolerance, differences
from vit_edge.runtime.checks.sandbox import start_of
from vit_edge.runtime.engines.protocol import Logits

__all__ = ["convert_to_ir", "main"]

_MODEL, _BARE, _XML, _BIN = "model.onnx", "bare.onnx", "model.xml", "model.bin"
_LOGITS = ".logits.npy"
_TIMEOUT_S = 3600


def convert_to_ir(
    model: ModelFile, *, images_NHWC: Pixels, expected_BK: Logits, tolerance: Tolerance
) -> tuple[bytes, bytes]:
    """Return the sealed `.xml` and the `.bin` of a model file, uncompressed, with its manifest in the rt_info.

    What OpenVINO reads back has to give `expected_BK`, at every batch size of the proof; raises VerificationFailed.
    """
    with temporary_folder() as name:
        folder = Path(name)
        write_model(folder / _MODEL, model)
        sizes = BATCHES if model.manifest.batch is None else (model.manifest.batch,)
        for size in sizes:
            images = np.resize(images_NHWC, (size, *images_NHWC.shape[1:]))  # repeated as often as needed
            np.save(folder / f"{size}.npy", model.manifest.network_input(images))
        command = [sys.executable, "-c", start_of("vit_edge.export.tracing.openvino_ir"), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            raise _failed(f"OpenVINO ends with {done.returncode}: {done.stderr.strip()[-300:]}")
        for size in sizes:
            expected = np.resize(expected_BK, (size, expected_BK.shape[1]))
            problems = differences(expected, np.load(folder / f"{size}{_LOGITS}"), tolerance)
            if problems:
                raise _failed(f"read back, at batch {size}: {'; '.join(problems)}")
        xml, weights = (folder / _XML).read_bytes(), (folder / _BIN).read_bytes()
    return seal_ir(xml, weights), weights


def main(name: str) -> int:
    """Convert, and run what was converted."""
    with openvino_without_telemetry():
        import openvino

    folder = Path(name)
    model = open_model(folder / _MODEL, warn=False)
    graph = model.graph()
    # By path: weights that lie next to the file are found from there.
    (folder / _BARE).write_bytes(graph.SerializeToString(deterministic=True))
    core = openvino.Core()
    converted = core.read_model(folder / _BARE)
    # Its weights lie in the `.bin`, whatever file they came from.
    manifest = replace(model.manifest, weights=None)
    converted.set_rt_info(manifest.to_json(), ["vit_edge", "manifest"])
    converted.set_rt_info(NO_SEAL, ["vit_edge", "seal"])
    # Its default halves the weights to float16.
    openvino.save_model(converted, folder / _XML, compress_to_fp16=False)
    read = core.read_model((folder / _XML).read_bytes(), (folder / _BIN).read_bytes())
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for path in list(folder.glob("*.npy")):
        found = compiled({model.manifest.input["name"]: np.load(path)})[model.manifest.output]
        np.save(folder / f"{path.stem}{_LOGITS}", found)
    return 0


def _failed(reason: str) -> VerificationFailed:
    remedy = "export it with --format onnx, which OpenVINO reads too"
    return VerificationFailed("the converted IR is not the network", reason=reason, remedy=remedy)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
