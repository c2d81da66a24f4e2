"""`vit-edge quantize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.messages import print_message
from vit_edge.cli.options import load_options, option_group
from vit_edge.cli.output import (
    Result,
    command,
    file_argument,
    image_size_option,
    make_table,
    megabytes,
    progress_bar,
)
from vit_edge.cli.workstation.encoder_figures import (
    encoder_certifiable_text,
    encoder_failure,
    encoder_search_table,
    encoder_table,
)
from vit_edge.cli.workstation.verify import certifiable_text, figures_data, figures_table
from vit_edge.errors import Interrupted, UsageError, VerificationFailed, require
from vit_edge.machine.int8_engines import engine_advice
from vit_edge.machine.targets import DEFAULT_TARGET

if TYPE_CHECKING:
    from vit_edge.export import QuantizationOptions, QuantizationResult
    from vit_edge.export.quantization.accuracy_budget import SearchTrace
    from vit_edge.export.verification.encoder_results import AnyVerification
    from vit_edge.export.verification.results import Verification
    from vit_edge.model_file.artifact import ModelFile

_PATH = click.Path(path_type=Path)
_NUM_NAMED = 8


@command("quantize")
@file_argument("model")
@click.option("--calibration", type=_PATH, metavar="DIR", help="Calibration images, folder or shards; need no labels.")
@click.option(
    "--data",
    type=_PATH,
    metavar="DIR",
    help="Evaluation images to verify the result on; must not overlap the calibration images.",
)
@click.option(
    "--max-drop",
    "max_drop_points",
    type=float,
    metavar="POINTS",
    help="Quantize as much as keeps the drop of top-1 within this budget, at 95 % confidence; needs --data.",
)
@click.option(
    "--target",
    default=DEFAULT_TARGET,
    show_default=True,
    metavar="NAME|auto|FILE",
    help="portable: the same predictions on every CPU. x86-vnni, openvino-avx2, arm-dotprod, openvino-npu, tensorrt, "
    "qnn: for that hardware. auto: for this machine. FILE: from `vit-edge doctor --json` on the device.",
)
@click.option("-o", "--out", type=_PATH, help="Write this file  [default: MODEL.int8.onnx or .float16.onnx here].")
@option_group(
    "Accuracy budget",
    click.option(
        "--min-agreement",
        type=float,
        metavar="PERCENT",
        help="Keep at least this share of predictions unchanged, at 95 % confidence; --data then needs no labels.",
    ),
    click.option(
        "--min-neighbours",
        type=float,
        metavar="PERCENT",
        help="Encoders: keep at least this share of each image's ten nearest neighbours, at 95 % confidence.",
    ),
    click.option("--unlabelled", is_flag=True, help="Ignore the labels of --data."),
    click.option(
        "--time-limit",
        type=float,
        metavar="MINUTES",
        help="Stop the accuracy search after MINUTES and keep the best model so far.",
    ),
)
@option_group(
    "Precision and algorithms",
    click.option(
        "--precision",
        type=click.Choice(["int8", "int8-dynamic", "float16"]),
        default="int8",
        show_default=True,
        help="int8: constant ranges from --calibration. int8-dynamic: ranges computed at run time, batch 1; adding "
        "--calibration improves accuracy. float16: half the file; saves storage on CPUs, not time.",
    ),
    click.option(
        "--recipe",
        default="fast",
        show_default=True,
        metavar="fast|accurate",
        help="fast: quantize every MatMul, Gemm and Conv with constant weights. accurate: keep the most sensitive ones "
        "in float32.",
    ),
    click.option(
        "--effort",
        default="balanced",
        show_default=True,
        metavar="fast|balanced|thorough",
        help="Set how many steps the optimizers take.",
    ),
    click.option(
        "--algorithm", "algorithms", multiple=True, metavar="NAME", help="Replace the recipe's algorithms; repeatable."
    ),
    click.option("--without", multiple=True, metavar="NAME", help="Remove this algorithm of the recipe; repeatable."),
    click.option(
        "--ranges",
        default="moving-average",
        show_default=True,
        metavar="OBSERVER",
        help="Find the first ranges by min-max or moving-average, or from histograms by percentile, entropy or mse.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1, 1024),
        default=1,
        show_default=True,
        help="Calibrate on this many images at once; changes the time, not the ranges.",
    ),
)
@option_group(
    "Sample of the calibration images",
    click.option("--calibration-images", type=click.IntRange(1), metavar="N", help="Draw N of them  [default: all]."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draw the same ones each time."),
)
@option_group(
    "Third-party ONNX models",
    click.option("--labels", type=_PATH, metavar="FILE|DIR", help="Class names of the model."),
    click.option("--preprocessing", type=_PATH, metavar="FILE", help="Preprocessing of the model."),
    image_size_option("Input size of the model."),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Input layout, if the shape is ambiguous."),
    click.option("--logits", metavar="NAME", help="Output that holds the logits  [default: the first that fits]."),
)
@option_group(
    "Output and cache",
    click.option("--no-cache", is_flag=True, help="Neither read nor keep calibrations and verdicts of earlier runs."),
    click.option("--no-speed", is_flag=True, help="Do not measure the speed on this machine."),
    click.option("--force", is_flag=True, help="Replace an existing file."),
)
@load_options
def quantize(
    model: Path, calibration: Path | None, data: Path | None, out: Path | None, force: bool, **values: Any
) -> Result:
    """Quantize the float32 file MODEL to INT8, with ranges from calibration images.

    Quantizes MatMul, Gemm and Conv with constant weights (nearly all the compute); the rest stays float32. With --data
    the accuracy on those images is shown and kept in the file. With --max-drop or --min-agreement (encoders:
    --min-neighbours), ops are quantized as long as these images certify the budget: exit code 6 if they do not.

    \b
    Examples:
      vit-edge quantize model.onnx --calibration images/train --data images/test
      vit-edge quantize model.onnx --calibration images/train \\
        --data images/test --max-drop 1
    """
    for module in ("onnx", "onnxruntime", "scipy", "threadpoolctl"):
        require(module, extra="export,onnxruntime", what="quantize")
    from vit_edge.export import quantize as quantize_model

    options = _options(values)
    out = out or Path(f"{model.stem}.{'float16' if options.precision == 'float16' else 'int8'}.onnx")
    with _resumable(kept=calibration is not None and options.use_cache), progress_bar() as progress:
        source = _open(model, values, progress)
        _say_certifiable(data, source, options)
        result = quantize_model(
            source, calibration=calibration, data=data, out=out, options=options, force=force, progress=progress
        )
    return Result(data=_fields(result), shown=_shown(result), error=_failure(result))


def _options(values: dict[str, Any]) -> QuantizationOptions:
    from vit_edge.export import QuantizationOptions

    return QuantizationOptions(
        precision=values["precision"],
        target=values["target"],
        recipe=values["recipe"],
        effort=values["effort"],
        algorithms=values["algorithms"] or None,
        without=values["without"],
        ranges=values["ranges"],
        batch_size=values["batch_size"],
        max_drop_points=values["max_drop_points"],
        min_agreement=values["min_agreement"],
        min_neighbours=values["min_neighbours"],
        unlabelled=values["unlabelled"],
        time_limit_s=values["time_limit"] and values["time_limit"] * 60,
        calibration_images=values["calibration_images"],
        seed=values["seed"],
        use_cache=not values["no_cache"],
        measure_speed=not values["no_speed"],
    )


@contextmanager
def _resumable(*, kept: bool) -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost, if the results so far are kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not kept:
            raise
        remedy = "run the same command to continue; the calibration and the verdicts so far are kept"
        raise Interrupted("stopped", reason="interrupted by the user", remedy=remedy) from error


def _open(model: Path, values: dict[str, Any], progress: Any) -> ModelFile:
    """Return the float32 model file: MODEL itself, or imported from a third-party ONNX model with the options."""
    from vit_edge.export.onnx_import.importer import import_onnx, is_third_party_onnx
    from vit_edge.model_file.artifact import open_model

    given = [name for name in ("labels", "preprocessing", "image_size", "layout", "logits") if values[name] is not None]
    if not is_third_party_onnx(model):
        source = open_model(model)
        if given:
            option = f"--{given[0].replace('_', '-')}"
            reason = f"{option} is for third-party ONNX models; this file has a manifest"
            raise UsageError("cannot quantize", file=model, reason=reason, remedy=f"remove {option}")
        return source
    for name in ("labels", "preprocessing"):
        if values[name] is None:
            reason = f"the file is a third-party ONNX model; the {name} must be specified"
            raise UsageError("cannot quantize", file=model, reason=reason, remedy=f"give --{name}")
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.export.sources.torch_network import settled_preprocessing  # torch, which nothing else here needs

    preprocessing, assumed = settled_preprocessing(values["preprocessing"], image_size=values["image_size"])
    imported = import_onnx(
        model,
        preprocessing=preprocessing,
        labels=read_labels(values["labels"]),
        layout=values["layout"],
        output=values["logits"],
        assumed=assumed,
        progress=progress,
    )
    return imported.model


def _say_certifiable(data: Path | None, source: ModelFile, options: QuantizationOptions) -> None:
    """Print what the evaluation images can certify at best, before any work is done."""
    from vit_edge.export.verification.paired_run import find_evaluation_images
    from vit_edge.export.verification.request import what_certifies

    if options.budget is None or data is None or click.get_current_context().meta["quiet"]:
        return
    manifest = source.manifest
    images = find_evaluation_images(data, manifest.labels, unlabelled=options.without_labels, task=manifest.task)
    found = what_certifies(manifest, images.num_images, options.budget, is_labelled=images.labelled)
    if source.manifest.is_encoder:
        print_message(encoder_certifiable_text(found, options.budget))
        return
    print_message(certifiable_text(found, options.budget, "all" if images.labelled else "none"))


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
        "engine_advice": _advice(result),
        "recipe": result.recipe,
        "algorithms": list(result.algorithms),
        "accounts": list(result.accounts),
        "calibration_sqnr_db": result.calibration_sqnr_db,
        "num_calibration_images": result.num_calibration_images,
        "num_ops": result.num_ops,
        "float32_ops": list(result.float32_ops),
        "float_share": result.float_share,
        "coverage": [
            {**asdict(entry), "percent": entry.percent, "percent_of_all": entry.percent_of_all}
            for entry in result.coverage
        ],
        "speed": [asdict(entry) for entry in result.speed],
        "search": asdict(result.search) if result.search else None,
        "verdict": found.verdict if found and result.search else None,
        "images_needed": found.decisive.images_needed if found and result.search else None,
        "evaluation": _evaluation(found) if found else None,
    }


def _evaluation(found: AnyVerification) -> list[dict[str, Any]]:
    """Return each engine's figures as JSON-ready values, without a verdict on a budget."""
    from vit_edge.export.verification.results import Verification

    if isinstance(found, Verification):
        return figures_data(found)
    dropped = ("verdict", "images_needed", "moved")
    return [{key: value for key, value in asdict(r).items() if key not in dropped} for r in found.results]


