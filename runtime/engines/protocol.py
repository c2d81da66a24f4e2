"""The one protocol behind which every inference engine stands, and the list of those there are.

An engine is made from the verified bytes of a model file, runs uint8 images, and says what really runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from vit_edge.errors import EngineUnavailable, MissingExtra, ModelRejected, UsageError
from vit_edge.files import temporary_folder
from vit_edge.image import Pixels
from vit_edge.machine.cpu import MOST_THREADS, usable_threads
from vit_edge.machine.telemetry import openvino_without_telemetry
from vit_edge.metrics import Logits
from vit_edge.model_file.artifact import MOST_BATCH, Manifest, ModelFile
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.engines.devices import FloatPrecision, known_as

__all__ = [
    "ENGINES",
    "Array",
    "Engine",
    "EngineName",
    "EngineOptions",
    "FloatPrecision",
    "Logits",
    "Model",
    "answer",
    "answers",
    "available_devices",
    "batch_of",
    "check_count",
    "chosen_engines",
    "engine_version",
    "engines_with",
    "installed_engines",
    "installed_version",
    "log_fallback",
    "make_engine",
    "private_copy",
    "refuse_null",
]

Array: TypeAlias = npt.NDArray[Any]
EngineName: TypeAlias = Literal["onnxruntime", "openvino", "null"]
Model: TypeAlias = ModelFile | IrModel

# name -> (our module, the package it needs, the extra that installs it); the order is that of "auto"
ENGINES: dict[str, tuple[str, str | None, str]] = {
    "onnxruntime": ("vit_edge.runtime.engines.ort", "onnxruntime", "onnxruntime"),
    "openvino": ("vit_edge.runtime.engines.ov", "openvino", "openvino"),
    "null": ("vit_edge.runtime.engines.null", None, ""),
}
# The distributions that bring each; those of ONNX Runtime overwrite each other.
_DISTRIBUTIONS = {
    "onnxruntime": (
        "onnxruntime",
        *(f"onnxruntime-{kind}" for kind in ("directml", "gpu", "openvino", "qnn", "rocm", "training", "webgpu")),
    ),
    "openvino": ("openvino",),
}
_PRECISIONS = get_args(FloatPrecision)
_MOST_STREAMS = 256
_unusable: dict[str, str] = {}  # the engines whose import failed in this process, and why
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine runs; raises UsageError on values that no engine supports.

    `threads` None is what the container grants. `float_precision` is that of the float part, None the device's default
    (float32 on every CPU). `batch_size` gives the engine a static shape. `streams` is the number of runs side by side;
    they share the threads. With `allow_fallback` the CPU replaces a device that is unavailable.
    """

    device: str = "cpu"
    threads: int | None = None
    float_precision: FloatPrecision | None = None
    batch_size: int | None = None
    streams: int = 1
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.device, str):
            raise UsageError("cannot load", reason=f"device is {self.device!r}", remedy='give a name, such as "cpu"')
        check_count("threads", self.threads, MOST_THREADS)
        if self.float_precision not in (None, *_PRECISIONS):
            remedy = f"choose {', '.join(_PRECISIONS)}, or None"
            raise UsageError("cannot load", reason=f"float_precision is {self.float_precision!r}", remedy=remedy)
        check_count("batch_size", self.batch_size, MOST_BATCH)
        check_count("streams", self.streams, _MOST_STREAMS)

    @property
    def num_threads(self) -> int:
        """Return the number of threads to ask the engine for."""
        return self.threads or usable_threads()


def check_count(name: str, value: object, most: int, *, what: str = "cannot load") -> None:
    """Raise UsageError where an option is given that is no whole number from 1 to `most`."""
    if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
        raise UsageError(what, reason=f"{name} is {value!r}", remedy=f"give 1 to {most:,}, or leave it out")


