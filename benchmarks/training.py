"""What training reaches, with seeds: each figure is of `vit-edge train` as a person runs it.

    python benchmarks/training.py digits
    python benchmarks/training.py food PIZZA_STEAK_SUSHI PIZZA_STEAK_SUSHI_20_PERCENT --from DEIT.safetensors
    python benchmarks/training.py processes

Each writes its section of docs/results.md. `food` takes the tutorials' folders (examples/pizza_steak_sushi.py makes
them) and a pretrained checkpoint; `processes` compares two gloo processes with one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from support.results import machine, write_section

ROOT = Path(__file__).resolve().parent.parent
# The images have 64 pixels a side in the copies that this was measured on: 64 patches of 8.
SCRATCH = (
    "--arch", "vit_tiny_patch8_224", "--image-size", "64", "--recipe", "finetune", "--epochs", "12",
    "--set", "layer_decay=1.0", "--set", "learning_rate=5e-4",
)  # fmt: skip
ALONE = (sys.executable,)
IN_TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train(*arguments: str | Path, start: tuple[str, ...] = ALONE) -> dict[str, Any]:
    """Run `vit-edge train` and return what it printed."""
    command = [*start, "-m", "vit_edge", "train", *map(str, arguments), "--json"]
    print("$ vit-edge train", *map(str, arguments), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    printed: dict[str, Any] = json.loads(done.stdout)
    print(f"  {printed['top1']:.2f} % of {printed['num_images']}", file=sys.stderr, flush=True)
    return printed


def digits(folder: Path, seeds: list[int]) -> None:
    """Train on the 1,437 digits with each seed and judge on the other 360."""
    made = make_digits(folder)
    rows = []
    for seed in seeds:
        done = train(made, "--out", folder / f"run{seed}", "--seed", str(seed))
        rows.append(f"| {seed} | {done['top1']:.2f} % | {done['seconds']:.0f} s | {done['best_epoch']} |")
    table = ["| seed | top-1 of 360 | training | best epoch |", "|---|---|---|---|", *rows]
    write_section("digits", "\n".join([f"`vit-edge train digits/ --out run/`, {about()}.", "", *table]))


def food(folder: Path, arguments: argparse.Namespace, more: list[str]) -> None:
    """Train from scratch and fine-tune on both sets with each seed."""
    rows = []
    for data in arguments.data:
        for name, options in (
            ("from scratch", SCRATCH),
            ("fine-tuned", ("--from", arguments.source)),
        ):
            top1 = []
            for seed in arguments.seeds:
                out = folder / f"{data.name}-{name}-{seed}"
                done = train(data, *options, *more, "--seed", str(seed), "--out", out)
                top1.append(done["top1"])
            shares = ", ".join(f"{value:.1f}" for value in top1)
            rows.append(
                f"| {data.name} | {name} | {done['num_images']} | {shares} | **{statistics.mean(top1):.1f} %** |"
            )
    table = ["| images | network | test images | top-1 by seed, % | mean |", "|---|---|---|---|---|", *rows]
    seeds = ", ".join(map(str, arguments.seeds))
    write_section("food", "\n".join([f"Seeds {seeds}, {about()}.", "", *table]))


def processes(folder: Path) -> None:
    """Take 20 steps with one process and with two of the same global batch, and compare each step's loss."""
    made = make_digits(folder)
    options = ("--arch", "vit_digits_patch8_32", "--epochs", "1", "--batch-size", "64", "--threads", "1")
    options = (*options, "--device", "cpu", "--set", "mixup_alpha=0.2", "--set", "cutmix_alpha=0.2")
    options = (*options, "--learning-rate", "1e-3", "--set", "warmup_fraction=0.05")  # so that it learns in 20 steps
    losses = {}
    for name, start in (("one", ALONE), ("two", IN_TWO)):
        train(made, *options, "--out", folder / name, start=start)
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines if line["event"] == "step"][:20]
    differences = [abs(a - b) for a, b in zip(losses["one"], losses["two"], strict=True)]
    table = ["| step | one process | two processes | difference |", "|---|---|---|---|"]
    table += [
        f"| {i + 1} | {losses['one'][i]:.7f} | {losses['two'][i]:.7f} | {differences[i]:.1e} |"
        for i in (0, 4, 9, 14, 19)
    ]
    worst = f"Largest difference over {len(differences)} steps: **{max(differences):.1e}** ({about()})."
    write_section("processes", "\n".join([worst, "", *table]))


def make_digits(folder: Path) -> Path:
    made = folder / "digits"
    script = ROOT / "calibration_data" / "make_digits.py"
    subprocess.run([sys.executable, script, "--out", made], check=True, stdout=subprocess.DEVNULL)
    return made


def about() -> str:
    return f"{machine()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "food", "processes"))
    parser.add_argument("data", type=Path, nargs="*")
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, more = parser.parse_known_args()  # what this script does not know goes to `vit-edge train`
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "digits":
            digits(Path(folder), arguments.seeds)
        elif arguments.what == "food":
            food(Path(folder), arguments, more)
        else:
            processes(Path(folder))


if __name__ == "__main__":
    main()
