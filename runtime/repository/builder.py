"""Write a complete model repository: the model, the server's configuration, and what clients need."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.files import write_atomic
from vit_edge.machine.cpu import MOST_THREADS
from vit_edge.runtime.checks.operators import check_contents
from vit_edge.runtime.engines.protocol import EngineOptions, check_count, installed_engines
from vit_edge.runtime.loading import load_model, open_any
from vit_edge.runtime.repository.kserve import kserve_files
from vit_edge.runtime.repository.openvino_model_server import openvino_model_server_files
from vit_edge.runtime.repository.ray_serve import ray_serve_files
from vit_edge.runtime.repository.served_model import ServedModel, served_model
from vit_edge.runtime.repository.sources import source_of
from vit_edge.runtime.repository.triton import triton_files
from vit_edge.runtime.serving.open_inference import server_name

__all__ = ["SERVERS", "Repository", "ServerName", "write_repository"]

ServerName: TypeAlias = Literal["triton", "openvino-model-server", "kserve", "ray-serve"]
SERVERS: tuple[ServerName, ...] = get_args(ServerName)
_MOST_INSTANCES = 256
_CLIENT = "vit_edge.runtime.repository.client_main"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """The folder that was written, its files, and what serves: engine, instances, threads, and whether it was tuned."""

    path: Path
    files: tuple[str, ...]
    name: str
    engine: str
    instances: int
    threads: int
    is_tuned: bool
    is_checked: bool


def write_repository(
    model: str | os.PathLike[str],
    *,
    server: ServerName,
    out: str | os.PathLike[str],
    instances: int | None = None,
    threads: int | None = None,
    storage_uri: str | None = None,
    force: bool = False,
) -> Repository:
    """Write the repository of a model file for one kind of server into the folder `out`.

    Instances and threads are those that `vit-edge tune` measured for this file here, unless given; else one thread for
    each usable CPU. The golden vectors run first if the engine is installed. `storage_uri` is for KServe: where the
    folder `models` will be. Raises as `load` does, ModelRejected if the server cannot run the file, UsageError.
    """
    check_count("instances", instances, _MOST_INSTANCES, what="cannot make the repository")
    check_count("threads", threads, MOST_THREADS, what="cannot make the repository")
    if server not in SERVERS:
        remedy = f"choose {', '.join(SERVERS)}"
        raise UsageError("cannot make the repository", reason=f"the server is {server!r}", remedy=remedy)
    opened = open_any(model)
    if opened.manifest.golden is None:
        reason, remedy = "the file has no golden vectors: no server could be checked", "export it again"
        raise ModelRejected("cannot make the repository", file=opened.source, reason=reason, remedy=remedy)
    served = served_model(
        opened,
        name=server_name(opened.manifest.name),
        engine="openvino" if server == "openvino-model-server" else None,
        instances=instances,
        threads=threads,
    )
    folder = _may_fill(Path(out), force=force)
    is_checked = _check(served)
    files = {**_client_files(served), **_server_files(server, storage_uri)(served)}
    for name, data in files.items():  # configurations come last: a server that polls sees complete models
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, data)
    return Repository(
        path=folder,
        files=tuple(sorted(files)),
        name=served.name,
        engine=served.engine,
        instances=served.instances,
        threads=served.threads,
        is_tuned=served.p50_ms is not None,
        is_checked=is_checked,
    )


def _server_files(server: ServerName, storage_uri: str | None) -> Callable[[ServedModel], dict[str, bytes]]:
    if storage_uri is not None and server != "kserve":
        remedy = "leave it out, or choose kserve"
        raise UsageError("cannot make the repository", reason=f"{server} has no storage URI", remedy=remedy)
    return {
        "triton": triton_files,
        "openvino-model-server": openvino_model_server_files,
        "kserve": lambda served: kserve_files(served, storage_uri=storage_uri or f"pvc://models/{served.name}"),
        "ray-serve": ray_serve_files,
    }[server]


def _client_files(served: ServedModel) -> dict[str, bytes]:
    """Return what clients need: labels, preprocessing, and a script that prepares images and checks a server."""
    manifest = served.manifest
    preprocessing = json.dumps(manifest.preprocessing.to_dict(), indent=2)
    return {
        "client/labels.txt": "".join(f"{label}\n" for label in manifest.labels).encode(),
        "client/preprocessing.json": f"{preprocessing}\n".encode(),
        "client/manifest.json": f"{manifest.to_json()}\n".encode(),
        "client/server.json": f"{json.dumps({'model': served.name, 'engine': served.engine})}\n".encode(),
        "client/client.py": source_of(_CLIENT),
    }


def _may_fill(folder: Path, *, force: bool) -> Path:
    """Return the folder if files may be written there, and make it; raises UsageError."""
    if folder.exists() and not folder.is_dir():
        raise UsageError("cannot write", file=folder, reason="the path is a file", remedy="give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not os.listdir(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError("cannot write", file=folder, reason=reason, remedy="choose another folder") from error
    if not is_empty and not force:
        remedy = "choose another name, or add --force to replace files of the same names"
        raise UsageError("will not overwrite", file=folder, reason="the folder is not empty", remedy=remedy)
    return folder


def _check(served: ServedModel) -> bool:
    """Run the golden vectors in the engine that will serve, if it is installed; returns whether it is."""
    model = served.model
    check_contents(model)
    if served.engine not in installed_engines():
        _log.warning("%s was not run: %s is not installed here; check the server", model.source, served.engine)
        return False
    load_model(model, engine=served.engine, options=EngineOptions(threads=served.threads), warn=False).close()
    return True
