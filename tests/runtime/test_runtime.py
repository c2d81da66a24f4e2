"""The runtime answers the same from many threads, takes nothing it should refuse, and says what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import ROOT, Workspace
from vit_edge.data import find_images
from vit_edge.errors import (
    EngineUnavailable,
    GoldenMismatch,
    ImageRejected,
    InputError,
    ModelRejected,
    UsageError,
    VitEdgeError,
)
from vit_edge.machine.cpu import instruction_set, usable_threads
from vit_edge.model_file.artifact import MANIFEST_KEY, open_model, seal
from vit_edge.runtime import installed_engines, load
from vit_edge.runtime.checks.golden import golden_images

ENGINES = ("onnxruntime", "openvino")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_image_is_named_and_described(workspace: Workspace, engine: str) -> None:
    path = workspace.test_images / "3"
    with load(workspace.int8_model, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
        answers = [classifier(image) for image in sorted(path.iterdir())[:10]]
        assert sum(answer.label == "3" for answer in answers) >= 9
        first = answers[0]
        assert sum(answer.probability for answer in classifier(sorted(path.iterdir())[0], top=10).answers) == (
            pytest.approx(1, abs=1e-5)
        )
        assert len(first.answers) == 5
        assert first.to_dict()["answers"][0]["label"] == first.label
        described = classifier.describe()
    assert (described["engine"], described["precision"], described["threads"]) == (engine, "int8", 1)
    assert described["float_precision"] == "float32"
    assert described["instruction_set"] == instruction_set()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [2, 5, 10])
def test_an_answer_does_not_depend_on_its_batch(workspace: Workspace, engine: str, size: int) -> None:
    images = golden_images(range(10), height=32, width=32)
    with load(workspace.int8_model, engine=engine) as classifier:  # type: ignore[arg-type]
        found = np.concatenate([classifier.logits(batch) for batch in images.reshape(-1, size, 32, 32, 3)])
        alone = np.concatenate([classifier.logits(image[None]) for image in images])
    np.testing.assert_allclose(found, alone, atol=0.05)
    assert (found.argmax(axis=1) == alone.argmax(axis=1)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_sixteen_threads_get_their_own_answers_and_inputs_stay(workspace: Workspace, engine: str) -> None:
    images = golden_images(range(64), height=32, width=32)
    before = images.copy()
    with load(workspace.float_model, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
        expected = [classifier.logits(image[None]) for image in images]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda i: classifier.logits(images[i % 64][None]), range(640)))
    for i, logits in enumerate(found):
        np.testing.assert_array_equal(logits, expected[i % 64])
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (None, TypeError),
        ([[1]], TypeError),
        (np.zeros((1, 32, 32, 3), np.float32), InputError),
        (np.zeros((1, 3, 32, 32), np.uint8), InputError),
        (np.zeros((32, 32, 3), np.uint8), InputError),
        (np.zeros((1, 16, 16, 3), np.uint8), InputError),
        (np.zeros((1, 32, 32, 3), ">u2"), InputError),
    ],
)
def test_wrong_inputs_are_refused_before_the_engine(workspace: Workspace, images: object, error: type) -> None:
    with load(workspace.float_model) as classifier, pytest.raises(error):
        classifier.logits(images)  # type: ignore[arg-type]


def test_memory_layouts_and_empty_batches_are_fine(workspace: Workspace) -> None:
    images = golden_images(range(4), height=32, width=32)
    with load(workspace.float_model) as classifier:
        expected = classifier.logits(images)
        frozen = images.copy()
        frozen.setflags(write=False)
        for same in (np.asfortranarray(images), images[::-1][::-1], frozen):
            np.testing.assert_array_equal(classifier.logits(same), expected)
        assert classifier.logits(images[:0]).shape == (0, 10)
        assert classifier.classify_batch([]) == []


def test_a_closed_model_says_so_and_closes_twice(workspace: Workspace) -> None:
    classifier = load(workspace.float_model)
    classifier.close()
    classifier.close()
    with pytest.raises(UsageError, match="closed"):
        classifier.logits(golden_images([1], height=32, width=32))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_noticed(workspace: Workspace) -> None:
    classifier = load(workspace.float_model)
    child = os.fork()
    if child == 0:
        try:
            classifier.logits(golden_images([1], height=32, width=32))
        except UsageError as error:
            os._exit(0 if "fork" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    classifier.close()


def test_unknown_engines_and_devices_are_named_with_what_there_is(workspace: Workspace) -> None:
    with pytest.raises(EngineUnavailable, match=r"(?s)'tensorflow'.*onnxruntime, openvino"):
        load(workspace.float_model, engine="tensorflow")  # type: ignore[arg-type]
    for device in ("cuda", "cudaa"):
        with pytest.raises(EngineUnavailable, match=f"(?s)'{device}'.*cpu"):
            load(workspace.float_model, device=device)
    assert set(installed_engines()) >= set(ENGINES)


def test_bytes_load_as_the_path_does(workspace: Workspace) -> None:
    image = golden_images([1], height=32, width=32)
    with load(workspace.float_model) as one, load(workspace.float_model.read_bytes()) as two:
        np.testing.assert_array_equal(one.logits(image), two.logits(image))


def test_odd_paths_work(workspace: Workspace, tmp_path: Path) -> None:
    for name in (
        "a b.onnx",
        "quo'te\".onnx",
        "new\nline.onnx",
        "\N{SLICE OF PIZZA}.onnx",
        os.fsdecode(b"caf\xe9.onnx"),
    ):
        (tmp_path / name).write_bytes(workspace.int8_model.read_bytes())
        with load(tmp_path / name) as classifier:
            assert classifier(workspace.folder / "image.png").label == "3"


def test_the_null_engine_computes_nothing(workspace: Workspace) -> None:
    with load(workspace.float_model, engine="null") as classifier:
        assert not classifier.logits(golden_images([1, 2], height=32, width=32)).any()


def _rebuilt(workspace: Workspace) -> onnx.ModelProto:
    model = onnx.load(workspace.float_model)
    manifest = next(entry.value for entry in model.metadata_props if entry.key == MANIFEST_KEY)
    del model.metadata_props[:]
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest)
    return model


def _add(model: onnx.ModelProto, *arguments: object, **attributes: object) -> None:
    model.graph.node.append(onnx.helper.make_node(*arguments, name="planted", **attributes))  # type: ignore[arg-type]


def test_hostile_graphs_are_refused_by_name_before_an_engine(workspace: Workspace) -> None:
    body = onnx.helper.make_graph([], "g", [], [])

    def external(m: onnx.ModelProto) -> None:
        tensor = m.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")

    def many(m: onnx.ModelProto) -> None:
        for _ in range(5001):
            _add(m, "Relu", ["logits"], ["unused"])

    def rename(m: onnx.ModelProto) -> None:
        m.graph.input[0].name = m.graph.node[0].input[0] = "other"

    plants = {
        "If": lambda m: _add(m, "If", ["logits"], ["x"], then_branch=body, else_branch=body),
        "custom": lambda m: _add(m, "Relu", ["logits"], ["x"], domain="com.example"),
        "another file": external,
        "nodes": many,
        "functions": lambda m: m.functions.add(name="f", domain="d"),
        "opset": lambda m: m.opset_import[0].__setattr__("version", 999),
        "IR version": lambda m: m.__setattr__("ir_version", 99),
        "shape": lambda m: m.graph.initializer[0].dims.append(2**40),
        "inputs": lambda m: m.graph.input.append(m.graph.input[0]),
        "the input": rename,
        "reads what no node": lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"),
        "the batch is fixed": lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 1),
    }
    expected = {"custom": "com.example"}
    for what, plant in plants.items():
        model = _rebuilt(workspace)
        plant(model)
        with pytest.raises(ModelRejected, match=expected.get(what, what)):
            load(seal(model.SerializeToString()))


def test_labels_that_do_not_fit_the_graph_are_refused(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    data = model.with_manifest(replace(model.manifest, labels=("one", "two")))
    with pytest.raises(ModelRejected, match="2 labels"):
        load(data)


def test_a_graph_that_no_engine_takes_is_an_error_of_ours(workspace: Workspace) -> None:
    model = _rebuilt(workspace)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    weight.dims[:] = [10, 192]  # a product of [batch, 192] by [10, 192]
    for engine in ENGINES:
        with pytest.raises(ModelRejected, match="cannot load"):
            load(seal(model.SerializeToString()), engine=engine)  # type: ignore[arg-type]


def test_a_file_without_or_with_broken_golden_vectors_is_not_loaded_as_checked(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    golden = model.manifest.golden
    assert golden is not None
    for unusable in (None, {**golden, "generator": "dice"}):
        data = model.with_manifest(replace(model.manifest, golden=unusable))
        with pytest.raises(VitEdgeError):
            load(data, engine="onnxruntime")
        load(data, engine="onnxruntime", verify="hash").close()
    for malformed in ({}, {**golden, "expected": [{"engines": ["onnxruntime"]}]}):
        data = model.with_manifest(replace(model.manifest, golden=malformed))
        with pytest.raises(ModelRejected, match="golden"):
            load(data, engine="onnxruntime", verify="hash")
    only_openvino = {**golden, "expected": [{**golden["expected"][0], "engines": ["openvino"]}]}
    with pytest.raises(GoldenMismatch, match="has golden logits for openvino only"):
        load(model.with_manifest(replace(model.manifest, golden=only_openvino)), engine="onnxruntime")


def test_other_preprocessing_fails_the_images_in_the_file(workspace: Workspace) -> None:
    model = open_model(workspace.float_model)
    other = replace(model.manifest.preprocessing, interpolation="nearest")
    with pytest.raises(GoldenMismatch, match="prepared differently"):
        load(model.with_manifest(replace(model.manifest, preprocessing=other)))


def test_golden_images_are_those_of_the_document() -> None:
    """SplitMix64 seeded with 0 gives 0xe220a8397b1dcdaf first; the image follows docs/model-file.md."""
    from vit_edge.runtime.checks.golden import _bytes

    assert _bytes(0, 3).tolist() == [0xE2, 0x6E, 0x06]

    def splitmix(seed: int, count: int) -> list[int]:
        state, found = seed, []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            found.append((z ^ (z >> 31)) >> 56)
        return found

    seed, height, width = 11, 9, 7
    n = 2 + seed % 7
    colour, noise = splitmix((2 * seed) << 32, n * n * 3), splitmix((2 * seed + 1) << 32, height * width * 3)
    expected = [
        (3 * colour[((y * n // height) * n + x * n // width) * 3 + c] + noise[(y * width + x) * 3 + c]) // 4
        for y in range(height)
        for x in range(width)
        for c in range(3)
    ]
    assert golden_images([seed], height=height, width=width).reshape(-1).tolist() == expected


def test_rejected_images_name_the_file(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "notanimage.txt").write_text("hello")
    with load(workspace.int8_model) as classifier, pytest.raises(ImageRejected, match=r"notanimage\.txt"):
        classifier(tmp_path / "notanimage.txt")


def test_threads_are_at_least_one_and_at_most_those_allowed() -> None:
    assert 1 <= usable_threads() <= (os.cpu_count() or 1)


def test_the_readme_example_runs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import ROOT

    block = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(workspace.folder)
    printed: list[object] = []
    exec(compile(block, "README.md", "exec"), {"print": lambda *values: printed.extend(values)})
    assert printed[0] == "3"
    assert 0 < float(str(printed[1])) <= 1


_CLOSE_TWO = """
import os, signal, sys
from vit_edge.runtime import load
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
both = [load(sys.argv[1], engine=sys.argv[2], threads=1) for _ in range(2)]
for classifier in both:
    classifier.close()
del both, classifier
os.kill(os.getpid(), signal.SIGTERM)
assert received == [signal.SIGTERM]
"""


@pytest.mark.parametrize("engine", installed_engines())
def test_a_signal_after_two_models_were_closed_does_not_end_the_process(workspace: Workspace, engine: str) -> None:
    command = [sys.executable, "-c", _CLOSE_TWO, workspace.float_model, engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_real_images_are_answered_alike_by_both_engines(workspace: Workspace) -> None:
    paths = find_images(workspace.test_images)[::6]
    with (
        load(workspace.int8_model, engine="onnxruntime") as one,
        load(workspace.int8_model, engine="openvino") as two,
    ):
        same = [one(path).label == two(path).label for path in paths]
    assert np.mean(same) >= 0.98
