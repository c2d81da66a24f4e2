"""What every repository says of the model it serves: its name, files, engine, instances and threads."""

from __future__ import annotations

from dataclasses import dataclass

from vit_edge.errors import ModelRejected
from vit_edge.machine.cpu import usable_threads
from vit_edge.model_file.artifact import Manifest, ModelFile
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.checks.golden import promised
from vit_edge.runtime.engines.protocol import Model, installed_engines
from vit_edge.runtime.tuned_configuration import tuned_configuration

__all__ = ["MODELS", "ServedModel", "served_model"]

# The folder of models in a repository; what servers mount.
MODELS = "models"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model under the name that servers give it, and how it runs there.

    `p50_ms` is the median latency of one image that `vit-edge tune` measured, None if it never ran for this file here.
    """

    name: str
    model: Model
    engine: str
    instances: int
    threads: int
    p50_ms: float | None

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the model file."""
        return self.model.manifest

    @property
    def num_cpus(self) -> int:
        """Return how many CPUs all instances use together."""
        return self.instances * self.threads

    @property
    def model_files(self) -> dict[str, bytes]:
        """Return the files of the model as they are: the seal covers every byte."""
        if isinstance(self.model, IrModel):
            return {"model.xml": self.model.xml, "model.bin": self.model.weights}
        weights = self.manifest.weights
        more = {str(weights["file"]): self.model.weights} if weights and self.model.weights is not None else {}
        return {**more, "model.onnx": self.model.data}


def served_model(
    model: Model, *, name: str, engine: str | None, instances: int | None, threads: int | None
) -> ServedModel:
    """Return how a model is served; what is None comes from `vit-edge tune`, else one thread and all usable CPUs.

    `engine` is the only one that the server has. Raises ModelRejected if the file was not validated in it, or if its
    batch size is fixed.
    """
    if model.manifest.batch is not None:
        reason = f"the file has a fixed batch size of {model.manifest.batch}; servers form batches of any size"
        raise _rejected(model, reason, "export it again without --batch-size")
    configuration = tuned_configuration(model) if isinstance(model, ModelFile) else None
    if configuration is not None and engine not in (None, configuration.engine):
        configuration = None  # measured in an engine that the server does not have
    chosen = engine or (configuration.engine if configuration else _first_engine(model))
    if chosen not in promised(model.manifest):
        known = ", ".join(sorted(promised(model.manifest))) or "no engine"
        reason = f"the file was validated in {known}; this server runs {chosen}"
        raise _rejected(model, reason, f"export and quantize it again where {chosen} is installed")
    threads = threads or (configuration.threads if configuration else 1)
    return ServedModel(
        name=name,
        model=model,
        engine=chosen,
        threads=threads,
        instances=instances or max(1, usable_threads() // threads),
        p50_ms=configuration.p50_ms if configuration else None,
    )


def _first_engine(model: Model) -> str:
    """Return the engine that `load` would choose first among those the file was validated in."""
    if isinstance(model, IrModel):
        return "openvino"
    validated = promised(model.manifest)
    ordered = (*installed_engines(), "onnxruntime", "openvino")
    return next((name for name in ordered if name in validated), "onnxruntime")


def _rejected(model: Model, reason: str, remedy: str) -> ModelRejected:
    return ModelRejected("cannot make the repository", file=model.source, reason=reason, remedy=remedy)
