"""Which library a state dict comes from, by its keys, and each of its tensors under our name for it.

Our names are timm's. One table a library; a rule is (pattern of the key, our name, part, change), where `part` orders
the tensors that are joined into one (query, key, value) and `change` names how the values are laid out anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vit_edge.conversion.pickled_weights import not_plain, unusable
from vit_edge.conversion.refused_networks import refuse_what_is_no_plain_vit

__all__ = ["HEAD_NAMES", "NOT_WEIGHTS", "Library", "Renamed", "rename"]

Library = Literal["vit-edge", "timm", "transformers", "torchvision", "google"]
_Rule = tuple[str, str, int, str]

_HF_PREFIX = r"(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?"
_HF_BLOCK = rf"{_HF_PREFIX}(?:encoder\.)?layers?\.(\d+)\."
_TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_JAX_PREFIX = r"(?:opt/target/|params/)?"
_JAX_BLOCK = rf"{_JAX_PREFIX}Transformer/encoderblock_(\d+)/"
_JAX_ATTENTION = rf"{_JAX_BLOCK}MultiHeadDotProductAttention_\d/"
_END = r"(weight|bias)"
# A head that was put in place of the library's own: a layer by itself, or behind a dropout.
_HEAD = r"(?:(?:head|fc|classifier)\.1|head\.fc|fc|classifier|heads|last_linear)"
HEAD_NAMES = re.compile(rf"(?:{_HEAD}|head|heads\.head|(?:cls_)?classifier|head_dist)\.{_END}")
# Tensors of the loss and of metrics, which training loops keep beside the network's.
NOT_WEIGHTS = re.compile(
    r"(?:.*\.)?(?:criterion|loss|loss_fn|loss_func|(?:(?:train|val|valid|test)_)?(?:loss|metrics?|acc|accuracy|f1|auroc))"
    r"(?:[._].*)?"
)

_TIMM: tuple[_Rule, ...] = (
    (r"fc_norm\.(weight|bias)", r"norm.\1", 0, ""),
    (r"register_tokens", "reg_token", 0, ""),  # as published by DINOv2's authors
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma", 0, ""),  # as published by DeiT-3's authors
    (r"(blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))", r"\1", 0, ""),
    (r"(blocks\.\d+\.ls[12]\.gamma)", r"\1", 0, ""),
    (r"((?:patch_embed\.proj|norm|norm_pre|head|head_dist)\.(?:weight|bias))", r"\1", 0, ""),
    (r"(cls_token|dist_token|reg_token|pos_embed)", r"\1", 0, ""),
    (rf"{_HEAD}\.{_END}", r"head.\1", 0, ""),
)
# Older and newer spellings of transformers: `attention.attention.query` became `attention.q_proj`, and so on.
_TRANSFORMERS: tuple[_Rule, ...] = (
    (rf"{_HF_PREFIX}embeddings\.cls_token", "cls_token", 0, ""),
    (rf"{_HF_PREFIX}embeddings\.distillation_token", "dist_token", 0, ""),
    (rf"{_HF_PREFIX}embeddings\.register_tokens", "reg_token", 0, ""),
    (rf"{_HF_PREFIX}embeddings\.position_embeddings", "pos_embed", 0, ""),
    (rf"{_HF_PREFIX}embeddings\.patch_embeddings\.projection\.{_END}", r"patch_embed.proj.\1", 0, ""),
    (rf"{_HF_BLOCK}(?:layernorm_before|norm1)\.{_END}", r"blocks.\1.norm1.\2", 0, ""),
    (rf"{_HF_BLOCK}(?:layernorm_after|norm2)\.{_END}", r"blocks.\1.norm2.\2", 0, ""),
    (rf"{_HF_BLOCK}attention\.(?:attention\.query|q_proj)\.{_END}", r"blocks.\1.attn.qkv.\2", 0, "joined"),
    (rf"{_HF_BLOCK}attention\.(?:attention\.key|k_proj)\.{_END}", r"blocks.\1.attn.qkv.\2", 1, "joined"),
    (rf"{_HF_BLOCK}attention\.(?:attention\.value|v_proj)\.{_END}", r"blocks.\1.attn.qkv.\2", 2, "joined"),
    (rf"{_HF_BLOCK}attention\.(?:output\.dense|o_proj)\.{_END}", r"blocks.\1.attn.proj.\2", 0, ""),
    (rf"{_HF_BLOCK}(?:intermediate\.dense|mlp\.fc1)\.{_END}", r"blocks.\1.mlp.fc1.\2", 0, ""),
    (rf"{_HF_BLOCK}(?:output\.dense|mlp\.fc2)\.{_END}", r"blocks.\1.mlp.fc2.\2", 0, ""),
    (rf"{_HF_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma", 0, ""),
    (rf"{_HF_PREFIX}layernorm\.{_END}", r"norm.\1", 0, ""),
    (rf"(?:cls_)?classifier\.{_END}", r"head.\1", 0, ""),
    (rf"distillation_classifier\.{_END}", r"head_dist.\1", 0, ""),
    (rf"{_HEAD}\.{_END}", r"head.\1", 0, ""),
)
_TORCHVISION: tuple[_Rule, ...] = (
    (r"class_token", "cls_token", 0, ""),
    (r"encoder\.pos_embedding", "pos_embed", 0, ""),
    (rf"conv_proj\.{_END}", r"patch_embed.proj.\1", 0, ""),
    (rf"{_TV_BLOCK}ln_([12])\.{_END}", r"blocks.\1.norm\2.\3", 0, ""),
    (rf"{_TV_BLOCK}self_attention\.in_proj_{_END}", r"blocks.\1.attn.qkv.\2", 0, ""),
    (rf"{_TV_BLOCK}self_attention\.out_proj\.{_END}", r"blocks.\1.attn.proj.\2", 0, ""),
    (rf"{_TV_BLOCK}mlp\.(?:linear_1|0)\.{_END}", r"blocks.\1.mlp.fc1.\2", 0, ""),
    (rf"{_TV_BLOCK}mlp\.(?:linear_2|3)\.{_END}", r"blocks.\1.mlp.fc2.\2", 0, ""),
    (rf"encoder\.ln\.{_END}", r"norm.\1", 0, ""),
    (rf"heads\.head\.{_END}", r"head.\1", 0, ""),
    (rf"(?:heads|heads\.head\.1|heads\.1|{_HEAD})\.{_END}", r"head.\1", 0, ""),
)
# vision_transformer/vit_jax/models_vit.py; big_vision numbers some of its layers otherwise.
_GOOGLE: tuple[_Rule, ...] = (
    (rf"{_JAX_PREFIX}cls", "cls_token", 0, ""),
    (rf"{_JAX_PREFIX}(?:Transformer/posembed_input/)?pos_embedding", "pos_embed", 0, ""),
    (rf"{_JAX_PREFIX}embedding/kernel", "patch_embed.proj.weight", 0, "patches"),
    (rf"{_JAX_PREFIX}embedding/bias", "patch_embed.proj.bias", 0, ""),
    (rf"{_JAX_BLOCK}LayerNorm_0/scale", r"blocks.\1.norm1.weight", 0, ""),
    (rf"{_JAX_BLOCK}LayerNorm_0/bias", r"blocks.\1.norm1.bias", 0, ""),
    (rf"{_JAX_BLOCK}LayerNorm_[12]/scale", r"blocks.\1.norm2.weight", 0, ""),
    (rf"{_JAX_BLOCK}LayerNorm_[12]/bias", r"blocks.\1.norm2.bias", 0, ""),
    *(
        (rf"{_JAX_ATTENTION}{name}/{end}", rf"blocks.\1.attn.qkv.{our}", part, f"joined {end}")
        for part, name in enumerate(("query", "key", "value"))
        for end, our in (("kernel", "weight"), ("bias", "bias"))
    ),
    (rf"{_JAX_ATTENTION}out/kernel", r"blocks.\1.attn.proj.weight", 0, "heads"),
    (rf"{_JAX_ATTENTION}out/bias", r"blocks.\1.attn.proj.bias", 0, ""),
    (rf"{_JAX_BLOCK}MlpBlock_\d/Dense_0/kernel", r"blocks.\1.mlp.fc1.weight", 0, "transposed"),
    (rf"{_JAX_BLOCK}MlpBlock_\d/Dense_0/bias", r"blocks.\1.mlp.fc1.bias", 0, ""),
    (rf"{_JAX_BLOCK}MlpBlock_\d/Dense_1/kernel", r"blocks.\1.mlp.fc2.weight", 0, "transposed"),
    (rf"{_JAX_BLOCK}MlpBlock_\d/Dense_1/bias", r"blocks.\1.mlp.fc2.bias", 0, ""),
    (rf"{_JAX_PREFIX}Transformer/encoder_norm/scale", "norm.weight", 0, ""),
    (rf"{_JAX_PREFIX}Transformer/encoder_norm/bias", "norm.bias", 0, ""),
    (rf"{_JAX_PREFIX}head/kernel", "head.weight", 0, "transposed"),
    (rf"{_JAX_PREFIX}head/bias", "head.bias", 0, ""),
)
_RULES: dict[Library, tuple[_Rule, ...]] = {
    "vit-edge": _TIMM,
    "timm": _TIMM,
    "transformers": _TRANSFORMERS,
    "torchvision": _TORCHVISION,
    "google": _GOOGLE,
}
# The one key that each library's networks cannot do without; what stands before it is a wrapper's prefix.
_ANCHORS: dict[Library, str] = {
    "timm": r"(.*?)patch_embed\.proj\.weight",
    "transformers": rf"(.*?){_HF_PREFIX}embeddings\.patch_embeddings\.projection\.weight",
    "torchvision": r"(.*?)conv_proj\.weight",
    "google": rf"(){_JAX_PREFIX}embedding/kernel",
}
# Kept in files, and without any part in the answer of a classifier.
_UNUSED: tuple[tuple[str, str], ...] = (
    (r"mask_token|.*embeddings\.mask_token", "it masks patches in training"),
    (rf"{_HF_PREFIX}pooler\.dense\.{_END}", "the classifier does not go through the pooler"),
    (
        r".*embeddings\.position_ids|.*num_batches_tracked|(.*\.)?(n_averaged|initted|step)",
        "it counts, it is no weight",
    ),
    (NOT_WEIGHTS.pattern, "it belongs to the loss or a metric, not to the network"),
)
# A layer between the pooled token and the head, as in Google's first checkpoints; it goes where the head goes.
_PRE_LOGITS = re.compile(r"pre_logits\..*|heads\.pre_logits\..*|.*pre_logits/.*")
_AVERAGED = re.compile(r"ema|averaged", re.IGNORECASE)

_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda tensor: tensor,
    "joined": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T,
    "patches": lambda tensor: tensor.permute(3, 2, 0, 1),  # rows, columns, colours, width
    "joined kernel": lambda tensor: tensor.flatten(1).T,  # width, heads, head dim
    "joined bias": lambda tensor: tensor.flatten(),
    "heads": lambda tensor: tensor.flatten(0, 1).T,  # heads, head dim, width
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Renamed:
    """Tensors under our names with the names they had, and what was in the file besides.

    `changes` says how a tensor was laid out anew; `unused` has the reason for each; `num_heads` where shapes tell.
    """

    library: Library
    prefix: str
    tensors: Mapping[str, Tensor]
    sources: Mapping[str, tuple[str, ...]]
    changes: Mapping[str, str]
    unused: Mapping[str, str]
    unexpected: tuple[str, ...]
    pre_logits: tuple[str, ...]
    final_norm: Literal["before_pooling", "after_pooling"]
    num_heads: int | None = None
    notes: tuple[str, ...] = field(default=())


def rename(tensors: Mapping[str, Tensor], *, origin: str, own: bool = False) -> Renamed:
    """Return the tensors under our names; raises CheckpointRejected where no library or no plain ViT is recognised."""
    library, prefix, left_out = _recognise(tensors, origin)
    stripped = {key.removeprefix(prefix): key for key in tensors if key not in left_out}
    refuse_what_is_no_plain_vit(stripped, origin=origin)
    sorted_out = _sort_out(stripped, _RULES[library])
    sources = {name: tuple(found[part] for part in sorted(found)) for name, found in sorted_out.parts.items()}
    joined = {name for name, change in sorted_out.changes.items() if change.startswith("joined")}
    incomplete = [name for name in sorted(joined) if len(sources[name]) < 3]
    whole = {name: keys for name, keys in sources.items() if name not in incomplete}
    others = dict.fromkeys(left_out, "other weights of the same network, not averaged")
    return Renamed(
        library="vit-edge" if own else library,
        prefix=prefix,
        tensors={
            name: _joined([tensors[key] for key in keys], sorted_out.changes.get(name, ""), name, origin)
            for name, keys in whole.items()
        },
        sources=whole,
        changes={name: change.split()[0] for name, change in sorted_out.changes.items()},
        unused={**others, **sorted_out.unused},
        unexpected=(*sorted_out.unexpected, *(key for name in incomplete for key in sources[name])),
        pre_logits=tuple(sorted_out.pre_logits),
        final_norm="after_pooling" if "fc_norm.weight" in stripped else "before_pooling",
        num_heads=_heads(tensors, sources),
        notes=(f"averaged weights ({prefix}) taken",) if left_out else (),
    )


@dataclass(slots=True)
class _SortedOut:
    """Which tensors, by the file's names, each of ours is made from; and those that none is."""

    parts: dict[str, dict[int, str]] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    pre_logits: list[str] = field(default_factory=list)


