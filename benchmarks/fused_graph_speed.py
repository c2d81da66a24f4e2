"""Measure how much faster the fused inference graph is than the same network traced as it is, in turn, batch 1.

    python benchmarks/fused_graph_speed.py CHECKPOINT [--rounds 20] [--out FILE]

ONNX Runtime, one thread. Needs the machine for itself: the rounds alternate, so that drift hits both alike, but other
work on the same cores does not. Writes a section of docs/results.md, and with --out every sample as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from support.results import machine, write_section
from support.timing import take_turns

from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.graph.macs import costs
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.classifier import Classifier

FORMS = ("deploy", "plain")
GOAL = 1.08


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--queries", type=int, default=25, help="in each round")
    parser.add_argument("--out", type=Path, help="write every sample as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {form: export(arguments.checkpoint, Path(folder), form) for form in FORMS}
        samples_ms, described = measure(files, rounds=arguments.rounds, queries=arguments.queries)
        gmac = {form: (costs(open_model(path).graph()).macs_per_image or 0) / 1e9 for form, path in files.items()}
    result = summary(samples_ms, gmac) | {"ran": described, "machine": machine()}
    print(json.dumps(result, indent=1))
    write_section("deploy-form", table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps({**result, "samples_ms": samples_ms}) + "\n", encoding="utf-8")


def export(checkpoint: Path, folder: Path, form: str) -> Path:
    out = folder / f"{form}.onnx"
    export_onnx(checkpoint, out=out, options=ExportOptions(fuse=form == "deploy"))
    return out


def measure(files: dict[str, Path], *, rounds: int, queries: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return every sample in milliseconds by form, measured in turns, and what ran."""
    classifiers = [load(path, engine="onnxruntime", threads=1) for path in files.values()]
    height, width = classifiers[0].manifest.preprocessing.crop
    images = golden_images(range(4), height=height, width=width)
    asked = [partial(ask, classifier, images) for classifier in classifiers]
    samples_CRQ = take_turns(asked, rounds=rounds, queries=queries)
    described = classifiers[0].describe()
    kept = {key: described[key] for key in ("engine", "engine_version", "device", "float_precision", "threads")}
    return {form: samples_RQ.ravel().tolist() for form, samples_RQ in zip(files, samples_CRQ, strict=True)}, kept


def ask(classifier: Classifier, images_NHWC: Pixels, number: int) -> None:
    classifier.logits(images_NHWC[number % len(images_NHWC)][None])


def summary(samples_ms: dict[str, list[float]], gmac: dict[str, float]) -> dict[str, Any]:
    medians = {form: float(np.median(values)) for form, values in samples_ms.items()}
    minima = {form: min(values) for form, values in samples_ms.items()}
    return {
        "median_ms": medians,
        "min_ms": minima,
        "gmac_per_image": gmac,
        "gmac_saved_percent": 100 * (1 - gmac["deploy"] / gmac["plain"]),
        "times_as_fast": {
            "by_median": medians["plain"] / medians["deploy"],
            "by_min": minima["plain"] / minima["deploy"],
        },
        "goal": GOAL,
        "queries": len(samples_ms["deploy"]),
    }


def table(result: dict[str, Any]) -> str:
    rows = [
        f"| {form} | {result['gmac_per_image'][form]:.3f} | {result['median_ms'][form]:.2f} ms | "
        f"{result['min_ms'][form]:.2f} ms |"
        for form in FORMS
    ]
    faster, ran = result["times_as_fast"], result["ran"]
    where = f"{ran['engine']} {ran['engine_version']}, batch 1, {ran['threads']} thread, {result['machine']}"
    found = f"**{faster['by_median']:.2f} times** as fast by the median, {faster['by_min']:.2f} by the minimum"
    saved = f"{result['gmac_saved_percent']:.1f} % fewer multiplications"
    lines = [
        f"{result['queries']} queries each, in turn, {where}: the fused inference graph is {found}, with {saved}.",
        "",
        "| form | GMAC per image | median | minimum |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
