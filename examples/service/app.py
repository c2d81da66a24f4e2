"""A classifier as an HTTP service: FastAPI in front of the runtime's pool.

    pip install "vit-edge[onnxruntime]" fastapi uvicorn
    VIT_EDGE_MODEL=model.int8.onnx python -m uvicorn app:app --app-dir examples/service --http app:Impatient --port 8000
    curl --data-binary @image.jpg -H "Content-Type: image/jpeg" localhost:8000/classify
    curl localhost:8000/healthz

It speaks the Open Inference Protocol v2 too (`/v2/models/NAME/infer`): `tritonclient[http]` and KServe clients work.
The settings are environment variables; README.md next to this file lists them, and every answer but 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from vit_edge import __version__
from vit_edge.errors import Closed, DeadlineExceeded, ImageRejected, InputError, Overloaded, UsageError, VitEdgeError
from vit_edge.image import FORMATS
from vit_edge.runtime import Pool
from vit_edge.runtime.serving import open_inference

# The log of uvicorn is the one that a service manager shows.
_log = logging.getLogger("uvicorn.error")
_RETRY_AFTER_S = 1
_STATUS: dict[type[VitEdgeError], int] = {
    ImageRejected: 422,
    InputError: 400,
    Overloaded: 503,
    Closed: 503,
    DeadlineExceeded: 504,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the environment says; raises UsageError where a number is none, or out of its range."""

    model: str
    workers: int | None
    threads: int
    queue_size: int | None
    max_bytes: int
    max_pixels: int
    deadline_s: float
    header_s: float
    body_s: float
    watch: bool

    @classmethod
    def read(cls) -> Settings:
        model = os.environ.get("VIT_EDGE_MODEL")
        if not model:
            remedy = "set it to the path of a model file"
            raise UsageError("cannot start", reason="VIT_EDGE_MODEL is not set", remedy=remedy)
        return cls(
            model=model,
            workers=_number("VIT_EDGE_WORKERS", int, None),
            threads=_number("VIT_EDGE_THREADS", int, 1),
            queue_size=_number("VIT_EDGE_QUEUE", int, None),
            max_bytes=_number("VIT_EDGE_MAX_BYTES", int, 10_000_000),
            max_pixels=_number("VIT_EDGE_MAX_PIXELS", int, 12_500_000),
            deadline_s=_number("VIT_EDGE_DEADLINE_MS", float, 2000.0) / 1000,
            header_s=_number("VIT_EDGE_HEADER_MS", float, 5_000.0) / 1000,
            body_s=_number("VIT_EDGE_BODY_MS", float, 10_000.0) / 1000,
            watch=_number("VIT_EDGE_WATCH", int, 0) == 1,
        )


def _number(name: str, kind: Callable[[str], Any], default: Any) -> Any:
    text = os.environ.get(name, "")
    try:
        return kind(text) if text else default
    except ValueError as error:
        raise UsageError("cannot start", reason=f"{name} is {text!r}", remedy="give a number") from error


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load and check the model before the first request; at the end, answer those that wait."""
    app.state.settings = settings = Settings.read()
    app.state.pool = pool = await asyncio.to_thread(
        Pool,
        settings.model,
        workers=settings.workers,
        threads=settings.threads,
        queue_size=settings.queue_size,
    )
    app.state.answered = 0
    watchdog = asyncio.create_task(beat(pool))
    try:
        if settings.watch:
            pool.watch(settings.model)
        described = pool.describe()
        _log.info("%(name)s in %(engine)s %(engine_version)s on %(device)s: %(workers)d workers", described)
        notify("READY=1")
        yield
    finally:
        notify("STOPPING=1")
        watchdog.cancel()
        await asyncio.to_thread(pool.close)


def notify(state: str) -> None:
    """Tell systemd, where it is what started this process; sd_notify(3) has the protocol."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # a manager that does not listen holds nobody up
            datagrams.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