def _sort_out(keys: Mapping[str, str], rules: tuple[_Rule, ...]) -> _SortedOut:
    found = _SortedOut()
    for key, source in keys.items():
        rule = _rule_for(key, rules)
        reason = next((reason for pattern, reason in _UNUSED if re.fullmatch(pattern, key)), None)
        if rule is None and reason is not None:
            found.unused[source] = reason
        elif rule is None and _PRE_LOGITS.fullmatch(key):
            found.pre_logits.append(source)
        elif rule is None or rule[1] in found.parts.get(rule[0], {}):
            found.unexpected.append(source)
        else:
            found.parts.setdefault(rule[0], {})[rule[1]] = source
            found.changes |= {rule[0]: rule[2]} if rule[2] else {}
    return found


def _recognise(tensors: Mapping[str, Tensor], origin: str) -> tuple[Library, str, tuple[str, ...]]:
    """Return the library, the prefix of its keys, and the keys of other copies of the same network."""
    for library, anchor in _ANCHORS.items():
        prefixes = sorted({match[1] for key in tensors if (match := re.fullmatch(anchor, key))})
        if not prefixes:
            continue
        # Averaged weights are those that were evaluated; the others are left out and named.
        averaged = [prefix for prefix in prefixes if _AVERAGED.search(prefix)]
        chosen = (averaged or prefixes)[0]
        if len(prefixes) > 1 and len(averaged) != 1:
            reason = f"the file holds {len(prefixes)} networks: under {', '.join(map(repr, prefixes))}"
            raise unusable(origin, reason, "save the one that is wanted by itself")
        others = [prefix for prefix in prefixes if prefix != chosen]
        left_out = tuple(
            key for key in tensors if not key.startswith(chosen) and any(key.startswith(prefix) for prefix in others)
        )
        return library, chosen, left_out
    refuse_what_is_no_plain_vit({key: key for key in tensors}, origin=origin)
    reason = f"the keys are of no Vision Transformer that is known: {', '.join(sorted(tensors)[:5])}"
    remedy = "timm, transformers, torchvision and Google's npz are read; save it from one of them"
    raise not_plain(origin, reason, remedy)


def _rule_for(key: str, rules: tuple[_Rule, ...]) -> tuple[str, int, str] | None:
    for pattern, name, part, change in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name), part, change
    return None


def _joined(tensors: list[Tensor], change: str, name: str, origin: str) -> Tensor:
    try:
        laid_out = [_CHANGES[change](tensor) for tensor in tensors]
        return laid_out[0] if len(laid_out) == 1 else torch.cat(laid_out)
    except (IndexError, RuntimeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        reason = f"the tensors for {name} have shapes that do not go together: {shapes}"
        raise unusable(origin, reason, "take them from one file of one network") from error


def _heads(tensors: Mapping[str, Tensor], sources: Mapping[str, tuple[str, ...]]) -> int | None:
    """Return the number of heads where the queries are stored by head, as JAX does."""
    query = tensors.get(sources.get("blocks.0.attn.qkv.weight", ("",))[0])
    return int(query.shape[1]) if query is not None and query.ndim == 3 else None
