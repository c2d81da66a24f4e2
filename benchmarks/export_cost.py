"""Measure how long an export takes, and how much memory its largest process needs.

    python benchmarks/export_cost.py [vit_base_patch16_224 ...]

Exports an untrained network of that shape with its proof, as `vit-edge export` does, in a process of its own. Peak
memory is that of the largest single process, of export itself and of the engines' child processes. Writes a section of
docs/results.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.results import machine, write_section

NUM_CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="*", default=["vit_base_patch16_224"])
    rows = [row(arch) for arch in parser.parse_args().arch]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    head = ["| network | file | seconds | largest process | smallest SQNR |", "|---|---|---|---|---|"]
    write_section("export-cost", "\n".join([f"{machine()}, {versions}.", "", *head, *rows]))


def row(arch: str) -> str:
    """Export one network, and return its line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process, as torch is not imported here: a child's peak starts at what its parent had.
        subprocess.run([sys.executable, __file__, "--write", arch, str(folder / "c.safetensors")], check=True)
        seconds, peak_bytes, found = export(folder)
    decibels = min(entry["sqnr_db"] for entry in found["parity"])
    sizes = f"{found['size_bytes'] / 1e6:,.0f} MB | {seconds:.0f} | {peak_bytes / 1e9:.2f} GB"
    line = f"| {arch} | {sizes} | {decibels:.0f} dB |"
    print(line, flush=True)
    return line


def export(folder: Path) -> tuple[float, int, dict[str, Any]]:
    """Return seconds, peak bytes of the largest process (the kernel's, over export and its children), what it says."""
    command = [sys.executable, "-m", "vit_edge", "export", "c.safetensors", "-o", "m.onnx", "--json"]
    with (folder / "printed.json").open("wb") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        sys.exit(f"the export ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024, json.loads((folder / "printed.json").read_bytes())  # KiB on Linux


def write(arch: str, path: Path) -> None:
    """Write a checkpoint whose logits are of ordinary size: an untrained head is zero."""
    import torch
    from torch import nn

    from vit_edge.checkpoint import Checkpoint, save_checkpoint
    from vit_edge.image import Preprocessing
    from vit_edge.vit import VisionTransformer, variant

    torch.manual_seed(0)
    model = VisionTransformer(variant(arch, num_classes=NUM_CLASSES)).eval()
    nn.init.normal_(model.head.weight, std=0.05)
    size = model.config.image_size
    labels = tuple(str(number) for number in range(NUM_CLASSES))
    preprocessing = Preprocessing(resize=size, crop=size)
    save_checkpoint(path, Checkpoint(name=arch, model=model, preprocessing=preprocessing, labels=labels))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
