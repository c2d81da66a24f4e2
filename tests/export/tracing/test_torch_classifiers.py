"""Any torch image classifier exports under the same contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

from tests.conftest import vit_edge
from tests.support.networks import PREPROCESSING, damaged_trace, random_network, small_config
from vit_edge.errors import CheckpointRejected, UsageError, VerificationFailed
from vit_edge.export import export_onnx
from vit_edge.export.sources.factory import make_network
from vit_edge.export.tracing import exporter as exporter_module
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images


def _lively(network: nn.Module) -> nn.Module:
    """Return the network as if it were trained: weights that carry signals, statistics of what they normalise.

    The logits of an untrained one are so small that no tolerance means anything.
    """
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            module.momentum = None  # the mean over all batches seen
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        network.train()(torch.randn(16, 3, 64, 64))
    return network.eval()


# Of each kind of block one or two: what the whole network would only repeat.
_TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: SwinTransformer([4, 4], 48, [2, 2], [3, 6], [7, 7], num_classes=5),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "convnext": lambda: ConvNeXt([CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)], num_classes=5),
}


@pytest.mark.parametrize("name", list(_TORCHVISION))
def test_torchvision_networks_export_under_the_same_contract(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = _lively(_TORCHVISION[name]())
    preprocessing = Preprocessing(resize=64, crop=(64, 64))
    result = export_onnx(
        network, out=tmp_path / "m.onnx", preprocessing=preprocessing, labels=tuple("abcde"), name=name
    )
    assert len(result.parity) == 10
    assert min(row.sqnr_db for row in result.parity) > 70
    manifest = open_model(tmp_path / "m.onnx").manifest
    assert manifest.architecture["family"] == "torch"
    assert manifest.assumed == ()
    assert len((manifest.golden or {})["seeds"]) == 8
    with load(tmp_path / "m.onnx") as classifier:
        logits = classifier.logits(golden_images([1, 2], height=64, width=64))
    assert logits.shape == (2, 5)
    assert abs(logits).max() > 1e-2


def test_where_a_normalisation_went_into_its_product_the_first_tensor_apart_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "trace", damaged_trace("3.weight"))
    convolution = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 2, 2))
    network = _lively(nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(VerificationFailed, match="first apart from PyTorch at '3'"):
        export_onnx(network, out=tmp_path / "m.onnx", preprocessing=PREPROCESSING, labels=tuple("abc"))


class _Unusual(nn.Module):
    """What no network of torchvision's famous ones has together: names that ours could meet, poolings, bare norms."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.7))
        self.logits = nn.Conv2d(3, 8, 3)
        self.logits_2 = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8, bias=False)
        self.images = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.logits_2(nn.functional.elu(self.logits(images * self.scale)))
        x = nn.functional.avg_pool2d(nn.functional.leaky_relu(x), 3, stride=2, ceil_mode=True)
        pooled: Tensor = self.images(self.norm(x.amax((2, 3))))
        return pooled


def test_an_unusual_network_exports_with_every_name_once(tmp_path: Path) -> None:
    result = export_onnx(_lively(_Unusual()), out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    assert min(row.sqnr_db for row in result.parity) > 80
    graph = onnx.load(tmp_path / "m.onnx").graph
    names = [*(node.name for node in graph.node), *(tensor.name for tensor in graph.initializer)]
    assert len(names) == len(set(names))
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "LayerNormalization")
    with load(tmp_path / "m.onnx") as classifier:
        assert classifier.manifest.provenance["weights_sha256"]


