"""What an application calls: images of every kind, colours, stages, devices, precisions, files of every kind."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import ROOT, Workspace, vit_edge
from tests.support.networks import PREPROCESSING, SIZE, write_checkpoint
from vit_edge.errors import Closed, EngineUnavailable, ImageRejected, ModelRejected, NotTrusted, UsageError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import open_model
from vit_edge.model_file.openvino_ir import NO_SEAL, seal_ir
from vit_edge.runtime import load
from vit_edge.runtime.checks.acceptance import Trial
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.checks.sandbox import run_apart, try_in_sandbox
from vit_edge.runtime.engines.protocol import EngineOptions

ENGINES = ("onnxruntime", "openvino")
DIGITS = golden_images(range(6), height=32, width=32)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photo() -> np.ndarray[Any, Any]:
    return golden_images([3], height=50, width=70)[0]


def test_every_way_to_give_a_image_gives_the_same_answer(
    workspace: Workspace, tmp_path: Path, photo: np.ndarray[Any, Any]
) -> None:
    image = Image.fromarray(photo)
    image.save(tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    opaque = np.concatenate([photo, np.full((50, 70, 1), 255, np.uint8)], axis=2)
    with load(workspace.int8_model) as classifier:
        expected = classifier(photo).answers
        for given in (tmp_path / "p.png", str(tmp_path / "p.png"), data, io.BytesIO(data), image):
            assert classifier(given).answers == expected
        for array, color in (
            (photo[..., ::-1], "bgr"),
            (opaque, "rgba"),
            (opaque[..., [2, 1, 0, 3]], "bgra"),
        ):
            before = array.copy()
            assert classifier(array, color=color).answers == expected  # type: ignore[arg-type]
            np.testing.assert_array_equal(array, before)
        assert classifier(photo[..., ::-1]).answers != expected


@pytest.mark.parametrize(
    ("channels", "color", "message"),
    [
        (4, "rgb", r"give uint8 \[height, width, 3\] for color='rgb', or say its color: rgba or bgra"),
        (3, "bgra", r"give uint8 \[height, width, 4\] for color='bgra', or say its color: rgb or bgr"),
        (1, "rgb", r"image is uint8 \[50, 70, 1\]"),
        (3, "hsv", "choose one of rgb, bgr, rgba, bgra"),
    ],
)
def test_the_channels_of_an_array_are_checked(workspace: Workspace, channels: int, color: Any, message: str) -> None:
    with load(workspace.int8_model) as classifier, pytest.raises(TypeError, match=message):
        classifier(np.zeros((50, 70, channels), np.uint8), color=color)


def test_a_color_is_for_arrays_only(workspace: Workspace) -> None:
    with load(workspace.int8_model) as classifier, pytest.raises(TypeError, match="the image is no array"):
        classifier(workspace.folder / "image.png", color="bgr")


def test_a_prediction_is_ready_for_json_with_the_time_of_every_stage(workspace: Workspace) -> None:
    with load(workspace.int8_model) as classifier:
        prediction = classifier(workspace.folder / "image.png", top=2)
    read = json.loads(json.dumps(prediction.to_dict()))
    assert read["label"] == prediction.label == "3"
    assert read["answers"][0]["probability"] == read["probability"] == prediction.probability
    assert len(read["answers"]) == 2
    stages = ("decode_ms", "resize_ms", "inference_ms", "answer_ms", "waited_ms")
    assert read["timings"]["total_ms"] == pytest.approx(sum(read["timings"][name] for name in stages))
    assert all(read["timings"][name] > 0 for name in stages[:4])


def test_a_batch_is_answered_as_its_images_alone(workspace: Workspace) -> None:
    with load(workspace.int8_model) as classifier:
        together = classifier.classify_batch(list(DIGITS), top=3)
        assert [each.answers for each in together] == [classifier(image, top=3).answers for image in DIGITS]


def test_what_runs_is_described(workspace: Workspace) -> None:
    for engine in ENGINES:
        with load(workspace.float_model, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
            described = classifier.describe()
        assert json.loads(json.dumps(described)) == described
        assert (described["device"], described["fallback"], described["verified"]) == ("cpu", None, "full")
        assert list(described["placement"]) == [{"onnxruntime": "CPUExecutionProvider", "openvino": "CPU"}[engine]]
        assert next(iter(described["placement"].values())) > 20


@pytest.mark.parametrize("engine", ENGINES)
def test_a_static_shape_runs_every_batch_in_parts(workspace: Workspace, engine: Any) -> None:
    with (
        load(workspace.float_model, engine=engine) as free,
        load(workspace.float_model, engine=engine, batch_size=4) as fixed,
    ):
        assert (free.describe()["batch_size"], fixed.describe()["batch_size"]) == (None, 4)
        for count in (1, 4, 6):
            np.testing.assert_allclose(fixed.logits(DIGITS[:count]), free.logits(DIGITS[:count]), atol=1e-4)
        assert fixed.logits(DIGITS[:0]).shape == (0, 10)


def test_a_static_shape_of_an_int8_file_passes_its_golden_vectors(workspace: Workspace) -> None:
    for engine in ENGINES:
        with load(workspace.int8_model, engine=engine, batch_size=1) as classifier:  # type: ignore[arg-type]
            assert classifier.describe()["verified"] == "full"


_HAS_BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.skipif(not _HAS_BFLOAT16, reason="OpenVINO has no bfloat16 on this CPU")
def test_the_precision_that_runs_is_the_one_that_was_asked_for(workspace: Workspace) -> None:
    with load(workspace.float_model, engine="openvino", float_precision="bfloat16") as classifier:
        runs = classifier.describe()["float_precision"]
        halved = classifier.logits(DIGITS)
    assert runs == "bfloat16"
    with load(workspace.float_model, engine="openvino") as classifier:
        assert classifier.describe()["float_precision"] == "float32"
        exact = classifier.logits(DIGITS)
    assert 1e-4 < np.abs(halved - exact).max() < 1


@pytest.mark.skipif(_HAS_BFLOAT16, reason="this CPU has bfloat16")
def test_bfloat16_that_the_cpu_has_not_is_refused(workspace: Workspace) -> None:
    with pytest.raises(EngineUnavailable, match="OpenVINO runs it in float32 on cpu, not in bfloat16"):
        load(workspace.float_model, engine="openvino", float_precision="bfloat16")


def test_a_precision_that_the_engine_has_not_is_refused(workspace: Workspace) -> None:
    with pytest.raises(EngineUnavailable, match="does not compute in bfloat16; it can in float32"):
        load(workspace.float_model, engine="onnxruntime", float_precision="bfloat16")


@pytest.mark.parametrize("device", ["cuda", "cudaa", "tensorrt", "npu", "gpu.1"])
def test_a_device_that_is_not_here_is_an_error_or_with_permission_a_fallback_that_is_told(
    workspace: Workspace, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    photo = workspace.folder / "image.png"
    refused = vit_edge("classify", workspace.int8_model, photo, "--device", device, "--json")
    assert refused.returncode == 7
    error = json.loads(refused.stdout)["error"]
    assert f"'{device}'" in error["reason"]
    assert "cpu" in error["reason"]
    with caplog.at_level(logging.WARNING), load(workspace.int8_model, device=device, allow_fallback=True) as classifier:
        described = classifier.describe()
        assert classifier(photo).label == "3"
    assert described["device"] == "cpu"
    assert f"'{device}'" in described["fallback"]
    assert described["fallback"] in caplog.text


def test_a_fallback_is_in_the_result_of_the_command(workspace: Workspace) -> None:
    arguments = ("classify", workspace.int8_model, workspace.folder / "image.png", "--device", "cuda")
    done = vit_edge(*arguments, "--allow-fallback", "--json")
    assert done.returncode == 0
    assert "'cuda' is not here" in json.loads(done.stdout)["model"]["fallback"]
    assert "Warning: it runs on the CPU" in vit_edge(*arguments, "--allow-fallback").stdout


def test_features_are_given_where_the_file_has_them(workspace: Workspace, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.safetensors")
    options = ExportOptions(outputs=("logits", "features"))
    export_onnx(tmp_path / "c.safetensors", out=tmp_path / "m.onnx", options=options)
    images = golden_images(range(3), height=SIZE[0], width=SIZE[1])
    with load(tmp_path / "m.onnx", engine="onnxruntime") as one, load(tmp_path / "m.onnx", engine="openvino") as two:
        features = one.features(images)
        assert features.shape[0] == 3
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, two.features(images), atol=1e-3)
    with load(workspace.int8_model) as classifier, pytest.raises(UsageError, match="--outputs logits,features"):
        classifier.features(DIGITS)


def test_ir_answers_as_the_onnx_file_does_and_only_where_it_can(small_model: Path, tmp_path: Path) -> None:
    shutil.copytree(small_model, tmp_path, dirs_exist_ok=True)
    images = golden_images(range(3), height=SIZE[0], width=SIZE[1])
    with load(tmp_path / "m.onnx", engine="openvino") as onnx_file, load(tmp_path / "m.xml") as ir:
        np.testing.assert_allclose(ir.logits(images), onnx_file.logits(images), atol=1e-4)
        assert (ir.describe()["engine"], ir.describe()["verified"]) == ("openvino", "full")
    with pytest.raises(ModelRejected, match="ONNX Runtime cannot read"):
        load(tmp_path / "m.xml", engine="onnxruntime")
    xml, weights = (tmp_path / "m.xml").read_bytes(), (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(NotTrusted):
        load(tmp_path / "m.xml")
    (tmp_path / "m.bin").write_bytes(weights)
    sealed = xml.index(b'<seal value="') + len(b'<seal value="')
    hostile = (xml[:sealed] + NO_SEAL.encode() + xml[sealed + 64 :]).replace(b'type="SoftMax"', b'type="If"')
    (tmp_path / "m.xml").write_bytes(seal_ir(hostile.replace(b'type="Softmax"', b'type="If"'), weights))
    with pytest.raises(ModelRejected, match=r"If, which is not allowed"):
        load(tmp_path / "m.xml")


class _Small(nn.Module):
    """A classifier as others write them: normalised NCHW in, and at will a Softmax at its end."""

    def __init__(self, *, softmax: bool = False, channels_last: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 8, 8, generator=generator) / 8)
        self.softmax, self.channels_last = softmax, channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.permute(0, 3, 1, 2) if self.channels_last else pixels
        values = nn.functional.conv2d(pixels, self.weight, stride=8).mean(dim=(2, 3))
        return values.softmax(dim=1) if self.softmax else values


THEIRS = Preprocessing(resize=16, crop=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
NAMES = ("ant", "bee", "cat", "dog")


def _exported(path: Path, model: nn.Module, *, batch: str = "n", channels_last: bool = False) -> Path:
    shape = (1, 16, 16, 3) if channels_last else (1, 3, 16, 16)
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, *shape[1:]),),
        dynamo=True,
        verbose=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: batch},) if batch else None,
    )
    assert program is not None
    program.save(path)
    return path


@pytest.mark.parametrize("kind", ["logits", "softmax", "channels last", "fixed batch"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_classifier_made_elsewhere_answers_as_where_it_was_made(tmp_path: Path, kind: str) -> None:
    last = kind == "channels last"
    model = _Small(softmax=kind == "softmax", channels_last=last)
    batch = "" if kind == "fixed batch" else "n"
    path = _exported(tmp_path / "theirs.onnx", model, batch=batch, channels_last=last)
    images = golden_images(range(5), height=16, width=16)
    with torch.no_grad():
        expected = _Small()(torch.from_numpy(THEIRS.normalise(images))).numpy()
    for engine in ENGINES:
        told = {"preprocessing": THEIRS.to_dict(), "labels": NAMES}
        with load(path, engine=engine, **told) as classifier:  # type: ignore[arg-type]
            np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-4)
            assert classifier(images[0]).label == NAMES[int(expected[0].argmax())]
            assert classifier.describe()["verified"] == "probe"
    with load(path.read_bytes(), preprocessing=THEIRS, labels=NAMES) as classifier:
        np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_is_told_of_a_file_made_elsewhere_has_to_fit(workspace: Workspace, tmp_path: Path) -> None:
    path = _exported(tmp_path / "theirs.onnx", _Small())
    with pytest.raises(ModelRejected, match="not made by vit-edge"):
        load(path)
    with pytest.raises(UsageError, match="labels is not given"):
        load(path, preprocessing=THEIRS)
    with pytest.raises(UsageError, match="3 labels for 4 classes"):
        load(path, preprocessing=THEIRS, labels=NAMES[:3])
    with pytest.raises(UsageError, match="takes 16 x 16 pixels"):
        load(path, preprocessing=PREPROCESSING, labels=NAMES)
    with pytest.raises(UsageError, match="cannot use the preprocessing"):
        load(path, preprocessing={"crop": [16, 16]}, labels=NAMES)
    with pytest.raises(UsageError, match="which holds preprocessing and labels"):
        load(workspace.int8_model, preprocessing=THEIRS, labels=NAMES)
    photo = workspace.folder / "image.png"
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "p.json").write_text(json.dumps(THEIRS.to_dict()))
    told = ("--labels", tmp_path / "names.txt", "--preprocessing", tmp_path / "p.json")
    done = vit_edge("classify", path, photo, *told, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"][0]["label"] in NAMES


def test_a_process_that_dies_under_a_file_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    script = (
        "import sys; from vit_edge.runtime.checks.sandbox import run_apart\nrun_apart(sys.argv[1], [], timeout_s=2)"
    )
    for module, message in (("dies", "crashed (SIGSEGV)"), ("hangs", "did not finish in 2 s")):
        command = [sys.executable, "-c", script, module]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert message in done.stderr
    with pytest.raises(ModelRejected, match="No module named"):
        run_apart("vit_edge.no_such_module", [], timeout_s=60)


def _trial(path: Path) -> Trial:
    model = open_model(path, warn=False)
    return Trial(model=model, sha256=model.sha256, engine="onnxruntime", options=EngineOptions(), verify="full")


def test_a_file_that_crashed_is_not_tried_again_and_one_that_passed_need_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vit_edge.runtime.checks import acceptance, sandbox

    path = _third_party(tmp_path)
    monkeypatch.setattr(acceptance, "_accepted_here", set())
    load(path, engine="onnxruntime").close()
    monkeypatch.setattr(acceptance, "_accepted_here", set())  # as in the next process
    monkeypatch.setattr(sandbox, "run_apart", lambda *_, **__: pytest.fail("tried again"))
    load(path, engine="onnxruntime").close()
    acceptance.refuse(_trial(path), "the engine crashed (SIGSEGV)")
    with pytest.raises(ModelRejected, match=r"SIGSEGV\); the crash is remembered"):
        load(path, engine="onnxruntime", sandbox="always")


def _third_party(folder: Path) -> Path:
    write_checkpoint(folder / "c.safetensors")
    export_onnx(folder / "c.safetensors", out=folder / "m.onnx")
    return folder / "m.onnx"


def test_less_checking_is_what_was_asked_for_and_told(workspace: Workspace, tmp_path: Path) -> None:
    data = workspace.int8_model.read_bytes()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(NotTrusted):
        load(broken)
    with load(broken, verify="none") as classifier:
        assert classifier.describe()["verified"] == "none"
    with load(workspace.int8_model, verify="hash") as classifier:
        assert classifier.describe()["verified"] == "hash"
    with pytest.raises(UsageError, match="choose full, hash, none"):
        load(workspace.int8_model, verify="most")  # type: ignore[arg-type]


def test_another_release_of_the_engine_has_to_pass_the_golden_vectors(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    model = open_model(workspace.int8_model)
    golden = json.loads(json.dumps(model.manifest.golden))
    for entry in golden["expected"]:
        entry["made_on"]["engine_version"] = "1.0.0"
    data = model.with_manifest(replace(model.manifest, golden=golden))
    with caplog.at_level(logging.WARNING), load(data, engine="onnxruntime", verify="hash") as classifier:
        assert classifier.describe()["verified"] == "full"
    assert "was checked in onnxruntime 1.0.0" in caplog.text


def test_a_twin_answers_beside_and_outlives_the_one_it_was_made_of(workspace: Workspace) -> None:
    for engine in ENGINES:
        first = load(workspace.int8_model, engine=engine)  # type: ignore[arg-type]
        expected = first.logits(DIGITS)
        twin = first.twin()
        first.close()
        with pytest.raises(Closed):
            first.logits(DIGITS)
        np.testing.assert_array_equal(twin.logits(DIGITS), expected)
        twin.close()


def test_a_large_jpeg_decodes_fast_and_others_take_no_notice(workspace: Workspace, tmp_path: Path) -> None:
    smooth = Image.fromarray(DIGITS[0]).resize((1024, 768), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(tmp_path / "p.jpg", quality=95)
    smooth.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    smooth.save(tmp_path / "p.png")
    smooth.convert("L").save(tmp_path / "grey.jpg", quality=95)
    with load(workspace.float_model) as full, load(workspace.float_model, decode="fast") as fast:
        assert fast.describe()["decode"] == "fast"
        for name in ("p.jpg", "turned.jpg", "grey.jpg"):
            one, other = full.prepare(tmp_path / name), fast.prepare(tmp_path / name)
            difference = np.abs(one.pixels.astype(int) - other.pixels.astype(int))
            assert difference.max() > 0
            assert difference.mean() < 4
        np.testing.assert_array_equal(full.prepare(tmp_path / "p.png").pixels, fast.prepare(tmp_path / "p.png").pixels)
    with pytest.raises(UsageError, match="decode is 'slow'"):
        load(workspace.float_model, decode="slow")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"threads": "2"}, {"threads": 0}, {"batch_size": 0}, {"device": None}])
def test_options_that_mean_nothing_are_named(workspace: Workspace, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} is"):
        load(workspace.int8_model, **settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_odd_requests_are_errors_of_ours(workspace: Workspace, tmp_path: Path) -> None:
    theirs = _exported(tmp_path / "theirs.onnx", _Small())
    for labels in ("abcd", range(4)):
        with pytest.raises(UsageError, match="not a list of texts"):
            load(theirs, preprocessing=THEIRS, labels=labels)  # type: ignore[arg-type]
    with load(workspace.int8_model) as classifier:
        with pytest.raises(UsageError, match="top is 0"):
            classifier(DIGITS[0], top=0)
        closed = io.BytesIO(b"")
        closed.close()
        with pytest.raises(ImageRejected, match="cannot be read"):
            classifier(closed)


def test_an_image_that_was_given_is_not_touched_by_fast_decoding(workspace: Workspace, tmp_path: Path) -> None:
    Image.fromarray(DIGITS[0]).resize((800, 600)).save(tmp_path / "p.jpg")
    image = Image.open(tmp_path / "p.jpg")
    with load(workspace.float_model, decode="fast") as classifier:
        classifier(image)
    assert image.size == (800, 600)


def test_a_sandbox_looks_for_modules_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _trial(_third_party(tmp_path))
    (tmp_path / "hostile").mkdir()
    for name in ("numpy", "onnxruntime", "runpy"):
        (tmp_path / "hostile" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise RuntimeError")
    monkeypatch.chdir(tmp_path / "hostile")
    try_in_sandbox(trial)
    assert not (tmp_path / "ran").exists()


def test_what_had_another_cause_than_the_file_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vit_edge.runtime.checks import sandbox

    trial = _trial(_third_party(tmp_path))
    monkeypatch.setattr(sandbox, "_TIMEOUT_S", 0)
    with pytest.raises(ModelRejected, match="did not finish"):
        sandbox.try_in_sandbox(trial)
    monkeypatch.setattr(sandbox, "_TIMEOUT_S", 120)
    sandbox.try_in_sandbox(trial)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_child_after_a_fork_can_drop_what_it_inherited_and_load_its_own(workspace: Workspace, engine: Any) -> None:
    import gc
    import os
    import signal

    classifier = load(workspace.float_model, engine=engine, threads=2)
    classifier.logits(DIGITS)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        classifier.close()
        del classifier
        gc.collect()
        code = 0
        if engine == "onnxruntime":
            with load(workspace.float_model, engine=engine, threads=2) as own:
                code = 0 if own.logits(DIGITS).shape == (6, 10) else 4
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    classifier.close()


def test_results_describe_themselves_in_a_line_and_as_html(small_model: Path) -> None:
    with load(small_model / "m.onnx", threads=1) as classifier:
        prediction = classifier(np.zeros((40, 40, 3), np.uint8))
        assert repr(classifier).startswith("<Classifier ")
        assert "threads=1" in repr(classifier)
        assert classifier._repr_html_().startswith("<table>")
    assert repr(prediction).startswith(f"<Prediction {prediction.label!r}: {prediction.probability:.1%}")
    assert prediction.label in prediction._repr_html_()
    assert repr(classifier).endswith("closed>")
