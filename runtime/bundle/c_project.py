"""Make a C project of a model file: OpenVINO IR, its constants as a header, a program, and CMake's file."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge.errors import ModelRejected, require
from vit_edge.files import may_write_folder, write_folder
from vit_edge.model_file.artifact import Manifest
from vit_edge.runtime.bundle.builder import checked_engines, engines_promised
from vit_edge.runtime.engines.protocol import Model
from vit_edge.runtime.loading import open_any

__all__ = ["Project", "bundle_c_project"]

_SOURCE = Path(__file__).with_name("c")
_MODEL, _WEIGHTS, _HEADER = "model.xml", "model.bin", "model.h"
_BOUNDS = ("absolute", "relative", "spread", "least_spread", "sqnr_db", "top1_gap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Project:
    """The folder that was written, and where the model was checked."""

    path: Path
    model_sha256: str
    size_bytes: int
    checked_in: tuple[str, ...]


def bundle_c_project(model: str | os.PathLike[str], *, out: str | os.PathLike[str], force: bool = False) -> Project:
    """Write a CMake project that classifies with `model` through OpenVINO's C API.

    Raises as `load` does, MissingExtra without OpenVINO, UsageError if `out` cannot be written, ModelRejected for a
    file without golden vectors for OpenVINO, or with normalised float32 input.
    """
    opened = open_any(model)
    _check(opened)
    fixed = {path.name: path.read_bytes() for path in sorted(_SOURCE.iterdir())}
    target = may_write_folder(Path(out), holding={*fixed, _MODEL, _WEIGHTS, _HEADER}, force=force)
    require("openvino", extra="openvino", what="bundle a C project")
    from vit_edge.runtime.engines.ov import as_ir  # it imports OpenVINO

    checked_in = checked_engines(opened, ("openvino",))
    graph, weights = as_ir(opened)
    files = {**fixed, _MODEL: graph, _WEIGHTS: weights, _HEADER: _header(opened).encode()}
    write_folder(target, files)
    size_bytes = sum(map(len, files.values()))
    return Project(path=target, model_sha256=opened.sha256, size_bytes=size_bytes, checked_in=checked_in)


def _check(model: Model) -> None:
    manifest, reason = model.manifest, None
    if "openvino" not in engines_promised(model):
        reason = "the file has no golden vectors for openvino"
    elif manifest.input["dtype"] != "uint8":
        reason = "the network reads normalised float32 values; the program gives it pixels"
    if reason:
        remedy = "export the model with OpenVINO installed and without --input float32-nchw"
        raise ModelRejected("cannot bundle a C project", file=model.source, reason=reason, remedy=remedy)


def _header(model: Model) -> str:
    manifest, preprocessing = model.manifest, model.manifest.preprocessing
    golden = manifest.golden or {}
    entry = next(entry for entry in golden["expected"] if "openvino" in entry["engines"])
    sides = preprocessing.resize
    height, width = preprocessing.crop
    defines = {
        "MODEL_NAME": _text(manifest.name),
        "MODEL_SHA256": _text(model.sha256),
        "MODEL_BATCH": manifest.batch or 1,
        "MODEL_HEIGHT": height,
        "MODEL_WIDTH": width,
        "MODEL_CLASSES": len(manifest.labels),
        "MODEL_RESIZE": _text(str(sides) if isinstance(sides, int) else f"{sides[0]} x {sides[1]}"),
        "MODEL_KEEP_RATIO": int(preprocessing.keep_ratio or isinstance(sides, int)),
        "MODEL_INTERPOLATION": _text(preprocessing.interpolation),
        "MODEL_CROP": _text(f"{height} x {width}"),
        "MODEL_CROP_ROUNDING": _text(preprocessing.crop_rounding),
        "MODEL_ACTIVATION": _text(manifest.activation),
        "MODEL_GOLDEN_INPUTS": len(golden["seeds"]),
        **_tolerance(entry["tolerance"]),
    }
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    return "\n".join(
        [
            "/* Constants of a model file, written by `vit-edge bundle --c`. */",
            "#include <stdint.h>",
            "",
            *lines,
            "",
            _array("float", "MODEL_MEAN", map(_float, preprocessing.mean)),
            _array("float", "MODEL_STD", map(_float, preprocessing.std)),
            _array("char *const", "MODEL_LABELS", map(_text, manifest.labels)),
            _array("uint32_t", "MODEL_GOLDEN_SEEDS", (f"{seed}u" for seed in golden["seeds"])),
            _array("float", "MODEL_GOLDEN_LOGITS", map(_float, _logits(entry, manifest))),
            "",
        ]
    )


def _logits(entry: Mapping[str, Any], manifest: Manifest) -> Sequence[float]:
    values: list[float] = np.frombuffer(base64.b64decode(entry["logits"], validate=True), dtype="<f4").tolist()
    assert len(values) % len(manifest.labels) == 0  # the file was loaded and checked with them
    return values


def _tolerance(bounds: Mapping[str, float]) -> dict[str, str]:
    """Return a constant for each bound; a negative one is no bound, in decibels one that every SQNR is above."""
    return {f"MODEL_TOLERANCE_{name.upper()}": _double(bounds.get(name)) for name in _BOUNDS}


def _double(value: float | None) -> str:
    return "-1e9" if value is None else repr(float(value))


def _float(value: float) -> str:
    return f"{float(np.float32(value))!r}f"


def _text(value: str) -> str:
    """Return a C literal: bytes that are not plain ASCII as octal escapes, which end after three digits."""
    plain = {byte: chr(byte) for byte in range(32, 127) if chr(byte) not in '"\\?'}
    return '"' + "".join(plain.get(byte, f"\\{byte:03o}") for byte in value.encode()) + '"'


def _array(kind: str, name: str, values: Iterable[str]) -> str:
    return f"static const {kind} {name}[] = {{\n    " + ",\n    ".join(values) + ",\n};"
