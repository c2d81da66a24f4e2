"""Torch networks that end in a softmax or sigmoid give its input as logits; heads without classes are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vit_edge.errors import CheckpointRejected, UsageError, VitEdgeError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.image import Preprocessing
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

PREPROCESSING = Preprocessing(resize=(16, 16), crop=(16, 16))


class _Network(nn.Module):
    def __init__(self, ending: str, *, num_classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ending = ending
        self.conv = nn.Conv2d(channels, 8, 4, 4)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 40 * self.head(self.conv(images).relu().mean((2, 3)))
        endings = {
            "softmax": lambda: logits.softmax(-1),
            "log-softmax": lambda: nn.functional.log_softmax(logits, dim=1),
            "log of softmax": lambda: logits.softmax(1).log(),
            "sigmoid": logits.sigmoid,
            "logits": lambda: logits,
        }
        return endings[self.ending]()


@pytest.mark.parametrize("ending", ["softmax", "log-softmax", "log of softmax", "sigmoid", "logits"])
def test_probabilities_are_those_of_pytorch(ending: str, tmp_path: Path) -> None:
    network = _Network(ending)
    export_onnx(network, out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    images = golden_images(range(3), height=16, width=16)
    with torch.inference_mode():
        expected = network(torch.from_numpy(PREPROCESSING.normalise(images)))
    expected = expected.exp() if ending.startswith("log ") or ending == "log-softmax" else expected
    expected = expected.softmax(-1) if ending == "logits" else expected
    with load(tmp_path / "m.onnx", engine="onnxruntime") as classifier:
        assert classifier.manifest.activation == ("sigmoid" if ending == "sigmoid" else "softmax")
        assert np.ptp(classifier.logits(images)) > 1  # logits, not probabilities
        for image, row in zip(images, expected, strict=True):
            found = {one.index: one.probability for one in classifier(image, top=4).answers}
            np.testing.assert_allclose([found[number] for number in range(4)], row, atol=1e-4)


def test_the_output_of_probabilities_has_the_activation_of_the_network(tmp_path: Path) -> None:
    options = ExportOptions(outputs=("probabilities",))
    export_onnx(_Network("sigmoid"), out=tmp_path / "m.onnx", preprocessing=PREPROCESSING, options=options)
    with load(tmp_path / "m.onnx", engine="onnxruntime") as classifier:
        assert classifier.manifest.outputs == ("logits", "probabilities")
    with pytest.raises(UsageError, match="no activation belongs behind the logits"):
        export_onnx(
            _Network("logits"), out=tmp_path / "n.onnx", preprocessing=PREPROCESSING, activation="none", options=options
        )


REFUSED: dict[str, tuple[nn.Module, type[VitEdgeError], str]] = {
    "one logit": (_Network("logits", num_classes=1), VitEdgeError, "one value for each image"),
    "one channel": (_Network("logits", channels=1), UsageError, "grayscale images"),
    "four channels": (_Network("logits", channels=4), UsageError, "4 channels"),
    "float64": (_Network("logits").double(), CheckpointRejected, "conv.weight is float64"),
    "bfloat16": (_Network("logits").bfloat16(), CheckpointRejected, "conv.weight is bfloat16"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_vit_edge_does_not_export_is_named(kind: str, tmp_path: Path) -> None:
    network, error, reason = REFUSED[kind]
    with pytest.raises(error, match=reason):
        export_onnx(network, out=tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    assert not (tmp_path / "m.onnx").exists()


def test_a_declared_activation_may_not_contradict_the_network(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="declared as sigmoid, but the model ends in softmax"):
        export_onnx(_Network("softmax"), out=tmp_path / "m.onnx", preprocessing=PREPROCESSING, activation="sigmoid")
