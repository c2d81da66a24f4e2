"""The benchmark measures every mix in turn, counts what it promises, and says where its figures do not count."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace, vit_edge
from tests.support.networks import write_checkpoint
from vit_edge.errors import UsageError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.graph.macs import macs_per_image
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import BenchmarkOptions, Measurement, installed_engines, load, measure
from vit_edge.runtime.benchmark.energy import open_meter
from vit_edge.runtime.benchmark.server_scenario import arrivals
from vit_edge.runtime.benchmark.statistics import change, latency, quantiles_ms

BRIEF = ("--min-seconds", "0.05", "--min-queries", "24", "--threads", "1", "--no-peak")


def brief(**options: Any) -> BenchmarkOptions:
    return BenchmarkOptions(**{"min_seconds": 0.1, "min_queries": 24, "threads": (1,), "has_peak": False, **options})


@pytest.fixture
def burning() -> Iterator[None]:
    """Keep both of two cores busy meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_every_mix_is_measured_and_counts_at_least_what_was_asked(workspace: Workspace) -> None:
    models = [workspace.float_model, workspace.int8_model]
    run = measure(models, brief(batch_sizes=(1, 4), min_queries=40))
    mixes = [(Path(r.model).name, r.engine, r.batch_size) for r in run.results]
    assert mixes == [(path.name, engine, size) for path in models for engine in installed_engines() for size in (1, 4)]
    for result in run.results:
        assert result.num_queries >= 40
        assert result.seconds >= 0.1
        assert (result.scenario == "single-stream") == (result.batch_size == 1)
        observed = result.latency_ms
        assert 0 < observed.min <= observed.p50 <= observed.p90 <= observed.p99
        assert {observed.min, observed.p50, observed.p90, observed.p99} <= set(result.quantiles_ms)
        assert len(result.by_round_ms) == 12
        assert result.warm_up.num_queries > 0
        assert 0 < result.load_ms < result.cold_start_ms
        assert result.peak_rss_bytes > 20e6
    assert run.results[0].ratio is None
    assert repr(run.results[0]) in repr(run)
    assert "p50 ms" in run._repr_html_()
    assert all(r.ratio and r.ratio.interval[0] <= r.ratio.by_round <= r.ratio.interval[1] for r in run.results[1:])
    assert 0 < run.harness.p50_us < run.results[0].latency_ms.p50 * 1000


def test_percentiles_are_samples_that_occurred() -> None:
    samples = list(np.random.default_rng(0).integers(1, 10**9, 997))
    found = latency(samples)
    assert {round(ms * 1e6) for ms in (found.min, found.p50, found.p90, found.p99)} <= set(samples)
    ordered = sorted(samples)
    assert round(found.p90 * 1e6) == ordered[math.ceil(0.9 * 997) - 1]
    assert round(quantiles_ms(samples)[100] * 1e6) == ordered[-1]


def test_a_change_is_between_what_the_rounds_leave_open() -> None:
    random = np.random.default_rng(0)
    old = random.normal(10, 0.1, 12)
    found, (low, high) = change(list(old), list(old * 1.2))
    assert found == pytest.approx(1.2)
    assert 1.15 < low <= found <= high < 1.25
    assert change([1.0], [1.0]) == (1, (1, 1))


def test_a_machine_that_others_load_makes_a_run_invalid(workspace: Workspace, burning: None) -> None:
    done = vit_edge("benchmark", workspace.int8_model, "--engine", "onnxruntime", "--min-seconds", "1.5", *BRIEF[2:])
    assert done.returncode == 0, done.stderr
    assert "INVALID: " in done.stdout
    assert "other processes took" in done.stdout
    given = ("--engine", "onnxruntime", "--min-seconds", "1.5", "--fail-if-noisy", "--json", *BRIEF[2:])
    strict = vit_edge("benchmark", workspace.int8_model, *given)
    printed = json.loads(strict.stdout)
    assert strict.returncode == 6
    assert printed["valid"] is False
    assert printed["noise"]["other_cores"] > 0.25
    assert len(printed["results"]) == 1


