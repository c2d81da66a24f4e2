"""Third-party weights as a checkpoint: recognised, mapped, compared with their configuration, and reported.

Precedence, first to last: --preprocessing and --labels; the configuration next to the weights; --like; what the
library's code fixes; defaults, which are assumed and warned of. Nothing is loaded partially.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_edge.checkpoint import Checkpoint, save_checkpoint
from vit_edge.conversion.architecture import Shaped, defaults, shape
from vit_edge.conversion.conversion import Conversion, ConversionReport, TensorMapping
from vit_edge.conversion.label_names import read_labels
from vit_edge.conversion.pickled_weights import not_plain
from vit_edge.conversion.preprocessing.inference import InferredPreprocessing, infer_preprocessing
from vit_edge.conversion.preprocessing.knowledge import Facts, Knowledge
from vit_edge.conversion.preprocessing.settings import preprocessing_facts, read_settings
from vit_edge.conversion.sources import Source, open_weights
from vit_edge.conversion.tensor_names import Renamed, rename
from vit_edge.conversion.timm_networks import facts_of_timm_name, imagenet_names, tag_of_timm_name
from vit_edge.errors import InputError, NotPlainViT, UsageError, printable
from vit_edge.files import is_file, may_write
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import warn_of_assumed
from vit_edge.progress import Progress, silent
from vit_edge.vit import VisionTransformer, ViTConfig

__all__ = ["Conversion", "ConversionReport", "TensorMapping", "convert", "open_source", "read_source"]

_NUM_NAMED = 5
_IMAGENET_CLASSES = 1000
_PREPROCESSING = ("mean", "std", "interpolation", "geometry")
# A part of a tensor's name -> the field of ViTConfig that decides whether it is there, and its shape.
_FIELDS = (
    ("blocks.", "depth"), ("head", "num_classes"), ("pos_embed", "image_size"), ("patch_embed", "patch_size"),
    ("norm_pre", "pre_norm"), ("norm", "final_norm"), ("token", "class_token"),
)  # fmt: skip
_FIELDS_IN_BLOCK = (("mlp", "mlp_width"), ("qkv", "qkv_bias"), ("ls", "layer_scale"), ("", "width"))


def convert(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    like: str | None = None,
    preprocessing: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ConversionReport:
    """Write SOURCE as a checkpoint to `out` and return the report; the options are those of `read_source`.

        >>> convert("weights.safetensors", out="vit.safetensors", labels="labels.txt")
        <ConversionReport ... from ...: ... parameters, assumed: ...>

    An existing file is replaced with `force` only, and never the source itself.
    """
    in_source = Path(source).is_dir() and Path(source).resolve() in Path(out).resolve().parents
    made_from = out if in_source and is_file(out) else source if is_file(source) else None
    target = may_write(out, force=force, made_from=made_from)
    made = read_source(
        source, like=like, preprocessing=preprocessing, labels=labels, data=data, image_size=image_size,
        num_classes=num_classes, progress=progress,
    )  # fmt: skip
    save_checkpoint(target, made.checkpoint)
    return dataclasses.replace(made.report, checkpoint=target, size_bytes=target.stat().st_size)


def open_source(
    source: str | os.PathLike[str],
    *,
    like: str | None = None,
    preprocessing: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Return SOURCE as a checkpoint in memory: our own file as it is, anything else converted; raises VitEdgeError.

    >>> open_source("run/best.safetensors").labels
    ('...', ...)
    """
    return read_source(
        source, like=like, preprocessing=preprocessing, labels=labels, data=data, image_size=image_size,
        num_classes=num_classes, progress=progress,
    ).checkpoint  # fmt: skip


