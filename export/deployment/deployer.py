"""The whole way in one call: from a checkpoint to a verified INT8 file, with one verdict and a record of all of it.

A step is skipped where its inputs are what they were and its file is the one it wrote. The record names every input and
output by its hash, so that anybody can hold the files against it later, and run the verification again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import vit_edge
from vit_edge.convert import open_source
from vit_edge.errors import InputError, NotTrusted, UsageError, printable
from vit_edge.export.deployment.commands import step_commands
from vit_edge.export.quantization.quantizer import QuantizationOptions, quantize
from vit_edge.export.quantization.speed import compare_speed, ratio_of_rounds
from vit_edge.export.tracing.exporter import export_onnx
from vit_edge.export.verification.results import Verification
from vit_edge.export.verification.verdict import SEVERITY
from vit_edge.export.verification.verifier import verify
from vit_edge.files import finite, read_file, sha256_hex, write_atomic
from vit_edge.machine.cpu import cpu_name, instruction_set, usable_threads
from vit_edge.model_file.artifact import open_model
from vit_edge.progress import Progress, silent

__all__ = ["Deployment", "DeploymentOptions", "check_record", "deploy", "with_devices"]

SCHEMA = 1
FLOAT_FILE, INTEGER_FILE, RECORD_FILE = "model.onnx", "model.int8.onnx", "record.json"
_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "numpy", "Pillow", "scipy")
_MAX_RECORD_BYTES = 20_000_000

Outcome = Literal["pass", "inconclusive", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentOptions:
    """What is told of the network, as `vit-edge convert` takes it, and how it is quantized."""

    like: str | None = None
    preprocessing: str | os.PathLike[str] | None = None
    labels: str | os.PathLike[str] | None = None
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)

    def __post_init__(self) -> None:
        if self.quantization.budget is None:
            remedy = "give --max-drop or --min-agreement"
            raise UsageError("cannot deploy", reason="nothing says how much may be lost", remedy=remedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """The files in `folder`, the verdict with its two claims, and whether each step was run or skipped."""

    folder: Path
    verdict: Outcome
    claims: tuple[str, ...]
    record: Mapping[str, Any]
    ran: tuple[str, ...]
    skipped: tuple[str, ...]


def deploy(
    source: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: DeploymentOptions,
    progress: Progress = silent,
) -> Deployment:
    """Write `model.onnx`, `model.int8.onnx` and `record.json` into the folder `out`.

    `source` is whatever `convert` reads; images in `data` judge once and may not be among those of `calibration`.
    The verdict passes where the accuracy does in every engine, and INT8 is faster in one, by the lower end of the
    interval. Raises what `convert`, `export_onnx` and `quantize` raise.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: getattr(options, name) for name in ("like", "preprocessing", "labels")}
    asked = replace(options.quantization, measure_speed=False)  # it has a step of its own
    float_file, integer_file = folder / FLOAT_FILE, folder / INTEGER_FILE
    images = {"calibration": folder_sha256(calibration), "data": folder_sha256(data)}
    steps = _Steps(folder)

    def export() -> dict[str, Any]:
        checkpoint = open_source(source, **told, progress=progress)
        return asdict(export_onnx(checkpoint, out=float_file, force=True, progress=progress))

    def integers() -> dict[str, Any]:
        folders = {"calibration": calibration, "data": data}
        return _integers(float_file, integer_file, asked, folders, progress)

    def speed() -> dict[str, Any]:
        models = [open_model(path, warn=False) for path in (float_file, integer_file)]
        return {"engines": [asdict(each) for each in compare_speed(*models, progress=progress)]}

    weights = {"source": _source_sha256(source), **{name: _told_sha256(value) for name, value in told.items()}}
    steps.run("export", {**weights, "versions": versions()}, export, float_file)
    inputs = {"model": _file_sha256(float_file), **images, "options": asdict(asked), "versions": versions()}
    steps.run("quantize", {**inputs, **_machine()}, integers, integer_file)
    files = {path.name: _file_sha256(path) for path in (float_file, integer_file)}
    steps.run("speed", {**files, "versions": versions(), **_machine()}, speed, None)
    verdict, claims = conclude(steps.results["quantize"]["verification"], steps.results["speed"]["engines"])
    paths = {"source": source, "calibration": calibration, "data": data, "model": float_file, "out": integer_file}
    record = {
        "schema": SCHEMA,
        "made_with": {"vit_edge": vit_edge.__version__, "versions": versions(), **_machine()},
        "source": printable(source),
        "folders": {"calibration": printable(calibration), "data": printable(data)},
        "images": images,
        "files": files,
        "commands": step_commands({**paths, "record": folder / RECORD_FILE}, told=told, options=asked),
        "steps": steps.entries,
        "verdict": verdict,
        "claims": claims,
    }
    _write_record(folder, record)
    return Deployment(
        folder=folder,
        verdict=verdict,
        claims=tuple(claims),
        record=record,
        ran=tuple(steps.ran),
        skipped=tuple(steps.skipped),
    )


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomic(
        folder / RECORD_FILE, (json.dumps(finite(record), indent=1, sort_keys=True, default=str) + "\n").encode()
    )


