"""An application of one file classifies as the model file does, with a Python that knows nothing of vit-edge."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace, vit_edge
from vit_edge.errors import InputError, UsageError
from vit_edge.export import export_onnx
from vit_edge.export.tracing import external_data
from vit_edge.model_file.artifact import open_model
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.runtime import load
from vit_edge.runtime.bundle import builder
from vit_edge.runtime.bundle.builder import bundle

SITE = Path(np.__file__).parent.parent
# The libraries that wheels bring along lie beside their packages.
BASE = ("numpy", "numpy.libs", "PIL", "pillow.libs")
MODEL = "vit_edge_app/model.onnx"


def make_python(folder: Path, *packages: str) -> Path:
    """Return the interpreter of a virtual environment that sees these packages of ours and no other."""
    venv.create(folder, symlinks=True)
    place = next(folder.glob("lib/python*/site-packages"))
    for name in packages:
        source = SITE / name
        if source.exists():
            (place / name).symlink_to(source)
        else:
            assert name.endswith(".libs"), name
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one interpreter for each engine; only ONNX Runtime's has protobuf."""
    folder = tmp_path_factory.mktemp("pythons")
    return {
        "onnxruntime": make_python(folder / "onnxruntime", *BASE, "onnxruntime", "google"),
        "openvino": make_python(folder / "openvino", *BASE, "openvino"),
        "none": make_python(folder / "none", *BASE),
        "bare": make_python(folder / "bare"),
    }


