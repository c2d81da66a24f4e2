"""What the head means: a softmax or sigmoid that ends a network is left out once, and never applied twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.export.onnx_import.test_importer import CONV, HEAD, LABELS, PREPROCESSING, WEIGHTS, network, node, save
from vit_edge.errors import ModelRejected, UsageError
from vit_edge.export import import_onnx
from vit_edge.model_file.tasks import Activation
from vit_edge.runtime import Classifier, load
from vit_edge.runtime.checks.golden import golden_images

IMAGES = golden_images(range(4), height=12, width=10)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))


def ending(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Return a network whose logits are `z` and whose output `y` the nodes make of them."""
    return network(*CONV, HEAD[0], node("Gemm", ["f", "w", "b"], ["z"], transB=1), *nodes, **WEIGHTS)


# The nodes behind the logits, and the activation of the file.
ENDINGS: dict[str, tuple[tuple[onnx.NodeProto, ...], Activation]] = {
    "softmax": ((node("Softmax", ["z"], ["y"], axis=1),), "softmax"),
    "softmax, then a copy": ((node("Softmax", ["z"], ["q"]), node("Identity", ["q"], ["y"])), "softmax"),
    "log of softmax": ((node("Softmax", ["z"], ["q"], axis=-1), node("Log", ["q"], ["y"])), "softmax"),
    "log-softmax": ((node("LogSoftmax", ["z"], ["y"], axis=-1),), "softmax"),
    "sigmoid": ((node("Sigmoid", ["z"], ["y"]),), "sigmoid"),
    "softmax in parts": (
        (node("Exp", ["z"], ["e"]), node("ReduceSum", ["e", "one"], ["s"], keepdims=1), node("Div", ["e", "s"], ["y"])),
        "none",
    ),
}


def model_of(kind: str) -> onnx.ModelProto:
    model = ending(*ENDINGS[kind][0])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "one"))
    return model


def probabilities(classifier: Classifier) -> np.ndarray:
    rows = [{one.label: one.probability for one in classifier(image, top=5).answers} for image in IMAGES]
    return np.array([[row[label] for label in LABELS] for row in rows])


@pytest.mark.parametrize("kind", ENDINGS)
def test_probabilities_are_those_of_the_file_however_it_ends(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", model_of(kind))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run(["y"], {"x": PREPROCESSING.normalise(IMAGES)})[0]
    expected = np.exp(expected) if "log" in kind else expected
    imported = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS).model
    with (
        load(imported.data, engine="onnxruntime") as ours,
        load(path, engine="onnxruntime", preprocessing=PREPROCESSING, labels=LABELS) as direct,
    ):
        for classifier in (ours, direct):
            assert classifier.manifest.activation == ENDINGS[kind][1]
            np.testing.assert_allclose(probabilities(classifier), expected, atol=1e-5)


def test_an_activation_inside_the_network_stays(tmp_path: Path) -> None:
    gate = [
        node("Sigmoid", ["f"], ["g"]),
        node("Mul", ["f", "g"], ["h"]),
        node("Gemm", ["h", "w", "b"], ["y"], transB=1),
    ]
    path = save(tmp_path / "m.onnx", network(*CONV, HEAD[0], *gate, **WEIGHTS))
    imported = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS).model
    assert imported.manifest.activation == "softmax"
    assert "Sigmoid" in [each.op_type for each in imported.proto.graph.node]


def test_a_declared_activation_is_kept_and_may_not_contradict_the_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", ending(node("Identity", ["z"], ["y"])))
    imported = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS, activation="sigmoid").model
    with load(imported.data, engine="onnxruntime") as classifier:
        logits = classifier.logits(IMAGES)
        np.testing.assert_allclose(probabilities(classifier), 1 / (1 + np.exp(-logits)), atol=1e-6)
    plain = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS, activation="none").model
    with load(plain.data, engine="onnxruntime") as classifier:
        np.testing.assert_allclose(probabilities(classifier), logits, atol=1e-6)
    path = save(tmp_path / "sigmoid.onnx", model_of("sigmoid"))
    with pytest.raises(UsageError, match="declared as softmax, but the model ends in sigmoid"):
        import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS, activation="softmax")


@pytest.mark.parametrize("last", ["Identity", "Sigmoid", "Softmax"])
def test_a_model_with_one_value_for_an_image_is_binary_or_says_what_the_value_is(last: str, tmp_path: Path) -> None:
    weights = {"filters": WEIGHTS["filters"], "w": WEIGHTS["w"][:1], "b": WEIGHTS["b"][:1]}
    model = network(*CONV, HEAD[0], node("Gemm", ["f", "w", "b"], ["z"], transB=1), node(last, ["z"], ["y"]), **weights)
    path = save(tmp_path / "m.onnx", model)
    if last == "Sigmoid":
        imported = import_onnx(path, preprocessing=PREPROCESSING, labels=["cat"]).model
        with (
            load(imported.data, engine="onnxruntime") as ours,
            load(path, preprocessing=PREPROCESSING, labels=["cat"], engine="onnxruntime") as theirs,
        ):
            assert ours.labels == theirs.labels == ("not cat", "cat")
            assert ours.manifest.task == theirs.manifest.task == "binary"
            np.testing.assert_allclose(ours.logits(IMAGES), theirs.logits(IMAGES), atol=1e-6)
            assert not ours.logits(IMAGES)[:, 0].any()
        return
    with pytest.raises(ModelRejected, match=r"(?s)one value for each image.*activation: sigmoid"):
        import_onnx(path, preprocessing=PREPROCESSING, labels=["cat"])
    with pytest.raises(ModelRejected, match=r"(?s)one value for each image.*activation: sigmoid"):
        load(path, preprocessing=PREPROCESSING, labels=["cat"])
    if last == "Identity":
        plain = import_onnx(path, preprocessing=PREPROCESSING, labels=["age"], activation="none").model
        assert (plain.manifest.task, plain.manifest.num_values) == ("regression", 1)
