"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from vit_edge.artifact import ModelFile
from vit_edge.errors import ModelRejected, UsageError
from vit_edge.image import Pixels
from vit_edge.runtime.engine import Array, EngineOptions, Logits, answer, private_copy

__all__ = ["ENGINE", "OnnxRuntimeEngine", "make_session"]

_PROVIDER = "CPUExecutionProvider"
# This fusion turns a product of two-dimensional input, such as the head, into Gemm before integers are recognised: its
# weights are then converted back to float at every run. (With a fixed batch it hits every product: 2.61 ms, not 0.37.)
_DISABLED_OPTIMIZERS = ["MatMulAddFusion"]


class OnnxRuntimeEngine:
    """One InferenceSession; it is safe to call from several threads (9,600 of 9,600 answers bitwise equal)."""

    name = "onnxruntime"
    device = "cpu"
    float_precision = "f32"

    def __init__(self, model: ModelFile, options: EngineOptions) -> None:
        self._manifest = model.manifest
        self.version: str = onnxruntime.__version__
        self.threads = options.num_threads
        self._session: Any = make_session(model, options)
        if self._session.get_providers() != [_PROVIDER]:
            raise _failed("load", RuntimeError(f"it runs on {self._session.get_providers()}, not on {_PROVIDER}"))

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return logits float32 [batch, classes]."""
        return answer(self, self._manifest, images_NHWC)

    def tensors(self, images: Array, names: Sequence[str]) -> list[Array]:
        """Return the outputs `names`."""
        if self._session is None:
            raise UsageError("cannot run", reason="the engine is closed", remedy="load the model again")
        try:
            found: list[Array] = self._session.run(list(names), {self._manifest.input["name"]: images})
        except Exception as error:  # its exceptions share no base but this
            raise _failed("run", error) from error
        return found

    def close(self) -> None:
        """Free the session."""
        self._session = None


def make_session(
    model: ModelFile, options: EngineOptions, *, optimised: Path | None = None, profile: Path | None = None
) -> Any:
    """Return a session over the verified bytes; raises ModelRejected.

    Its optimised graph is written to `optimised`; how long each node takes to a file whose name begins as `profile`.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.num_threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Idle threads that spin take a core from the application (onnxruntime#8313).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    try:
        return _load(model, settings)
    except Exception as error:  # its exceptions share no base but this
        raise _failed("load", error) from error


def _load(model: ModelFile, settings: Any) -> Any:
    """Return a session over the verified bytes; weights that lie beside the file are given as bytes too.

    Releases before 1.24 take such weights from a path only.
    """
    chosen = {"providers": [_PROVIDER], "disabled_optimizers": _DISABLED_OPTIMIZERS}
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
