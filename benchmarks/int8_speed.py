"""Measure how much faster INT8 is than float32, and than what other tools make of the same file: in one run, in turn.

    python benchmarks/int8_speed.py FLOAT.onnx INT8.onnx... [--calibration DIR] [--plain PLAIN.onnx] [--json FILE]

Batch 1, one thread, every engine with the runtime's own settings (OpenVINO in float32). With --calibration the peers
are made here, from the same float file: ONNX Runtime's `quantize_static` with its defaults, NNCF with
`model_type=TRANSFORMER`. Our fused graph makes these faster too; with --plain, the same network from
`vit-edge export --no-fuse`, they are made from that as well: it is what they get elsewhere. Needs the machine
for itself, and says where it was not. Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from support.contestants import (
    FLOAT,
    ORT,
    PLAIN,
    Contestant,
    Setting,
    TimedSamples,
    float_file,
    latency,
    make_peers,
    measure_and_write,
    our_files,
    plain_file,
    time_all,
)
from support.quantizing import NNCF_TRANSFORMER, ORT_STATIC
from support.results import machine, versions
from support.timing import ratio

SECTION = "int8-speed"
PEERS = (ORT_STATIC, NNCF_TRANSFORMER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_model", type=Path, metavar="FLOAT.onnx")
    parser.add_argument("int8_models", type=Path, nargs="+", metavar="INT8.onnx")
    parser.add_argument("--calibration", type=Path, help="images for the peers; without it there are none")
    parser.add_argument(
        "--plain", type=Path, metavar="PLAIN.onnx", help="a float file without the fused inference graph"
    )
    measure_and_write(parser, SECTION, run, table)


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    reference = float_file(arguments.float_model)
    ours = our_files(arguments.int8_models, reference)
    sources = [reference, *([plain_file(arguments.plain, reference)] if arguments.plain else [])]
    peers: list[Contestant] = []
    notes = ["Without --calibration no other tool was asked."]
    if arguments.calibration:
        peers, notes = make_peers(PEERS, sources, calibration=arguments.calibration, folder=folder)
    contestants = [reference, *ours, *sources[1:], *peers]
    samples_ms, load = time_all(contestants, rounds=arguments.rounds, queries=arguments.queries)
    return {
        "rows": rows(samples_ms),
        "files": {contestant.name: contestant.sha256 for contestant in contestants},
        "calibration_images": max((peer.made.images for peer in peers if peer.made), default=0),
        "notes": notes,
        "machine": machine(),
        "versions": versions(),
        "load": load.to_dict(),
        "rounds": arguments.rounds,
        "queries": arguments.queries,
        "samples_ms": [
            {"file": name, "setting": setting, "by_round": samples_RQ.tolist()}
            for (name, setting), samples_RQ in samples_ms.items()
        ],
    }


def rows(samples_ms: TimedSamples) -> list[dict[str, Any]]:
    """Return one row for each file and setting, grouped by setting."""
    settings = dict.fromkeys(setting for _, setting in samples_ms)
    return [row(name, where, samples_ms) for setting in settings for name, where in samples_ms if where == setting]


def row(name: str, setting: Setting, samples_ms: TimedSamples) -> dict[str, Any]:
    """Return latencies, and how many times as fast as our float file and as the peer of this engine it is."""
    peer = ORT_STATIC if setting == ORT else NNCF_TRANSFORMER
    bases = {"than_float": FLOAT, "than_peer": peer, "than_plain_peer": f"{peer}{PLAIN}"}
    samples_RQ = samples_ms[name, setting]
    ratios = {
        key: ratio(samples_ms[base, setting], samples_RQ)
        for key, base in bases.items()
        if (base, setting) in samples_ms and base != name
    }
    return {"file": name, "setting": setting, **latency(samples_RQ), **ratios}


def table(result: dict[str, Any]) -> str:
    """Return the section."""
    asked = f"{result['rounds']} rounds of {result['queries']} queries of each, in turn in one process"
    source = f"our float32 file and {result['calibration_images']} calibration images"
    plain = "plain graph: from the same network without the fused inference graph"
    shown = {"than_float": "as our float32", "than_peer": "as the peer", "than_plain_peer": "as the peer, plain graph"}
    keys = [key for key in shown if any(key in entry for entry in result["rows"])]
    where = f"{result['machine']}, {result['versions']}. The machine: {result['load']['said']}"
    means = "Times as fast: by the medians / by the minima / median of the rounds (its 95 % bootstrap interval)"
    peers = f"Peers, with their defaults from {source} ({plain}): {ORT_STATIC} and {NNCF_TRANSFORMER}. "
    peers = peers if result["calibration_images"] else ""
    lines = [
        f"Batch 1, 1 thread, {asked}; OpenVINO computes in float32. {where}.",
        "",
        f"{means}. {peers}{' '.join(result['notes'])}".strip(),
        "",
        f"| in | file | median | minimum | {' | '.join(shown[key] for key in keys)} |",
        "|---|---|---|---|" + len(keys) * "---|",
    ]
    for entry in result["rows"]:
        ratios = " | ".join(str(entry.get(key, "")) for key in keys)
        times = f"{entry['median_ms']:.2f} ms | {entry['min_ms']:.2f} ms"
        lines.append(f"| {entry['setting']} | {entry['file']} | {times} | {ratios} |")
    return "\n".join([*lines, "", *hashes(result["files"])])


def hashes(files: dict[str, dict[str, str]]) -> list[str]:
    """Return a table of the SHA-256 of every file; OpenVINO's format has two."""
    rows = [f"| {name} | {part}: `{digest}` |" for name, parts in files.items() for part, digest in parts.items()]
    return ["| file | SHA-256 |", "|---|---|", *rows]


if __name__ == "__main__":
    main()
