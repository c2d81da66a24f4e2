"""`vit-edge explain`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.options import load_options, option_group
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.errors import MissingExtra, printable, require
from vit_edge.files import may_write

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.export.explanation.explainer import Explanation
    from vit_edge.export.explanation.layer_times import EngineTimes

__all__ = ["explain"]

_PATH = click.Path(path_type=Path)
_MOST_IMAGES = 1000


@command("explain")
@file_argument("model")
@click.option("--reference", type=_PATH, required=True, help="Float32 file that MODEL was made from.")
@click.option("--data", type=_PATH, required=True, metavar="DIR", help="Images to run; labels are not needed.")
@click.option(
    "--calibration",
    type=_PATH,
    metavar="DIR",
    help="Calibration images of MODEL; adds a stage for each algorithm, and the share of the noise.",
)
@click.option(
    "--num-images",
    type=click.IntRange(1, _MOST_IMAGES),
    default=64,
    show_default=True,
    help="Run this many of the images, evenly spaced.",
)
@click.option("-o", "--out", type=_PATH, default=Path("layers.png"), show_default=True, help="Plot of the layers.")
@click.option("--force", is_flag=True, help="Replace the plot if it exists.")
@option_group(
    "The network before the export",
    click.option("--checkpoint", metavar="SOURCE", help="Source of the reference, as for `vit-edge export`."),
    click.option("--weights", type=_PATH, metavar="FILE", help="Weights for a package.module:factory."),
    click.option("--like", metavar="timm:NAME", help="Take what the checkpoint does not specify from timm."),
)  # fmt: skip
@option_group(
    "Where it runs",
    click.option("--engine", "engines", multiple=True,
                 help="Time the layers in onnxruntime or openvino; repeatable  [default: all installed]."),
    threads_option(),
)  # fmt: skip
@load_options
def explain(
    model: Path,
    reference: Path,
    data: Path,
    calibration: Path | None,
    num_images: int,
    out: Path,
    force: bool,
    checkpoint: str | None,
    weights: Path | None,
    like: str | None,
    engines: tuple[str, ...],
    threads: int | None,
) -> Result:
    """Show where the error of MODEL comes from, stage by stage and layer by layer, and what each layer costs.

    The stages are PyTorch and plain ONNX (with --checkpoint), the float32 reference, each algorithm of the
    quantization (with --calibration), and MODEL in each engine. The images are run, nothing is tuned on them.

    \b
    Examples:
      vit-edge explain model.int8.onnx --reference model.onnx --data images/test
      vit-edge explain model.int8.onnx --reference model.onnx \\
        --data images/test --calibration images/train \\
        --checkpoint run/best.safetensors
    """
    for module in ("onnxruntime", "scipy"):
        require(module, extra="export,onnxruntime", what="explain")
    from vit_edge.export import ExplanationOptions
    from vit_edge.export import explain as run

    target = _plot_target(out, force=force)
    options = ExplanationOptions(
        checkpoint=checkpoint,
        weights=weights,
        like=like,
        calibration=calibration,
        num_images=num_images,
        engines=engines,
        threads=threads,
    )
    with progress_bar() as progress:
        found = run(model, reference=reference, data=data, options=options, progress=progress)
    line = _draw(found, target)
    about = {"model": printable(model), "reference": printable(reference), "data": printable(data)}
    return Result(data={**about, **_data(found, target)}, shown=[_sentence(found), *_shown(found), line])


def _plot_target(out: Path, *, force: bool) -> Path | str:
    """Return where the plot will be written, or why there will be none; raises UsageError."""
    from vit_edge.export.explanation.plot import require_matplotlib

    try:
        require_matplotlib()
    except MissingExtra as error:
        return f"{out} is not drawn: {error.reason}; {error.remedy}"
    return may_write(out, force=force)


def _draw(explanation: Explanation, target: Path | str) -> str:
    """Draw the plot, if it can be drawn; return the line that says so."""
    if isinstance(target, str):
        return target
    from vit_edge.export.explanation.plot import draw_layers

    draw_layers(target, explanation)
    return f"plot: {target}"


def _data(explanation: Explanation, target: Path | str) -> dict[str, Any]:
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
        "plot": None if isinstance(target, str) else str(target),
    }


def _sentence(explanation: Explanation) -> str:
    """Return in one sentence how near the file is to the first stage, and which layer loses most."""
    first, last = explanation.stages[0], explanation.stages[-1]
    text = f"SQNR {_decibels(last.sqnr_db)} dB against {first.name} on {explanation.num_images} images"
    noisy = [layer for layer in explanation.layers if layer.noise_share is not None]
    if not noisy:
        return text
    worst = max(noisy, key=lambda layer: layer.noise_share or 0.0)
    return f"{text}; {worst.node} brings in most of the noise, {worst.noise_share:.1f} %"


def _shown(explanation: Explanation) -> Iterator[Any]:
    """Yield the tables for people: the stages, then the layers once for each engine."""
    rows = [
        (stage.name, stage.engine, _decibels(stage.sqnr_db), _decibels(stage.sqnr_before_db),
         "-" if stage.agreement is None else f"{stage.agreement:.1f} %")
        for stage in explanation.stages
    ]  # fmt: skip
    columns = ("stage", "engine", "SQNR dB", "step dB", "agree")
    title = f"Error by stage: SQNR against {explanation.stages[0].name}, and against the stage before"
    yield make_table(title, columns, rows)
    yield from (f"{stage.name} in {stage.engine}: {stage.note}" for stage in explanation.stages)
    for entry in explanation.engines:
        yield _layers_table(explanation, entry)
    yield from (f"note: {note}" for note in explanation.notes)


def _layers_table(explanation: Explanation, entry: EngineTimes) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            layer.node,
            times.precision,
            _milliseconds(times.reference_ms),
            _milliseconds(times.candidate_ms),
            _decibels(layer.sqnr_db),
            "-" if layer.noise_share is None else f"{layer.noise_share:.1f} %",
        )
        for layer, times in zip(explanation.layers, entry.layers, strict=True)
    ]
    rest = [(f"({other.operator})", other.reference_ms, other.candidate_ms) for other in entry.rest]
    for name, before, after in [*rest, ("the whole network", entry.reference_ms, entry.candidate_ms)]:
        rows.append((name, "", _milliseconds(before), _milliseconds(after), "", ""))
    columns = ("layer", "runs in", "float32 ms", f"{explanation.precision} ms", "SQNR dB", "noise")
    how = f"batch {entry.batch_size}, one thread, median of {entry.num_runs}"
    return make_table(f"Layers in {entry.engine} {entry.version}, {how}", columns, rows)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "equal" if value > 0 else "no signal"
