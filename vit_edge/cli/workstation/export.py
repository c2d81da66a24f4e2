"""`vit-edge export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.output import Result, command, image_size_option, make_table, megabytes, progress_bar
from vit_edge.errors import UsageError, require
from vit_edge.files import is_file

if TYPE_CHECKING:
    from vit_edge.export import ExportResult
    from vit_edge.export.parity.parity import Parity

_PATH = click.Path(path_type=Path)
_OUTPUTS = ("logits", "probabilities", "top5", "features", "attention")


def _batch(_context: click.Context, _parameter: click.Parameter, value: str) -> int | None:
    if value == "dynamic":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor 'dynamic'")
    return int(value)


def _outputs(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


@command("export")
@click.argument("source")
@click.option("-o", "--out", type=_PATH, help="What to write  [default: model.onnx].")
@click.option("--batch", default="dynamic", callback=_batch, metavar="dynamic|N", help="[default: dynamic]")
@click.option("--input", "input_", type=click.Choice(["uint8-nhwc", "float32-nchw"]), default="uint8-nhwc",
              show_default=True, help="Pixels, or pixels normalised by the application.")  # fmt: skip
@click.option("--outputs", default="logits", show_default=True, callback=_outputs, metavar="NAME,...",
              help=f"Of {', '.join(_OUTPUTS)}; the logits are always there.")  # fmt: skip
@click.option("--min-onnxruntime", default="1.17", show_default=True, help="Oldest release that has to run it.")
@click.option("--format", "format_", type=click.Choice(["onnx", "openvino", "huggingface"]), default="onnx",
              show_default=True, help="One file, IR, or a folder for Optimum and transformers.js.")  # fmt: skip
@click.option("--no-deploy-form", is_flag=True, help="Trace the network as it is, for comparison.")
@click.option("--data", type=_PATH, help="Images to prove parity on too.")
@click.option("--labels", type=_PATH, metavar="FILE|DIR", help="Class names: a line each, JSON, or class folders.")
@click.option("--preprocessing", type=_PATH, metavar="FILE",
              help="JSON or TOML: resize, crop, interpolation, mean, std.")  # fmt: skip
@image_size_option("Size of the input, where it is to be another.")
@click.option("--like", metavar="timm:NAME", help="Network of timm to ask for what weights from elsewhere do not tell.")
@click.option("--weights", type=_PATH, help="Weights for package.module:factory.")
@click.option(
    "--layout", type=click.Choice(["NCHW", "NHWC"]), help="Of the input of an ONNX file, where it is unclear."
)
@click.option(
    "--logits", metavar="NAME", help="Output of an ONNX file that has several [default: the first that fits]."
)
@click.option("--force", is_flag=True, help="Replace what is there.")
def export(source: str, out: Path | None, data: Path | None, force: bool, **values: Any) -> Result:
    """Export SOURCE to one ONNX file that needs nothing beside it.

    SOURCE is a checkpoint, or whatever `vit-edge convert` takes, or package.module:factory for any torch image
    classifier, whose code is run. The file takes uint8 RGB pixels of any batch size and holds its preprocessing, labels
    and golden vectors. It appears under its name only after ONNX Runtime and OpenVINO gave PyTorch's answers at batches
    1, 2, 3, 7 and 16. An ONNX classifier made elsewhere, with --labels and --preprocessing, keeps the input that it has
    and is held against itself.

    \b
    Examples:
      vit-edge export run/best.safetensors -o model.onnx
      vit-edge export torchvision.models:swin_t --weights swin.safetensors --labels names.txt
      vit-edge export theirs.onnx --labels names.txt --preprocessing preprocessing.json -o model.onnx
    """
    for module in ("torch", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export,onnxruntime", what="export")
    if is_file(source) and Path(source).suffix.lower() == ".onnx":
        return _adopt(Path(source), out or Path("model.onnx"), data, force, values)
    from vit_edge.export import ExportOptions, export_onnx
    from vit_edge.export.tracing.formats import may_write_format

    options = ExportOptions(
        batch=values["batch"],
        input=values["input_"],
        outputs=values["outputs"],
        min_onnxruntime=values["min_onnxruntime"],
        format=values["format_"],
        deploy_form=not values["no_deploy_form"],
    )
    target = out or Path(_DEFAULT_OUT[options.format])
    may_write_format(target, options, force=force, made_from=source if is_file(source) else None)
    network = _network(source, values)
    with progress_bar() as progress:
        result = export_onnx(**network, out=target, options=options, data=data, force=force, progress=progress)
    return Result(data=asdict(result), shown=_shown(result))


_DEFAULT_OUT = {"onnx": "model.onnx", "openvino": "model.xml", "huggingface": "model"}


def _network(source: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return what is exported, with what the options say of it: a checkpoint, or the network of a factory."""
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.convert import open_source
    from vit_edge.export.tracing.factory import factory_preprocessing, is_factory, make_network

    for name in ("layout", "logits"):
        _refuse(source, name, values, "is for an ONNX file made elsewhere")
    told = {name: values[name] for name in ("preprocessing", "labels", "image_size", "like")}
    if not is_factory(source):
        _refuse(source, "weights", values, "is for package.module:factory; any other source has its own")
        return {"source": open_source(source, **told)}
    _refuse(source, "like", values, "is for weights from elsewhere, not for a network with code of its own")
    preprocessing, assumed = factory_preprocessing(told["preprocessing"], image_size=told["image_size"])
    return {
        "source": make_network(source, weights=values["weights"]),
        "name": source.partition(":")[2],
        "preprocessing": preprocessing,
        "labels": read_labels(told["labels"]) if told["labels"] else None,
        "assumed": assumed,
    }


