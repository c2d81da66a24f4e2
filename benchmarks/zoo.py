"""The zoo: the whole chain on small random networks of every family, and what comes of it, in docs/zoo.md.

    python benchmarks/zoo.py --results zoo.jsonl

exports each family as its library saves it, quantizes it with a few images of noise, and verifies it. One process for
each family, with limits on time and memory. A run that is stopped goes on where it was. With --sample N it takes N
families, others for each --seed; with names it takes those.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.support.results import machine, versions  # noqa: E402 - found from any folder
from benchmarks.support.zoo_families import FAMILIES, Family, save_family  # noqa: E402
from vit_edge.errors import VitEdgeError  # noqa: E402
from vit_edge.export import QuantizationOptions, export_onnx, quantize  # noqa: E402
from vit_edge.export.sources.opener import open_network  # noqa: E402
from vit_edge.export.sources.torch_network import TorchNetwork  # noqa: E402
from vit_edge.image import Preprocessing  # noqa: E402
from vit_edge.model_file.artifact import open_model  # noqa: E402
from vit_edge.runtime.checks.golden import golden_images  # noqa: E402

# Imported once, not in each process.
_PRELOADED = ["timm", "torchvision", "transformers", "vit_edge.export", "vit_edge.export.sources.opener"]
# Processor time, which a busy machine does not use up, and the time that a process without any may hang.
_CPU_SECONDS, _SECONDS = 600, 4 * 3600.0
_MEMORY_BYTES = 16 * 2**30
_CALIBRATION, _EVALUATION = range(16), range(1000, 1032)
_HEADER = """# The zoo

What the whole chain (export, quantize, verify) makes of small random networks of {families} families: two blocks, or
one a stage, random weights with norm gains and statistics as after training, {calibration} calibration images and
{evaluation} evaluation images of noise. Random networks answer by small differences, so their agreement is lower than
that of trained ones; the SQNR tells more.

    python benchmarks/zoo.py --results zoo.jsonl

{through} of {families} go through the whole chain, {exact} of them with parity of 100 dB or more, and {covered} with
95 % or more of the constant-weight multiplications in INT8 in ONNX Runtime. Speed is not measured here.
{versions}; {machine}.

- Way in: `fused` is the fused inference graph of a plain Vision Transformer, `traced` the library's own network.
- Parity: the lowest SQNR of both engines against PyTorch, at batches of 1, 2, 3, 7 and 16.
- In INT8: the share of the multiplications with constant weights, in ONNX Runtime / OpenVINO.
- SQNR and agreement of INT8 with float32, in ONNX Runtime / OpenVINO.

