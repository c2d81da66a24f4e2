"""One page that holds everything: tables, images, changed answers, manifests. It needs no network and no script."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.errors import require
from vit_edge.files import write_atomic
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.report.benchmark_plot import draw_benchmark
from vit_edge.report.flipped import Flip, data_uri, flips_of
from vit_edge.report.sources import Given, Sources, Verified, read_sources, refusing_others, target_of
from vit_edge.report.tables import (
    PRECISIONS,
    Table,
    accuracy_table,
    benchmark_table,
    changes_table,
    classes_table,
    coverage_table,
    layers_table,
    speed_table,
    stages_table,
)

__all__ = ["MOST_FLIPS", "render", "write_report"]

MOST_FLIPS = 24

_TEMPLATE = Path(__file__).with_name("page.html")
# Longer lists of a manifest are counted, not shown: a thousand labels, hashes of images, golden logits.
_MOST_ENTRIES = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    title: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """What stands under one heading: claims in words, tables, images, changed answers, text to fold out."""

    title: str
    verdict: str = ""
    said: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    images: tuple[_Image, ...] = ()
    flips: tuple[Flip, ...] = ()
    candidate: str = "this"
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
    """Write one self-contained HTML page of what commands found, and return its path.

    `results` are files of `vit-edge verify`, `benchmark`, `quantize` and `deploy --json`, records or folders of
    deployments, model files and images. With both models of a verification among them its changed answers show where
    each looks. `data` is where its images lie now. Raises InputError, UsageError, and what `open_model` raises.
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
    """Return the page; raises InputError where results are not what their command prints."""
    jinja2 = require("jinja2", extra="export", what="report")
    with refusing_others("report"):
        sections = [
            *_deployments(sources.deployed),
            *_verifications(sources, data=data, most_flips=most_flips, progress=progress),
            *_quantizations(sources.quantized),
            *_benchmarks(sources),
            *_explanations(sources),
            *_manifests(sources.models),
        ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(title=title or _title(sources), sections=sections, version=vit_edge.__version__)
    return page


def _title(sources: Sources) -> str:
    names = dict.fromkeys(model.manifest.name for model in sources.models)
    return ", ".join(names) or "vit-edge report"


def _deployments(deployed: Sequence[Given]) -> Iterator[_Section]:
    for given in deployed:
        values = given.values
        files = tuple((name, digest) for name, digest in sorted(values["files"].items()))
        versions = tuple((name, str(version)) for name, version in values["made_with"]["versions"].items())
        steps = tuple((name, f"{step['seconds']:.1f}") for name, step in values["steps"].items())
        yield _Section(
            title="Deployment",
            verdict=values["verdict"],
            said=tuple(values["claims"]),
            tables=(
                speed_table(values["steps"]["speed"]["result"]["engines"]),
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
            yield _Section(
                title="Answers that changed",
                said=tuple(_flips_said(shown, flips, has_models=pair is not None)),
                flips=tuple(flips),
                folded=(changes_table(verified),),
                candidate="this" if pair is None else PRECISIONS[pair[0].manifest.precision],
            )


def _accuracy_said(verified: Verified) -> Iterator[str]:
    asked = []
    if verified.max_drop_points is not None:
        asked.append(f"a drop of at most {verified.max_drop_points:g} points")
    if verified.min_agreement is not None:
        asked.append(f"an agreement of at least {verified.min_agreement:g} %")
    if asked:
        yield f"Asked, at 95 % confidence: {' and '.join(asked)}."
    worst = verified.worst
    lost = f"{'at most ' if worst['unlabelled'] else ''}{worst['drop_points']:.2f} points"
    bound = f"no more than {worst['drop_upper_bound_points']:.2f} with 95 % confidence"
    same = f"{worst['agreement']:.2f} % of the answers are the same"
    yield f"It loses {lost}, {bound}; {same} (in {worst['engine']}, where it loses most)."
    if verified.labels != "all":
        kind = "changed answers were labelled" if verified.labels == "flips" else "images have no labels"
        yield f"Only the {kind}." if verified.labels == "flips" else f"The {kind}: changed answers count as lost."


def _flips_said(shown: str, flips: Sequence[Flip], *, has_models: bool) -> Iterator[str]:
    if flips:
        yield f"{shown} images, those first that lost a right answer."
    if any(flip.attention for flip in flips):
        yield (
            "Each as the network sees it, then under the attention of its last block, both files on one scale: the "
            "brighter a patch, the more the class token (or what is pooled) takes from there."
        )
    elif flips and not has_models:
        yield "Give both model files too, and each is shown as the network sees it, with where each of them looks."


def _quantizations(quantized: Sequence[Given]) -> Iterator[_Section]:
    for given in quantized:
        values = given.values
        said = [f"target {values['target']}, recipe {values['recipe']}, {values['num_calibration_images']} images"]
        if values["float32_ops"]:
            said.append(f"left float: {', '.join(values['float32_ops'])}")
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


def _explanations(sources: Sources) -> Iterator[_Section]:
    explained = [(verified.title, verified.explain) for verified in sources.verified if verified.explain]
    images = tuple(_Image(title=name, uri=data_uri(data, kind)) for name, kind, data in sources.images)
    for title, explain in explained:
        yield _Section(
            title=f"Where the error comes in: {title}",
            said=tuple(explain["notes"]),
            tables=(stages_table(explain),),
            folded=(layers_table(explain),),
        )
    if images:
        yield _Section(title="SplitImages", images=images)


def _manifests(models: Sequence[ModelFile]) -> Iterator[_Section]:
    for model in models:
        size = len(model.data) + len(model.weights or b"")
        rows = (("SHA-256", model.sha256), ("size", f"{size / 1e6:.2f} MB"), ("precision", model.manifest.precision))
        shown = _shortened(json.loads(model.manifest.to_json()))
        yield _Section(
            title=f"Model file: {Path(model.source).name}",
            said=(f"Assumed, not known: {', '.join(model.manifest.assumed)}.",) if model.manifest.assumed else (),
            tables=(Table(title="", columns=("", ""), rows=rows),),
            text=json.dumps(shown, indent=1, ensure_ascii=False),
        )


def _shortened(value: Any) -> Any:
    """Return a manifest without what nobody reads: long lists as their length."""
    if isinstance(value, Mapping):
        if len(value) > _MOST_ENTRIES:
            return f"({len(value)} entries)"
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return f"({len(value)} entries)" if len(value) > _MOST_ENTRIES else [_shortened(each) for each in value]
    return value
