"""Trust is not what a file says of itself: known files, the key they are kept under, the sandbox, the allow-list."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.hostile_models import appended, resealed
from vit_edge import cache
from vit_edge.cli import main
from vit_edge.errors import ModelRejected, UsageError
from vit_edge.machine import user_key
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import installed_engines, load
from vit_edge.runtime.checks import acceptance, sandbox
from vit_edge.runtime.checks.load_policy import LoadPolicy, load_policy, without_sandbox
from vit_edge.runtime.loading import admit


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIT_EDGE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(acceptance, "_accepted_here", set())


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by one entry for each sandbox that starts."""
    started: list[str] = []
    real = sandbox.run_apart

    def counted(module: str, *arguments: Any, **options: Any) -> str:
        started.append(module)
        return real(module, *arguments, **options)

    monkeypatch.setattr(sandbox, "run_apart", counted)
    return started


def test_a_sealed_file_is_tried_once_and_then_known_to_later_processes(
    small_model: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model / "m.onnx"
    for expected in (1, 1):
        load(path, engine="onnxruntime").close()
        assert len(trials) == expected
        monkeypatch.setattr(acceptance, "_accepted_here", set())  # as in the next process
    load(path, engine="onnxruntime", sandbox="always").close()
    assert len(trials) == 2
    load(path, engine="onnxruntime", sandbox="never", batch_size=2).close()
    assert len(trials) == 2
    load(path, engine="onnxruntime", batch_size=2).close()  # other kernels, perhaps
    assert len(trials) == 3


def test_an_entry_that_somebody_else_wrote_counts_for_nothing(
    small_model: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(small_model / "m.onnx", engine="onnxruntime").close()
    (entry,) = (cache.cache_folder() / "accepted").iterdir()
    values = json.loads(entry.read_text())
    for forged in (
        {**values, "hmac": "0" * 64},
        {k: v for k, v in values.items() if k != "hmac"},
        {**values, "hmac": "é"},
    ):
        entry.write_text(json.dumps(forged))
        assert cache.recall("accepted", values["key"]) is None
    entry.write_text(json.dumps(values))
    assert cache.recall("accepted", values["key"]) == {"accepted": True}
    assert cache.recall("refused", values["key"]) is None
    os.replace(user_key.config_folder() / "cache.key", user_key.config_folder() / "old")  # noqa: PTH105
    user_key._key.cache_clear()
    assert cache.recall("accepted", values["key"]) is None
    user_key._key.cache_clear()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("wrong", ["mode", "link", "size", "folder"])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    assert user_key.signature(b"x") is not None
    key = user_key.config_folder() / "cache.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    if wrong == "mode":
        key.chmod(0o644)
    elif wrong == "link":
        key.rename(tmp_path / "real")
        key.symlink_to(tmp_path / "real")
    elif wrong == "size":
        key.write_bytes(b"short")
    else:
        key.unlink()
        key.mkdir()
    user_key._key.cache_clear()
    assert user_key.signature(b"x") is None
    assert not cache.remember("accepted", "0", {"accepted": True})
    user_key._key.cache_clear()


def test_what_a_manifest_says_of_its_origin_changes_nothing(small_model: Path, trials: list[str]) -> None:
    """A file that calls itself third-party is checked by its golden vectors, and has no more operators."""
    model = open_model(small_model / "m.onnx", warn=False)
    for form in ("elsewhere", "plain", "deploy", None):
        provenance = {**model.manifest.provenance, "form": form}
        data = model.with_manifest(replace(model.manifest, provenance=provenance))
        with load(data, engine="onnxruntime") as classifier:
            assert classifier.describe()["verified"] == "full"
        (small_model.parent / "form.onnx").write_bytes(data)
        with pytest.raises(ModelRejected, match="GridSample, which is not allowed"):
            load(resealed(small_model.parent / "form.onnx", appended("GridSample", "logits")))
    assert len(trials) == 4


def test_an_operator_is_allowed_only_by_the_user_and_the_output_says_so(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "more.onnx"
    path.write_bytes(resealed(small_model / "m.onnx", appended("Acos", "logits")))
    with pytest.raises(ModelRejected, match=r"(?s)Acos, which is not allowed.*--allow-op"):
        load(path)
    with load(path, engine="onnxruntime", allow_ops=["Acos"]) as classifier:
        assert classifier.describe()["allowed_operators"] == ["Acos"]
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    arguments = ["classify", str(path), str(tmp_path / "image.png"), "--engine", "onnxruntime", "--json"]
    assert main(arguments) == 3
    capsys.readouterr()
    assert main([*arguments, "--allow-op", "Acos"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["allowed_operators"] == ["Acos"]
    assert printed["warnings"] == ["allowed besides the operator allow-list: Acos"]


def test_work_that_runs_a_file_in_other_ways_tries_it_first_in_each_engine(
    small_model: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(small_model / "m.onnx", warn=False)
    for _ in range(2):
        admit(model, engines=installed_engines())
        assert len(trials) == len(installed_engines())
        monkeypatch.setattr(acceptance, "_accepted_here", set())
    with load_policy(LoadPolicy(sandbox="always")):
        admit(model, engines=["onnxruntime", "null"])
        assert len(trials) == len(installed_engines()) + 1
    with load_policy(LoadPolicy(sandbox="never")):
        admit(model, engines=installed_engines())
        assert len(trials) == len(installed_engines()) + 1
        assert without_sandbox().sandbox == "never"


@pytest.mark.parametrize("command", ["quantize", "explain", "verify", "benchmark", "tune", "bundle", "deploy --check"])
def test_every_command_tries_a_file_that_nobody_knows_in_the_sandbox(
    deployment: Path, tmp_path: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The sandbox refuses here: nothing of the file may have run in this process before."""

    def refused(*_: Any, **__: Any) -> str:
        raise ModelRejected("no", reason="refused by the sandbox", remedy="none")

    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("the file ran in this process")

    monkeypatch.setattr(sandbox, "run_apart", refused)
    monkeypatch.setattr("onnxruntime.InferenceSession", ran)
    monkeypatch.setattr("openvino.Core.compile_model", ran)
    out, data = deployment / "out", deployment / "data"
    arguments: dict[str, list[object]] = {
        "quantize": [out / "model.onnx", "--calibration", deployment / "calibration", "--out", tmp_path / "q.onnx"],
        "explain": [
            out / "model.int8.onnx",
            "--reference",
            out / "model.onnx",
            "--data",
            data,
            "--out",
            tmp_path / "p",
        ],
        "verify": [out / "model.int8.onnx", "--reference", out / "model.onnx", "--data", data],
        "benchmark": [out / "model.onnx"],
        "tune": [out / "model.onnx"],
        "bundle": [out / "model.onnx", "--out", tmp_path / "app.pyz"],
        "deploy --check": [out / "record.json"],
    }
    assert main([*command.split(), *map(str, arguments[command])]) == 3


def test_choices_that_mean_nothing_are_refused(small_model: Path) -> None:
    with pytest.raises(UsageError, match="choose auto, always, never"):
        load(small_model / "m.onnx", sandbox="sometimes")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give names of operators"):
        load(small_model / "m.onnx", allow_ops=[3])  # type: ignore[list-item]
