"""Do the installed releases of protobuf, numpy and onnx fit the packages that need them? pip does not check that."""

from __future__ import annotations

import re
from importlib import metadata

__all__ = ["Conflict", "conflicts"]

_NEEDED = ("protobuf", "numpy", "onnx")
_NEEDING = ("onnx", "onnxruntime", "openvino", "vit-edge")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_-]+)\s*\(?([^;()]*)\)?")
_BOUND = re.compile(r"\s*(>=|<=|<|>)\s*([\d.]+)\s*")

Conflict = tuple[str, str]


def conflicts() -> list[Conflict]:
    """Return (what does not fit, the command that repairs it) for each pair of packages, both versions in the text."""
    found = []
    for package in _NEEDING:
        for name, bounds in _requirements(package):
            version = _version(name)
            if version is not None and not all(_holds(version, bound) for bound in bounds.split(",")):
                what = f"{name} {version} does not fit {package} {_version(package)}, which needs {name}{bounds}"
                found.append((what, f'pip install "{name}{bounds}"'))
    return found


def _requirements(package: str) -> list[tuple[str, str]]:
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    matches = [_REQUIREMENT.match(line) for line in lines]
    return [(match[1].lower(), match[2].strip()) for match in matches if match and match[1].lower() in _NEEDED]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _holds(version: str, bound: str) -> bool:
    """Return whether a version is within one bound; a bound of another kind counts as met."""
    match = _BOUND.fullmatch(bound)
    if match is None:
        return True
    have, limit = _numbers(version), _numbers(match[2])
    return {">=": have >= limit, "<=": have <= limit, "<": have < limit, ">": have > limit}[match[1]]


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]  # it matches
    return tuple([*parts, 0, 0, 0][:3])
