"""Keep ONNX Runtime from sending telemetry; must be set before it is imported."""

from __future__ import annotations

import os

__all__ = ["disable_telemetry"]


def disable_telemetry() -> None:
    """Switch off what ONNX Runtime 1.32 sends from Linux too, in this process and those it starts.

    A user who set ORT_DISABLE_TELEMETRY has chosen. Its warning that no device ID can be kept, without a home folder,
    goes too.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