def read_source(
    source: str | os.PathLike[str],
    *,
    like: str | None = None,
    preprocessing: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Return SOURCE converted in memory, with the report; raises VitEdgeError.

    SOURCE is a file, a folder, `timm:NAME`, `hf:REPO` or `torchvision:NAME`. `like` is `timm:NAME`, whose heads,
    activation, eps and preprocessing fill what is not specified otherwise. `preprocessing` and `labels` are files that
    count most (`labels` also a folder of class folders). `data` are labelled images that settle what is assumed.
    `image_size` (height, width) resamples the positions; `num_classes` replaces the head by zeros.
    """
    progress("converting", 0, 3)
    try:
        return _read(
            source, like=like, preprocessing=preprocessing, labels=labels, data=data, image_size=image_size,
            num_classes=num_classes, progress=progress,
        )  # fmt: skip
    except NotPlainViT as error:
        error.remedy = _command_for(source, error.remedy)
        raise


def _command_for(source: str | os.PathLike[str], remedy: str) -> str:
    """Return the command that takes what is no plain Vision Transformer, and what else can be done."""
    text = printable(source)
    is_bare = is_file(source) and not text.endswith(".index.json")
    words = f"timm:NAME --weights {text}` (or package.module:factory)" if is_bare else f"{text}`"
    return f"`vit-edge export {words}, which traces the network as its library makes it; for convert, {remedy}"


def _read(
    source: str | os.PathLike[str],
    *,
    like: str | None,
    preprocessing: str | os.PathLike[str] | None,
    labels: str | os.PathLike[str] | None,
    data: str | os.PathLike[str] | None,
    image_size: tuple[int, int] | None,
    num_classes: int | None,
    progress: Progress,
) -> Conversion:
    opened = open_weights(source)
    renamed = _renamed(opened)
    progress("converting", 1, 3)
    knowledge = _knowledge(opened, renamed, like=like, preprocessing=preprocessing, labels=labels)
    shaped, model = _built(opened, renamed, knowledge, image_size=image_size, num_classes=num_classes)
    if opened.checkpoint is None and not shaped.new_head:
        _refuse_other_heads(knowledge, shaped.config.num_classes, opened.weights.origin)
    progress("converting", 2, 3)
    settings, inferred = _settings(knowledge, shaped, labels), None
    if data is not None:
        settings, inferred = _settled(model, settings, data, progress)
    if opened.checkpoint is None and knowledge.value("bgr"):
        _swap_colours(model)
    report = _report(opened, renamed, shaped, knowledge, settings, inferred)
    asked = any(option is not None for option in (like, preprocessing, labels, data, image_size, num_classes))
    checkpoint = opened.checkpoint if not asked else None
    made = Conversion(checkpoint=checkpoint or _checkpoint(opened, model, settings, report, knowledge), report=report)
    progress("converting", 3, 3)
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """How a network is fed and what its classes are called, what of that and of its shape is assumed, and notes."""

    preprocessing: Preprocessing
    labels: tuple[str, ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]


def _renamed(opened: Source) -> Renamed:
    own = opened.checkpoint
    renamed = rename(opened.weights.tensors, origin=opened.weights.origin, own=own is not None)
    return renamed if own is None else dataclasses.replace(renamed, final_norm=own.model.config.final_norm)


def _built(
    opened: Source,
    renamed: Renamed,
    knowledge: Knowledge,
    *,
    image_size: tuple[int, int] | None,
    num_classes: int | None,
) -> tuple[Shaped, VisionTransformer]:
    """Return the tensors in the network's order, and the network with them in it."""
    origin, own = opened.weights.origin, opened.checkpoint
    shaped = shape(renamed, knowledge=knowledge, origin=origin, image_size=image_size, num_classes=num_classes)
    if own is not None:  # what only training looks at
        kept = {name: getattr(own.model.config, name) for name in ("dropout", "stochastic_depth")}
        shaped = dataclasses.replace(shaped, config=dataclasses.replace(shaped.config, **kept))
    model = _assembled(shaped, renamed, origin)
    return dataclasses.replace(shaped, tensors={name: shaped.tensors[name] for name in model.state_dict()}), model


def _settings(knowledge: Knowledge, shaped: Shaped, given: str | os.PathLike[str] | None) -> _Settings:
    preprocessing, assumed, notes = _preprocessing(knowledge, shaped.config.image_size)
    labels, unnamed, more_notes = _labels(knowledge, shaped, given)
    return _Settings(
        preprocessing=preprocessing,
        labels=labels,
        assumed=(*shaped.assumed, *assumed, *unnamed),
        notes=(*notes, *more_notes),
    )


def _settled(
    model: VisionTransformer, settings: _Settings, data: str | os.PathLike[str], progress: Progress
) -> tuple[_Settings, InferredPreprocessing]:
    """Return the settings after the preprocessing search, and what it found."""
    inferred = infer_preprocessing(
        model, data, preprocessing=settings.preprocessing, labels=settings.labels, assumed=settings.assumed,
        progress=progress,
    )  # fmt: skip
    if inferred.bgr:
        _swap_colours(model)
    settled = dataclasses.replace(
        settings,
        preprocessing=inferred.preprocessing,
        labels=inferred.labels,
        assumed=tuple(name for name in settings.assumed if name not in inferred.settled),
        notes=(*settings.notes, *inferred.notes),
    )
    return settled, inferred


def _knowledge(
    opened: Source,
    renamed: Renamed,
    *,
    like: str | None,
    preprocessing: str | os.PathLike[str] | None,
    labels: str | os.PathLike[str] | None,
) -> Knowledge:
    specified: list[Facts] = []
    if preprocessing is not None:
        facts = preprocessing_facts(read_settings(preprocessing), origin=printable(preprocessing))
        specified.append(dataclasses.replace(facts, origin="--preprocessing", image_size=None, input_size=None))
    if labels is not None:
        specified.append(Facts(origin="--labels", labels=read_labels(labels)))
    specified += [facts for facts in opened.facts if not facts.assumed]
    if like is not None:
        specified.append(_alike(like, opened))
    assumed = [facts for facts in opened.facts if facts.assumed]
    return Knowledge(facts=(*specified, *assumed, *defaults(renamed)))


def _alike(like: str, opened: Source) -> Facts:
    library, _, name = like.partition(":")
    if library != "timm" or not name:
        raise UsageError(
            "cannot use --like",
            reason=f"the value is {like!r}",
            remedy="write timm:NAME, such as timm:deit_tiny_patch16_224",
        )
    try:
        facts = facts_of_timm_name(name, origin=f"--like {like}")
    except NotPlainViT as error:
        remedy = f"`vit-edge export {like} --weights {opened.weights.origin}`, which traces it as timm makes it"
        raise UsageError("cannot use --like", reason=error.reason, remedy=remedy) from error
    # Heads go with the width. The tensors give depth, patches and size; names and licence are those of the weights.
    shape_told = {"width": facts.shape["width"]}
    labels = imagenet_names(tag_of_timm_name(name), _IMAGENET_CLASSES)
    return dataclasses.replace(
        facts, name=None, image_size=None, labels=labels, license=None, base_model=None, shape=shape_told
    )  # fmt: skip


def _assembled(shaped: Shaped, renamed: Renamed, origin: str) -> VisionTransformer:
    """Return the network with its weights; raises CheckpointRejected that names what is wrong, five of each kind."""
    with torch.device("meta"):  # shapes only: a wrong configuration must not allocate
        model = VisionTransformer(shaped.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = shaped.tensors
    missing = [f"{name} ({_field_of(name)})" for name in expected if name not in tensors]
    unexpected = [*renamed.unexpected, *(f"{name} ({_field_of(name)})" for name in tensors if name not in expected)]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {size} ({_field_of(name)})"
        for name, size in expected.items()
        if name in tensors and tuple(tensors[name].shape) != size
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:_NUM_NAMED])}{' ...' if len(names) > _NUM_NAMED else ''}"
        for kind, names in kinds
        if names
    ]
    if problems:
        reason = f"the network's tensors are not those of one plain Vision Transformer: {'; '.join(problems)}"
        raise not_plain(origin, reason, "take the whole state dict of one network, and its own configuration")
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