@pytest.mark.parametrize("engine", installed_engines())
def test_offline_fills_the_machine_with_batches(workspace: Workspace, engine: str) -> None:
    run = measure([workspace.int8_model], brief(engines=(engine,), scenario="offline", batch_sizes=(4,)))
    result = run.results[0]
    assert (result.scenario, result.batch_size, result.threads) == ("offline", 4, 1)
    assert result.throughput_per_s == pytest.approx(4 * result.num_queries / result.seconds)


@pytest.mark.parametrize("engine", installed_engines())
def test_a_server_is_given_the_highest_rate_that_held_its_bound(workspace: Workspace, engine: str) -> None:
    options = brief(engines=(engine,), scenario="server", latency_bound_ms=2_000.0)
    result = measure([workspace.int8_model], options).results[0]
    held = [trial for trial in result.trials if trial.holds]
    assert result.throughput_per_s == max(trial.rate_per_s for trial in held)
    assert all(trial.num_queries >= 24 and trial.p99_ms <= 2_000 for trial in held)
    assert result.latency_ms.p99 in [trial.p99_ms for trial in held]


def test_a_bound_that_no_rate_holds_is_said(workspace: Workspace) -> None:
    given = ("--engine", "onnxruntime", "--scenario", "server", "--latency-bound", "0.0001")
    done = vit_edge("benchmark", workspace.int8_model, *given, *BRIEF)
    assert done.returncode == 0, done.stderr
    assert "no rate stays within 0.0001 ms" in done.stdout


def test_arrivals_are_a_poisson_process_of_the_rate_and_the_same_again() -> None:
    due_s = arrivals(100.0, seconds=50.0, queries=10, seed=0)
    gaps = np.diff(due_s)
    assert due_s[-1] >= 50
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(0.01, rel=0.08)
    assert np.array_equal(due_s, arrivals(100.0, seconds=50.0, queries=10, seed=0))
    assert len(arrivals(1.0, seconds=0.1, queries=200, seed=1)) == 200


