"""Make a static site of a model file: a page, a module to embed, and onnxruntime-web."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.errors import ModelRejected
from vit_edge.files import may_write_folder, sha256_hex, write_folder
from vit_edge.model_file.artifact import MANIFEST_KEY, ModelFile
from vit_edge.runtime.bundle.builder import checked_engines, engines_promised, own_licence
from vit_edge.runtime.bundle.decoding_probes import decoding_probes, resizes_tall_images_vertically_first
from vit_edge.runtime.bundle.onnxruntime_web import OPTIONAL, REQUIRED, read_onnxruntime_web
from vit_edge.runtime.loading import open_any

__all__ = ["Site", "bundle_site"]

SCHEMA = 1
_NEEDED = {".css", ".html", ".json", ".mjs", ".onnx", ".wasm"}
_SOURCE = Path(__file__).with_name("web")
_MODEL, _ABOUT, _SERVICE_WORKER, _PACKAGE = "model.onnx", "bundle.json", "service-worker.js", "onnxruntime-web"
# Netlify and Cloudflare Pages read this file; on other hosts it is one file more.
_HEADERS = b"/*\n  Cross-Origin-Opener-Policy: same-origin\n  Cross-Origin-Embedder-Policy: require-corp\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The folder that was written, what a first visit fetches of it, and where the model was checked."""

    path: Path
    model_sha256: str
    size_bytes: int
    first_visit_bytes: int
    onnxruntime_web: str
    checked_in: tuple[str, ...]


def bundle_site(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    force: bool = False,
    onnxruntime_web: str | os.PathLike[str] | None = None,
) -> Site:
    """Write a static site that classifies images with `model` in the browser.

    `onnxruntime_web` is the folder of an installed package; None fetches it with npm. Raises as `load` does,
    ModelRejected for OpenVINO IR and models over 2 GiB, UsageError if `out` cannot be written, MissingExtra if the
    package cannot be fetched.
    """
    opened = _opened(model)
    fixed = {**dict(_fixed_files()), **own_licence("licenses/vit-edge")}
    libraries = [f"{_PACKAGE}/{name}" for name in (*REQUIRED, *OPTIONAL)]
    target = may_write_folder(Path(out), holding={*fixed, *libraries, _MODEL, _ABOUT, "_headers"}, force=force)
    checked_in = checked_engines(opened, ("onnxruntime",))
    version, package = read_onnxruntime_web(Path(onnxruntime_web) if onnxruntime_web else None)
    site = {
        **fixed,
        **{f"{_PACKAGE}/{name}": data for name, data in package.items()},
        _MODEL: opened.data,
        _ABOUT: _about(opened, version),
        "_headers": _HEADERS,
    }
    needed = {name: data for name, data in site.items() if _is_needed(name)}
    site[_SERVICE_WORKER] = _service_worker(fixed[_SERVICE_WORKER], needed)
    write_folder(target, site)
    return Site(
        path=target,
        model_sha256=opened.sha256,
        size_bytes=sum(map(len, site.values())),
        first_visit_bytes=sum(map(len, needed.values())),
        onnxruntime_web=version,
        checked_in=checked_in,
    )


def _opened(model: str | os.PathLike[str]) -> ModelFile:
    opened = open_any(model)
    reason = None
    if not isinstance(opened, ModelFile):
        reason = "browsers run ONNX files, and the file is OpenVINO IR"
    elif opened.manifest.weights is not None:
        reason = "the weights are in a second file; browsers load models of up to 2 GiB"
    elif "onnxruntime" not in engines_promised(opened):
        reason = "the file has no golden vectors for onnxruntime, which runs in browsers"
    if reason or not isinstance(opened, ModelFile):
        remedy = "export an ONNX file with ONNX Runtime installed"
        raise ModelRejected("cannot bundle for browsers", file=opened.source, reason=reason or "", remedy=remedy)
    return opened


def _fixed_files() -> Iterator[tuple[str, bytes]]:
    """Yield the name in the site and the bytes of each file that is the same for every model."""
    for path in sorted(_SOURCE.rglob("*")):
        if path.is_file():
            yield path.relative_to(_SOURCE).as_posix(), path.read_bytes()


def _is_needed(name: str) -> bool:
    """Return whether every visit needs the file: the service worker keeps these."""
    path = Path(name)
    return path.suffix in _NEEDED and path.name not in (*OPTIONAL, _SERVICE_WORKER)


def _about(model: ModelFile, version: str) -> bytes:
    """Return what the page reads first; the manifest is in the model file, under its seal, at this place."""
    text: bytes = next(entry.value for entry in model.proto.metadata_props if entry.key == MANIFEST_KEY).encode()
    start = model.data.rindex(text)
    about: Mapping[str, Any] = {
        "schema": SCHEMA,
        "model": _MODEL,
        "sha256": model.sha256,
        "manifest": [start, len(text)],
        "probes": decoding_probes(),
        "tall_first": resizes_tall_images_vertically_first(),
        "onnxruntime_web": version,
        "vit_edge": vit_edge.__version__,
    }
    return json.dumps(about, sort_keys=True).encode()


def _service_worker(source: bytes, kept: Mapping[str, bytes]) -> bytes:
    """Return the service worker with the list of files to keep; any other content is another cache."""
    names = ["./", *sorted(kept)]
    digest = sha256_hex("".join(sha256_hex(kept[name]) for name in sorted(kept)).encode())
    return source.replace(b"__CACHE__", f"vit-edge-{digest[:16]}".encode()).replace(
        b"__FILES__", json.dumps(names, indent=2).encode()
    )
