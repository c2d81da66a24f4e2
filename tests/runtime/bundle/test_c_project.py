"""Programs in C on OpenVINO's C API print the logits of Python, and refuse a model that gives others."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, vit_edge
from tests.support.networks import SIZE
from vit_edge.errors import ModelRejected
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.bundle.c_project import bundle_c_project
from vit_edge.runtime.checks.golden import golden_images


def compiled(source: Path, program: Path, *options: str) -> Path:
    """Return the program of a source; skips without a compiler or OpenVINO's headers."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    openvino = Path(pytest.importorskip("openvino").__file__).parent
    libraries = [str(path) for path in (openvino / "libs").glob("libopenvino_c.so*")]
    if not libraries or not (openvino / "include" / "openvino" / "c").is_dir():
        pytest.skip("this build of openvino has no C API")
    linking = [*libraries[:1], f"-Wl,-rpath,{openvino / 'libs'}", "-lm"]
    command = [compiler, "-std=c99", "-Wall", "-Werror", f"-I{openvino / 'include'}", *options, "-o", program, source]
    subprocess.run([*command, *linking], check=True)
    return program


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def project(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c") / "project"
    made = bundle_c_project(small_model / "m.onnx", out=folder)
    assert made.checked_in == ("openvino",)
    # The program uses only some of the constants, which an application may need.
    compiled(folder / "main.c", folder / "classify", "-Wno-unused-const-variable")
    return folder


def test_the_project_prints_the_golden_logits(project: Path, small_model: Path) -> None:
    done = run(project / "classify", project / "model.xml")
    assert done.returncode == 0, done.stderr
    found = np.array([[float(value) for value in line.split()] for line in done.stdout.splitlines()])
    with load(small_model / "m.onnx", engine="openvino", threads=1) as classifier:
        seeds = (classifier.manifest.golden or {})["seeds"]
        expected = classifier.logits(golden_images(seeds, height=SIZE[0], width=SIZE[1]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_project_names_what_an_image_shows(project: Path, small_model: Path, tmp_path: Path) -> None:
    pixels = golden_images([3], height=SIZE[0], width=SIZE[1])[0]
    pixels.tofile(tmp_path / "image.rgb")
    done = run(project / "classify", project / "model.xml", tmp_path / "image.rgb")
    with load(small_model / "m.onnx", engine="openvino", threads=1) as classifier:
        answers = classifier(pixels).answers
    assert [line.rsplit(" ", 1)[0] for line in done.stdout.splitlines()] == [answer.label for answer in answers]
    (tmp_path / "short.rgb").write_bytes(pixels.tobytes()[:-1])
    assert run(project / "classify", project / "model.xml", tmp_path / "short.rgb").returncode == 3
    assert run(project / "classify", tmp_path / "gone.xml").returncode == 7
    assert run(project / "classify").returncode == 2


def test_other_logits_than_the_golden_ones_fail(project: Path, tmp_path: Path) -> None:
    header = (project / "model.h").read_text()
    seeds = "MODEL_GOLDEN_SEEDS[] = {\n"
    (tmp_path / "model.h").write_text(header.replace(seeds, f"{seeds}    77u,\n"))  # each logit has another input now
    shutil.copy(project / "main.c", tmp_path)
    program = compiled(tmp_path / "main.c", tmp_path / "classify", "-Wno-unused-const-variable")
    done = run(program, project / "model.xml")
    assert done.returncode == 6
    assert "the model gives other logits here" in done.stderr


def test_cmake_builds_the_project(project: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    openvino = Path(pytest.importorskip("openvino").__file__).parent
    configured = run("cmake", "-S", project, "-B", tmp_path, f"-DOpenVINO_DIR={openvino / 'cmake'}")
    assert configured.returncode == 0, configured.stderr
    assert run("cmake", "--build", tmp_path).returncode == 0
    done = run(tmp_path / "classify", project / "model.xml")
    assert done.returncode == 0, done.stderr


def test_the_example_prints_the_logits_of_python(small_model: Path, tmp_path: Path) -> None:
    program = compiled(ROOT / "examples" / "c" / "logits.c", tmp_path / "logits", "-Wextra")
    pixels = golden_images([5], height=SIZE[0], width=SIZE[1])
    pixels.tofile(tmp_path / "image.rgb")
    done = run(program, small_model / "m.onnx", tmp_path / "image.rgb", str(SIZE[0]), str(SIZE[1]))
    assert done.returncode == 0, done.stderr
    with load(small_model / "m.onnx", engine="openvino", threads=1) as classifier:
        np.testing.assert_allclose(
            [float(line) for line in done.stdout.split()], classifier.logits(pixels)[0], atol=1e-5
        )


def test_labels_of_every_kind_are_c_literals_and_what_cannot_run_is_refused(small_model: Path, tmp_path: Path) -> None:
    labels = ['a "quote"', "back\\slash", "trigraph ??/", "caf\N{LATIN SMALL LETTER E WITH ACUTE}9", "x", "y", "z"]
    model = open_model(small_model / "m.onnx")
    normalised = {"name": "images", "dtype": "float32", "layout": "NCHW"}
    (tmp_path / "float.onnx").write_bytes(model.with_manifest(replace(model.manifest, input=normalised)))
    with pytest.raises(ModelRejected, match="normalised float32"):
        bundle_c_project(tmp_path / "float.onnx", out=tmp_path / "project")
    from vit_edge.runtime.bundle.c_project import _array, _text

    source = tmp_path / "labels.c"
    lines = ["#include <stdio.h>", _array("char *const", "LABELS", map(_text, labels)), "int main(void) {"]
    source.write_text(
        "\n".join([*lines, f"  for (int i = 0; i < {len(labels)}; i++) puts(LABELS[i]);", "  return 0;\n}\n"])
    )
    assert run(compiled(source, tmp_path / "labels")).stdout.splitlines() == labels


def test_the_command_writes_one_kind_of_bundle(small_model: Path, tmp_path: Path) -> None:
    model = small_model / "m.onnx"
    done = vit_edge("bundle", model, "--c", tmp_path / "project")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "project" / "model.h").exists()
    done = vit_edge("bundle", model, "--c", tmp_path / "other", "--web")
    assert done.returncode == 2
    assert "leave out --web" in done.stderr
