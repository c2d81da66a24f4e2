"""What the fuzzer hands mutants to: a target makes a mutant of its seed, gives it to vit-edge, and says what is wrong.

None is right: the mutant was loaded and gives what the original does, or was refused by one error with an exit code.
A text says what is wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image

from tests.faults.fuzzing import fuzz_targets_of_data, mutants
from tests.faults.hostile_models import resealed
from tests.support.networks import SIZE, write_checkpoint
from vit_edge import cache
from vit_edge.checkpoint import load_checkpoint
from vit_edge.cli import main
from vit_edge.conversion.label_names import read_labels
from vit_edge.convert import read_source
from vit_edge.errors import VitEdgeError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.files import sha256_hex
from vit_edge.image import Preprocessing, decode
from vit_edge.model_file.artifact import MANIFEST_KEY, seal, unsealed
from vit_edge.model_file.openvino_ir import NO_SEAL, seal_ir
from vit_edge.remote import agent
from vit_edge.remote.device import Device, Session, Setup
from vit_edge.remote.fleet import chosen_devices
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

__all__ = ["TARGETS", "make_seeds", "run_one"]

Target = Callable[[Path, Path, random.Random], "str | None"]
IMAGES = golden_images(range(900, 904), height=SIZE[0], width=SIZE[1])
# Of the spread of the logits: more than golden vectors tolerate.
TOLERANCE = 0.1
HELLO = {
    "folder": "/tmp/x", "python": "3.11.4", "executable": "/usr/bin/python3", "machine": "x86_64", "system": "Linux",
    "bits": 64, "emulated": False, "packages": ["numpy", "PIL", "google.protobuf", "onnxruntime"], "pythonpath": "",
    "removed": [],
}  # fmt: skip
DEVICES = b'[[device]]\nname = "a"\naddress = "ssh://a"\ntags = ["x"]\nengine = "openvino"\ntarget = "x86-vnni"\n'


def make_seeds(folder: Path, deployment: Path) -> None:
    """Fill a folder with one valid file of each kind; `deployment` is the folder of one."""
    write_checkpoint(folder / "c.safetensors")
    export_onnx(folder / "c.safetensors", out=folder / "m.onnx")
    export_onnx(folder / "c.safetensors", out=folder / "m.xml", options=ExportOptions(format="openvino"))
    model = onnx.load(folder / "m.onnx")
    del model.metadata_props[:]
    model.producer_name = "somebody"
    onnx.save(model, folder / "third.onnx")
    checkpoint = load_checkpoint(folder / "c.safetensors")
    torch.save({"state_dict": checkpoint.model.state_dict()}, folder / "c.pt")
    (folder / "record.json").write_bytes((deployment / "out" / "record.json").read_bytes())
    settings = {"labels": list(checkpoint.labels), "preprocessing": checkpoint.preprocessing.to_dict()}
    (folder / "settings.json").write_text(json.dumps(settings))
    export_onnx(folder / "c.safetensors", out=folder / "e.onnx", options=ExportOptions(outputs=("embedding",)))
    image = Image.fromarray(IMAGES[0])
    image.save(folder / "image.png")
    fuzz_targets_of_data.make_shards(folder)
    for kind in ("png", "jpg", "webp", "bmp", "tif"):
        image.resize((40, 30)).convert("RGB").save(folder / f"seed.{kind}")
    image.resize((40, 30)).convert("RGBA").save(folder / "alpha.png")
    image.resize((40, 30)).convert("P").save(folder / "palette.png")
    image.resize((40, 30)).save(
        folder / "moving.webp", save_all=True, append_images=[image.rotate(90).resize((40, 30))]
    )


def _command(*arguments: object) -> str | None:
    """Return what is wrong with the outcome of a command: a traceback, an exit code of 1, or an error of many lines."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    text = err.getvalue()
    if code == 1 or "Traceback" in text:
        return f"exit code {code}: {text[-600:]}"
    if code and text.count("error:") != 1:
        return f"exit code {code} with {text.count('error:')} errors: {text[-600:]}"
    return None if all(c.isprintable() or c == "\n" for c in text + out.getvalue()) else f"raw text: {text[-300:]!r}"


