"""Make an application of a model file: one zip that Python runs, with the part of vit-edge inside that it needs.

The zip holds `__main__.py` (`vit_edge.runtime.bundle.app_main`), the modules that it imports, the model file as it is,
and the pure-Python part of protobuf for devices that have none. The same packages and model give the same bytes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import json
import logging
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.errors import ModelRejected, UsageError
from vit_edge.files import may_write, sha256_hex, write_atomic
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.bundle.app_main import ABOUT, FALLBACK, FOLDER, SCHEMA
from vit_edge.runtime.checks.golden import promised
from vit_edge.runtime.checks.load_policy import current_policy
from vit_edge.runtime.checks.operators import check_contents
from vit_edge.runtime.engines.protocol import ENGINES, EngineOptions, Model, installed_engines
from vit_edge.runtime.loading import load_model, open_any

__all__ = ["Bundle", "bundle", "checked_engines", "engines_promised", "own_licence"]

_MAIN = "vit_edge.runtime.bundle.app_main"
# Its modules are imported one by one: what it offers applications, the pool and the benchmark, stays out.
_PACKAGE, _PACKAGE_SOURCE = (
    "vit_edge/runtime/__init__.py",
    b'"""The part of the runtime that an application needs."""\n',
)
_SHEBANG = b"#!/usr/bin/env python3\n"
# The first moment that a zip can name: a file's own would make other bytes of the same content.
_WHEN = (1980, 1, 1, 0, 0, 0)
# Python before 3.13 cannot start a zip with the 64-bit fields that larger ones need.
_MOST_BYTES = 2**31 - 1
_LICENCES = ("license", "licence", "copying", "notice")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """The application that was written, the engines its answers were checked in, and the protobuf inside, if any."""

    path: Path
    sha256: str
    size_bytes: int
    model_sha256: str
    checked_in: tuple[str, ...]
    protobuf: str | None


def bundle(model: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, force: bool = False) -> Bundle:
    """Write an application that classifies with `model`, a file of vit-edge; `out` None is its name with .pyz.

    The model is loaded in every installed engine that it promises answers for; where there is none, the log says that
    it was not checked. Raises as `load` does, ModelRejected over 2 GiB, UsageError where `out` cannot be written.
    """
    opened = open_any(model)
    if opened.manifest.is_encoder:
        reason, remedy = "the file is an encoder; an application classifies", "use `vit-edge embed` on the device"
        raise UsageError("cannot bundle", file=model, reason=reason, remedy=remedy)
    target = may_write(out or Path(model).with_suffix(".pyz"), force=force, made_from=model)
    engines = engines_promised(opened)
    checked_in = checked_engines(opened, engines)
    protobuf, fallback = _protobuf()
    members = {
        **_sources(),
        **_model_members(opened),
        **fallback,
        **own_licence(f"{FOLDER}/licenses/vit-edge"),
        ABOUT: _about(opened, engines).encode(),
    }
    data = _archive(members)
    write_atomic(target, data)
    mode = stat.S_IMODE(target.stat().st_mode)
    target.chmod(mode | (mode & 0o444) >> 2)  # who may read it may run it
    return Bundle(
        path=target,
        sha256=sha256_hex(data),
        size_bytes=len(data),
        model_sha256=opened.sha256,
        checked_in=checked_in,
        protobuf=protobuf,
    )


def engines_promised(model: Model) -> tuple[str, ...]:
    """Return the engines that the file has golden vectors for; raises ModelRejected if there are none."""
    readers = ("openvino",) if isinstance(model, IrModel) else tuple(name for name, e in ENGINES.items() if e[1])
    engines = tuple(name for name in readers if name in promised(model.manifest))
    if not engines:
        remedy = "export it again: an application checks itself with them when it starts"
        reason = f"the file has no golden vectors for {' or '.join(readers)}"
        raise ModelRejected("cannot bundle", file=model.source, reason=reason, remedy=remedy)
    return engines


def checked_engines(model: Model, engines: tuple[str, ...]) -> tuple[str, ...]:
    """Load the model in the engines that are installed, golden check and all; returns which these were."""
    check_contents(model, allow_ops=current_policy().allow_ops)
    here = tuple(name for name in engines if name in installed_engines())
    for name in here:
        load_model(model, engine=name, options=EngineOptions(), warn=False).close()
    if not here:
        names = ", ".join(engines)
        _log.warning("%s was not run: of %s none is installed here; the application checks itself", model.source, names)
    return here


def _about(model: Model, engines: tuple[str, ...]) -> str:
    manifest = model.manifest
    name, weights = _names(model)
    about = {
        "schema": SCHEMA,
        "model": name,
        "weights": weights,
        "name": manifest.name,
        "labels": len(manifest.labels),
        "precision": manifest.precision,
        "input": list(manifest.preprocessing.crop),
        "engines": list(engines),
        "sha256": model.sha256,
        "vit_edge": vit_edge.__version__,
    }
    return json.dumps(about, sort_keys=True, ensure_ascii=False)


def _names(model: Model) -> tuple[str, str | None]:
    if isinstance(model, IrModel):
        return f"{FOLDER}/model.xml", f"{FOLDER}/model.bin"
    return f"{FOLDER}/model.onnx", f"{FOLDER}/model.onnx.data" if model.manifest.weights else None


def _model_members(model: Model) -> dict[str, bytes]:
    name, weights = _names(model)
    members = {name: model.xml if isinstance(model, IrModel) else model.data}
    if weights and model.weights is not None:
        members[weights] = model.weights
    return members


def _sources() -> dict[str, bytes]:
    """Return the source of every module that the application imports, whether at its start or when it runs."""
    engines = [module for module, package, _ in ENGINES.values() if package]
    waiting, found = [_MAIN, *engines], dict[str, bytes]()
    while waiting:
        name = waiting.pop()
        path, source = _source(name)
        if path is None or path in found:
            continue
        source = _PACKAGE_SOURCE if path == _PACKAGE else source
        found[path] = source
        waiting += [*_imported(source), name.rpartition(".")[0] or name]
    found["__main__.py"] = found[_source(_MAIN)[0] or ""]
    return found


def _source(name: str) -> tuple[str | None, bytes]:
    """Return where a module lies in a zip, and its source; None for what is no module but a name in one."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return None, b""
    folder = name.replace(".", "/")
    path = f"{folder}/__init__.py" if spec.submodule_search_locations is not None else f"{folder}.py"
    return path, Path(spec.origin).read_bytes()


