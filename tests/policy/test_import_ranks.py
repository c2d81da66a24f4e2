"""Imports point one way, and a device needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.policy.ranks import HEAVY, ORDER, PLACES, faults, modules

LINKS = {"vit_edge/export", "vit_edge/runtime", "benchmarks/runtime/support"}
MOST_MODULES = 14


def test_imports_point_one_way() -> None:
    assert faults(ROOT) == []


def test_every_rank_belongs_to_a_room_or_a_module() -> None:
    known = modules(ROOT)
    assert {*ORDER} - {*known} - {module.rpartition(".")[0] for module in known} == set()


# A house in small, with one wrong import in it: (file, its text, what is reported).
PLANTED = [
    ("vit_edge/errors.py", "from vit_edge.runtime.loading import load", "above"),
    ("vit_edge/machine/cpu.py", "import vit_edge.cli.output", "above"),
    ("runtime/engines/ort.py", "def f():\n    from vit_edge.runtime.benchmark import runner", "above"),
    ("runtime/loading.py", "from vit_edge.export import quantize", "above"),
    ("runtime/loading.py", "from vit_edge.runtime import load", "above"),
    ("runtime/serving/pool.py", "from vit_edge.vit import VisionTransformer", "above"),
    ("vit_edge/training/loop.py", "from vit_edge.runtime.loading import load", "beside"),
    ("vit_edge/training/loop.py", "from vit_edge.remote.device import Device", "beside"),
    ("runtime/checks/golden.py", "import torch.nn", "only the torch rooms"),
    ("vit_edge/report/page.py", "from onnx import helper", "only the torch rooms"),
    ("vit_edge/model_file/artifact.py", "import onnx", "only the torch rooms"),
    ("vit_edge/model_file/artifact.py", "def f():\n    import torch", "only the torch rooms"),
    ("export/graph/editing.py", "from vit_edge.export.parity.parity import check", "above"),
    ("export/quantization/algorithms/rounding.py", "from vit_edge.export.quantization import quantizer", "above"),
    (
        "export/quantization/algorithms/rounding.py",
        "from vit_edge.export.quantization.calibrated_graph import x",
        "above",
    ),
    ("export/quantization/calibration/cache.py", "from vit_edge.export.quantization.qdq.placement import x", "above"),
    ("export/verification/verdict.py", "from vit_edge.export.quantization.quantizer import quantize", "above"),
    ("export/new_room/new.py", "", "no rank"),
]


def _plant(root: Path, file: str, text: str) -> None:
    """Copy the house below `root`, its modules empty, and write one of them."""
    for path in modules(ROOT).values():
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)


@pytest.mark.parametrize(("file", "text", "reason"), PLANTED, ids=lambda value: str(value)[-40:])
def test_a_planted_import_is_found(file: str, text: str, reason: str, tmp_path: Path) -> None:
    _plant(tmp_path, file, text)
    (found,) = {*faults(tmp_path)}
    assert file in found
    assert reason in found


def test_a_planted_import_that_points_down_is_no_fault(tmp_path: Path) -> None:
    lower = "from vit_edge.export.quantization.algorithms import recipes\nimport vit_edge.errors\nimport numpy"
    _plant(tmp_path, "export/quantization/calibrated_graph.py", lower)
    assert faults(tmp_path) == []


def _names_of_modules(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield the dotted names that stand as texts in the code below a folder: they are run or imported later."""
    packages = tuple(f"{name}." for name in PLACES)
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.startswith(packages) and all(part.isidentifier() for part in text.split(".")):
                yield path, node.lineno, text


# Keys that files carry, not modules.
KEYS = {
    "vit_edge.batch",
    "vit_edge.checkpoint",
    "vit_edge.manifest",
    "vit_edge.onnx",
    "vit_edge.seal",
    "vit_edge.state",
}
KEYS |= {"vit_edge.onnx.ModelProto"}


def test_module_names_that_are_texts_exist() -> None:
    known = modules(ROOT).keys()
    found = [item for top in ("vit_edge", "export", "runtime") for item in _names_of_modules(ROOT / top)]
    names = {name for *_, name in found} - KEYS
    assert len(names) >= 8  # the engines, the child processes and the bundle's main: else this looks in the wrong place
    for path, line, name in found:
        assert name in KEYS or name in known or f"{name}.__init__" in known, f"{path}:{line}: {name}"


def test_names_that_a_front_door_imports_late_exist() -> None:
    import vit_edge.export

    assert all(getattr(vit_edge.export, name) is not None for name in vit_edge.export.__all__)


def _folders_of_code() -> Iterator[Path]:
    for top in ("vit_edge", "export", "runtime", "tests", "benchmarks", "examples", "calibration_data", "tools"):
        for folder in (ROOT / top, *sorted((ROOT / top).rglob("*/"))):
            parts = folder.relative_to(ROOT).as_posix()
            if not any(f"{parts}/".startswith(f"{link}/") for link in LINKS):
                yield folder


def test_no_folder_holds_more_modules_than_a_listing_shows() -> None:
    counts = {folder: len(list(folder.glob("*.py"))) for folder in _folders_of_code()}
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_no_module_is_named_after_a_dependency() -> None:
    dependencies = {*HEAVY, "onnxruntime", "openvino", "numpy", "PIL", "click", "rich", "safetensors", "scipy"}
    assert not dependencies & {path.stem for path in modules(ROOT).values()}


@pytest.mark.parametrize("module", ["vit_edge.runtime", "vit_edge.cli", "vit_edge.export", "vit_edge.data"])
def test_importing_a_module_does_not_import_torch(module: str) -> None:
    script = f"import {module}, sys; assert not {{'torch', 'torchvision', 'onnx'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=ROOT)


def test_a_clone_that_is_not_installed_imports_through_the_links() -> None:
    script = "import vit_edge.export, vit_edge.runtime; print(vit_edge.runtime.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "."}
    )
    assert done.stdout.strip().endswith("runtime/__init__.py")
