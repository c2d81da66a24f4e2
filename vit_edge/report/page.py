"""One page with everything: headline, tables, plots, changed predictions, manifests; no network, no script."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.errors import require
from vit_edge.export.deployment.claims import Claim
from vit_edge.export.deployment.record import speed_of
from vit_edge.files import write_atomic
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.report.benchmark_plot import draw_benchmark
from vit_edge.report.flipped import Flip, data_uri, flips_of
from vit_edge.report.headline import headlines
from vit_edge.report.sources import Given, Sources, Verified, read_sources, refusing_others, target_of
from vit_edge.report.tables import (
    PRECISIONS,
    Table,
    accuracy_table,
    benchmark_table,
    changes_table,
    classes_table,
    coverage_table,
    encoder_table,
    layers_table,
    speed_table,
    stages_table,
)

__all__ = ["MOST_FLIPS", "render", "write_report"]

MOST_FLIPS = 24

_TEMPLATE = Path(__file__).with_name("page.html")
# Longer lists of a manifest are counted, not shown: labels, hashes of images, golden logits.
_MOST_ENTRIES, _MOST_CHARACTERS = 24, 200


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    title: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """The content under one heading: sentences, tables, plots, changed predictions, parts to fold out."""

    title: str
    verdict: str = ""
    said: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    images: tuple[_Image, ...] = ()
    flips: tuple[Flip, ...] = ()
    candidate: str = "candidate"
    text: str = ""


def write_report(
    results: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    title: str | None = None,
    data: str | os.PathLike[str] | None = None,
    most_flips: int = MOST_FLIPS,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write one self-contained HTML page of results, and return its path.

        write_report(["deploy/"], out="report.html")

    `results` are the output of `vit-edge verify`, `explain`, `benchmark`, `quantize` and `deploy --json`, records or
    folders of deployments, model files and images. If both models of a verification are among them, its changed
    predictions show the attention of both. `data` is the folder of the evaluation images if they moved. Raises
    InputError, UsageError, and what `open_model` raises.
    """
    target = target_of(out, results, force=force)
    sources = read_sources(results)
    write_atomic(target, render(sources, title=title, data=data, most_flips=most_flips, progress=progress).encode())
    return target


