"""Targets besides model files: shards of images, requests and responses of the Open Inference Protocol."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.faults.fuzzing import mutants
from tests.support.networks import SIZE
from vit_edge.data.parquet_shards import read_parquet
from vit_edge.data.tar_shards import read_tar
from vit_edge.errors import ImageRejected, InputError, VitEdgeError
from vit_edge.files import read_file
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime.repository.client_main import Server
from vit_edge.runtime.serving.open_inference import HEADER_LENGTH, encode_request, read_request, respond

__all__ = ["make_shards", "parquet_shard", "requests", "responses", "tar_shard"]

# Of one image, and of the labels of a member: what the readers accept.
_MOST_BYTES = 1_000_000


def make_shards(folder: Path) -> None:
    """Write `shard.tar` and `shard.parquet`, of three images, into a folder that has `image.png`."""
    from pyarrow import Table, parquet

    image = (folder / "image.png").read_bytes()
    with tarfile.open(folder / "shard.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            for name, data in ((f"{number}é.png", image), (f"{number}é.json", b'{"cls": "a"}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    rows = {"image": [{"bytes": image, "path": "a.png"}] * 3, "label": [0, 1, 1]}
    parquet.write_table(Table.from_pydict(rows), folder / "shard.parquet", row_group_size=2)


def tar_shard(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """Change headers, whose checksums are right again, or any bytes."""
    data = bytearray((seeds / "shard.tar").read_bytes())
    if rng.random() < 0.3:
        data = bytearray(mutants.raw(bytes(data), rng))
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change_member(data, rng)
    (work / "shard.tar").write_bytes(data)
    return _read_all(work / "shard.tar", read_tar)


def _change_member(data: bytearray, rng: random.Random) -> None:
    start = 512 * rng.randrange(max(len(data) // 512, 1))
    at = start + rng.choice((0, 124, 156, 157, 345, rng.randrange(512)))
    text = rng.choice((b"0", b"\0", b"x", b"L", b"S", b"2", b"../", b"/", b"\x80", b"\xff" * 12, b"7" * 11, b"-1 "))
    data[at : at + len(text)] = text
    if data[start : start + 512].count(b"=") and rng.random() < 0.7:  # the text of an extended header
        entry = rng.choice((b"13 size=-512\n", b"12 size=1e9\n", b"23 GNU.sparse.map=1,x\n", b"99999999999 a=b\n"))
        data[start : start + len(entry)] = entry
    header = data[start : start + 512]
    header[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    if rng.random() < 0.1:  # headers that belong to headers
        data[start:start] = data[start : start + 1024] * rng.choice((1, 2_000))


def parquet_shard(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """Change the footer, whose length is right again, or any bytes."""
    data = (seeds / "shard.parquet").read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    if rng.random() < 0.3:
        data = mutants.raw(data, rng)
    else:
        changed = mutants.raw(data[-8 - footer : -8], rng)
        data = data[: -8 - footer] + changed + len(changed).to_bytes(4, "little") + b"PAR1"
    path = work / f"shard.{rng.random()}.parquet"  # a name of its own, as row groups are remembered by it
    path.write_bytes(data)
    try:
        return _read_all(path, read_parquet)
    finally:
        path.unlink()


def _read_all(path: Path, read: Any) -> str | None:
    with contextlib.suppress(VitEdgeError):
        for image, label in read(path):
            if label is not None and not isinstance(label, str):
                return f"the label is {label!r}"
            with contextlib.suppress(VitEdgeError):
                read_file(image, what="image", max_bytes=_MOST_BYTES, error=ImageRejected)
    return None


def _message(rng: random.Random) -> tuple[bytes, str | None]:
    """Return the body of a changed request, and the length of its JSON or None."""
    pixels = np.zeros((rng.choice((0, 1, 2)), *SIZE, 3), np.uint8)
    if rng.random() < 0.5:
        body, headers = encode_request(pixels, name="images", datatype="UINT8")
        length = int(headers[HEADER_LENGTH])
        text = mutants.change_text(body[:length], rng)
        given = len(text) if rng.random() < 0.8 else rng.choice((-1, 0, 3, 2**31, 10**30))
        return text + body[length:], str(given)
    entry = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()[:50]}
    return mutants.change_text(json.dumps({"id": "a", "inputs": [entry]}).encode(), rng), None


def requests(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """A service that is asked anything."""
    manifest = open_model(seeds / "m.onnx", warn=False).manifest
    body, length = _message(rng)
    with contextlib.suppress(InputError):
        request = read_request(body, length, manifest)
        logits = np.zeros((len(request.images), len(manifest.labels)), np.float32)
        response, headers = respond(request, logits, name="m")
        json.loads(response[: int(headers.get(HEADER_LENGTH, len(response)))])
    return None


def responses(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """A server that responds with anything: its description, then logits."""
    manifest = open_model(seeds / "m.onnx", warn=False).manifest
    described = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 1, 3]}]}).encode()
    logits = {"name": "logits", "datatype": "FP32", "shape": [1, 7], "data": [0.5] * 7}
    said = [(described, None), (json.dumps({"outputs": [logits]}).encode(), None)]
    at = rng.randrange(2)
    said[at] = mutants.change_text(said[at][0], rng), rng.choice((None, None, "5", "x"))
    with mock.patch.object(Server, "_ask", side_effect=said), contextlib.suppress(VitEdgeError):
        Server("http://a", model="m", engine="onnxruntime", manifest=manifest).run(np.zeros((1, *SIZE, 3), np.uint8))
    return None
