"""The whole chain on handwritten digits, through the command line: from training to a verified INT8 file.

Run by `make demo`. Everything it makes stays in demo/; demo/report.json holds the figures of the last table.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vit_edge.errors import NotTrusted
from vit_edge.files import write_atomic
from vit_edge.runtime import load

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("demo")
FLOAT, INT8 = DEMO / "model.onnx", DEMO / "model.int8.onnx"
TEST = DEMO / "digits" / "test"
# 360 test images certify no drop below 0.83 points even if not one answer changes, and 2.9 if five are lost: 4 points
# is what they can prove with room for a few changed answers. A real model needs more images and a smaller number.
MAX_DROP = "4"
BUDGET = ("--max-drop", MAX_DROP, "--min-agreement", "96")
MAX_SIZE_RATIO = 0.30

console = Console(highlight=False, markup=False)


def main(run: str | None = None) -> None:
    """Run the chain; with `run`, the folder of an earlier training on the digits, from there on."""
    started = time.monotonic()
    DEMO.mkdir(exist_ok=True)
    calibration = Path(os.path.relpath(ROOT / "calibration_data"))
    subprocess.run([sys.executable, calibration / "make_digits.py", "--out", DEMO / "digits"], check=True)
    trained = train(run)
    vit_edge("export", trained["checkpoint"], "--out", FLOAT, "--force")
    say("ONNX Runtime and OpenVINO give PyTorch's answers at batches 1, 2, 3, 7 and 16")
    quantized = vit_edge("quantize", FLOAT, "--calibration", calibration, "--out", INT8, "--force")
    if quantized["size_ratio"] > MAX_SIZE_RATIO:
        sys.exit(f"INT8 takes {quantized['size_ratio']:.2f} of the float file, over {MAX_SIZE_RATIO}")
    say(f"ranges from {quantized['num_calibration_images']} images, {quantized['size_ratio']:.2f} of the float file")
    verified = vit_edge("verify", INT8, "--reference", FLOAT, "--data", TEST, *BUDGET)
    bound = verified["drop_upper_bound_points"]
    say(f"{verified['verdict']}: INT8 loses at most {bound:.2f} points of top-1, with 95 % confidence")
    say(f"(360 images can certify {verified['best_certifiable_points']:.2f} points at best, so {MAX_DROP} were asked)")
    images = [sorted((TEST / name).iterdir())[0] for name in ("3", "7")]
    for answer in vit_edge("classify", INT8, *images)["images"]:
        say(f"{answer['file']}: {answer['label']} ({answer['answers'][0]['probability']:.0%})")
    measured = vit_edge("benchmark", FLOAT, INT8, "--threads", "1")
    vit_edge("inspect", INT8)
    rows = report_rows(verified, measured)
    seconds = time.monotonic() - started
    report = {"schema": 1, "seconds": seconds, "training": trained, "verification": verified, "table": rows}
    write_atomic(DEMO / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    show(rows, measured["results"][0])
    show_refusal()
    show_next(seconds)


def train(run: str | None) -> dict[str, Any]:
    """Return what the training printed, or what its folder holds."""
    if run is not None:
        return {"checkpoint": str(Path(run) / "best.safetensors"), "folder": run}
    trained = vit_edge("train", DEMO / "digits", "--out", DEMO / "run", "--force")
    say(f"{trained['top1']:.1f} % of {trained['num_images']} test images right, in {trained['seconds']:.0f} s")
    return trained


def vit_edge(*arguments: str | Path) -> dict[str, Any]:
    """Run one command as a person would, with --json, and return what it printed; ends the demo where it fails."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ vit-edge {shlex.join(words)}", style="bold", soft_wrap=True)
    command = [sys.executable, "-m", "vit_edge", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def report_rows(verified: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each file and engine, accuracy and speed side by side."""
    accuracy = {entry["engine"]: entry for entry in verified["results"]}
    rows = []
    for entry in measured["results"]:
        is_float = entry["precision"] == "float32"
        found = accuracy[entry["engine"]]
        rows.append(
            {
                "file": Path(entry["model"]).name,
                "precision": entry["precision"],
                "engine": entry["engine"],
                "size_bytes": entry["size_bytes"],
                "top1": found["reference" if is_float else "candidate"]["top1"],
                "agreement": 100.0 if is_float else found["agreement"],
                "p50_ms": entry["latency_ms"]["p50"],
                "images_per_s": entry["throughput_per_s"],
            }
        )
    return rows


def show(rows: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    table = Table(
        title=f"Digits, batch 1, {measured['threads']} thread, {measured['cpu']}",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("file", "engine", "size", "top-1", "agreement", "p50", "images/s"):
        table.add_column(column, justify="left" if column in ("file", "engine") else "right", no_wrap=True)
    for row in rows:
        size, p50 = f"{row['size_bytes'] / 1e6:.2f} MB", f"{row['p50_ms']:.3f} ms"
        shares = (f"{row['top1']:.2f} %", f"{row['agreement']:.2f} %")
        table.add_row(row["file"], row["engine"], size, *shares, p50, f"{row['images_per_s']:.0f}")
    console.print()
    console.print(table)
    for engine in dict.fromkeys(row["engine"] for row in rows):
        in_float, in_int8 = (
            next(r["p50_ms"] for r in rows if (r["engine"], r["precision"]) == (engine, precision))
            for precision in ("float32", "int8")
        )
        faster = in_float / in_int8
        verdict = f"{faster:.2f} times as fast as float32" if faster > 1 else f"NOT faster than float32 ({faster:.2f})"
        console.print(f"INT8 in {engine} is {verdict} here.", soft_wrap=True)


def show_refusal() -> None:
    """Damage one bit of a copy and show that the runtime refuses it."""
    damaged = bytearray(INT8.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path = DEMO / "damaged.onnx"
    write_atomic(path, bytes(damaged))
    try:
        load(path)
    except NotTrusted as error:
        console.print(f"\nOne bit of a copy flipped: {error}", soft_wrap=True)
    else:
        sys.exit("a damaged model file was loaded: this is a bug in vit-edge")


def show_next(seconds: float) -> None:
    console.print(
        f"\nAll of this took {seconds:.0f} s and lies in {DEMO}/. With your own images, next:", soft_wrap=True
    )
    program = Path(sys.executable).with_name("vit-edge")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    for line in (
        f"{program} classify {INT8} IMAGE.png    # a digit of your own, white on black",
        "# Your own classes: IMAGES/train/<class>/*.jpg and IMAGES/test/<class>/*.jpg",
        "# at 32x32 pixels; for larger images, and hours of training, add --arch vit_tiny_patch16_224",
        f"{program} train IMAGES/ --out run/",
        f"{program} export run/best.safetensors -o model.onnx",
        f"{program} quantize model.onnx --calibration IMAGES/train -o model.int8.onnx",
        f"{program} verify model.int8.onnx --reference model.onnx --data IMAGES/test --max-drop 4",
    ):
        console.print(f"  {line}", soft_wrap=True)


def say(text: str) -> None:
    console.print(f"  {text}", soft_wrap=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
