"""The rooms of the house in their order, and what finds an import that points the wrong way.

`python -m tests.policy.ranks` prints every such import as FILE:LINE.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAMILIES", "ORDER", "faults", "modules"]

# Packages of the installed name and where their source is.
PLACES = {"vit_edge": "vit_edge", "vit_edge.export": "export", "vit_edge.runtime": "runtime"}
HEAVY = ("torch", "torchvision", "onnx", "onnxscript")
_DOOR = "__init__"  # a package's own module, its front door: what its rooms may not import

_TORCH = (
    "vit_edge.tensor_file",
    "vit_edge.vit",
    "vit_edge.checkpoint",
    "vit_edge.conversion.preprocessing",
    "vit_edge.conversion",
    "vit_edge.convert",
    "vit_edge.training",
    "vit_edge.train",
)
_RUNTIME = (
    "vit_edge.runtime.engines",
    "vit_edge.runtime.checks",
    "vit_edge.runtime.onnx_import",
    "vit_edge.runtime",
    "vit_edge.runtime.serving",
    "vit_edge.runtime.benchmark",
    "vit_edge.runtime.batch",
    "vit_edge.runtime.bundle",
    "vit_edge.runtime.repository",
    "vit_edge.runtime.__init__",
)
_EXPORT = (
    "vit_edge.export.graph",
    "vit_edge.export.parity",
    "vit_edge.export.sources",
    "vit_edge.export.tracing",
    "vit_edge.export.onnx_import",
    "vit_edge.export.verification",
    # Inside quantization, from the ranges of tensors up to the verb.
    "vit_edge.export.quantization.calibration",
    "vit_edge.export.quantization.qdq",
    "vit_edge.export.quantization.algorithms",
    "vit_edge.export.quantization.calibrated_graph",
    "vit_edge.export.quantization.options",
    "vit_edge.export.quantization.coverage",
    "vit_edge.export.quantization.speed",
    "vit_edge.export.quantization.accuracy_budget",
    "vit_edge.export.quantization.manifest_record",
    "vit_edge.export.quantization",
    "vit_edge.export.explanation",
    "vit_edge.export.deployment",
    "vit_edge.export.__init__",
)
_CLI = (
    "vit_edge.cli",
    "vit_edge.cli.device",
    "vit_edge.cli.benchmark",
    "vit_edge.cli.workstation",
    "vit_edge.cli.__init__",
    "vit_edge.__main__",
)
# Lowest first. A name stands for the modules directly in that package, and for a single module if it is one; a module
# imports its own room and lower ones. A folder that is not named here is a fault: a new room needs a rank.
ORDER = (
    "vit_edge.machine.openmp",
    "vit_edge.machine.telemetry",
    "vit_edge.__init__",
    "vit_edge",
    "vit_edge.data",
    "vit_edge.model_file",
    "vit_edge.machine",
    "vit_edge.cache",
    *_RUNTIME,
    "vit_edge.remote",
    *_TORCH,
    *_EXPORT,
    "vit_edge.report",
    *_CLI,
)
# Functions here make graphs and read them; on a device, where no onnx is installed, nothing calls these.
LATE = {"vit_edge.model_file": ("onnx",)}
# Rooms that stand side by side: neither sees the other, whatever their ranks. A device has no torch.
FAMILIES = {"torch": _TORCH, "device": (*_RUNTIME, "vit_edge.remote")}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Import:
    name: str  # a module of ours, or the whole dotted name of another's
    line: int
    is_late: bool  # inside a function, or for type checkers alone


def modules(root: Path) -> dict[str, Path]:
    """Return every module below `root` by its installed name; a package's own module ends in `__init__`."""
    found = {}
    for package, folder in PLACES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if package == "vit_edge" and parts[0] in {
                "export",
                "runtime",
            }:  # the two links, on Pythons that follow them
                continue
            found[".".join((package, *parts))] = path
    return found


def faults(root: Path) -> list[str]:
    """Return every import below `root` that points upwards, across or to a heavy package, as `FILE:LINE: what`."""
    known = modules(root)
    rooms = {module: _room(module) for module in known}
    unranked = [f"{known[module]}: its folder has no rank" for module in known if rooms[module] is None]
    return unranked + [
        f"{path.relative_to(root)}:{item.line}: {wrong}"
        for module, path in known.items()
        if rooms[module] is not None
        for item in _imports(path, known)
        if (wrong := _wrong(module, item, rooms))
    ]


def _room(module: str) -> str | None:
    """Return the entry of ORDER that a module stands in, or None."""
    package, _, stem = module.rpartition(".")
    if module in ORDER:
        return module
    if stem == _DOOR and package not in ORDER:
        return None
    return package if package in ORDER else None


def _wrong(module: str, item: _Import, rooms: dict[str, str | None]) -> str | None:
    target, package = item.name, item.name.split(".", maxsplit=1)[0]
    here, there = rooms[module], rooms.get(target)
    assert here is not None
    if package in HEAVY:
        is_allowed = here in _TORCH or here in _EXPORT or (item.is_late and package in LATE.get(here, ()))
        return None if is_allowed else f"imports {target}, which only the torch rooms and export may"
    if there is None:
        return None
    if ORDER.index(there) > ORDER.index(here):
        return f"{here} imports {target}, which is above"
    for name, family in FAMILIES.items():
        for other, others in FAMILIES.items():
            if name != other and here in family and there in others:
                return f"{here} imports {target}, which stands beside"
    return None


def _imports(path: Path, known: dict[str, Path]) -> Iterator[_Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        is_late = node not in tree.body
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield _Import(name=_resolved(name, known), line=node.lineno, is_late=is_late)


def _resolved(name: str, known: dict[str, Path]) -> str:
    """Return the module that an imported name is in: itself, the package's own module, or the module that has it."""
    while name:
        for candidate in (name, f"{name}.{_DOOR}"):
            if candidate in known:
                return candidate
        if not name.startswith("vit_edge"):
            return name
        name = name.rpartition(".")[0]
    return name


if __name__ == "__main__":
    wrong = faults(Path(__file__).resolve().parent.parent.parent)
    print(*wrong, sep="\n")  # noqa: T201
    sys.exit(bool(wrong))