def _table(found: AnyVerification, *, with_verdict: bool) -> Any:
    from vit_edge.export.verification.results import Verification

    if isinstance(found, Verification):
        return figures_table(found, with_verdict=with_verdict)
    return encoder_table(found, with_verdict=with_verdict)


def _shown(result: QuantizationResult) -> list[Any]:
    shown: list[Any] = [_sentence(result)]
    if result.target is not None:
        ranges = f"ranges from {result.num_calibration_images} images"
        if result.precision == "int8-dynamic":
            ranges = "ranges computed at run time, batch 1"
        shown += [
            f"target: {result.target.describe()}",
            *([f"run the file in: {advice}"] if (advice := _advice(result)) else []),
            f"{result.num_ops} ops run in INT8, {ranges}",
            f"algorithms: {', '.join(result.algorithms) or 'none'}",
            *(f"  {account}" for account in result.accounts),
        ]
    if result.float32_ops:
        more = " ..." if len(result.float32_ops) > _NUM_NAMED else ""
        named = ", ".join(result.float32_ops[:_NUM_NAMED]) + more
        number = len(result.float32_ops)
        shown.append(f"{number} ops stay in float32, {result.float_share:.1%} of the multiplications: {named}")
    rows = [(c.engine, f"{c.percent:.1f} %", f"{c.percent_of_all:.1f} %", str(len(c.alone))) for c in result.coverage]
    if rows:
        columns = ("engine", "of constant-weight GMAC", "of all GMAC", "Q/DQ not fused")
        shown.append(make_table("Share that runs in INT8", columns, rows))
    if result.speed:
        shown.append(_speed_table(result))
    if result.search is not None and result.verification is not None:
        shown += _budget_lines(result)
    if result.verification is not None:
        shown.append(_table(result.verification, with_verdict=result.search is not None))
    return [*shown, f"sha256: {result.sha256}"]


