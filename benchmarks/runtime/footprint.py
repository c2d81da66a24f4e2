"""What the runtime needs: packages, bytes on disk, time of the import, memory.

    python benchmarks/runtime/footprint.py MODEL.onnx [--rounds 7]

For each engine a fresh virtual environment gets `vit-edge[ENGINE]` built from this clone. Sizes are those of the files
that the packages list, without what pip and setuptools bring. Times and memory are medians of fresh processes, each
with more in it: numpy, Pillow and the engine; a graph of one node, which shows what the engine holds for itself, and
the first, `vit_edge.runtime`; the model loaded, checked and run. Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.results import RESULTS, find_section, machine, new_file, write_section
from support.timing import count

from vit_edge.model_file.onnx_schema import one_node

SECTION = "footprint"
ROOT = Path(__file__).resolve().parent.parent.parent
ENGINES = ("onnxruntime", "openvino")
# pip and setuptools come with every environment.
_NOT_COUNTED = ("pip", "setuptools")
_NOT_COPIED = shutil.ignore_patterns(".*", "build", "demo", "dist", "*.egg-info", "*.onnx", "__pycache__")

_PACKAGES = f"""
import importlib.metadata as m, json, pathlib
found = {{}}
for d in m.distributions():
    name = d.metadata["Name"]
    if name not in {_NOT_COUNTED}:
        files = [pathlib.Path(d.locate_file(f)) for f in d.files or ()]
        found[name] = [d.version, sum(f.stat().st_size for f in files if f.is_file() and f.suffix != ".pyc")]
print(json.dumps(found))
"""
_START = """
import json, os, sys, time
started = time.perf_counter()
def report(**more):
    pages = int(open("/proc/self/statm").read().split()[1])
    print(json.dumps({"seconds": time.perf_counter() - started, "rss": pages * os.sysconf("SC_PAGE_SIZE"), **more}))
import numpy, PIL.Image, {engine}
"""
_ONE_NODE = {
    "onnxruntime": """
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.zeros((1, 8), numpy.float32)})
""",
    "openvino": """
core = openvino.Core()
compiled = core.compile_model(core.read_model(graph), "CPU", {"INFERENCE_NUM_THREADS": 1})
compiled.create_infer_request().infer({"x": numpy.zeros((1, 8), numpy.float32)})
""",
}
_RUN = """
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images
loading = time.perf_counter()
classifier = load(model, engine=engine, threads=1)
height, width = classifier.manifest.preprocessing.crop
classifier(golden_images([1], height=height, width=width)[0])
report(load_seconds=time.perf_counter() - loading)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=count, default=7, help="fresh processes for each median")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="[default: each]")
    parser.add_argument("--json", type=new_file, help="write every figure here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file with the section to write")
    arguments = parser.parse_args()
    find_section(SECTION, arguments.results)
    found = {engine: measured(engine, arguments) for engine in arguments.engine or ENGINES}
    written = table(found, arguments.model.name)
    print(written)
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
    write_section(SECTION, written, arguments.results)


def measured(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        shutil.copytree(
            ROOT, folder / "clone", symlinks=True, ignore=_NOT_COPIED
        )  # pip leaves a build/ where it builds
        source = f"{folder / 'clone'}[{engine}]"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", source]
        subprocess.run(install, check=True)
        packages = json.loads(output(python, _PACKAGES, folder))
        values = f"engine, model, graph = {engine!r}, {str(arguments.model.resolve())!r}, {one_node()!r}\n"
        start = _START.replace("{engine}", engine) + values
        scripts = {
            "import": "report()",
            "one node": f"{_ONE_NODE[engine]}report()",
            "runtime": "import vit_edge.runtime\ntold()",
            "model": _RUN,
        }
        steps = {name: report(python, start + script, folder, arguments.rounds) for name, script in scripts.items()}
    return {"packages": packages, "steps": steps}


def report(python: Path, script: str, folder: Path, rounds: int) -> dict[str, float]:
    """Return the medians of what fresh processes tell; one more runs first, so that the files lie in memory."""
    found = [json.loads(output(python, script, folder)) for _ in range(rounds + 1)][1:]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def output(python: Path, script: str, folder: Path) -> str:
    return subprocess.run([python, "-c", script], cwd=folder, check=True, capture_output=True, text=True).stdout


def table(found: dict[str, Any], model: str) -> str:
    lines = [f"{machine()}, Python {sys.version.split()[0]}.", ""]
    for engine, figures in found.items():
        packages, steps = figures["packages"], figures["steps"]
        size = sum(size for _, size in packages.values())
        listed = ", ".join(
            f"{name} {version}" for name, (version, _) in sorted(packages.items(), key=lambda p: p[0].lower())
        )
        base, bare, ours, loaded = (steps[step] for step in ("import", "one node", "runtime", "model"))
        imports = f"{ours['seconds'] - base['seconds']:.2f} s more"
        beyond = f"{(loaded['rss'] - bare['rss']) / 1e6:.0f} MB above the engine's own"
        loading = f"{loaded['seconds']:.2f} s, {loaded['load_seconds']:.2f} s of it from load to answer"
        lines += [
            f"`pip install vit-edge[{engine}]`: **{len(packages)} packages, {size / 1e6:.0f} MB**: {listed}.",
            "",
            "| in a fresh process | time | memory |",
            "|---|---|---|",
            f"| numpy, Pillow, {engine} | {base['seconds']:.2f} s | {base['rss'] / 1e6:.0f} MB |",
            f"| the same, and a graph of one node run | {bare['seconds']:.2f} s | {bare['rss'] / 1e6:.0f} MB |",
            f"| the first, and `vit_edge.runtime` | {ours['seconds']:.2f} s, {imports} | {ours['rss'] / 1e6:.0f} MB |",
            f"| the same, and `{model}` loaded, checked and run | {loading} | {loaded['rss'] / 1e6:.0f} MB, {beyond} |",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