def _classified(seeds: Path, model: Path, rng: random.Random, *more: object) -> str | None:
    engine = "openvino" if model.suffix == ".xml" or rng.random() < 0.3 else "onnxruntime"
    return _command("classify", model, seeds / "image.png", "--engine", engine, "--json", *more)


def _same_logits(seeds: Path, data: bytes, engine: str) -> str | None:
    """Return what is wrong if a mutant that passes every check gives other logits than its seed."""
    with load(seeds / "m.onnx", engine=engine) as original, load(data, engine=engine) as mutant:  # type: ignore[arg-type]
        expected, found = original.logits(IMAGES), mutant.logits(IMAGES)
    if found.shape != expected.shape:
        return f"logits of shape {found.shape}"
    error = float(np.abs(found - expected).max() / np.ptp(expected))
    return f"silent: the logits differ by {error:.2f} of their spread" if error > TOLERANCE else None


def sealed_bytes(seeds: Path, work: Path, rng: random.Random) -> str | None:
    data = (seeds / "m.onnx").read_bytes()
    mutant = mutants.raw(data, rng)
    try:
        load(mutant, engine="onnxruntime").close()
    except VitEdgeError as error:
        return None if error.exit_code in (3, 4) else f"exit code {error.exit_code}: {error}"
    return None if mutant == data else "silent: a changed file was loaded"


def graph(seeds: Path, work: Path, rng: random.Random) -> str | None:
    engine = rng.choice(("onnxruntime", "onnxruntime", "openvino"))
    try:
        data = resealed(seeds / "m.onnx", lambda model: mutants.change_graph(model, rng))
        return _same_logits(seeds, data, engine)
    except VitEdgeError as error:
        return None if error.exit_code in (3, 4, 5, 6) else f"exit code {error.exit_code}: {error}"


