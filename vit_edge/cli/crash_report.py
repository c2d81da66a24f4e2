"""What is left when vit-edge itself fails: one file with everything that a report needs."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence

from vit_edge import __version__
from vit_edge.errors import EngineUnavailable, MissingExtra, VitEdgeError, version_of
from vit_edge.machine.package_versions import conflicts

__all__ = ["crash", "versions"]

_PACKAGES = ("numpy", "Pillow", "protobuf", "click", "onnx", "onnxruntime", "openvino", "torch")


def crash(error: BaseException, arguments: Sequence[str]) -> VitEdgeError:
    """Return the error to show: packages that do not fit each other, else a bug whose traceback goes to a file."""
    misfits = conflicts()
    if misfits:
        reason = f"{'; '.join(what for what, _ in misfits)} ({type(error).__name__})"
        return EngineUnavailable("cannot use the packages", reason=reason, remedy=misfits[0][1])
    lines = [f"vit-edge {' '.join(map(repr, arguments))}", *versions(), "", *traceback.format_exception(error)]
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, ImportError) and not (error.name or "").startswith("vit_edge"):
        # Commands import what they need when they run: a package is missing, or does not fit another.
        installed = ", ".join(versions()[2:])
        remedy = "pip install --upgrade vit-edge"
        return MissingExtra("cannot start vit-edge", reason=f"{reason} (installed: {installed})", remedy=remedy)
    try:
        descriptor, path = tempfile.mkstemp(prefix="vit-edge-crash-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(line.rstrip("\n") for line in lines) + "\n")
        remedy = f"report this bug in vit-edge with the file {path}"
    except OSError:
        remedy = "report this bug in vit-edge with these lines:\n" + "\n".join(lines)
    return VitEdgeError("cannot go on after an internal error", reason=reason, remedy=remedy)


def versions() -> list[str]:
    """Return a line for vit-edge, Python, the system and each package that matters."""
    found = [f"vit-edge {__version__}", f"Python {platform.python_version()} ({sys.platform}, {platform.machine()})"]
    installed = {name: version for name in _PACKAGES if (version := version_of(name)) is not None}
    return found + [f"{name} {version}" for name, version in installed.items()]
