"""INT8 files by other tools and by ours, each made in a process of its own, with its time and its peak memory.

Every tool gets our float file (the fused graph; without its manifest, which only we read), the same calibration
images through the same preprocessing, its own defaults, and every thread it takes by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.data import find_images, stream_pixels
from vit_edge.errors import VitEdgeError
from vit_edge.model_file.artifact import ModelFile, open_model

OURS = "vit-edge"
ORT_STATIC, ORT_DYNAMIC = "ONNX Runtime quantize_static", "ONNX Runtime quantize_dynamic"
NNCF_TRANSFORMER, NNCF_PLAIN = "NNCF TRANSFORMER", "NNCF without model type"
_TIMEOUT_S = 7200


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A file, the wall-clock time of the process that made it (imports and all), and the most memory it had."""

    path: Path
    seconds: float
    peak_rss_bytes: int
    images: int


def make(method: str, float_model: Path, *, calibration: Path, folder: Path, options: Sequence[str] = ()) -> Made:
    """Return the INT8 file that `method` makes of `float_model`; `options` are those of `vit-edge quantize`.

    Raises VitEdgeError with the end of what the process said.
    """
    name = re.sub(r"[^a-z0-9]+", "-", " ".join((float_model.stem, method, *options)).lower())
    out = folder / f"{name}.{'xml' if method in (NNCF_TRANSFORMER, NNCF_PLAIN) else 'onnx'}"
    report = folder / f"{name}.json"
    job = {"method": method, "model": str(float_model), "calibration": str(calibration), "out": str(out)}
    command = [sys.executable, __file__, json.dumps({**job, "report": str(report), "options": list(options)})]
    print(f"making: {out.name}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    # NNCF tells its makers over the network that it was used, but for this variable.
    environment = {**os.environ, "NNCF_CI": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        reason = f"its process ended with {done.returncode}: {' '.join(done.stderr.split())[-500:]}"
        raise VitEdgeError(f"{method} makes no file", file=float_model, reason=reason, remedy="run it by itself")
    return Made(path=out, seconds=seconds, **json.loads(report.read_bytes()))


def why_not(method: str) -> str | None:
    """Return why `method` cannot run here, or None."""
    if method in (NNCF_TRANSFORMER, NNCF_PLAIN) and importlib.util.find_spec("nncf") is None:
        return 'nncf is not installed (pip install -e ".[bench]")'
    return None


def main(text: str) -> None:
    """Do one job in this process, and write what it took."""
    job = json.loads(text)
    images = _ours(job) if job["method"] == OURS else _PEERS[job["method"]](open_model(job["model"]), job)
    report = {"peak_rss_bytes": _peak_rss_bytes(), "images": images}
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


def _ours(job: dict[str, Any]) -> int:
    """Run `vit-edge quantize` as a person does, in this process."""
    from vit_edge.__main__ import run

    sys.argv = ["vit-edge", "quantize", job["model"], "--calibration", job["calibration"], "-o", job["out"]]
    sys.argv += job["options"]
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise
    return len((open_model(job["out"], warn=False).manifest.quantization or {})["images"])


def _inputs(model: ModelFile, calibration: str) -> list[Any]:
    """Return what the graph takes for each calibration image, batch 1."""
    manifest = model.manifest
    images = stream_pixels(find_images(calibration), manifest.preprocessing)
    return [manifest.network_input(pixels[None]) for _, pixels in images]


def _ort_static(model: ModelFile, job: dict[str, Any]) -> int:
    """Quantize with the defaults: QDQ, min-max, every operator it knows, inputs and outputs.

    Its min-max calibrator keeps two numbers a tensor and image: 0.40 GB for 40 images of DeiT-tiny, 0.39 for 10.
    (Entropy and percentile keep every activation: 7.4 GB for 64.) So all images go in.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    inputs = _inputs(model, job["calibration"])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else {model.manifest.input["name"]: found}

    quantize_static(model.graph(), job["out"], Reader())
    return len(inputs)


def _ort_dynamic(model: ModelFile, job: dict[str, Any]) -> int:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model.graph(), job["out"])
    return 0


def _nncf(model: ModelFile, job: dict[str, Any]) -> int:
    """Quantize with `model_type=TRANSFORMER`, or without; one sample is one image, as NNCF expects it.

    NNCF needs no torch for OpenVINO's graphs but imports it wherever it is: hidden, as its memory is not NNCF's need.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    import nncf
    import openvino

    inputs = _inputs(model, job["calibration"])
    kind = nncf.ModelType.TRANSFORMER if job["method"] == NNCF_TRANSFORMER else None
    graph = openvino.Core().read_model(model.data)
    # Its default is 300 samples at most.
    quantized = nncf.quantize(graph, nncf.Dataset(inputs), model_type=kind, subset_size=max(300, len(inputs)))
    openvino.save_model(quantized, job["out"], compress_to_fp16=False)
    return len(inputs)


def _peak_rss_bytes() -> int:
    """Return the most memory that this process or any child of it had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    # The kernel's ru_maxrss would start at what the parent had when it forked; this does not.
    own = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024  # both in KiB on Linux


_PEERS: dict[str, Callable[[ModelFile, dict[str, Any]], int]] = {
    ORT_STATIC: _ort_static,
    ORT_DYNAMIC: _ort_dynamic,
    NNCF_TRANSFORMER: _nncf,
    NNCF_PLAIN: _nncf,
}

if __name__ == "__main__":
    main(sys.argv[1])
