"""Show 4: every family of networks at its real width, converted from files, against the library it comes from.

    python benchmarks/converter_table.py

makes each with random weights and two blocks, saves it as its library does, converts the file through
`vit_edge.convert`, and compares the logits of two random images. The table goes into docs/results.md. The tests take
their families from here, at smaller images.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BEGIN, END = "<!-- converter:begin -->", "<!-- converter:end -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A source that was saved, the function it should be, the size of its input, and options for `convert`."""

    source: Path | str
    reference: Callable[[torch.Tensor], torch.Tensor]
    image_size: tuple[int, int]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family's name, its library, and how one of it is made: (folder, patches a side or None for the real size)."""

    name: str
    library: str
    make: Callable[[Path, int | None], Made]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model with every parameter random and not zero, biases, tokens, scales and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and name.endswith("weight"):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif re.search(r"norm|ln_|\.ln\.|gamma|lambda1", name) and not name.endswith("bias"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def _timm(name: str, **arguments: Any) -> Family:
    def make(folder: Path, patches: int | None) -> Made:
        import timm
        from timm.models._hub import save_for_hf

        size = {} if patches is None else {"img_size": patches * int(re.search(r"patch(\d+)", name)[1])}
        model = randomise(timm.create_model(name, depth=2, **size, **arguments))
        save_for_hf(model, str(folder), safe_serialization=True)
        return Made(source=folder, reference=model, image_size=model.patch_embed.img_size, options={})

    detail = ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "num_classes")
    return Family(name=f"{name}{f' ({detail})' if detail else ''}", library="timm", make=make)


