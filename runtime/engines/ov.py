"""OpenVINO, on the CPU or on another device that it has a plugin for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge.errors import Closed, EngineUnavailable, ModelRejected
from vit_edge.files import temporary_folder
from vit_edge.image import Pixels
from vit_edge.machine.telemetry import openvino_without_telemetry
from vit_edge.model_file.artifact import ModelFile
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.engines.devices import DEVICES, known_as, unavailable
from vit_edge.runtime.engines.ov_graph import avoid_int8, read_graph, runs_slower_in_int8, why_no_int8
from vit_edge.runtime.engines.protocol import (
    Array,
    EngineOptions,
    Logits,
    Model,
    answer,
    batch_of,
    log_fallback,
    private_copy,
)

with openvino_without_telemetry():
    import openvino

__all__ = ["ENGINE", "OpenVinoEngine", "as_ir", "compile_model", "devices_here", "is_as_asked"]

# Our words for precisions -> those of OpenVINO.
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class OpenVinoEngine:
    """One compiled model with one InferRequest behind a lock, nothing shared with the caller.

    Sharing either gave 303 to 928 wrong answers of 960 from 16 threads, without an exception.
    """

    name = "openvino"

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self._manifest = model.manifest
        self.version: str = openvino.__version__.split("-")[0]
        self.batch_size = batch_of(model.manifest, options)
        self._compiled, self.fallback = _compile_somewhere(model, options)
        ran = replace(options, device="cpu", float_precision=None) if self.fallback else options
        self.device, nodes = _read_devices(self._compiled)
        self.int8_fallback = why_no_int8(self._compiled.get_runtime_model(), model.manifest.precision)
        self.placement: Mapping[str, int] | None = nodes
        if not is_as_asked(ran.device, self.device):
            reason = f"OpenVINO runs it on {self.device!r}, not on {ran.device!r}"
            raise EngineUnavailable("cannot load", reason=reason, remedy="ask for that device, or for 'auto'")
        threads = int(_property(self._compiled, "INFERENCE_NUM_THREADS") or options.num_threads * options.streams)
        self.threads = max(1, threads // options.streams)
        self.float_precision = _read_precision(self._compiled)
        expected = _precision(ran)
        if self.float_precision not in (expected, "unknown"):
            reason = f"OpenVINO runs it in {self.float_precision} on {self.device}, not in {expected}"
            remedy = f"ask for {self.float_precision} or float32"
            raise EngineUnavailable("cannot load", reason=reason, remedy=remedy)
        self._request: Any
        self._given: Any
        self._open_request()

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return logits float32 [batch, classes]."""
        return answer(self, self._manifest, images_NHWC)

    def tensors(self, images: Array, names: Sequence[str]) -> list[Array]:
        """Return the outputs `names`."""
        with self._lock:
            request = self._request
            if request is None:
                raise Closed("cannot run", reason="the engine is closed", remedy="load the model again")
            try:
                self._give(request, images)
                request.infer(share_outputs=True)
                return [np.array(request.get_tensor(name).data) for name in names]  # a copy: the next run overwrites it
            except Exception as error:  # its exceptions share no base but this
                raise _failed("run", error) from error

    def _give(self, request: Any, images: Array) -> None:
        """Copy the images into memory of the request's own, which it keeps while their shape stays.

        Nothing is shared with the caller. Handing them over in each call takes longer: 223 microseconds where this
        takes 200 (digits, batch 1, one thread).
        """
        given = self._given
        if given is None or given.data.shape != images.shape or given.data.dtype != images.dtype:
            given = openvino.Tensor(openvino.Type(images.dtype), openvino.Shape(images.shape))
            request.set_tensor(self._manifest.input["name"], given)
            self._given = given
        given.data[...] = images

    def twin(self) -> OpenVinoEngine:
        """Return another engine over the same compiled model, with a request of its own."""
        made = object.__new__(OpenVinoEngine)
        made.__dict__.update(self.__dict__)
        made._open_request()  # a lock and a request of its own
        return made

    def close(self) -> None:
        """Free the request and the compiled model, unless a twin still has it."""
        with self._lock:
            self._request = self._compiled = self._given = None

    def _open_request(self) -> None:
        self._lock = threading.Lock()
        self._request = self._compiled.create_infer_request()
        self._given = None


def compile_model(model: Model, options: EngineOptions, *, profile: bool = False) -> Any:
    """Return what OpenVINO compiles from the verified bytes, with `profile` to time each node.

    Raises ModelRejected, or EngineUnavailable where the device is not here.
    """
    known = known_as(options.device, "openvino")
    if known is None or not _is_among(known[0], _core().available_devices):
        there_is = ", ".join(devices_here()) or "none"
        raise unavailable(options.device, f"{there_is} in OpenVINO {openvino.__version__.split('-')[0]}")
    settings: dict[str, Any] = {
        # Its own choice is bfloat16 where the CPU has it: logits off by up to 0.3.
        "INFERENCE_PRECISION_HINT": _PRECISIONS[_precision(options)],
        "PERFORMANCE_HINT": "LATENCY" if options.streams == 1 else "THROUGHPUT",
        "PERF_COUNT": profile,
    }
    if known[0] == "CPU":
        threads = options.num_threads * options.streams  # of all streams together
        settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": options.streams}
    try:
        # Unless it is asked for, the batch stays dynamic: with a fixed one OpenVINO takes other kernels, and an INT8
        # network gives other logits (DeiT-tiny: 24.8 dB apart) than those that were verified.
        return _compile(_core(), model, known[0], settings, options.batch_size)
    except Exception as error:  # its exceptions share no base but this
        raise _failed("load", error) from error