def _imported(source: bytes) -> Iterator[str]:
    """Yield the modules of vit-edge, and names in them, that a source imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.split(".")[0] == "vit_edge")


def _protobuf() -> tuple[str | None, dict[str, bytes]]:
    """Return the version and members of the installed protobuf's pure-Python part, with its licence.

    Without its licence next to it, it is left out, and the log says so.
    """
    licences = _licences("protobuf", FALLBACK)
    if not licences:
        _log.warning("the licence of protobuf is not installed: protobuf is left out, and devices need their own")
        return None, {}
    protobuf: Any = importlib.import_module("google.protobuf")
    root = Path(protobuf.__file__).parent
    sources = {f"{FALLBACK}/google/protobuf/{path.relative_to(root).as_posix()}": path for path in root.rglob("*.py")}
    members = {name: path.read_bytes() for name, path in sources.items() if "benchmark" not in path.name}
    # Before Python 3.13 a folder without __init__.py is found in a zip only where it has an entry of its own.
    return protobuf.__version__, {**members, **licences, f"{FALLBACK}/google/": b""}


def own_licence(folder: str) -> dict[str, bytes]:
    """Return the licence of vit-edge, as members of `folder`; from a clone that is not installed, its own file."""
    top = Path(vit_edge.__file__).parent.parent / "LICENSE"
    return _licences("vit-edge", folder) or ({f"{folder}/LICENSE": top.read_bytes()} if top.is_file() else {})


def _licences(package: str, folder: str) -> dict[str, bytes]:
    """Return the licence files of an installed distribution, as members of `folder`."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.lower().startswith(_LICENCES)]
    return {f"{folder}/{path.name}": path.read_bytes() for path in found if path.is_file()}


def _archive(members: Mapping[str, bytes]) -> bytes:
    """Return a zip application, its model stored as it is: that of the digits would shrink by 16 % (float: 8 %)."""
    total = sum(map(len, members.values()))
    if total > _MOST_BYTES:
        reason = f"the application would have {total:,} bytes; Python before 3.13 starts no zip over {_MOST_BYTES:,}"
        remedy = "install vit-edge on the device and copy the model file"
        raise ModelRejected("cannot bundle", reason=reason, remedy=remedy)
    buffer = io.BytesIO(_SHEBANG)
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in sorted(members.items()):
            archive.writestr(_entry(name), data, compresslevel=9)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=_WHEN)
    entry.create_system = 3  # Unix, wherever it is made
    is_folder, is_model = name.endswith("/"), name.startswith(f"{FOLDER}/model.")
    entry.external_attr = (stat.S_IFDIR | 0o755) << 16 | 0x10 if is_folder else (stat.S_IFREG | 0o644) << 16
    entry.compress_type = zipfile.ZIP_STORED if is_folder or is_model else zipfile.ZIP_DEFLATED
    return entry
