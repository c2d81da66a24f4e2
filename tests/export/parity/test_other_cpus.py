"""Golden vectors on a CPU that this machine is not: an emulated one, where QEMU is, and numpy in place of an engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from tests.conftest import ROOT
from tests.support.deployments import make_deployment
from vit_edge.image import Pixels
from vit_edge.machine import cpu
from vit_edge.metrics import Logits
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime.checks.golden import check_golden

EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the portable INT8 file of a small network."""
    return make_deployment(tmp_path_factory.mktemp("emulated")) / "out" / "model.int8.onnx"


def answered(model: Path, *prefix: str) -> list[str]:
    """Return what loading with every golden vector says, in a process started with `prefix`."""
    script = (
        "import sys; from vit_edge import cpu; from vit_edge.runtime import load\n"
        "with load(sys.argv[1], engine='onnxruntime', threads=1, verify='full') as classifier:\n"
        "    print(classifier.describe()['verified'], cpu.instruction_set(), sep='|')"
    )
    command = [*prefix, sys.executable, "-c", script, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)
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
    version = "onnx.reference"

    def __init__(self, model: Path) -> None:
        self._input = open_model(model).manifest.input["name"]
        self._graph = ReferenceEvaluator(onnx.load(model))

    def run(self, images_NHWC: Pixels) -> Logits:
        logits_BK: Logits = self._graph.run(["logits"], {self._input: images_NHWC})[0]
        return logits_BK


def test_golden_vectors_hold_where_integers_are_computed_as_onnx_defines_them(int8_model: Path) -> None:
    check_golden(DefinedByOnnx(int8_model), open_model(int8_model).manifest)  # type: ignore[arg-type]
