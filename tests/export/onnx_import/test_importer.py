"""ONNX classifiers made elsewhere become model files of ours, proven against themselves, or are refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import vit_edge
from vit_edge.errors import InputError, ModelRejected, UsageError
from vit_edge.export.onnx_import.batch import choose_output, settle_batch
from vit_edge.export.onnx_import.cleanup import tidy
from vit_edge.export.onnx_import.importer import import_onnx, is_third_party_onnx
from vit_edge.export.onnx_import.reference import ThirdPartyReference
from vit_edge.files import sha256_hex
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime.loading import load
from vit_edge.runtime.onnx_import.interface import read_input

PREPROCESSING = Preprocessing(resize=(12, 10), crop=(12, 10), interpolation="bilinear")
LABELS = ("a", "b", "c", "d", "e")
node = helper.make_node


def network(
    *nodes: onnx.NodeProto,
    shape: Sequence[int | str] = ("n", 3, 12, 10),
    dtype: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    **weights: np.ndarray,
) -> onnx.ModelProto:
    """Return a graph of nodes behind the input `x`."""
    value = helper.make_tensor_value_info
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    ends = [value(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "g", [value("x", dtype, shape)], ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


RANDOM = np.random.default_rng(0)
WEIGHTS: dict[str, np.ndarray] = {
    "filters": RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "w": RANDOM.normal(size=(5, 4)).astype(np.float32),
    "b": RANDOM.normal(size=5).astype(np.float32),
}
CONV = [node("Conv", ["x", "filters"], ["c"]), node("Relu", ["c"], ["r"]), node("GlobalAveragePool", ["r"], ["p"])]
HEAD = [node("Flatten", ["p"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"], transB=1)]


def save(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def settled(model: onnx.ModelProto, *, output: str | None = None) -> tuple[onnx.ModelProto, int | None, list[str]]:
    """Return the graph with its batch settled, that batch, and what was noted."""
    tidied = tidy(onnx.ModelProto.FromString(model.SerializeToString()))
    reference = ThirdPartyReference(model, read_input(tidied.graph, PREPROCESSING), PREPROCESSING)
    notes: list[str] = []
    found, _ = choose_output(tidied, reference, output, len(LABELS), notes)
    graph, batch = settle_batch(tidied, found, reference)
    return graph, batch, notes


def inputs_as_initializers(model: onnx.ModelProto) -> None:
    """As files of IR 3 have it."""
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model.ir_version = 3


def test_an_imported_network_answers_as_it_did_in_both_engines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network(*CONV, *HEAD[:-1], node("Gemm", ["f", "w", "b"], ["z"], transB=1), node("Softmax", ["z"], ["y"]),
                    opset=11, **WEIGHTS)  # fmt: skip
    inputs_as_initializers(model)
    model.graph.node[0].doc_string = "/home/someone/secret.py"
    path = save(tmp_path / "theirs.onnx", model)
    with caplog.at_level(logging.WARNING):
        imported = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS, assumed=("preprocessing.mean",))
    assert "preprocessing.mean" in caplog.text
    assert "Softmax, is left out" in caplog.text
    again = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS, assumed=("preprocessing.mean",))
    assert imported.model.data == again.model.data
    assert b"secret" not in imported.model.data
    manifest = imported.model.manifest
    assert manifest.input == {"name": "x", "dtype": "float32", "layout": "NCHW"}
    assert (manifest.name, manifest.labels, manifest.assumed) == ("theirs", LABELS, ("preprocessing.mean",))
    assert all(entry.name for entry in imported.model.proto.graph.node)
    assert len(imported.model.proto.graph.input) == 1
    assert {result.engine for result in imported.parity} == {"onnxruntime", "openvino"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = RANDOM.integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    expected = session.run(["y"], {"x": PREPROCESSING.normalise(pixels)})[0]
    for engine in ("onnxruntime", "openvino"):
        with load(imported.model.data, engine=engine) as classifier:  # type: ignore[arg-type]
            for row, image in zip(expected, pixels, strict=True):
                found = {one.label: one.probability for one in classifier(image, top=5).answers}
                assert np.allclose([found[label] for label in LABELS], row, atol=1e-5)


def classifiers() -> dict[str, Callable[[], onnx.ModelProto]]:
    flat = node("Reshape", ["p", "s"], ["f"])
    constant = node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHTS["w"]))
    sized = [node("Shape", ["p"], ["h"]), node("Gather", ["h", "zero"], ["g"], axis=0),
             node("Unsqueeze", ["g", "zeros"], ["u"]), node("Concat", ["u", "minus"], ["s"], axis=0)]  # fmt: skip
    plain = {name: WEIGHTS[name] for name in ("filters", "b")}
    indices = {"zero": np.array(0), "zeros": np.array([0]), "minus": np.array([-1])}
    patches = {"k": RANDOM.normal(size=(4, 3, 6, 5)).astype(np.float32), "token": np.ones((1, 1, 4), np.float32)}
    tokens = [node("Conv", ["x", "k"], ["c"], strides=[6, 5]), node("Reshape", ["c", "s"], ["t"]),
              node("Transpose", ["t"], ["q"], perm=[0, 2, 1]), node("Concat", ["token", "q"], ["a"], axis=1),
              node("ReduceMean", ["a"], ["f"], axes=[1], keepdims=0), HEAD[1]]  # fmt: skip
    return {
        "plain": lambda: network(*CONV, *HEAD, **WEIGHTS),
        "weights as a Constant": lambda: network(constant, *CONV, *HEAD, **plain),
        "shape arithmetic": lambda: network(*CONV, *sized, flat, HEAD[1], **WEIGHTS, **indices),
        "batch 1 in the signature": lambda: network(*CONV, *HEAD, shape=[1, 3, 12, 10], **WEIGHTS),
        "batch 1 in a Reshape": lambda: network(*CONV, flat, HEAD[1], shape=[1, 3, 12, 10], s=np.array([1, -1]),
                                                **WEIGHTS),
        "batch 1 in a class token": lambda: network(*tokens, shape=[1, 3, 12, 10], s=np.array([1, 4, 4]), **patches,
                                                    w=WEIGHTS["w"], b=WEIGHTS["b"]),
        "opset 11": lambda: network(*CONV, *HEAD, opset=11, **WEIGHTS),
        "opset 20": lambda: network(*CONV, *HEAD, opset=20, **WEIGHTS),
        "classes with axes behind them": lambda: network(*CONV, node("Conv", ["p", "v"], ["y"]),
                                                         filters=WEIGHTS["filters"], v=WEIGHTS["w"][:, :, None, None]),
        "Identity and Dropout": lambda: network(node("Identity", ["w"], ["v"]), *CONV, node("Dropout", ["p"], ["d"]),
                                                node("Flatten", ["d"], ["f"]),
                                                node("Gemm", ["f", "v", "b"], ["y"], transB=1), **WEIGHTS),
    }  # fmt: skip


@pytest.mark.parametrize("kind", classifiers())
def test_the_batch_is_free_and_shapes_are_constants(kind: str) -> None:
    model = classifiers()[kind]()
    graph, batch, notes = settled(model)
    assert batch is None
    assert notes == []
    operators = {entry.op_type for entry in graph.graph.node}
    assert not operators & {"Constant", "Identity", "Dropout", "Gather", "Unsqueeze"}
    assert len({entry.name for entry in graph.graph.node}) == len(graph.graph.node)
    assert graph.opset_import[0].version >= 13


def test_a_graph_that_only_runs_at_its_batch_keeps_it() -> None:
    tokens_first = [node("Conv", ["x", "k"], ["c"], strides=[6, 5]), node("Reshape", ["c", "s"], ["t"]),
                    node("Transpose", ["t"], ["q"], perm=[2, 0, 1]), node("Reshape", ["q", "rows"], ["a"]),
                    node("MatMul", ["a", "square"], ["m"]), node("Reshape", ["m", "back"], ["n"]),
                    node("ReduceMean", ["n"], ["f"], axes=[0], keepdims=0), HEAD[1]]  # fmt: skip
    for fixed in (1, 2):
        model = network(
            *tokens_first, shape=[fixed, 3, 12, 10], s=np.array([fixed, 4, 4]), rows=np.array([4 * fixed, 4]),
            back=np.array([4, fixed, 4]), square=RANDOM.normal(size=(4, 4)).astype(np.float32),
            k=RANDOM.normal(size=(4, 3, 6, 5)).astype(np.float32), w=WEIGHTS["w"], b=WEIGHTS["b"],
        )  # fmt: skip
        assert settled(model)[1] == fixed


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "NHWC"), ("uint8", "NCHW")])
def test_other_inputs_become_one_of_the_two_of_model_files(dtype: str, layout: str, tmp_path: Path) -> None:
    shape: list[int | str] = ["n", 12, 10, 3] if layout == "NHWC" else ["n", 3, 12, 10]
    before = [] if dtype == "float32" else [node("Cast", ["x"], ["i"], to=TensorProto.FLOAT)]
    last = before[-1].output[0] if before else "x"
    if layout == "NHWC":
        before.append(node("Transpose", [last], ["turned"], perm=[0, 3, 1, 2]))
        last = "turned"
    conv = node("Conv", [last, "filters"], ["c"])
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.UINT8
    path = save(tmp_path / "a.onnx", network(*before, conv, *CONV[1:], *HEAD, shape=shape, dtype=kind, **WEIGHTS))
    imported = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS)
    assert imported.model.manifest.input["layout"] == ("NHWC" if dtype == "uint8" else "NCHW")
    pixels = RANDOM.integers(0, 256, (2, 12, 10, 3), dtype=np.uint8)
    given = pixels if dtype == "uint8" else PREPROCESSING.normalise(pixels).transpose(0, 2, 3, 1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = given.transpose(0, 3, 1, 2) if (dtype, layout) == ("uint8", "NCHW") else given
    expected = session.run(["y"], {"x": np.ascontiguousarray(feed)})[0]
    from vit_edge.runtime.engines.protocol import EngineOptions, make_engine

    engine = make_engine("onnxruntime", imported.model, EngineOptions())
    assert np.allclose(engine.run(pixels), expected, rtol=1e-4, atol=1e-4)


def test_of_several_outputs_one_is_told_or_the_first_that_fits() -> None:
    other = node("Gemm", ["f", "w", "b"], ["z"], transB=1, alpha=2.0)
    model = network(*CONV, HEAD[0], other, HEAD[1], outputs=["r", "y", "z"], **WEIGHTS)
    graph, _, notes = settled(model)
    assert [value.name for value in graph.graph.output] == ["y"]
    assert notes == ["of the outputs r, y, z, y is used as the logits"]
    assert [value.name for value in settled(model, output="z")[0].graph.output] == ["z"]
    with pytest.raises(UsageError, match="no output 'q'; its outputs are r, y, z"):
        settled(model, output="q")
    with pytest.raises(ModelRejected, match="no output is float32"):
        settled(model, output="r")


def renamed(operator: str, **attributes: Any) -> onnx.ModelProto:
    return network(*CONV, HEAD[0], node(operator, ["f"], ["o"], **attributes), node("Gemm", ["o", "w", "b"], ["y"],
                   transB=1, name="head"), **WEIGHTS)  # fmt: skip


def _branch() -> onnx.GraphProto:
    return helper.make_graph([node("Relu", ["f"], ["v"])], "b", [], [helper.make_tensor_value_info("v", 1, None)])


def _outside() -> onnx.ModelProto:
    model = network(*CONV, *HEAD, **WEIGHTS)
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model


def _short() -> onnx.ModelProto:
    model = network(*CONV, *HEAD, **WEIGHTS)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return model


def _typed(dtype: type) -> onnx.ModelProto:
    cast = [node("Cast", ["v"], ["w"], to=TensorProto.FLOAT), *CONV, *HEAD]
    return network(*cast, v=WEIGHTS["w"].astype(dtype), filters=WEIGHTS["filters"], b=WEIGHTS["b"])


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "another domain": (lambda: renamed("Gelu", domain="com.microsoft", name="odd"), "'odd' is com.microsoft.Gelu"),
    "control flow": (
        lambda: network(*CONV, HEAD[0], node("If", ["t"], ["o"], name="branch", then_branch=_branch(),
                        else_branch=_branch()), node("Gemm", ["o", "w", "b"], ["y"], transB=1), t=np.array(True),
                        **WEIGHTS),
        "'branch' is If and holds a subgraph",
    ),
    "an operator that no classifier has": (lambda: renamed("Sinh", name="odd"), "'odd' is ai.onnx.Sinh, which is not"),
    "chance": (lambda: renamed("RandomNormalLike", name="dice"), "'dice' is RandomNormalLike"),
    "weights elsewhere": (_outside, "not in a file next to the model"),
    "float16": (lambda: _typed(np.float16), "is float16; import starts from float32"),
    "not finite": (lambda: network(*CONV, *HEAD, **{**WEIGHTS, "b": np.full(5, np.nan, np.float32)}), "is not finite"),
    "a memory bomb": (
        lambda: network(node("ConstantOfShape", ["huge"], ["h"]), node("ReduceMax", ["h"], ["m"], keepdims=0),
                        node("Add", ["x", "m"], ["z"]), node("Conv", ["z", "filters"], ["c"]), *CONV[1:], *HEAD,
                        huge=np.array([200_000, 200_000]), **WEIGHTS),
        "cannot run",
    ),
    "quantized": (
        lambda: network(node("DequantizeLinear", ["q", "s"], ["w"]), *CONV, *HEAD, filters=WEIGHTS["filters"],
                        b=WEIGHTS["b"], q=np.ones((5, 4), np.int8), s=np.float32(0.1)),
        "quantized already",
    ),
    "damaged weights": (_short, "a part of the file cannot be read"),
    "one channel": (lambda: network(*CONV, *HEAD, shape=["n", 1, 12, 10], **WEIGHTS), "has grayscale images"),
    "four channels": (lambda: network(*CONV, *HEAD, shape=["n", 4, 12, 10], **WEIGHTS), "4 channels"),
    "float64": (lambda: network(*CONV, *HEAD, dtype=TensorProto.DOUBLE, **WEIGHTS), "is float64 with 4 axes"),
    "no images": (lambda: network(*HEAD[1:], node("Relu", ["x"], ["f"]), shape=["n", 4], **WEIGHTS), "2 axes"),
    "it does not run": (lambda: network(*CONV, *HEAD, **{**WEIGHTS, "w": WEIGHTS["w"][:, :3]}), "cannot run"),
}  # fmt: skip


def test_weights_beside_the_file_are_taken_in_where_they_are_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    inside = import_onnx(save(path, network(*CONV, *HEAD, **WEIGHTS)), preprocessing=PREPROCESSING, labels=LABELS)
    onnx.save(network(*CONV, *HEAD, **WEIGHTS), path, save_as_external_data=True, location="w.data", size_threshold=0)
    beside = import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS).model
    weights = tmp_path / "w.data"
    assert beside.manifest.provenance["source_weights_sha256"] == {"w.data": sha256_hex(weights.read_bytes())}
    assert beside.manifest.golden == inside.model.manifest.golden
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelRejected, match=r"w.data does not hold the tensor"):
        import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS)
    weights.unlink()
    with pytest.raises(ModelRejected, match="no such file"):
        import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_float32_classifier_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    path = save(tmp_path / "theirs.onnx", make())
    with pytest.raises(ModelRejected, match=reason) as caught:
        import_onnx(path, preprocessing=PREPROCESSING, labels=LABELS)
    assert caught.value.file == str(path)


def test_files_that_are_no_onnx_are_named(tmp_path: Path) -> None:
    for data, reason in ((b"", "empty"), (b"<html>", "HTML"), (b"\x93\x01 something", "not an ONNX model")):
        (tmp_path / "a.onnx").write_bytes(data)
        assert not is_third_party_onnx(tmp_path / "a.onnx")
        with pytest.raises(InputError, match=reason):
            import_onnx(tmp_path / "a.onnx", preprocessing=PREPROCESSING, labels=LABELS)
    assert not is_third_party_onnx(tmp_path)
    assert is_third_party_onnx(save(tmp_path / "b.onnx", network(*CONV, *HEAD, **WEIGHTS)))


def test_what_is_told_has_to_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", network(*CONV, *HEAD, **WEIGHTS))
    with pytest.raises(UsageError, match="3 labels for 5 classes"):
        import_onnx(path, preprocessing=PREPROCESSING, labels=("a", "b", "c"))
    with pytest.raises(UsageError, match="the model takes 12 x 10 pixels; the preprocessing gives 8 x 8"):
        import_onnx(path, preprocessing=Preprocessing(resize=8, crop=(8, 8)), labels=LABELS)
    free = save(tmp_path / "b.onnx", network(*CONV, *HEAD, shape=["n", "c", "h", "w"], **WEIGHTS))
    assert import_onnx(free, preprocessing=PREPROCESSING, labels=LABELS).model.manifest.input["layout"] == "NCHW"
    flat = [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "v"], ["y"], transB=1)]
    save(free, network(*flat, shape=["n", "c", "h", "w"], v=np.ones((5, 360), np.float32)))
    with pytest.raises(UsageError, match=r"(?s)does not show whether the 3 channels come first or last.*--layout NCHW"):
        import_onnx(free, preprocessing=PREPROCESSING, labels=LABELS)


def test_the_command_exports_an_onnx_file(tmp_path: Path) -> None:
    save(tmp_path / "theirs.onnx", network(*CONV, *HEAD, **WEIGHTS))
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "how.json").write_text(json.dumps(PREPROCESSING.to_dict()))
    told = ["--labels", "labels.txt", "--preprocessing", "how.json"]
    for options, error in (
        (["--labels", "labels.txt"], "the preprocessing must be specified"),
        ([*told, "--batch-size", "4"], "--batch-size is for a network that is traced"),
    ):
        done = vit_edge("export", "theirs.onnx", *options, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert error in done.stderr
    done = vit_edge("export", "theirs.onnx", *told, "-o", "m.onnx", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sha256"] == open_model(tmp_path / "m.onnx").sha256
