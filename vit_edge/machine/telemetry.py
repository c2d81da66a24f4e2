"""Keep ONNX Runtime and OpenVINO from sending telemetry."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

__all__ = ["disable_telemetry", "openvino_without_telemetry"]

_OPENVINO_TELEMETRY = "openvino_telemetry"


def disable_telemetry() -> None:
    """Switch off what ONNX Runtime 1.32 sends from Linux too, in this process and those it starts.

    It must be called before ONNX Runtime is imported. A user who set ORT_DISABLE_TELEMETRY has chosen. Its warning
    that no device ID can be kept, without a home folder, goes too.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@contextmanager
def openvino_without_telemetry() -> Iterator[None]:
    """Import OpenVINO in here: by itself the import starts a process that reports to its makers, without asking.

    Where nothing answers, each process that imported it waits 3 s for that before it ends. OpenVINO does without the
    package of its telemetry if it isn't there; afterwards it is there again for other code.
    """
    modules = cast("dict[str, Any]", sys.modules)
    absent = _OPENVINO_TELEMETRY not in modules
    modules.setdefault(_OPENVINO_TELEMETRY, None)
    try:
        yield
    finally:
        if absent:
            del modules[_OPENVINO_TELEMETRY]
