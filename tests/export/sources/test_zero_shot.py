"""CLIP and SigLIP of transformers with random weights: a file gives `logits_per_image`, without a text tower."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, vit_edge
from vit_edge.errors import CheckpointRejected, UsageError
from vit_edge.export.sources.zero_shot import zero_shot_classifier
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LABELS = ("cat", "dog", "grey parrot")
WORDS = ["<pad>", "<eos>", "<unk>", "a", "photo", "of", "cat", "dog", "grey", "parrot", "drawing"]
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11,
    "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
PROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_convert_rgb": True,
}  # fmt: skip


def _write(folder: Path, kind: str) -> Any:
    """Write a random model of a kind with its tokenizer and image processor, and return the model."""
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
        model = transformers.CLIPModel(config)
    else:
        text = {**TEXT, "hidden_size": 24, "projection_size": 24}
        config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
        model = transformers.SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.logit_scale.fill_(3.0)
        if kind == "siglip":
            model.logit_bias.fill_(-4.0)
    model.eval().save_pretrained(folder)
    _write_tokenizer(folder)
    processor = {**PROCESSOR, "image_processor_type": f"{'CLIP' if kind == 'clip' else 'Siglip'}ImageProcessor"}
    if kind == "siglip":
        del processor["do_center_crop"], processor["crop_size"]
        processor["size"] = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def _write_tokenizer(folder: Path) -> None:
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", WORDS.index("<eos>"))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def _expected(folder: Path, model: Any, kind: str, images: np.ndarray[Any, Any], texts: list[str]) -> Any:
    """Return `logits_per_image` as transformers computes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": 12}
    tokens = tokenizer(texts, return_tensors="pt", **padding)
    names = ("input_ids", "attention_mask") if kind == "clip" else ("input_ids",)
    mean, std = (np.float32(PROCESSOR[name]) for name in ("image_mean", "image_std"))
    pixels = torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.inference_mode():
        return model(**{name: tokens[name] for name in names}, pixel_values=pixels).logits_per_image.numpy()


@pytest.mark.parametrize(("kind", "activation"), [("clip", "softmax"), ("siglip", "sigmoid")])
def test_the_file_gives_the_logits_of_transformers_and_needs_no_torch(
    tmp_path: Path, kind: str, activation: str
) -> None:
    model = _write(tmp_path / "model", kind)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    done = vit_edge(
        "export", "model", "--zero-shot", "labels.txt", "--template", "a drawing of a {}", "-o", "z.onnx", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    images = golden_images(range(6), height=32, width=32)
    texts = [f"a drawing of a {label}" for label in LABELS]
    expected = _expected(tmp_path / "model", model, kind, images, texts)
    with load(tmp_path / "z.onnx") as classifier:
        assert classifier.labels == LABELS
        assert classifier.manifest.activation == activation
        np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-4)
        assert np.ptp(expected, axis=1).min() > 1e-2  # the texts differ for this network
        total = sum(answer.probability for answer in classifier(images[0]).answers)
    assert (total == pytest.approx(1.0, abs=1e-5)) == (kind == "clip")
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\nfrom vit_edge.runtime import load\n"
    )
    script += "print(load('z.onnx')('image.png').label)"
    alone = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert alone.stdout.strip() in LABELS, alone.stderr


def test_what_cannot_become_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no CLIP or SigLIP"):
        zero_shot_classifier(tmp_path, labels=LABELS)
    with pytest.raises(UsageError, match="template"):
        zero_shot_classifier(tmp_path, labels=LABELS, template="a photo")
    with pytest.raises(UsageError, match="'cat' is given twice"):
        zero_shot_classifier(tmp_path, labels=("cat", "cat"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UsageError, match="'vit'"):
        zero_shot_classifier(tmp_path, labels=LABELS)


def test_a_label_of_too_many_tokens_and_a_folder_without_tokenizer_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, "clip")
    with pytest.raises(UsageError, match="more than the 12 tokens"):
        zero_shot_classifier(tmp_path, labels=("cat", "dog " * 12))
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointRejected, match="tokenizer"):
        zero_shot_classifier(tmp_path, labels=LABELS)
