"""The inputs of a report: the output of commands with `--json`, records of deployments, model files, images."""

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
from vit_edge.export.deployment.record import FLOAT32_FILE, INT8_FILE, RECORD_FILE, verification_of
from vit_edge.files import may_write, read_file, sha256_hex
from vit_edge.model_file.artifact import MODEL_BYTES, ModelFile, open_model

__all__ = ["Given", "Sources", "Verified", "VerifiedEncoder", "read_sources", "refusing_others", "target_of"]

SCHEMA = 1
_MOST_BYTES = 200_000_000
_COMMANDS = ("verify", "explain", "benchmark", "quantize", "deploy")
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_REMEDY = (
    f"give the output of `vit-edge {'|'.join(_COMMANDS)} --json`, the {RECORD_FILE} of a deployment, or model files"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """The values in one input file, and its name for people."""

    file: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """One verification, from `vit-edge verify`, on a device or here, or from a deployment.

    `engines` has one entry for each, with `reference_top1`, `candidate_top1`, `changed` and more; `folder` is that of
    the images, `models_sha256` identifies the two files that were compared.
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

    @property
    def worst(self) -> Mapping[str, Any]:
        """Return the engine with the largest loss, by the bound."""
        return max(self.engines, key=lambda entry: (entry["drop_upper_bound_points"], entry["num_changed"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedEncoder:
    """One verification of an encoder; `engines` has one entry for each, with `neighbours`, cosines and more."""

    title: str
    verdict: str
    min_neighbours: float | None
    max_drop_points: float | None
    models_sha256: str | None
    method: str
    engines: tuple[Mapping[str, Any], ...]

    @property
    def worst(self) -> Mapping[str, Any]:
        """Return the engine that keeps the fewest neighbours, by the bound."""
        return min(self.engines, key=lambda entry: float(entry["neighbours"][-1]["lower_bound"]))


@dataclass(kw_only=True, slots=True)
class Sources:
    """All inputs, by kind."""

    verified: list[Verified] = field(default_factory=list)
    encoders: list[VerifiedEncoder] = field(default_factory=list)
    explained: list[Given] = field(default_factory=list)
    benchmarks: list[Given] = field(default_factory=list)
    quantized: list[Given] = field(default_factory=list)
    deployed: list[Given] = field(default_factory=list)
    models: list[ModelFile] = field(default_factory=list)
    images: list[tuple[str, str, bytes]] = field(default_factory=list)  # name, media type, bytes

    def pair_of(self, verified: Verified | VerifiedEncoder) -> tuple[ModelFile, ModelFile] | None:
        """Return the candidate and its reference among the models, by their hashes; None if one is missing."""
        for candidate in self.models:
            for reference in self.models:
                if sha256_hex(f"{candidate.sha256} {reference.sha256}".encode()) == verified.models_sha256:
                    return candidate, reference
        return None

    def accuracies(self) -> dict[tuple[str, str], float]:
        """Return top-1 in percent by SHA-256 of a file and engine, from every verification whose models are given."""
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
    """Raise InputError, "cannot `what`", if values inside are not what their command prints."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"results are not what this vit-edge {vit_edge.__version__} prints ({type(error).__name__}: {error})"
        raise InputError(f"cannot {what}", reason=reason[:300], remedy="run the command again") from error


def target_of(out: str | os.PathLike[str], results: Sequence[str | os.PathLike[str]], *, force: bool) -> Path:
    """Return where a report may be written; raises UsageError, also if that is one of the results."""
    for result in results:
        may_write(out, force=force, made_from=result)
    return may_write(out, force=force)


def read_sources(paths: Sequence[str | os.PathLike[str]]) -> Sources:
    """Return the contents of the files; a folder is that of a deployment, with its models.

    Raises InputError if a file holds no results, and what `open_model` raises.
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
    if not (folder / RECORD_FILE).is_file():
        raise InputError("cannot report", file=folder, reason=f"the folder has no {RECORD_FILE}", remedy=_REMEDY)
    _add_json(found, folder / RECORD_FILE)
    for name in (FLOAT32_FILE, INT8_FILE):
        if (folder / name).is_file():
            found.models.append(open_model(folder / name, warn=False))


def _add_json(found: Sources, path: Path) -> None:
    data = read_file(path, what="results", max_bytes=min(_MOST_BYTES, MODEL_BYTES))
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        _add(found, Given(file=printable(path.name), values=values), path.parent)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"the file holds no results ({type(error).__name__}: {error})"[:300]
        raise InputError("cannot report", file=path, reason=reason, remedy=_REMEDY) from error


def _add(found: Sources, given: Given, folder: Path) -> None:
    values = given.values
    if not isinstance(values["schema"], int) or values["schema"] > SCHEMA:
        raise ValueError(f"schema {values['schema']!r} is not supported; this vit-edge reads {SCHEMA}")
    command = "record" if "steps" in values else values["command"]
    if command in _COMMANDS and not values.keys() & {"results", "record", "sha256", "stages"}:
        error = values.get("error") or {}
        raise ValueError(f"{command} ended with an error: {error.get('reason', 'no results')}")
    if command == "record":
        _add_record(found, given, folder)
    elif command == "deploy":
        _add_record(found, Given(file=given.file, values=values["record"]), Path(values["folder"]))
    elif command == "verify":
        for title, each in _verified(given):
            if each.get("kind") == "encoder":
                found.encoders.append(_encoder(title, each))
            else:
                found.verified.append(_verification(given.file, title, each))
    elif command == "explain":
        found.explained.append(given)
    elif command == "benchmark":
        found.benchmarks.append(given)
    elif command == "quantize":
        found.quantized.append(given)
    else:
        raise ValueError(f"a report cannot show the output of `vit-edge {command}`")


def _add_record(found: Sources, given: Given, folder: Path) -> None:
    """Add a deployment; the paths in its record are relative to `folder`, where the record is."""
    values, verification = given.values, verification_of(given.values)
    files, images = values["files"], folder / values["folders"]["data"]
    both = f"{files[INT8_FILE]} {files[FLOAT32_FILE]}"
    engines = [dict(entry) for entry in verification["engines"]]
    for entry in engines:
        entry["changed"] = [{**change, "path": str(images / change["path"])} for change in entry["changed"]]
    found.deployed.append(given)
    found.verified.append(
        Verified(
            file=given.file,
            title=INT8_FILE,
            verdict=verification["verdict"],
            max_drop_points=verification["max_drop_points"],
            min_agreement=verification["min_agreement"],
            labels=verification["labels"],
            folder=str(images),
            models_sha256=sha256_hex(both.encode()),
            engines=tuple(engines),
        )
    )


def _verified(given: Given) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the title and the values of the verification that was printed, or of each device with a result."""
    name = Path(given.values.get("model") or given.file).name
    devices = given.values.get("devices")
    if devices is None:
        yield name, given.values
        return
    for device in devices:
        if "verdict" in device:
            yield f"{Path(device.get('model') or given.file).name} on {device['device']}", device


def _encoder(title: str, values: Mapping[str, Any]) -> VerifiedEncoder:
    if not values["results"]:
        raise ValueError("no result of an engine")
    return VerifiedEncoder(
        title=title,
        verdict=values["verdict"],
        min_neighbours=values["min_neighbours"],
        max_drop_points=values["max_drop_points"],
        models_sha256=values.get("models_sha256"),
        method=values["neighbours_method"],
        engines=tuple(values["results"]),
    )


def _verification(file: str, title: str, values: Mapping[str, Any]) -> Verified:
    if not values["results"]:
        raise ValueError("no result of an engine")
    engines = []
    for entry in values["results"]:
        flat = {key: value for key, value in entry.items() if key not in ("reference", "candidate")}
        for name in ("reference", "candidate"):
            flat |= {f"{name}_{key}": value for key, value in entry[name].items()}
        engines.append(flat)
    return Verified(
        file=file,
        title=title,
        verdict=values["verdict"],
        max_drop_points=values["max_drop_points"],
        min_agreement=values["min_agreement"],
        labels=values["labels"],
        folder=values.get("data"),
        models_sha256=values.get("models_sha256"),
        engines=tuple(engines),
    )
