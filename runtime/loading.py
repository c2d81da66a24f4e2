"""The one way a model file becomes a classifier, for the command line, applications and tests alike.

Size limit, one read, seal, manifest, allow-list of operators, its target compared with the CPU, the engine from those
very bytes, golden check.
"""

from __future__ import annotations

import logging
import os
from typing import Literal

from vit_edge.artifact import ModelFile, open_model
from vit_edge.errors import GoldenMismatch, ModelRejected, UsageError
from vit_edge.runtime.classifier import Classifier
from vit_edge.runtime.engine import Engine, EngineName, EngineOptions, chosen_engines, make_engine
from vit_edge.runtime.golden import check_golden, check_pictures
from vit_edge.runtime.guard import check_graph
from vit_edge.targets import mismatch, target_name

__all__ = ["load", "load_model"]

_COMPUTES_NOTHING = "null"
_log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike[str] | bytes,
    *,
    engine: EngineName | Literal["auto"] = "auto",
    device: str = "cpu",
    threads: int | None = None,
    verify: Literal["full", "hash"] = "full",
) -> Classifier:
    """Return a classifier from a model file made by vit-edge.

    `engine` "auto" is ONNX Runtime where it is installed, else OpenVINO. `threads` None is what the container grants.
    `verify` "hash" leaves out the golden check. A file quantized for another kind of CPU is warned of in the log.
    Raises ModelRejected, NotTrusted, GoldenMismatch, EngineUnavailable or MissingExtra.

        >>> classifier = load("model.int8.onnx")          # doctest: +SKIP
        >>> classifier("picture.jpg").label               # doctest: +SKIP
        'pizza'
    """
    options = EngineOptions(device=device, threads=threads)
    return load_model(open_model(source), engine=engine, options=options, verify=verify)


def load_model(
    model: ModelFile,
    *,
    engine: str = "auto",
    options: EngineOptions,
    verify: Literal["full", "hash"] = "full",
    warn: bool = True,
) -> Classifier:
    """Return a classifier from a model file that was opened already; raises as `load` does.

    `warn` False says nothing of a target that is another than this CPU: for who knows, having just made the file.
    """
    if verify not in ("full", "hash"):
        raise UsageError("cannot load", reason=f"verify is {verify!r}", remedy="choose 'full' or 'hash'")
    check_graph(model)
    name = target_name(model.manifest.quantization)
    difference = mismatch(name) if name else None
    if difference and warn:
        _log.warning("%s: %s", model.source, difference)
    try:
        loaded = make_engine(chosen_engines()[0] if engine == "auto" else engine, model, options)
        _log.info("%s runs in %s %s, %d threads", model.source, loaded.name, loaded.version, loaded.threads)
        if verify == "full" and loaded.name != _COMPUTES_NOTHING:
            _check(model, loaded)
    except (GoldenMismatch, ModelRejected) as error:
        error.file = error.file or model.source
        if difference and isinstance(error, GoldenMismatch):
            error.remedy = difference  # not that somebody edited the file
        raise
    return Classifier(loaded, model.manifest, sha256=model.sha256)


def _check(model: ModelFile, engine: Engine) -> None:
    manifest = model.manifest
    if manifest.golden is None:
        remedy = "export it again, or load it with verify='hash'"
        raise ModelRejected(
            "cannot check the model", file=model.source, reason="it has no golden vectors", remedy=remedy
        )
    check_pictures(manifest.golden, manifest.preprocessing)
    check_golden(engine, manifest.golden, preprocessing=manifest.preprocessing)
