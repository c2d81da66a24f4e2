"""ONNX Runtime, on the CPU or on the device of one of its other providers."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vit_edge.errors import Closed, EngineUnavailable, ModelRejected
from vit_edge.files import temporary_folder
from vit_edge.image import Pixels
from vit_edge.machine.int8_engines import why_float32
from vit_edge.machine.targets import target_name
from vit_edge.model_file.artifact import Manifest, ModelFile
from vit_edge.runtime.engines.devices import DEVICES, known_as, unavailable
from vit_edge.runtime.engines.placement import read_placement
from vit_edge.runtime.engines.protocol import Array, EngineOptions, Logits, answer, batch_of, log_fallback, private_copy

__all__ = ["ENGINE", "OnnxRuntimeEngine", "devices_here", "make_session"]

_CPU = "CPUExecutionProvider"
# It prints what it logs, and everything that fails is said by its exception too.
_FATAL = 4
# This fusion turns a product of two-dimensional input, such as the head, into Gemm before integers are recognised: its
# weights are then converted back to float at every run. (With a fixed batch it hits every product: 2.61 ms, not 0.37.)
_DISABLED_OPTIMIZERS = ["MatMulAddFusion"]
# Providers in packages of their own.
_PLUGINS = {"QNNExecutionProvider": "onnxruntime_qnn"}
# What the float parts can be computed in, by provider; the first is what runs where nothing is asked for. CUDA's own
# choice is TF32, 10 bits of mantissa; others than these compute as they do, and say nothing of it.
_PRECISIONS: dict[str, dict[str, dict[str, str]]] = {
    _CPU: {"float32": {}},
    "CUDAExecutionProvider": {"float32": {"use_tf32": "0"}},
    "TensorrtExecutionProvider": {"float32": {"trt_fp16_enable": "0"}, "float16": {"trt_fp16_enable": "1"}},
    "OpenVINOExecutionProvider": {"float32": {"precision": "FP32"}, "float16": {"precision": "FP16"}},
}


# Those that live: a child after a fork must never free one, whose threads are not there to be joined.
_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep_for_ever() -> None:
    for session in list(_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_for_ever)


class OnnxRuntimeEngine:
    """One InferenceSession; it is safe to call from several threads (9,600 of 9,600 answers bitwise equal)."""

    name = "onnxruntime"

    def __init__(self, model: ModelFile, options: EngineOptions) -> None:
        self._manifest = model.manifest
        self.version: str = onnxruntime.__version__
        self.batch_size = batch_of(model.manifest, options)
        with temporary_folder() as folder:
            self._open(model, options, Path(folder) / "profile")

    def _open(self, model: ModelFile, options: EngineOptions, profile: Path) -> None:
        """Open the session, read back what it is, and check where it runs."""
        self._session, self.fallback = _open_session(model, options, profile)
        _sessions.add(self._session)
        self.threads = int(self._session.get_session_options().intra_op_num_threads)
        provider = self._session.get_providers()[0]
        self.device = next(name for name, device in DEVICES.items() if device.onnxruntime == provider)
        self.float_precision = _read_precision(self._session)
        self.int8_fallback = why_float32(self.name, target_name(model.manifest.quantization))
        self.placement: Mapping[str, int] | None = _placement(self._session)
        if provider != _CPU:
            self._check_placement(model.manifest, options)

    def _check_placement(self, manifest: Manifest, options: EngineOptions) -> None:
        """Read from the profile of one run where the nodes ran; raise EngineUnavailable if products ran on the CPU."""
        batch = self.batch_size or manifest.batch or 1
        self.run(np.zeros((batch, *manifest.preprocessing.crop, 3), np.uint8))
        macs = sum((manifest.macs or {}).values()) * batch
        found = read_placement(Path(self._session.end_profiling()), macs=macs or None)
        self.placement = found.nodes
        if found.share == 1:
            return
        why = f"{100 * (1 - found.share):.1f} % of the multiply-accumulates run on the CPU, not on {self.device!r}"
        if not options.allow_fallback:
            raise _not_there(options.device, why)
        self.fallback = log_fallback(why)

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return logits float32 [batch, classes]."""
        return answer(self, self._manifest, images_NHWC)

    def tensors(self, images: Array, names: Sequence[str]) -> list[Array]:
        """Return the outputs `names`."""
        session = self._session  # another thread may close the engine meanwhile
        if session is None:
            raise Closed("cannot run", reason="the engine is closed", remedy="load the model again")
        try:
            found: list[Array] = session.run(list(names), {self._manifest.input["name"]: images})
        except Exception as error:  # its exceptions share no base but this
            raise _failed("run", error) from error
        return found

    def twin(self) -> OnnxRuntimeEngine:
        """Return another engine over the same session."""
        made = object.__new__(OnnxRuntimeEngine)
        made.__dict__.update(self.__dict__)
        return made

    def close(self) -> None:
        """Free the session, unless a twin still has it."""
        self._session = None


