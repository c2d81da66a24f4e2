"""Measure that calibration on 2,000 images needs the memory of one on 100, and that a batch changes nothing.

    python benchmarks/calibration_memory.py MODEL IMAGES [--many 2000]

MODEL is a float32 model file, IMAGES a folder. Where it holds fewer than are needed, crops of them are written into a
temporary folder. Every calibration runs in a process of its own, which says its peak memory (VmHWM, of Linux). The INT8
file is made by `quantize` from the images of the folder, and answers them one by one and 16 at once. Writes a section
of docs/results.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from support.results import machine, write_section

METHODS = ("moving-average", "min-max", "percentile", "entropy", "mse")
FEW, BATCH = 100, 16
MOST_GROWTH = 1.10
_HEAD = [
    "| method | peak, {few} images | {few}, batch {batch} | {many} | growth | same bits at batch {batch} |",
    "|---|---|---|---|---|---|",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--many", type=int, default=2000)
    asked = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "openvino"))
    with tempfile.TemporaryDirectory() as name:
        folder = enough(asked.images, asked.many, Path(name))
        rows = [row(asked.model, folder, method, asked.many) for method in METHODS]
        answers = same_answers(asked.model, asked.images, Path(name) / "int8.onnx")
    head = [line.format(few=FEW, batch=BATCH, many=f"{asked.many:,}") for line in _HEAD]
    write_section("calibration-memory", "\n".join([f"{machine()}, {versions}.", "", *head, *rows, "", answers]))


def enough(folder: Path, wanted: int, scratch: Path) -> Path:
    """Return a folder of so many images: that given, or crops of its images at random places (seed 0)."""
    from PIL import Image

    from vit_edge.data import find_images

    paths = find_images(folder)
    if len(paths) >= wanted:
        return folder
    random = np.random.default_rng(0)
    for number, path in islice(((n, paths[n % len(paths)]) for n in count()), wanted):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        side = int(min(image.size) * random.uniform(0.7, 0.95))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        image.crop((left, top, left + side, top + side)).save(scratch / f"{number:05}.jpg", quality=90)
    return scratch


def row(model: Path, folder: Path, method: str, many: int) -> str:
    """Calibrate on few and on many, and in batches, and return the line of the table; ends where a claim fails."""
    few, batched, all_of_them = (calibrate(model, folder, method, *how) for how in ((FEW, 1), (FEW, BATCH), (many, 1)))
    if batched["ranges"] != few["ranges"]:
        sys.exit(f"{method}: batch {BATCH} gives other ranges than batch 1")
    ratios = [found["peak_bytes"] / few["peak_bytes"] for found in (batched, all_of_them)]
    if max(ratios) > MOST_GROWTH:
        sys.exit(f"{method}: batch {BATCH} and {many} images need {ratios} times the memory of {FEW} one by one")
    peaks = " | ".join(f"{found['peak_bytes'] / 1e6:.0f} MB" for found in (few, batched, all_of_them))
    line = f"| {method} | {peaks} | {ratios[1]:.3f} | {len(few['ranges'])} of {len(few['ranges'])} |"
    print(line, flush=True)
    return line


def calibrate(model: Path, folder: Path, method: str, num_images: int, batch: int) -> Any:
    """Return what a process of its own says of one calibration."""
    arguments = ["--calibrate", str(model), str(folder), method, str(num_images), str(batch)]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def calibrate_here(model: Path, folder: Path, method: Any, num_images: int, batch: int) -> None:
    """Calibrate, and print ranges and the peak memory of this process."""
    from vit_edge.data import find_images
    from vit_edge.export.quantization.calibration.images import CalibrationImages
    from vit_edge.export.quantization.calibration.observers import observe_ranges
    from vit_edge.export.quantization.qdq.placement import find_quantizable_ops
    from vit_edge.model_file.artifact import open_model

    opened = open_model(model)
    graph = opened.graph()
    tensors = [op.input for op in find_quantizable_ops(graph) if not op.takes_pixels]
    images = CalibrationImages(find_images(folder)[:num_images], opened.manifest)
    ranges = observe_ranges(graph, tensors, images, method=method, batch_size=batch)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    found = {name: [found.low, found.high] for name, found in ranges.items()}
    print(json.dumps({"ranges": found, "peak_bytes": 1024 * peak_kib}))


def same_answers(model: Path, images: Path, out: Path) -> str:
    """Quantize, and say whether each engine answers images one by one as it does 16 at once."""
    from vit_edge.data import find_images, stream_pixels
    from vit_edge.export import quantize
    from vit_edge.model_file.artifact import open_model
    from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines, make_engine

    quantize(model, calibration=images, out=out)
    opened = open_model(out)
    paths = find_images(images)
    pixels = np.stack([pixels for _, pixels in stream_pixels(paths, opened.manifest.preprocessing)])
    said = []
    for name in installed_engines():
        engine = make_engine(name, opened, EngineOptions())
        alone = np.concatenate([engine.run(pixels[[number]]) for number in range(len(pixels))])
        batched = np.concatenate([engine.run(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])
        equal = int(np.sum((alone == batched).all(axis=1)))
        same = int(np.sum(alone.argmax(axis=1) == batched.argmax(axis=1)))
        said.append(f"{name} {same} of {len(pixels)} the same class, {equal} of them the same logits to the last bit")
        if same < len(pixels):
            sys.exit(f"a batch changes answers: {said[-1]}")
    return f"Answers of the INT8 file, batch {BATCH} against one by one: {'; '.join(said)}."


if __name__ == "__main__":
    if sys.argv[1:2] == ["--calibrate"]:
        calibrate_here(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
