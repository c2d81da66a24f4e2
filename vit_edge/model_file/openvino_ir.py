"""OpenVINO's IR as a model file: `.xml` and `.bin`, with the manifest in its rt_info and one seal over both.

The seal is the SHA-256 over the SHA-256 of the `.xml`, with 64 zeros where the seal stands, and that of the `.bin`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from vit_edge.errors import ModelRejected, NotTrusted, printable
from vit_edge.files import kind_of, read_file, sha256_hex
from vit_edge.model_file.artifact import Manifest, warn_of_assumed
from vit_edge.model_file.paired_files import read_partner

__all__ = ["NO_SEAL", "IrModel", "open_ir", "seal_ir"]

# What stands in the rt_info until the seal is known.
NO_SEAL = "0" * 64
_SEAL = re.compile(rb'<seal value="([0-9a-f]{64})" ?/>')
# 20,000 layers take about 600 bytes and 20 tags each, and a manifest at most 8 golden images of 1 MB.
_MAX_XML_BYTES, _MAX_XML_TAGS = 2**25, 1_000_000
_MAX_BIN_BYTES = 2**40


@dataclass(frozen=True, kw_only=True, slots=True)
class IrModel:
    """The verified bytes of both files, for `Core.read_model(xml, weights)`, and what they say."""

    xml: bytes
    weights: bytes
    manifest: Manifest
    source: str

    @property
    def sha256(self) -> str:
        """Return the seal: one hash for both files."""
        return _digest(self.xml, self.weights)


def seal_ir(xml: bytes, weights: bytes) -> bytes:
    """Return `xml` with the seal over both in its place; raises ValueError where there is not one place for it."""
    digest = _digest(xml, weights)
    return _SEAL.sub(f'<seal value="{digest}" />'.encode(), xml)


def open_ir(source: str | os.PathLike[str] | bytes, *, weights: bytes | None = None) -> IrModel:
    """Return the IR in `source` (`.xml`), its seal checked before its use.

    The `.bin` of the same name is read from the same folder, or given as `weights` with its bytes. Raises ModelRejected
    where it is no IR made by vit-edge, NotTrusted where the seal is broken.
    """
    if isinstance(source, bytes):
        name, xml = "the bytes given", source
    else:
        name = printable(source)
        xml = read_file(source, what="model file", max_bytes=_MAX_XML_BYTES, error=ModelRejected)
    if kind_of(xml) or not _SEAL.search(xml):
        kind = kind_of(xml) or (
            "the file is no OpenVINO IR made by vit-edge",
            "make one with `vit-edge export --format openvino`",
        )
        raise ModelRejected("cannot use the model file", file=name, reason=kind[0], remedy=kind[1])
    if weights is None:
        if isinstance(source, bytes):
            remedy = "give the bytes of its .bin too"
            raise ModelRejected(
                "cannot use the model file", file=name, reason="the weights are not given", remedy=remedy
            )
        weights = _read_weights(xml, Path(source).with_suffix(".bin"))
    elif not _belongs(xml, weights):
        weights = None
    if weights is None:
        reason = "the two files are not those that were sealed: one was changed, damaged or exchanged"
        remedy = "copy both again from where they were made"
        raise NotTrusted("will not load the model file", file=name, reason=reason, remedy=remedy)
    manifest = _manifest(xml, name)
    warn_of_assumed(manifest.assumed, name)
    return IrModel(xml=xml, weights=weights, manifest=manifest, source=name)


def _read_weights(xml: bytes, path: Path) -> bytes | None:
    """Return the weights under the seal of the `.xml`; None if there are others at their place."""
    return read_partner(
        path,
        what="weights of the model file",
        max_bytes=_MAX_BIN_BYTES,
        error=ModelRejected,
        belongs=lambda weights: _belongs(xml, weights),
    )


def _belongs(xml: bytes, weights: bytes) -> bool:
    try:
        return _digest(xml, weights).encode() in _SEAL.findall(xml)
    except ValueError:  # more than one seal
        return False


def _digest(xml: bytes, weights: bytes) -> str:
    unsealed, places = _SEAL.subn(f'<seal value="{NO_SEAL}" />'.encode(), xml)
    if places != 1:
        raise ValueError(f"the file has {places} seals")
    return sha256_hex(f"{sha256_hex(unsealed)}{sha256_hex(weights)}".encode())


def _manifest(xml: bytes, name: str) -> Manifest:
    try:
        if b"<!" in xml:  # OpenVINO writes no declarations, and entities could grow without bound
            raise ValueError("the file declares entities")
        if (tags := xml.count(b"<")) > _MAX_XML_TAGS:  # each element takes about 100 bytes once it is read
            raise ValueError(f"the file has {tags:,} tags; at most {_MAX_XML_TAGS:,} are read")
        entry = ElementTree.fromstring(xml).find("rt_info/vit_edge/manifest")
        if entry is None:
            raise ValueError("the file has a seal but no manifest")
        return Manifest.from_json(entry.attrib["value"])
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        remedy = "export it again with `vit-edge export --format openvino`"
        raise ModelRejected("cannot use the model file", file=name, reason=str(error), remedy=remedy) from error