@pytest.fixture(scope="module")
def app(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = bundle(workspace.int8_model, out=tmp_path_factory.mktemp("app") / "digits.pyz")
    assert made.checked_in == ("onnxruntime", "openvino")
    return made.path


def run(python: Path, app: Path, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", str(app), *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def classified(python: Path, app: Path, *arguments: str | Path) -> dict[str, Any]:
    done = run(python, app, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def images_of(workspace: Workspace) -> list[Path]:
    return [sorted(folder.iterdir())[0] for folder in sorted(workspace.test_images.iterdir())]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_it_answers_as_the_model_file_without_vit_edge_installed(
    workspace: Workspace, pythons: dict[str, Path], app: Path, engine: str
) -> None:
    alone = "import importlib.util as u; print([n for n in ('vit_edge', 'click', 'rich', 'torch') if u.find_spec(n)])"
    done = subprocess.run([pythons[engine], "-I", "-c", alone], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    images = images_of(workspace)
    printed = classified(pythons[engine], app, *images, "--top", "2", "--threads", "1")
    assert (printed["model"]["engine"], printed["model"]["verified"]) == (engine, "full")
    with load(workspace.int8_model, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
        expected = [classifier(image, top=2) for image in images]
    for found, one in zip(printed["images"], expected, strict=True):
        answers = [(answer["label"], answer["probability"]) for answer in found["answers"]]
        assert answers == [(answer.label, answer.probability) for answer in one.answers]


def test_without_protobuf_the_one_inside_is_used_and_an_installed_one_is_never_shadowed(
    pythons: dict[str, Path], app: Path
) -> None:
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sys.modules['google.protobuf'].__file__)"
    )
    for engine, inside in (("onnxruntime", False), ("openvino", True)):
        command = [str(pythons[engine]), "-I", "-c", script, str(app), "--describe"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (str(app) in done.stdout.splitlines()[-1]) is inside


def test_other_packages_of_google_do_not_hide_the_protobuf_inside(tmp_path: Path, app: Path) -> None:
    python = make_python(tmp_path / "venv", *BASE, "openvino")
    other = next((tmp_path / "venv").glob("lib/python*/site-packages")) / "google" / "other"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    assert "engine: openvino" in run(python, app, "--describe").stdout


def test_a_protobuf_that_is_too_old_is_named_and_not_shadowed(tmp_path: Path, app: Path) -> None:
    python = make_python(tmp_path / "venv", *BASE, "openvino")
    old = next((tmp_path / "venv").glob("lib/python*/site-packages")) / "google" / "protobuf"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("__version__ = '3.20.3'\n")
    (old / "message_factory.py").write_text("class MessageFactory: ...\n")
    done = run(python, app, "--describe")
    assert done.returncode == 7
    assert "3.20.3, is too old\ntry: pip install --upgrade" in done.stderr


def test_a_person_reads_one_line_a_image(workspace: Workspace, pythons: dict[str, Path], app: Path) -> None:
    image = images_of(workspace)[3]
    done = run(pythons["onnxruntime"], app, image, "--top", "1")
    assert done.stderr == ""
    assert done.stdout.startswith(f"{image}: 3 ")
    assert len(done.stdout.splitlines()) == 1


def test_a_bad_image_among_good_ones_is_named_and_the_others_are_answered(
    workspace: Workspace, pythons: dict[str, Path], app: Path, tmp_path: Path
) -> None:
    bad, good = tmp_path / "notes.txt", images_of(workspace)
    bad.write_text("hello")
    done = run(pythons["onnxruntime"], app, good[2], bad, good[5], "--json")
    assert done.returncode == 3
    assert "notes.txt: the file is not an image" in done.stderr
    printed = json.loads(done.stdout)
    assert [image["label"] for image in printed["images"]] == ["2", "5"]
    assert [image["file"] for image in printed["rejected"]] == [str(bad)]
    assert printed["error"]["exit_code"] == 3


def test_one_changed_byte_of_the_model_is_refused(pythons: dict[str, Path], app: Path, tmp_path: Path) -> None:
    changed = bytearray(app.read_bytes())
    with zipfile.ZipFile(app) as archive:
        inside = changed.index(archive.read(MODEL)) + 100_000
    changed[inside] ^= 1
    (tmp_path / "changed.pyz").write_bytes(changed)
    done = run(pythons["onnxruntime"], tmp_path / "changed.pyz", "--describe", "--json")
    assert done.returncode == 4
    assert "changed.pyz" in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "NotTrusted"


def test_damage_in_the_code_or_the_model_never_changes_an_answer(
    workspace: Workspace, pythons: dict[str, Path], app: Path, tmp_path: Path
) -> None:
    data, image = app.read_bytes(), images_of(workspace)[0]
    expected = run(pythons["onnxruntime"], app, image).stdout
    model = data.index(workspace.int8_model.read_bytes()[:1000])
    codes = []
    for position in (*range(10_000, model, model // 8), *range(model, len(data), len(data) // 4)):
        (tmp_path / "app.pyz").write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        done = run(pythons["onnxruntime"], tmp_path / "app.pyz", image)
        assert done.returncode or done.stdout == expected, position  # a date in the zip may be another
        codes.append(done.returncode)
    assert codes.count(4) >= 10, codes


def test_a_model_exchanged_with_tools_for_zips_is_refused(pythons: dict[str, Path], app: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(app) as archive, zipfile.ZipFile(tmp_path / "other.pyz", "w") as other:
        for entry in archive.infolist():
            data = bytearray(archive.read(entry))
            if entry.filename == MODEL:
                data[100_000] ^= 1
            other.writestr(entry, bytes(data))
    done = run(pythons["onnxruntime"], tmp_path / "other.pyz", "--describe")
    assert done.returncode == 4
    assert "the file's bytes are not those that were sealed" in done.stderr


def test_the_same_model_gives_the_same_bytes_and_no_path_of_this_machine(
    workspace: Workspace, app: Path, tmp_path: Path
) -> None:
    shutil.copy(workspace.int8_model, tmp_path / "renamed.onnx")
    again = bundle(tmp_path / "renamed.onnx")
    assert again.path == tmp_path / "renamed.pyz"
    assert again.path.read_bytes() == app.read_bytes()
    assert os.access(again.path, os.X_OK)
    with zipfile.ZipFile(app) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for path in (str(ROOT), str(Path.home()), str(workspace.folder), sys.prefix):
        assert not [name for name, data in members.items() if path.encode() in data], path
    ours = {name.split("/")[1] for name in members if name.startswith("vit_edge/")}
    assert not ours & {"cli", "export", "training", "foreign", "train.py", "vit.py", "checkpoint.py", "data"}
    assert "vit_edge_app/fallback/LICENSE" in members
    assert "vit_edge_app/licenses/vit-edge/LICENSE" in members
    assert members[MODEL] == workspace.int8_model.read_bytes()
    assert app.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")


# interpreter, arguments, exit code, what the sentence says
FAULTS = [
    ("none", "--describe", 7, "not installed: onnxruntime or openvino\ntry: pip install onnxruntime"),
    ("none", "--describe --engine openvino", 7, "not installed: openvino\ntry: pip install openvino"),
    ("bare", "--describe", 7, "pip install numpy Pillow onnxruntime"),
    ("onnxruntime", "--describe --engine tensorrt9", 7, "no engine is named 'tensorrt9'"),
    ("onnxruntime", "--describe --engine null", 7, "computes nothing"),
    ("onnxruntime", "--describe --device npu", 7, "'npu'"),
    ("onnxruntime", "--describe --threads 0", 2, "threads is 0"),
    ("onnxruntime", "--describe --top 0", 2, "--top is 0"),
    ("onnxruntime", "", 2, "no image is given"),
    ("onnxruntime", "--frobnicate", 2, "unrecognized arguments"),
]


@pytest.mark.parametrize(("python", "line", "code", "sentence"), FAULTS, ids=[f"{f[0]} {f[1]}" for f in FAULTS])
def test_what_is_missing_or_wrong_gets_one_sentence_and_its_exit_code(
    pythons: dict[str, Path], app: Path, python: str, line: str, code: int, sentence: str
) -> None:
    done = run(pythons[python], app, *line.split())
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_what_is_inside_and_needs_no_package(pythons: dict[str, Path], app: Path) -> None:
    done = run(pythons["bare"], app, "--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    for text in ("vit_digits_patch8_32, 10 labels, int8, 32x32 pixels", "--allow-fallback", "Exit codes"):
        assert text in words


def test_an_old_python_can_read_the_sentence_that_asks_for_a_newer_one(app: Path) -> None:
    with zipfile.ZipFile(app) as archive:
        ast.parse(archive.read("__main__.py"), feature_version=(3, 8))


def test_a_reader_that_goes_away_is_no_error_and_a_full_disk_is(
    workspace: Workspace, pythons: dict[str, Path], app: Path
) -> None:
    command = [str(argument) for argument in (pythons["onnxruntime"], "-I", app, *images_of(workspace))]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("error: cannot write the predictions")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_cpu_takes_over_only_where_that_is_allowed(pythons: dict[str, Path], app: Path) -> None:
    done = run(pythons["onnxruntime"], app, "--describe", "--device", "cuda", "--allow-fallback", "--json")
    if "CUDAExecutionProvider" in done.stdout:
        pytest.skip("the CUDA provider is here")
    assert done.returncode == 0, done.stderr
    assert "warning: it runs on the CPU" in done.stderr
    printed = json.loads(done.stdout)
    assert printed["model"]["fallback"] in printed["warnings"]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """Return a folder with OpenVINO's IR, a model of two files, and an image."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("c.safetensors", "m.xml", "m.bin"):
        shutil.copy(small_model / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "_MOST_INSIDE_BYTES", 10_000)
        export_onnx(folder / "c.safetensors", out=folder / "m.onnx")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    return folder


@pytest.mark.parametrize(
    ("model", "engine"), [("m.xml", "openvino"), ("m.onnx", "openvino"), ("m.onnx", "onnxruntime")]
)
def test_ir_and_models_of_two_files_go_inside_whole(
    others: Path, pythons: dict[str, Path], tmp_path: Path, model: str, engine: str
) -> None:
    made = bundle(others / model, out=tmp_path / "app.pyz")
    assert made.checked_in == (("openvino",) if model == "m.xml" else ("onnxruntime", "openvino"))
    printed = classified(pythons[engine], made.path, others / "image.png", "--engine", engine)
    assert printed["model"]["sha256"] == made.model_sha256
    with load(others / model, engine=engine) as classifier:  # type: ignore[arg-type]
        expected = classifier(others / "image.png", top=3)
    assert printed["images"][0]["label"] == expected.label
    assert printed["images"][0]["probability"] == pytest.approx(expected.probability, abs=1e-6)


def test_ir_in_an_application_asks_for_openvino(others: Path, pythons: dict[str, Path], tmp_path: Path) -> None:
    made = bundle(others / "m.xml", out=tmp_path / "app.pyz")
    done = run(pythons["onnxruntime"], made.path, others / "image.png")
    assert done.returncode == 7
    assert "pip install openvino" in done.stderr


def test_bytes_of_an_ir_need_those_of_its_weights(others: Path) -> None:
    xml = (others / "m.xml").read_bytes()
    assert open_ir(xml, weights=(others / "m.bin").read_bytes()).sha256 == open_ir(others / "m.xml").sha256
    with pytest.raises(InputError, match="weights are not given"):
        open_ir(xml)


def test_a_model_that_promises_no_answers_is_not_bundled(workspace: Workspace, tmp_path: Path) -> None:
    model = open_model(workspace.float_model)
    (tmp_path / "silent.onnx").write_bytes(model.with_manifest(replace(model.manifest, golden=None)))
    with pytest.raises(InputError, match="no golden vectors"):
        bundle(tmp_path / "silent.onnx")
    assert os.listdir(tmp_path) == ["silent.onnx"]


def test_an_application_that_python_could_not_start_is_not_made(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit, 2 GiB, is lowered here."""
    monkeypatch.setattr(builder, "_MOST_BYTES", 1_000_000)
    with pytest.raises(InputError, match="starts no zip over 1,000,000"):
        bundle(workspace.int8_model, out=tmp_path / "app.pyz")
    assert os.listdir(tmp_path) == []


def test_an_application_is_replaced_only_on_purpose(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "app.pyz").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        bundle(workspace.int8_model, out=tmp_path / "app.pyz")
    assert (tmp_path / "app.pyz").read_text() == "mine"
    assert bundle(workspace.int8_model, out=tmp_path / "app.pyz", force=True).size_bytes > 1_000_000


def test_the_command_makes_it_and_says_how_to_run_it(workspace: Workspace, tmp_path: Path) -> None:
    done = vit_edge("bundle", workspace.float_model, "--out", tmp_path / "app.pyz")
    assert done.returncode == 0, done.stderr
    for text in ("app.pyz", "onnxruntime, openvino", "python ", "protobuf"):
        assert text in done.stdout
    done = vit_edge("bundle", workspace.float_model, "--out", tmp_path / "app.pyz", "--force", "--json")
    printed = json.loads(done.stdout)
    assert printed["size_bytes"] == (tmp_path / "app.pyz").stat().st_size
    assert printed["checked_in"] == ["onnxruntime", "openvino"]
    done = subprocess.run([tmp_path / "app.pyz", "--help"], capture_output=True, text=True, check=False)
    assert "float32" in done.stdout


def test_where_no_engine_is_installed_the_command_says_that_nothing_was_checked(
    workspace: Workspace, tmp_path: Path
) -> None:
    command_line = ("click", "rich", "markdown_it", "mdurl", "pygments", "google")
    python = make_python(tmp_path / "venv", *BASE, *command_line)
    arguments = ["bundle", str(workspace.int8_model), "--out", str(tmp_path / "a.pyz"), "--json"]
    command = [str(python), "-m", "vit_edge", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["checked_in"] == []
    assert "was not run: of onnxruntime, openvino none is installed here" in printed["warnings"][0]
    # Nor does that environment have the licence of protobuf: without it, protobuf is not passed on.
    assert printed["protobuf"] is None
    assert "licence of protobuf" in printed["warnings"][1]
