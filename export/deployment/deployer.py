"""From a checkpoint to a verified INT8 file in one call, with one verdict and a record of every step.

A step is skipped if its inputs did not change and its file is the one it wrote. The record names every input and
output by its hash, so that anybody can check the files later and run the verification again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vit_edge.conversion.label_names import read_labels
from vit_edge.errors import NotTrusted, UsageError
from vit_edge.export.deployment.claims import Claim, accuracy_claim, device_claim, speed_claim, worst_verdict
from vit_edge.export.deployment.commands import step_commands
from vit_edge.export.deployment.record import (
    FLOAT32_FILE,
    INT8_FILE,
    SCHEMA,
    content_sha256,
    file_sha256,
    folder_sha256,
    machine,
    made_with,
    read_record,
    relative,
    speed_of,
    verification_of,
    versions,
    write_record,
)
from vit_edge.export.deployment.steps import Steps
from vit_edge.export.onnx_import.importer import import_onnx, is_third_party_onnx
from vit_edge.export.quantization.options import QuantizationOptions
from vit_edge.export.quantization.quantizer import quantize
from vit_edge.export.quantization.speed import compare_speed
from vit_edge.export.sources.opener import open_network
from vit_edge.export.sources.torch_network import settled_preprocessing
from vit_edge.export.tracing.exporter import export_onnx
from vit_edge.export.verification.flips import path_below
from vit_edge.export.verification.results import Verification
from vit_edge.export.verification.verdict import Verdict
from vit_edge.export.verification.verifier import verify
from vit_edge.files import is_file, read_file, sha256_hex
from vit_edge.machine.noise import Watch
from vit_edge.model_file.artifact import MODEL_BYTES, open_model
from vit_edge.model_file.writing import write_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.notebook import html_table

__all__ = ["Deployment", "DeploymentOptions", "check_record", "deploy", "with_devices"]

_Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentOptions:
    """What the user specifies of the network, as for `vit-edge convert`, and how the network is quantized.

    Without `measure_speed` accuracy alone decides.
    """

    like: str | None = None
    preprocessing: str | os.PathLike[str] | None = None
    labels: str | os.PathLike[str] | None = None
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    measure_speed: bool = True

    def __post_init__(self) -> None:
        if self.quantization.budget is None:
            remedy = "give --max-drop or --min-agreement"
            raise UsageError("cannot deploy", reason="there is no accuracy budget", remedy=remedy)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Deployment:
    """The files in `folder`, the verdict with the claims that it rests on, and which steps ran or were skipped."""

    folder: Path
    verdict: Verdict
    claims: tuple[Claim, ...]
    record: Mapping[str, Any]
    ran: tuple[str, ...]
    skipped: tuple[str, ...]

    def __repr__(self) -> str:
        claims = ", ".join(f"{claim.subject} {claim.verdict}" for claim in self.claims)
        return f"<Deployment {self.folder}: {self.verdict} ({claims})>"

    def _repr_html_(self) -> str:
        rows = [(claim.subject, claim.verdict, claim.text) for claim in self.claims]
        return html_table(f"{self.folder}: {self.verdict}", ("claim", "verdict", "figures"), rows)


def deploy(
    source: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: DeploymentOptions,
    progress: Progress = silent,
) -> Deployment:
    """Write `model.onnx`, `model.int8.onnx` and `record.json` into the folder `out`, and return the verdict.

        >>> quantization = QuantizationOptions(max_drop_points=1, effort="fast")
        >>> options = DeploymentOptions(quantization=quantization, measure_speed=False)
        >>> folders = {"calibration": "images/train", "data": "images/test", "out": "deploy"}
        >>> deploy("run/best.safetensors", **folders, options=options)
        <Deployment deploy: ... (accuracy ...)>

    `source` is anything that `vit-edge export` takes; the images in `data` must not overlap those in `calibration`. The
    verdict is `pass` if the accuracy is certified in every engine, and INT8 is faster in one of them, by the lower end
    of the 95 % interval. Raises what `open_network`, `export_onnx` and `quantize` raise.
    """
    job = _Job(
        source=source,
        calibration=calibration,
        data=data,
        folder=Path(out),
        options=options,
        images={
            "calibration": folder_sha256(calibration, option="--calibration", progress=progress),
            "data": folder_sha256(data, progress=progress),
        },
        progress=progress,
    )
    job.folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(job.folder)
    job.run(steps)
    record = job.record(steps)
    return _concluded(job.folder, record, _claims(record), ran=steps.ran, skipped=steps.skipped)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One deployment: its inputs, the folder it fills, and its steps."""

    source: _Path
    calibration: _Path
    data: _Path
    folder: Path
    options: DeploymentOptions
    images: Mapping[str, str]
    progress: Progress

    @property
    def network(self) -> dict[str, _Path | None]:
        return {name: getattr(self.options, name) for name in ("like", "preprocessing", "labels")}

    @property
    def quantization(self) -> QuantizationOptions:
        return replace(self.options.quantization, measure_speed=False)  # speed is a step by itself

    def run(self, steps: Steps) -> None:
        """Run the steps in order; each has what it depends on as its inputs."""
        float_file, int8_file = self.folder / FLOAT32_FILE, self.folder / INT8_FILE
        weights = {"source": content_sha256(self.source), **{n: content_sha256(v) for n, v in self.network.items()}}
        steps.run("export", {**weights, "versions": versions()}, self._export, float_file)
        options = {**self.images, "options": asdict(self.quantization), "versions": versions(), **machine()}
        steps.run("quantize", {"model": file_sha256(float_file), **options}, self._quantize, int8_file)
        if self.options.measure_speed:
            files = {path.name: file_sha256(path) for path in (float_file, int8_file)}
            inputs = {**files, "versions": versions(), **machine()}
            steps.run("speed", inputs, lambda: _measured(self.folder, self.progress))

    def _export(self) -> dict[str, Any]:
        options = self.options
        if is_third_party_onnx(self.source):
            return self._import()
        if is_file(self.source) and Path(self.source).suffix.lower() == ".onnx":
            return self._taken()
        network = open_network(
            self.source,
            like=options.like,
            preprocessing=options.preprocessing,
            labels=options.labels,
            progress=self.progress,
        )
        return asdict(export_onnx(network, out=self.folder / FLOAT32_FILE, force=True, progress=self.progress))

    def _taken(self) -> dict[str, Any]:
        """Take a float32 model file as it is: it was exported before."""
        model, refused = open_model(self.source), ""
        if given := [f"--{name}" for name, value in self.network.items() if value is not None]:
            refused = f"{given[0]} is for checkpoints and third-party models; this file has a manifest"
        elif model.manifest.precision != "float32":
            refused = f"the file is {model.manifest.precision} already"
        elif model.manifest.is_encoder:
            refused = "the file is an encoder, which has no classes"
        if refused:
            remedy = "give the float32 model file of a classifier, or its checkpoint, and no options for it"
            raise UsageError("cannot deploy", file=self.source, reason=refused, remedy=remedy)
        out = self.folder / FLOAT32_FILE
        write_model(out, model)
        size_bytes = len(model.data) + len(model.weights or b"")
        return {"model": out, "sha256": model.sha256, "size_bytes": size_bytes, "parity": []}

    def _import(self) -> dict[str, Any]:
        """Import a third-party ONNX model, which has no preprocessing and labels of its own."""
        options, out = self.options, self.folder / FLOAT32_FILE
        if options.preprocessing is None or options.labels is None:
            reason = "the file is a third-party ONNX model; its preprocessing and labels must be specified"
            raise UsageError(
                "cannot deploy", file=self.source, reason=reason, remedy="give --preprocessing and --labels"
            )
        preprocessing, assumed = settled_preprocessing(options.preprocessing)
        result = import_onnx(
            self.source,
            out=out,
            force=True,
            preprocessing=preprocessing,
            labels=read_labels(options.labels),
            assumed=assumed,
            progress=self.progress,
        )
        size_bytes, parity = len(result.model.data), [asdict(entry) for entry in result.parity]
        return {"model": out, "sha256": result.model.sha256, "size_bytes": size_bytes, "parity": parity}

    def _quantize(self) -> dict[str, Any]:
        """Quantize, and return what is recorded of it: the rest has a place of its own."""
        result = quantize(
            self.folder / FLOAT32_FILE,
            calibration=self.calibration,
            data=self.data,
            out=self.folder / INT8_FILE,
            options=self.quantization,
            force=True,
            progress=self.progress,
        )
        assert isinstance(result.verification, Verification)  # there are evaluation images, and it is a classifier
        kept = {key: value for key, value in asdict(result).items() if key not in ("verification", "speed", "model")}
        return {**kept, "verification": _verification_data(result.verification)}

    def record(self, steps: Steps) -> dict[str, Any]:
        """Return the record, its claims and verdict apart."""
        folders = {"calibration": relative(self.calibration, self.folder), "data": relative(self.data, self.folder)}
        commands = step_commands(
            self.source, images=folders, network=self.network, options=self.quantization, folder=self.folder
        )
        if not steps.entries["export"]["result"]["parity"]:  # a model file was taken as it is
            del commands["export"]
        return {
            "schema": SCHEMA,
            "made_with": made_with(),
            "source": relative(self.source, self.folder),
            "folders": folders,
            "images": self.images,
            "files": {name: file_sha256(self.folder / name) for name in (FLOAT32_FILE, INT8_FILE)},
            "commands": {name: line for name, line in commands.items() if name in steps.entries or name == "check"},
            "steps": steps.entries,
        }


