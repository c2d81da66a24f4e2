"""`vit-edge verify --on`: the candidate runs on a device, the statistics are computed here."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Workspace
from tests.support.ssh_devices import SshDevice, start_device, stop_device
from vit_edge.model_file.artifact import open_model


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    """A device that has all that this Python has."""
    found = start_device(tmp_path_factory.mktemp("device"))
    yield found
    stop_device(found)


def arguments(workspace: Workspace, *more: str | Path) -> tuple[str | Path, ...]:
    """Return the README's verification."""
    common = ("verify", workspace.int8_model, "--reference", workspace.float_model, "--data", workspace.test_images)
    return (*common, *more)


def test_a_device_that_is_this_machine_gives_the_verdict_of_this_machine(
    device: SshDevice, workspace: Workspace
) -> None:
    done = device.vit_edge(*arguments(workspace, "--max-drop", "4", "--json"))
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), workspace.printed["verify"]
    assert there["verdict"] == "pass"
    assert there["data_sha256"] == here["data_sha256"]
    for name in ("engine", "agreement", "worse", "better", "drop_upper_bound_points", "sqnr_db"):
        theirs, ours = ([entry[name] for entry in found["results"]] for found in (there, here))
        assert theirs == ours, name
    theirs, ours = ([c["pixels_sha256"] for r in found["results"] for c in r["changed"]] for found in (there, here))
    assert theirs == ours
    assert there["devices"][0]["on"] == device.address
    assert device.left_behind() == []


def test_what_does_not_pass_ends_with_6_and_its_flips_are_written(
    device: SshDevice, workspace: Workspace, tmp_path: Path
) -> None:
    flips = tmp_path / "flips.csv"
    more = ("--max-drop", "0.01", "--unlabelled", "--engine", "onnxruntime", "--flips-out", flips)
    done = device.vit_edge(*arguments(workspace, *more))
    assert done.returncode == 6
    assert f"on {device.address}:" in done.stdout
    assert "inconclusive" in done.stdout
    changed = [line for line in done.stdout.splitlines() if line.startswith("flips:")]
    assert flips.exists() == bool(changed)


def negated(logits: str) -> str:
    """Return encoded float32 logits with the other sign."""
    return base64.b64encode((-np.frombuffer(base64.b64decode(logits), dtype="<f4")).tobytes()).decode()


def test_a_file_whose_golden_vectors_do_not_pass_there_is_refused(
    device: SshDevice, workspace: Workspace, tmp_path: Path
) -> None:
    model = open_model(workspace.int8_model)
    golden = dict(model.manifest.golden or {})
    golden["expected"] = [{**entry, "logits": negated(entry["logits"])} for entry in golden["expected"]]
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.with_manifest(replace(model.manifest, golden=golden)))
    common = ("verify", bad, "--reference", workspace.float_model, "--data", workspace.test_images)
    done = device.vit_edge(*common, "--engine", "onnxruntime", "--max-drop", "4")
    assert done.returncode == 6
    assert "golden" in done.stderr
    assert str(bad) in done.stderr
    assert device.left_behind() == []


def test_an_engine_that_the_device_has_not_is_one_line(device: SshDevice, workspace: Workspace) -> None:
    done = device.vit_edge(*arguments(workspace, "--engine", "tflite"))
    assert done.returncode == 7
    assert "tflite" in done.stderr
    assert "Traceback" not in done.stderr
