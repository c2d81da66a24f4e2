"""A CLIP or SigLIP folder and a list of labels as one classifier: its text tower runs once, at export.

The logits of an image are its embedding, in length 1, times those of the texts, times a scale, and with a bias in
SigLIP. Texts, scale and bias are constants here: the head of an ordinary classifier.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_edge.conversion.config import processor_facts
from vit_edge.conversion.preprocessing.settings import read_settings
from vit_edge.errors import CheckpointRejected, UsageError, printable, require
from vit_edge.export.sources.torch_network import TorchNetwork, settled_preprocessing, unit_length
from vit_edge.image import Preprocessing
from vit_edge.model_file.tasks import Activation

__all__ = ["DEFAULT_TEMPLATE", "zero_shot_classifier"]

DEFAULT_TEMPLATE = "a photo of a {}"
# CLIP compares its texts with each other, SigLIP decides on each alone (arXiv:2103.00020, arXiv:2303.15343).
_ACTIVATIONS: dict[str, Activation] = {"clip": "softmax", "siglip": "sigmoid"}
_TEXTS_AT_ONCE = 64
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_COPY_TOKENIZER = "copy tokenizer.json and tokenizer_config.json into the folder"


def zero_shot_classifier(
    folder: str | os.PathLike[str], *, labels: Sequence[str], template: str = DEFAULT_TEMPLATE
) -> TorchNetwork:
    """Return the classifier of `labels` that a CLIP or SigLIP in a folder of transformers gives, texts encoded.

    `template` has `{}` in place of the label. Raises UsageError, CheckpointRejected, MissingExtra.
    """
    _check_texts(labels, template)
    root = Path(folder)
    model, kind = _read_model(root)
    texts_KD, scale, bias = _text_head(model, kind, root, [template.replace("{}", label) for label in labels])
    preprocessing, assumed = _preprocessing(root, model.config.vision_config.image_size)
    tower = _ClipTower(model) if kind == "clip" else _SiglipTower(model)
    return TorchNetwork(
        module=_ZeroShotClassifier(tower, texts_KD, scale=scale, bias=bias).eval(),
        name=root.resolve().name,
        preprocessing=preprocessing,
        labels=tuple(labels),
        activation=_ACTIVATIONS[kind],
        task="classification",  # also of SigLIP: the likeliest of these labels is asked for
        assumed=assumed,
    )


class _ZeroShotClassifier(nn.Module):
    """Map normalised images to logits: `logits_per_image` of transformers, with the texts as constants."""

    def __init__(self, tower: nn.Module, texts_KD: Tensor, *, scale: float, bias: float) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(texts_KD.shape[1], texts_KD.shape[0])
        with torch.no_grad():
            self.head.weight.copy_((texts_KD.double() * scale).float())
            self.head.bias.fill_(bias)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(unit_length(self.tower(images_NCHW)))
        return logits_BK


class _ClipTower(nn.Module):
    """CLIP's vision tower with its projection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.projection = model.vision_model, model.visual_projection

    def forward(self, images_NCHW: Tensor) -> Tensor:
        vectors_BD: Tensor = self.projection(self.vision_model(pixel_values=images_NCHW).pooler_output)
        return vectors_BD


