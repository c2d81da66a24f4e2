"""`vit-edge quantize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.output import (
    Result,
    command,
    file_argument,
    image_size_option,
    make_table,
    megabytes,
    progress_bar,
)
from vit_edge.cli.workstation.verify import certifiable_text, figures_data, figures_table
from vit_edge.errors import Interrupted, UsageError, VerificationFailed, require
from vit_edge.machine.targets import DEFAULT_TARGET

if TYPE_CHECKING:
    from vit_edge.export import QuantizationOptions, QuantizationResult
    from vit_edge.export.verification.results import Verification
    from vit_edge.model_file.artifact import ModelFile

_PATH = click.Path(path_type=Path)
_NUM_NAMED = 8


@command("quantize")
@file_argument("model")
@click.option("--calibration", type=_PATH, help="Folder of images like those in use; labels are not needed.")
@click.option("--data", type=_PATH, help="Images to judge the result by; none of them may calibrate.")
@click.option("-o", "--out", type=_PATH, help="File to write  [default: model.int8.onnx or model.fp16.onnx].")
@click.option("--precision", type=click.Choice(["int8", "int8-dynamic", "fp16"]), default="int8", show_default=True,
              help="int8: ranges from --calibration. int8-dynamic: ranges found at run time, one image at a time; "
                   "--calibration brings it nearer. fp16: half the file; on CPUs it is storage only.")  # fmt: skip
@click.option("--target", default=DEFAULT_TARGET, show_default=True, metavar="NAME|auto|FILE",
              help="portable: the same answers on every CPU. x86-vnni, arm-dotprod, openvino-npu, tensorrt, qnn: for "
                   "that hardware. auto: this machine. FILE: from `vit-edge doctor --json` on the device.")  # fmt: skip
@click.option("--recipe", default="fast", show_default=True, metavar="fast|accurate",
              help="fast: every product in integers. accurate: those that err most stay float.")  # fmt: skip
@click.option("--effort", default="balanced", show_default=True, metavar="fast|balanced|thorough",
              help="How many steps the optimisers take.")  # fmt: skip
@click.option("--algorithm", "algorithms", multiple=True, metavar="NAME",
              help="Take this algorithm, repeatable, in place of the recipe's.")  # fmt: skip
@click.option("--without", multiple=True, metavar="NAME", help="Leave this algorithm of the recipe out, repeatable.")
@click.option("--ranges", default="averaged min-max", show_default=True, metavar="METHOD",
              help="How ranges are found at first: min-max, averaged min-max, percentile, entropy or mse.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
              help="Images that calibrate at once; the ranges are the same for any.")  # fmt: skip
@click.option("--max-drop", type=float, help="Points of top-1 that may be lost, at 95 % confidence; needs --data.")
@click.option("--min-agreement", type=float,
              help="Percent of answers that must be those of the float file; --data needs no labels then.")  # fmt: skip
@click.option("--unlabelled", is_flag=True, help="Take --data as images without labels.")
@click.option("--time-limit", type=float, metavar="MINUTES",
              help="End the search for a budget, so long after the start, with the best file so far.")  # fmt: skip
@click.option("--labels", type=_PATH, metavar="FILE|DIR", help="Class names of an ONNX file made elsewhere.")
@click.option("--preprocessing", type=_PATH, metavar="FILE", help="Preprocessing of an ONNX file made elsewhere.")
@image_size_option("Size of the input of an ONNX file made elsewhere.")
@click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Of its input, where that is unclear.")
@click.option("--logits", metavar="NAME", help="Output of it that is the logits [default: the first that fits].")
@click.option("--no-cache", is_flag=True, help="Neither read nor keep what earlier runs found.")
@click.option("--no-speed", is_flag=True, help="Do not measure how fast it is here.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def quantize(
    model: Path, calibration: Path | None, data: Path | None, out: Path | None, force: bool, **values: Any
) -> Result:
    """Quantize the float32 file MODEL to INT8, with ranges from calibration images.

    Integers enter at the inputs of products with constant weights, where nearly all the arithmetic is; the rest stays
    float. With --data the figures on those images are shown and kept in the file. With --max-drop or --min-agreement
    products are made integer as long as these images certify it: exit code 6 where they do not.

    \b
    Examples:
      vit-edge quantize model.onnx --calibration images/train --data images/test
      vit-edge quantize model.onnx --calibration images/train --data images/test --max-drop 1
    """
    for module in ("onnx", "onnxruntime", "scipy", "threadpoolctl"):
        require(module, extra="export,onnxruntime", what="quantize")
    from vit_edge.export import QuantizationOptions, quantize_model

    options = QuantizationOptions(
        precision=values["precision"],
        target=values["target"],
        recipe=values["recipe"],
        effort=values["effort"],
        algorithms=values["algorithms"] or None,
        without=values["without"],
        ranges=values["ranges"],
        batch_size=values["batch_size"],
        max_drop_points=values["max_drop"],
        min_agreement=values["min_agreement"],
        unlabelled=values["unlabelled"],
        time_limit_s=values["time_limit"] and values["time_limit"] * 60,
        use_cache=not values["no_cache"],
        measure_speed=not values["no_speed"],
    )
    out = out or Path("model.fp16.onnx" if options.precision == "fp16" else "model.int8.onnx")
    with _resumable(kept=calibration is not None and options.use_cache), progress_bar() as progress:
        source = _open(model, values, progress)
        _say_outlook(data, source, options)
        result = quantize_model(
            source, calibration=calibration, data=data, out=out, options=options, force=force, progress=progress
        )
    return Result(data=_fields(result), shown=_shown(result), error=_failure(result))


@contextmanager
def _resumable(*, kept: bool) -> Iterator[None]:
    """Say of Ctrl-C that nothing is lost, where what was found so far is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not kept:
            raise
        remedy = "what was calibrated and judged so far is kept: the same command goes on from there"
        raise Interrupted("stopped", reason="interrupted by the user", remedy=remedy) from error


