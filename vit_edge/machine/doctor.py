"""What this machine has to run a model with, what is wrong with it, and what to do: `vit-edge doctor`.

It needs what a device has and no more: engines are asked in subprocesses, so that a driver or a wheel built
for another CPU can crash there (onnxruntime#23957) and is reported here.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vit_edge import __version__
from vit_edge.errors import version_of
from vit_edge.machine.cpu import Instructions, cpu_report, is_arm
from vit_edge.machine.int8_engines import lacks_int8_matmul
from vit_edge.machine.targets import TARGETS, choose
from vit_edge.model_file.onnx_schema import one_node

__all__ = ["EXTRAS", "Finding", "examine", "findings"]

# extra -> (what it is for, the packages it installs); as in setup.cfg
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnxruntime": ("run models in ONNX Runtime", ("onnxruntime",)),
    "openvino": ("run models in OpenVINO", ("openvino",)),
    "export": (
        "export, quantize, verify, report",
        (
            "torch",
            "torchvision",
            "onnx",
            "onnxscript",
            "safetensors",
            "scipy",
            "openvino",
            "threadpoolctl",
            "jinja2",
            "pyyaml",
        ),
    ),
    "train": (
        "train",
        ("torch", "torchvision", "safetensors", "filelock", "matplotlib", "tensorboard", "tomli-w"),
    ),
    "timm": ("weights and networks of timm", ("timm",)),
    "huggingface": ("weights from Hugging Face", ("huggingface_hub", "transformers")),
}
# They all install the folder `onnxruntime` and overwrite each other's files (onnxruntime#26996).
_ONNXRUNTIME_WHEELS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-directml",
    "onnxruntime-silicon",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
# The current folder is left out: a file of that name there is not the engine.
_PREAMBLE = "import json, sys; sys.path[:] = [p for p in sys.path if p]; sys.modules['openvino_telemetry'] = None; "
_QUESTIONS = {
    "onnxruntime": "import onnxruntime as e; d = e.get_available_providers()",
    "openvino": "import openvino as e; d = e.Core().available_devices",
}
# Not devices of this machine: one is always present, the other calls a server.
_NOT_TRIED = ("CPUExecutionProvider", "AzureExecutionProvider")
_TRIALS = {
    "onnxruntime": (
        "import base64, onnxruntime as e; s = e.SessionOptions(); s.log_severity_level = 4; "
        "s.add_session_config_entry('session.disable_cpu_ep_fallback', '1'); "
        "r = e.InferenceSession(base64.b64decode(sys.argv[2]), s, providers=[sys.argv[1]], enable_fallback=0); "
        "assert r.get_providers()[0] == sys.argv[1], f'it runs on {r.get_providers()[0]}'"
    ),
    "openvino": (
        "import base64, openvino as e; c = e.Core(); "
        "c.compile_model(c.read_model(base64.b64decode(sys.argv[2])), sys.argv[1]).create_infer_request()"
    ),
}
_ANSWER = "; print(json.dumps({'version': e.__version__.split('-')[0], 'devices': list(d)}))"
_PATIENCE_S = 120
# A ViT-B in float32 with ONNX Runtime takes about this much.
_LITTLE_MEMORY_BYTES = 600_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found and what to do about it: a problem stops models from running, advice betters them."""

    kind: Literal["problem", "advice"]
    what: str
    advice: str


def examine() -> dict[str, Any]:
    """Return what this machine has, what was found, and the target advised, as JSON-ready values."""
    cpu = cpu_report()
    installed = _installed()
    engines = [_ask(name) for name in _QUESTIONS]
    report: dict[str, Any] = {
        "vit_edge": __version__,
        "system": platform.platform(),
        "python": {"version": platform.python_version(), "bits": struct.calcsize("P") * 8},
        "cpu": cpu,
        "memory": _memory(),
        "engines": engines,
        "misfits": _misfits(installed),
        "onnxruntime_wheels": {name: installed[name] for name in _ONNXRUNTIME_WHEELS if name in installed},
        "missing_extras": _missing_extras(installed),
    }
    chosen, reason = choose(report)
    report["target"] = {"name": chosen.name, "verified": chosen.verified, "reason": reason}
    report["other_targets"] = _other_targets(engines, cpu["board"] or "")
    report["findings"] = [asdict(finding) for finding in findings(report)]
    return report


def findings(report: Mapping[str, Any]) -> list[Finding]:
    """Return what a report shows to be wrong or improvable, problems first."""
    found = [
        *_engine_findings(report),
        *_cpu_findings(report["cpu"]),
        *_int8_findings(report),
        *_memory_findings(report["memory"]),
    ]
    if report["python"]["bits"] < 64:
        what = f"Python has {report['python']['bits']} bits"
        advice = "install a 64-bit system: engines have no wheels for others"
        found.append(Finding(kind="problem", what=what, advice=advice))
    return sorted(found, key=lambda finding: finding.kind != "problem")


