"""`vit-edge quantize` on what people give it: files of every kind, networks made elsewhere, odd images, options."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from tests.support.kernels import run_as_defined, sums_exactly
from tests.support.networks import FAMILIES, PREPROCESSING, SIZE, random_network, small_config, write_checkpoint
from vit_edge.cli import main
from vit_edge.export import ExportOptions, QuantizationOptions, export_onnx, quantize, verify
from vit_edge.export.quantization.manifest_record import with_evaluation
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.machine.targets import TARGETS
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import open_model, pack
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

_LABELS = tuple("abcdefg")
_OTHERS = golden_images(range(3000, 3016), height=SIZE[0], width=SIZE[1])
_QUICK: dict[str, Any] = {"effort": "fast", "measure_speed": False, "use_cache": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A float file `m.onnx`, 32 calibration images, 100 others, and what an ONNX file made elsewhere needs."""
    folder = tmp_path_factory.mktemp("quantize")
    shutil.copy(small_model / "m.onnx", folder)
    for name, seeds in (("cal", range(32)), ("judge", range(1000, 1100))):
        (folder / name).mkdir()
        for number, pixels in enumerate(golden_images(seeds, height=SIZE[0], width=SIZE[1])):
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    (folder / "labels.txt").write_text("\n".join(_LABELS))
    (folder / "how.json").write_text(json.dumps(PREPROCESSING.to_dict()))
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def _run(*arguments: str) -> int:
    return main(["quantize", *arguments, "--effort", "fast", "--no-speed", "--no-cache"])


def _near(path: Path, reference: str = "m.onnx") -> float:
    with load(reference) as whole, load(path) as integers:
        return sqnr_db(whole.logits(_OTHERS), integers.logits(_OTHERS))