class Engine(Protocol):
    """A loaded model; `run` may be called from several threads at once.

    `device`, `float_precision` and `threads` are what was read back, `placement` how many nodes of the graph run where
    (None where the engine is too old to tell), `fallback` why it is not the device that was asked for, `int8_fallback`
    why the ops of an INT8 file run in float32 (None if they do not), `batch_size` the static shape it was given.
    """

    name: str
    version: str
    device: str
    float_precision: str
    threads: int
    batch_size: int | None
    placement: Mapping[str, int] | None
    fallback: str | None
    int8_fallback: str | None

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return logits or embeddings, float32 [batch, values] that the caller owns, from uint8 images."""
        ...

    def tensors(self, images: Array, names: Sequence[str]) -> list[Array]:
        """Return the outputs `names` for what the graph takes itself, owned by the caller."""
        ...

    def twin(self) -> Engine:
        """Return another engine over the same loaded model, that runs next to this one and is closed apart."""
        ...

    def close(self) -> None:
        """Free the model; the second call does nothing."""
        ...


def installed_engines() -> tuple[str, ...]:
    """Return the engines whose package is installed, in the order of "auto" (the null engine is never chosen).

    An engine whose import failed in this process is left out.
    """
    names = [name for name, (_, package, _) in ENGINES.items() if package and _is_installed(package)]
    return tuple(name for name in names if name not in _unusable)


def _is_usable(name: str) -> bool:
    """Return whether an engine can be imported; the log names one that cannot, once."""
    try:
        _module(name)
    except EngineUnavailable as error:
        _log.warning("the engine %s is left out: %s", name, error.reason)
        return False
    return True


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported: a mere folder of its name, or one emptied by pip, has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _module(name: str) -> ModuleType:
    """Return our module for an installed engine; raises EngineUnavailable if its package cannot be imported."""
    module, package, _ = ENGINES[name]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package of a version that does not fit may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _unusable[name] = f"{package} is installed, but cannot be imported ({why})"
        remedy = f"pip install --force-reinstall {package}, in a release that fits numpy"
        raise EngineUnavailable("cannot load the engine", reason=_unusable[name], remedy=remedy) from error


def engines_with(device: str) -> tuple[str, ...]:
    """Return the installed engines that have a name for `device`, in the order of "auto"."""
    return tuple(name for name in installed_engines() if known_as(device, name))


def available_devices() -> dict[str, tuple[str, ...]]:
    """Return the devices here and, for each, the installed engines that have it, by asking the engines."""
    found: dict[str, tuple[str, ...]] = {}
    for name in installed_engines():
        for device in _module(name).devices_here():
            found[device] = (*found.get(device, ()), name)
    return found


def chosen_engines(engines: Sequence[str] = ()) -> tuple[str, ...]:
    """Return `engines`, or without names all that can be imported; raises MissingExtra if there is none."""
    chosen = tuple(engines) or tuple(name for name in installed_engines() if _is_usable(name))
    if not chosen:
        remedy = 'pip install "vit-edge[onnxruntime]" or pip install "vit-edge[openvino]"'
        raise MissingExtra("cannot load", reason="no inference engine is installed", remedy=remedy)
    return chosen


def refuse_null(name: str) -> None:
    """Raise EngineUnavailable for the null engine where an answer is wanted: it computes nothing."""
    if name == "null":
        remedy = "choose onnxruntime or openvino"
        raise EngineUnavailable("cannot classify", reason="the null engine computes nothing", remedy=remedy)


def make_engine(name: str, model: Model, options: EngineOptions) -> Engine:
    """Return the engine `name` with `model` loaded; raises EngineUnavailable, MissingExtra or ModelRejected."""
    if name not in ENGINES:
        known = ", ".join(engine for engine, (_, package, _) in ENGINES.items() if package)
        reason = f"no engine is named {name!r}; there are {known}"
        raise EngineUnavailable("cannot load", reason=reason, remedy="choose one of these")
    _, package, extra = ENGINES[name]
    if package and not _is_installed(package):
        reason = f"the engine {name} is not installed; installed: {', '.join(installed_engines()) or 'none'}"
        raise MissingExtra("cannot load", reason=reason, remedy=f'pip install "vit-edge[{extra}]"')
    if isinstance(model, IrModel) and name == "onnxruntime":
        reason, remedy = "it is OpenVINO's IR, which ONNX Runtime cannot read", "choose openvino"
        raise ModelRejected("cannot load", file=model.source, reason=reason, remedy=remedy)
    make: type[Engine] = _module(name).ENGINE
    engine: Engine = make(model, options)  # type: ignore[call-arg]  # a protocol does not list __init__
    return engine


def engine_version(name: str) -> str:
    """Return the version of an installed engine, as it says itself."""
    package = ENGINES[name][1]
    if package is None:
        return "1"
    with openvino_without_telemetry():
        return str(importlib.import_module(package).__version__).split("-")[0]


def installed_version(name: str) -> str:
    """Return the version of an installed engine from its distribution, without importing the engine.

    An engine that is not to run must not be imported: OpenVINO takes 0.3 s and 20 MB, and starts a thread.
    """
    distributions = [f"{known} {version(known)}" for known in _DISTRIBUTIONS[name] if _is_distribution(known)]
    return ", ".join(distributions) or engine_version(name)


def _is_distribution(name: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(name))
    return False


def batch_of(manifest: Manifest, options: EngineOptions) -> int | None:
    """Return the batch that the engine is fixed at, None where any runs; raises UsageError where they differ."""
    if manifest.batch is not None and options.batch_size not in (None, manifest.batch):
        reason = f"batch_size is {options.batch_size}; the file's batch is fixed at {manifest.batch}"
        raise UsageError("cannot load", reason=reason, remedy=f"give {manifest.batch}, or None")
    return manifest.batch or options.batch_size


def log_fallback(fallback: str) -> str:
    """Warn that something else runs than what was asked for, and return why."""
    _log.warning("%s", fallback)
    return fallback


@contextmanager
def private_copy(model: ModelFile) -> Iterator[Path]:
    """Yield the path of a copy of the verified bytes, weights next to it, in a folder that only this user can read.

    For engines that take weights next to a file from a path only: given bytes they look in the current folder.
    """
    with temporary_folder() as name:
        (Path(name) / "model.onnx").write_bytes(model.data)
        if model.manifest.weights and model.weights is not None:
            (Path(name) / model.manifest.weights["file"]).write_bytes(model.weights)
        yield Path(name) / "model.onnx"


def answer(engine: Engine, manifest: Manifest, images_NHWC: Pixels) -> Logits:
    """Return the logits or the embeddings of uint8 images, as `answers` does."""
    return np.asarray(answers(engine, manifest, images_NHWC, [manifest.output])[0], dtype=np.float32)


def answers(engine: Engine, manifest: Manifest, images_NHWC: Pixels, names: Sequence[str]) -> list[Array]:
    """Return the outputs `names` for uint8 images: normalised first, or in parts of a fixed batch, as the graph asks.

    The last part of a fixed batch is filled up with black images, whose answers are dropped.
    """
    size = engine.batch_size
    if size is None:
        return engine.tensors(manifest.network_input(images_NHWC), names)
    parts = []
    for start in range(0, max(len(images_NHWC), 1), size):
        part = images_NHWC[start : start + size]
        filled = part
        if len(part) < size:
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
        parts.append([found[: len(part)] for found in engine.tensors(manifest.network_input(filled), names)])
    if len(parts) == 1:
        return parts[0]
    return [np.concatenate(found) for found in zip(*parts, strict=True)]