def check_record(
    path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    measure_speed: bool = True,
    progress: Progress = silent,
) -> Deployment:
    """Check the files next to a record, verify them again, measure them here, and bring the record up to date.

    `data` is the folder of the evaluation images if they moved; the record's paths are relative to the record. Speed is
    measured unless the deployment left it out. Raises NotTrusted if a file or image is not the one of the record, and
    what `verify` raises; the verdict is that of this machine.
    """
    record, folder = read_record(path), Path(path).parent
    _check_files(record, folder)
    images = folder / record["folders"]["data"] if data is None else Path(data)
    _check_images(record, images, progress)
    options = record["steps"]["quantize"]["inputs"]["options"]
    verification = verify(
        folder / INT8_FILE,
        reference=folder / FLOAT32_FILE,
        data=images,
        max_drop_points=options["max_drop_points"],
        min_agreement=options["min_agreement"],
        unlabelled=options["unlabelled"] or options["max_drop_points"] is None,
        progress=progress,
    )
    with_speed = measure_speed and "speed" in record["steps"]
    check = {
        "made_with": made_with(),
        "verification": _verification_data(verification),
        "speed": _measured(folder, progress) if with_speed else None,
    }
    folders = {**record["folders"], "data": relative(images, folder)}
    current = {**record, "folders": folders, "check": check}
    current.pop("devices", None)  # they were measured before this check
    ran = ("verify", "speed") if with_speed else ("verify",)
    return _concluded(folder, current, _claims(current), ran=ran)


