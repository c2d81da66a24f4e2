"""The files of onnxruntime-web that a site needs, from a folder or, by npm, from the registry."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from base64 import b64encode
from pathlib import Path

from vit_edge.errors import InputError, MissingExtra
from vit_edge.files import read_file, temporary_folder

__all__ = ["OPTIONAL", "REQUIRED", "VERSION", "read_onnxruntime_web"]

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# Of the archive in the registry: npm compares with what the registry itself says.
_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
REQUIRED = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# A browser fetches these only if it runs the model on WebGPU.
OPTIONAL = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
_TIMEOUT_S = 600
_MOST_BYTES = 200_000_000
_FOLDER_OPTION = "give the folder of an installed package with --onnxruntime-web"


def read_onnxruntime_web(folder: Path | None = None) -> tuple[str, dict[str, bytes]]:
    """Return the version and the files by name; `folder` is an installed package, None fetches VERSION with npm.

    Raises MissingExtra without npm or network, InputError if a file is missing or another than expected.
    """
    if folder is None:
        return VERSION, _members(_fetch())
    about = json.loads(read_file(folder / "package.json", what="package", max_bytes=_MOST_BYTES))
    names = (*REQUIRED, *OPTIONAL)
    files = {name: read_file(folder / "dist" / name, what=PACKAGE, max_bytes=_MOST_BYTES) for name in names}
    return str(about["version"]), files


def _fetch() -> bytes:
    """Return the archive of the package; npm keeps it in its cache."""
    npm = shutil.which("npm")
    if npm is None:
        remedy = f"install Node.js with npm, or {_FOLDER_OPTION}"
        raise MissingExtra("cannot bundle for browsers", reason="npm is not installed", remedy=remedy)
    with temporary_folder() as name:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--prefer-offline", "--pack-destination", name]
        try:
            done = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise _not_fetched(f"npm did not end in {_TIMEOUT_S} s") from error
        archives = list(Path(name).glob("*.tgz"))
        if done.returncode or not archives:
            raise _not_fetched(" ".join(done.stderr.split())[:300])
        return archives[0].read_bytes()


def _members(archive: bytes) -> dict[str, bytes]:
    if b64encode(hashlib.sha512(archive).digest()).decode() != _SHA512:
        reason = f"the archive of {PACKAGE} {VERSION} is not the one that vit-edge was tested with"
        raise InputError("cannot bundle for browsers", reason=reason, remedy="run `npm cache clean --force`, try again")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in (*REQUIRED, *OPTIONAL):
            file = tar.extractfile(f"package/dist/{name}")
            assert file is not None  # the hash says that it is there
            found[name] = file.read()
    return found


def _not_fetched(reason: str) -> MissingExtra:
    what = f"cannot fetch {PACKAGE} {VERSION}"
    return MissingExtra(what, reason=reason, remedy=f"check the connection, or {_FOLDER_OPTION}")