def _name_of(config: ViTConfig) -> str:
    """Return a name where only a folder has one: the same weights in another folder are the same network."""
    rows, columns = config.patch_size
    patch = f"{rows}" if rows == columns else f"{rows}x{columns}"
    return f"vit_{config.width}x{config.depth}_patch{patch}_{max(config.image_size)}"


def _refuse_other_heads(knowledge: Knowledge, num_classes: int, origin: str) -> None:
    """Raise CheckpointRejected unless the head gives one class of several: softmax would misread any other."""
    problem = knowledge.value("problem_type")
    if problem in (None, "single_label_classification") and num_classes > 1:
        return
    what = f"problem_type is {problem!r}" if problem else "the head has one logit"
    remedy = "use a head for one class of several; --num-classes N replaces the head, to train it anew"
    raise not_plain(origin, f"{what}: no single-label classification, which softmax needs", remedy)


def _field_of(name: str) -> str:
    if name.startswith("blocks."):
        inner = name.split(".", 2)[2]
        return next(
            (field for part, field in _FIELDS_IN_BLOCK if inner.startswith(part) or f".{part}" in inner), "depth"
        )
    return next((field for part, field in _FIELDS if part in name), "width")


def _preprocessing(
    knowledge: Knowledge, image_size: tuple[int, int]
) -> tuple[Preprocessing, tuple[str, ...], tuple[str, ...]]:
    """Return the settings for the network's size, what of them is assumed, and notes."""
    geometry = knowledge.value("geometry")
    try:
        settings = geometry.preprocessing(
            image_size,
            interpolation=knowledge.value("interpolation"),
            mean=knowledge.value("mean"),
            std=knowledge.value("std"),
        )
    except ValueError as error:
        remedy = "specify the preprocessing with --preprocessing"
        raise UsageError("cannot use the preprocessing", reason=str(error), remedy=remedy) from error
    assumed = [name for name in _PREPROCESSING if not knowledge.specifies(name)]
    # Short side and crop of a network that is not square: libraries differ, and none wrote it down.
    if image_size[0] != image_size[1] and isinstance(settings.resize, int) and geometry.crop != image_size:
        assumed = list(dict.fromkeys([*assumed, "geometry"]))
    notes = []
    if geometry.crop not in (None, image_size):
        note = f"the specified preprocessing is for {geometry.crop[0]}x{geometry.crop[1]}"
        notes.append(f"{note}; kept in proportion for {image_size[0]}x{image_size[1]}")
    return settings, tuple(f"preprocessing.{name.replace('geometry', 'resize')}" for name in assumed), tuple(notes)