def test_a_vision_transformer_as_a_module_gets_its_fused_graph(tmp_path: Path) -> None:
    export_onnx(random_network(small_config()), out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    manifest = open_model(tmp_path / "m.onnx").manifest
    assert manifest.provenance["form"] == "fused"
    assert manifest.labels == tuple("0123456")
    assert manifest.assumed == ("labels",)


FACTORY = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def needs_an_argument(width):
    return small()

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("def small(:")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit()")
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
    (tmp_path / "names.txt").write_text("circle\nsquare\nstar\n")
    (tmp_path / "short.txt").write_text("circle\nsquare\n")
    (tmp_path / "fed.toml").write_text("resize = 36\ncrop = 32\nmean = [0.5, 0.5, 0.5]\nstd = 0.5\n")
    return tmp_path


@pytest.mark.parametrize("weights", ["weights.safetensors", "weights.pt"])
def test_the_command_takes_a_factory_with_weights_and_labels(folder: Path, weights: str) -> None:
    options = ("--labels", "names.txt", "--preprocessing", "fed.toml", "--json")
    done = vit_edge("export", "shapes:small", "--weights", weights, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout)["warnings"]
    assert len(warnings) == 1
    assert "preprocessing.interpolation" in warnings[0]
    manifest = open_model(folder / "model.onnx").manifest
    assert manifest.labels == ("circle", "square", "star")
    assert manifest.preprocessing == Preprocessing(resize=36, crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert manifest.assumed == ("preprocessing.interpolation",)
    with load(folder / "model.onnx") as classifier:
        found = classifier.logits(golden_images([1], height=32, width=32))
    network = make_network_in(folder, folder / weights)
    with torch.no_grad():
        right = network(torch.from_numpy(manifest.preprocessing.normalise(golden_images([1], height=32, width=32))))
    assert abs(found - right.numpy()).max() < 1e-4


def make_network_in(folder: Path, weights: Path) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    found = torch.load(weights)["state_dict"] if weights.suffix == ".pt" else None
    from safetensors.torch import load_file

    network.load_state_dict(found or load_file(weights))
    return network


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("nowhere:small", 2, "No module named 'nowhere'"),
        ("shapes:large", 2, "has no attribute 'large'"),
        ("shapes:needs_an_argument", 2, "give a factory that needs no arguments"),
        ("shapes:number", 2, "give a factory that needs no arguments"),
        ("broken:small", 2, "SyntaxError"),
        ("leaves:small", 2, "SystemExit"),
        ("shapes:small --weights names.txt", 3, "names.txt"),
        ("shapes:small --preprocessing names.txt", 3, "neither JSON nor TOML"),
        ("shapes:small --labels weights.pt", 3, "cannot use the labels"),
        ("shapes:small --labels short.txt", 2, "2 labels for 3 classes"),
        ("shapes:small --like timm:resnet18", 2, "--like is for weights"),
        ("weights.pt --weights weights.pt", 2, "--weights is for package.module:factory"),
        ("shapes:small --image-size wide", 2, "write pixels as 224 or 192x256"),
        ("shapes:small --batch-size some", 2, "neither a number"),
    ],
)
def test_what_cannot_be_made_gets_one_sentence(folder: Path, line: str, code: int, sentence: str) -> None:
    done = vit_edge("export", *line.split(), cwd=folder)
    assert done.returncode == code, done.stderr
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_weights_that_do_not_fit_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    save_file({"0.weight": torch.zeros(1), "extra": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointRejected, match=r"4\.weight is missing; extra is not expected; 0\.weight has shape"):
        make_network("shapes:small", weights=folder / "other.safetensors")


class _NotLogits(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


class _Frozen(nn.Module):
    """Its forward knows one batch only: that which it is traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.head(images.mean((2, 3)))
        return pooled.reshape(5, 4) if len(images) == 5 else pooled


def _not_finite() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 16, 3))
    nn.init.constant_(network[1].bias, float("nan"))  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (_NotLogits, UsageError, r"the network gives \[2, 3, 24, 16\]"),
        (lambda: nn.Linear(3, 3), UsageError, "does not run on RGB images of 24 x 16: mat1 and mat2"),
        (_not_finite, CheckpointRejected, "not every weight is finite: 1.bias"),
    ],
)
def test_networks_that_are_no_classifiers_are_refused(
    tmp_path: Path, make: Callable[[], nn.Module], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        export_onnx(make(), out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_freezes_the_batch_is_refused_in_the_exporters_words(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed) as raised:
        export_onnx(_Frozen(), out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    assert "the batch must stay free" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert "batch" in raised.value.reason or "dim" in raised.value.reason
    assert list(tmp_path.iterdir()) == []