def _open(model: Path, values: dict[str, Any], progress: Any) -> ModelFile:
    """Return the float model file: as it is, or made of an ONNX classifier from elsewhere and what the options say."""
    from vit_edge.export.onnx_import.importer import adopt, is_third_party_onnx
    from vit_edge.model_file.artifact import open_model

    told = [name for name in ("labels", "preprocessing", "image_size", "layout", "logits") if values[name] is not None]
    if not is_third_party_onnx(model):
        source = open_model(model)
        if told:
            reason = f"--{told[0].replace('_', '-')} is for an ONNX file made elsewhere; this one says it itself"
            raise UsageError("cannot quantize", file=model, reason=reason, remedy="leave it out")
        return source
    for name in ("labels", "preprocessing"):
        if values[name] is None:
            reason = f"it was made elsewhere and does not say its {name}"
            raise UsageError("cannot quantize", file=model, reason=reason, remedy=f"give --{name}")
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.export.tracing.factory import factory_preprocessing  # torch, which nothing else here needs

    preprocessing, assumed = factory_preprocessing(values["preprocessing"], image_size=values["image_size"])
    adopted = adopt(
        model,
        preprocessing=preprocessing,
        labels=read_labels(values["labels"]),
        layout=values["layout"],
        output=values["logits"],
        assumed=assumed,
        progress=progress,
    )
    return adopted.model


def _say_outlook(data: Path | None, source: ModelFile, options: QuantizationOptions) -> None:
    """Say what the images can certify at best, before any work is done."""
    from vit_edge.export.verification.paired_run import find_evaluation_images
    from vit_edge.export.verification.verdict import certifiable

    if options.budget is None or data is None or click.get_current_context().meta["quiet"]:
        return
    images = find_evaluation_images(data, source.manifest.labels, unlabelled=options.without_labels)
    found = certifiable(images.num_images, options.budget)
    click.echo(certifiable_text(found, options.budget, "all" if images.labelled else "none"), err=True)


def _fields(result: QuantizationResult) -> dict[str, Any]:
    found = result.verification
    return {
        "model": str(result.model),
        "sha256": result.sha256,
        "size_bytes": result.size_bytes,
        "size_ratio": result.size_ratio,
        "precision": result.precision,
        "target": result.target.name if result.target else None,
        "target_verified": result.target.verified if result.target else None,
        "target_reason": result.target_reason,
        "recipe": result.recipe,
        "algorithms": list(result.algorithms),
        "num_calibration_images": result.num_calibration_images,
        "num_ops": result.num_ops,
        "float32_ops": list(result.float32_ops),
        "float_share": result.float_share,
        "coverage": [
            {**asdict(entry), "percent": entry.percent, "percent_of_all": entry.percent_of_all}
            for entry in result.coverage
        ],
        "speed": [asdict(entry) for entry in result.speed],
        "budget": asdict(result.ladder) if result.ladder else None,
        "verdict": found.verdict if found and result.ladder else None,
        "images_needed": found.decisive.images_needed if found and result.ladder else None,
        "evaluation": figures_data(found) if found else None,
    }