# What a network that is a graph already can no longer be told, and what says that nobody did.
_NOT_FOR_ONNX = {
    "batch": None,
    "input_": "uint8-nhwc",
    "outputs": ("logits",),
    "min_onnxruntime": "1.17",
    "format_": "onnx",
    "no_deploy_form": False,
    "like": None,
    "weights": None,
}


def _adopt(source: Path, out: Path, data: Path | None, force: bool, values: dict[str, Any]) -> Result:
    """Make a model file of an ONNX classifier made elsewhere."""
    require("onnxruntime", extra="export,onnxruntime", what="export")
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.data import find_images, stream_pixels
    from vit_edge.export.onnx_import.importer import adopt
    from vit_edge.export.tracing.factory import factory_preprocessing
    from vit_edge.files import may_write, write_atomic

    _check_told(source, values)
    target = may_write(out, force=force, made_from=source)
    preprocessing, assumed = factory_preprocessing(values["preprocessing"], image_size=values["image_size"])
    real_images = [] if data is None else find_images(data)
    with progress_bar() as progress:
        adopted = adopt(
            source,
            preprocessing=preprocessing,
            labels=read_labels(values["labels"]),
            layout=values["layout"],
            output=values["logits"],
            assumed=assumed,
            real_images=(pixels for _, pixels in stream_pixels(real_images, preprocessing)) if real_images else (),
            progress=progress,
        )
    write_atomic(target, adopted.model.data)
    size_bytes, sha256 = len(adopted.model.data), adopted.model.sha256
    fields = {"model": str(target), "sha256": sha256, "size_bytes": size_bytes, "changes": list(adopted.notes)}
    shown = [
        _parity_table("Against the file it was made from", adopted.parity),
        f"model: {target} ({megabytes(size_bytes)}, sha256 {sha256})",
    ]
    return Result(data={**fields, "parity": [asdict(entry) for entry in adopted.parity]}, shown=shown)


def _check_told(source: Path, values: dict[str, Any]) -> None:
    """Raise UsageError where an option cannot be followed, or one that is needed is not there."""
    for name, default in _NOT_FOR_ONNX.items():
        if values[name] != default:
            option = name.strip("_").replace("_", "-")
            reason = f"--{option} is for a network that is traced; an ONNX file is taken as it is"
            raise UsageError("cannot export", file=source, reason=reason, remedy=f"leave --{option} out")
    for name in ("labels", "preprocessing"):
        if values[name] is None:
            reason = f"an ONNX file made elsewhere does not say its {name}"
            raise UsageError("cannot export", file=source, reason=reason, remedy=f"give --{name}")


def _refuse(source: str, name: str, values: dict[str, Any], why: str) -> None:
    if values[name] is not None:
        raise UsageError("cannot export", file=source, reason=f"--{name} {why}", remedy=f"leave --{name} out")


def _shown(result: ExportResult) -> Sequence[Any]:
    return [
        _parity_table("Against PyTorch in float32", result.parity),
        f"model: {result.model} ({megabytes(result.size_bytes)}, sha256 {result.sha256})",
    ]


def _parity_table(title: str, parity: Sequence[Parity]) -> Any:
    columns = ("engine", "on", "batch", "max difference", "mean", "SQNR dB", "same answer")
    rows = [
        (p.engine, p.inputs, p.batch_size, f"{p.max_difference:.1e}", f"{p.mean_difference:.1e}", f"{p.sqnr_db:.0f}",
         f"{p.top1_equal} of {p.num_images}")
        for p in parity
    ]  # fmt: skip
    return make_table(title, columns, rows)