def _engine_findings(report: Mapping[str, Any]) -> list[Finding]:
    found = []
    wheels = report["onnxruntime_wheels"]
    if len(wheels) > 1:
        what = f"{len(wheels)} builds of ONNX Runtime are installed over each other: {', '.join(wheels)}"
        advice = f'pip uninstall -y {" ".join(wheels)}, then pip install "vit-edge[onnxruntime]" or "vit-edge[gpu]"'
        found.append(Finding(kind="problem", what=what, advice=advice))
    for misfit in report.get("misfits", ()):
        advice = f"pip install --upgrade {misfit['package'].split()[0]} {misfit['beside'].split()[0]}"
        what = f"{misfit['package']} cannot be imported with {misfit['beside']} ({misfit['why']})"
        found.append(Finding(kind="problem", what=what, advice=advice))
    for engine in report["engines"]:
        if engine["installed"] and engine["error"]:
            advice = f"install another release of {engine['name']}"
            found.append(Finding(kind="problem", what=f"{engine['name']} {engine['error']}", advice=advice))
        for device, why in engine.get("do_not_load", {}).items():
            advice = "install the driver and the libraries that it asks for; until then --device cpu"
            what = f"{engine['name']} lists {device}, which does not load: {why}"
            found.append(Finding(kind="advice", what=what, advice=advice))
    if not any(engine["installed"] for engine in report["engines"]):
        advice = 'pip install "vit-edge[onnxruntime]" or pip install "vit-edge[openvino]"'
        found.append(Finding(kind="problem", what="no inference engine is installed", advice=advice))
    for other in report["other_targets"]:
        advice = f"quantize for that device with --target {other['name']} (unverified), and name it with --device"
        found.append(Finding(kind="advice", what=other["reason"], advice=advice))
    return found


def _int8_findings(report: Mapping[str, Any]) -> list[Finding]:
    """Return the advice for OpenVINO on a CPU where its INT8 MatMul is slower than float32."""
    found = Instructions(
        names=frozenset(report["cpu"]["instructions"]), complete=bool(report["cpu"].get("instructions_complete"))
    )
    runs = any(e["name"] == "openvino" and e["installed"] and not e["error"] for e in report["engines"])
    if not runs or not lacks_int8_matmul(report["cpu"]["machine"], found):
        return []
    what = "openvino runs MatMul of INT8 files in float32 on this CPU: its INT8 kernels are slower"
    advice = "run portable files in onnxruntime, or quantize with --target openvino-avx2"
    return [Finding(kind="advice", what=what, advice=advice)]


def _cpu_findings(cpu: Mapping[str, Any]) -> list[Finding]:
    found = []  # a missing VNNI is the reason of the target
    present = set(cpu["instructions"])
    if is_arm(cpu["machine"]) and not present & set(TARGETS["arm-dotprod"].instructions):
        advice = "INT8 gains little here: compare it with float by `vit-edge benchmark`"
        found.append(Finding(kind="advice", what="the CPU has no dot products of 8 bits", advice=advice))
    if cpu["usable_threads"] < cpu["cpus"]:
        what = f"{cpu['usable_threads']} of {cpu['cpus']} CPUs are granted to this process"
        advice = f"vit-edge starts {cpu['usable_threads']} threads; set the same number in other software"
        found.append(Finding(kind="advice", what=what, advice=advice))
    slow = [name for name in cpu["governors"] if name != "performance"]
    if slow:
        advice = "latencies vary with the clock; to measure: sudo cpupower frequency-set -g performance"
        found.append(Finding(kind="advice", what=f"the frequency governor is {', '.join(slow)}", advice=advice))
    return found


def _memory_findings(memory: Mapping[str, int | None]) -> list[Finding]:
    free = memory["available_bytes"]
    if free is None or free >= _LITTLE_MEMORY_BYTES:
        return []
    advice = "stop other programs; an INT8 file takes a quarter of the float one's memory for weights"
    return [Finding(kind="advice", what=f"only {free / 1e9:.1f} GB of memory are free", advice=advice)]


def _other_targets(engines: Sequence[Mapping[str, Any]], board: str) -> list[dict[str, str]]:
    """Return the targets of devices other than the CPU that load."""
    devices = {d for engine in engines for d in engine["devices"] if d not in engine.get("do_not_load", {})}
    found = {}
    if any(device.split(".")[0] == "NPU" for device in devices):
        found["openvino-npu"] = "OpenVINO lists an NPU"
    if "QNNExecutionProvider" in devices:
        found["qnn"] = "ONNX Runtime was built with QNN"
    if "TensorrtExecutionProvider" in devices and (Path("/dev/nvidia0").exists() or "jetson" in board.lower()):
        found["tensorrt"] = "there is an NVIDIA GPU, and ONNX Runtime was built with TensorRT"
    return [{"name": name, "reason": reason} for name, reason in found.items()]


