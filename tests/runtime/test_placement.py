"""The profile of a run decides what is said of where a model runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from vit_edge.errors import EngineUnavailable
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.engines.ort import make_session
from vit_edge.runtime.engines.placement import read_placement
from vit_edge.runtime.engines.protocol import EngineOptions

_CPU, _GPU = "CPUExecutionProvider", "WebGpuExecutionProvider"
_HAS_QNN = importlib.util.find_spec("onnxruntime_qnn") is not None


@pytest.fixture(scope="module")
def profiled(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return the profile of one run of one image, and the multiply-accumulates of that run by the manifest."""
    model = open_model(small_model / "m.onnx")
    session = make_session(model, EngineOptions(), profile=tmp_path_factory.mktemp("profile") / "profile")
    session.run(None, {"images": np.zeros((1, *model.manifest.preprocessing.crop, 3), np.uint8)})
    return Path(session.end_profiling()), sum((model.manifest.macs or {}).values())


def moved(profile: Path, out: Path, kinds: set[str]) -> Path:
    """Write the profile as if all nodes but those of `kinds` had run on a GPU."""
    events = json.loads(profile.read_bytes())
    for event in events:
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] not in kinds:
            event["args"]["provider"] = _GPU
    out.write_text(json.dumps(events))
    return out


def test_the_cpu_runs_every_product_there_is(profiled: tuple[Path, int]) -> None:
    profile, macs = profiled
    for given in (macs, None):
        found = read_placement(profile, macs=given)
        assert found.share == pytest.approx(0, abs=1e-9)  # the profile counts the products that the manifest counts
        assert list(found.nodes) == [_CPU]


@pytest.mark.parametrize(("kinds", "share"), [({"Cast", "Reshape"}, 1.0), ({"Softmax", "LayerNormalization"}, 1.0)])
def test_nodes_without_products_may_run_on_the_cpu(
    profiled: tuple[Path, int], tmp_path: Path, kinds: set[str], share: float
) -> None:
    found = read_placement(moved(profiled[0], tmp_path / "p.json", kinds), macs=profiled[1])
    assert found.share == share
    assert found.nodes[_CPU] > 0


def test_products_on_the_cpu_are_counted(profiled: tuple[Path, int], tmp_path: Path) -> None:
    profile, macs = profiled
    found = read_placement(moved(profile, tmp_path / "p.json", {"MatMul", "FusedMatMul", "Gemm", "Conv"}), macs=macs)
    assert found.share < 0.01
    # What a provider compiled into one node is not in the profile: the manifest knows how much that is.
    events = json.loads(profile.read_bytes())
    products = [e for e in events if e["name"].endswith("_kernel_time") and e["args"]["op_name"] == "MatMul"]
    (tmp_path / "q.json").write_text(json.dumps(products[:1]))
    assert 0 < read_placement(tmp_path / "q.json", macs=macs).share < 1


def test_a_session_that_claims_a_device_is_not_believed(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Claims:
        """A session on the CPU that says it runs on WebGPU."""

        def __init__(self, *arguments: Any, providers: list[Any], **options: Any) -> None:
            self._session = session(*arguments, providers=[_CPU], **options)

        def get_providers(self) -> list[str]:
            return [_GPU, _CPU]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    session = onnxruntime.InferenceSession
    monkeypatch.setattr("onnxruntime.InferenceSession", Claims)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [_GPU, _CPU])
    options = {"engine": "onnxruntime", "device": "webgpu", "sandbox": "never"}
    with pytest.raises(EngineUnavailable, match=r"100\.0 % of the multiply-accumulates run on the CPU"):
        load(small_model / "m.onnx", **options)
    with load(small_model / "m.onnx", allow_fallback=True, **options) as classifier:
        assert "100.0 % of the multiply-accumulates" in classifier.describe()["fallback"]
        assert list(classifier.describe()["placement"]) == [_CPU]
    assert "run on the CPU, not on 'webgpu'" in caplog.text


@pytest.mark.skipif(_GPU not in onnxruntime.get_available_providers(), reason="onnxruntime-webgpu is not installed")
def test_webgpu_runs_every_product(small_model: Path) -> None:
    with load(small_model / "m.onnx", engine="onnxruntime", device="webgpu") as classifier:
        described = classifier.describe()
    assert (described["device"], described["fallback"], described["verified"]) == ("webgpu", None, "full")
    assert described["placement"][_GPU] > described["placement"][_CPU]


@pytest.mark.skipif(not _HAS_QNN, reason="onnxruntime-qnn is not installed")
def test_qnn_without_its_device_is_refused_or_named(small_model: Path) -> None:
    with pytest.raises(EngineUnavailable, match="does not run it on 'qnn'"):
        load(small_model / "m.onnx", engine="onnxruntime", device="qnn")
    with load(small_model / "m.onnx", engine="onnxruntime", device="qnn", allow_fallback=True) as classifier:
        assert classifier.describe()["device"] == "cpu"
        assert "does not run it on 'qnn'" in classifier.describe()["fallback"]