def render(
    sources: Sources,
    *,
    title: str | None = None,
    data: str | os.PathLike[str] | None = None,
    most_flips: int = MOST_FLIPS,
    progress: Progress = silent,
) -> str:
    """Return the page; raises InputError if results are not what their command prints."""
    jinja2 = require("jinja2", extra="export", what="report")
    with refusing_others("report"):
        headline = headlines(sources)
        sections = [
            *_deployments(sources.deployed),
            *_verifications(sources, data=data, most_flips=most_flips, progress=progress),
            *_encoders(sources),
            *_quantizations(sources.quantized),
            *_benchmarks(sources),
            *_explanations(sources.explained),
            *_images(sources),
            *_manifests(sources.models),
        ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(
        title=title or _title(sources),
        headline=headline,
        assumed=sorted({name for model in sources.models for name in model.manifest.assumed}),
        sections=sections,
        date=_today(),
        version=vit_edge.__version__,
    )
    return page


def _today() -> str:
    """Return the date of the page; SOURCE_DATE_EPOCH sets it for builds that repeat."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).date().isoformat()


def _title(sources: Sources) -> str:
    names = dict.fromkeys(model.manifest.name for model in sources.models)
    return ", ".join(names) or "vit-edge report"


def _deployments(deployed: Sequence[Given]) -> Iterator[_Section]:
    for given in deployed:
        values = given.values
        files = tuple((name, digest) for name, digest in sorted(values["files"].items()))
        made = values.get("check", values)["made_with"]
        versions = tuple((name, str(version)) for name, version in made["versions"].items())
        speed = speed_of(values)
        steps = tuple((name, f"{step['seconds']:.1f}") for name, step in values["steps"].items())
        yield _Section(
            title="Deployment",
            verdict=values["verdict"],
            said=(
                *(str(Claim(**claim)) for claim in values["claims"]),
                f"Measured on {made['date'][:10]}, {made['cpu']}.",
            ),
            tables=(
                *([] if speed is None else [speed_table(speed["engines"])]),
                *_device_tables(values.get("devices", ())),
                Table(title="Files", columns=("file", "SHA-256"), rows=files),
            ),
            folded=(
                Table(title="Steps", columns=("step", "seconds"), rows=steps),
                Table(title="Made with", columns=("package", "version"), rows=versions),
            ),
        )


def _device_tables(devices: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    results = [
        {**entry, "on": device["on"], "device_name": device["device"], "emulated": device.get("emulated")}
        for device in devices
        for entry in device["results"]
    ]
    if results:
        yield benchmark_table(results)


def _verifications(
    sources: Sources, *, data: str | os.PathLike[str] | None, most_flips: int, progress: Progress
) -> Iterator[_Section]:
    for verified in sources.verified:
        pair = sources.pair_of(verified)
        flips, num_changed = flips_of(verified, pair, most=most_flips, folder=data, progress=progress)
        classes = classes_table(verified)
        yield _Section(
            title=f"Accuracy: {verified.title}",
            verdict=verified.verdict,
            said=tuple(_accuracy_said(verified)),
            tables=(accuracy_table(verified),),
            folded=() if classes is None else (classes,),
        )
        if num_changed:
            shown = f"{len(flips)} of {num_changed}" if len(flips) < num_changed else str(num_changed)
            every = (changes_table(verified),)
            yield _Section(
                title="Predictions that changed",
                said=tuple(_flips_said(shown, flips, has_models=pair is not None)),
                flips=tuple(flips),
                tables=() if flips else every,
                folded=every if flips else (),
                candidate="candidate" if pair is None else PRECISIONS[pair[0].manifest.precision],
            )


def _encoders(sources: Sources) -> Iterator[_Section]:
    for verified in sources.encoders:
        budget = []
        if verified.min_neighbours is not None:
            budget.append(f"at least {verified.min_neighbours:g} % of ten neighbours kept")
        if verified.max_drop_points is not None:
            budget.append(f"a drop of k-NN accuracy of at most {verified.max_drop_points:g} points")
        yield _Section(
            title=f"Neighbours kept: {verified.title}",
            verdict=verified.verdict,
            said=(f"Limit at 95 % confidence: {' and '.join(budget)}.", f"Bounds: {verified.method}."),
            tables=(encoder_table(verified),),
        )


def _accuracy_said(verified: Verified) -> Iterator[str]:
    budget = []
    if verified.max_drop_points is not None:
        budget.append(f"a drop of at most {verified.max_drop_points:g} points")
    if verified.min_agreement is not None:
        budget.append(f"an agreement of at least {verified.min_agreement:g} %")
    if budget:
        yield f"Limit at 95 % confidence: {' and '.join(budget)}."
    worst = verified.worst
    lost = f"{'at most ' if worst['unlabelled'] else ''}{worst['drop_points']:.2f} points"
    bound = f"no more than {worst['drop_upper_bound_points']:.2f} with 95 % confidence"
    same = f"{worst['agreement']:.2f} % of the predictions are the same"
    yield f"The candidate loses {lost}, {bound}; {same} (worst engine: {worst['engine']})."
    if verified.labels == "flips":
        yield "Only the changed predictions have labels."
    elif verified.labels == "none":
        yield "The images have no labels: every changed prediction counts as lost."


def _flips_said(shown: str, flips: Sequence[Flip], *, has_models: bool) -> Iterator[str]:
    if flips:
        yield f"{shown} {'image' if shown == '1' else 'images'}, lost correct predictions first."
    if any(flip.attention for flip in flips):
        yield (
            "Each image is shown as the network sees it, then under the attention of the last block, on one scale for "
            "both models: the brighter a patch, the more the class token (or the pooled patches) attends to it."
        )
    elif flips and not has_models:
        yield "Add both model files to see the input of the network and the attention of both models."


def _quantizations(quantized: Sequence[Given]) -> Iterator[_Section]:
    for given in quantized:
        values = given.values
        said = [f"target {values['target']}, recipe {values['recipe']}, {values['num_calibration_images']} images"]
        if values["float32_ops"]:
            said.append(f"in float32: {', '.join(values['float32_ops'])}")
        tables = [*([coverage_table(given)] if values["coverage"] else [])]
        tables += [speed_table(values["speed"])] if values["speed"] else []
        yield _Section(title=f"Quantization: {Path(values['model']).name}", said=tuple(said), tables=tuple(tables))


def _benchmarks(sources: Sources) -> Iterator[_Section]:
    accuracies = sources.accuracies()
    for given in sources.benchmarks:
        invalid = tuple(given.values.get("invalid_because", ()))
        results = [
            {**entry, "top1": accuracies.get((entry["sha256"], entry["engine"]), entry["top1"])}
            for entry in given.values["results"]
        ]
        image = draw_benchmark(results, invalid)
        yield _Section(
            title="Speed",
            verdict="invalid" if invalid else "",
            said=invalid,
            tables=(benchmark_table(results),),
            images=(_Image(title=given.file, uri=data_uri(image, "image/png")),),
        )


def _explanations(explained: Sequence[Given]) -> Iterator[_Section]:
    for given in explained:
        yield _Section(
            title=f"Where the error comes from: {Path(given.values['model']).name}",
            said=tuple(given.values["notes"]),
            tables=(stages_table(given.values),),
            folded=(layers_table(given.values),),
        )


def _images(sources: Sources) -> Iterator[_Section]:
    images = tuple(_Image(title=name, uri=data_uri(data, kind)) for name, kind, data in sources.images)
    if images:
        yield _Section(title="Images", images=images)


def _manifests(models: Sequence[ModelFile]) -> Iterator[_Section]:
    for model in models:
        size = len(model.data) + len(model.weights or b"")
        rows = (("SHA-256", model.sha256), ("size", f"{size / 1e6:.2f} MB"), ("precision", model.manifest.precision))
        shown = _shortened(json.loads(model.manifest.to_json()))
        yield _Section(
            title=f"Model file: {Path(model.source).name}",
            said=(f"Assumed (not specified): {', '.join(model.manifest.assumed)}.",) if model.manifest.assumed else (),
            tables=(Table(title="", columns=("", ""), rows=rows),),
            text=json.dumps(shown, indent=1, ensure_ascii=False),
        )


def _shortened(value: Any) -> Any:
    """Return a manifest with long lists and texts as their length."""
    if isinstance(value, Mapping):
        if len(value) > _MOST_ENTRIES:
            return f"({len(value)} entries)"
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return f"({len(value)} entries)" if len(value) > _MOST_ENTRIES else [_shortened(each) for each in value]
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        return f"({len(value)} characters)"
    return value
