"""Any source becomes a network: of a library, a program or code, with its preprocessing and labels."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.third_party_weights import bare, save_timm, state_of, timm_model
from vit_edge.checkpoint import Checkpoint
from vit_edge.convert import open_source
from vit_edge.errors import CheckpointRejected, NotPlainViT, UsageError
from vit_edge.export import export_onnx
from vit_edge.export.sources.opener import open_network
from vit_edge.export.sources.torch_network import TorchNetwork
from vit_edge.export.sources.weights import load_weights
from vit_edge.model_file.tasks import settled_task
from vit_edge.runtime import load

CLASSES = ("cat", "dog", "owl")
PROCESSOR = {
    "image_processor_type": "MobileViTImageProcessor", "do_resize": True, "size": {"shortest_edge": 40},
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_flip_channel_order": True,
}  # fmt: skip


class Small(nn.Module):
    """A classifier of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.relu(self.norm(self.stem(images))).mean((2, 3)))
        return logits


def _small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def msn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of transformers: ViT-MSN, which makes attention masks and is no ViT of ours, for BGR images."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMSNConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, image_size=32, patch_size=8,
        id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTMSNForImageClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("msn")
    model.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    return folder


def test_a_classifier_of_transformers_exports_from_its_folder(msn_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    opened = open_network(msn_folder)
    assert isinstance(opened, TorchNetwork)
    assert opened.labels == CLASSES
    assert opened.assumed == ()
    assert (opened.preprocessing.resize, opened.preprocessing.crop) == (40, (32, 32))
    result = export_onnx(opened, out=tmp_path / "m.onnx")
    assert min(row.sqnr_db for row in result.parity) > 80
    assert {row.batch_size for row in result.parity} == {1, 2, 3, 7, 16}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    model = transformers.ViTMSNForImageClassification.from_pretrained(msn_folder)
    bgr = torch.from_numpy(pixels[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    with load(tmp_path / "m.onnx") as classifier, torch.no_grad():
        assert np.abs(classifier.logits(pixels) - model(bgr).logits.numpy()).max() < 1e-4


def test_masks_of_transformers_are_not_in_the_graph(msn_folder: Path) -> None:
    from vit_edge.export.tracing.network import from_torch_network
    from vit_edge.export.tracing.tracer import trace

    opened = open_network(msn_folder)
    assert isinstance(opened, TorchNetwork)
    graph = trace(from_torch_network(opened).model, height=32, width=32, pixels=False).graph
    assert not {"IsNaN", "Where", "Range"} & {node.op_type for node in graph.node}


def test_convert_names_the_command_that_takes_the_network(msn_folder: Path) -> None:
    with pytest.raises(NotPlainViT, match=f"vit-edge export {msn_folder}") as caught:
        open_source(msn_folder)
    assert "model_type" in caught.value.reason
    with pytest.raises(NotPlainViT, match="vit-edge export timm:NAME --weights"):
        open_source(msn_folder / "model.safetensors")


def test_a_folder_without_a_head_is_refused_by_the_missing_weights(msn_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(msn_folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (tmp_path / "config.json").write_bytes((msn_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointRejected, match=r"not in the folder.*classifier\.weight"):
        open_network(tmp_path)


def test_a_plain_vit_stays_a_checkpoint(tmp_path: Path) -> None:
    folder = save_timm(tmp_path / "vit", timm_model(), model_args={"depth": 2, "img_size": 64})
    assert isinstance(open_network(folder), Checkpoint)


@pytest.fixture(scope="module")
def convnext() -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=3).eval()


def test_any_timm_folder_is_opened_as_timm_makes_it(convnext: Any, tmp_path: Path) -> None:
    opened = open_network(save_timm(tmp_path / "net", convnext))
    assert isinstance(opened, TorchNetwork)
    side = opened.preprocessing.crop
    images = torch.randn(2, 3, *side)
    with torch.no_grad():
        assert torch.equal(opened.module(images), convnext(images))
    assert "timm" in opened.source["library"]


def test_weights_of_timm_training_are_opened_by_their_arch(convnext: Any, tmp_path: Path) -> None:
    arguments = argparse.Namespace(mean=None, model="test_convnext")
    torch.save(
        {"arch": "test_convnext", "state_dict": convnext.state_dict(), "args": arguments}, tmp_path / "a.pth.tar"
    )
    opened = open_network(tmp_path / "a.pth.tar")
    assert isinstance(opened, TorchNetwork)
    assert all(torch.equal(a, b) for a, b in zip(convnext.parameters(), opened.module.parameters(), strict=True))
    same = open_network("timm:test_convnext", weights=bare(tmp_path / "b.safetensors", state_of(convnext)))
    assert isinstance(same, TorchNetwork)
    assert same.module.num_classes == 3


def test_the_arch_of_a_checkpoint_gives_a_vit_its_heads(tmp_path: Path) -> None:
    model = timm_model("deit_tiny_patch16_224")
    saved = {"hyper_parameters": {"model_name": "deit_tiny_patch16_224", "class_names": list(CLASSES)}}
    torch.save({**saved, "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.ckpt")
    opened = open_network(tmp_path / "a.ckpt")
    assert isinstance(opened, Checkpoint)
    assert opened.labels == CLASSES
    assert opened.assumed == ()


def test_a_program_of_torch_export_exports(tmp_path: Path) -> None:
    program = torch.export.export(
        _small(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    opened = open_network(tmp_path / "m.pt2", image_size=(32, 32))
    assert isinstance(opened, TorchNetwork)
    result = export_onnx(opened, out=tmp_path / "m.onnx")
    assert min(row.sqnr_db for row in result.parity) > 80


def test_a_program_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(_small(), (torch.zeros(1, 3, 32, 32),)), tmp_path / "m.pt2")
    opened = open_network(tmp_path / "m.pt2", image_size=(32, 32))
    with pytest.raises(UsageError, match="does not run"):
        export_onnx(opened, out=tmp_path / "m.onnx")


def test_weights_lose_prefixes_and_what_is_no_part_of_the_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _small()
    tensors = {f"model.{name.replace('classifier', 'head.1')}": value for name, value in model.state_dict().items()}
    others = {"criterion.weight": torch.ones(3), "model.train_acc.total": torch.ones(1)}
    torch.save({"state_dict": {**tensors, **others}}, tmp_path / "w.ckpt")
    loaded = Small()
    with caplog.at_level(logging.WARNING):
        load_weights(loaded, tmp_path / "w.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert "criterion.weight" in caplog.text
    assert "train_acc" in caplog.text
    assert "'head.1'" in caplog.text


@pytest.mark.parametrize("head", ["fc", "head.1", "classifier.1"])
def test_a_vit_with_its_head_under_another_name_is_converted(tmp_path: Path, head: str) -> None:
    model = timm_model()
    tensors = {name.replace("head.", f"{head}."): value for name, value in state_of(model).items()}
    tensors["criterion.weight"] = torch.ones(3)
    found = open_source(bare(tmp_path / "a.safetensors", tensors)).model
    assert torch.equal(found.head.weight, model.state_dict()["head.weight"])


def test_an_adapter_says_merge_first(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointRejected, match="PEFT adapter") as caught:
        open_network(tmp_path)
    assert "merge_and_unload" in caught.value.remedy
    save_file({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointRejected, match="PEFT adapter"):
        open_network(tmp_path / "adapter.safetensors")


def test_arguments_of_a_config_that_reach_files_are_not_passed_on(convnext: Any, tmp_path: Path) -> None:
    folder = save_timm(tmp_path / "net", convnext)
    values = json.loads((folder / "config.json").read_text())
    values["model_args"] = {"checkpoint_path": str(tmp_path / "no-such-file.pth"), "num_classes": 3}
    (folder / "config.json").write_text(json.dumps(values))
    assert isinstance(open_network(folder), TorchNetwork)


@pytest.mark.parametrize(
    ("changes", "activation", "task"),
    [
        ({"problem_type": "multi_label_classification"}, "sigmoid", "multi-label"),
        ({"problem_type": "regression"}, "none", "regression"),
        ({"problem_type": "multi_label_classification", "id2label": {"0": "owl"}}, "sigmoid", "binary"),
        ({"id2label": {"0": "age"}}, "none", "regression"),
        ({"problem_type": "single_label_classification"}, None, "classification"),
    ],
)
def test_the_problem_type_of_a_folder_is_what_its_network_is_for(
    msn_folder: Path, tmp_path: Path, changes: dict[str, Any], activation: str | None, task: str
) -> None:
    shutil.copytree(msn_folder, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "config.json").read_text()) | changes
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    if len(values["id2label"]) == 1:
        tensors = load_file(tmp_path / "a" / "model.safetensors")
        heads = {name: tensor[:1].clone() for name, tensor in tensors.items() if name.startswith("classifier.")}
        save_file({**tensors, **heads}, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    opened = open_network(tmp_path / "a")
    assert isinstance(opened, TorchNetwork)
    assert opened.activation == activation
    assert settled_task(opened.activation, None, len(values["id2label"])) == task
