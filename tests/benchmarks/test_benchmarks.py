"""The scripts that put INT8 beside float and beside other tools run to their end and tell what they measured."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.support.timing import Load, Watch, ratio, take_turns
from tests.conftest import ROOT
from tests.support.networks import SIZE
from vit_edge.data import find_images
from vit_edge.export import ExportOptions, QuantizationOptions, export_onnx, quantize
from vit_edge.files import sha256_hex
from vit_edge.metrics import sqnr_db
from vit_edge.runtime import load

HAS_NNCF = importlib.util.find_spec("nncf") is not None
BRIEF = ("--rounds", "3", "--queries", "4")


@dataclass(slots=True)
class Inputs:
    """A float file and its INT8 file, images that calibrate and images that judge."""

    folder: Path

    def run(self, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        shutil.copy(ROOT / "docs" / "results.md", self.folder / "results.md")
        command = [sys.executable, ROOT / "benchmarks" / script, *arguments, *BRIEF, "--results", "results.md"]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False)

    def measured(self, script: str, *arguments: str | Path) -> dict[str, Any]:
        done = self.run(script, *arguments, "--json", "measured.json")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() in (self.folder / "results.md").read_text(encoding="utf-8")
        result: dict[str, Any] = json.loads((self.folder / "measured.json").read_bytes())
        return result


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("peers")
    random = np.random.default_rng(0)
    for number in range(64):
        kind = "calibration" if number < 40 else f"evaluation/{'abcd'[number % 4]}"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    shutil.copy(small_model / "m.onnx", folder / "float.onnx")
    export_onnx(small_model / "c.safetensors", out=folder / "plain.onnx", options=ExportOptions(fuse=False))
    quantize(folder / "float.onnx", calibration=folder / "calibration", out=folder / "int8.onnx")
    return Inputs(folder=folder)


@pytest.fixture(scope="module")
def judged(inputs: Inputs) -> dict[str, Any]:
    given = ("float.onnx", "--calibration", "calibration", "--data", "evaluation")
    return inputs.measured("peers.py", *given, "--ours", "int8.onnx", "--make", "--target x86-vnni")


def test_speed_is_told_for_every_file_beside_float_and_beside_the_peers(inputs: Inputs) -> None:
    result = inputs.measured(
        "int8_speed.py", "float.onnx", "int8.onnx", "--calibration", "calibration", "--plain", "plain.onnx"
    )
    samples = {(e["file"], e["setting"]): np.array(e["by_round"]) for e in result["samples_ms"]}
    assert all(found.shape == (3, 4) and found.min() > 0 for found in samples.values())
    rows = {(row["file"], row["setting"]): row for row in result["rows"]}
    assert rows.keys() == samples.keys()
    ours, static = "ours, int8.onnx: portable fast", "ONNX Runtime quantize_static"
    for setting in ("ONNX Runtime", "OpenVINO, batch fixed", "OpenVINO, batch free"):
        told, base, own = rows[ours, setting]["than_float"], samples["float32", setting], samples[ours, setting]
        assert told["by_median"] == pytest.approx(np.median(base) / np.median(own))
        assert told["by_min"] == pytest.approx(base.min() / own.min())
        assert told["interval"][0] <= told["by_round"] <= told["interval"][1]
    found = rows[ours, "ONNX Runtime"]["than_plain_peer"]["by_min"]
    expected = samples[f"{static}, plain graph", "ONNX Runtime"].min() / samples[ours, "ONNX Runtime"].min()
    assert found == pytest.approx(expected)
    assert result["files"][ours] == {"int8.onnx": sha256_hex((inputs.folder / "int8.onnx").read_bytes())}
    assert result["calibration_images"] == 40


def test_one_table_has_ours_and_the_peers_on_the_same_images(inputs: Inputs, judged: dict[str, Any]) -> None:
    rows = {(row["file"], row["setting"]): row for row in judged["rows"]}
    paths = find_images(inputs.folder / "evaluation")
    for setting, engine in (("ONNX Runtime", "onnxruntime"), ("OpenVINO, batch free", "openvino")):
        logits = []
        for name in ("float.onnx", "int8.onnx"):
            with load(inputs.folder / name, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
                images = [classifier.manifest.preprocessing.pixels(path)[None] for path in paths]
                logits.append(np.concatenate([classifier.logits(image) for image in images]))
        row = rows["ours, int8.onnx: portable fast", setting]
        assert row["sqnr_db"] == pytest.approx(sqnr_db(*logits), abs=0.01)
        assert row["changed"] == np.sum(logits[0].argmax(axis=1) != logits[1].argmax(axis=1))
        assert row["images"] == len(paths) == 24
    for name, images in (("ONNX Runtime quantize_static", 40), ("ONNX Runtime quantize_dynamic", 0)):
        assert rows[name, "ONNX Runtime"]["calibration_images"] == images
        assert 0 < rows[name, "ONNX Runtime"]["sqnr_db"] < 60


def test_what_was_made_here_has_its_time_and_peak_memory(judged: dict[str, Any]) -> None:
    rows = {(row["file"], row["setting"]): row for row in judged["rows"]}
    made = [rows[name, "ONNX Runtime"] for name in ("ours, --target x86-vnni", "ONNX Runtime quantize_static")]
    assert all(row["seconds"] > 0.3 and 30e6 < row["peak_rss_bytes"] < 4e9 for row in made)
    assert made[0]["calibration_images"] == 40
    given = rows["ours, int8.onnx: portable fast", "ONNX Runtime"]
    assert given["seconds"] is None  # not made here


def test_the_options_of_make_arrive(inputs: Inputs, judged: dict[str, Any], tmp_path: Path) -> None:
    """The file with 8-bit weights is the very one that the same options make here."""
    options = QuantizationOptions(target="x86-vnni")
    quantize(
        inputs.folder / "float.onnx",
        calibration=inputs.folder / "calibration",
        out=tmp_path / "q.onnx",
        options=options,
    )
    assert list(judged["files"]["ours, --target x86-vnni"].values()) == [sha256_hex((tmp_path / "q.onnx").read_bytes())]


@pytest.mark.skipif(not HAS_NNCF, reason='nncf is not installed: pip install -e ".[bench]"')
def test_nncf_is_measured_where_it_is_installed(judged: dict[str, Any]) -> None:
    names = {(row["file"], row["setting"]) for row in judged["rows"]}
    for name in ("NNCF TRANSFORMER", "NNCF without model type"):
        assert {(name, "OpenVINO, batch fixed"), (name, "OpenVINO, batch free")} <= names
        assert len(judged["files"][name]) == 2
    assert judged["notes"] == []


@pytest.mark.skipif(HAS_NNCF, reason="nncf is installed")
def test_what_could_not_be_measured_is_said_with_the_way_out(inputs: Inputs, judged: dict[str, Any]) -> None:
    assert [note.partition(" of ")[0] for note in judged["notes"]] == [
        "Not measured: NNCF TRANSFORMER",
        "Not measured: NNCF without model type",
    ]
    assert all('pip install -e ".[bench]"' in note for note in judged["notes"])


@pytest.mark.parametrize(
    ("script", "line", "sentence"),
    [
        ("int8_speed.py", "int8.onnx int8.onnx", "its precision is int8"),
        ("int8_speed.py", "float.onnx float.onnx", "it is float32"),
        ("int8_speed.py", "plain.onnx int8.onnx", "not from plain.onnx"),
        ("int8_speed.py", "float.onnx gone.onnx", "gone.onnx"),
        ("int8_speed.py", "float.onnx int8.onnx int8.onnx", "one name: int8.onnx, int8.onnx"),
        ("peers.py", "float.onnx --calibration calibration --data gone", "gone"),
        ("peers.py", "float.onnx --calibration evaluation --data evaluation", "used for calibration"),
        ("peers.py", "float.onnx --calibration calibration --data evaluation --make=--nonsense", "--nonsense"),
    ],
)
def test_bad_input_is_one_error_and_the_results_stay(inputs: Inputs, script: str, line: str, sentence: str) -> None:
    done = inputs.run(script, *line.split())
    assert done.returncode == 1
    assert [line[:5] for line in done.stderr.splitlines()[-2:]] == ["error", "try: "]
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert (inputs.folder / "results.md").read_bytes() == (ROOT / "docs" / "results.md").read_bytes()


def test_every_candidate_is_asked_as_often_and_each_comes_first_in_some_round() -> None:
    asked: list[str] = []
    samples = take_turns([lambda _, name=name: asked.append(name) for name in "abc"], rounds=6, queries=4)
    assert samples.shape == (3, 6, 4)
    assert len({asked.count(name) for name in "abc"}) == 1
    blocks = asked[-6 * 3 * (4 + 3) :: 4 + 3]
    assert {blocks[3 * number] for number in range(6)} == set("abc")
    assert all(sorted(blocks[3 * number : 3 * number + 3]) == list("abc") for number in range(6))


def test_a_ratio_is_that_of_its_rounds_and_drift_cancels() -> None:
    drift = np.linspace(1, 2, 20)[:, None]
    candidate = 5 * drift + np.random.default_rng(0).uniform(0, 0.01, (20, 10))
    found = ratio(2 * candidate, candidate)
    assert found.by_round == found.interval[0] == found.interval[1] == 2
    assert found.by_median == found.by_min == 2


def test_a_process_that_loads_the_machine_is_noticed() -> None:
    burning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch, total = Watch(), 0
        for number in range(10_000_000):
            total += number
        found = watch.stop()
    finally:
        burning.kill()
        burning.wait()
    assert not found.is_quiet
    assert "not quiet" in str(found)


def test_a_thread_with_a_core_for_itself_is_quiet_and_one_that_waits_is_not() -> None:
    times = {"wall_s": 10.0, "load_average": (1.0, 1.0), "other_cores": 0.01}
    assert Load(**times, own_cpu_s=9.95).is_quiet  # type: ignore[arg-type]
    assert not Load(**times, own_cpu_s=9.0).is_quiet  # type: ignore[arg-type]
    assert not Load(**{**times, "other_cores": 0.5}, own_cpu_s=9.95).is_quiet  # type: ignore[arg-type]


def test_our_harness_stands_beside_loadgen_a_bare_loop_and_benchmark_app(inputs: Inputs) -> None:
    pytest.importorskip("mlperf_loadgen", reason="LoadGen is not installed: pip install mlcommons-loadgen")
    result = inputs.measured("runtime/harness.py", "int8.onnx", "--app-seconds", "1", "--app-rounds", "1")
    beside = {(row["engine"], row["beside"]) for row in result["rows"]}
    both = {(engine, name) for engine in ("onnxruntime", "openvino") for name in ("LoadGen, p50", "bare loop, p50")}
    assert both | {("openvino", "benchmark_app, p50")} <= beside
    for row in result["rows"]:
        assert min(row["ours_ms"], row["theirs_ms"]) > 0
        assert row["apart_percent"] == pytest.approx(100 * (row["ours_ms"] / row["theirs_ms"] - 1))
    assert result["null"]["queries"] >= 10_000