def _integers(
    model: Path, out: Path, options: QuantizationOptions, folders: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Quantize, and return what is recorded of it: the rest stands elsewhere."""
    result = quantize(model, **folders, out=out, options=options, force=True, progress=progress)
    kept = {key: value for key, value in asdict(result).items() if key not in ("verification", "speed", "model")}
    return {**kept, "verification": _judged(result.verification)}


def with_devices(found: Deployment, devices: list[dict[str, Any]]) -> Deployment:
    """Return the deployment judged by its speed on these devices instead of here; the record keeps what they gave.

    Each has `results`, those of `vit-edge benchmark --json` on both files, or an `error`.
    """
    accuracy = found.claims[0]
    claims = [accuracy, *(_claim_of(device) for device in devices)]
    judged = found.record["steps"]["quantize"]["result"]["verification"]["verdict"]
    if "again" in found.record:
        judged = found.record["again"]["quantize"]["verification"]["verdict"]
    outcome: Outcome = judged
    if judged == "pass" and not all(", pass: " in claim for claim in claims[1:]):
        outcome = "fail"
    record = {**found.record, "devices": devices, "verdict": outcome, "claims": claims}
    if "again" not in record:
        _write_record(found.folder, record)
    return replace(found, verdict=outcome, claims=tuple(claims), record=record)


def _claim_of(device: Mapping[str, Any]) -> str:
    """Return in a sentence how much faster INT8 is on a device, in the engine in which that is surest."""
    name = f"{device['device']}{' (emulated)' if device.get('emulated') else ''}"
    by_engine: dict[str, dict[str, Any]] = {}
    for entry in device["results"]:
        by_engine.setdefault(entry["engine"], {})[entry["precision"]] = entry
    pairs = [both for both in by_engine.values() if both.keys() >= {"float32", "int8"}]
    if not pairs:
        return f"speed on {name}, fail: {device.get('error', 'nothing was measured')}"
    found = [(ratio_of_rounds(b["float32"]["by_round_ms"], b["int8"]["by_round_ms"]), b["int8"]) for b in pairs]
    ratio, entry = max(found, key=lambda each: each[0].interval[0])
    low, high = ratio.interval
    golden = "its golden vectors pass, and it is"
    where = f"{entry['engine']} {entry['engine_version']}, {entry['cpu']} ({entry['instruction_set']})"
    return (
        f"speed on {name}, {'pass' if low > 1 else 'fail'}: {golden} {ratio.by_round:.2f} times as fast as float32 "
        f"({low:.2f} to {high:.2f} with 95 % confidence; batch 1, one thread, {where})"
    )


def check_record(
    path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Deployment:
    """Hold the files beside a record against it, verify them again on its images and measure them here.

    `data` is where the images lie now, by default where they lay. Raises NotTrusted where a file or image is not
    the one of the record, and what `verify` raises; the verdict is that of this machine.
    """
    record, folder = read_record(path), Path(path).parent
    for name, expected in record["files"].items():
        found = sha256_hex(read_file(folder / name, what="model file", max_bytes=2**31 - 1))
        if found != expected:
            remedy = "copy it again, or run the deployment again"
            raise NotTrusted("the record is of other files", file=folder / name, reason="it was changed", remedy=remedy)
    images = data or record["folders"]["data"]
    if folder_sha256(images) != record["images"]["data"]:
        reason, remedy = "they are not the images that judged", "give the folder as it was with --data"
        raise NotTrusted("the record is of other images", file=images, reason=reason, remedy=remedy)
    asked = record["steps"]["quantize"]["inputs"]["options"]
    unlabelled = asked["unlabelled"] or asked["max_drop_points"] is None
    verification = verify(
        folder / INTEGER_FILE,
        reference=folder / FLOAT_FILE,
        data=images,
        max_drop_points=asked["max_drop_points"],
        min_agreement=asked["min_agreement"],
        unlabelled=unlabelled,
        progress=progress,
    )
    models = [open_model(folder / name, warn=False) for name in (FLOAT_FILE, INTEGER_FILE)]
    timed = [asdict(each) for each in compare_speed(*models, progress=progress)]
    judged = _judged(verification)
    verdict, claims = conclude(judged, timed)
    again = {"quantize": {"verification": judged}, "speed": {"engines": timed}}
    return Deployment(
        folder=folder,
        verdict=verdict,
        claims=tuple(claims),
        record={**record, "again": again},
        ran=("verify", "speed"),
        skipped=(),
    )


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a record; raises InputError where it is none, or of a later schema."""
    data = read_file(path, what="record", max_bytes=_MAX_RECORD_BYTES)
    try:
        record = json.loads(data)
        if not isinstance(record, dict) or not record.keys() >= {"schema", "files", "folders", "images", "steps"}:
            raise ValueError("it is not a record of `vit-edge deploy`")
        if record["schema"] > SCHEMA:
            raise ValueError(f"it has schema {record['schema']}; this vit-edge reads {SCHEMA}")
        record["steps"]["quantize"]["inputs"]["options"]["max_drop_points"]
        if not set(record["files"]) <= {FLOAT_FILE, INTEGER_FILE}:
            raise ValueError("it names other files than a deployment has")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        remedy = "give the record.json of a deployment"
        raise InputError("cannot use the record", file=path, reason=str(error)[:200], remedy=remedy) from error
    return record


def conclude(judged: Mapping[str, Any], timed: list[dict[str, Any]]) -> tuple[Outcome, list[str]]:
    """Return the verdict, and in a sentence each what was found of accuracy and of speed."""
    worst = max(
        judged["engines"], key=lambda e: (SEVERITY[e["verdict"]], e["drop_upper_bound_points"], e["num_changed"])
    )
    fastest = max(timed, key=lambda each: each["ratio_interval"][0])
    low, high = fastest["ratio_interval"]
    at_most = "" if worst["unlabelled"] == 0 else "at most "
    bound = f"no more than {worst['drop_upper_bound_points']:.2f} with 95 % confidence"
    accuracy = (
        f"accuracy, {judged['verdict']}: on {worst['images']} images INT8 loses {at_most}{worst['drop_points']:.2f} "
        f"points, {bound}; {worst['agreement']:.2f} % of the answers are the same (the worse engine: {worst['engine']})"
    )
    faster = low > 1
    times = f"{fastest['ratio']:.2f} times as fast as float32 in {fastest['engine']}"
    speed = (
        f"speed, {'pass' if faster else 'fail'}: {times} ({low:.2f} to {high:.2f} with 95 % confidence; batch 1, "
        f"one thread, {cpu_name()})"
    )
    outcome: Outcome = judged["verdict"] if judged["verdict"] != "pass" or faster else "fail"
    return outcome, [accuracy, speed]


class _Steps:
    """Steps that ran before are read from the record in `folder`, and skipped where nothing changed."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.ran: list[str] = []
        self.skipped: list[str] = []
        try:
            self._before = read_record(folder / RECORD_FILE)["steps"]
        except InputError:
            self._before = {}

    def run(self, name: str, inputs: Mapping[str, Any], work: Callable[[], dict[str, Any]], out: Path | None) -> None:
        """Run `work`, unless it ran with these inputs and `out` is what it wrote."""
        plain = json.loads(json.dumps(inputs, default=str))
        before = self._before.get(name)
        is_same = isinstance(before, dict) and before.get("inputs") == plain
        if is_same and (out is None or (out.is_file() and _file_sha256(out) == before.get("output"))):
            self.entries[name], self.results[name] = before, before["result"]
            self.skipped.append(name)
            return
        started = time.monotonic()
        result = json.loads(json.dumps(work(), default=str))
        seconds = round(time.monotonic() - started, 1)
        output = None if out is None else _file_sha256(out)
        self.entries[name] = {"inputs": plain, "output": output, "seconds": seconds, "result": result}
        self.results[name] = result
        self.ran.append(name)


def folder_sha256(folder: str | os.PathLike[str]) -> str:
    """Return one hash of the names and bytes of all files below a folder; links to files are followed."""
    root = Path(folder)
    if not root.is_dir():
        remedy = "give the folder of the images"
        raise InputError("cannot read the images", file=folder, reason="it is no folder", remedy=remedy)
    found = [path for path in sorted(root.rglob("*")) if path.is_file()]
    parts = [f"{path.relative_to(root).as_posix()}\0{_file_sha256(path)}" for path in found]
    return sha256_hex("\n".join(parts).encode("utf-8", errors="surrogateescape"))


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide on bytes and figures."""
    return {name: metadata.version(name) for name in _PACKAGES}


def _machine() -> dict[str, Any]:
    return {"cpu": cpu_name(), "instruction_set": instruction_set(), "usable_threads": usable_threads()}


def _source_sha256(source: str | os.PathLike[str]) -> str:
    """Return the hash of a file or folder; a name on a hub stands for itself."""
    path = Path(source)
    if path.is_dir():
        return folder_sha256(path)
    return _file_sha256(path) if path.is_file() else os.fspath(source)


def _file_sha256(path: Path) -> str:
    return sha256_hex(path.read_bytes())


def _told_sha256(value: str | os.PathLike[str] | None) -> str | None:
    return None if value is None else _source_sha256(value)


def _judged(verification: Verification | None) -> dict[str, Any]:
    assert verification is not None  # there is a budget, and images that judge
    return {
        "verdict": verification.verdict,
        "labels": verification.labels,
        "max_drop_points": verification.max_drop_points,
        "min_agreement": verification.min_agreement,
        "data_sha256": verification.data_sha256,
        "engines": [asdict(result) for result in verification.results],
    }
