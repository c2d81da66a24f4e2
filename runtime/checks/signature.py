"""Signatures of model files, model folders and applications: who made them, by a key that the user trusts.

The format is that of the OpenSSF `model-signing` library with a key file, offline: a Sigstore bundle in FILE.sig, next
to FILE. A signature covers FILE and the files of weights that belong to it, or every file of a folder.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_edge.errors import InputError, NotTrusted, UsageError, VitEdgeError, escaped, printable, require
from vit_edge.files import read_file, sha256_hex, temporary_folder, write_atomic
from vit_edge.model_file.artifact import MANIFEST_KEY, MODEL_BYTES, Manifest
from vit_edge.model_file.onnx_schema import parse
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.model_file.weights import is_plain_name
from vit_edge.runtime.engines.protocol import Model

__all__ = ["check_is_signed", "sign", "signature_path", "verify_signature"]

_MOST_BYTES = 10_000_000
_KEYS = "make keys: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout"


def signature_path(path: str | os.PathLike[str]) -> Path:
    """Return where the signature of a file or folder is: the same name and `.sig`, next to it."""
    place = Path(os.path.abspath(path))  # noqa: PTH100 - a link is not followed: the signature is next to the name
    return place.with_name(f"{place.name}.sig")


def sign(path: str | os.PathLike[str], *, key: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Write the signature of a file or folder to `out`; return the names of the files that it covers.

    `key` is an elliptic-curve private key in PEM (P-256, P-384 or P-521), not encrypted. Raises MissingExtra.
    """
    library = require("model_signing", extra="signing", what="sign")
    hashing = _hashing(library, Path(path))
    read_file(key, what="key", max_bytes=_MOST_BYTES)
    with temporary_folder() as folder, _clear_errors(InputError, "cannot sign", path):
        made = Path(folder) / "signature"
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(hashing).sign(hashing.root, made)
        data = made.read_bytes()
    write_atomic(out, data)
    return sorted(hashing.digests)


def verify_signature(
    path: str | os.PathLike[str], *, key: str | os.PathLike[str], signature: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Return the SHA-256 of each signed file of a file or folder, if the signature holds under the public key.

    Raises NotTrusted if there is no signature, another key signed, or a file was changed, added or removed.
    """
    library = require("model_signing", extra="signing", what="verify the signature")
    hashing = _hashing(library, Path(path))
    place = signature_path(path) if signature is None else Path(signature)
    read_file(key, what="key", max_bytes=_MOST_BYTES)
    if not place.exists():
        reason, remedy = f"there is no signature in {printable(place)}", "copy the signature too, next to the file"
        raise NotTrusted("will not trust", file=path, reason=reason, remedy=remedy)
    read_file(place, what="signature", max_bytes=_MOST_BYTES)
    with _clear_errors(InputError, "cannot use the key", key):
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    # The library prints a warning about old signatures: stdout is for results.
    with _clear_errors(NotTrusted, "will not trust", path), contextlib.redirect_stdout(sys.stderr):
        verifier.set_hashing_config(hashing).verify(hashing.root, place)
    return dict(hashing.digests)


def check_is_signed(model: Model, digests: dict[str, str]) -> None:
    """Raise NotTrusted unless the bytes that were opened are those whose signature was verified."""
    opened = {sha256_hex(model.xml)} if isinstance(model, IrModel) else {model.sha256}
    if model.weights is not None:
        opened.add(sha256_hex(model.weights))
    if not isinstance(model, IrModel) and model.is_third_party:  # its bytes are rewritten when it is opened
        source = model.manifest.provenance
        opened = {source["source_sha256"], *source.get("source_weights_sha256", {}).values()}
    if not opened <= {*digests.values()}:
        reason = "the file was exchanged while its signature was verified"
        raise NotTrusted("will not load", file=model.source, reason=reason, remedy="load it again")


def _hashing(library: Any, path: Path) -> Any:
    """Return the library's hashing of the files that belong to `path`; `digests` has them once it has run."""
    files = None if path.is_dir() else _files(path)

    class Hashing(library.hashing.Config):  # type: ignore[misc]
        root = path if files is None or len(files) == 1 else path.parent
        digests: dict[str, str]

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            found = super().hash(model_path, files_to_hash=files)
            self.digests = {str(entry.identifier): entry.digest.digest_hex for entry in found.resource_descriptors()}
            return found

    # A hub's cache holds links to files; in a folder, links could bring in what is outside.
    return Hashing().set_ignored_paths(paths=[], ignore_git_paths=False).set_allow_symlinks(files is not None)


def _files(path: Path) -> list[Path]:
    """Return the file, and the files next to it that hold its weights."""
    data = read_file(path, what="file", max_bytes=MODEL_BYTES)
    if path.suffix.lower() == ".xml":
        return [path, path.with_suffix(".bin")]
    if path.suffix.lower() != ".onnx":
        return [path]
    with contextlib.suppress(ValueError):  # what is no ONNX model is signed as the file that it is
        proto = parse(data)
        entries = (entry for tensor in proto.graph.initializer for entry in tensor.external_data)
        names = {entry.value for entry in entries if entry.key == "location"}
        manifest = next((entry.value for entry in proto.metadata_props if entry.key == MANIFEST_KEY), None)
        if manifest is not None:
            names |= {(Manifest.from_json(manifest).weights or {}).get("file")} - {None}
        if not all(is_plain_name(name) for name in names):
            reason, remedy = "the weights are not in files next to the model", "copy all files into one folder"
            raise UsageError("cannot use the signature", file=path, reason=reason, remedy=remedy)
        return [path, *(path.with_name(name) for name in sorted(names))]
    return [path]


@contextlib.contextmanager
def _clear_errors(kind: type[VitEdgeError], what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the library raises, which may be anything for a hostile signature, into one error."""
    try:
        yield
    except VitEdgeError:
        raise
    except Exception as error:
        found = " ".join(str(error).split())[:300] or type(error).__name__
        reason = "the signature was not made with this key" if "Key mismatch" in found else escaped(found, keep="")
        remedy = _KEYS if kind is InputError else "get the file and its signature again from where they were made"
        raise kind(what, file=path, reason=reason, remedy=remedy) from error
