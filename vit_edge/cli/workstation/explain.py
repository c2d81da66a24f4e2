"""Where the error comes in, as tables and as JSON-ready values: what `verify --explain` adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.output import Result, make_table, progress_bar
from vit_edge.errors import MissingExtra, UsageError, VitEdgeError, require
from vit_edge.files import may_write
from vit_edge.progress import Progress

if TYPE_CHECKING:
    from vit_edge.export.explanation.explainer import Explanation, Layer
    from vit_edge.export.explanation.inputs import Preparation
    from vit_edge.export.explanation.layer_times import EngineTimes

__all__ = ["explain_options", "explained", "image_target", "prepare"]


_PATH = click.Path(path_type=Path)
_NUM_IMAGES, _MOST_IMAGES = 64, 1000
_OPTIONS = (
    click.option("--explain", is_flag=True, help="Show where the error comes in: form by form, and layer by layer."),
    click.option("--checkpoint", metavar="SOURCE", help="What REF was exported from, as for `vit-edge export`."),
    click.option("--weights", type=_PATH, help="Weights for package.module:factory of --checkpoint."),
    click.option("--like", metavar="timm:NAME", help="Network of timm to ask for what --checkpoint does not tell."),
    click.option("--calibration", type=_PATH, help="The images that calibrated, to explain each algorithm."),
    click.option(
        "--explain-images",
        type=click.IntRange(1, _MOST_IMAGES),
        help=f"How many of the images explain, evenly spaced  [default: {_NUM_IMAGES}].",
    ),
    click.option("--explain-out", type=_PATH, help="Folder for layers.png  [default: the current one]."),
)


def explain_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command the options that explain."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def image_target(values: Mapping[str, Any], *, force: bool) -> Path | str | None:
    """Return where the image will be written, why there will be none, or None where nothing is explained.

    Raises UsageError where it may not be written, or where an option is for --explain and that is not there.
    """
    for name, value in values.items():
        if value is not None and name != "explain" and not values["explain"]:
            option = f"--{name.replace('_', '-')}"
            reason, remedy = f"{option} is for --explain", f"add --explain, or leave {option} out"
            raise UsageError("cannot verify", reason=reason, remedy=remedy)
    if not values["explain"]:
        return None
    require("onnxruntime", extra="export,onnxruntime", what="explain")
    from vit_edge.export.explanation.plot import IMAGE, require_matplotlib

    try:
        require_matplotlib()
    except MissingExtra as error:
        return f"{IMAGE} is not drawn: {error.reason}; {error.remedy}"
    return may_write((values["explain_out"] or Path()) / IMAGE, force=force)


def prepare(
    model: Path,
    values: Mapping[str, Any],
    *,
    reference: Path,
    data: Path,
    engines: tuple[str, ...],
    threads: int | None,
    unlabelled: bool,
    progress: Progress,
) -> Preparation | None:
    """Return what is to be explained, checked before the verification takes its time; None where nothing is."""
    if not values["explain"]:
        return None
    from vit_edge.export.explanation.inputs import ExplainOptions, prepare_explanation

    options = ExplainOptions(
        checkpoint=values["checkpoint"],
        weights=values["weights"],
        like=values["like"],
        calibration=values["calibration"],
        num_images=values["explain_images"] or _NUM_IMAGES,
        engines=engines,
        threads=threads,
        unlabelled=unlabelled,
    )
    return prepare_explanation(model, reference=reference, data=data, options=options, progress=progress)


def explained(prepared: Preparation, image: Path | str, told: Result) -> Result:
    """Return the result of a verification with its explanation; where that fails, the verification stays."""
    from vit_edge.export.explanation.explainer import explain

    try:
        with progress_bar() as progress:
            found = explain(prepared, progress=progress)
        line = _draw(found, image)
    except VitEdgeError as error:
        said = f"not explained: {error}"
        return Result(data={**told.data, "explain": None}, shown=[*told.shown, said], error=told.error or error)
    *before, verdict = told.shown
    data = {**told.data, "explain": _explanation_data(found, image)}
    return Result(data=data, shown=[*before, *_explanation_shown(found), line, verdict], error=told.error)


def _draw(explanation: Explanation, target: Path | str) -> str:
    """Write the image, if there is to be one; return the line that says so."""
    if isinstance(target, str):
        return target
    from vit_edge.export.explanation.plot import draw_layers

    draw_layers(target, explanation)
    return f"image: {target}"


def _explanation_data(explanation: Explanation, target: Path | str) -> dict[str, Any]:
    """Return everything as JSON-ready values; each layer with its times in every engine."""
    layers = [asdict(layer) | {"engines": {}} for layer in explanation.layers]
    engines = []
    for entry in explanation.engines:
        fields = asdict(entry)
        for layer, times in zip(layers, fields.pop("layers"), strict=True):
            del times["node"]
            layer["engines"][entry.engine] = times
        engines.append(fields)
    return {
        "images": explanation.num_images,
        "stages": [asdict(stage) for stage in explanation.stages],
        "layers": layers,
        "engines": engines,
        "notes": list(explanation.notes),
        "image": None if isinstance(target, str) else str(target),
    }


def _explanation_shown(explanation: Explanation) -> list[Any]:
    """Return the tables for people: the stages, then the layers once for each engine."""
    rows = [
        (stage.name, stage.engine, _decibels(stage.sqnr_db), _decibels(stage.sqnr_before_db),
         "-" if stage.agreement is None else f"{stage.agreement:.1f} %", stage.note)
        for stage in explanation.stages
    ]  # fmt: skip
    columns = ("stage", "in", "SQNR dB", "against the one before", "agreement", "what changed")
    title = f"Where the error comes in, on {explanation.num_images} images, against {explanation.stages[0].name}"
    shown: list[Any] = [make_table(title, columns, rows)]
    shown += [_layers_table(explanation.layers, entry) for entry in explanation.engines]
    return [*shown, *(f"note: {note}" for note in explanation.notes)]


def _layers_table(layers: Sequence[Layer], entry: EngineTimes) -> Any:
    rows: list[tuple[str, ...]] = [
        (
            layer.node,
            "-" if layer.gmac is None else f"{layer.gmac:.3g}",
            times.precision,
            _milliseconds(times.reference_ms),
            _milliseconds(times.candidate_ms),
            _decibels(layer.sqnr_db),
            "-" if layer.noise_share is None else f"{layer.noise_share:.1f} %",
        )
        for layer, times in zip(layers, entry.layers, strict=True)
    ]
    rows += [
        (
            f"({other.operator})",
            "",
            "",
            _milliseconds(other.reference_ms),
            _milliseconds(other.candidate_ms),
            "",
            "",
        )
        for other in entry.rest
    ]
    rows.append(
        ("the whole network", "", "", _milliseconds(entry.reference_ms), _milliseconds(entry.candidate_ms), "", "")
    )
    columns = ("layer", "GMAC", "runs in", "float file, ms", "this file, ms", "SQNR dB", "share of noise")
    title = (
        f"Layers in {entry.engine} {entry.version}, batch {entry.batch_size}, one thread, median of {entry.num_runs}"
    )
    return make_table(title, columns, rows)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "equal" if value > 0 else "no signal"
