"""The commands that do a deployment's steps one by one: what its record keeps for whoever wants to do them again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from vit_edge.errors import printable
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

Path = str | os.PathLike[str]


def step_commands(
    files: Mapping[str, Path], *, told: Mapping[str, Path | None], options: QuantizationOptions
) -> dict[str, str]:
    """Return for every step a line for a shell, which works in the folder where the deployment was made.

    `files` has `source`, `calibration`, `data`, `model` (the float file), `out` (the INT8 file) and `record`; `told` is
    what was told of the network. `speed` asks the same with the benchmark, `check` verifies the record again.
    """
    network = [word for name, value in told.items() if value is not None for word in (f"--{name}", value)]
    images = ["--calibration", files["calibration"], "--data", files["data"]]
    lines = {
        "export": ["export", files["source"], *network, "-o", files["model"]],
        "quantize": ["quantize", files["model"], *images, *_words(options), "-o", files["out"]],
        "speed": ["benchmark", files["model"], files["out"], "--threads", "1"],
        "check": ["deploy", "--check", files["record"]],
    }
    return {name: shlex.join(["vit-edge", *(printable(str(word)) for word in line)]) for name, line in lines.items()}


def _words(options: QuantizationOptions) -> list[Any]:
    """Return the options of `vit-edge quantize` for what is not as it is by default."""
    words: list[Any] = []
    for name, value in options.specified.items():
        if name in _FLAGS:
            words.append(_FLAGS[name])
        elif name == "time_limit_s":
            words += ["--time-limit", value / 60]
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [word for each in values for word in (_OPTIONS[name], each)]
    return words