def devices_here() -> list[str]:
    """Return the devices that OpenVINO finds here, the first of each kind without its number."""
    return [str(name).lower().removesuffix(".0") for name in _core().available_devices]


def is_as_asked(asked: str, runs: str) -> bool:
    """Return whether the device that runs is the one asked for: "gpu.0" is "gpu", and "auto" may be any."""
    return asked == "auto" or asked.removesuffix(".0") == runs.removesuffix(".0")


def _compile_somewhere(model: Model, options: EngineOptions) -> tuple[Any, str | None]:
    """Return what was compiled for the device asked for, or for the CPU with the reason where that is allowed."""
    try:
        return compile_model(model, options), None
    except (EngineUnavailable, ModelRejected) as error:
        if not options.allow_fallback or options.device == "cpu":
            raise
        on_cpu = replace(options, device="cpu", float_precision=None)
        return compile_model(model, on_cpu), log_fallback(f"it runs on the CPU: {error.reason}")


def _is_among(device: str, here: Sequence[str]) -> bool:
    """Return whether OpenVINO can take the device: "GPU" is the first of "GPU.0", "GPU.1"; AUTO chooses of all."""
    return device == "AUTO" or device in here or f"{device}.0" in here


def _precision(options: EngineOptions) -> str:
    known = known_as(options.device, "openvino")
    chosen = options.float_precision or (known[1].float_precision if known else "float32")
    if chosen not in _PRECISIONS:
        reason = f"OpenVINO does not compute in {chosen}; it can in {', '.join(_PRECISIONS)}"
        raise EngineUnavailable("cannot load", reason=reason, remedy="choose one of these, or another engine")
    return chosen


def _read_devices(compiled: Any) -> tuple[str, dict[str, int] | None]:
    """Return the device that runs, by our name, and how many nodes of the compiled graph run on each."""
    running = [str(name) for name in _property(compiled, "EXECUTION_DEVICES") or ["CPU"]]
    kind, _, number = running[0].strip("()").partition(".")
    device = next((name for name, entry in DEVICES.items() if entry.openvino == kind), kind.lower())
    nodes = len(compiled.get_runtime_model().get_ops()) if len(running) == 1 else None
    return (f"{device}.{number}" if number else device), None if nodes is None else {running[0]: nodes}


def _read_precision(compiled: Any) -> str:
    found = _property(compiled, "INFERENCE_PRECISION_HINT")
    name = None if found is None else str(found.to_string())
    return next((ours for ours, theirs in _PRECISIONS.items() if theirs == name), name or "unknown")


def _property(compiled: Any, name: str) -> Any:
    """Return a property of what was compiled; None where its device has no such."""
    try:
        return compiled.get_property(name)
    except Exception:  # its exceptions share no base but this
        return None


@functools.cache
def _core() -> Any:
    """Return the one Core of this process, kept to its end.

    Its CPU plugin gives the thread a signal stack of its own and puts the former one back when it goes. Of two that go
    in the order they came, the second puts back the stack that the first has freed, and the next signal, Ctrl-C too,
    ends the process with a segmentation fault (2026.4).
    """
    return openvino.Core()


def _compile(core: Any, model: Model, device: str, settings: dict[str, Any], batch_size: int | None) -> Any:
    """Compile from the verified bytes."""
    if isinstance(model, ModelFile) and model.weights is not None:
        with private_copy(model) as path:
            graph = core.read_model(path)
            _fix_batch(graph, batch_size)
            return core.compile_model(graph, device, settings)
    graph = read_graph(core, model)
    _fix_batch(graph, batch_size)
    if device == "CPU" and runs_slower_in_int8(graph):
        settings = settings | avoid_int8(graph)
    return core.compile_model(graph, device, settings)


def _fix_batch(graph: Any, batch_size: int | None) -> None:
    if batch_size is not None:
        graph.reshape([batch_size, *list(graph.input(0).get_partial_shape())[1:]])


def as_ir(model: Model) -> tuple[bytes, bytes]:
    """Return the graph that the engine runs as OpenVINO IR: its .xml and its .bin."""
    if isinstance(model, IrModel):
        return model.xml, model.weights
    with temporary_folder() as name:
        path = Path(name) / "model.xml"
        openvino.save_model(read_graph(_core(), model), path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def _failed(verb: str, error: Exception) -> ModelRejected:
    reason = " ".join(str(error).split())[:300]
    remedy = "export it again, or update OpenVINO"
    return ModelRejected(f"OpenVINO {openvino.__version__} cannot {verb} the model", reason=reason, remedy=remedy)


ENGINE = OpenVinoEngine
