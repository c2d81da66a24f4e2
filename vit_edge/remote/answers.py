"""A model on a device that gives its logits or embeddings here: images go there prepared, statistics are made here."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vit_edge.errors import EngineUnavailable
from vit_edge.image import Pixels
from vit_edge.metrics import Logits
from vit_edge.remote.device import Bundle, Session
from vit_edge.remote.logits_child import READY, read_message, write_message

__all__ = ["RemoteModel"]


class RemoteModel:
    """A model file on a device, loaded in one engine there; its golden vectors passed there. A context, to end it."""

    def __init__(
        self, session: Session, bundle: Bundle, *, model: Path, engine: str, threads: int | None, seconds: float
    ) -> None:
        self._session, self._bundle, self._seconds = session, bundle, seconds
        module = "vit_edge.remote.logits_child"
        where = f"{session.facts['folder']}/{bundle.name_there(model)}"
        self._process = session.open(["-m", module, where, engine, str(threads or 0)])
        self.described: dict[str, Any] = {}

    def __enter__(self) -> RemoteModel:
        try:
            with self._in_time():
                while (line := self._output.readline()) != READY:
                    if not line:
                        raise self._session.lost("the model could not be loaded there")
                self.described = self._answer()[0]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return what `LoadedModel.run` does for uint8 RGB images [batch, height, width, 3], computed there."""
        assert self._process.stdin is not None
        with self._in_time():
            try:
                write_message(self._process.stdin, {}, images_NHWC)
            except (OSError, ValueError):
                raise self._session.lost("the connection was lost") from None
            found = self._answer()[1]
        if found is None or len(found) != len(images_NHWC) or not np.isfinite(found).all():
            reason = "the device did not return finite values for each image"
            raise EngineUnavailable(f"{self._session.device.name}: cannot use it", reason=reason, remedy="run it again")
        return np.asarray(found, dtype=np.float32)

    @property
    def _output(self) -> Any:
        return self._process.stdout

    def _answer(self) -> tuple[dict[str, Any], Any]:
        try:
            message = read_message(self._output)
        except ValueError as error:
            raise self._session.lost(f"the device sent an invalid message ({error})") from error
        if message is None:
            raise self._session.lost("the connection was lost")
        if "error" in message[0]:
            raise self._session.error_of(self._session.here(message[0]["error"], self._bundle))
        return message

    @contextlib.contextmanager
    def _in_time(self) -> Any:
        """Kill the connection after so many seconds: what waits for it goes on then, and finds it ended."""
        timer = threading.Timer(self._seconds, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(Exception):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        self._output.close()
