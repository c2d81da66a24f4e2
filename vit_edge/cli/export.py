"""`vit-edge export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.output import Result, command, make_table, megabytes, progress_bar
from vit_edge.errors import UsageError, require

if TYPE_CHECKING:
    from vit_edge.export import ExportResult
    from vit_edge.image import Preprocessing

# option -> the field of Preprocessing that it gives
_PREPROCESSING = {
    "image_size": "crop",
    "resize": "resize",
    "interpolation": "interpolation",
    "mean": "mean",
    "std": "std",
}
_OUTPUTS = ("logits", "probabilities", "top5", "features", "attention")


def _batch(_context: click.Context, _parameter: click.Parameter, value: str) -> int | None:
    if value == "dynamic":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor 'dynamic'")
    return int(value)


def _outputs(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _three(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise click.BadParameter(f"{value!r} is not three numbers, as in 0.485,0.456,0.406")
    return numbers


@command("export")
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="What to write  [default: model.onnx].")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
              help="fp16 halves the file; on CPUs it is storage, not speed.")  # fmt: skip
@click.option("--batch", default="dynamic", callback=_batch, metavar="dynamic|N", help="[default: dynamic]")
@click.option("--input", "input_", type=click.Choice(["uint8-nhwc", "float32-nchw"]), default="uint8-nhwc",
              show_default=True, help="Pixels, or pixels normalised by the application.")  # fmt: skip
@click.option("--outputs", default="logits", show_default=True, callback=_outputs, metavar="NAME,...",
              help=f"Of {', '.join(_OUTPUTS)}; the logits are always there.")  # fmt: skip
@click.option("--min-onnxruntime", default="1.17", show_default=True, help="Oldest release that has to run it.")
@click.option("--format", "format_", type=click.Choice(["onnx", "openvino", "huggingface"]), default="onnx",
              show_default=True, help="One file, IR, or a folder for Optimum and transformers.js.")  # fmt: skip
@click.option("--labels", type=click.Path(path_type=Path), help="Text file with one label a line, in class order.")
@click.option("--no-deploy-form", is_flag=True, help="Trace the network as it is, for comparison.")
@click.option("--data", type=click.Path(path_type=Path), help="Pictures to prove parity on too.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights for package.module:factory.")
@click.option("--image-size", type=int, help="Input side in pixels, of a factory's network  [default: 224].")
@click.option("--resize", type=int, help="Short side before the crop  [default: 8/7 of the image size].")
@click.option("--interpolation", type=click.Choice(["nearest", "bilinear", "bicubic", "lanczos"]))
@click.option("--mean", callback=_three, metavar="R,G,B", help="Of RGB in [0, 1]  [default: ImageNet's].")
@click.option("--std", callback=_three, metavar="R,G,B")
@click.option("--force", is_flag=True, help="Replace what is there.")
def export(source: str, out: Path | None, labels: Path | None, data: Path | None, force: bool, **values: Any) -> Result:
    """Export SOURCE to one ONNX file that needs nothing beside it.

    SOURCE is a checkpoint, or package.module:factory for any torch image classifier, whose code is run. The file takes
    uint8 RGB pixels of any batch size and holds its preprocessing, labels and golden vectors. It appears under its name
    only after ONNX Runtime and OpenVINO gave PyTorch's answers at batches 1, 2, 3, 7 and 16.

    \b
    Examples:
      vit-edge export run/checkpoint.safetensors -o model.onnx
      vit-edge export torchvision.models:swin_t --weights swin.safetensors --labels names.txt
    """
    for module in ("torch", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export,onnxruntime", what="export")
    from vit_edge.export import ExportOptions, export_onnx
    from vit_edge.export.network import read_labels

    options = ExportOptions(
        precision=values["precision"],
        batch=values["batch"],
        input=values["input_"],
        outputs=values["outputs"],
        min_onnxruntime=values["min_onnxruntime"],
        format=values["format_"],
        deploy_form=not values["no_deploy_form"],
    )
    with progress_bar() as progress:
        result = export_onnx(
            **_network(source, values),
            out=out or Path(_DEFAULT_OUT[options.format]),
            options=options,
            labels=read_labels(labels) if labels else None,
            data=data,
            force=force,
            progress=progress,
        )
    return Result(data=asdict(result), shown=_shown(result, options.precision))


_DEFAULT_OUT = {"onnx": "model.onnx", "openvino": "model.xml", "huggingface": "model"}


def _network(source: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the path of a checkpoint, or the network of a factory with what the options say of it."""
    from vit_edge.export.factory import is_factory, make_network

    given = [name for name in ("weights", *_PREPROCESSING) if values[name] is not None]
    if is_factory(source):
        return {
            "source": make_network(source, weights=values["weights"]),
            "name": source.partition(":")[2],
            "preprocessing": _preprocessing(values),
            "assumed": [f"preprocessing.{field}" for name, field in _PREPROCESSING.items() if values[name] is None],
        }
    if given:
        option = f"--{given[0].replace('_', '-')}"
        reason = f"{option} is for package.module:factory; a checkpoint has its own"
        raise UsageError("cannot export", file=source, reason=reason, remedy=f"leave {option} out")
    return {"source": Path(source)}


def _preprocessing(values: dict[str, Any]) -> Preprocessing:
    from vit_edge.image import Preprocessing

    side = values["image_size"] or 224
    fields = {name: values[name] for name in ("interpolation", "mean", "std") if values[name] is not None}
    try:
        return Preprocessing(resize=values["resize"] or round(side * 8 / 7), crop=(side, side), **fields)
    except ValueError as error:
        raise UsageError("cannot export", reason=str(error), remedy="correct these options") from error


def _shown(result: ExportResult, precision: str) -> Sequence[Any]:
    columns = ("engine", "on", "batch", "max difference", "mean", "SQNR dB", "same answer")
    rows = [
        (p.engine, p.inputs, p.batch_size, f"{p.max_difference:.1e}", f"{p.mean_difference:.1e}", f"{p.sqnr_db:.0f}",
         f"{p.top1_equal} of {p.num_images}")
        for p in result.parity
    ]  # fmt: skip
    shown = [
        make_table("Against PyTorch in float32", columns, rows),
        f"model: {result.model} ({megabytes(result.size_bytes)}, sha256 {result.sha256})",
    ]
    if precision == "fp16":
        shown.append("float16 is storage on CPUs: engines compute in float32 there, and no faster")
    return shown
