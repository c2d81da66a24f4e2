"""One real run of the README's commands for the whole session; tests look at what it left."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.commands import run_forked

# Two processes share the cores: idle threads of OpenMP that spin would make training ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@dataclass(slots=True)
class Workspace:
    """A folder in which every README command ran, and what each printed with --json."""

    folder: Path
    printed: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "run" / "best.safetensors"

    @property
    def float_model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def int8_model(self) -> Path:
        return self.folder / "model.int8.onnx"

    @property
    def test_images(self) -> Path:
        return self.folder / "images" / "test"


# What takes long to make, or is not in every clone: `--quick` leaves out the tests that need it.
SLOW_FIXTURES = {"workspace", "digits", "small_model", "small_encoder", "deployment", "shared_data", "wheel"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="Leave out tests that train, export or build first.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with one file that needs the workspace and end with the rest of them: no process waits while it is made.

    Large files come before small ones, so that all processes end at about the same time.
    """
    if config.getoption("--quick"):
        items[:] = [item for item in items if not SLOW_FIXTURES & {*getattr(item, "fixturenames", ())}]
    needing = list(dict.fromkeys(item.path for item in items if "workspace" in getattr(item, "fixturenames", ())))
    turn = dict.fromkeys(needing, 2) | dict.fromkeys(needing[:1], 0)
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (turn.get(item.path, 1), -tests[item.path]))


def vit_edge(
    *arguments: str | Path, cwd: Path | None = None, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run `vit-edge` as a person does, in a process of its own."""
    given = [str(argument) for argument in arguments]
    if python == sys.executable:
        return run_forked(given, cwd=cwd)
    command = [str(python), "-m", "vit_edge", *given]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1800, check=False)


def readme_commands() -> list[list[str]]:
    """Return the arguments of every `$ vit-edge ...` line of the README's console block."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"^\$ vit-edge (.+)$", text, flags=re.MULTILINE)]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all the processes that this run of the tests is divided among."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def digits(shared_folder: Path) -> Path:
    """Return the digits as an image folder with train and test."""
    folder = shared_folder / "digits"
    with FileLock(shared_folder / "digits.lock"):
        if not folder.exists():
            script = ROOT / "calibration_data" / "make_digits.py"
            subprocess.run([sys.executable, script, "--out", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def workspace(shared_folder: Path, digits: Path) -> Workspace:
    """Run the README's commands on the digits, in order, each with --json: once for all processes."""
    space = Workspace(folder=shared_folder / "workspace")
    printed = shared_folder / "workspace.json"
    with FileLock(shared_folder / "workspace.lock"):
        if not printed.exists():
            space.folder.mkdir()
            _run_readme(space, digits)
            printed.write_text(json.dumps(space.printed))
    space.printed = json.loads(printed.read_text())
    return space


def _run_readme(space: Workspace, digits: Path) -> None:
    (space.folder / "images").symlink_to(digits)
    image = sorted((digits / "test" / "3").iterdir())[0]
    (space.folder / "image.png").write_bytes(image.read_bytes())
    kept = os.environ.get("VIT_EDGE_TEST_RUN")  # the folder of an earlier training, with its printed train.json
    if kept:
        shutil.copytree(kept, space.folder / "run")
        space.printed["train"] = json.loads((Path(kept) / "train.json").read_text())
    for arguments in readme_commands():
        if kept and arguments[0] == "train":
            continue
        done = vit_edge(*arguments, "--json", cwd=space.folder)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        space.printed[arguments[0]] = json.loads(done.stdout)


@pytest.fixture(scope="session")
def small_model(shared_folder: Path) -> Path:
    """Return a folder with a small network: `c.safetensors`, `m.onnx`, and OpenVINO's IR. Copy what you change."""
    from tests.support.networks import write_checkpoint
    from vit_edge.export import ExportOptions, export_onnx

    folder = shared_folder / "small_model"
    with FileLock(shared_folder / "small_model.lock"):
        if not folder.exists():
            folder.mkdir()
            checkpoint = write_checkpoint(folder / "c.safetensors")
            export_onnx(checkpoint, out=folder / "m.xml", options=ExportOptions(format="openvino"))
            export_onnx(checkpoint, out=folder / "m.onnx")
    return folder


@pytest.fixture(scope="session")
def small_encoder(shared_folder: Path) -> Path:
    """Return a folder with a small encoder, `e.onnx` and `e.int8.onnx`, and images. Copy what you change."""
    from tests.support.encoders import make_encoder

    folder = shared_folder / "small_encoder"
    with FileLock(shared_folder / "small_encoder.lock"):
        if not folder.exists():
            folder.mkdir()
            make_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def deployment(shared_folder: Path) -> Path:
    """Return a folder with a checkpoint, images, and what a deployment made of them. Copy what you change."""
    from tests.support.deployments import make_deployment

    folder = shared_folder / "deployment"
    with FileLock(shared_folder / "deployment.lock"):
        if not folder.exists():
            folder.mkdir()
            make_deployment(folder)
    return folder


@pytest.fixture
def openvino_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let OpenVINO run every quantized op in INT8, also on a CPU where it would be slower than float32."""
    for module in ("vit_edge.runtime.engines.ov_graph", "vit_edge.machine.int8_engines"):
        monkeypatch.setattr(f"{module}.lacks_int8_matmul", lambda: False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real weights and images that lies beside some checkouts; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA.name}: real weights and photographs are not beside this checkout")
    return SHARED_DATA
