"""Wrong inputs and wrong moments: one row for each numbered fault (44 to 53 of the list of faults), in every engine.

A full queue, deadlines, closing and the end of the interpreter (52) have their rows in test_pool.py and
test_pool_limits.py.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import ROOT, Workspace
from vit_edge.errors import Closed, EngineUnavailable, InputError, UsageError, VerificationFailed
from vit_edge.model_file.artifact import MANIFEST_KEY, open_model, seal
from vit_edge.runtime import Classifier, installed_engines, load
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.ov import is_as_asked

IMAGES = golden_images(range(4), height=32, width=32)
_STRANGE = ("f2", "f4", "f8", ">f4", "i1", "i4", ">u2", "?", "c8", "O", "S1")


@pytest.fixture(params=installed_engines(), scope="module")
def classifier(request: pytest.FixtureRequest, workspace: Workspace) -> Iterator[Classifier]:
    with load(workspace.int8_model, engine=request.param, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("kind", _STRANGE)
def test_fault_44_no_other_type_is_cast(classifier: Classifier, kind: str) -> None:
    with pytest.raises(InputError, match=r"expected uint8 \[batch, 32, 32, 3\]"):
        classifier.logits(IMAGES.astype(kind))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"give uint8 \[height, width, 3\]"):
        classifier(IMAGES[0].astype(kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        (IMAGES.transpose(0, 3, 1, 2), "the channels come last"),
        (IMAGES[0], "expected uint8"),
        (IMAGES[:, :16], r"got uint8 \[4, 16, 32, 3\]"),
        (IMAGES[..., :1], r"got uint8 \[4, 32, 32, 1\]"),
        (IMAGES[None], "expected uint8"),
        (np.uint8(3) * np.ones((), np.uint8), r"got uint8 \[\]"),
    ],
)
def test_fault_45_another_shape_is_told_with_the_one_expected(
    classifier: Classifier, images: np.ndarray[Any, Any], hint: str
) -> None:
    with pytest.raises(InputError, match=hint):
        classifier.logits(np.asarray(images))


def _frozen(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    images = images.copy()
    images.setflags(write=False)
    return images


_LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "every other row": lambda x: x.repeat(2, axis=1)[:, ::2],
    "Fortran": np.asfortranarray,
    "backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "read-only": _frozen,
    "channels first in memory": lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "one image, repeated without a copy": lambda x: np.broadcast_to(x[:1], x.shape),
}


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_fault_46_how_an_array_lies_in_memory_changes_nothing(classifier: Classifier, layout: str) -> None:
    given = _LAYOUTS[layout](IMAGES)
    before = given.copy()
    np.testing.assert_array_equal(classifier.logits(given), classifier.logits(before))
    np.testing.assert_array_equal(given, before)
    assert classifier(given[0]).answers == classifier(before[0]).answers


def test_fault_47_none_and_very_many_are_answered(classifier: Classifier) -> None:
    assert classifier.logits(IMAGES[:0]).shape == (0, 10)
    many = np.concatenate([IMAGES] * 40)
    np.testing.assert_array_equal(classifier.logits(many), np.concatenate([classifier.logits(IMAGES)] * 40))
    assert classifier.classify_batch([]) == []
    assert len(classifier.classify_batch(image for image in many)) == 160


@pytest.mark.parametrize("engine", installed_engines())
def test_fault_48_an_answer_that_is_not_finite_is_an_error_with_its_row(workspace: Workspace, engine: Any) -> None:
    opened = open_model(workspace.float_model)
    model = onnx.load_model_from_string(opened.data)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.full(10, np.inf, np.float32), "head.bias"))
    del model.metadata_props[:]
    model.metadata_props.add(key=MANIFEST_KEY, value=opened.manifest.to_json())
    data = seal(model.SerializeToString())
    with load(data, engine=engine, verify="hash") as broken:  # with its golden vectors it would not be loaded
        for ask in (lambda: broken.logits(IMAGES), lambda: broken(IMAGES[0])):
            with pytest.raises(VerificationFailed, match=r"image 0 of \d is not finite"):
                ask()


@pytest.mark.parametrize(
    "wrong", [None, [1, 2], {"a": 1}, 3, object(), (IMAGES,)], ids=lambda value: type(value).__name__
)
def test_fault_49_what_is_no_image_is_a_type_error_that_names_the_argument(classifier: Classifier, wrong: Any) -> None:
    with pytest.raises(TypeError, match="image is"):
        classifier(wrong)
    with pytest.raises(TypeError, match="images_NHWC is"):
        classifier.logits(wrong)
    with pytest.raises(TypeError, match="source is"):
        load(wrong)


@pytest.mark.parametrize("wrong", ["image.png", b"bytes", Path("image.png"), None, 3])
def test_fault_49_one_image_is_no_batch(classifier: Classifier, wrong: Any) -> None:
    with pytest.raises(TypeError, match="images is"):
        classifier.classify_batch(wrong)


@pytest.mark.parametrize("engine", ["auto", *installed_engines()])
@pytest.mark.parametrize("device", ["cuda", "cudaa", "tensorrt", "xnnpack", "npu", "gpu.7", "CPU", ""])
def test_fault_50_a_device_that_is_not_here_is_named_with_those_that_are(
    workspace: Workspace, engine: Any, device: str
) -> None:
    with pytest.raises(EngineUnavailable, match=f"(?s)the device '{device}' is not .*here there is cpu") as caught:
        load(workspace.int8_model, engine=engine, device=device)
    assert caught.value.exit_code == 7
    with load(workspace.int8_model, engine=engine, device=device, allow_fallback=True) as loaded:
        assert loaded.describe()["device"] == "cpu"
        assert f"'{device}'" in loaded.describe()["fallback"]


def test_fault_50_the_device_that_runs_is_compared_with_the_one_asked_for() -> None:
    pairs = {("gpu", "gpu.0"): True, ("gpu.0", "gpu"): True, ("auto", "cpu"): True, ("gpu.1", "gpu.1"): True,
             ("gpu", "cpu"): False, ("gpu.1", "gpu"): False, ("npu", "gpu"): False}  # fmt: skip
    assert {pair: is_as_asked(*pair) for pair in pairs} == pairs


def test_fault_50_an_engine_that_is_broken_is_told_as_such(workspace: Workspace, tmp_path: Path) -> None:
    """A folder that pip left behind is no engine; one that cannot be imported, because of numpy perhaps, says so."""
    (tmp_path / "empty" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "broken" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "broken" / "onnxruntime" / "__init__.py").write_text("raise ImportError('numpy.core failed')")
    script = """