def _sentence(result: QuantizationResult) -> str:
    """Return the verdict, if a budget was asked for, the size and the speed in one sentence."""
    verdict = f"{result.verification.verdict}: " if result.search and result.verification else ""
    size = f"has {result.size_ratio:.2f} of the float32 file's size ({megabytes(result.size_bytes)})"
    times = ", ".join(f"{one.ratio:.2f} times as fast in {one.engine}" for one in result.speed)
    return f"{verdict}{result.model} {size}{f' and is {times}' if times else ''}"


def _advice(result: QuantizationResult) -> str | None:
    """Return which engine to use on which class of CPU."""
    return engine_advice(result.target.name) if result.target and result.precision == "int8" else None


def _speed_table(result: QuantizationResult) -> Any:
    """Return the times of the float32 file, of this file, and of one with all ops in INT8 if some stay in float32."""
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
    columns = ("engine", "float32, ms", "this file, ms", "times as fast", *(("all in INT8, ms",) if more else ()))
    return make_table("Latency on this machine: median, batch 1, one thread", columns, rows)


def _cut_short(search: SearchTrace) -> list[str]:
    return [f"the search was cut short ({search.cut_short}); more ops may pass"] if search.cut_short else []


def _budget_lines(result: QuantizationResult) -> list[Any]:
    from vit_edge.export.verification.results import Verification

    assert result.search is not None
    if not isinstance(result.verification, Verification):
        return [encoder_search_table(result.search), *_cut_short(result.search)]
    rows = [
        (str(step.num_integer), f"{step.drop_points:.2f}", f"{step.drop_upper_bound_points:.2f}",
         f"{step.agreement:.2f} %", f"{step.sqnr_db:.1f}", step.verdict)
        for step in result.search.steps
    ]  # fmt: skip
    unknown = result.verification is not None and result.verification.labels != "all"
    drop = "drop at most, points" if unknown else "drop, points"
    columns = ("ops in INT8", drop, "bound, 95 %", "agreement", "SQNR dB", "verdict")
    return [make_table("Accuracy search", columns, rows), *_cut_short(result.search)]