async def beat(pool: Pool) -> None:
    """Tell systemd twice in each WatchdogSec that images are answered, as long as they are.

    A driver or an engine that hangs raises nothing: only what asks for an answer finds out.
    """
    period_s = float(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    upload, before = np.zeros((64, 64, 3), np.uint8), 0
    while period_s:
        await asyncio.sleep(period_s)
        try:
            await asyncio.wait_for(pool.classify(upload, top=1), period_s / 2)
        except (VitEdgeError, asyncio.TimeoutError) as error:
            if app.state.answered == before:  # else it has no room for this image because it answers others
                _log.error("no answer for the watchdog: %s", str(error) or f"nothing in {period_s / 2:g} s")
                continue
        before = app.state.answered
        notify("WATCHDOG=1")


class Impatient(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit on the time for the headers: clients that send slowly hold no connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def on_response_complete(self) -> None:
        self._wait_for_headers()
        super().on_response_complete()

    def _wait_for_headers(self) -> None:
        self.loop.call_later(app.state.settings.header_s, self._close_unless_busy, self.cycle)

    def _close_unless_busy(self, before: Any) -> None:
        """Close the connection if no request has come since then: its cycle is the one of before."""
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()


app = FastAPI(title="vit-edge", lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5) -> dict[str, Any]:
    """Answer for the image that is the body: `label`, `probability`, `answers`, `timings`."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise Refused(415, "the body is a form; send the bytes of the image themselves")
    settings: Settings = app.state.settings
    pool: Pool = app.state.pool
    upload = await body_in_time(request)
    await asyncio.to_thread(check_pixels, upload, settings.max_pixels)
    prediction = await pool.classify(upload, top=top, timeout_s=settings.deadline_s)
    app.state.answered += 1
    return prediction.to_dict()


@app.get("/healthz")
async def healthz() -> dict[str, Any]:
    """Tell what really runs, and whether an image sent now would be refused."""
    described = app.state.pool.describe()
    overloaded = described["queued"] >= described["queue_size"]
    return {"status": "overloaded" if overloaded else "ok", **described}


@app.get("/v2")
async def server_metadata() -> dict[str, Any]:
    return open_inference.server_metadata(__version__)


@app.get("/v2/health/live")
async def live() -> dict[str, bool]:
    return {"live": True}


@app.get("/v2/health/ready")
async def ready() -> dict[str, bool]:
    """Respond once the golden vectors passed: before that, nothing listens."""
    return {"ready": True}


@app.get("/v2/models/{name}")
@app.get("/v2/models/{name}/versions/1")
async def model_metadata(name: str) -> dict[str, Any]:
    return served_model(name)


@app.get("/v2/models/{name}/ready")
@app.get("/v2/models/{name}/versions/1/ready")
async def model_ready(name: str) -> dict[str, Any]:
    return {"name": served_model(name)["name"], "ready": True}


@app.post("/v2/models/{name}/infer")
@app.post("/v2/models/{name}/versions/1/infer")
async def infer(request: Request, name: str) -> Response:
    """Respond with the logits of preprocessed images, in JSON or as raw bytes; a request is one place in the queue."""
    served_model(name)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "the body is compressed; send it as it is")
    pool: Pool = app.state.pool
    body = await body_in_time(request)
    asked = open_inference.read_request(body, request.headers.get(open_inference.HEADER_LENGTH), pool.manifest)
    logits = pool.submit_logits(asked.images, timeout_s=app.state.settings.deadline_s)
    content, headers = open_inference.respond(asked, await asyncio.wrap_future(logits), name=name)
    app.state.answered += 1
    return Response(content, headers=headers)


def served_model(name: str) -> dict[str, Any]:
    """Return what the protocol tells of the model; raises Refused (404) for any other name."""
    described = open_inference.model_metadata(app.state.pool.manifest)
    if name != described["name"]:
        raise Refused(404, f"there is no model {name!r}; the model is {described['name']!r}")
    return described


class Refused(Exception):
    """A request that does not come as far as the classifier."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def body_in_time(request: Request) -> bytes:
    """Return the body; raises Refused if it is too large (413) or too slow (408)."""
    settings: Settings = app.state.settings
    try:
        return await asyncio.wait_for(read_body(request, settings.max_bytes), settings.body_s)
    except asyncio.TimeoutError as error:  # a name of its own in Python 3.10
        raise Refused(408, f"the body did not arrive within {settings.body_s:g} s") from error


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body; raises Refused (413) where it has more than `max_bytes`, of which no more are kept."""
    too_large = Refused(413, f"the body has more than {max_bytes:,} bytes")
    if "expect" in request.headers and int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large  # the client asks before it sends
    body, num_bytes = bytearray(), 0
    async for part in request.stream():
        num_bytes += len(part)
        # The rest is read and thrown away: a connection that is closed while the client sends loses the answer.
        if num_bytes <= max_bytes:
            body += part
        else:
            body.clear()
    if num_bytes > max_bytes:
        raise too_large
    return bytes(body)


def check_pixels(upload: bytes, max_pixels: int) -> None:
    """Raise Refused (413) where an image says that it has more than `max_pixels`: each takes up to 12 bytes."""
    try:
        with Image.open(io.BytesIO(upload), formats=FORMATS) as image:
            num_pixels = image.width * image.height
    except Exception:  # what is wrong with it the classifier tells, in its own words
        return
    if num_pixels > max_pixels:
        raise Refused(413, f"the image has {num_pixels:,} pixels; at most {max_pixels:,} are decoded")


@app.exception_handler(Refused)
async def refuse(request: Request, error: Refused) -> JSONResponse:
    return problem(request, "Refused", str(error), status=error.status)


@app.exception_handler(VitEdgeError)
async def explain(request: Request, error: VitEdgeError) -> JSONResponse:
    """Answer with the error's own text; what is nobody's fault but ours is a 500, and goes to the log."""
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
    if status == 500:
        _log.error("%s", error)
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else None
    return problem(request, type(error).__name__, str(error), status=status, headers=headers)


def problem(
    request: Request, kind: str, message: str, *, status: int, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return an error as JSON; the Open Inference Protocol has the text itself under `error`."""
    is_v2 = request.url.path.startswith("/v2")
    content = {"error": message} if is_v2 else {"error": kind, "message": message}
    return JSONResponse(content, status_code=status, headers=headers)


@app.exception_handler(ClientDisconnect)
async def hang_up(request: Request, error: ClientDisconnect) -> JSONResponse:
    """End a request whose client has gone: nobody reads the answer, and it is no fault of the service."""
    return JSONResponse({"error": "Refused", "message": "the client went away"}, status_code=400)
