"""The whole configuration of a network from the shapes of its tensors, and those tensors brought into our form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit_edge.conversion.pickled_weights import not_plain, unusable
from vit_edge.conversion.positions import Resampling, resample_positions
from vit_edge.conversion.preprocessing.knowledge import CLIP, HALF, IMAGENET, Facts, Geometry, Knowledge
from vit_edge.conversion.tensor_names import Library, Renamed
from vit_edge.vit_config import ViTConfig

__all__ = ["Shaped", "defaults", "shape"]

# Heads by width: Table 1 of the ViT paper and of DeiT, "Scaling Vision Transformers" (arXiv:2106.04560) Table 2.
_HEADS = {1280: 16, 1408: 16, 1664: 16}
# As each library resamples its own position embeddings.
_RESAMPLING: dict[Library, Resampling] = {
    "vit-edge": Resampling(antialias=True),
    "timm": Resampling(antialias=True),
    "transformers": Resampling(),
    "torchvision": Resampling(align_corners=True),
    "google": Resampling(antialias=True),
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float64)
_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Shaped:
    """A configuration, every tensor of it in float32, and what was done to get there.

    `reshaped` has a sentence for each tensor that is not what the file has, `assumed` the unspecified fields.
    """

    config: ViTConfig
    tensors: Mapping[str, Tensor]
    reshaped: Mapping[str, str]
    notes: tuple[str, ...]
    assumed: tuple[str, ...]
    new_head: bool = False


@dataclass(slots=True)
class _Work:
    """What the steps below pass on and change."""

    renamed: Renamed
    knowledge: Knowledge
    origin: str
    tensors: dict[str, Tensor]
    fields: dict[str, Any] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    new_head: bool = False

    def refuse(self, reason: str, remedy: str) -> Exception:
        return unusable(self.origin, reason, remedy)

    def not_plain(self, reason: str, remedy: str) -> Exception:
        return not_plain(self.origin, reason, remedy)


def shape(
    renamed: Renamed, *, knowledge: Knowledge, origin: str, image_size: tuple[int, int] | None, num_classes: int | None
) -> Shaped:
    """Return the configuration and the tensors that fit it; raises CheckpointRejected, with every problem at once.

    `image_size` and `num_classes` are what the user asked for: other positions, another head.
    """
    work = _Work(renamed=renamed, knowledge=knowledge, origin=origin, tensors=dict(renamed.tensors))
    try:
        _to_float32(work)
        _infer_body(work)
        _infer_head(work, num_classes)
        _infer_pooling(work)
        _infer_positions(work, image_size)
        assumed = _infer_rest(work)
    except (IndexError, RuntimeError) as error:  # a scalar where a matrix belongs, and the like
        raise work.refuse(
            f"the network's tensors have shapes of no Vision Transformer ({error})", "take another file"
        ) from error
    try:
        config = ViTConfig(**work.fields)
    except ValueError as error:
        specified = ", ".join(facts.origin for facts in knowledge.facts if not facts.assumed)
        remedy = (
            f"check what was specified by {specified}"
            if specified
            else "tell with --like timm:NAME what the shapes cannot"
        )
        raise work.refuse(str(error), remedy) from error
    return Shaped(
        config=config,
        tensors=work.tensors,
        reshaped=work.reshaped,
        notes=tuple(work.notes),
        assumed=assumed,
        new_head=work.new_head,
    )


def defaults(renamed: Renamed) -> tuple[Facts, ...]:
    """Return what a library's code fixes, which is known, and after it what is only likely, which is assumed."""
    weight = renamed.tensors.get("patch_embed.proj.weight")
    width = int(weight.shape[0]) if weight is not None else 64
    heads = renamed.num_heads or _HEADS.get(width, max(1, width // 64))
    settled = renamed.library in ("torchvision", "google")
    clip = "norm_pre.weight" in renamed.tensors
    known = Facts(
        origin=f"{renamed.library}'s code",
        num_heads=heads if settled else None,
        activation="gelu" if settled else None,
        layer_norm_eps=1e-6 if settled else None,
        pooling="class" if settled else None,
    )
    # transformers' ViT and DeiT default to 1e-12, its DINOv2 to 1e-6; CLIP's LayerNorm is PyTorch's, 1e-5.
    dino = "blocks.0.ls1.gamma" in renamed.tensors
    eps = 1e-5 if clip else 1e-12 if renamed.library == "transformers" and not dino else 1e-6
    mean, std = CLIP if clip else HALF if renamed.library == "google" else IMAGENET
    likely = Facts(
        origin="default",
        assumed=True,
        num_heads=heads,
        activation="gelu",
        layer_norm_eps=eps,
        mean=mean,
        std=std,
        interpolation="bilinear" if renamed.library == "torchvision" else "bicubic",
        geometry=Geometry(fraction=0.875),
    )
    return (known, likely) if settled else (likely,)


def _to_float32(work: _Work) -> None:
    cast: dict[str, list[str]] = {}
    for name, tensor in work.tensors.items():
        if tensor.dtype == torch.float32:
            continue
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise work.refuse(f"{name} is {kind}: quantized weights, or none", "give the float weights")
        cast.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
        work.tensors[name] = tensor.to(torch.float32)
    work.notes += [f"{len(names)} tensors cast from {kind} to float32" for kind, names in cast.items()]
    # "Not finite" is specified of the result, so that float64 beyond float32's range is found too.
    broken = [name for name, tensor in work.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        names = ", ".join(f"{name} ({', '.join(work.renamed.sources[name])})" for name in broken[:_NUM_NAMED])
        raise work.refuse(f"not every weight is finite: {names}", "take an earlier checkpoint, or train it again")


def _infer_body(work: _Work) -> None:
    """Set what the patch embedding and the blocks show: sizes, biases, layer scale, the extra tokens."""
    patches = work.tensors["patch_embed.proj.weight"]
    if patches.ndim != 4 or patches.shape[1] != 3:
        reason = (
            f"the network's patch embedding has shape {tuple(patches.shape)}, not [width, 3, height, width of a patch]"
        )
        raise work.refuse(reason, "a network of three colours is needed")
    blocks = {int(match[1]) for name in work.tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    first = min(blocks, default=0)
    mlp = work.tensors.get(f"blocks.{first}.mlp.fc1.weight")
    if mlp is None:
        raise work.not_plain("the network has no block with an MLP", "a plain Vision Transformer is needed")
    narrowed = work.tensors.get(f"blocks.{first}.mlp.fc2.weight")
    if narrowed is not None and narrowed.ndim == 2 and mlp.shape[0] == 2 * narrowed.shape[1]:
        raise work.not_plain(
            f"the network's MLP is gated (SwiGLU): mlp.fc1 gives {mlp.shape[0]}, mlp.fc2 takes {narrowed.shape[1]}",
            "a plain Vision Transformer is needed: one GELU MLP each block",
        )
    registers = work.tensors.get("reg_token")
    work.fields |= {
        "patch_size": tuple(patches.shape[2:]),
        "width": patches.shape[0],
        "depth": max(blocks) + 1,
        "mlp_width": mlp.shape[0],
        "patch_bias": "patch_embed.proj.bias" in work.tensors,
        "qkv_bias": any(name.endswith("attn.qkv.bias") for name in work.tensors),
        "pre_norm": "norm_pre.weight" in work.tensors,
        "class_token": "cls_token" in work.tensors,
        "num_registers": 0 if registers is None else registers.shape[1],
    }
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        tensor = work.tensors.get(name)
        if tensor is not None and tensor.ndim == 2:  # some leave the batch of one out
            work.tensors[name] = tensor[None]
    _hold_against_told(work)


def _hold_against_told(work: _Work) -> None:
    wrong = []
    for facts in work.knowledge.facts:
        for name, value in facts.shape.items():
            if name in work.fields and work.fields[name] != value:
                wrong.append(f"{name} is {value} by {facts.origin}, {work.fields[name]} by the tensors")
    if wrong:
        raise work.refuse("; ".join(wrong), "take the weights and what is specified of them from one network")


def _infer_head(work: _Work, num_classes: int | None) -> None:
    weight = work.tensors.get("head.weight")
    present = 0 if weight is None else weight.shape[0]
    pre_logits = work.renamed.pre_logits
    if pre_logits and num_classes is None:
        reason = f"the network has a layer before its head, which no ViTConfig has: {pre_logits[0]}"
        raise work.not_plain(reason, "give it a new head: add --num-classes N")
    if weight is None and num_classes is None:
        raise work.refuse(
            "the network has no head: it does not classify", "give it a new head: add --num-classes N, and train it"
        )
    work.fields["distilled"] = "dist_token" in work.tensors and (weight is None or "head_dist.weight" in work.tensors)
    if "dist_token" in work.tensors and not work.fields["distilled"]:
        _keep_distillation_token_as_register(work)
    if num_classes is not None and (num_classes != present or pre_logits):
        _replace_head(work, present, num_classes)
    else:
        work.fields["num_classes"] = present
        for head in ("head", "head_dist") if work.fields["distilled"] else ("head",):
            if f"{head}.weight" in work.tensors and f"{head}.bias" not in work.tensors:
                work.tensors[f"{head}.bias"] = torch.zeros(present)
                work.reshaped[f"{head}.bias"] = "zeros: the file's head has no bias"


def _keep_distillation_token_as_register(work: _Work) -> None:
    # transformers' DeiTForImageClassification carries the token through and never looks at its output.
    if work.fields["num_registers"]:
        raise work.refuse("the network has a distillation token without a head, and registers", "train its second head")
    work.tensors["reg_token"] = work.tensors.pop("dist_token")
    work.fields["num_registers"] = 1
    work.reshaped["reg_token"] = "the distillation token, which has no head of its own here"


def _replace_head(work: _Work, present: int, num_classes: int) -> None:
    work.fields["num_classes"], work.new_head = num_classes, True
    pooled = 2 if _pools_both(work) else 1
    for head in ("head", "head_dist") if work.fields["distilled"] else ("head",):
        work.tensors[f"{head}.weight"] = torch.zeros(num_classes, pooled * work.fields["width"])
        work.tensors[f"{head}.bias"] = torch.zeros(num_classes)
        work.reshaped |= dict.fromkeys((f"{head}.weight", f"{head}.bias"), "new: zeros")
    was = f"the head of {present} classes was replaced" if present else "there was no head; it got one"
    work.notes.append(f"{was}: {num_classes} classes, zeros, to be trained")


def _pools_both(work: _Work) -> bool:
    weight = work.renamed.tensors.get("head.weight")
    return weight is not None and weight.ndim == 2 and weight.shape[1] == 2 * work.fields["width"]


def _infer_pooling(work: _Work) -> None:
    work.fields["final_norm"] = work.renamed.final_norm
    specified = work.knowledge.value("pooling")
    if _pools_both(work):
        work.fields["pooling"] = "class_mean"
    elif not work.fields["class_token"]:
        work.fields["pooling"] = "mean"
    else:
        likely = "mean" if work.renamed.final_norm == "after_pooling" else "class"
        work.fields["pooling"] = "class" if work.fields["distilled"] else specified or likely


def _infer_positions(work: _Work, requested: tuple[int, int] | None) -> None:
    positions = work.tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        raise work.not_plain(
            "the network has no learned position embeddings (pos_embed)", "a plain Vision Transformer is needed"
        )
    patch = work.fields["patch_size"]
    grid, extra, kind = _grid(work, positions.shape[1], requested)
    work.fields["position_slots"] = kind
    if kind == "patches" and extra == 1:
        # DINOv2 with registers: the class token has a position, the registers have none.
        work.tensors["cls_token"] = work.tensors["cls_token"] + positions[:, :1]
        work.tensors["pos_embed"] = positions[:, 1:].contiguous()
        work.reshaped["cls_token"] = "its position added: the registers have none"
    made_for = (grid[0] * patch[0], grid[1] * patch[1])
    wanted = requested or work.knowledge.value("input_size") or made_for
    if wanted[0] % patch[0] or wanted[1] % patch[1]:
        reason = f"image size {wanted[0]}x{wanted[1]} is not a multiple of the patch size {patch[0]}x{patch[1]}"
        raise work.refuse(reason, "choose another with --image-size")
    work.fields["image_size"] = wanted
    new = (wanted[0] // patch[0], wanted[1] // patch[1])
    if new != grid:
        resampling = _resampling(work.renamed)
        work.tensors["pos_embed"] = resample_positions(
            work.tensors["pos_embed"], old=grid, new=new, resampling=resampling
        )
        how = f"bicubic{', antialiased' if resampling.antialias else ''}"
        work.reshaped["pos_embed"] = f"resampled from {grid[0]}x{grid[1]} to {new[0]}x{new[1]} patches ({how})"


def _resampling(renamed: Renamed) -> Resampling:
    # In transformers, DINOv2 with registers antialiases; every other of its networks does not.
    if renamed.library == "transformers" and "reg_token" in renamed.tensors:
        return Resampling(antialias=True)
    return _RESAMPLING[renamed.library]


def _slots(work: _Work) -> tuple[tuple[int, str], ...]:
    """Return how many positions may stand before those of the patches, the likeliest first."""
    prefix = work.fields["class_token"] + work.fields["distilled"] + work.fields["num_registers"]
    slots = [(prefix, "all"), (0, "patches")]
    if work.fields["num_registers"] and work.fields["class_token"]:
        # Registers are left without a position by timm; DINOv2 gives the class token one.
        slots = [(0, "patches"), (1, "patches"), (prefix, "all")]
    specified = work.knowledge.value("position_slots")
    return tuple(slot for slot in slots if specified is None or slot[1] == specified)


def _grid(work: _Work, num_positions: int, requested: tuple[int, int] | None) -> tuple[tuple[int, int], int, str]:
    """Return rows and columns of patches that the positions were made for, and what stands before them."""
    rows, columns = work.fields["patch_size"]
    specified = work.knowledge.value("image_size")
    squares, others = [], []
    for extra, kind in _slots(work):
        for size in filter(None, (specified, requested)):
            grid = (size[0] // rows, size[1] // columns)
            if grid[0] * grid[1] + extra == num_positions:
                if size == specified:
                    return grid, extra, kind
                others.append((grid, extra, kind))
        side = math.isqrt(max(0, num_positions - extra))
        if side and side * side + extra == num_positions:
            squares.append(((side, side), extra, kind))
    if not squares and not others:
        reason = f"the network's {num_positions} positions are for no square of patches"
        raise work.refuse(reason, "say which with --image-size HEIGHTxWIDTH (image_size)")
    # What was asked for is taken for what the positions were made for only where no square would do.
    found = (squares or others)[0]
    if specified:
        size = (found[0][0] * rows, found[0][1] * columns)
        work.notes.append(f"image_size {specified} is specified, the positions are for {size}, which counts")
    return found


def _infer_rest(work: _Work) -> tuple[str, ...]:
    """Set what no shape shows, and return the names of the fields that are assumed."""
    assumed = []
    for name in ("num_heads", "activation", "layer_norm_eps"):
        work.fields[name] = work.knowledge.value(name)
        if not work.knowledge.specifies(name):
            assumed.append(name)
    # Only a class token before one norm leaves a choice: many networks average the patches all the same.
    settled = work.fields["distilled"] or work.fields["pooling"] == "class_mean" or not work.fields["class_token"]
    if not settled and not work.knowledge.specifies("pooling") and not work.new_head:
        assumed.append("pooling")
    # A class token without a position, or a grid that is not square: a count of positions can be read both ways.
    alone = work.fields["position_slots"] == "all" or not work.fields["class_token"]
    if not alone and not work.knowledge.specifies("position_slots") and not work.knowledge.specifies("image_size"):
        assumed.append("position_slots")
    if "blocks.0.ls1.gamma" in work.tensors:
        work.fields["layer_scale"] = work.knowledge.value("layer_scale") or 1e-5
    return tuple(assumed)
