"""An application that uses the installed package is type-checked with its types: `py.typed` and signatures hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

APPLICATION = """\
from pathlib import Path

from vit_edge.export import Verification, verify
from vit_edge.runtime import Prediction, load


def label_of(model: Path, image: bytes) -> tuple[str, float]:
    with load(model, threads=1) as classifier:
        prediction: Prediction = classifier(image, top=3)
        return prediction.label, prediction.probability


def is_accepted(model: str, reference: str, images: Path) -> bool:
    found: Verification = verify(model, reference=reference, data=images, max_drop_points=1.0)
    return found.verdict == "pass" and found.decisive.drop_upper_bound_points < 1.0
"""
# Each line is wrong in one way.
MISTAKES = {
    "load(model, threads=1)": "load(model, thread=1)",
    "prediction.label,": "prediction.lable,",
    "found.decisive.drop_upper_bound_points < 1.0": 'found.decisive.drop_upper_bound_points < "1.0"',
    "data=images": "data=3",
}
# Not a part of the types that an application sees; mypy would read all of PyTorch.
SKIPPED = "[mypy]\n[mypy-torch.*,torchvision.*,onnx.*,onnxscript.*,scipy.*,openvino.*]\nfollow_imports = skip\n"


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the wheel, and behind it the packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    paths = dict.fromkeys((sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))))
    (packages / "others.pth").write_text("\n".join(paths))
    return folder / "bin" / "python"


def _with_mistakes() -> str:
    text = APPLICATION
    for right, wrong in MISTAKES.items():
        assert right in text
        text = text.replace(right, wrong)
    return text


def _mypy(folder: Path, python: Path, text: str) -> list[int]:
    """Return the lines with errors that mypy finds."""
    (folder / "app.py").write_text(text)
    (folder / "mypy.ini").write_text(SKIPPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "app.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = [line.split(":") for line in done.stdout.splitlines() if ": error:" in line]
    assert {file for file, *_ in found} <= {"app.py"}, done.stdout
    return [int(line) for _, line, *_ in found]


def test_mypy_accepts_an_application_and_finds_each_mistake(python: Path, tmp_path: Path) -> None:
    assert _mypy(tmp_path, python, APPLICATION) == []
    assert _mypy(tmp_path, python, _with_mistakes()) == [8, 10, 14, 15]


def test_pyright_accepts_an_application_and_finds_each_mistake(python: Path, tmp_path: Path) -> None:
    command = shutil.which("pyright")
    if command is None:
        pytest.skip("pyright is not installed; it needs Node.js: pip install 'pyright[nodejs]'")
    assert _pyright(command, tmp_path, python, APPLICATION) == []
    # It finds what follows from them too.
    assert {8, 10, 14, 15} <= set(_pyright(command, tmp_path, python, _with_mistakes()))


def _pyright(command: str, folder: Path, python: Path, text: str) -> list[int]:
    (folder / "app.py").write_text(f"{text}# pyright: strict\n")
    done = subprocess.run(
        [command, "--outputjson", "--pythonpath", str(python), "app.py"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    return sorted({entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"})