def with_devices(found: Deployment, devices: Sequence[Mapping[str, Any]]) -> Deployment:
    """Return the deployment with its speed claims made on these devices instead of on this machine.

    Each has `results`, those of `vit-edge benchmark --json` on both files, or an `error`.
    """
    record = {**found.record, "devices": list(devices)}
    claims = [found.claims[0], *map(device_claim, devices)]
    return _concluded(found.folder, record, claims, ran=found.ran, skipped=found.skipped)


def _claims(record: Mapping[str, Any]) -> list[Claim]:
    speed = speed_of(record)
    claims = [accuracy_claim(verification_of(record))]
    return claims if speed is None else [*claims, speed_claim(speed["engines"], speed["noise"])]


def _concluded(
    folder: Path,
    record: Mapping[str, Any],
    claims: Sequence[Claim],
    *,
    ran: Sequence[str],
    skipped: Sequence[str] = (),
) -> Deployment:
    """Return the deployment with these claims and their verdict; write its record with both."""
    verdict = worst_verdict(claims)
    concluded = {**record, "verdict": verdict, "claims": [asdict(claim) for claim in claims]}
    write_record(folder, concluded)
    return Deployment(
        folder=folder,
        verdict=verdict,
        claims=tuple(claims),
        record=concluded,
        ran=tuple(ran),
        skipped=tuple(skipped),
    )


def _measured(folder: Path, progress: Progress) -> dict[str, Any]:
    """Return how fast both files are here, and what disturbed the measurement."""
    reference, candidate = (open_model(folder / name, warn=False) for name in (FLOAT32_FILE, INT8_FILE))
    watch = Watch()
    engines = [asdict(each) for each in compare_speed(reference, candidate, progress=progress)]
    return {"engines": engines, "noise": list(watch.stop().said)}


def _check_files(record: Mapping[str, Any], folder: Path) -> None:
    for name, expected in record["files"].items():
        found = sha256_hex(read_file(folder / name, what="model file", max_bytes=MODEL_BYTES))
        if found != expected:
            reason, remedy = "the file is not the one in the record", "copy the file again, or deploy again"
            raise NotTrusted("cannot check the deployment", file=folder / name, reason=reason, remedy=remedy)


def _check_images(record: Mapping[str, Any], images: Path, progress: Progress) -> None:
    if folder_sha256(images, progress=progress) != record["images"]["data"]:
        reason = "the folder does not hold the evaluation images of the record, unchanged"
        remedy = "give their folder with --data, or deploy again"
        raise NotTrusted("cannot check the deployment", file=images, reason=reason, remedy=remedy)


def _verification_data(verification: Verification) -> dict[str, Any]:
    """Return what a record keeps of a verification; its images by their path below the folder."""
    engines = [asdict(result) for result in verification.results]
    for change in (change for engine in engines for change in engine["changed"]):
        change["path"] = path_below(change["path"], verification.data)
    return {
        "verdict": verification.verdict,
        "labels": verification.labels,
        "max_drop_points": verification.max_drop_points,
        "min_agreement": verification.min_agreement,
        "data_sha256": verification.data_sha256,
        "engines": engines,
    }
