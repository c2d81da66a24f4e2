"""Networks that look like a Vision Transformer and are another function: refused by the key that shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vit_edge.conversion.pickled_weights import not_plain

__all__ = ["refuse_what_is_no_plain_vit"]

# Pattern of a key, what it shows, and what to do where something can be done.
_SIGNS: tuple[tuple[str, str, str | None], ...] = (
    (r"mlp\.(w12|w[123]|fc1_[gx]|gate_proj|weights_in)\b", "the network's MLP is gated (SwiGLU)", None),
    (r"attn_pool\.|MAPHead", "the network pools by attention (SigLIP and others)", None),
    (r"\b[qk]_norm\b", "the network normalises queries and keys", None),
    (r"\b(attn|mlp)\.norm\b|sub_norm", "the network has a norm inside of its branches", None),
    (r"\brope|\bfreqs|rotary", "the network's positions are rotary", None),
    (r"rel_pos|relative_position", "the network's positions are relative", None),
    (
        r"patch_embed\.backbone|conv_root|conv_proj\.conv_|\bstem\.",
        "the network's patches come from convolutions",
        None,
    ),
    (r"pos_embed_(x|y|row|col)|absolute_pos_embed|downsample", "the network is hierarchical", None),
    (r"\b[qv]_bias\b", "the network's queries and values have biases, its keys have not (BEiT)", None),
    (r"blocks\.\d+\.in_proj|blocks\.\d+\.(attns|ffns)\.", "the network's attention and MLP run side by side", None),
    (r"Transformer/encoderblock/", "the network's blocks are stacked in one array", "unstack them, one array a block"),
    (
        r"resblocks\.",
        "the network's names are those of OpenAI and open_clip",
        "convert it as `timm:NAME`, such as a vit_*_clip_*",
    ),
    (r"decoder", "the network has a decoder: it reconstructs and does not classify", None),
)
_REMEDY = "a plain Vision Transformer is needed: pre-norm blocks, one attention and one GELU MLP each"


def refuse_what_is_no_plain_vit(keys: Mapping[str, str], *, origin: str) -> None:
    """Raise CheckpointRejected where a key shows a part that no ViTConfig has; `keys` maps to the file's own names."""
    for pattern, shown, remedy in _SIGNS:
        found = next((source for key, source in keys.items() if re.search(pattern, key)), None)
        if found is not None:
            raise not_plain(origin, f"{shown}: {found}", remedy or _REMEDY)
