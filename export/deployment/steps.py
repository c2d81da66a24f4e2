"""The steps of a deployment: one that ran before on the same inputs is taken from the record, not run again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vit_edge.errors import InputError
from vit_edge.export.deployment.record import RECORD_FILE, file_sha256, read_record

__all__ = ["Steps"]


class Steps:
    """The steps done so far, with inputs, output hash, seconds and result, as the record keeps them."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Any] = {}
        self.ran: list[str] = []
        self.skipped: list[str] = []
        try:
            self._before = read_record(folder / RECORD_FILE)["steps"]
        except InputError:
            self._before = {}

    def run(self, name: str, inputs: Mapping[str, Any], work: Callable[[], Any], out: Path | None = None) -> Any:
        """Return the result of `work`; it is skipped if it ran with these inputs and `out` is the file it wrote."""
        plain = json.loads(json.dumps(inputs, default=str))
        before = self._before.get(name)
        is_same = isinstance(before, dict) and before.get("inputs") == plain
        if is_same and (out is None or (out.is_file() and file_sha256(out) == before.get("output"))):
            self.entries[name] = before
            self.skipped.append(name)
            return before["result"]
        started = time.monotonic()
        result = json.loads(json.dumps(work(), default=str))
        seconds = round(time.monotonic() - started, 1)
        output = None if out is None else file_sha256(out)
        self.entries[name] = {"inputs": plain, "output": output, "seconds": seconds, "result": result}
        self.ran.append(name)
        return result