class _Hybrid(nn.Module):
    """Convolutions whose output a matrix product reads, only moved about in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8, 96), nn.Linear(96, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.head(nn.functional.gelu(self.inner(tokens)).mean(1))  # type: ignore[no-any-return]


def _trace(network: nn.Module, path: Path, *, batch: int = 1, opset: int = 17) -> None:
    """Write what `torch.onnx.export` makes of a network, as people call it; the batch is free at 1."""
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "opset_version": opset, "dynamo": False}
    if batch == 1:
        names["dynamic_axes"] = {"x": {0: "n"}, "y": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.eval(), (torch.randn(batch, 3, *SIZE),), path, **names)


def _told(path: Path, *more: str) -> list[str]:
    return [str(path), "--labels", "labels.txt", "--preprocessing", "how.json", "--calibration", "cal", *more]


@pytest.mark.usefixtures("openvino_in_int8")
def test_a_network_made_elsewhere_becomes_the_file_that_export_makes_of_it_in_integers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trace(random_network(small_config()), tmp_path / "theirs.onnx")
    out, reference = tmp_path / "q.onnx", tmp_path / "ref.onnx"
    assert _run(*_told(tmp_path / "theirs.onnx", "-o", str(out), "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert all(entry["percent"] == 100 for entry in printed["coverage"])
    assert {"repq", "cross-layer-equalization"} <= set(printed["algorithms"])
    told = ["--labels", "labels.txt", "--preprocessing", "how.json", "-o", str(reference)]
    assert main(["export", str(tmp_path / "theirs.onnx"), *told]) == 0
    assert open_model(out).manifest.provenance["float_model_sha256"] == open_model(reference).sha256
    capsys.readouterr()
    judged = ["--data", "judge", "--unlabelled", "--min-agreement", "80"]
    assert main(["verify", str(out), "--reference", str(reference), *judged]) == 0
    assert "was not made from" not in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0


def test_a_product_that_reads_a_moved_convolution_is_fitted_over_the_convolutions_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _trace(_Hybrid(), tmp_path / "theirs.onnx")
    assert _run(*_told(tmp_path / "theirs.onnx", "-o", str(tmp_path / "q.onnx"), "--data", "judge")) == 0
    manifest = open_model(tmp_path / "q.onnx").manifest
    assert manifest.quantization is not None
    assert "gptq-rounding" in manifest.quantization["algorithms"]
    assert manifest.evaluation is not None
    assert all(entry["sqnr_db"] > 25 for entry in manifest.evaluation["results"])


def _quantized_already(path: Path) -> None:
    names = ["q", "s"]
    nodes = [helper.make_node("DequantizeLinear", names, ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = [numpy_helper.from_array(np.ones((3, 3), np.int8), "q"), numpy_helper.from_array(np.float32(1), "s")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


_STRANGE: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "a folder": (Path.mkdir, 3, "the path is a folder"),
    "text": (lambda path: path.write_text("hello"), 3, "the file is not an ONNX model"),
    "nothing": (lambda path: None, 3, "there is no such file"),
    "quantized already": (_quantized_already, 3, "the model is quantized already"),
    "one of ours": (lambda path: path.write_bytes(Path("m.onnx").read_bytes()), 2, "this file has a manifest"),
}


@pytest.mark.parametrize("kind", _STRANGE)
def test_what_is_no_network_made_elsewhere_is_named_for_what_it_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code, reason = _STRANGE[kind]
    make(tmp_path / "theirs.onnx")
    assert _run(*_told(tmp_path / "theirs.onnx", "-o", str(tmp_path / "q.onnx"))) == code
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "q.onnx").exists()


def test_what_an_onnx_file_does_not_say_has_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trace(_Hybrid(), tmp_path / "theirs.onnx")
    (tmp_path / "six.txt").write_text("\n".join("abcdef"))
    path, out = str(tmp_path / "theirs.onnx"), ["--calibration", "cal", "-o", str(tmp_path / "q.onnx")]
    for told, reason in (
        (["--preprocessing", "how.json"], "give --labels"),
        (["--labels", "labels.txt"], "give --preprocessing"),
        (["--labels", str(tmp_path / "six.txt"), "--preprocessing", "how.json"], "6 labels for 7 classes"),
    ):
        assert _run(path, *told, *out) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "q.onnx").exists()


_REFUSED = {
    "an unknown target": (["--target", "nonsense"], 2, "no target is named 'nonsense'"),
    "no report": (["--target", "nope.json"], 3, "there is no such file"),
    "an unknown recipe": (["--recipe", "nonsense"], 2, "recipes: fast, accurate"),
    "an unknown effort": (["--effort", "nonsense"], 2, "choose fast, balanced, thorough"),
    "an unknown algorithm": (["--algorithm", "nonsense"], 2, "algorithms: repq"),
    "unknown ranges": (["--ranges", "nonsense"], 2, "choose min-max, moving-average"),
    "a budget without images": (["--max-drop", "1"], 2, "give --data"),
    "a drop that is no number": (["--max-drop", "nan", "--data", "judge"], 2, "max drop is nan"),
    "a time limit without a search": (["--time-limit", "1"], 2, "add --max-drop, --min-agreement or --min-neighbours"),
    "an agreement over all": (["--min-agreement", "101", "--data", "judge"], 2, "min agreement is 101"),
    "images that calibrate to judge": (["--data", "cal"], 3, "used for calibration"),
    "a file that is there": (["-o", "labels.txt"], 2, "will not overwrite"),
    "its own input": (["-o", "m.onnx", "--force"], 2, "the path is the input"),
    "no folder": (["-o", "nowhere/q.onnx"], 2, "does not exist"),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, reason = _REFUSED[kind]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    effort = [] if "--effort" in arguments else ["--effort", "fast"]
    assert main(["quantize", "m.onnx", "--calibration", "cal", "--no-speed", "--no-cache", *arguments, *effort]) == code
    assert reason in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_default_file_is_named_after_the_input_and_is_written_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far").mkdir()
    shutil.copy(folder / "m.onnx", tmp_path / "far" / "m80.onnx")
    monkeypatch.chdir(tmp_path)
    assert _run("far/m80.onnx", "--calibration", str(folder / "cal")) == 0
    assert main(["quantize", "far/m80.onnx", "--precision", "float16"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "m80.float16.onnx", "m80.int8.onnx"]


def test_agreement_alone_does_not_look_at_labels_and_says_which_bound_fell_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with load("m.onnx") as classifier:
        for path in sorted(Path("judge").iterdir())[:20]:
            label = classifier(path).label
            wrong = _LABELS[(_LABELS.index(label) + 1) % 7]  # so that a drop could not be judged
            (tmp_path / "few" / wrong).mkdir(parents=True, exist_ok=True)
            (tmp_path / "few" / wrong / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "q.onnx"
    judged = ["--data", str(tmp_path / "few"), "-o", str(out)]
    assert _run("m.onnx", "--calibration", "cal", "--min-agreement", "99", *judged) == 6
    assert "20 images bound the agreement at" in capsys.readouterr().err
    assert open_model(out).manifest.evaluation["verdict"] == "inconclusive"  # type: ignore[index]
    assert _run("m.onnx", "--calibration", "cal", "--min-agreement", "80", *judged, "--force") == 0


def test_a_budget_keeps_float_what_the_recipe_leaves_float(tmp_path: Path) -> None:
    options = QuantizationOptions(recipe="accurate", min_agreement=50, **_QUICK)
    result = quantize("m.onnx", calibration="cal", data="judge", out=tmp_path / "q.onnx", options=options)
    assert result.search is not None
    assert [step.verdict for step in result.search.steps] == ["pass"] * len(result.search.steps)
    assert result.float32_ops  # though even all in integers would have passed
    assert not result.search.float32_ops


@pytest.mark.parametrize("name", ["x86-vnni", "tensorrt", "qnn"])
def test_every_target_gives_a_file_near_the_float_one(name: str, tmp_path: Path) -> None:
    options = QuantizationOptions(target=name, **_QUICK)
    quantize("m.onnx", calibration="cal", out=tmp_path / "q.onnx", options=options)
    graphs = [onnx.load(path) for path in ("m.onnx", tmp_path / "q.onnx")]
    logits = [np.concatenate([run_as_defined(graph, image[None]) for image in _OTHERS]) for graph in graphs]
    assert sqnr_db(*logits) > 25
    if sums_exactly(TARGETS[name].weight_bits):
        assert _near(tmp_path / "q.onnx") > 25
    assert open_model(tmp_path / "q.onnx").manifest.batch == TARGETS[name].static_batch


def test_a_network_with_more_tokens_outputs_and_normalised_input_is_quantized(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c.safetensors", **FAMILIES["deit_distilled"])
    export_onnx(checkpoint, out=tmp_path / "m.onnx", options=ExportOptions(input="float32-nchw", outputs=("features",)))
    quantize(tmp_path / "m.onnx", calibration="cal", out=tmp_path / "q.onnx", options=QuantizationOptions(**_QUICK))
    assert _near(tmp_path / "q.onnx", str(tmp_path / "m.onnx")) > 25


def test_a_file_of_a_fixed_batch_is_calibrated_as_one_of_any(tmp_path: Path) -> None:
    source = open_model("m.onnx")
    graph = onnx.load("m.onnx")
    fix_batch(graph.graph, 2)
    del graph.metadata_props[:]
    manifest = replace(source.manifest, input={**source.manifest.input, "batch": 2})
    (tmp_path / "m.onnx").write_bytes(pack(graph.SerializeToString(), manifest))
    ranges = []
    for path in ("m.onnx", tmp_path / "m.onnx"):
        quantize(path, calibration="cal", out=tmp_path / "q.onnx", options=QuantizationOptions(**_QUICK), force=True)
        found = open_model(tmp_path / "q.onnx").manifest
        assert found.quantization is not None
        ranges.append(found.quantization["ranges"])
    assert found.batch == 2
    assert ranges[0] == ranges[1]


def test_figures_that_json_has_no_number_for_do_not_spoil_the_manifest(tmp_path: Path) -> None:
    same = verify("m.onnx", reference="m.onnx", data="judge", unlabelled=True)
    assert same.decisive.sqnr_db == np.inf
    model = with_evaluation(open_model("m.onnx"), same, None)
    assert b"Infinity" not in model.data
    assert model.manifest.evaluation["results"][0]["sqnr_db"] is None  # type: ignore[index]
    (tmp_path / "q.onnx").write_bytes(model.data)
    assert main(["inspect", str(tmp_path / "q.onnx")]) == 0


def test_the_algorithms_run_in_one_thread_whatever_the_caller_has(tmp_path: Path) -> None:
    # With two, sums come in another order, and DeiT-tiny's weights are rounded otherwise: other bytes.
    seen: set[tuple[str, int]] = set()

    def look(stage: str, _done: int, _total: int) -> None:
        if stage == "reconstructing":
            seen.update((pool["filepath"], pool["num_threads"]) for pool in threadpool_info() if _is_blas(pool))

    options = QuantizationOptions(**_QUICK)
    with threadpool_limits(2, user_api="blas"):
        quantize("m.onnx", calibration="cal", out=tmp_path / "q.onnx", options=options, progress=look)
        assert {pool["num_threads"] for pool in threadpool_info() if _is_blas(pool)} == {2}
    assert {threads for _, threads in seen} == {1}


def test_keys_have_no_more_bits_than_weights_where_the_file_is_for_any_cpu(tmp_path: Path) -> None:
    """OpenVINO multiplies by keys as by weights: with 8 bits sums overflow on CPUs without VNNI."""
    rounds = {}
    for target in ("portable", "x86-vnni"):
        options = QuantizationOptions(algorithms=("attention-scores",), target=target, **_QUICK)
        quantize("m.onnx", calibration="cal", out=tmp_path / f"{target}.onnx", options=options)
        recorded = open_model(tmp_path / f"{target}.onnx").manifest.quantization
        assert recorded is not None
        rounds[target] = recorded["openvino_rounds"]
    depth = small_config().depth
    ratios = [rounds["portable"][name] / peak for name, peak in rounds["x86-vnni"].items()]
    assert sorted(ratios) == pytest.approx([1.0] * depth + [127 / 63] * depth)
    with load("m.onnx", engine="openvino") as whole:
        expected = whole.logits(_OTHERS)
    for target in rounds:
        with load(tmp_path / f"{target}.onnx", engine="openvino") as integers:
            assert sqnr_db(expected, integers.logits(_OTHERS)) > 15


def test_where_only_labels_are_missing_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # no header is folded
    # 100 images certify 2.95 points at best, and these ranges change some answers.
    judged = ["--data", "judge", "--max-drop", "3", "--ranges", "percentile", "--algorithm", "repq"]
    assert _run("m.onnx", "--calibration", "cal", *judged, "-o", str(tmp_path / "q.onnx")) == 6
    printed = capsys.readouterr()
    assert "drop at most, points" in printed.out
    assert re.search(r"label the \d+ images whose prediction changed \(`vit-edge verify` lists them\)", printed.err)


def _is_blas(pool: dict[str, Any]) -> bool:
    return bool(pool["user_api"] == "blas")


def test_a_corrupt_image_of_many_is_skipped_and_one_of_few_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number, pixels in enumerate(golden_images(range(110), height=SIZE[0], width=SIZE[1])):
        Image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
    (tmp_path / "055.png").write_bytes(b"no image")
    options = QuantizationOptions(algorithms=(), **_QUICK)
    with caplog.at_level(logging.WARNING):
        result = quantize("m.onnx", calibration=tmp_path, out=tmp_path / "q.onnx", options=options)
    assert result.num_calibration_images == 109
    assert "055.png" in caplog.text
    for number in range(20, 110):
        if number != 55:
            (tmp_path / f"{number:03}.png").unlink()
    assert _run("m.onnx", "--calibration", str(tmp_path), "-o", str(tmp_path / "r.onnx")) == 3
    assert "1 or more of 21 images cannot be used, over 1 %" in capsys.readouterr().err
    assert not (tmp_path / "r.onnx").exists()
