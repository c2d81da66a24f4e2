"""Networks that do not choose one class: several labels at once, one logit, and values, from torch to the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vit_edge.cli.workstation.score_figures import score_figures, terms_of
from vit_edge.cli.workstation.verify import verification_data
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export import ExportOptions, QuantizationOptions, export_onnx, quantize, verify
from vit_edge.export.verification.request import open_request
from vit_edge.export.verification.scores import SCORE_METHOD, best_certifiable_drop, pair_scores
from vit_edge.export.verification.verdict import Budget, certifiable_scores, decide_scores
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import Manifest, open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

PREPROCESSING = Preprocessing(resize=(16, 16), crop=(16, 16))
NUM_IMAGES = 100
KINDS: dict[str, dict[str, Any]] = {
    "multi-label": {"num_values": 3, "activation": "sigmoid", "labels": ("cat", "tree top", "owl")},
    "binary": {"num_values": 1, "activation": "sigmoid", "labels": ("owl",)},
    "regression": {"num_values": 2, "activation": "none", "labels": ("height", "age")},
}


class _Network(nn.Module):
    def __init__(self, num_values: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, num_values)

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = 20 * self.head(self.conv(images).relu().mean((2, 3)))
        return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a float32 and an INT8 file of each kind, and images to calibrate and to evaluate."""
    root = tmp_path_factory.mktemp("scores")
    for name, first, number in (("calibration", 0, 8), ("evaluation", 1000, NUM_IMAGES)):
        (root / name).mkdir()
        for i, pixels in enumerate(golden_images(range(first, first + number), height=16, width=16)):
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    for kind, how in KINDS.items():
        network = _Network(how["num_values"])
        export_onnx(
            network, out=root / f"{kind}.onnx", preprocessing=PREPROCESSING, labels=how["labels"],
            activation=how["activation"],
        )  # fmt: skip
        if kind == "binary":  # a classifier of two classes from here on
            continue
        options = QuantizationOptions(measure_speed=False)
        out = root / f"{kind}.int8.onnx"
        quantize(root / f"{kind}.onnx", calibration=root / "calibration", out=out, options=options)
    return root


def _outputs(made: Path, kind: str) -> dict[str, Any]:
    with load(made / f"{kind}.onnx", engine="onnxruntime") as model:
        paths = sorted((made / "evaluation").glob("*.png"))
        return {path.name: row for path, row in zip(paths, model.run(_pixels(paths)), strict=True)}


def _pixels(paths: list[Path]) -> Any:
    return np.stack([PREPROCESSING.pixels(path) for path in paths])


def _label(made: Path, folder: Path, header: str, row: Any, kind: str) -> Path:
    folder.mkdir()
    for path in (made / "evaluation").glob("*.png"):
        (folder / path.name).symlink_to(path)
    lines = [f"{name},{row(values)}" for name, values in _outputs(made, kind).items()]
    (folder / "labels.csv").write_text("\n".join([header, *lines]))
    return folder


def test_classify_shows_several_labels_one_logit_and_values_as_what_they_are(made: Path) -> None:
    image = made / "evaluation" / "000.png"
    texts = {}
    for kind, how in KINDS.items():
        with torch.inference_mode():
            values = _Network(how["num_values"])(torch.from_numpy(PREPROCESSING.normalise(_pixels([image]))))[0]
        with load(made / f"{kind}.onnx", engine="onnxruntime") as model:
            found, texts[kind] = model(image, top=1), model(image, top=3).text
            assert (model.manifest.task, model.manifest.num_values) == (kind, max(2, how["num_values"]))
        if kind == "regression":
            assert found.answers[0].probability == pytest.approx(float(values[0]), abs=1e-4)
            assert found.to_dict()["value"] == found.answers[0].probability
            assert texts[kind] == f"height {values[0]:.6g}  age {values[1]:.6g}" or "%" not in texts[kind]
        elif kind == "binary":
            assert model.labels == ("not owl", "owl")
            chances = {one.label: one.probability for one in found.answers}
            assert chances[found.label] == pytest.approx(float(torch.sigmoid(values[0].abs())), abs=1e-4)
        else:
            present = {name for name, value in zip(how["labels"], values, strict=True) if value >= 0}
            assert {*found.present} == present == {*found.to_dict()["present"]}
            assert texts[kind].count("(") == 3 - len(present)


