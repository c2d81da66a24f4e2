"""The card of a model: the README.md that Hugging Face shows of a repository, its results readable by machines.

The head is YAML as huggingface_hub's ModelCardData reads it; `model-index` has the results (the format of Papers with
Code), accuracies as shares of 1.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.errors import InputError, require
from vit_edge.export.deployment.claims import Claim
from vit_edge.files import write_atomic
from vit_edge.model_file.artifact import Manifest, ModelFile
from vit_edge.report.sources import Sources, Verified, read_sources, refusing_others, target_of
from vit_edge.report.tables import PRECISIONS, accuracy_table, benchmark_table, encoder_table

__all__ = ["write_model_card"]

_TEMPLATE = Path(__file__).with_name("card.md")
_SUMMARY = "a Vision Transformer with its preprocessing, labels and golden vectors in one ONNX file"
_NUM_LABELS = 10
_log = logging.getLogger(__name__)


def write_model_card(
    results: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    license: str | None = None,  # noqa: A002 - the field's name in the card
    force: bool = False,
) -> Path:
    """Write a Hugging Face README.md of the model files among `results`, and return its path.

    `license` is that of the weights, if no model file has one. Raises InputError if no model file is given,
    UsageError, and what `open_model` raises.
    """
    target = target_of(out, results, force=force)
    sources = read_sources(results)
    if not sources.models:
        reason, remedy = "there is no model file among the results", "add the .onnx file, or the folder of a deployment"
        raise InputError("cannot write a model card", reason=reason, remedy=remedy)
    with refusing_others("write a model card"):
        card = _rendered(sources, license)
    write_atomic(target, card.encode())
    return target


def _rendered(sources: Sources, license_: str | None) -> str:
    jinja2, yaml = require("jinja2", extra="export", what="report"), require("yaml", extra="export", what="report")
    main = min(sources.models, key=lambda model: len(model.data))
    if license_ is None and main.manifest.license is None:
        _log.warning("the card states no license: %s has none; add --license NAME", main.source)
    head = yaml.safe_dump(_head(main, sources, license_), sort_keys=False, allow_unicode=True, width=10_000)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    page: str = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        head=head,
        name=main.manifest.name,
        summary=_SUMMARY if main.manifest.architecture.get("family") == "vit" else "an image classifier in ONNX",
        files=[_file(model) for model in sources.models],
        main=Path(main.source).name,
        claims=[Claim(**claim) for given in sources.deployed for claim in given.values["claims"]],
        accuracy=[*map(accuracy_table, sources.verified), *map(encoder_table, sources.encoders)],
        speed=[benchmark_table(given.values["results"]) for given in sources.benchmarks],
        input=dict(main.manifest.input),
        size=main.manifest.preprocessing.crop,
        preprocessing=main.manifest.preprocessing.to_dict(),
        width=main.manifest.num_values if main.manifest.is_encoder else None,
        labels=", ".join(main.manifest.labels[:_NUM_LABELS]),
        num_labels=len(main.manifest.labels),
        more=len(main.manifest.labels) > _NUM_LABELS,
        quantization=_quantized(main.manifest),
        assumed=list(main.manifest.assumed),
        version=vit_edge.__version__,
    )
    return page


def _head(main: ModelFile, sources: Sources, license_: str | None) -> dict[str, Any]:
    """Return the head of a card; unknown fields are left out, never guessed."""
    manifest = main.manifest
    license_ = license_ or manifest.license
    base = manifest.base_model if manifest.base_model and _is_repository(manifest.base_model) else None
    index = {"name": manifest.name, "results": list(_results(sources))}
    return {
        **({"license": license_.lower()} if license_ else {}),
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "onnx",
        "pipeline_tag": "image-feature-extraction" if manifest.is_encoder else "image-classification",
        "tags": [
            "vit-edge",
            "onnx",
            "vision-transformer",
            *dict.fromkeys(m.manifest.precision for m in sources.models),
        ],
        **({"model-index": [index]} if index["results"] else {}),
    }


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _results(sources: Sources) -> Iterator[dict[str, Any]]:
    """Yield an entry of the model-index for every verification with labels, engine by engine."""
    for verified in sources.verified:
        metrics = [metric for entry in verified.engines for metric in _metrics(entry, verified)]
        if metrics:
            yield {
                "task": {"type": "image-classification", "name": "Image Classification"},
                "dataset": {"type": "imagefolder", "name": Path(verified.folder or verified.file).name},
                "metrics": metrics,
            }


def _metrics(entry: Mapping[str, Any], verified: Verified) -> Iterator[dict[str, Any]]:
    files = (("float32", entry["reference_top1"]), (verified.title, entry["candidate_top1"]))
    for name, top1 in files:
        if top1 is not None and math.isfinite(top1):
            about = f"top-1 of {entry['images']} images, {name}, {entry['engine']}"
            yield {"type": "accuracy", "value": round(top1 / 100, 6), "name": about}


def _file(model: ModelFile) -> dict[str, str]:
    return {
        "name": Path(model.source).name,
        "precision": PRECISIONS[model.manifest.precision],
        "size": f"{(len(model.data) + len(model.weights or b'')) / 1e6:.2f} MB",
        "sha256": model.sha256,
    }


def _quantized(manifest: Manifest) -> dict[str, Any] | None:
    found = manifest.quantization
    if found is None:
        return None
    return {
        "target": found.get("target"),
        "recipe": found.get("recipe"),
        "algorithms": ", ".join(found.get("algorithms", ())),
        "images": len(found.get("images", ())),
        "float32_ops": len(found.get("float32_ops", ())),
    }


def _cell(text: str) -> str:
    """Return text as it may stand in a cell of a Markdown table."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))
