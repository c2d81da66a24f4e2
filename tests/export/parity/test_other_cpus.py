"""Golden vectors on a CPU that this machine is not: a masked or emulated one, and numpy in place of an engine.

Neither engine has a switch that does: `tests/support/masked_cpu.py` says what was tried.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from tests.conftest import ROOT
from tests.support.deployments import make_deployment
from tests.support.masked_cpu import CannotMaskError, build_mask, masked_environment
from vit_edge.image import Pixels
from vit_edge.machine import cpu
from vit_edge.metrics import Logits
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime.checks.golden import check_golden

ENGINES = ("onnxruntime", "openvino")
EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the portable INT8 file of a small network."""
    return make_deployment(tmp_path_factory.mktemp("emulated")) / "out" / "model.int8.onnx"


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Return an environment in which a process sees a CPU without AVX-512 and VNNI; skips where that cannot be."""
    try:
        return masked_environment(build_mask(tmp_path_factory.mktemp("mask")))
    except CannotMaskError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def masked_deployment(tmp_path_factory: pytest.TempPathFactory, masked: Mapping[str, str]) -> Path:
    """Return the folder of a deployment that was made under the mask."""
    folder = tmp_path_factory.mktemp("masked")
    script = (
        "import sys, pathlib\nfrom tests.support.deployments import make_deployment\n"
        "make_deployment(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=masked, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def loaded(model: Path, engine: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Load a file with every golden vector in a process of its own."""
    script = (
        "import sys; from vit_edge.machine import cpu; from vit_edge.runtime import load\n"
        "with load(sys.argv[1], engine=sys.argv[2], threads=1, verify='full') as classifier:\n"
        "    print(classifier.describe()['verified'], cpu.instruction_set(), sep='|')"
    )
    command = [sys.executable, "-c", script, str(model), engine]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=600)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_golden_vectors_made_here_pass_on_a_masked_cpu(
    int8_model: Path, masked: Mapping[str, str], file: str, engine: str
) -> None:
    done = loaded(int8_model.with_name(file), engine, masked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "full|x86_64 avx2"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_golden_vectors_made_on_a_masked_cpu_pass_here(masked_deployment: Path, file: str, engine: str) -> None:
    done = loaded(masked_deployment / file, engine)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("full|")


def test_a_file_for_vnni_says_so_on_a_masked_cpu(int8_model: Path, masked: Mapping[str, str], tmp_path: Path) -> None:
    model = open_model(int8_model)
    for_vnni = replace(model.manifest, quantization={**(model.manifest.quantization or {}), "target": "x86-vnni"})
    (tmp_path / "vnni.onnx").write_bytes(model.with_manifest(for_vnni))
    script = "import sys, logging; logging.basicConfig(); from vit_edge.runtime import load; load(sys.argv[1]).close()"
    command = [sys.executable, "-c", script, str(tmp_path / "vnni.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=masked, timeout=600)
    assert "its target is x86-vnni; this CPU has no VNNI" in done.stderr
    assert "quantize with --target portable" in done.stderr


def answered(model: Path, *prefix: str) -> list[str]:
    """Return what loading with every golden vector says, in a process started with `prefix`."""
    script = (
        "import sys; from vit_edge.machine import cpu; from vit_edge.runtime import load\n"
        "with load(sys.argv[1], engine='onnxruntime', threads=1, verify='full') as classifier:\n"
        "    print(classifier.describe()['verified'], cpu.instruction_set(), sep='|')"
    )
    command = [*prefix, sys.executable, "-c", script, str(model)]
    # An emulator answers for the CPU itself: no mask goes with it.
    environment = {**os.environ, "LD_PRELOAD": ""} if prefix[:1] == (EMULATOR,) else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.mark.skipif(EMULATOR is None or not cpu.is_x86(), reason="apt-get install qemu-user-static")
def test_golden_vectors_pass_on_an_emulated_cpu_without_vnni(int8_model: Path) -> None:
    assert EMULATOR is not None
    verified, instruction_set = answered(int8_model, EMULATOR, "-cpu", "Haswell")
    assert verified == "full"
    assert instruction_set == "x86_64 avx2"


class DefinedByOnnx:
    """An engine that computes every operator as ONNX defines it, in numpy: no kernel of an engine has a say in it."""

    name, device, float_precision, batch_size = "onnxruntime", "cpu", "float32", None
    int8_fallback = None
    version = "onnx.reference"

    def __init__(self, model: Path) -> None:
        self._input = open_model(model).manifest.input["name"]
        self._graph = ReferenceEvaluator(onnx.load(model))

    def run(self, images_NHWC: Pixels) -> Logits:
        logits_BK: Logits = self._graph.run(["logits"], {self._input: images_NHWC})[0]
        return logits_BK


def test_golden_vectors_hold_where_integers_are_computed_as_onnx_defines_them(int8_model: Path) -> None:
    check_golden(DefinedByOnnx(int8_model), open_model(int8_model).manifest)  # type: ignore[arg-type]
