"""The installed package as a wheel again, from its own files: a device needs ours, and a user has no build tools."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import vit_edge
from vit_edge import __version__

__all__ = ["ENGINES", "NEEDED", "WHEEL_NAME", "build_wheel", "pure_packages"]

WHEEL_NAME = f"vit_edge-{__version__}-py3-none-any.whl"
# As in setup.cfg: what every command needs, and each engine.
NEEDED = (
    "numpy>=1.24",
    "Pillow>=10.1",
    "click>=8.1",
    "rich>=13",
    "protobuf>=4.25",
    'tomli>=2; python_version < "3.11"',
)
ENGINES = {"onnxruntime": "onnxruntime>=1.17", "openvino": "openvino>=2025.0"}
# export/ and runtime/ may lie elsewhere, in an installation that points to a clone.
_ELSEWHERE = ("export", "runtime")
_NO_TIME = (1980, 1, 1, 0, 0, 0)
_SUFFIXES = (".py", ".typed")


def build_wheel() -> bytes:
    """Return a wheel of the package that runs now: the same bytes for the same files, whenever and wherever."""
    info = f"vit_edge-{__version__}.dist-info"
    requires = [f"Requires-Dist: {text}" for text in NEEDED]
    requires += [f'Provides-Extra: {name}\nRequires-Dist: {text}; extra == "{name}"' for name, text in ENGINES.items()]
    metadata = ["Metadata-Version: 2.1", "Name: vit-edge", f"Version: {__version__}", "Requires-Python: >=3.10"]
    files = dict(sorted(_files()))
    files[f"{info}/METADATA"] = "\n".join([*metadata, *requires, ""]).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: vit-edge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nvit-edge = vit_edge.__main__:run\n"
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    record = f"{info}/RECORD"
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=_NO_TIME)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return packed.getvalue()


def pure_packages(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name in a folder of packages, bytes) of installed packages that are Python alone: click and rich."""
    for name in names:
        yield from _tree(_folder(importlib.import_module(name).__file__), name)


def _files() -> Iterator[tuple[str, bytes]]:
    yield from _tree(_folder(vit_edge.__file__), "vit_edge")
    for part in _ELSEWHERE:
        yield from _tree(_folder(importlib.import_module(f"vit_edge.{part}").__file__), f"vit_edge/{part}")


def _tree(folder: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a package and of those in it; links are left out: `_files` follows the two there may be."""
    for path in sorted(folder.iterdir()):
        name = f"{prefix}/{path.name}"
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__":
            yield from _tree(path, name)
        elif path.is_file() and path.suffix in _SUFFIXES:
            yield name, path.read_bytes()


def _folder(file: str | None) -> Path:
    assert file is not None  # these are packages, with an __init__
    return Path(file).parent


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode("ascii").rstrip("=")