def _failure(result: QuantizationResult) -> VerificationFailed | None:
    """Return the error to end with if a budget was not certified; the file is written all the same."""
    from vit_edge.export.verification.results import Verification

    found = result.verification
    if result.search is None or found is None or found.verdict == "pass":
        return None
    if not isinstance(found, Verification):
        return encoder_failure(found, result.model)
    worst = found.decisive
    if found.verdict == "inconclusive":
        remedy = f"{_more(found)}, or a larger budget; the file was written and holds the verdict"
        bounds = []
        if found.max_drop_points is not None:
            bounds.append(f"the drop at {worst.drop_upper_bound_points:.2f} points")
        if found.min_agreement is not None:
            bounds.append(f"the agreement at {worst.agreement_lower_bound:.2f} %")
        reason = f"{worst.images} images bound {' and '.join(bounds)}"
        return VerificationFailed("cannot certify the budget", file=result.model, reason=reason, remedy=remedy)
    reason = f"the drop is {worst.drop_points:.2f} points, the agreement {worst.agreement:.2f} %"
    remedy = "use --recipe accurate, --effort thorough or more calibration images; the file holds the verdict"
    return VerificationFailed("cannot meet the budget", file=result.model, reason=reason, remedy=remedy)


def _more(found: Verification) -> str:
    """Return what would settle an inconclusive verdict: labels if only they are missing, else more images."""
    worst, limit = found.decisive, found.max_drop_points
    if (
        limit is not None
        and worst.unlabelled
        and worst.drop_upper_bound_points > limit >= found.certifiable.best_points
    ):
        number = found.num_unlabelled
        return f"label the {number} images whose prediction changed (`vit-edge verify` lists them)"
    return f"give {f'about {worst.images_needed:,}' if worst.images_needed else 'many more'} evaluation images"