| family | way in | parity | in INT8 | SQNR | agreement | algorithms |
|---|---|---|---|---|---|---|
"""


def run_family(family: Family, folder: Path) -> dict[str, Any]:
    """Return what the chain makes of one family, or the reason of what refused it."""
    started, stage = time.process_time(), "make"
    try:
        source = save_family(family, folder / "network")
        side = source[1] if isinstance(source, tuple) else None
        stage = "export"
        opened = (
            TorchNetwork(module=source[0], name=family.of, preprocessing=Preprocessing(resize=side, crop=(side, side)))
            if isinstance(source, tuple) and side is not None
            else open_network(source)  # type: ignore[arg-type]
        )
        exported = export_onnx(opened, out=folder / "m.onnx")
        manifest = open_model(folder / "m.onnx", warn=False).manifest
        _write_images(folder, manifest.preprocessing.crop)
        stage = "quantize"
        found = quantize(
            folder / "m.onnx", calibration=folder / "calibration", data=folder / "evaluation", out=folder / "q.onnx",
            options=QuantizationOptions(measure_speed=False, use_cache=False),
        )  # fmt: skip
    except VitEdgeError as error:
        return {"name": family.name, "refused": f"{stage}: {error.reason}", "seconds": time.process_time() - started}
    except Exception as error:
        text = f"{stage}: {type(error).__name__}: {error}"
        return {"name": family.name, "crashed": text[:300], "trace": traceback.format_exc()[-2000:]}
    assert found.verification is not None
    return {
        "name": family.name,
        "way_in": "fused" if manifest.provenance["form"] == "fused" else "traced",
        "parity_db": min(one.sqnr_db for one in exported.parity),
        "int8_percent": {one.engine: one.percent for one in found.coverage},
        "sqnr_db": {one.engine: one.sqnr_db for one in found.verification.results},
        "agreement": {one.engine: getattr(one, "agreement", None) for one in found.verification.results},
        "accounts": list(found.accounts),
        "algorithms": list(found.algorithms),
        "seconds": time.process_time() - started,
    }


def _write_images(folder: Path, size: tuple[int, int]) -> None:
    for name, seeds in (("calibration", _CALIBRATION), ("evaluation", _EVALUATION)):
        (folder / name).mkdir()
        for seed, pixels in zip(seeds, golden_images(seeds, height=size[0], width=size[1]), strict=True):
            Image.fromarray(pixels).save(folder / name / f"{seed}.png")


def _child(name: str, folder: str, out: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    logging.disable(logging.WARNING)
    Path(out).write_text(json.dumps(run_family(FAMILIES[name], Path(folder))))


def _apart(name: str, seconds: float) -> dict[str, Any]:
    """Return the result of one family from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        process = context.Process(target=_child, args=(name, folder, str(out)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return {"name": name, "crashed": f"no result within {seconds:g} s"}
        if not out.is_file():
            return {"name": name, "crashed": f"the process ended with {process.exitcode}"}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def page_of(results: Sequence[dict[str, Any]]) -> str:
    """Return docs/zoo.md."""
    through = [one for one in results if "parity_db" in one]
    header = _HEADER.format(
        families=len(results),
        calibration=len(_CALIBRATION),
        evaluation=len(_EVALUATION),
        through=len(through),
        exact=sum(one["parity_db"] >= 100 for one in through),
        covered=sum(one["int8_percent"].get("onnxruntime", 0) >= 95 for one in through),
        versions=versions(),
        machine=machine(),
    )
    order = sorted(through, key=lambda one: one["name"].lower())
    refused = sorted((one for one in results if "parity_db" not in one), key=lambda one: one["name"].lower())
    text = header + "\n".join(map(_row, order)) + "\n"
    if refused:
        rows = (f"| {one['name']} | {one.get('refused') or one['crashed']} |" for one in refused)
        text += "\n## Refused\n\n| family | reason |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text


def _row(one: dict[str, Any]) -> str:
    def both(values: dict[str, float | None], form: str) -> str:
        return " / ".join("-" if value is None else form.format(value) for _, value in sorted(values.items()))

    accounts = "; ".join(one["accounts"]) or ", ".join(one["algorithms"]) or "ranges only"
    cells = (
        one["name"], one["way_in"], f"{one['parity_db']:.0f} dB", both(one["int8_percent"], "{:.1f} %"),
        both(one["sqnr_db"], "{:.1f} dB"), both(one["agreement"], "{:.0f} %"), accounts,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the families that have no result yet; write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="library/name; default: all")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a family; appended to")
    parser.add_argument("--sample", type=int, help="run this many families only")
    parser.add_argument("--seed", type=int, default=0, help="which families a sample has, such as the week's number")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="limit for one family")
    parser.add_argument("--page", type=Path, help="write the results as Markdown, such as docs/zoo.md")
    options = parser.parse_args(arguments)
    names = options.families or [*FAMILIES]
    if options.sample is not None:
        names = random.Random(options.seed).sample(names, min(options.sample, len(names)))
    results = {}
    if options.results.is_file():
        lines = options.results.read_text().splitlines()
        results = {one["name"]: one for one in map(json.loads, lines)}
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    for name in names:
        if name in results:
            continue
        results[name] = _apart(name, options.seconds)
        with options.results.open("a") as file:
            file.write(json.dumps(results[name]) + "\n")
        told = {key: value for key, value in results[name].items() if key not in ("accounts", "trace", "algorithms")}
        print(json.dumps(told), flush=True)
    if options.page is not None:
        options.page.write_text(page_of([results[name] for name in FAMILIES if name in results]), encoding="utf-8")
    return int(any("crashed" in results[name] for name in names))


if __name__ == "__main__":
    raise SystemExit(main())