def _transformers(kind: str, *, patch: int = 16, real: int = 224, **settings: Any) -> Family:
    def make(folder: Path, patches: int | None) -> Made:
        import transformers

        size = (patches or real // patch) * patch
        config_class = getattr(transformers, re.sub(r"For.*", "Config", kind))
        config = config_class(
            num_hidden_layers=2, image_size=size, patch_size=patch, id2label={0: "cat", 1: "dog", 2: "owl"}, **settings
        )
        model = randomise(getattr(transformers, kind)(config))
        model.save_pretrained(folder)
        # As published for DINOv2: trained at 518 pixels, used at 224.
        used = 224 if real == 518 and patches is None else size
        if kind.startswith("Dinov2") and patches is not None:
            used = (patches - 1) * patch
        transformers.ViTImageProcessor(size={"height": used, "width": used}).save_pretrained(folder)
        return Made(
            source=folder, reference=lambda images: model(images).logits, image_size=(used, used), options={}
        )  # fmt: skip

    return Family(name=kind, library="transformers", make=make)


def _torchvision(name: str, *, patch: int, heads: int, width: int) -> Family:
    def make(folder: Path, patches: int | None) -> Made:
        from torchvision.models.vision_transformer import VisionTransformer

        size = (patches or 224 // patch) * patch
        model = randomise(VisionTransformer(size, patch, 2, heads, width, 4 * width, num_classes=10))
        torch.save(model.state_dict(), folder / f"{name}.pth")
        return Made(source=folder / f"{name}.pth", reference=model, image_size=(size, size), options={})

    return Family(name=name, library="torchvision", make=make)


def _google(name: str, *, prefix: str = "") -> Family:
    def make(folder: Path, patches: int | None) -> Made:
        import timm

        patch = 16
        size = (patches or 224 // patch) * patch
        model = timm.create_model(name, depth=2, img_size=size, num_classes=10)
        arrays = google_arrays(width=model.embed_dim, heads=model.blocks[0].attn.num_heads, patch=patch, size=size)
        np.savez(folder / "weights.npz", **{prefix + key: array for key, array in arrays.items()})
        model.load_pretrained(str(folder / "weights.npz"))
        return Made(source=folder / "weights.npz", reference=model.eval(), image_size=(size, size), options={})

    return Family(name=f"Google's npz, {name}", library="timm", make=make)


def google_arrays(
    *, width: int, heads: int, patch: int, size: int, classes: int = 10, depth: int = 2
) -> dict[str, np.ndarray]:
    """Return random arrays under the names, and in the layout, of Google's vision_transformer."""
    random = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 0.3, around: float = 0.0) -> np.ndarray:
        return (around + scale * random.standard_normal(shape)).astype(np.float32)

    narrow = width**-0.5
    arrays = {
        "cls": draw(1, 1, width),
        "embedding/kernel": draw(patch, patch, 3, width, scale=(3 * patch * patch) ** -0.5),
        "embedding/bias": draw(width),
        "Transformer/posembed_input/pos_embedding": draw(1, (size // patch) ** 2 + 1, width),
        "Transformer/encoder_norm/scale": draw(width, around=1.0),
        "Transformer/encoder_norm/bias": draw(width),
        "head/kernel": draw(width, classes, scale=narrow),
        "head/bias": draw(classes),
    }
    for block in range(depth):
        at = f"Transformer/encoderblock_{block}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{at}{norm}/scale": draw(width, around=1.0), f"{at}{norm}/bias": draw(width)}
        for part in ("query", "key", "value"):
            attention = f"{at}MultiHeadDotProductAttention_1/{part}"
            arrays[f"{attention}/kernel"] = draw(width, heads, width // heads, scale=narrow)
            arrays[f"{attention}/bias"] = draw(heads, width // heads)
        arrays[f"{at}MultiHeadDotProductAttention_1/out/kernel"] = draw(heads, width // heads, width, scale=narrow)
        arrays[f"{at}MultiHeadDotProductAttention_1/out/bias"] = draw(width)
        for layer, (rows, columns) in enumerate(((width, 4 * width), (4 * width, width))):
            arrays[f"{at}MlpBlock_3/Dense_{layer}/kernel"] = draw(rows, columns, scale=rows**-0.5)
            arrays[f"{at}MlpBlock_3/Dense_{layer}/bias"] = draw(columns)
    return arrays


FAMILIES = (
    _timm("vit_tiny_patch16_224"),
    _timm("vit_small_patch32_224"),
    _timm("vit_base_patch8_224"),
    _timm("vit_base_patch16_224", global_pool="avg"),
    _timm("vit_large_patch14_224"),
    _timm("deit_tiny_patch16_224"),
    _timm("deit_small_patch16_224"),
    _timm("deit_base_distilled_patch16_224"),
    _timm("deit3_small_patch16_224"),
    _timm("deit3_large_patch16_224"),
    _timm("vit_small_patch14_dinov2", num_classes=10),
    _timm("vit_base_patch14_reg4_dinov2", num_classes=10),
    _timm("vit_medium_patch16_gap_256"),
    _timm("vit_medium_patch16_reg4_gap_256"),
    _timm("vit_base_patch32_clip_224"),
    _timm("vit_base_patch16_clip_quickgelu_224"),
    _timm("vit_large_patch14_clip_336"),
    _transformers("ViTForImageClassification"),
    _transformers("DeiTForImageClassification"),
    _transformers("DeiTForImageClassificationWithTeacher"),
    _transformers("Dinov2ForImageClassification", patch=14, real=518),
    _transformers("Dinov2WithRegistersForImageClassification", patch=14, real=518),
    _torchvision("vit_b_16", patch=16, heads=12, width=768),
    _torchvision("vit_b_32", patch=32, heads=12, width=768),
    _torchvision("vit_l_16", patch=16, heads=16, width=1024),
    _torchvision("vit_l_32", patch=32, heads=16, width=1024),
    _torchvision("vit_h_14", patch=14, heads=16, width=1280),
    _google("vit_tiny_patch16_224"),
    _google("vit_base_patch16_224", prefix="opt/target/"),
)


def largest_difference(made: Made, model: nn.Module, seed: int = 1) -> float:
    """Return the largest difference of two images' logits, relative to the largest logit."""
    images = torch.randn(2, 3, *made.image_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, found = made.reference(images), model(images)
    return float((found - expected).abs().max() / expected.abs().max())


def measure(family: Family) -> float:
    """Return the difference of one family, through files and the public `convert`."""
    from vit_edge.checkpoint import load_checkpoint
    from vit_edge.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        made = family.make(source, None)
        convert(made.source, out=Path(folder) / "out", **made.options)
        return largest_difference(made, load_checkpoint(Path(folder) / "out").model)


def write_table(rows: list[str], worst: float) -> None:
    """Replace the table in docs/results.md."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "timm", "transformers", "torchvision")
    )
    lines = [
        BEGIN,
        f"{len(FAMILIES)} families at their real width and image size with two blocks, every weight random,",
        "saved as files, converted, and compared on two random images in float32; the promise is 1e-5.",
        f"`python benchmarks/converter_table.py`, {versions}; seeds 0 and 1; largest of all {worst:.1e}.",
        "0.0 is equal to the last bit: the same operations in the same order.",
        "",
        "| family | library | largest difference of a logit, relative to the largest logit |",
        "|---|---|---|",
        *rows,
        END,
    ]
    results = ROOT / "docs" / "results.md"
    text = results.read_text(encoding="utf-8") if results.exists() else "# Results\n"
    if BEGIN not in text:
        text += f"\n## Converter\n\n{BEGIN}\n{END}\n"
    table = "\n".join(lines)
    results.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """Measure every family and write the table into docs/results.md."""
    torch.manual_seed(0)
    rows, worst, began = [], 0.0, time.monotonic()
    for family in FAMILIES:
        difference = measure(family)
        worst = max(worst, difference)
        rows.append(f"| {family.name} | {family.library} | {difference:.1e} |")
        print(rows[-1], flush=True)
    write_table(rows, worst)
    print(f"largest {worst:.1e}, {time.monotonic() - began:.0f} s, written to docs/results.md")
    if worst > 1e-5:
        raise SystemExit(f"{worst:.1e} is over 1e-5")


if __name__ == "__main__":
    main()
