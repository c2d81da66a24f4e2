"""Imports point one way, and a device needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FIRST = (
    "vit_config",
    "cpu",
    "errors",
    "files",
    "progress",
    "image",
    "onnx_schema",
    "artifact",
    "metrics",
    "data",
    "releases",
    "similarity",
    "ir",
    "targets",
    "doctor",
)
TORCH = ("tensor_file", "vit", "checkpoint", "foreign", "convert", "training", "train")
HEAVY = ("torch", "torchvision", "onnx", "onnxscript")
_PACKAGES = (
    ("export", "export"),
    ("runtime", "runtime"),
    ("vit_edge/cli", "cli"),
    ("vit_edge/foreign", "foreign"),
    ("vit_edge/remote", "remote"),
    ("vit_edge/report", "report"),
    ("vit_edge/training", "training"),
)
# Lower may not import higher; the torch group stands beside runtime and sees only the first group and itself.
RANK = {
    **dict.fromkeys(FIRST, 0),
    "runtime": 1,
    "remote": 1,
    "export": 2,
    "report": 3,
    "cli": 4,
    "__main__": 5,
    "__init__": 0,
}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "vit_edge").glob("*.py")):
        yield path.stem, path
    for folder, group in _PACKAGES:
        for path in sorted((ROOT / folder).glob("*.py")):
            yield group, path


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("group", "path"), list(_modules()), ids=lambda value: getattr(value, "name", value))
def test_imports_point_one_way(group: str, path: Path) -> None:
    for name in _imported(path):
        parts = name.split(".")
        if parts[0] in HEAVY:
            assert group in TORCH or group == "export", f"{path} imports {name}"
        if parts[0] != "vit_edge" or len(parts) < 2 or parts[1] == "__version__":
            continue
        target = parts[1]
        if group in TORCH:
            assert target in FIRST + TORCH, f"{path} imports {name}"
        elif target in TORCH:
            assert group in {"export", "cli"}, f"{path} imports {name}"
        else:
            assert RANK[target] <= RANK[group], f"{path} imports {name}"


def test_no_module_is_named_after_a_dependency() -> None:
    dependencies = {*HEAVY, "onnxruntime", "openvino", "numpy", "PIL", "click", "rich", "safetensors", "scipy"}
    assert not dependencies & {path.stem for _, path in _modules()}


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