def _shown(result: QuantizationResult) -> list[Any]:
    size = f"{megabytes(result.size_bytes)}, {result.size_ratio:.2f} of the float file"
    shown: list[Any] = []
    if result.target is not None:
        ranges = f"ranges from {result.num_calibration_images} images"
        if result.precision == "int8-dynamic":
            ranges = "ranges found at run time: it takes one image at a time, its batch is 1"
        shown += [
            f"target: {result.target.describe()}",
            f"{result.num_ops} products take integers, {ranges}",
            f"algorithms: {', '.join(result.algorithms) or 'none'}",
        ]
    if result.float32_ops:
        more = " ..." if len(result.float32_ops) > _NUM_NAMED else ""
        named = ", ".join(result.float32_ops[:_NUM_NAMED]) + more
        number = len(result.float32_ops)
        shown.append(f"{number} products stay float, {result.float_share:.1%} of the multiplications: {named}")
    rows = [(c.engine, f"{c.percent:.1f} %", f"{c.percent_of_all:.1f} %", str(len(c.alone))) for c in result.coverage]
    if rows:
        columns = ("engine", "of constant-weight GMAC", "of all GMAC", "Q/DQ left alone")
        shown.append(make_table("Computed in integers", columns, rows))
    if result.speed:
        shown.append(_speed_table(result))
    if result.ladder is not None and result.verification is not None:
        shown += _budget_lines(result)
    if result.verification is not None:
        shown.append(figures_table(result.verification, with_verdict=result.ladder is not None))
    return [*shown, f"model: {result.model} ({size}, sha256 {result.sha256})"]


def _speed_table(result: QuantizationResult) -> Any:
    """Return float, this file, and where something was left float what that costs."""
    more = any(entry.all_integer_ms is not None for entry in result.speed)
    rows = [
        (
            entry.engine,
            f"{entry.float_ms:.2f}",
            f"{entry.integer_ms:.2f}",
            f"{entry.ratio:.2f}",
            *((f"{entry.all_integer_ms:.2f}",) if entry.all_integer_ms is not None else ()),
        )
        for entry in result.speed
    ]
    columns = ("engine", "float, ms", "this file, ms", "times as fast", *(("all in integers, ms",) if more else ()))
    return make_table("Here, batch 1, one thread, median", columns, rows)


def _budget_lines(result: QuantizationResult) -> list[Any]:
    assert result.ladder is not None
    rows = [
        (str(rung.num_integer), f"{rung.drop_points:.2f}", f"{rung.drop_upper_bound_points:.2f}",
         f"{rung.agreement:.2f} %", f"{rung.sqnr_db:.1f}", rung.verdict)
        for rung in result.ladder.rungs
    ]  # fmt: skip
    unknown = result.verification is not None and result.verification.labels != "all"
    drop = "drop at most, points" if unknown else "drop, points"
    columns = ("integer products", drop, "bound, 95 %", "agreement", "SQNR dB", "verdict")
    lines: list[Any] = [make_table("Judged in this order", columns, rows)]
    if result.ladder.cut_short:
        lines.append(f"cut short by the {result.ladder.cut_short}: more may pass")
    return lines


def _failure(result: QuantizationResult) -> VerificationFailed | None:
    """Return the error to end with where a budget was not certified; the file is there all the same."""
    found = result.verification
    if result.ladder is None or found is None or found.verdict == "pass":
        return None
    worst = found.decisive
    if found.verdict == "inconclusive":
        remedy = f"{_more(found)}, or a larger budget; the file was written with its verdict in it"
        bounds = []
        if found.max_drop_points is not None:
            bounds.append(f"the drop at {worst.drop_upper_bound_points:.2f} points")
        if found.min_agreement is not None:
            bounds.append(f"the agreement at {worst.agreement_lower_bound:.2f} %")
        reason = f"{worst.images} images bound {' and '.join(bounds)}"
        return VerificationFailed("the budget is not certified", file=result.model, reason=reason, remedy=remedy)
    reason = f"the drop is {worst.drop_points:.2f} points, the agreement {worst.agreement:.2f} %"
    remedy = "try --recipe accurate, --effort thorough or more calibration images; the file was written all the same"
    return VerificationFailed("the budget is not met", file=result.model, reason=reason, remedy=remedy)


def _more(found: Verification) -> str:
    """Return what would settle an inconclusive verdict: labels where they are all that is missing, or images."""
    worst, limit = found.decisive, found.max_drop_points
    if (
        limit is not None
        and worst.unlabelled
        and worst.drop_upper_bound_points > limit >= found.certifiable.best_points
    ):
        number = found.num_unlabelled
        return f"give labels (`vit-edge verify` writes the {number} images that lack one, whose answer changed)"
    return f"give {f'about {worst.images_needed:,}' if worst.images_needed else 'many more'} images to judge by"
