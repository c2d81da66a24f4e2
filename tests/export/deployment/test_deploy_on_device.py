"""The verdict of a deployment rests on the devices it is for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ssh_devices import SshDevice, start_device, stop_device
from vit_edge.export.deployment.record import read_record


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    found = start_device(tmp_path_factory.mktemp("device"))
    yield found
    stop_device(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, deployment: Path) -> Path:
    return shutil.copytree(deployment, tmp_path_factory.mktemp("deployment"), dirs_exist_ok=True)


def test_the_speed_is_that_of_the_device(device: SshDevice, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    where = tmp_path / "f"
    images = ("--calibration", where / "calibration", "--data", where / "data", "--max-drop", "40")
    done = device.vit_edge(
        "deploy", where / "c.safetensors", *images, "--effort", "fast", "-o", where / "out", "--json"
    )
    assert done.returncode in (0, 6), done.stderr  # a network this small may be no faster in INT8
    printed = json.loads(done.stdout)
    assert printed["skipped"][0] == "export"
    accuracy, speed = printed["claims"]
    assert (accuracy["subject"], accuracy["verdict"]) == ("accuracy", "pass")
    assert speed["subject"] == f"speed on {device.address}"
    assert "golden vectors pass" in speed["text"]
    assert printed["verdict"] == "pass" or printed["error"]["remedy"] == speed["remedy"]
    record = read_record(where / "out" / "record.json")
    assert record["claims"] == printed["claims"]
    assert {entry["precision"] for entry in record["devices"][0]["results"]} == {"float32", "int8"}
    assert (printed["verdict"] == "pass") == (speed["verdict"] == "pass") == (done.returncode == 0)
    assert not device.left_behind()


def test_an_unreachable_device_is_reported_and_the_files_are_kept(folder: Path, tmp_path: Path) -> None:
    from tests.conftest import vit_edge

    shutil.copytree(folder, tmp_path / "f")
    where = tmp_path / "f"
    images = ("--calibration", where / "calibration", "--data", where / "data", "--max-drop", "40")
    options = ("--effort", "fast", "-o", where / "out", "--on", "ssh://127.0.0.1:1", "--json")
    done = vit_edge("deploy", where / "c.safetensors", *images, *options)
    assert done.returncode == 7
    record = read_record(where / "out" / "record.json")
    assert record["verdict"] == record["claims"][1]["verdict"] == "inconclusive"
    assert (where / "out" / "model.int8.onnx").exists()