def make_session(
    model: ModelFile, options: EngineOptions, *, optimised: Path | None = None, profile: Path | None = None
) -> Any:
    """Return a session over the verified bytes; raises ModelRejected, or EngineUnavailable without the device.

    Its optimised graph is written to `optimised`; how long each node takes to a file whose name begins as `profile`.
    """
    _register_plugins()
    known = known_as(options.device, "onnxruntime")
    if known is None or known[0] not in onnxruntime.get_available_providers():
        raise unavailable(options.device, f"{', '.join(devices_here())} in ONNX Runtime {onnxruntime.__version__}")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.num_threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _FATAL
    # Idle threads that spin take a core from the application (onnxruntime#8313).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Releases that do not know this entry take no notice of it.
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if options.batch_size is not None and model.manifest.batch is None:
        settings.add_free_dimension_override_by_name(_name_of_batch(model), options.batch_size)
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    provider = (known[0], _precision(known[0], options)[1])
    try:
        # The CPU takes what a provider has no kernel for, such as casts of pixels; `placement` is read from a profile.
        return _load(model, settings, [provider, *([_CPU] if known[0] != _CPU else [])])
    except Exception as error:  # its exceptions share no base but this
        if known[0] != _CPU:
            raise _not_there(options.device, str(error)) from error
        raise _failed("load", error) from error


def _open_session(model: ModelFile, options: EngineOptions, profile: Path) -> tuple[Any, str | None]:
    """Return a session on the device that was asked for, or on the CPU with the reason where that is allowed.

    On any other device than the CPU its profile is to be ended after the first run.
    """
    expected = known_as(options.device, "onnxruntime")
    try:
        session = make_session(model, options, profile=profile if options.device != "cpu" else None)
        running = session.get_providers()
        if expected and running[0] != expected[0]:
            raise _not_there(options.device, f"it runs on {', '.join(running)}")
        return session, None
    except EngineUnavailable as error:
        if not options.allow_fallback:
            raise
        on_cpu = replace(options, device="cpu", float_precision=None)
        return make_session(model, on_cpu), log_fallback(f"it runs on the CPU: {error.reason}")


def _precision(provider: str, options: EngineOptions) -> tuple[str | None, dict[str, str]]:
    """Return what the float parts are computed in, None if unspecified, and the provider's options for it."""
    possible = _PRECISIONS.get(provider, {})
    chosen: str | None = options.float_precision or next(iter(possible), None)
    if chosen is not None and chosen not in possible:
        reason = f"{provider} does not compute in {chosen}; it can in {', '.join(possible) or 'what it chooses'}"
        raise EngineUnavailable("cannot load", reason=reason, remedy="choose one of these, or another engine")
    return chosen, possible.get(chosen or "", {})


def _read_precision(session: Any) -> str:
    """Return what the float parts are computed in, by the options that the session says it has."""
    provider = session.get_providers()[0]
    actual = session.get_provider_options().get(provider, {})
    for name, options in _PRECISIONS.get(provider, {}).items():
        if all(actual.get(key) == value for key, value in options.items()):
            return name
    return "unknown"


def _placement(session: Any) -> dict[str, int] | None:
    """Return how many nodes each provider runs; None where the release cannot tell."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # older releases have no such method, and later ones may refuse
        return None
    found = Counter[str]()
    for part in parts:
        found[part.ep_name] += len(part.get_nodes())
    return dict(found)


def devices_here() -> list[str]:
    """Return the devices that this build of ONNX Runtime was made for; a load shows whether their drivers are here."""
    _register_plugins()
    present = set(onnxruntime.get_available_providers())
    return [name for name, device in DEVICES.items() if device.onnxruntime in present]


def _register_plugins() -> None:
    """Make providers known that come in a package of their own and are installed."""
    for provider, package in _PLUGINS.items():
        if provider not in onnxruntime.get_available_providers() and importlib.util.find_spec(package) is not None:
            library = importlib.import_module(package).get_library_path()
            onnxruntime.register_execution_provider_library(provider, library)


def _not_there(device: str, why: str) -> EngineUnavailable:
    reason = f"ONNX Runtime {onnxruntime.__version__} does not run it on {device!r}: {' '.join(why.split())[:300]}"
    remedy = (
        "install its driver, or let `load` and `classify` run it on the CPU (allow_fallback=True, --allow-fallback)"
    )
    return EngineUnavailable("cannot load", reason=reason, remedy=remedy)


def _name_of_batch(model: ModelFile) -> str:
    name: str = model.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    return name


def _load(model: ModelFile, settings: Any, providers: Sequence[Any]) -> Any:
    """Return a session over the verified bytes; weights that lie next to the file are given as bytes too.

    Releases before 1.24 take such weights from a path only.
    """
    # By itself it prints an error, takes the CPU and goes on, at the first run too.
    chosen = {"providers": providers, "disabled_optimizers": _DISABLED_OPTIMIZERS, "enable_fallback": 0}
    if model.weights is None or model.manifest.weights is None:
        return onnxruntime.InferenceSession(model.data, settings, **chosen)
    if hasattr(settings, "add_external_initializers_from_files_in_memory"):
        name, weights = model.manifest.weights["file"], model.weights
        settings.add_external_initializers_from_files_in_memory([name], [weights], [len(weights)])
        return onnxruntime.InferenceSession(model.data, settings, **chosen)
    with private_copy(model) as path:
        return onnxruntime.InferenceSession(path, settings, **chosen)


def _failed(verb: str, error: Exception) -> ModelRejected:
    reason = " ".join(str(error).split())[:300]
    remedy = "export it again, or update ONNX Runtime"
    return ModelRejected(
        f"ONNX Runtime {onnxruntime.__version__} cannot {verb} the model", reason=reason, remedy=remedy
    )


ENGINE = OnnxRuntimeEngine
