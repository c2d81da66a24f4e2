"""A Ray Serve application over `vit_edge.runtime.Pool`: `/classify`, and the Open Inference Protocol v2.

    pip install "vit-edge[onnxruntime]" "ray[serve]"
    serve run serve_config.yaml
    curl --data-binary @image.jpg localhost:8000/classify

A replica is ready after the golden vectors passed in it, and is replaced if it stops giving their logits.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge import __version__
from vit_edge.errors import Closed, DeadlineExceeded, InputError, Overloaded, VitEdgeError
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.serving import open_inference
from vit_edge.runtime.serving.pool import Pool

__all__ = ["Service", "build"]

_STATUS: dict[type[VitEdgeError], int] = {InputError: 400, Overloaded: 503, Closed: 503, DeadlineExceeded: 504}
_DEADLINE_S = 2.0


class Service:
    """One loaded model with its workers: what a replica runs."""

    def __init__(self, *, model: str, engine: Any, workers: int, threads: int) -> None:
        self._pool = Pool(model, engine=engine, workers=workers, threads=threads)
        manifest = self._pool.manifest
        height, width = manifest.preprocessing.crop
        self._golden = golden_images((manifest.golden or {})["seeds"][:1], height=height, width=width)
        self._expected = self._pool.submit_logits(self._golden).result()

    async def check_health(self) -> None:
        """Raise if the model no longer gives the class of its first golden input: Ray Serve replaces the replica."""
        try:
            found = await asyncio.wrap_future(self._pool.submit_logits(self._golden, timeout_s=_DEADLINE_S))
        except (DeadlineExceeded, Overloaded):  # busy with images of clients
            return
        if np.argmax(found) != np.argmax(self._expected):
            raise RuntimeError("the model gives other logits than when it was loaded")

    async def __call__(self, request: Any) -> Any:
        """Respond to one request of Starlette."""
        from starlette.responses import JSONResponse, Response

        try:
            content, headers = await self._respond(request.method, request.url.path.rstrip("/"), request)
        except VitEdgeError as error:
            status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
            return JSONResponse({"error": str(error)}, status_code=status)
        if content is None:
            return JSONResponse({"error": f"there is no {request.url.path}"}, status_code=404)
        return Response(content, headers=headers) if isinstance(content, bytes) else JSONResponse(content)

    async def _respond(self, method: str, path: str, request: Any) -> tuple[Any, dict[str, str]]:
        """Return the body of the response, None if nothing is at this path, and its headers."""
        described = open_inference.model_metadata(self._pool.manifest)
        model = f"/v2/models/{described['name']}"
        known: dict[str, Any] = {
            "/v2": open_inference.server_metadata(__version__),
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
            model: described,
            f"{model}/ready": {"name": described["name"], "ready": True},
        }
        if method == "GET":
            return known.get(path), {}
        if path == "/classify":
            prediction = await self._pool.classify(await request.body(), timeout_s=_DEADLINE_S)
            return prediction.to_dict(), {}
        if path != f"{model}/infer":
            return None, {}
        length = request.headers.get(open_inference.HEADER_LENGTH)
        asked = open_inference.read_request(await request.body(), length, self._pool.manifest)
        logits = await asyncio.wrap_future(self._pool.submit_logits(asked.images, timeout_s=_DEADLINE_S))
        return open_inference.respond(asked, logits, name=described["name"])


def build(arguments: dict[str, Any]) -> Any:
    """Return the application that `serve_config.yaml` describes; the model's path is relative to this file."""
    from ray import serve

    model = str(Path(__file__).resolve().parent / arguments["model"])
    return serve.deployment(Service).bind(**{**arguments, "model": model})
