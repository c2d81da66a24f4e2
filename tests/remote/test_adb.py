"""Commands on devices by `adb://`, through a program that stands in for adb: the whole way there, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import vit_edge
from tests.support.adb_devices import AdbDevices, make_devices
from vit_edge.export.deployment.record import read_record
from vit_edge.model_file.artifact import open_model

BRIEF = ("--engine", "onnxruntime", "--threads", "1", "--min-seconds", "0.05", "--min-queries", "12", "--no-peak")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> AdbDevices:
    return make_devices(tmp_path_factory.mktemp("adb"), "phone", "tablet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, deployment: Path) -> Path:
    """Return a folder with a deployment in `out`, and the images it was judged by in `data`."""
    return shutil.copytree(deployment, tmp_path_factory.mktemp("deployment"), dirs_exist_ok=True)


def test_a_device_classifies_as_this_machine_does(devices: AdbDevices, folder: Path) -> None:
    model, image = folder / "out" / "model.int8.onnx", folder / "calibration" / "0.png"
    here = json.loads(vit_edge("classify", model, image, "--json").stdout)
    done = devices.vit_edge("classify", model, image, "--on", "adb://phone", "--json")
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert there["images"][0]["answers"] == here["images"][0]["answers"]
    assert there["model"]["verified"] == "full"  # the golden vectors ran there
    assert devices.left_behind() == []


def test_a_device_that_is_not_there_is_one_line_and_the_others_results_are_kept(
    devices: AdbDevices, folder: Path
) -> None:
    given = ("--on", "adb://phone", "--on", "adb://lost", "--on", "adb://tablet", "--device", "cpu", *BRIEF)
    done = devices.vit_edge("benchmark", folder / "out" / "model.int8.onnx", *given, "--json")
    assert done.returncode == 7
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "device 'lost' not found" in line
    measured = [entry["device_name"] for entry in json.loads(done.stdout)["results"]]
    assert measured == ["adb://phone", "adb://tablet"]
    assert devices.left_behind() == []


def test_results_of_devices_are_written_drawn_and_compared_here(
    devices: AdbDevices, folder: Path, tmp_path: Path
) -> None:
    given = ("benchmark", folder / "out" / "model.int8.onnx", "--on", "adb://phone", "--on", "adb://tablet", *BRIEF)
    files = ("--save", "run.json", "--csv", "run.csv", "--plot", "run.png")
    done = devices.vit_edge(*given, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run.json").read_text())
    assert [entry["device_name"] for entry in saved["results"]] == ["adb://phone", "adb://tablet"]
    reasons = [f"{d['device']}: {reason}" for d in saved["devices"] for reason in d["invalid_because"]]
    assert (saved["valid"], saved["invalid_because"]) == (not reasons, reasons)
    assert all(f"INVALID on {reason}" in done.stdout for reason in reasons)
    assert [line.rpartition(",")[2] for line in (tmp_path / "run.csv").read_text().split()[1:]] == [
        "adb://phone", "adb://tablet",
    ]  # fmt: skip
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    done = devices.vit_edge(
        *given, "--compare", "run.json", "--fail-if-slower", "900%", "--allow-invalid", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert [one["what"].split(" on ")[1] for one in json.loads(done.stdout)["comparison"]] == [
        "adb://phone, batch 1, 1 thread", "adb://tablet, batch 1, 1 thread",
    ]  # fmt: skip
    done = devices.vit_edge(*given, "--save", "run.json", cwd=tmp_path)
    assert (done.returncode, "--force" in done.stderr) == (2, True)


def test_what_is_asked_of_a_device_arrives_there(devices: AdbDevices, folder: Path) -> None:
    given = ("--on", "adb://phone", "--device", "cup", *BRIEF)
    done = devices.vit_edge("benchmark", folder / "out" / "model.int8.onnx", *given)
    assert done.returncode == 7
    assert "the device 'cup' is not known" in done.stderr


def test_a_device_is_verified_as_this_machine_is(devices: AdbDevices, folder: Path) -> None:
    record = read_record(folder / "out" / "record.json")
    here = {entry["engine"]: entry for entry in record["steps"]["quantize"]["result"]["verification"]["engines"]}
    given = ("--reference", folder / "out" / "model.onnx", "--data", folder / "data", "--max-drop", "40", "--json")
    done = devices.vit_edge("verify", folder / "out" / "model.int8.onnx", *given, "--on", "adb://phone")
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)["results"]
    assert {entry["engine"] for entry in there} == set(here)
    for entry in there:
        for name in ("agreement", "worse", "better", "sqnr_db"):
            assert entry[name] == pytest.approx(here[entry["engine"]][name]), name
    assert devices.left_behind() == []


def test_one_file_is_made_for_each_distinct_target_of_the_devices(
    devices: AdbDevices, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "c.safetensors", tmp_path)
    for name in ("calibration", "data"):
        shutil.copytree(folder / name, tmp_path / name)
    named = [("phone", "arm-dotprod"), ("tablet", None), ("lost", "arm-dotprod")]
    (tmp_path / "devices.toml").write_text(
        "".join(
            f'[[device]]\nname = "{name}"\naddress = "adb://{name}"\nengine = "onnxruntime"\n'
            + (f'target = "{target}"\n' if target else "")
            for name, target in named
        )
    )
    images = ("--calibration", "calibration", "--data", "data", "--max-drop", "40", "--effort", "fast")
    given = ("-o", "made", "--devices", "devices.toml", "--json")
    done = devices.vit_edge("deploy", "c.safetensors", *images, *given, cwd=tmp_path)
    assert done.returncode == 7, done.stderr  # one of the devices is not there
    printed = json.loads(done.stdout)
    first, second = printed["deployments"]
    assert (first["folder"], second["folder"]) == ("made/arm-dotprod", "made/portable")
    assert second["skipped"] == ["export"]
    for made, names in ((first, ["phone", "lost"]), (second, ["tablet"])):
        where = tmp_path / made["folder"]
        record = read_record(where / "record.json")
        assert [entry["device"] for entry in record["devices"]] == names
        assert (open_model(where / "model.int8.onnx").manifest.quantization or {})["target"] == where.name
        subjects = [claim["subject"] for claim in made["claims"][1:]]
        assert subjects == [f"speed on {name}" for name in names]
    assert printed["verdict"] in ("inconclusive", "fail")
    assert devices.left_behind() == []