def _labels(
    knowledge: Knowledge, shaped: Shaped, given: str | os.PathLike[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the names of the classes, "labels" if they are assumed, and notes."""
    num_classes, names = shaped.config.num_classes, knowledge.value("labels")
    numbers = tuple(map(str, range(num_classes)))
    if names is None:
        return numbers, ("labels",), ()
    if len(names) == num_classes and (not shaped.new_head or given is not None):
        return names, () if knowledge.specifies("labels") else ("labels",), ()
    if given is not None:
        reason = f"the file holds {len(names)} names, the network has {num_classes} classes (num_classes)"
        raise InputError("cannot use the labels", file=given, reason=reason, remedy="give one name for each class")
    why = "the head is new" if shaped.new_head else f"they are {len(names)} for {num_classes} classes"
    return numbers, ("labels",), (f"the specified labels are not used: {why}",)


def _swap_colours(model: VisionTransformer) -> None:
    """Turn a network for BGR into the same function of RGB, exactly: only the order of its input weights changes."""
    weight = model.patch_embed.proj.weight
    model.patch_embed.proj.weight = torch.nn.Parameter(weight.detach().flip(1).contiguous())


def _report(
    opened: Source,
    renamed: Renamed,
    shaped: Shaped,
    knowledge: Knowledge,
    settings: _Settings,
    inferred: InferredPreprocessing | None,
) -> ConversionReport:
    notes = [f"prefix {renamed.prefix!r} stripped from the keys"] if renamed.prefix else []
    notes += [*opened.weights.notes, *renamed.notes, *shaped.notes]
    notes += [note for facts in knowledge.facts for note in facts.notes]
    dropped = dict.fromkeys(renamed.pre_logits, "it belongs to the head that was replaced")
    return ConversionReport(
        source=opened.weights.origin,
        library=renamed.library,
        name=opened.name or _name_of(shaped.config),
        source_sha256=opened.weights.sha256,
        mapped=_mapped(shaped.tensors, shaped.reshaped, renamed),
        unused={**renamed.unused, **dropped},
        prefix=renamed.prefix,
        notes=(*notes, *settings.notes),
        known=_known(knowledge, settings.assumed),
        assumed=settings.assumed,
        found=inferred.settled if inferred else (),
        finding=inferred.finding if inferred else None,
        num_parameters=sum(tensor.numel() for tensor in shaped.tensors.values()),
    )


def _mapped(tensors: Mapping[str, Tensor], reshaped: Mapping[str, str], renamed: Renamed) -> tuple[TensorMapping, ...]:
    mapped = []
    for name, tensor in tensors.items():
        new = reshaped.get(name, "").startswith(("new", "zeros"))
        sources = () if new else renamed.sources.get(name, renamed.sources.get("dist_token", ()))
        change = "; ".join(filter(None, (renamed.changes.get(name, "") if not new else "", reshaped.get(name, ""))))
        mapped.append(TensorMapping(target=name, sources=sources, shape=tuple(tensor.shape), change=change))
    return tuple(mapped)


def _known(knowledge: Knowledge, assumed: tuple[str, ...]) -> dict[str, str]:
    names = ("num_heads", "activation", "layer_norm_eps", "pooling", *_PREPROCESSING, "labels", "license")
    known = {}
    for name in names:
        source = knowledge.source_of(name)
        dotted = f"preprocessing.{name.replace('geometry', 'resize')}" if name in _PREPROCESSING else name
        if source is not None and not source.assumed and dotted not in assumed:
            known[dotted] = source.origin
    return known


def _checkpoint(
    opened: Source, model: VisionTransformer, settings: _Settings, report: ConversionReport, knowledge: Knowledge
) -> Checkpoint:
    own = opened.checkpoint
    converted: dict[str, Any] = {"library": report.library, "source_sha256": report.source_sha256}
    if report.found and report.finding:
        converted["found"] = {"fields": list(report.found), "num_images": report.finding.num_images}
    # Of ours, what it was assumed to be before was warned of when it was read.
    warn_of_assumed([name for name in report.assumed if own is None or name not in own.assumed], report.source)
    return Checkpoint(
        name=report.name,
        model=model,
        preprocessing=settings.preprocessing,
        labels=settings.labels,
        license=knowledge.value("license"),
        base_model=knowledge.value("base_model"),
        evaluation=None,  # of another head, size or way to feed it
        training={**(own.training if own else {}), "converted": converted},
        assumed=report.assumed,
        sha256=report.source_sha256,
    )
