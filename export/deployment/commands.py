"""The commands that do a deployment's steps one by one: the record keeps them for anyone who repeats the steps."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_edge.export.deployment.record import FLOAT32_FILE, INT8_FILE, RECORD_FILE, relative
from vit_edge.export.quantization.options import QuantizationOptions

__all__ = ["step_commands"]

# A field of QuantizationOptions -> its option; flags are those that are false by default.
_OPTIONS = {
    "precision": "--precision",
    "target": "--target",
    "recipe": "--recipe",
    "effort": "--effort",
    "algorithms": "--algorithm",
    "without": "--without",
    "ranges": "--ranges",
    "batch_size": "--batch-size",
    "max_drop_points": "--max-drop",
    "min_agreement": "--min-agreement",
}
_FLAGS = {"unlabelled": "--unlabelled", "use_cache": "--no-cache", "measure_speed": "--no-speed"}


def step_commands(
    source: str | os.PathLike[str],
    *,
    images: Mapping[str, str],
    network: Mapping[str, str | os.PathLike[str] | None],
    options: QuantizationOptions,
    folder: Path,
) -> dict[str, str]:
    """Return for every step a line for a shell in the record's folder.

    `images` are the folders `calibration` and `data`, relative to the record; `network` is what the user specified of
    the network. `speed` measures the same with the benchmark, `check` verifies the record again.
    """
    specified = [
        w for name, value in network.items() if value is not None for w in (f"--{name}", relative(value, folder))
    ]
    given = [word for name, value in images.items() for word in (f"--{name}", value)]
    lines = {
        "export": ["export", relative(source, folder), *specified, "-o", FLOAT32_FILE],
        "quantize": ["quantize", FLOAT32_FILE, *given, *_words(options, folder), "-o", INT8_FILE],
        "speed": ["benchmark", FLOAT32_FILE, INT8_FILE, "--threads", "1"],
        "check": ["deploy", "--check", RECORD_FILE],
    }
    return {name: shlex.join(["vit-edge", *line]) for name, line in lines.items()}


def _words(options: QuantizationOptions, folder: Path) -> list[str]:
    """Return the options of `vit-edge quantize` that differ from their defaults."""
    words: list[Any] = []
    for name, value in options.specified.items():
        if name in _FLAGS:
            words.append(_FLAGS[name])
        elif name == "time_limit_s":
            words += ["--time-limit", value / 60]
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [word for each in values for word in (_OPTIONS[name], each)]
    return [relative(str(word), folder) if _is_target_file(word) else str(word) for word in words]


def _is_target_file(word: object) -> bool:
    """Return whether a word is the file of a target, the one option of these that may name a path."""
    return isinstance(word, str) and word.endswith(".json")
