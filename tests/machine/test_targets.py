"""Targets: what hardware asks of an INT8 file, what is chosen for a device, and what loading warns of."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import ROOT, vit_edge
from vit_edge.errors import GoldenMismatch, InputError, UsageError
from vit_edge.image import Preprocessing
from vit_edge.machine import cpu
from vit_edge.machine.targets import TARGETS, choose_target, mismatch, resolve_target, target
from vit_edge.model_file.artifact import Manifest, open_model, pack
from vit_edge.runtime.checks.golden import GENERATOR, Tolerance, expectation
from vit_edge.runtime.engines.protocol import EngineOptions
from vit_edge.runtime.loading import load_model

PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
NAMES = ("portable", "x86-vnni", "openvino-avx2", "arm-dotprod", "openvino-npu", "tensorrt", "qnn")


def table(heading: str) -> list[dict[str, str]]:
    """Return the rows of the first table under a heading of the page."""
    lines = PAGE.split(f"## {heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def report(machine: str, *instructions: str, complete: bool = True) -> dict[str, object]:
    """Return what doctor says of such a CPU, as far as a target is chosen from it."""
    found = {"machine": machine, "instructions": list(instructions), "instructions_complete": complete}
    return {"schema": 1, "command": "doctor", "cpu": found}


def pretend(patch: pytest.MonkeyPatch, machine: str, *names: str, complete: bool = True) -> None:
    """Let this process find another CPU; the engine computes as before."""
    patch.setattr(cpu.platform, "machine", lambda: machine)
    patch.setattr(cpu, "instructions", lambda: cpu.Instructions(names=frozenset(names), complete=complete))


@pytest.fixture(scope="module")
def tiny() -> bytes:
    """Return a sealed file of one product over the mean colour, with integers' precision and no target yet."""
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
    ]
    weight = onnx.numpy_helper.from_array(np.array([[1, 0], [0, 1], [1, -1]], np.float32), "weight")
    graph = helper.make_graph(nodes, "tiny", [images], [logits], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    manifest = Manifest(
        name="tiny", architecture={}, preprocessing=Preprocessing(resize=8, crop=(8, 8)), labels=("a", "b"),
        precision="int8", provenance={},
    )  # fmt: skip
    return pack(model.SerializeToString(), manifest)


def warned(tiny: bytes, name: object, caplog: pytest.LogCaptureFixture, **options: bool) -> list[str]:
    """Load the file as one of that target; return what was logged, after comparing it with `describe`."""
    model = open_model(tiny)
    made = open_model(model.with_manifest(replace(model.manifest, quantization={"target": name})))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vit_edge"):
        classifier = load_model(made, engine="onnxruntime", options=EngineOptions(), verify="none", **options)
    messages = [record.getMessage() for record in caplog.records]
    described = classifier.describe()
    assert described["target"] == (name if isinstance(name, str) else None)
    if options.get("warn", True):
        assert [m.partition(": ")[2] for m in messages] == [w for w in (described["target_warning"],) if w]
    return messages


def test_the_targets_are_those_of_the_issue() -> None:
    assert tuple(TARGETS) == NAMES
    assert {name for name, entry in TARGETS.items() if entry.weight_bits == 7} == {"portable", "openvino-avx2"}
    assert {name for name, entry in TARGETS.items() if entry.verified} == {"portable", "x86-vnni"}
    for entry in TARGETS.values():
        assert entry.reason
        assert ("unverified" in entry.label) is not entry.verified
        assert entry.label in entry.describe()
        assert str(entry.weight_bits) in entry.describe()


def test_seven_bit_weights_fit_the_sums_that_eight_bit_ones_overflow() -> None:
    for entry in TARGETS.values():
        largest = 2 * 255 * (2 ** (entry.weight_bits - 1) - 1)
        assert (largest <= np.iinfo(np.int16).max) is (entry.name in ("portable", "openvino-avx2"))


def test_the_page_says_of_each_target_what_the_code_does() -> None:
    rows = {row["target"].strip("`"): row for row in table("Targets")}
    assert tuple(rows) == NAMES
    for name, row in rows.items():
        entry = TARGETS[name]
        assert row["weights"] == f"{entry.weight_bits} bits"
        assert row["activations"] == ("symmetric int8" if entry.symmetric_activations else "uint8")
        assert row["batch"] == str(entry.static_batch or "any")
        assert row["engines"] == ", ".join(entry.engines)
        assert row["state"] == ("verified" if entry.verified else "`unverified`")
        assert row["why"] == entry.reason


def test_every_board_on_the_page_gets_what_its_target_implies() -> None:
    rows = table("Boards")
    for row in rows:
        entry = TARGETS[row["target"].strip("`")]
        kind = "symmetric int8" if entry.symmetric_activations else "uint8"
        batch = f"batch {entry.static_batch}" if entry.static_batch else "any batch"
        assert row["implies"] == f"{entry.weight_bits}-bit weights, {kind} activations, {batch}, " + " or ".join(
            entry.engines
        )
        assert row["hardware reason"]
        assert row["state"] == "run on AMD Zen 5" if "with VNNI" in row["board"] else row["state"].startswith("`unv")
    boards = " ".join(row["board"] for row in rows)
    for board in ("N100", "Pi 4", "Pi 5", "Orin", "Desktop", "Apple", "Qualcomm", "Core Ultra"):
        assert board in boards


@pytest.mark.parametrize(
    ("machine", "instructions", "expected"),
    [
        ("x86_64", ("avx512_vnni", "avx512bw", "avx2"), "x86-vnni"),
        ("AMD64", ("avx_vnni", "avx2"), "x86-vnni"),  # Intel N100, on Windows too
        ("x86_64", ("avx512bw", "avx2"), "portable"),
        ("x86_64", ("avx2",), "portable"),
        ("x86_64", (), "portable"),
        ("aarch64", ("asimd",), "portable"),  # Raspberry Pi 4
        ("aarch64", ("asimd", "asimddp"), "arm-dotprod"),  # Raspberry Pi 5
        ("arm64", ("asimd", "asimddp", "i8mm"), "arm-dotprod"),
        ("aarch64", ("avx_vnni",), "portable"),  # no such CPU: a name alone decides nothing
        ("riscv64", (), "portable"),
    ],
)
def test_a_target_is_chosen_by_machine_and_instructions(
    machine: str, instructions: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    found = report(machine, *instructions)
    assert choose_target(found).name == expected
    path = tmp_path / "device.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # PowerShell redirects in the last
        path.write_text(json.dumps(found), encoding=encoding)
        resolved = resolve_target(path)
        assert (resolved.target.name, resolved.chosen_from) == (expected, "file")
    assert resolved.reason


def test_a_name_is_taken_as_it_is_and_an_unknown_one_lists_them_all() -> None:
    for name in NAMES:
        assert resolve_target(name).target is TARGETS[name] is target(name)
    for wrong in ("vnni", "", "Portable", "x" * 5000, "a\0b"):
        with pytest.raises(UsageError) as caught:
            resolve_target(wrong)
        assert all(name in str(caught.value) for name in (*NAMES, "auto", "doctor --json"))


def test_auto_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [{"name": "openvino", "installed": True, "error": None}]
    assert resolve_target("auto").target is choose_target({"cpu": cpu.cpu_report(), "engines": engines})
    pretend(monkeypatch, "x86_64", "avx2")
    resolved = resolve_target("auto")
    assert (resolved.target.name, resolved.chosen_from) == ("openvino-avx2", "auto")
    assert "VNNI" in resolved.reason


def test_the_target_for_openvino_is_chosen_only_if_that_engine_runs_on_a_cpu_without_vnni() -> None:
    for names, installed, error, complete, expected in (
        (("avx2",), True, None, True, "openvino-avx2"),
        (("avx2",), False, None, True, "portable"),
        (("avx2",), True, "cannot be imported", True, "portable"),
        (("avx2",), True, None, False, "portable"),  # it may have AVX-VNNI
        (("avx",), True, None, True, "portable"),
        (("avx2", "avx512bw"), True, None, True, "portable"),  # kernels that nobody measured
        (("avx2", "avx_vnni"), True, None, True, "x86-vnni"),
    ):
        found = report("x86_64", *names, complete=complete)
        found["engines"] = [{"name": "openvino", "installed": installed, "error": error}]
        assert choose_target(found).name == expected


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "doctor --json"),
        (b'{"command": "inspect", "schema": 1}', "doctor --json"),
        (b'{"command": "doctor"}', "the report's schema is None"),
        (b'{"command": "doctor", "schema": "1"}', "the report's schema is '1'"),
        (b'{"command": "doctor", "schema": 2, "cpu": {}}', "install a newer vit-edge"),
        (b'{"command": "doctor", "schema": 1, "error": {}}', "the report has no CPU"),
        (b'{"command": "doctor", "schema": 1, "cpu": {}}', "cpu.machine"),
        (b'{"command": "doctor", "schema": 1, "cpu": {"machine": "x86_64"}}', "cpu.instructions"),
        (b'{"command": "doctor", "schema": 1, "cpu": {"machine": "x86_64", "instructions": [1]}}', "cpu.instructions"),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_its_name(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "device.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        resolve_target(str(path))
    assert why in str(caught.value)
    assert caught.value.file == str(path)


def test_a_portable_file_is_never_warned_of(
    tiny: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for machine, *names in (("x86_64", "avx2"), ("x86_64", "avx512_vnni"), ("aarch64", "asimd"), ("riscv64",)):
        pretend(monkeypatch, machine, *names, complete=False)
        assert warned(tiny, "portable", caplog) == []
        assert warned(tiny, None, caplog) == []


@pytest.mark.parametrize("name", [name for name in NAMES if TARGETS[name].weight_bits == 8])
def test_eight_bit_weights_are_warned_of_once_on_x86_without_vnni(
    tiny: bytes, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, "x86_64", "avx2", "avx512bw")
    (message,) = warned(tiny, name, caplog)
    assert (
        "8-bit weights saturate here: predictions differ from those verified; quantize with --target portable"
        in message
    )
    assert warned(tiny, name, caplog, warn=False) == []
    pretend(monkeypatch, "AMD64", "avx2", complete=False)
    (message,) = warned(tiny, name, caplog)
    assert "does not report" in message


def test_a_file_made_for_this_cpu_is_not_warned_of_and_others_are(
    tiny: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, "x86_64", "avx_vnni", "avx2")
    assert warned(tiny, "x86-vnni", caplog) == []
    assert "--target x86-vnni" in warned(tiny, "arm-dotprod", caplog)[0]
    assert "runs on the CPU here" in warned(tiny, "tensorrt", caplog)[0]
    assert "not known to this vit-edge" in warned(tiny, "quantum", caplog)[0]
    assert warned(tiny, ["x86-vnni"], caplog) == []
    assert warned(tiny, "openvino-avx2", caplog) == []
    pretend(monkeypatch, "aarch64", "asimd", "asimddp")
    assert "--target arm-dotprod" in warned(tiny, "openvino-avx2", caplog)[0]
    assert warned(tiny, "arm-dotprod", caplog) == []
    assert "--target arm-dotprod" in warned(tiny, "x86-vnni", caplog)[0]
    pretend(monkeypatch, "aarch64", "asimd")
    assert "INT8 gains little" in warned(tiny, "arm-dotprod", caplog)[0]


def test_other_answers_on_another_cpu_are_blamed_on_the_target(tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny)
    wrong = expectation(
        np.array([[1, 2]], np.float32), engines=["onnxruntime"], tolerance=Tolerance(absolute=0.1, relative=0.0)
    )
    golden = {"generator": GENERATOR, "seeds": [0], "images": [], "expected": [wrong]}
    manifest = replace(model.manifest, quantization={"target": "x86-vnni"}, golden=golden)
    for instruction, remedy in (("avx2", "quantize with --target portable"), ("avx512_vnni", "was edited")):
        pretend(monkeypatch, "x86_64", instruction)
        with pytest.raises(GoldenMismatch, match=remedy):
            load_model(open_model(model.with_manifest(manifest)), engine="onnxruntime", options=EngineOptions())


def test_inspect_shows_the_target_and_marks_the_unverified(tiny: bytes, tmp_path: Path) -> None:
    model = open_model(tiny)
    for name, shown in (("qnn", "qnn (unverified): 8-bit"), ("portable", "portable: 7-bit"), (None, "none")):
        quantization = {"target": name, "images": [], "ranges": {"method": "m"}} if name else None
        made = model.with_manifest(replace(model.manifest, quantization=quantization))
        (tmp_path / "m.onnx").write_bytes(made)
        assert shown in vit_edge("inspect", "m.onnx", cwd=tmp_path).stdout
        found = json.loads(vit_edge("inspect", "m.onnx", "--json", cwd=tmp_path).stdout)["target"]
        assert (found and found["name"]) == name
        assert found is None or found["verified"] is TARGETS[name].verified


EMULATOR = shutil.which("qemu-x86_64-static")


@pytest.mark.skipif(EMULATOR is None or not cpu.is_x86(), reason="apt-get install qemu-user-static")
def test_an_emulated_cpu_is_not_taken_for_its_host() -> None:
    """Under an emulator /proc/cpuinfo is the host's."""
    script = "from vit_edge.machine import cpu, targets; print(cpu.instruction_set(), targets.mismatch('x86-vnni'))"
    command = [EMULATOR, "-cpu", "Haswell", sys.executable, "-c", script]
    unmasked = {**os.environ, "LD_PRELOAD": ""}  # the emulator answers for the CPU
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=unmasked)
    assert done.stdout.startswith("x86_64 avx2 ")
    # A host whose only VNNI is AVX-VNNI cannot be told apart: numpy does not ask for that one.
    assert "saturate" in done.stdout or "avx512_vnni" not in cpu.instruction_set()


def test_emulation_without_an_emulator_says_what_to_install(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "emulation" / "emulated_cpu.py"
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "apt-get install qemu-user-static" in done.stderr or not cpu.is_x86()
    assert "Traceback" not in done.stderr


def test_mismatch_agrees_with_the_choice_for_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target chosen for a CPU is never warned of on it."""
    for machine in ("x86_64", "aarch64", "riscv64"):
        for names in ((), ("avx2",), ("avx_vnni",), ("amx_int8", "avx512_vnni"), ("asimd",), ("asimddp",), ("i8mm",)):
            pretend(monkeypatch, machine, *names)
            assert mismatch(resolve_target("auto").target.name) is None