import importlib.util, sys
real = importlib.util.find_spec
from importlib.machinery import PathFinder
def find_spec(name, package=None):
    return PathFinder.find_spec(name, [sys.argv[1]]) if name == "onnxruntime" else real(name, package)
importlib.util.find_spec = find_spec
sys.path.insert(0, sys.argv[1])
from vit_edge.errors import EngineUnavailable
from vit_edge.runtime import installed_engines, load
print("onnxruntime" in installed_engines())
try:
    load(sys.argv[2], engine="onnxruntime")
except EngineUnavailable as error:
    print(error.exit_code, error)
"""
    found = {}
    for kind in ("empty", "broken"):
        command = [sys.executable, "-c", script, tmp_path / kind, workspace.int8_model]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[kind] = done.stdout
    assert found["empty"].startswith("False\n7 cannot load: the engine onnxruntime is not installed")
    assert (
        "True\n7 cannot load the engine: onnxruntime is installed, but cannot be imported (ImportError: numpy"
        in (found["broken"])
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fault_51_a_child_after_a_fork_is_told_what_to_do(classifier: Classifier) -> None:
    classifier.logits(IMAGES)
    child = os.fork()
    if child == 0:
        try:
            classifier(IMAGES[0])
        except Closed as error:
            os._exit(0 if "load the model in the child process, or start it with spawn" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert classifier.logits(IMAGES).shape == (4, 10)


@pytest.mark.parametrize("engine", installed_engines())
def test_fault_52_closing_while_others_ask_is_an_error_for_them_and_no_crash(workspace: Workspace, engine: Any) -> None:
    loaded = load(workspace.int8_model, engine=engine, threads=1)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                loaded.logits(IMAGES)
        except BaseException as error:
            ended.append(error)

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    loaded.logits(IMAGES)
    loaded.close()
    loaded.close()
    for caller in callers:
        caller.join(30)
    assert [type(error) for error in ended] == [Closed] * 4
    with pytest.raises(UsageError, match="closed"):
        loaded(IMAGES[0])


@pytest.mark.parametrize("verify", ["full", "hash"])
def test_fault_53_another_release_of_the_engine_is_warned_of_and_checked(
    workspace: Workspace, caplog: pytest.LogCaptureFixture, verify: Any
) -> None:
    model = open_model(workspace.int8_model)
    golden = json.loads(json.dumps(model.manifest.golden))
    for entry in golden["expected"]:
        entry["made_on"]["engine_version"] = "1.0.0"
    data = model.with_manifest(replace(model.manifest, golden=golden))
    for engine in installed_engines():
        caplog.clear()
        with caplog.at_level(logging.WARNING), load(data, engine=engine, verify=verify) as loaded:  # type: ignore[arg-type]
            assert loaded.describe()["verified"] == "full"
        assert f"was checked in {engine} 1.0.0" in caplog.text
