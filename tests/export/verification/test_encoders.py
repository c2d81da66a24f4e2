"""An encoder through the whole path: export, quantize, verify, inspect, report, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.conftest import vit_edge
from tests.support.encoders import NUM_IMAGES, write_images
from tests.support.networks import FAMILIES, PREPROCESSING, SIZE, random_network, small_config
from vit_edge.errors import DataRejected, GoldenMismatch, InputError, UsageError
from vit_edge.export import ExportOptions, QuantizationOptions, export_onnx, quantize, verify, verify_encoder
from vit_edge.export.parity.golden_vectors import with_answers
from vit_edge.export.tracing.fused_vit import DeployedViT
from vit_edge.export.tracing.network import EmbeddingNetwork, reference_extras
from vit_edge.export.verification.request import open_request
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import Manifest, ModelFile, open_model
from vit_edge.report.page import write_report
from vit_edge.runtime.checks.golden import golden_images

IMAGES = golden_images(range(4), height=SIZE[0], width=SIZE[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_graph_gives_the_embedding_and_the_tokens_of_every_family(family: str) -> None:
    model = random_network(small_config(**FAMILIES[family]))
    fused = DeployedViT(model, PREPROCESSING, extras=["attention", "tokens"], embedding="normalized").eval()
    with torch.inference_mode():
        vectors, attention, tokens = fused(torch.from_numpy(IMAGES))
        images = torch.from_numpy(PREPROCESSING.normalise(IMAGES))
        expected = EmbeddingNetwork(model, is_normalized=True)(images)
    others = reference_extras(model, PREPROCESSING)(IMAGES)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(len(IMAGES)))
    torch.testing.assert_close(tokens, torch.from_numpy(others["tokens"]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(attention, torch.from_numpy(others["attention"]), rtol=1e-3, atol=1e-3)


def test_a_manifest_says_that_it_is_an_encoder_and_reads_back(small_encoder: Path) -> None:
    manifest = open_model(small_encoder / "e.onnx").manifest
    assert manifest.embedding == {"width": 24, "normalized": True}
    assert (manifest.output, manifest.num_values, manifest.labels) == ("embedding", 24, ())
    assert Manifest.from_json(manifest.to_json()) == manifest
    graph = open_model(small_encoder / "e.onnx").graph().graph
    assert [value.name for value in graph.output] == ["embedding", "tokens"]
    assert not any("head" in tensor.name for tensor in graph.initializer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embedding": {"width": 0, "normalized": True}}, "width"),
        ({"outputs": ("logits",)}, "'embedding'"),
        ({"labels": ("a", "b")}, "labels"),
        ({"embedding": None}, "'logits'"),
        ({"embedding": 3}, "embedding"),
    ],
)
def test_a_manifest_that_is_neither_is_refused(small_encoder: Path, change: dict[str, Any], said: str) -> None:
    text = json.loads(open_model(small_encoder / "e.onnx").manifest.to_json())
    text |= {key: list(value) if isinstance(value, tuple) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=said):
        Manifest.from_json(json.dumps(text))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalize": True}, "normalize"),
        ({"outputs": ("tokens",)}, "tokens"),
        ({"outputs": ("embedding", "top5")}, "top5"),
        ({"outputs": ("embedding",), "format": "huggingface"}, "Hugging Face"),
    ],
)
def test_outputs_that_do_not_belong_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ExportOptions(**options)


def test_the_module_of_anybody_that_gives_vectors_is_an_encoder(tmp_path: Path) -> None:
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 12, 8, stride=8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(images)).mean(dim=(2, 3))

    torch.manual_seed(0)
    options = ExportOptions(outputs=("embedding",), normalize=True)
    export_onnx(Pooled(), out=tmp_path / "p.onnx", options=options, preprocessing=Preprocessing(resize=SIZE, crop=SIZE))
    manifest = open_model(tmp_path / "p.onnx", warn=False).manifest
    assert manifest.embedding == {"width": 12, "normalized": True}
    assert "labels" not in manifest.assumed


def _evaluation(model: Path) -> Mapping[str, Any]:
    evaluation = open_model(model).manifest.evaluation
    assert evaluation is not None
    return evaluation


def test_quantize_leaves_the_neighbours_kept_in_the_file(small_encoder: Path) -> None:
    for result in _evaluation(small_encoder / "e.int8.onnx")["results"]:
        assert [kept["k"] for kept in result["neighbours"]] == [1, 10]
        assert result["neighbours"][1]["lower_bound"] < result["neighbours"][1]["percent"]
        assert "moved" not in result
        assert result["knn"]["images"] == NUM_IMAGES


def test_verify_passes_an_unchanged_file_and_finds_a_damaged_layer(small_encoder: Path, tmp_path: Path) -> None:
    reference, data = small_encoder / "e.onnx", small_encoder / "images"
    same = verify_encoder(reference, reference=reference, data=data, engines=["onnxruntime"])
    assert same.verdict == "pass"
    assert same.decisive.neighbours[0].percent == 100.0
    assert same.decisive.sqnr_db == float("inf")
    damaged = _damaged(small_encoder / "e.int8.onnx", tmp_path / "damaged.onnx")
    found = verify_encoder(damaged, reference=reference, data=data, min_neighbours=60, engines=["onnxruntime"])
    assert found.verdict == "fail"
    intact = _evaluation(small_encoder / "e.int8.onnx")["results"][0]["neighbours"][1]
    assert found.decisive.kept.upper_bound < intact["lower_bound"]
    assert found.decisive.moved[0].cosine <= found.decisive.moved[-1].cosine


def _damaged(source: Path, target: Path) -> Path:
    """Write the file with the weights of one layer shuffled, and golden vectors of its own: only images show it."""
    model = open_model(source)
    graph = model.graph()
    tensor = next(t for t in graph.graph.initializer if t.name.startswith("block.0.fc1") and len(t.dims) == 2)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.roll(values, 5, axis=0)), tensor.name))
    onnx.checker.check_model(graph)
    target.write_bytes(with_answers(ModelFile.from_graph(graph, model.manifest), model).data)
    return target


def test_golden_vectors_of_another_layer_are_refused(small_encoder: Path, tmp_path: Path) -> None:
    model = open_model(small_encoder / "e.onnx")
    graph = model.graph()
    tensor = next(t for t in graph.graph.initializer if t.name == "block.1.fc2.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    (tmp_path / "edited.onnx").write_bytes(ModelFile.from_graph(graph, model.manifest).data)
    with pytest.raises(GoldenMismatch, match="other embeddings"):
        verify_encoder(tmp_path / "edited.onnx", reference=small_encoder / "e.onnx", data=small_encoder / "images")


def test_a_budget_keeps_layers_in_float32(small_encoder: Path, tmp_path: Path) -> None:
    options = QuantizationOptions(effort="fast", use_cache=False, measure_speed=False, min_neighbours=70)
    found = quantize(
        small_encoder / "e.onnx",
        calibration=small_encoder / "calibration",
        out=tmp_path / "budget.onnx",
        data=small_encoder / "images",
        options=options,
    )
    assert found.search is not None
    for step in found.search.steps:
        assert step.neighbours is not None
        assert step.neighbours_lower_bound is not None
        assert (step.verdict == "pass") == (step.neighbours_lower_bound >= 70)
        assert step.agreement is None
    assert _evaluation(tmp_path / "budget.onnx")["min_neighbours"] == 70


@pytest.mark.parametrize(
    ("options", "said"),
    [({"min_agreement": 90}, "no predictions"), ({"max_drop_points": 1, "unlabelled": True}, "labelled")],
)
def test_a_budget_of_classifiers_is_refused(small_encoder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_request(
            small_encoder / "e.int8.onnx", reference=small_encoder / "e.onnx", data=small_encoder / "images", **options
        )


def test_an_encoder_and_a_classifier_are_not_compared(small_encoder: Path, small_model: Path) -> None:
    with pytest.raises(InputError, match="differ"):
        verify_encoder(small_encoder / "e.onnx", reference=small_model / "m.onnx", data=small_encoder / "images")
    with pytest.raises(UsageError, match="classifier, not an encoder"):
        verify_encoder(small_model / "m.onnx", reference=small_model / "m.onnx", data=small_encoder / "images")
    with pytest.raises(UsageError, match="is an encoder"):
        verify(small_encoder / "e.onnx", reference=small_encoder / "e.onnx", data=small_encoder / "images")
    with pytest.raises(UsageError, match="min neighbours is for encoders"):
        open_request(
            small_model / "m.onnx", reference=small_model / "m.onnx", data=small_encoder / "images", min_neighbours=90
        )


def test_too_few_images_have_no_ten_neighbours_worth_the_name(small_encoder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "few", range(5_000, 5_020))
    reference = small_encoder / "e.onnx"
    with pytest.raises(DataRejected, match="20 different images"):
        verify_encoder(reference, reference=reference, data=tmp_path / "few", engines=["onnxruntime"])


def test_the_commands_print_what_an_encoder_is_and_the_report_shows_it(small_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_encoder, tmp_path / "e")
    done = vit_edge(
        "verify", "e.int8.onnx", "--reference", "e.onnx", "--data", "images", "--engine", "onnxruntime",
        "--min-neighbours", "1", "--json", cwd=tmp_path / "e",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["kind"] == "encoder"
    assert printed["results"][0]["neighbours"][1]["k"] == 10
    (tmp_path / "verify.json").write_text(done.stdout)
    page = write_report(
        [tmp_path / "verify.json", tmp_path / "e" / "e.onnx", tmp_path / "e" / "e.int8.onnx"], out=tmp_path / "r.html"
    ).read_text(encoding="utf-8")
    assert "Neighbours kept: e.int8.onnx" in page
    assert f"{printed['results'][0]['neighbours'][1]['percent']:.2f} %" in page
    shown = vit_edge("inspect", tmp_path / "e" / "e.int8.onnx")
    assert "encoder, vectors of 24 values" in shown.stdout
    assert "neighbours kept" in shown.stdout
