"""A guest in other people's processes: nothing printed, nothing changed, nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace
from vit_edge.runtime import installed_engines

_ABSENT = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
_GUEST = """
import locale, logging, os, random, signal, sys, threading, time, warnings
import numpy as np
from PIL import Image, ImageFile
engine, model, image = sys.argv[1:]
__import__(engine)

def state():
    return {
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("vit_edge").handlers),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)],
        "random": (random.getstate(), np.random.get_state()[1].tobytes()),
        "numpy": (np.geterr(), np.get_printoptions()),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "warnings": list(warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "recursion": sys.getrecursionlimit(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "open files": sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None,
        "os threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None,
    }

def use():
    from vit_edge.runtime import Pool, load
    with load(model, engine=engine, threads=2) as classifier:
        classifier(image)
    with Pool(model, engine=engine, workers=2) as pool:
        pool.submit(image).result()
        pool.swap(model)
        pool.submit(image).result()

def settled():
    # Threads that end are gone after a while: the system takes its time.
    found, end = state(), time.monotonic() + 1
    while time.monotonic() < end:
        time.sleep(0.05)
        now = state()
        found = min(found, now, key=lambda each: each["os threads"] or 0)
    return found

before = state()
use()
first = settled()
use()
second = settled()
for name in before:
    if name not in ("open files", "os threads"):
        assert before[name] == second[name], (name, before[name], second[name])
# What an engine starts once for the process stays; what a model needs goes with it.
assert (second["os threads"] or 0) <= (first["os threads"] or 0), (first["os threads"], second["os threads"])
assert first["open files"] == second["open files"], (first["open files"], second["open files"])
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("engine", installed_engines())
def test_a_process_is_left_as_it_was_found(workspace: Workspace, engine: str) -> None:
    done = run(_GUEST, engine, workspace.int8_model, workspace.folder / "image.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


_FAILING = """
import sys
import numpy as np
import onnx
from onnx import helper, numpy_helper
from vit_edge.model_file.artifact import MANIFEST_KEY, open_model, seal
from vit_edge.errors import VitEdgeError
from vit_edge.runtime import load
engine, path = sys.argv[1:]
opened = open_model(path)
model = onnx.load_model_from_string(opened.data)
del model.metadata_props[:]
model.metadata_props.add(key=MANIFEST_KEY, value=opened.manifest.to_json())
model.graph.initializer.append(numpy_helper.from_array(np.array([3, 7]), "shape"))
end = next(node for node in model.graph.node if "logits" in node.output)
end.output[0] = "inner"
model.graph.node.append(helper.make_node("Reshape", ["inner", "shape"], ["logits"], name="fails"))
for change in (lambda: None, lambda: model.graph.initializer[0].dims.insert(0, 7)):  # at its first run, when loaded
    change()
    try:
        load(seal(model.SerializeToString()), engine=engine)
    except VitEdgeError as error:
        assert error.reason
    else:
        raise SystemExit("it was loaded")
load(path, engine=engine, device="cuda", allow_fallback=True).close()
"""


@pytest.mark.parametrize("engine", installed_engines())
def test_an_engine_that_fails_prints_nothing_itself(workspace: Workspace, engine: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _FAILING, engine, workspace.float_model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    told = [line for line in done.stderr.splitlines() if "it runs on the CPU" not in line]  # our own warning
    assert (done.returncode, done.stdout, told) == (0, "", [])


_IDLE = """
import sys, time
import numpy as np
from vit_edge.runtime import Pool, load
engine, model = sys.argv[1:]
images = np.zeros((8, 32, 32, 3), np.uint8)
with load(model, engine=engine, threads=4) as classifier, Pool(model, engine=engine, workers=2) as pool:
    pool.watch(model, interval_s=0.1)
    for image in images:
        classifier.logits(images)
        pool.submit(image, timeout_s=60.0).result()
    before = time.process_time()  # of every thread, the engine's too
    time.sleep(1.0)
    print(time.process_time() - before)
"""


@pytest.mark.parametrize("engine", installed_engines())
def test_nothing_spins_while_nobody_asks(workspace: Workspace, engine: str) -> None:
    done = run(_IDLE, engine, workspace.int8_model)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1  # seconds of a CPU in one second; one thread that spins takes all of it


def test_the_runtime_imports_without_torch_onnx_or_any_engine() -> None:
    names = {"torch", "torchvision", "onnx", "onnxruntime", "openvino", "scipy", "safetensors", "rich", "click"}
    script = _ABSENT.format(names=names) + "import vit_edge.runtime; print(vit_edge.runtime.load.__name__)"
    done = run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "load\n", "")


def test_an_engine_that_does_not_run_is_not_imported(workspace: Workspace) -> None:
    script = "import sys\nfrom vit_edge.runtime import load\nload(sys.argv[1]).close()\nprint(*sys.modules)"
    done = run(script, workspace.int8_model)
    assert done.returncode == 0, done.stderr
    assert {"onnxruntime", "openvino"} & set(done.stdout.split()) == {"onnxruntime"}


def test_without_an_engine_the_error_says_what_to_install(workspace: Workspace) -> None:
    script = f"""
import sys
from vit_edge.errors import MissingExtra
from vit_edge.runtime import load
try:
    load({str(workspace.int8_model)!r})
except MissingExtra as error:
    print(error)
"""
    hidden = "import importlib.util as u\nreal = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *a: None if name in ('onnxruntime', 'openvino') else real(name, *a)\n"
    done = run(hidden + script)
    assert done.returncode == 0, done.stderr
    assert 'pip install "vit-edge[onnxruntime]"' in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("classify", "m.onnx", "image.png", "--engine", "openvino"),
        ("verify", "m.onnx", "--reference", "m.onnx", "--data", "images", "--max-drop", "99"),
        ("export", "c.safetensors", "--format", "openvino", "-o", "again.xml"),
    ],
    ids=lambda command: command[0],
)
def test_openvinos_telemetry_is_never_imported(small_model: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "openvino_telemetry.py").write_text(
        f"import sys\nwith open({str(tmp_path / 'imported')!r}, 'a') as file:\n    print(sys.argv, file=file)\n"
    )
    for name in ("m.onnx", "c.safetensors"):
        shutil.copy(small_model / name, tmp_path)
    (tmp_path / "images").mkdir()
    for image in (tmp_path / "image.png", tmp_path / "images" / "a.png"):
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(image)
    done = subprocess.run(
        [sys.executable, "-m", "vit_edge", *command],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "packages"), "VIT_EDGE_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_openvinos_telemetry_is_there_for_whoever_wants_it_afterwards() -> None:
    script = "import vit_edge.runtime.engines.ov, openvino_telemetry; print(openvino_telemetry.Telemetry.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "Telemetry\n", done.stderr
