"""Measure our INT8 files against those of other tools: the same float file and images for all, in one run.

    python benchmarks/peers.py FLOAT.onnx --calibration DIR --data LABELLED
        [--make "--target x86-vnni"]... [--ours INT8.onnx]... [--plain PLAIN.onnx] [--limit N] [--json FILE]

--make runs `vit-edge quantize` with these options, as the other tools run: in a process of its own, timed, its peak
memory read. --ours takes files that are there. Answers are compared with those of the float file in the same engine,
image by image at batch 1; the evaluation images judge and tune nothing. Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from int8_speed import hashes
from support.contestants import (
    Contestant,
    Setting,
    TimedSamples,
    answers,
    float_file,
    latency,
    make_peers,
    measure_and_write,
    our_file,
    our_files,
    plain_file,
    time_all,
)
from support.quantizing import NNCF_PLAIN, NNCF_TRANSFORMER, ORT_DYNAMIC, ORT_STATIC, OURS, make
from support.results import machine, versions
from support.timing import count

from vit_edge.data import EVALUATION_SPLITS, find_images, pixel_hashes, read_labelled, refuse_overlap, stream_pixels
from vit_edge.image import Pixels, pixel_hash
from vit_edge.metrics import Logits, compare
from vit_edge.model_file.artifact import ModelFile

SECTION = "peers"
PEERS = (ORT_STATIC, ORT_DYNAMIC, NNCF_TRANSFORMER, NNCF_PLAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judges:
    """The images that judge, each once, and the class of each."""

    images: tuple[Pixels, ...]
    labels_B: npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_model", type=Path, metavar="FLOAT.onnx")
    parser.add_argument("--calibration", type=Path, required=True, help="images for every tool alike")
    parser.add_argument("--data", type=Path, required=True, help="labelled images that judge")
    parser.add_argument("--make", action="append", default=[], metavar="OPTIONS", help="of `vit-edge quantize`")
    parser.add_argument("--ours", type=Path, action="extend", nargs="+", default=[], metavar="INT8.onnx")
    parser.add_argument("--plain", type=Path, metavar="PLAIN.onnx", help="peers are made from this float file too")
    parser.add_argument("--limit", type=count, help="judge by so many of the images only")
    measure_and_write(parser, SECTION, run, table)


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    reference = float_file(arguments.float_model)
    ours = our_files(arguments.ours, reference)
    sources = [reference, *([plain_file(arguments.plain, reference)] if arguments.plain else [])]
    judges = read_judges(arguments, reference.model)
    ours += [make_ours(text, reference, arguments.calibration, folder) for text in arguments.make]
    peers, notes = make_peers(PEERS, sources, calibration=arguments.calibration, folder=folder)
    contestants = [reference, *ours, *sources[1:], *peers]
    samples_ms, load = time_all(contestants, rounds=arguments.rounds, queries=arguments.queries)
    return {
        "rows": rows(contestants, judges, samples_ms),
        "images": len(judges.images),
        "calibration_images": max((peer.made.images for peer in peers if peer.made), default=0),
        "files": {contestant.name: contestant.sha256 for contestant in contestants},
        "notes": notes,
        "machine": machine(),
        "versions": versions(),
        "load": load.to_dict(),
        "queries": arguments.rounds * arguments.queries,
    }


def make_ours(text: str, reference: Contestant, calibration: Path, folder: Path) -> Contestant:
    options = shlex.split(text)
    made = make(OURS, reference.path, calibration=calibration, folder=folder, options=options)
    return our_file(made.path, reference, made=made, options=text)


def read_judges(arguments: argparse.Namespace, model: ModelFile) -> Judges:
    """Return the evaluation images; raises DataRejected where one of them also calibrates."""
    preprocessing = model.manifest.preprocessing
    labelled = read_labelled(arguments.data, splits=EVALUATION_SPLITS, class_names=model.manifest.labels)
    number = min(arguments.limit or labelled.num_images, labelled.num_images)
    labelled = labelled.take(np.linspace(0, labelled.num_images - 1, number, dtype=int).tolist())
    tuning = pixel_hashes(find_images(arguments.calibration), preprocessing)
    images: dict[str, tuple[Pixels, int]] = {}
    paths = {}
    for position, pixels in stream_pixels(labelled.paths, preprocessing):
        digest = pixel_hash(pixels)
        images.setdefault(digest, (pixels, labelled.labels[position]))  # copies would say the same again
        paths[digest] = labelled.paths[position]
    refuse_overlap(list(tuning), paths)
    labels_B = np.array([label for _, label in images.values()], dtype=np.int64)
    return Judges(images=tuple(pixels for pixels, _ in images.values()), labels_B=labels_B)


def rows(contestants: Sequence[Contestant], judges: Judges, samples_ms: TimedSamples) -> list[dict[str, Any]]:
    """Return one row for each file and setting: how near it comes to the float file there, and what it takes."""
    found = []
    references: dict[Setting, Logits] = {}
    for contestant in contestants:
        for setting in contestant.settings:
            print(f"judging: {contestant.name} in {setting}", file=sys.stderr, flush=True)
            logits_BK = answers(contestant, setting, judges.images)
            references.setdefault(setting, logits_BK)  # the float file comes first
            times = latency(samples_ms[contestant.name, setting])
            found.append(row(contestant, setting) | accuracy(references[setting], logits_BK, judges.labels_B) | times)
    return found


def accuracy(reference_BK: Logits, logits_BK: Logits, labels_B: npt.NDArray[np.int64]) -> dict[str, Any]:
    found = compare(reference_BK, logits_BK, labels_B)
    return {
        "sqnr_db": found.sqnr_db if np.isfinite(found.sqnr_db) else None,  # equal: the float file itself
        "agreement": found.agreement,
        "agreement_interval": found.agreement_interval,
        "changed": found.num_changed,
        "top1": found.candidate_top1,
        "drop_points": found.drop_points,
        "images": found.images,
    }


def row(contestant: Contestant, setting: Setting) -> dict[str, Any]:
    made = contestant.made
    return {
        "file": contestant.name,
        "setting": setting,
        "size_bytes": contestant.size_bytes,
        "seconds": made.seconds if made else None,
        "peak_rss_bytes": made.peak_rss_bytes if made else None,
        "calibration_images": made.images if made else None,
    }


def table(result: dict[str, Any]) -> str:
    """Return the section."""
    judged = f"{result['images']} images judge, {result['calibration_images']} others calibrate"
    made = "Every tool has its defaults, all threads and a process of its own, whose seconds and peak memory are given"
    timed = f"Latency: batch 1, 1 thread, {result['queries']} queries of each, in turn; OpenVINO computes in float32"
    where = f"{result['machine']}, {result['versions']}. The machine: {result['load']['said']}"
    lines = [
        f"{judged}. {made}. {timed}. {where}. {' '.join(result['notes'])}".strip(),
        "",
        "| file | in | SQNR | agreement | top-1 | median | minimum | made in | peak memory | size |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line(entry) for entry in result["rows"]),
        "",
        *hashes(result["files"]),
    ]
    return "\n".join(lines)


def line(entry: dict[str, Any]) -> str:
    level = "" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f} dB"
    agreement = f"{entry['agreement']:.1f} % ({entry['images'] - entry['changed']} of {entry['images']})"
    made, peak = "", ""
    if entry["seconds"] is not None:
        made = f"{entry['seconds']:.0f} s, {entry['calibration_images']} images"
        peak = f"{entry['peak_rss_bytes'] / 1e9:.2f} GB"
    times = f"{entry['median_ms']:.2f} ms | {entry['min_ms']:.2f} ms"
    cells = (entry["file"], entry["setting"], level, agreement, f"{entry['top1']:.2f} %", times, made, peak)
    return f"| {' | '.join(cells)} | {entry['size_bytes'] / 1e6:.1f} MB |"


if __name__ == "__main__":
    main()