def test_a_verification_counts_labels_and_errors_with_and_without_their_truth(made: Path, tmp_path: Path) -> None:
    names = KINDS["multi-label"]["labels"]
    data = {
        "multi-label": _label(
            made, tmp_path / "m", "file,tags", lambda row: "|".join(np.array(names)[row >= 0]), "multi-label"
        ),
        "regression": _label(
            made, tmp_path / "r", "file,Height,age", lambda row: f"{row[0] + 0.5},{row[1] + 0.5}", "regression"
        ),
    }
    for kind, folder in data.items():
        files = {"reference": made / f"{kind}.onnx", "data": folder}
        found = verify(made / f"{kind}.int8.onnx", **files, max_drop_points=8, engines=("onnxruntime",))
        scores = found.decisive.scores
        assert scores is not None
        assert found.labels == "all"
        assert scores.reference == pytest.approx(100 if kind == "multi-label" else 0.5)
        assert scores.reference_map == (pytest.approx(100) if kind == "multi-label" else None)
        blind = verify(
            made / f"{kind}.int8.onnx", **files, min_agreement=90, unlabelled=True, engines=("onnxruntime",)
        ).decisive
        # Without labels all that changed counts as lost; with them no more than that can be.
        assert found.decisive.drop_points <= blind.drop_points + 1e-9 == pytest.approx(100 - blind.agreement)
        assert blind.drop_points < blind.drop_upper_bound_points
        same = verify(made / f"{kind}.onnx", **files, max_drop_points=5, engines=("onnxruntime",))
        assert (same.verdict, same.decisive.drop_points, same.num_unlabelled) == ("pass", 0, 0)
    with pytest.raises(DataRejected, match="no column for 'height'"):
        open_request(made / "regression.int8.onnx", reference=made / "regression.onnx", data=tmp_path / "m")


def test_what_is_printed_has_the_figures_of_the_task(made: Path, tmp_path: Path) -> None:
    folder = _label(made, tmp_path / "r", "file,height,age", lambda row: f"{row[0]},{row[1]}", "regression")
    files: dict[str, Any] = {"reference": made / "regression.onnx", "data": folder, "engines": ("onnxruntime",)}
    found = verify(made / "regression.int8.onnx", **files, max_drop_points=60)
    figures = score_figures(found.decisive)
    assert figures["mean absolute error, reference"] == "0"
    assert figures["rise of the error"].endswith("% of the range")
    printed = verification_data(found)
    assert printed["scores"]["task"] == "regression"
    assert printed["bound_method"] == SCORE_METHOD
    assert terms_of(found.decisive).drop == "the rise of the error is"


def test_flips_and_limits_of_other_tasks_are_refused(made: Path) -> None:
    files: dict[str, Any] = {"reference": made / "multi-label.onnx", "data": made / "evaluation"}
    with pytest.raises(UsageError, match="flips files are for one class of several"):
        open_request(made / "multi-label.int8.onnx", **files, flips=made / "flips.csv")
    with pytest.raises(UsageError, match="min neighbours is for encoders"):
        open_request(made / "multi-label.int8.onnx", **files, min_neighbours=90)


def test_a_manifest_declares_a_task_that_fits_its_activation(made: Path) -> None:
    text = json.loads(open_model(made / "multi-label.onnx").manifest.to_json())
    for change in ({"task": "ranking"}, {"activation": "softmax"}, {"task": "binary", "activation": "softmax"}):
        with pytest.raises(ValueError, match="task"):
            Manifest.from_json(json.dumps({**text, **change}))
    options = ExportOptions(outputs=("embedding",))
    export_onnx(_Network(4), out=made / "e.onnx", preprocessing=PREPROCESSING, activation="sigmoid", options=options)
    assert open_model(made / "e.onnx", warn=False).manifest.task == "classification"


@pytest.mark.parametrize("is_labelled", [True, False])
def test_a_bound_on_shares_is_right_for_networks_that_lose_exactly_the_limit(is_labelled: bool) -> None:
    wrong = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        before = random.normal(size=(150, 4)).astype(np.float32)
        after = np.where(random.random(before.shape) < 0.03, -before, before)
        truth = (before >= 0).astype(np.float64) if is_labelled else None
        found, _, paired = pair_scores("multi-label", before, after, truth, order=range(150))
        assert found.drop_points <= found.drop_upper_bound_points
        wrong += decide_scores(paired, Budget(max_drop_points=3))[0] == "pass"
    assert wrong <= 20  # 10 are expected at most


def test_unchanged_networks_pass_with_as_many_images_as_are_said_to_be_needed() -> None:
    for is_labelled in (True, False):
        needed = certifiable_scores(50, Budget(max_drop_points=1), is_labelled=is_labelled).images_needed
        assert needed is not None
        assert best_certifiable_drop(needed, is_labelled=is_labelled) <= 1
        assert certifiable_scores(needed, Budget(max_drop_points=1), is_labelled=is_labelled).too_few is False


def test_average_precision_is_that_of_the_ranking_and_leaves_labels_out_that_nobody_has() -> None:
    logits = np.array([[3, -1, -9], [2, -2, -9], [1, -3, -9], [-1, 4, -9]], np.float32)
    truth = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float64)
    _, scores, _ = pair_scores("multi-label", logits, logits, truth, order=range(4))
    assert scores.reference_map == pytest.approx(100 * (((1 + 2 / 3) / 2) + 1) / 2)
    assert scores.reference == pytest.approx(100 * 11 / 12)
