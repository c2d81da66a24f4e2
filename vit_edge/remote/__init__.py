"""Other machines: a board over SSH, an Android device over adb. Nothing here needs torch, and nothing stays there."""

from __future__ import annotations

__all__: list[str] = []
