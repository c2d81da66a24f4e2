"""Networks that look like a Vision Transformer and are another function: refused by the key that shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vit_edge.conversion.pickled_weights import unusable

__all__ = ["refuse_what_is_no_plain_vit"]

# Pattern of a key, what it shows, and what to do where something can be done.
_SIGNS: tuple[tuple[str, str, str | None], ...] = (
    (r"mlp\.(w12|w[123]|fc1_[gx]|gate_proj|weights_in)\b", "its MLP is gated (SwiGLU)", None),
    (r"attn_pool\.|MAPHead", "it pools by attention (SigLIP and others)", None),
    (r"\b[qk]_norm\b", "it normalises queries and keys", None),
    (r"\b(attn|mlp)\.norm\b|sub_norm", "it has a norm inside of its branches", None),
    (r"\brope|\bfreqs|rotary", "its positions are rotary", None),
    (r"rel_pos|relative_position", "its positions are relative", None),
    (r"patch_embed\.backbone|conv_root|conv_proj\.conv_|\bstem\.", "its patches come from convolutions", None),
    (r"pos_embed_(x|y|row|col)|absolute_pos_embed|downsample", "it is a hierarchical network", None),
    (r"\b[qv]_bias\b", "its queries and values have biases, its keys have not (BEiT)", None),
    (r"blocks\.\d+\.in_proj|blocks\.\d+\.(attns|ffns)\.", "its attention and MLP run side by side", None),
    (r"Transformer/encoderblock/", "its blocks are stacked in one array", "unstack them, one array a block"),
    (
        r"resblocks\.",
        "its names are those of OpenAI and open_clip",
        "convert it as `timm:NAME`, such as a vit_*_clip_*",
    ),
    (r"decoder", "it has a decoder: it reconstructs and does not classify", None),
)
_REMEDY = "a plain Vision Transformer is needed: pre-norm blocks, one attention and one GELU MLP each"


def refuse_what_is_no_plain_vit(keys: Mapping[str, str], *, origin: str) -> None:
    """Raise CheckpointRejected where a key shows a part that no ViTConfig has; `keys` maps to the file's own names."""
    for pattern, shown, remedy in _SIGNS:
        found = next((source for key, source in keys.items() if re.search(pattern, key)), None)
        if found is not None:
            raise unusable(origin, f"{shown}: {found}", remedy or _REMEDY)
