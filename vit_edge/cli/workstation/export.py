"""`vit-edge export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.options import option_group
from vit_edge.cli.output import Result, command, image_size_option, make_table, megabytes, progress_bar
from vit_edge.errors import UsageError, require
from vit_edge.files import is_file

if TYPE_CHECKING:
    from vit_edge.export import ExportResult
    from vit_edge.export.parity.parity import Parity

_PATH = click.Path(path_type=Path)
_OUTPUTS = ("logits", "probabilities", "top5", "features", "attention", "embedding", "tokens")


def _batch_size(_context: click.Context, _parameter: click.Parameter, value: str) -> int | None:
    if value == "dynamic":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor 'dynamic'")
    return int(value)


def _outputs(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


@command("export")
@click.argument("source")
@click.option("-o", "--out", type=_PATH, help="File to write  [default: model.onnx].")
@click.option("--labels", type=_PATH, metavar="FILE|DIR", help="Class names: a line each, JSON, or class folders.")
@click.option(
    "--preprocessing", type=_PATH, metavar="FILE", help="JSON or TOML: resize, crop, interpolation, mean, std."
)
@click.option("--data", type=_PATH, metavar="DIR", help="Images on which to check parity, in addition to noise.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@option_group(
    "Form of the file",
    click.option(
        "--format",
        "format_",
        type=click.Choice(["onnx", "openvino", "huggingface"]),
        default="onnx",
        show_default=True,
        help="One ONNX file, OpenVINO's IR, or a folder for Optimum and transformers.js.",
    ),
    click.option(
        "--input",
        "input_",
        type=click.Choice(["uint8-nhwc", "float32-nchw"]),
        default="uint8-nhwc",
        show_default=True,
        help="Take pixels, or pixels that the application normalised.",
    ),
    click.option(
        "--outputs",
        default="logits",
        show_default=True,
        callback=_outputs,
        metavar="NAME,...",
        help=f"Outputs of the graph: {', '.join(_OUTPUTS)}. embedding makes an encoder, without the head; "
        "all other files include the logits.",
    ),
    click.option("--normalize", is_flag=True, help="Scale the vector of an encoder to length 1, in the graph."),
    click.option(
        "--batch-size",
        default="dynamic",
        callback=_batch_size,
        metavar="dynamic|N",
        help="Fix the batch size of the graph  [default: dynamic].",
    ),
    click.option(
        "--min-onnxruntime", default="1.17", show_default=True, help="Oldest ONNX Runtime that must run the file."
    ),
    click.option("--no-fuse", is_flag=True, help="Trace the network as it is, without the fused inference graph."),
)
@option_group(
    "Checkpoints and torch networks",
    image_size_option("Input size, if not that of the checkpoint."),
    click.option("--like", metavar="timm:NAME", help="timm network that has the missing settings of the weights."),
    click.option("--weights", type=_PATH, help="Weights for package.module:factory, timm:NAME or hf:REPO."),
)
@option_group(
    "Zero-shot classifiers",
    click.option(
        "--zero-shot",
        type=_PATH,
        metavar="FILE",
        help="Class names, one a line: make a classifier of them from the CLIP or SigLIP folder SOURCE.",
    ),
    click.option(
        "--template", metavar="TEXT", help='Text for a label, which replaces {}  [default: "a photo of a {}"].'
    ),
)
@option_group(
    "Third-party ONNX models and torch networks",
    click.option(
        "--activation",
        type=click.Choice(["softmax", "sigmoid", "none"]),
        help="Meaning of the logits: one class, several classes, or plain values  [default: found, else softmax].",
    ),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Input layout, if the model does not show it."),
    click.option("--logits", metavar="NAME", help="Output that holds the logits  [default: the first that fits]."),
)
def export(source: str, out: Path | None, data: Path | None, force: bool, **values: Any) -> Result:
    """Export SOURCE to one ONNX file that is complete in itself.

    SOURCE is a checkpoint, anything that `vit-edge convert` takes, any image classifier of timm or Hugging Face (a
    folder, timm:NAME, hf:REPO), or a third-party ONNX classifier with --labels and --preprocessing. It may also be
    package.module:factory, or a program of torch.export (.pt2); their code is run. Plain Vision
    Transformers become the fused inference graph, any other network is traced as it is. The file takes uint8 RGB
    pixels at any batch size and holds its preprocessing, labels and golden vectors. It is written only after ONNX
    Runtime and OpenVINO gave PyTorch's logits at batch sizes 1, 2, 3, 7 and 16.

    \b
    Examples:
      vit-edge export run/best.safetensors -o model.onnx
      vit-edge export hf:microsoft/swin-tiny-patch4-window7-224 -o swin.onnx
      vit-edge export timm:convnext_atto --weights mine.pth --labels names.txt
      vit-edge export run/best.safetensors --outputs embedding --normalize \\
        -o encoder.onnx
      vit-edge export clip/ --zero-shot labels.txt -o classifier.onnx
      vit-edge export torchvision.models:swin_t --weights swin.safetensors \\
        --labels names.txt
      vit-edge export other.onnx --labels names.txt \\
        --preprocessing preprocessing.json -o model.onnx
    """
    for module in ("torch", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export,onnxruntime", what="export")
    if is_file(source) and Path(source).suffix.lower() == ".onnx":
        return _import(Path(source), out or Path("model.onnx"), data, force, values)
    from vit_edge.export import ExportOptions, export_onnx
    from vit_edge.export.tracing.formats import may_write_format

    options = ExportOptions(
        batch_size=values["batch_size"],
        input=values["input_"],
        outputs=values["outputs"],
        min_onnxruntime=values["min_onnxruntime"],
        format=values["format_"],
        fuse=not values["no_fuse"],
        normalize=values["normalize"],
    )
    target = out or Path(_DEFAULT_OUT[options.format])
    may_write_format(target, options, force=force, made_from=source if is_file(source) else None)
    network = _network(source, values)
    with progress_bar() as progress:
        result = export_onnx(**network, out=target, options=options, data=data, force=force, progress=progress)
    return Result(data=asdict(result), shown=_shown(result, is_encoder="embedding" in options.outputs))


_DEFAULT_OUT = {"onnx": "model.onnx", "openvino": "model.xml", "huggingface": "model"}


def _network(source: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the network to export: a checkpoint, or one that is traced as it is."""
    from vit_edge.export.sources.opener import open_network

    for name in ("layout", "logits"):
        _refuse(source, name, values, "is for third-party ONNX models")
    if values["zero_shot"] is not None:
        return _zero_shot(source, values)
    _refuse(source, "template", values, "is for --zero-shot")
    names = ("preprocessing", "labels", "image_size", "like", "weights", "activation")
    return {"source": open_network(source, **{name: values[name] for name in names})}


