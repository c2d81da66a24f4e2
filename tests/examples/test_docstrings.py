"""The examples in the docstrings of the public functions run, in a folder with the files that they name."""

from __future__ import annotations

import doctest
import importlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.networks import random_network, small_config
from tests.support.third_party_weights import bare, state_of, timm_model
from vit_edge.runtime import load
from vit_edge.training.recipe import RECIPES

EXAMPLES = (
    "convert.convert",
    "convert.open_source",
    "export.deploy",
    "export.explain",
    "export.export_onnx",
    "export.import_onnx",
    "export.quantize",
    "export.verify",
    "progress.shown_progress",
    "runtime.Classifier",
    "runtime.Pool",
    "runtime.load",
    "runtime.measure",
    "train.train",
)


@pytest.fixture(scope="module")
def files(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run, its model files, images by class, and networks of others."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "run").mkdir()
    shutil.copy(deployment / "c.safetensors", folder / "run" / "best.safetensors")
    for name in ("model.onnx", "model.int8.onnx"):
        shutil.copy(deployment / "out" / name, folder)
    for number, path in enumerate(sorted((deployment / "calibration").iterdir())):
        target = folder / "images" / "train" / "abcdefg"[number % 7] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(deployment / "data", folder / "images" / "test")
    Image.open(path).save(folder / "image.jpg")
    (folder / "labels.txt").write_text("\n".join("abcdefg"))
    bare(folder / "weights.safetensors", state_of(timm_model(num_classes=7)))
    _trace(folder / "other.onnx")
    return folder


def _trace(path: Path) -> None:
    network = random_network(small_config(image_size=(32, 32)))
    axes = {"x": {0: "n"}, "y": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.randn(1, 3, 32, 32),), path, input_names=["x"], output_names=["y"], opset_version=17,
            dynamo=False, dynamic_axes=axes,
        )  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, function = name.partition(".")
    names: dict[str, Any] = {"Path": Path, "RECIPES": RECIPES, "load": load}
    source = importlib.import_module(f"vit_edge.{module}")
    names |= {public: getattr(source, public) for public in source.__all__}
    monkeypatch.chdir(files)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(names[function], function, globs=names, module=False)
    assert example.examples, "the docstring has no example"
    shown = list[str]()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=shown.append).failed == 0, "".join(shown)
