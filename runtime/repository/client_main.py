"""A client of any server that speaks the Open Inference Protocol v2: classify images, or check the server.

    pip install vit-edge
    python client.py http://localhost:8000 image.jpg
    python client.py http://localhost:8000 --check

Images are prepared with the preprocessing of the model file next to this script, exactly as on a device. `--check`
sends the golden inputs and compares the logits with those of the model file: exit code 0 if they agree, 6 if not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge.errors import EngineUnavailable, InputError, VitEdgeError, escaped, printable
from vit_edge.image import Pixels
from vit_edge.metrics import activated
from vit_edge.model_file.artifact import Manifest
from vit_edge.runtime.checks.golden import check_golden, check_images
from vit_edge.runtime.engines.protocol import Engine, Logits
from vit_edge.runtime.serving.open_inference import HEADER_LENGTH, UNREADABLE, encode_request, read_logits

__all__ = ["Server", "main"]

_HERE = Path(__file__).resolve().parent
_TIMEOUT_S, _MOST_BYTES = 60, 200_000_000


class Server:
    """A model on a server, as an engine: pixels in, logits out."""

    version, device, float_precision, threads = "unknown", "server", "float32", 0
    batch_size: int | None = None
    placement: Mapping[str, int] | None = None
    fallback: str | None = None
    int8_fallback: str | None = None

    def __init__(self, url: str, *, model: str, engine: str, manifest: Manifest) -> None:
        self.name, self._manifest = engine, manifest
        self._url = f"{url.rstrip('/')}/v2/models/{model}"
        try:
            (entry,) = json.loads(self._ask("")[0])["inputs"]
            self._input = {"name": str(entry["name"]), "datatype": str(entry["datatype"])}
        except UNREADABLE as error:
            raise self._unavailable(f"the response does not describe the model ({error})") from error

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return float32 logits [batch, classes] of images after preprocessing; raises EngineUnavailable."""
        is_uint8 = self._input["datatype"] == "UINT8"
        tensor = images_NHWC if is_uint8 else self._manifest.preprocessing.normalise(images_NHWC)
        body, headers = encode_request(tensor, name=self._input["name"], datatype=self._input["datatype"])
        content, length = self._ask("/infer", body, headers)
        try:
            return read_logits(content, length)
        except UNREADABLE as error:
            raise self._unavailable(f"the response has no logits ({error})") from error

    def tensors(self, images: Any, names: Sequence[str]) -> list[Any]:
        """Return the logits, the one output that is asked for."""
        return [self.run(images) for _ in names]

    def twin(self) -> Engine:
        """Return the server itself: its requests are independent."""
        return self

    def close(self) -> None:
        """Do nothing: no connection stays open."""

    def _ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[bytes, Any]:
        try:
            request = urllib.request.Request(f"{self._url}{path}", data=body, headers=headers or {})
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                return response.read(_MOST_BYTES), response.headers.get(HEADER_LENGTH)
        except urllib.error.HTTPError as error:
            with error:
                raise self._unavailable(f"status {error.code}: {error.read(300).decode(errors='replace')}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._unavailable(str(error)) from error

    def _unavailable(self, reason: str) -> EngineUnavailable:
        remedy = "check the address and that the server is ready"
        return EngineUnavailable(f"cannot reach {self._url}", reason=reason, remedy=remedy)


def main(arguments: Sequence[str] | None = None, *, folder: Path = _HERE) -> int:
    """Classify the images named on the command line, or check the server; returns the exit code."""
    parser = argparse.ArgumentParser(description="Classify images on a server of the Open Inference Protocol v2.")
    parser.add_argument("url", help="Address of the server, such as http://localhost:8000.")
    parser.add_argument("images", nargs="*", type=Path, help="Images to classify.")
    parser.add_argument("--check", action="store_true", help="Compare the server with the golden vectors.")
    given = parser.parse_intermixed_args(arguments)
    try:
        manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"))
        server = Server(given.url, **json.loads((folder / "server.json").read_text()), manifest=manifest)
        if given.check:
            _check(server, manifest)
        for path in given.images:
            _classify(server, manifest, path)
    except VitEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _check(server: Server, manifest: Manifest) -> None:
    if manifest.golden is None:
        raise InputError("cannot check", reason="the file has no golden vectors", remedy="export it again")
    check_images(manifest.golden, manifest.preprocessing)
    check_golden(server, manifest)
    print(f"ready: {len(manifest.golden['seeds'])} golden inputs give the logits of the model file")


def _classify(server: Server, manifest: Manifest, path: Path) -> None:
    logits_BK = server.run(manifest.preprocessing.pixels(path)[np.newaxis])
    probabilities_K = activated(logits_BK, manifest.activation)[0]
    if manifest.task == "regression":
        values = (f"{label} {value:.6g}" for label, value in zip(manifest.labels, probabilities_K, strict=True))
        print(f"{path}: {'  '.join(values)}")
        return
    best = int(probabilities_K.argmax())
    print(f"{printable(path)}: {escaped(manifest.labels[best])} {probabilities_K[best]:.1%}")


if __name__ == "__main__":
    sys.exit(main())
