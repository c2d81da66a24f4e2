"""Measure what each algorithm does to accuracy and to time.

    python benchmarks/algorithms.py FLOAT.onnx --calibration IMAGES [--target x86-vnni] [--effort balanced]

Two thirds of the calibration images calibrate, every third judges: no image that evaluates anything else is opened.
Files are made with nothing but moving-average and the nearest rounding, with one algorithm more at a time, with each
recipe, and with `fast` less one algorithm. Time is that of the file against the float one, in turns, in each engine.
Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.results import machine, versions, write_section

from vit_edge.data import find_images, stream_pixels
from vit_edge.export import QuantizationOptions, quantize
from vit_edge.export.quantization.algorithms.recipes import RECIPES
from vit_edge.image import Pixels
from vit_edge.metrics import Logits, sqnr_db
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines, make_engine

_EVERY = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One file: SQNR and times as fast as float by engine, and the seconds that it took to make."""

    title: str
    sqnr_db: dict[str, float]
    ratio: dict[str, float]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--target", default="x86-vnni")
    parser.add_argument("--effort", default="balanced")
    asked = parser.parse_args()
    source = open_model(asked.model)
    paths = find_images(asked.calibration)
    judging = [pixels for _, pixels in stream_pixels(paths[::_EVERY], source.manifest.preprocessing)]
    expected = {engine: answers(source, engine, judging) for engine in installed_engines()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        for number, path in enumerate(paths):
            if number % _EVERY:
                (folder / f"{number}{path.suffix}").symlink_to(path.resolve())
        rows = []
        for title, algorithms in variants().items():
            options = QuantizationOptions(target=asked.target, effort=asked.effort, use_cache=False, **algorithms)  # type: ignore[arg-type]
            started = time.monotonic()
            result = quantize(asked.model, calibration=folder, out=Path(name) / "q.onnx", options=options, force=True)
            seconds = time.monotonic() - started
            model = open_model(Path(name) / "q.onnx")
            levels = {engine: sqnr_db(expected[engine], answers(model, engine, judging)) for engine in expected}
            rows.append(
                Row(title=title, sqnr_db=levels, ratio={s.engine: s.ratio for s in result.speed}, seconds=seconds)
            )
            print(rows[-1], flush=True)
    write_section(f"algorithms-{asked.target}", markdown(rows, asked.target, asked.effort, len(judging), len(paths)))


def variants() -> dict[str, dict[str, object]]:
    """Return the options of each file, by what the table calls it."""
    fast = RECIPES["fast"]
    found: dict[str, dict[str, object]] = {"moving-average, nearest rounding": {"without": fast}}
    found["overall min-max instead"] = {"without": fast, "ranges": "min-max"}
    for number in range(1, len(fast)):
        found[f"+ `{fast[number - 1]}`"] = {"algorithms": fast[:number]}
    found[f"+ `{fast[-1]}` = recipe `fast`"] = {}
    for name in fast:
        found[f"`fast` without `{name}`"] = {"without": (name,)}
    found["`fast` and `bias-correction`"] = {"algorithms": (*fast, "bias-correction")}
    found["recipe `accurate`"] = {"recipe": "accurate"}
    return found


def answers(model: ModelFile, engine: str, images: list[Pixels]) -> Logits:
    """Return the logits of each image alone."""
    loaded = make_engine(engine, model, EngineOptions())
    try:
        return np.concatenate([loaded.run(image[None]) for image in images])
    finally:
        loaded.close()


def markdown(rows: list[Row], target: str, effort: str, num_judging: int, num_images: int) -> str:
    engines = list(rows[0].sqnr_db)
    columns = [*(f"SQNR, {engine}" for engine in engines), *(f"speed, {engine}" for engine in engines)]
    images = f"{num_images - num_judging} images calibrate, {num_judging} others judge"
    lines = [
        f"{machine()}, {versions()}. Target `{target}`, effort `{effort}`, {images}.",
        "Speed is times as fast as float, batch 1, one thread, medians in turns.",
        "",
        f"| algorithms | {' | '.join(columns)} | seconds to make |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in rows:
        cells = [*(f"{row.sqnr_db[engine]:.1f} dB" for engine in engines), *(f"{row.ratio[e]:.2f}" for e in engines)]
        lines.append(f"| {row.title} | {' | '.join(cells)} | {row.seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
