"""The fastest choice is measured once, kept for exactly this file and machine, and never an engine not promised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Workspace, vit_edge
from vit_edge.cache import cache_folder, recall, remember
from vit_edge.errors import EngineUnavailable, UsageError
from vit_edge.machine.cpu import usable_threads
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.benchmark.tuning import tune
from vit_edge.runtime.tuned_configuration import TunedConfiguration, save_configuration, tuned_configuration


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))


def test_every_promised_engine_is_tried_and_the_tuned_configuration_is_what_loads_take(workspace: Workspace) -> None:
    done = vit_edge("tune", workspace.int8_model, "--min-seconds", "0.1", "--min-queries", "20", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    counts = {1, usable_threads()}
    assert {(one["engine"], one["threads"]) for one in printed["tried"]} >= {
        (engine, threads) for engine in ("onnxruntime", "openvino") for threads in counts
    }
    medians = [one["latency_ms"]["p50"] for one in printed["tried"]]
    assert medians == sorted(medians)
    assert printed["configuration"]["p50_ms"] <= medians[0] * 1.03
    assert printed["is_saved"] is True
    with load(workspace.int8_model) as classifier:
        described = classifier.describe()
    assert (described["engine"], described["threads"]) == (
        printed["configuration"]["engine"],
        printed["configuration"]["threads"],
    )


def test_a_tuned_configuration_counts_for_its_file_and_what_was_asked_for_goes_first(workspace: Workspace) -> None:
    assert save_configuration(
        open_model(workspace.int8_model), TunedConfiguration(engine="openvino", threads=1, p50_ms=0.1)
    )
    with load(workspace.int8_model) as classifier:
        assert (classifier.describe()["engine"], classifier.describe()["threads"]) == ("openvino", 1)
    with load(workspace.int8_model, threads=2) as classifier:
        assert (classifier.describe()["engine"], classifier.describe()["threads"]) == ("openvino", 2)
    with load(workspace.int8_model, engine="onnxruntime") as classifier:
        assert classifier.describe()["engine"] == "onnxruntime"
    with load(workspace.float_model) as classifier:
        assert classifier.describe()["engine"] == "onnxruntime"


def test_a_tuned_configuration_for_an_engine_that_is_not_promised_or_that_was_edited_is_nothing(
    workspace: Workspace,
) -> None:
    model = open_model(workspace.int8_model)
    golden = dict(model.manifest.golden or {})
    golden["expected"] = [entry for entry in golden["expected"] if entry["engines"] == ["onnxruntime"]]
    only_one = open_model(model.with_manifest(replace(model.manifest, golden=golden)))
    save_configuration(only_one, TunedConfiguration(engine="openvino", threads=1, p50_ms=0.1))
    assert tuned_configuration(only_one) is None
    with load(only_one.data) as classifier:
        assert classifier.describe()["engine"] == "onnxruntime"
    before = set((cache_folder() / "tuning").iterdir())
    save_configuration(model, TunedConfiguration(engine="openvino", threads=1, p50_ms=0.1))
    assert tuned_configuration(model) is not None
    (place,) = set((cache_folder() / "tuning").iterdir()) - before
    right = place.read_text()
    assert '"threads": 1' in right
    wrong = ("{}", "[", '{"key": "x", "value": {}}', right.replace('"threads": 1', '"threads": 9999'))
    for text in (*wrong, right.replace("openvino", "null")):
        place.write_text(text)
        assert tuned_configuration(model) is None
    place.write_text(right)
    assert tuned_configuration(model) is not None
    nobody = replace(model.manifest, golden={**golden, "expected": []})
    (path := cache_folder() / "m.onnx").write_bytes(model.with_manifest(nobody))
    with pytest.raises(EngineUnavailable, match="no engine is installed that the file was validated in"):
        tune(path)
    with pytest.raises(UsageError, match="cannot tune"):
        tune(workspace.int8_model, min_seconds=-1)


def test_what_cannot_be_kept_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remember("tuning", "a", {"x": 1})
    assert recall("tuning", "a") == {"x": 1}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "file" / "below"))
    assert not remember("tuning", "a", {"x": 1})
    assert recall("tuning", "a") is None