def _ask(name: str) -> dict[str, Any]:
    """Return an engine's version, the devices it lists and those that do not load, asked in subprocesses."""
    answer: dict[str, Any] = {"name": name, "installed": True, "version": None, "devices": [], "error": None}
    answer["do_not_load"] = {}
    command = [sys.executable, "-c", f"{_PREAMBLE}{_QUESTIONS[name]}{_ANSWER}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        return {**answer, "error": f"was not tried: Python cannot be started ({error.strerror})"}
    except subprocess.TimeoutExpired:
        return {**answer, "error": f"gave no answer in {_PATIENCE_S} seconds"}
    errors = _lines(done.stderr)
    if errors and errors[-1] == f"ModuleNotFoundError: No module named '{name}'":
        return {**answer, "installed": False}
    if done.returncode:
        return {**answer, "error": _why(done.returncode, errors)}
    try:
        # The last line: drivers print on stdout too.
        answer |= json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {**answer, "error": "gave an answer that cannot be read"}
    tried = {device: _try(name, device) for device in answer["devices"] if device not in _NOT_TRIED}
    return {**answer, "do_not_load": {device: why for device, why in tried.items() if why is not None}}


def _try(engine: str, device: str) -> str | None:
    """Return why a device that an engine lists does not run a graph of one node, or None where it does.

    Builds with CUDA list it on machines that have no GPU. It is tried in a subprocess.
    """
    graph = base64.b64encode(one_node()).decode("ascii")
    command = [sys.executable, "-c", f"{_PREAMBLE}{_TRIALS[engine]}", device, graph]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no answer in {_PATIENCE_S} seconds"
    errors = _lines(done.stderr)
    if done.returncode < 0:
        return f"a crash ({_signal(-done.returncode)})"
    return (errors[-1][:300] if errors else f"exit {done.returncode}") if done.returncode else None


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").strip().splitlines()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _why(returncode: int, errors: Sequence[str]) -> str:
    if returncode > 0:
        return f"cannot be imported ({errors[-1][:200] if errors else f'exit {returncode}'})"
    name = _signal(-returncode)
    built = ": the wheel was built for newer CPUs" if name == "SIGILL" else ""
    return f"crashed while it listed its devices ({name}{built})"


def _installed() -> dict[str, str]:
    """Return the version of every package that extras and engines are about, by name."""
    names = {package for _, packages in EXTRAS.values() for package in packages} | set(_ONNXRUNTIME_WHEELS)
    versions = {name: version_of(name) for name in sorted(names)}
    return {name: version for name, version in versions.items() if version is not None}


def _misfits(installed: Mapping[str, str]) -> list[dict[str, str]]:
    """Return onnx, if it cannot be imported with the protobuf that is installed, and why."""
    if "onnx" not in installed:
        return []
    command = [sys.executable, "-c", f"{_PREAMBLE}import onnx"]
    done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=False, stdin=subprocess.DEVNULL)
    if not done.returncode:
        return []
    errors = _lines(done.stderr)
    why = errors[-1][:200] if errors and done.returncode > 0 else f"exit {done.returncode}"
    return [{"package": f"onnx {installed['onnx']}", "beside": f"protobuf {version_of('protobuf')}", "why": why}]


def _missing_extras(installed: Mapping[str, str]) -> list[dict[str, Any]]:
    some_onnxruntime = bool(installed.keys() & set(_ONNXRUNTIME_WHEELS))
    missing = []
    for extra, (purpose, packages) in EXTRAS.items():
        absent = [name for name in packages if name not in installed]
        if absent and not (extra == "onnxruntime" and some_onnxruntime):
            command = f'pip install "vit-edge[{extra}]"'
            missing.append({"extra": extra, "for": purpose, "missing": absent, "command": command})
    return missing


def _memory() -> dict[str, int | None]:
    """Return all, the free and the granted memory in bytes; None if the system does not report it."""
    return {
        "total_bytes": _meminfo("MemTotal") or _physical_bytes(),
        "available_bytes": _meminfo("MemAvailable"),
        "limit_bytes": _memory_limit(),
    }


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration, ValueError):
        return None


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _memory_limit() -> int | None:
    """Return the memory that the control group grants (version 2, then 1), or None where it grants all."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or "max"
            continue
        return limit if limit < 2**60 else None
    return None
