"""`vit-edge doctor`: what a machine has, what is wrong with it, and what to quantize for."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, vit_edge
from vit_edge.machine import cpu, doctor
from vit_edge.machine.doctor import EXTRAS, examine, findings
from vit_edge.machine.targets import TARGETS, choose, choose_target, resolve_target


def run_with(folder: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `vit-edge doctor` with the packages of a folder before those installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "vit_edge", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


def package(folder: Path, name: str, code: str) -> None:
    """Write a package that does something else than the real one when it is imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code, encoding="utf-8")


def wheel(folder: Path, name: str, version: str) -> None:
    """Write what pip leaves of an installed wheel."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """Return what doctor prints here with --json."""
    done = vit_edge("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_report_tells_of_cpu_memory_engines_and_target(printed: dict[str, Any]) -> None:
    assert (printed["schema"], printed["command"]) == (1, "doctor")
    assert printed["cpu"] == cpu.cpu_report()
    assert 1 <= printed["cpu"]["usable_threads"] <= printed["cpu"]["cpus"]
    assert printed["memory"]["total_bytes"] > printed["memory"]["available_bytes"] > 1e6
    engines = {engine["name"]: engine for engine in printed["engines"]}
    assert "CPUExecutionProvider" in engines["onnxruntime"]["devices"]
    assert "CPU" in engines["openvino"]["devices"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", engine["version"]) for engine in engines.values())
    assert printed["target"]["name"] == choose_target(printed).name
    assert printed["target"]["verified"] is TARGETS[printed["target"]["name"]].verified
    assert printed["target"]["reason"]


def test_what_it_prints_is_what_a_target_is_chosen_from(printed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "device.json").write_text(json.dumps(printed), encoding="utf-8")
    assert resolve_target(tmp_path / "device.json").target.name == printed["target"]["name"]


def test_a_person_reads_the_same(printed: dict[str, Any]) -> None:
    shown = vit_edge("doctor").stdout
    for text in (printed["cpu"]["name"], "CPUExecutionProvider", f"--target {printed['target']['name']}", "threads"):
        assert text in shown


def test_a_device_needs_no_torch_onnx_or_scipy_and_no_engine_in_the_same_process() -> None:
    absent = ("torch", "torchvision", "onnx", "scipy", "onnxruntime", "openvino")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); from vit_edge.cli import main; "
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engines"][0]["installed"]


def test_an_engine_that_crashes_is_told_of_and_the_other_still_asked(tmp_path: Path) -> None:
    package(tmp_path, "onnxruntime", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    done = run_with(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engines"][0]["error"] == (
        f"crashed while it listed its devices ({signal.Signals.SIGILL.name}: the wheel was built for newer CPUs)"
    )
    assert "CPU" in found["engines"][1]["devices"]
    assert found["findings"][0]["kind"] == "problem"
    assert found["findings"][0]["what"].startswith("onnxruntime crashed")


def test_where_no_engine_works_the_report_is_whole_and_the_exit_code_is_7(tmp_path: Path) -> None:
    package(tmp_path, "onnxruntime", "raise ImportError('libfoo.so.1: cannot open shared object file')")
    package(tmp_path, "openvino", "raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')")
    done = run_with(tmp_path, "--json")
    assert done.returncode == 7
    found = json.loads(done.stdout)
    assert "libfoo.so.1" in found["engines"][0]["error"]
    assert not found["engines"][1]["installed"]
    assert found["error"]["exit_code"] == 7
    (tmp_path / "device.json").write_text(done.stdout, encoding="utf-8")
    assert resolve_target(tmp_path / "device.json").target.name == found["target"]["name"]


def test_a_file_of_an_engines_name_in_the_current_folder_is_not_the_engine(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit(3)", encoding="utf-8")
    found = json.loads(run_with(tmp_path / "none", "--json", cwd=tmp_path).stdout)
    assert "CPUExecutionProvider" in found["engines"][0]["devices"]


def test_two_builds_of_onnxruntime_over_each_other_are_a_problem(tmp_path: Path) -> None:
    wheel(tmp_path, "onnxruntime-gpu", "1.20.0")
    done = run_with(tmp_path, "--json")
    assert done.returncode == 0  # models run, on whichever build won
    (problem,) = [f for f in json.loads(done.stdout)["findings"] if f["kind"] == "problem"]
    assert "onnxruntime, onnxruntime-gpu" in problem["what"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem["advice"]
    assert "problem: 2 builds of ONNX Runtime" in run_with(tmp_path).stdout


def test_a_missing_extra_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"onnxruntime-gpu": "1.20.0", "torch": "2.9", "torchvision": "0.24", "safetensors": "0.5"}
    monkeypatch.setattr(doctor, "_installed", lambda: present)
    missing = {entry["extra"]: entry for entry in examine()["missing_extras"]}
    assert "onnxruntime" not in missing  # the build for GPUs is one
    assert missing["export"]["missing"] == [
        "onnx", "onnxscript", "scipy", "openvino", "threadpoolctl", "jinja2", "pyyaml",
    ]  # fmt: skip
    assert missing["export"]["command"] == 'pip install "vit-edge[export]"'
    assert set(missing) == {"openvino", "export", "train", "timm", "huggingface"}


def test_the_extras_are_those_of_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    for extra, (_, packages) in EXTRAS.items():
        lines = config["options.extras_require"][extra].split("\n")
        wanted = {re.split(r"[<>=!~;\[ ]", line)[0] for line in lines if line and not line.startswith("#")}
        assert wanted == set(packages), extra


@pytest.mark.parametrize(
    ("changes", "what", "advice"),
    [
        ({"cpu": {"machine": "aarch64", "instructions": ["asimd"]}}, "no dot products", "benchmark"),
        ({"cpu": {"cpus": 8, "usable_threads": 2}}, "2 of 8 CPUs", "2 threads"),
        ({"cpu": {"governors": ["powersave"]}}, "powersave", "cpupower"),
        ({"memory": {"available_bytes": 100_000_000}}, "0.1 GB", "INT8"),
        ({"python": {"bits": 32}}, "32 bits", "64-bit"),
        ({"other_targets": [{"name": "openvino-npu", "reason": "an NPU"}]}, "an NPU", "--target openvino-npu"),
    ],
)
def test_every_finding_has_advice(printed: dict[str, Any], changes: dict[str, Any], what: str, advice: str) -> None:
    sound = {"machine": "x86_64", "instructions": ["avx_vnni"], "cpus": 2, "usable_threads": 2, "governors": []}
    report = {**printed, "cpu": {**printed["cpu"], **sound}, "memory": {"available_bytes": 10**10}, "other_targets": []}
    assert findings(report) == []
    changed = {key: {**report[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    (found,) = findings({**report, **changed})
    assert what in found.what
    assert advice in found.advice


@pytest.mark.parametrize(("instructions", "name"), [(["avx2"], "openvino-avx2"), ([], "portable")])
def test_a_missing_vnni_is_the_reason_of_the_target_and_not_said_twice(
    printed: dict[str, Any], instructions: list[str], name: str
) -> None:
    cpu = {
        **printed["cpu"],
        "machine": "x86_64",
        "instructions": instructions,
        "instructions_complete": bool(instructions),
    }
    target, reason = choose({**printed, "cpu": cpu})
    assert target.name == name
    assert "VNNI" in reason
    found = findings({**printed, "cpu": cpu})
    assert not [finding for finding in found if "VNNI" in finding.what]
    assert any("--target openvino-avx2" in finding.advice for finding in found) is (name == "openvino-avx2")


def test_each_piece_of_advice_is_printed_once(tmp_path: Path) -> None:
    wheel(tmp_path, "protobuf", "3.20.3")
    wheel(tmp_path, "onnxruntime-gpu", "1.20.0")
    package(tmp_path, "onnx", "raise TypeError('Descriptors cannot be created directly')")
    done = run_with(tmp_path)
    assert done.returncode == 7
    problems = json.loads(run_with(tmp_path, "--json").stdout)["findings"]
    assert len(problems) >= 2
    for finding in problems:
        assert (done.stdout + done.stderr).count(finding["advice"]) == 1
    assert re.search(r"memory +\d+\.\d GB in total", done.stdout)


def test_packages_that_do_not_fit_end_with_7_and_both_versions(tmp_path: Path) -> None:
    wheel(tmp_path, "protobuf", "3.20.3")
    package(tmp_path, "onnx", "raise TypeError('Descriptors cannot be created directly')")
    done = run_with(tmp_path, "--json")
    assert done.returncode == 7
    (problem,) = [f for f in json.loads(done.stdout)["findings"] if f["kind"] == "problem"]
    assert "protobuf 3.20.3" in problem["what"]
    assert problem["what"].startswith("onnx ")


def test_a_crash_beside_packages_that_do_not_fit_names_them_and_exits_with_7(tmp_path: Path, small_model: Path) -> None:
    wheel(tmp_path, "protobuf", "3.20.3")
    package(tmp_path, "onnx", "raise TypeError('Descriptors cannot be created directly')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "vit_edge", "inspect", str(small_model / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be imported with protobuf 3.20.3" in done.stderr
