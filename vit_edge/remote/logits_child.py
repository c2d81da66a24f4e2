"""Run as a process of its own, on a device: the logits of the images that come in on stdin go out on stdout.

Messages both ways are a JSON header and a payload, each behind its length in 8 bytes: arrays as `.npy`. The first goes
out behind a line that marks it, for login shells print too; it tells what runs. It ends where stdin does.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vit_edge.errors import VitEdgeError

__all__ = ["READY", "main", "read_message", "write_message"]

READY = b"@vit-edge-logits\n"
_MOST_BYTES = 2**31
_LENGTH_BYTES = 8


def write_message(stream: IO[bytes], header: dict[str, Any], array: npt.NDArray[Any] | None = None) -> None:
    """Write a header, and an array where there is one."""
    payload = io.BytesIO()
    if array is not None:
        np.save(payload, array, allow_pickle=False)
    for part in (json.dumps(header).encode(), payload.getvalue()):
        stream.write(len(part).to_bytes(_LENGTH_BYTES, "big"))
        stream.write(part)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], npt.NDArray[Any] | None] | None:
    """Return a header and its array, or None where the stream ended; raises ValueError on anything else."""
    header = _part(stream)
    payload = None if header is None else _part(stream)
    if header is None or payload is None:
        return None
    values = json.loads(header)
    if not isinstance(values, dict):
        raise ValueError("the header of a message is not an object")
    return values, np.load(io.BytesIO(payload), allow_pickle=False) if payload else None


def _part(stream: IO[bytes]) -> bytes | None:
    length = stream.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        return None
    size = int.from_bytes(length, "big")
    if size > _MOST_BYTES:
        raise ValueError(f"a message of {size:,} bytes")
    data = stream.read(size)
    return data if len(data) == size else None


def main(path: str, engine: str, threads: str) -> None:
    """Answer batches of uint8 images [batch, height, width, 3] with float32 logits or embeddings [batch, values]."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # engines and drivers print on stdout too
    answers.write(READY)
    try:
        # Imported here, so that import errors are reported like all others.
        from vit_edge.runtime.loading import load

        with load(path, engine=engine, threads=int(threads) or None) as classifier:  # type: ignore[arg-type]
            write_message(answers, classifier.describe())
            while (message := read_message(sys.stdin.buffer)) is not None:
                images_NHWC = message[1]
                assert images_NHWC is not None  # it is all that we send
                write_message(answers, {}, classifier.run(images_NHWC))
    except VitEdgeError as error:
        names = ("what", "file", "reason", "remedy")
        write_message(
            answers, {"error": {name: getattr(error, name) for name in names} | {"type": type(error).__name__}}
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
