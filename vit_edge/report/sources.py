"""The files that a report is made of: what commands printed with `--json`, records of deployments, models, images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.errors import InputError, printable
from vit_edge.files import may_write, read_file, sha256_hex
from vit_edge.model_file.artifact import MODEL_BYTES, ModelFile, open_model

__all__ = ["Given", "Sources", "Verified", "read_sources", "refusing_others", "target_of"]

SCHEMA = 1
RECORD = "record.json"
_MOST_BYTES = 200_000_000
_COMMANDS = ("verify", "benchmark", "quantize", "deploy")
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_REMEDY = f"give what `vit-edge {' or '.join(_COMMANDS)} --json` printed, {RECORD} of a deployment, or model files"


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Values out of one file that was given, and its name for people."""

    file: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """One verification, from `vit-edge verify`, on a device or here, or from a deployment.

    `engines` has one entry for each, with `reference_top1`, `candidate_top1`, `changed` and more; `folder` is where the
    images lay, `models_sha256` tells which two files were compared.
    """

    file: str
    title: str
    verdict: str
    max_drop_points: float | None
    min_agreement: float | None
    labels: str
    folder: str | None
    models_sha256: str | None
    engines: tuple[Mapping[str, Any], ...]
    explain: Mapping[str, Any] | None = None

    @property
    def worst(self) -> Mapping[str, Any]:
        """Return the engine in which most was lost, by the bound."""
        return max(self.engines, key=lambda entry: (entry["drop_upper_bound_points"], entry["num_changed"]))


@dataclass(kw_only=True, slots=True)
class Sources:
    """Everything that was given, by kind."""

    verified: list[Verified] = field(default_factory=list)
    benchmarks: list[Given] = field(default_factory=list)
    quantized: list[Given] = field(default_factory=list)
    deployed: list[Given] = field(default_factory=list)
    models: list[ModelFile] = field(default_factory=list)
    images: list[tuple[str, str, bytes]] = field(default_factory=list)  # name, media type, bytes

    def pair_of(self, verified: Verified) -> tuple[ModelFile, ModelFile] | None:
        """Return the candidate and its reference among the models given, by their hashes; None where one lacks."""
        for candidate in self.models:
            for reference in self.models:
                if sha256_hex(f"{candidate.sha256} {reference.sha256}".encode()) == verified.models_sha256:
                    return candidate, reference
        return None

    def accuracies(self) -> dict[tuple[str, str], float]:
        """Return the top-1 in per cent by a file's SHA-256 and the engine, of every verification with its models."""
        found: dict[tuple[str, str], float] = {}
        for verified in self.verified:
            pair = self.pair_of(verified)
            for entry in verified.engines if pair else ():
                for model, name in zip(pair or (), ("candidate_top1", "reference_top1"), strict=True):
                    if entry[name] is not None:
                        found[model.sha256, entry["engine"]] = entry[name]
        return found