def sealed_again(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """Any bytes under a seal that holds, as anybody can make it."""
    mutant = seal(mutants.raw(unsealed((seeds / "m.onnx").read_bytes()), rng))
    (work / "m.onnx").write_bytes(mutant)
    try:
        return _command("inspect", work / "m.onnx") or _same_logits(seeds, mutant, "onnxruntime")
    except VitEdgeError as error:
        return None if error.exit_code in (3, 4, 5, 6) else f"exit code {error.exit_code}: {error}"


def encoder(seeds: Path, work: Path, rng: random.Random) -> str | None:
    _write_with_changed_manifest(seeds / "e.onnx", work / "e.onnx", rng)
    out = work / rng.choice(("vectors.npy", "vectors.parquet"))
    engine = rng.choice(("onnxruntime", "openvino"))
    wrong = _command("embed", seeds / "image.png", "--model", work / "e.onnx", "-o", out, "--force", "--engine", engine)
    return wrong or _command("inspect", work / "e.onnx")


def manifest(seeds: Path, work: Path, rng: random.Random) -> str | None:
    _write_with_changed_manifest(seeds / "m.onnx", work / "m.onnx", rng)
    wrong = _command("inspect", work / "m.onnx")
    return wrong or _classified(seeds, work / "m.onnx", rng)


def _write_with_changed_manifest(source: Path, target: Path, rng: random.Random) -> None:
    model = onnx.load(source)
    entry = next(entry for entry in model.metadata_props if entry.key == MANIFEST_KEY)
    text = mutants.change_text(entry.value.encode(), rng).decode("utf-8", errors="replace")
    del model.metadata_props[:]
    model.metadata_props.add(key=MANIFEST_KEY, value=text)
    target.write_bytes(seal(model.SerializeToString()))


def third_party(seeds: Path, work: Path, rng: random.Random) -> str | None:
    data = (seeds / "third.onnx").read_bytes()
    if rng.random() < 0.4:
        data = mutants.raw(data, rng)
    else:
        model = onnx.load_model_from_string(data)
        mutants.change_graph(model, rng)
        data = model.SerializeToString()
    (work / "t.onnx").write_bytes(data)
    settings = json.loads((seeds / "settings.json").read_text())
    for name, value in settings.items():
        (work / f"{name}.json").write_text(json.dumps(value))
    given = ("--labels", work / "labels.json", "--preprocessing", work / "preprocessing.json")
    return _classified(seeds, work / "t.onnx", rng, *given)


def ir(seeds: Path, work: Path, rng: random.Random) -> str | None:
    xml, weights = (seeds / "m.xml").read_bytes(), (seeds / "m.bin").read_bytes()
    changed = mutants.change_xml(xml, rng) if rng.random() < 0.6 else mutants.raw(xml, rng)
    xml, weights = (changed, weights) if rng.random() < 0.8 else (xml, mutants.raw(weights, rng))
    if rng.random() < 0.7:  # as anybody can
        with contextlib.suppress(ValueError):
            old = xml.split(b'<seal value="')[1][:64] if b'<seal value="' in xml else b""
            xml = seal_ir(xml.replace(old, NO_SEAL.encode()) if old else xml, weights)
    (work / "m.xml").write_bytes(xml)
    (work / "m.bin").write_bytes(weights)
    return _classified(seeds, work / "m.xml", rng)


def checkpoint(seeds: Path, work: Path, rng: random.Random) -> str | None:
    data = (seeds / "c.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = mutants.change_text(data[8 : 8 + size], rng)
        mutant = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        mutant = mutants.raw(data, rng)
    (work / "c.safetensors").write_bytes(mutant)
    try:
        found = load_checkpoint(work / "c.safetensors")
    except VitEdgeError as error:
        return None if error.exit_code in (3, 4) else f"exit code {error.exit_code}: {error}"
    expected = load_checkpoint(seeds / "c.safetensors").model.state_dict()
    is_same = all(torch.equal(tensor, expected[name]) for name, tensor in found.model.state_dict().items())
    return None if is_same else "silent: other weights were loaded"


def pickled(seeds: Path, work: Path, rng: random.Random) -> str | None:
    (work / "c.pt").write_bytes(mutants.change_pickle((seeds / "c.pt").read_bytes(), rng))
    with contextlib.suppress(VitEdgeError):
        read_source(work / "c.pt")
    return None


def image(seeds: Path, work: Path, rng: random.Random) -> str | None:
    seed = rng.choice(
        sorted([*seeds.glob("seed.*"), seeds / "alpha.png", seeds / "palette.png", seeds / "moving.webp"])
    )
    with contextlib.suppress(VitEdgeError):
        Preprocessing(resize=SIZE, crop=SIZE).pixels(decode(mutants.raw(seed.read_bytes(), rng)))
    return None


def record(seeds: Path, work: Path, rng: random.Random) -> str | None:
    (work / "record.json").write_bytes(mutants.change_text((seeds / "record.json").read_bytes(), rng))
    wrong = _command("deploy", "--check", work / "record.json")
    return wrong or _command("report", work / "record.json", "-o", work / "page.html", "--force")


def cache_entry(seeds: Path, work: Path, rng: random.Random) -> str | None:
    kind, key, value = "tuning", sha256_hex(rng.randbytes(8)), {"engine": "openvino", "threads": 2, "p50_ms": 1.5}
    cache.remember("tuning", key, value)
    place = cache.cache_folder() / kind / f"{key}.json"
    place.write_bytes(mutants.change_text(place.read_bytes(), rng))
    found = cache.recall("tuning", key)
    place.unlink()
    return None if found in (None, value) else f"silent: {found} was recalled"


def settings(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """Labels, preprocessing, and a list of devices."""
    values = (seeds / "settings.json").read_bytes()
    (work / "labels.json").write_bytes(mutants.change_text(values, rng))
    (work / "devices.toml").write_bytes(mutants.raw(DEVICES, rng))
    with contextlib.suppress(VitEdgeError):
        read_labels(work / "labels.json")
    with contextlib.suppress(VitEdgeError):
        chosen_devices([], file=work / "devices.toml", tags=[], python="python3")
    (work / "preprocessing.json").write_bytes(
        mutants.change_text(json.dumps(json.loads(values)["preprocessing"]).encode(), rng)
    )
    (work / "names.json").write_text(json.dumps(json.loads(values)["labels"]))
    given = ("--labels", work / "names.json", "--preprocessing", work / "preprocessing.json", "--sandbox", "never")
    return _classified(seeds, seeds / "third.onnx", rng, *given)


def answers(seeds: Path, work: Path, rng: random.Random) -> str | None:
    """A device that answers anything: the greeting, then the result of a command, then the farewell."""
    done = {"returncode": 0, "stdout": json.dumps({"schema": 1, "command": "classify", "images": []}), "stderr": ""}
    said = [json.dumps({"hello": HELLO}).encode(), json.dumps(done).encode(), b'{"bye": true, "left": null}']
    at = rng.randrange(3)
    said[at] = mutants.change_text(said[at], rng)
    lines = b"".join(agent.MARK.encode() + line + b"\n" for line in said)
    session = Session.__new__(Session)
    process = SimpleNamespace(stdin=io.BytesIO(), stdout=io.BytesIO(lines), returncode=1)
    process.wait, process.kill = lambda *_: 1, lambda: None
    with contextlib.suppress(VitEdgeError), _talking(session, process):
        session.provide = None  # type: ignore[assignment,method-assign]
        session._check_packages(None, needs_engine=True)
        session.command(["classify"], SimpleNamespace(there={}))  # type: ignore[arg-type]
    return None


@contextlib.contextmanager
def _talking(session: Any, process: Any) -> Any:
    """Yield a session whose transport is a process that has said everything already."""
    from vit_edge.remote import device

    transport = SimpleNamespace(
        start=lambda *_, **__: process,
        close=lambda: None,
        failure=lambda what, stderr: device.EngineUnavailable(what, reason="lost", remedy="again"),
    )
    opened, device.open_transport = device.open_transport, lambda address: transport  # type: ignore[assignment,return-value]
    try:
        session.__init__(Device(address="ssh://a", name="a"), Setup())
        with session:
            yield
    finally:
        device.open_transport = opened


# Each with its share: what starts an engine is dear.
TARGETS: dict[str, tuple[Target, int]] = {
    "sealed file, bytes": (sealed_bytes, 15),
    "sealed file, graph": (graph, 8),
    "sealed file, bytes, sealed again": (sealed_again, 5),
    "manifest": (manifest, 6),
    "encoder": (encoder, 4),
    "third-party ONNX": (third_party, 12),
    "OpenVINO IR": (ir, 8),
    "checkpoint": (checkpoint, 12),
    "pickle": (pickled, 8),
    "image": (image, 12),
    "deployment record": (record, 5),
    "cache entry": (cache_entry, 4),
    "labels, preprocessing, devices": (settings, 4),
    "answers of a device": (answers, 4),
    "tar shard": (fuzz_targets_of_data.tar_shard, 4),
    "Parquet shard": (fuzz_targets_of_data.parquet_shard, 4),
    "requests of the Open Inference Protocol": (fuzz_targets_of_data.requests, 4),
    "responses of the Open Inference Protocol": (fuzz_targets_of_data.responses, 2),
}


def run_one(number: int, seed: int, seeds: Path, work: Path) -> tuple[str, str | None]:
    """Return the kind of the mutant, and what is wrong with its outcome, if anything."""
    rng = random.Random(f"{seed}:{number}")
    kind = rng.choices([*TARGETS], weights=[share for _, share in TARGETS.values()])[0]
    try:
        return kind, TARGETS[kind][0](seeds, work, rng)
    except Exception:
        return kind, f"traceback: {traceback.format_exc()[-1200:]}"
