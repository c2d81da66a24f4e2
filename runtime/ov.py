"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from vit_edge.artifact import ModelFile
from vit_edge.errors import ModelRejected, UsageError
from vit_edge.image import Pixels
from vit_edge.runtime.engine import Array, EngineOptions, Logits, answer, private_copy

__all__ = ["ENGINE", "OpenVinoEngine", "compile_model", "read_graph"]

# What the manifest's entry on quantization calls the list of roundings that are there for ONNX Runtime alone.
_SKIPS = "openvino_skips"
# ... and the largest values of the tensors that are int8 in OpenVINO alone, by their names.
_ROUNDS, _LARGEST_PEAK = "openvino_rounds", 1e30


class OpenVinoEngine:
    """One compiled model with one InferRequest behind a lock, nothing shared with the caller.

    Sharing either gave 303 to 928 wrong answers of 960 from 16 threads, without an exception.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, model: ModelFile, options: EngineOptions) -> None:
        self._manifest = model.manifest
        self.version: str = openvino.__version__.split("-")[0]
        self._lock = threading.Lock()
        self._compiled: Any = compile_model(model, options)
        self.threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))
        self.float_precision = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        self._request: Any = self._compiled.create_infer_request()
        if self.float_precision != "f32":
            raise _failed("load", RuntimeError(f"it runs in {self.float_precision}, not in f32"))

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return logits float32 [batch, classes]."""
        return answer(self, self._manifest, images_NHWC)

    def tensors(self, images: Array, names: Sequence[str]) -> list[Array]:
        """Return the outputs `names`."""
        inputs = {self._manifest.input["name"]: images}
        with self._lock:
            if self._request is None:
                raise UsageError("cannot run", reason="the engine is closed", remedy="load the model again")
            try:
                results = self._request.infer(inputs, share_inputs=False, share_outputs=False)
            except Exception as error:  # its exceptions share no base but this
                raise _failed("run", error) from error
            return [np.array(results[name]) for name in names]

    def close(self) -> None:
        """Free the request and the compiled model."""
        with self._lock:
            self._request = self._compiled = None


def compile_model(model: ModelFile, options: EngineOptions, *, profile: bool = False) -> Any:
    """Return what OpenVINO compiles from the verified bytes, with `profile` to time each node; raises ModelRejected."""
    settings = {
        # Its own choice is bfloat16 where the CPU has it: logits off by up to 0.3.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": options.num_threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": profile,
    }
    try:
        # The batch stays dynamic: with a fixed one OpenVINO takes other kernels, and an INT8 network gives other
        # logits (DeiT-tiny: 24.8 dB apart) than those that were verified.
        return _compile(_core(), model, settings)
    except Exception as error:  # its exceptions share no base but this
        raise _failed("load", error) from error


@functools.cache
def _core() -> Any:
    """Return the one Core of this process, kept to its end.

    Its CPU plugin gives the thread a signal stack of its own and puts the former one back when it goes. Of two that go
    in the order they came, the second puts back the stack that the first has freed, and the next signal, Ctrl-C too,
    ends the process with a segmentation fault (2026.4).
    """
    return openvino.Core()


def _compile(core: Any, model: ModelFile, settings: dict[str, Any]) -> Any:
    """Compile from the verified bytes."""
    if model.weights is None:
        return core.compile_model(read_graph(core, model), "CPU", settings)
    with private_copy(model) as path:
        return core.compile_model(core.read_model(path), "CPU", settings)


def read_graph(core: Any, model: ModelFile) -> Any:
    """Return the graph as OpenVINO reads it, with what the manifest says is for OpenVINO alone."""
    graph = core.read_model(model.data)
    recorded = model.manifest.quantization or {}
    _skip(graph, set(recorded.get(_SKIPS, ())))
    _round(graph, recorded.get(_ROUNDS, {}))
    return graph


def _skip(graph: Any, names: set[str]) -> None:
    """Take the roundings that end in the DequantizeLinear nodes `names` out of the graph.

    Integers at both sides of a convolution are what ONNX Runtime needs; OpenVINO computes the activation behind it in
    float before it rounds, at no cost (mobilenet_v3_small: 1.35 ms without these roundings, 2.3 ms with, float 2.1).
    """
    for end in graph.get_ordered_ops() if names else ():
        if end.get_friendly_name() in names and end.get_type_name() == "Multiply":
            start = end
            while start.get_type_name() in ("Convert", "Multiply", "Subtract"):
                start = start.input_value(0).get_node()
            if start.get_type_name() == "FakeQuantize":
                for reader in end.output(0).get_target_inputs():
                    reader.replace_source_output(start.input_value(0))


def _round(graph: Any, peaks: Mapping[str, float]) -> None:
    """Let what reads the tensors of `peaks` read them in int8, evenly around zero up to the peak.

    OpenVINO's attention is faster with queries and keys in integers, ONNX Runtime's is not: the file has them float.
    """
    if not all(isinstance(peak, int | float) and 0 < peak < _LARGEST_PEAK for peak in peaks.values()):
        raise ValueError(f"the manifest's {_ROUNDS} are not sizes of tensors")
    outputs = [output for node in graph.get_ordered_ops() for output in node.outputs()] if peaks else []
    for output in outputs:
        peak = next((peaks[name] for name in sorted(output.get_names()) if name in peaks), None)
        if peak is not None:
            readers = list(output.get_target_inputs())
            low, high = (opset13.constant(np.float32(end)) for end in (-peak * 128 / 127, peak))
            rounded = opset13.fake_quantize(output, low, high, low, high, 256)
            for reader in readers:
                reader.replace_source_output(rounded.output(0))


def _failed(verb: str, error: Exception) -> ModelRejected:
    reason = " ".join(str(error).split())[:300]
    remedy = "export it again, or update OpenVINO"
    return ModelRejected(f"OpenVINO {openvino.__version__} cannot {verb} the model", reason=reason, remedy=remedy)


ENGINE = OpenVinoEngine