@contextmanager
def refusing_others(what: str) -> Iterator[None]:
    """Raise InputError, "cannot `what`", where values inside turn out not to be what their command prints."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"results are not what this vit-edge {vit_edge.__version__} prints ({type(error).__name__}: {error})"
        raise InputError(f"cannot {what}", reason=reason[:300], remedy="run the command again") from error


def target_of(out: str | os.PathLike[str], results: Sequence[str | os.PathLike[str]], *, force: bool) -> Path:
    """Return where a report may be written; raises UsageError, also where that is one of the results."""
    for result in results:
        may_write(out, force=force, made_from=result)
    return may_write(out, force=force)


def read_sources(paths: Sequence[str | os.PathLike[str]]) -> Sources:
    """Return what the files hold; a folder is that of a deployment, with its models.

    Raises InputError where one is of no use here, and what `open_model` raises.
    """
    found = Sources()
    for path in map(Path, paths):
        suffix = path.suffix.lower()
        if path.is_dir():
            _add_folder(found, path)
        elif suffix == ".onnx":
            found.models.append(open_model(path, warn=False))
        elif suffix in _IMAGES:
            data = read_file(path, what="image", max_bytes=_MOST_BYTES)
            found.images.append((printable(path.name), _IMAGES[suffix], data))
        else:
            _add_json(found, path)
    by_hash = {model.sha256: model for model in found.models}
    found.models = list(by_hash.values())
    return found


def _add_folder(found: Sources, folder: Path) -> None:
    if not (folder / RECORD).is_file():
        raise InputError("cannot report", file=folder, reason=f"the folder has no {RECORD}", remedy=_REMEDY)
    _add_json(found, folder / RECORD)
    for name in ("model.onnx", "model.int8.onnx"):
        if (folder / name).is_file():
            found.models.append(open_model(folder / name, warn=False))


def _add_json(found: Sources, path: Path) -> None:
    data = read_file(path, what="results", max_bytes=min(_MOST_BYTES, MODEL_BYTES))
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        _add(found, Given(file=printable(path.name), values=values))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"it holds no results ({type(error).__name__}: {error})"[:300]
        raise InputError("cannot report", file=path, reason=reason, remedy=_REMEDY) from error


def _add(found: Sources, given: Given) -> None:
    values = given.values
    if not isinstance(values["schema"], int) or values["schema"] > SCHEMA:
        raise ValueError(f"it has schema {values['schema']!r}; this vit-edge reads {SCHEMA}")
    command = "record" if "steps" in values else values["command"]
    if command in _COMMANDS and "results" not in values and not values.keys() & {"record", "sha256"}:
        told = values.get("error") or {}
        raise ValueError(f"{command} ended with an error: {told.get('reason', 'nothing was found')}")
    if command == "record":
        _add_record(found, given)
    elif command == "deploy":
        _add_record(found, Given(file=given.file, values=values["record"]))
    elif command == "verify":
        found.verified += _verifications(given)
    elif command == "benchmark":
        found.benchmarks.append(given)
    elif command == "quantize":
        found.quantized.append(given)
    else:
        raise ValueError(f"a report has no place for what `vit-edge {command}` prints")


def _add_record(found: Sources, given: Given) -> None:
    values = given.values
    judged = values["steps"]["quantize"]["result"]["verification"]
    files = values["files"]
    both = f"{files['model.int8.onnx']} {files['model.onnx']}"
    found.deployed.append(given)
    found.verified.append(
        Verified(
            file=given.file,
            title="model.int8.onnx",
            verdict=judged["verdict"],
            max_drop_points=judged["max_drop_points"],
            min_agreement=judged["min_agreement"],
            labels=judged["labels"],
            folder=values["folders"]["data"],
            models_sha256=sha256_hex(both.encode()),
            engines=tuple(judged["engines"]),
        )
    )


def _verifications(given: Given) -> list[Verified]:
    """Return the verification that was printed, or those of each device that answered."""
    devices = given.values.get("devices")
    if devices is None:
        return [_verification(given.file, given.values)]
    answered = [device for device in devices if "verdict" in device]
    return [_verification(given.file, device, on=f" on {device['device']}") for device in answered]


def _verification(file: str, values: Mapping[str, Any], *, on: str = "") -> Verified:
    if not values["results"]:
        raise ValueError("it has no result of an engine")
    engines = []
    for entry in values["results"]:
        flat = {key: value for key, value in entry.items() if key not in ("reference", "candidate")}
        for name in ("reference", "candidate"):
            flat |= {f"{name}_{key}": value for key, value in entry[name].items()}
        engines.append(flat)
    return Verified(
        file=file,
        title=f"{Path(values.get('model') or file).name}{on}",
        verdict=values["verdict"],
        max_drop_points=values["max_drop_points"],
        min_agreement=values["min_agreement"],
        labels=values["labels"],
        folder=values.get("data"),
        models_sha256=values.get("models_sha256"),
        engines=tuple(engines),
        explain=values.get("explain"),
    )