class _SiglipTower(nn.Module):
    """SigLIP's vision tower; a learned query pools its tokens by attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, head = model.vision_model, model.vision_model.head
        self.vision_model.use_head = False
        attention, self.layernorm, self.mlp = head.attention, head.layernorm, head.mlp
        self.num_heads, self.output = attention.num_heads, attention.out_proj
        width = attention.embed_dim
        query_weight, key_value_weight = attention.in_proj_weight.split([width, 2 * width])
        query_bias, key_value_bias = attention.in_proj_bias.split([width, 2 * width])
        # The query does not depend on the image.
        query_D = (head.probe[0, 0] @ query_weight.T + query_bias) * (width // self.num_heads) ** -0.5
        self.query = nn.Parameter(query_D.detach().reshape(1, self.num_heads, 1, -1), requires_grad=False)
        self.key_value = nn.Linear(width, 2 * width)
        self.key_value.load_state_dict({"weight": key_value_weight.detach(), "bias": key_value_bias.detach()})

    def forward(self, images_NCHW: Tensor) -> Tensor:
        tokens_BTD = self.vision_model(pixel_values=images_NCHW).last_hidden_state
        _, num_tokens, width = tokens_BTD.shape
        heads = (-1, num_tokens, 2 * self.num_heads, width // self.num_heads)
        k_BNTH, v_BNTH = self.key_value(tokens_BTD).reshape(heads).transpose(1, 2).split(self.num_heads, dim=1)
        weights_BN1T = torch.softmax(torch.matmul(self.query, k_BNTH.transpose(2, 3)), dim=-1)
        pooled_BD = self.output(torch.matmul(weights_BN1T, v_BNTH).reshape(-1, width))
        vectors_BD: Tensor = pooled_BD + self.mlp(self.layernorm(pooled_BD))
        return vectors_BD


def _check_texts(labels: Sequence[str], template: str) -> None:
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if template.count("{}") != 1:
        reason = f"the template is {template!r}"
        raise UsageError("cannot export", reason=reason, remedy='write {} in place of the label: "a photo of a {}"')
    if len(labels) < 2 or twice:
        reason = f"{twice[0]!r} is given twice" if twice else f"there is {len(labels)} label"
        raise UsageError("cannot export", reason=reason, remedy="give two or more different labels, one a line")


def _read_model(root: Path) -> tuple[Any, str]:
    """Return the model in float32 and its kind; no code from the folder runs, and no pickle is read."""
    transformers = require("transformers", extra="huggingface", what="encode the texts")
    if not (root / "config.json").is_file():
        reason = "the folder holds no CLIP or SigLIP model of transformers"
        remedy = "give a folder with config.json, model.safetensors and the tokenizer files"
        raise UsageError("cannot export with --zero-shot", file=root, reason=reason, remedy=remedy)
    try:
        kind = str(transformers.AutoConfig.from_pretrained(root, local_files_only=True).model_type)
        if kind not in _ACTIVATIONS:
            reason, remedy = f"the model is {kind!r}; its text tower is not known", "give a CLIP or SigLIP model"
            raise UsageError("cannot export with --zero-shot", file=root, reason=reason, remedy=remedy)
        options = {"local_files_only": True, "use_safetensors": True, "attn_implementation": "eager"}
        model = transformers.AutoModel.from_pretrained(root, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointRejected(
            "cannot read the model", file=root, reason=reason, remedy="save it with save_pretrained()"
        ) from error
    return model.float().eval(), kind


def _text_head(model: Any, kind: str, root: Path, texts: Sequence[str]) -> tuple[Tensor, float, float]:
    """Return the embeddings of the texts in length 1, [texts, width], and what scales and shifts their products."""
    size = model.config.vision_config.image_size
    nothing = torch.zeros(1, 3, size, size)
    with torch.inference_mode():
        batches = _tokens(model, kind, root, texts)
        found = [model(**tokens, pixel_values=nothing).text_embeds for tokens in batches]
        scale = float(model.logit_scale.double().exp())
        bias = float(model.logit_bias) if kind == "siglip" else 0.0
    return torch.cat(found), scale, bias


def _tokens(model: Any, kind: str, root: Path, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield the tokens of the texts, 64 texts at a time; raises UsageError if one is longer than the model takes."""
    transformers = require("transformers", extra="huggingface", what="encode the texts")
    most = model.config.text_config.max_position_embeddings
    if not any((root / name).is_file() for name in _TOKENIZER_FILES):  # transformers makes one up then
        reason = "the folder has no tokenizer"
        raise CheckpointRejected("cannot encode the texts", file=root, reason=reason, remedy=_COPY_TOKENIZER)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(root, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = f"the tokenizer cannot be read ({' '.join(str(error).split())[:200]})"
        raise CheckpointRejected("cannot encode the texts", file=root, reason=reason, remedy=_COPY_TOKENIZER) from error
    # SigLIP was trained on texts of full length; CLIP reads up to the end of each.
    padding: dict[str, Any] = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": most}
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        tokens = tokenizer(part, return_tensors="pt", **padding)
        if tokens["input_ids"].shape[1] > most:
            longest = max(part, key=len)
            reason = f"the text {printable(longest)!r} has more than the {most} tokens that the model takes"
            raise UsageError("cannot export", file=root, reason=reason, remedy="shorten the label or the template")
        names = ("input_ids", "attention_mask") if kind == "clip" else ("input_ids",)
        yield {name: tokens[name] for name in names}


def _preprocessing(root: Path, image_size: int) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing of the folder's image processor, and what of it is assumed."""
    facts = processor_facts(root, read_settings(root / "config.json"))
    return settled_preprocessing(None, image_size=(image_size, image_size), facts=facts)