def _zero_shot(source: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the classifier of the labels in a file, from a CLIP or SigLIP folder."""
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.export.sources.zero_shot import DEFAULT_TEMPLATE, zero_shot_classifier

    for name in ("labels", "preprocessing", "image_size", "like", "weights", "activation"):
        _refuse(source, name, values, "is not for --zero-shot: the folder has all of it")
    labels = read_labels(values["zero_shot"])
    template = values["template"] or DEFAULT_TEMPLATE
    return {"source": zero_shot_classifier(source, labels=labels, template=template)}


# Options of the tracer, which an ONNX graph does not need, and their defaults.
_NOT_FOR_ONNX = {
    "batch_size": None,
    "input_": "uint8-nhwc",
    "outputs": ("logits",),
    "min_onnxruntime": "1.17",
    "format_": "onnx",
    "no_fuse": False,
    "normalize": False,
    "like": None,
    "weights": None,
    "zero_shot": None,
    "template": None,
}


def _import(source: Path, out: Path, data: Path | None, force: bool, values: dict[str, Any]) -> Result:
    """Make a model file of a third-party ONNX classifier."""
    require("onnxruntime", extra="export,onnxruntime", what="export")
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.data import find_images, stream_pixels
    from vit_edge.export import import_onnx
    from vit_edge.export.sources.torch_network import settled_preprocessing

    _check_options(source, values)
    preprocessing, assumed = settled_preprocessing(values["preprocessing"], image_size=values["image_size"])
    real_images = [] if data is None else find_images(data)
    with progress_bar() as progress:
        result = import_onnx(
            source,
            out=out,
            force=force,
            preprocessing=preprocessing,
            labels=read_labels(values["labels"]),
            layout=values["layout"],
            output=values["logits"],
            activation=values["activation"],
            assumed=assumed,
            real_images=(pixels for _, pixels in stream_pixels(real_images, preprocessing)) if real_images else (),
            progress=progress,
        )
    size_bytes, sha256 = len(result.model.data), result.model.sha256
    fields = {"model": str(out), "sha256": sha256, "size_bytes": size_bytes, "changes": list(result.notes)}
    shown = [
        _sentence(out, size_bytes, "those of the file it was made from", result.parity),
        _parity_table("Compared with the file it was made from", result.parity),
        f"sha256: {sha256}",
    ]
    return Result(data={**fields, "parity": [asdict(entry) for entry in result.parity]}, shown=shown)


def _check_options(source: Path, values: dict[str, Any]) -> None:
    """Raise UsageError if an option is not for an ONNX model, or a required one is missing."""
    from vit_edge.model_file.artifact import seal_state

    if seal_state(source.read_bytes()) != "third-party":
        reason, remedy = "the file is a model file of vit-edge already", "run `vit-edge quantize` or `deploy` with it"
        raise UsageError("cannot export", file=source, reason=reason, remedy=remedy)
    for name, default in _NOT_FOR_ONNX.items():
        if values[name] != default:
            option = name.strip("_").replace("_", "-")
            reason = f"--{option} is for a network that is traced; an ONNX graph stays as it is"
            raise UsageError("cannot export", file=source, reason=reason, remedy=f"leave --{option} out")
    for name in ("labels", "preprocessing"):
        if values[name] is None:
            reason = f"the file is a third-party ONNX model; the {name} must be specified"
            raise UsageError("cannot export", file=source, reason=reason, remedy=f"give --{name}")


def _refuse(source: str, name: str, values: dict[str, Any], why: str) -> None:
    if values[name] is not None:
        raise UsageError("cannot export", file=source, reason=f"--{name} {why}", remedy=f"leave --{name} out")


def _shown(result: ExportResult, *, is_encoder: bool) -> Sequence[Any]:
    return [
        _sentence(result.model, result.size_bytes, "those of PyTorch", result.parity, is_encoder=is_encoder),
        _parity_table("Compared with PyTorch in float32", result.parity, is_encoder=is_encoder),
        f"sha256: {result.sha256}",
    ]


def _sentence(model: Path, size_bytes: int, source: str, parity: Sequence[Parity], *, is_encoder: bool = False) -> str:
    """Return in one sentence what was written and how near its outputs are to those of its source."""
    written = f"{model} ({megabytes(size_bytes)})"
    if not parity:
        return written
    engines, outputs = " and ".join(dict.fromkeys(p.engine for p in parity)), "embeddings" if is_encoder else "logits"
    return f"{written}: its {outputs} in {engines} equal {source}, SQNR {min(p.sqnr_db for p in parity):.0f} dB or more"


def _parity_table(title: str, parity: Sequence[Parity], *, is_encoder: bool = False) -> Any:
    columns = ("engine", "on", "batch", "max difference", "mean", "SQNR dB", "same top-1")
    rows = [
        (p.engine, p.inputs, p.batch_size, f"{p.max_difference:.1e}", f"{p.mean_difference:.1e}", f"{p.sqnr_db:.0f}",
         "-" if is_encoder else f"{p.top1_equal} of {p.num_images}")
        for p in parity
    ]  # fmt: skip
    return make_table(title, columns, rows)