def test_what_is_saved_can_be_compared_and_a_slower_one_fails(workspace: Workspace, tmp_path: Path) -> None:
    given = ("benchmark", workspace.int8_model, "--engine", "onnxruntime", *BRIEF)
    files = ("--save", "run.json", "--csv", "run.csv", "--plot", "run.png")
    done = vit_edge(*given, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run.json").read_text())
    assert (saved["schema"], saved["command"]) == (1, "benchmark")
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["latency_p50_ms"]) for row in rows] == [r["latency_ms"]["p50"] for r in saved["results"]]
    with Image.open(tmp_path / "run.png") as image:
        assert image.width > 800
    for factor, code in ((0.01, 6), (100.0, 0)):
        result = saved["results"][0]
        old = {**saved, "results": [{**result, "by_round_ms": [ms * factor for ms in result["by_round_ms"]]}]}
        (tmp_path / "old.json").write_text(json.dumps(old))
        done = vit_edge(
            *given, "--compare", "old.json", "--fail-if-slower", "5%", "--allow-invalid", "--json", cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        printed = json.loads(done.stdout)
        assert printed["results"]
        assert (printed["comparison"][0]["change_percent"] > 5) == (code == 6)
    noisy = {**saved, "valid": False, "invalid_because": ["other processes took 1.50 of a core"]}
    (tmp_path / "old.json").write_text(json.dumps(noisy))
    done = vit_edge(*given, "--compare", "old.json", cwd=tmp_path)
    assert (done.returncode, "took 1.50 of a core" in done.stderr) == (0, True)
    judged = (*given, "--compare", "old.json", "--fail-if-slower", "900%")
    refused = vit_edge(*judged, cwd=tmp_path)
    assert (refused.returncode, "INVALID" in refused.stderr) == (6, True)
    assert "--allow-invalid" in refused.stderr
    assert vit_edge(*judged, "--allow-invalid", cwd=tmp_path).returncode == 0
    (tmp_path / "old.json").write_text(json.dumps({**saved, "results": [{**result, "threads": 7}]}))
    done = vit_edge(*given, "--compare", "old.json", cwd=tmp_path)
    assert (done.returncode, "no result with the same" in done.stderr) == (3, True)
    done = vit_edge(*given, "--save", "run.json", cwd=tmp_path)
    assert (done.returncode, "--force" in done.stderr) == (2, True)


def test_what_is_given_twice_is_measured_once_and_said(workspace: Workspace, tmp_path: Path) -> None:
    given = ("--engine", "onnxruntime", "--batch-size", "1", "--batch-size", "1", "--plot", "run.png", "--json", *BRIEF)
    printed = json.loads(vit_edge("benchmark", *[workspace.int8_model] * 2, *given, cwd=tmp_path).stdout)
    assert len(printed["results"]) == 1
    assert any("more than once" in warning for warning in printed["warnings"])
    assert any("no file holds an evaluation" in warning for warning in printed["warnings"])  # two panels, not three


def test_from_file_to_labels_every_stage_has_its_time(workspace: Workspace, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(workspace.test_images.rglob("*.png"))[:6]):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing more")
    run = measure([workspace.int8_model], brief(images=tmp_path))
    for result in run.results:
        stages = result.end_to_end
        assert stages is not None
        assert (stages.num_images, stages.num_rejected) == (6, 1)
        assert min(stages.decode_ms, stages.resize_ms, stages.inference_ms, stages.answer_ms) > 0
        assert stages.total_ms.p99 >= stages.inference_ms


def test_multiplications_are_those_of_the_graph_and_stand_beside_the_measured_peak(workspace: Workspace) -> None:
    import onnx

    for path in (workspace.float_model, workspace.int8_model):
        macs = open_model(path).manifest.macs
        assert macs is not None
        assert sum(macs.values()) == macs_per_image(onnx.load(path))
        assert (macs.get("int8", 0) > macs["float32"]) == (path == workspace.int8_model)
    run = measure([workspace.int8_model], brief(has_peak=True))
    assert [(peak.engine, peak.threads) for peak in run.peaks] == [(engine, 1) for engine in installed_engines()]
    for peak, result in zip(run.peaks, run.results, strict=True):
        assert peak.integer_gmac_per_s
        assert peak.float_gmac_per_s
        assert result.share_of_peak is not None
        assert result.share_of_peak > 0


def test_a_file_with_an_evaluation_is_drawn_by_accuracy_and_so_is_the_float_file_it_was_made_from(
    workspace: Workspace, tmp_path: Path
) -> None:
    model = open_model(workspace.int8_model)
    results = [{"engine": "onnxruntime", "candidate_top1": 98.25, "reference_top1": 98.5}]
    (tmp_path / "int8.onnx").write_bytes(
        model.with_manifest(replace(model.manifest, evaluation={"data_sha256": "0", "results": results}))
    )
    given = ("--engine", "onnxruntime", "--plot", "run.png", "--json", *BRIEF)
    done = vit_edge("benchmark", workspace.float_model, "int8.onnx", workspace.int8_model, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [result["top1"] for result in json.loads(done.stdout)["results"]] == [98.5, 98.25, None]
    with Image.open(tmp_path / "run.png") as image:
        assert image.width > 1_500  # a third panel


def test_files_that_could_not_be_written_are_refused_before_anything_is_measured(
    workspace: Workspace, tmp_path: Path
) -> None:
    for files, sentence in (
        (("--save", "a", "--csv", "a"), "the same file"),
        (("--save", "no/such/folder"), "does not exist"),
    ):
        done = vit_edge("benchmark", workspace.int8_model, *files, "--min-seconds", "3600", cwd=tmp_path)
        assert done.returncode == 2
        assert sentence in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_energy_is_read_where_there_is_a_meter_and_not_available_elsewhere(tmp_path: Path) -> None:
    assert open_meter(tmp_path) == (None, "not available: this machine has no meter that is known")
    package = tmp_path / "class" / "powercap" / "intel-rapl:0"
    (package / "intel-rapl:0:0").mkdir(parents=True)
    (package / "max_energy_range_uj").write_text("262143328850\n")
    (package / "energy_uj").write_text("262143000000\n")
    meter, name = open_meter(tmp_path)
    assert meter is not None
    assert name == "RAPL, CPU packages"
    (package / "energy_uj").write_text("2000000\n")
    assert meter.joules() == pytest.approx(2.32885)  # the counter began anew
    (package / "energy_uj").write_text("3000000\n")
    assert meter.joules() == pytest.approx(3.32885)
    (package / "energy_uj").write_text("not a number\n")
    assert open_meter(tmp_path)[0] is None


def test_the_power_of_a_board_is_added_up(tmp_path: Path) -> None:
    folder = tmp_path / "bus" / "i2c" / "drivers" / "ina3221" / "1-0040" / "hwmon" / "hwmon4"
    folder.mkdir(parents=True)
    for name, text in (("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "2000")):
        (folder / name).write_text(f"{text}\n")
    meter, name = open_meter(tmp_path)
    assert meter is not None
    assert name == "INA3221, VDD_IN"
    before = meter.joules()
    while meter.joules() < before + 0.5:  # ten watts
        pass
    meter.close()


def test_what_an_engine_cannot_do_is_left_out_and_said(workspace: Workspace) -> None:
    given = ("--float-precision", "float32", "--float-precision", "float16", "--json", *BRIEF)
    done = vit_edge("benchmark", workspace.float_model, "--engine", "onnxruntime", *given)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [result["float_precision"] for result in printed["results"]] == ["float32"]
    assert any("left out" in warning for warning in printed["warnings"])


def test_openvinos_own_format_and_a_fixed_batch_are_measured_too(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c.safetensors")
    export_onnx(checkpoint, out=tmp_path / "m.xml", options=ExportOptions(format="openvino"))
    export_onnx(checkpoint, out=tmp_path / "four.onnx", options=ExportOptions(batch_size=4))
    done = vit_edge("benchmark", "m.xml", "four.onnx", "--json", *BRIEF, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    names = [(result["model"], result["engine"]) for result in printed["results"]]
    assert names == [("m.xml", "openvino"), *(("four.onnx", engine) for engine in installed_engines())]
    assert printed["results"][0]["size_bytes"] > (tmp_path / "m.bin").stat().st_size
    assert any("its batch is fixed at 4" in warning for warning in printed["warnings"])


def test_a_file_made_elsewhere_is_measured_with_what_is_told_of_it(small_model: Path, tmp_path: Path) -> None:
    import onnx

    shutil.copy(small_model / "m.onnx", tmp_path / "ours.onnx")
    manifest = open_model(tmp_path / "ours.onnx").manifest
    theirs = onnx.load(tmp_path / "ours.onnx")
    del theirs.metadata_props[:]
    theirs.producer_name = "somebody"
    onnx.save(theirs, tmp_path / "theirs.onnx")
    (tmp_path / "labels.txt").write_text("\n".join(manifest.labels))
    (tmp_path / "preprocessing.json").write_text(json.dumps(manifest.preprocessing.to_dict()))
    told = ("--labels", "labels.txt", "--preprocessing", "preprocessing.json", "--engine", "onnxruntime", *BRIEF)
    done = vit_edge("benchmark", "theirs.onnx", "ours.onnx", *told, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [result["model"] for result in json.loads(done.stdout)["results"]] == ["theirs.onnx", "ours.onnx"]
    done = vit_edge("benchmark", "ours.onnx", *told, cwd=tmp_path)
    assert (done.returncode, "are for third-party ONNX models" in done.stderr) == (2, True)


def test_the_null_engine_is_measured_as_any_other(workspace: Workspace) -> None:
    null, real = measure([workspace.float_model], brief(engines=("null", "onnxruntime"), has_peak=True)).results
    assert (null.engine, null.share_of_peak) == ("null", None)
    assert null.latency_ms.min < real.latency_ms.min


def test_options_that_cannot_be_measured_are_refused() -> None:
    for options in (
        {"batch_sizes": (0,)},
        {"threads": ()},
        {"scenario": "server"},
        {"min_queries": 0},
    ):
        with pytest.raises(UsageError, match="cannot measure"):
            BenchmarkOptions(**options)  # type: ignore[arg-type]


def test_measuring_leaves_a_loaded_model_as_it_was(workspace: Workspace) -> None:
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with load(workspace.int8_model, engine="onnxruntime", threads=1) as classifier:
        before = classifier.logits(images)
        found: tuple[Measurement, ...] = measure([workspace.int8_model], brief()).results
        assert len(found) == len(installed_engines())
        assert np.array_equal(before, classifier.logits(images))
