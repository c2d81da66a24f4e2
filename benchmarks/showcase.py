"""Take a network the whole way and show it: float32, float16 and INT8 in every engine, 1 and 2 threads, batch 1 and 8.

    python benchmarks/showcase.py DEIT_TINY --like timm:deit_tiny_patch16_224 --labels NAMES --calibration IMAGES
        --data LABELLED

Runs the commands of the README, writes the page docs/report.html and the image docs/benchmark.png, and the
table into a section of docs/results.md. Images that judge are named in the page, not shown: they may be others' own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.results import RESULTS, machine, versions, write_section

DOCS = RESULTS.parent
EVERY_MIX = ("--threads", "1", "--threads", "2", "--batch-size", "1", "--batch-size", "8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--like", help="timm:NAME with the preprocessing of the checkpoint, so that none is assumed")
    parser.add_argument("--labels", type=Path, help="class names, if the checkpoint has none")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--min-seconds", default="3", help="for each of the candidates")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where page, image and section go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show(args, Path(folder))


def show(args: argparse.Namespace, folder: Path) -> None:
    """Make the files in `folder`, verify and measure them, and write what there is to show."""
    models = [folder / name for name in ("float32.onnx", "float16.onnx", "int8.onnx")]
    calibration, data = args.calibration.resolve(), args.data.resolve()
    labels = [] if args.labels is None else ["--labels", args.labels.resolve()]
    like = [] if args.like is None else ["--like", args.like]
    run("export", args.checkpoint.resolve(), *like, *labels, "-o", models[0])
    # With their accuracy in them, which the image of the benchmark draws.
    run("quantize", models[0], "--precision", "float16", "--data", data, "-o", models[1])
    run("quantize", models[0], "--calibration", calibration, "--data", data, "-o", models[2], "--no-speed")
    found = [folder / f"{model.stem}.json" for model in models[1:]]
    for model, file in zip(models[1:], found, strict=True):
        # A relative folder: no path of this machine goes into the page.
        judged = run(
            "verify", model, "--reference", models[0], "--data", data.name, "--json", cwd=data.parent, may_fail=True
        )
        file.write_text(judged, encoding="utf-8")
    speed, image = folder / "speed.json", args.docs / "benchmark.png"
    measured = ("--min-seconds", args.min_seconds, "--save", speed, "--plot", image, "--force")
    print(run("benchmark", *models, *EVERY_MIX, *measured))
    run("report", *found, speed, *models, "--max-flips", "0", "--force", "-o", args.docs / "report.html")
    write_section("showcase", section(json.loads(speed.read_text(encoding="utf-8"))), args.docs / RESULTS.name)


def run(*arguments: str | Path, cwd: Path | None = None, may_fail: bool = False) -> str:
    """Return what a command prints; ends the program where it fails, unless it is a verdict that may fail."""
    command = [sys.executable, "-m", "vit_edge", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode and not (may_fail and done.returncode == 6):
        sys.exit(f"vit-edge {arguments[0]} ended with {done.returncode}")
    return done.stdout


def section(values: dict[str, Any]) -> str:
    """Return the table, with a link to the image, which is too wide for that page."""
    noisy = f" **Invalid: {'; '.join(values['invalid_because'])}.**" if values["invalid_because"] else ""
    rows = [
        f"| {Path(entry['model']).stem} | {entry['engine']} | {entry['threads']} | {entry['batch_size']} "
        f"| {' | '.join('{:.2f} ms'.format(entry['latency_ms'][name]) for name in ('p50', 'min', 'p90'))} "
        f"| {entry['throughput_per_s']:.0f} | {ratio(entry['ratio'])} | {share(entry['share_of_peak'])} |"
        for entry in values["results"]
    ]
    columns = (
        "file",
        "engine",
        "threads",
        "batch",
        "median",
        "minimum",
        "p90",
        "images/s",
        "as fast (95 %)",
        "of peak",
    )
    head = f"| {' | '.join(columns)} |"
    about = f"{machine()}, {versions()}; the harness takes {values['harness']['p50_us']:.1f} microseconds a query."
    image = "[Latency, throughput, accuracy against time](benchmark.png)."
    return "\n".join([f"{about}{noisy}", "", head, "|---" * len(columns) + "|", *rows, "", image])


def ratio(found: dict[str, Any] | None) -> str:
    return (
        "1" if found is None else f"{found['by_round']:.2f} ({found['interval'][0]:.2f} to {found['interval'][1]:.2f})"
    )


def share(found: float | None) -> str:
    return "-" if found is None else f"{found:.0%}"


if __name__ == "__main__":
    main()
