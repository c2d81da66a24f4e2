"""Every bad input gets one clear sentence, its exit code, no traceback, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Workspace, readme_commands, vit_edge
from vit_edge.cli import cli, main

COMMANDS = (
    "deploy",
    "train",
    "convert",
    "export",
    "quantize",
    "verify",
    "explain",
    "classify",
    "embed",
    "benchmark",
    "tune",
    "bundle",
    "repository",
    "report",
    "inspect",
    "doctor",
    "seal",
    "sign",
    "verify-signature",
    "help",
    "completion",
)
# These print text only.
TEXT_ONLY = {"help", "completion"}
# The README shows these outside of its console block.
ELSEWHERE = {"convert", "explain", "bundle", "tune", "deploy", "report", "doctor", "seal", "sign", "verify-signature"}
ELSEWHERE |= {"embed", "repository", *TEXT_ONLY}


@pytest.fixture
def bench(workspace: Workspace, tmp_path: Path) -> Path:
    """Return a folder with a model, an image, and the bad inputs that people give."""
    shutil.copy(workspace.float_model, tmp_path / "model.onnx")
    shutil.copy(workspace.int8_model, tmp_path / "int8.onnx")
    shutil.copy(workspace.folder / "image.png", tmp_path / "image.png")
    shutil.copytree(workspace.test_images / "3", tmp_path / "images" / "3")
    shutil.copy(workspace.checkpoint, tmp_path / "checkpoint.safetensors")
    (tmp_path / "notanimage.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.onnx").write_bytes(b"")
    (tmp_path / "page.onnx").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x02c__builtin__\nopen\nq\x00.")
    damaged = bytearray(workspace.float_model.read_bytes())
    damaged[len(damaged) // 3] ^= 16
    (tmp_path / "damaged.onnx").write_bytes(damaged)
    return tmp_path


# command line, exit code, what the sentence must say
FAULTS = [
    ("export missing.safetensors -o new.onnx", 3, "missing.safetensors: there is no such file"),
    ("export pickle.pt -o new.onnx", 3, "pickle.pt: the file needs unpickling of `open`"),
    ("export image.png -o new.onnx", 3, "the file is a PNG image"),
    ("export empty -o new.onnx", 3, "empty: the folder holds no file of weights"),
    ("export checkpoint.safetensors -o no/such/folder.onnx", 2, "does not exist"),
    ("export checkpoint.safetensors", 2, "model.onnx: the file exists"),
    ("classify model.onnx notanimage.txt", 3, "notanimage.txt: the file is not an image"),
    ("classify model.onnx gone.png", 3, "gone.png: there is no such file"),
    ("classify missing.onnx image.png", 3, "missing.onnx: there is no such file"),
    ("classify zero.onnx image.png", 3, "zero.onnx: the file is empty"),
    ("classify page.onnx image.png", 3, "page.onnx: the file is an HTML page"),
    ("classify image.png image.png", 3, "the file is a PNG image"),
    ("classify damaged.onnx image.png", 4, "damaged.onnx: the file's bytes are not those that were sealed"),
    ("classify model.onnx image.png --engine tensorrt9", 2, "'onnxruntime', 'openvino'"),
    ("classify model.onnx image.png --device cuda", 7, "'cuda'"),
    ("classify model.onnx", 2, "Missing argument"),
    ("quantize model.onnx --calibration empty", 3, "empty: the folder holds no image"),
    ("quantize model.onnx --calibration gone", 3, "gone: there is no such folder"),
    ("quantize model.onnx --calibration model.onnx", 3, "this is not a folder"),
    ("quantize damaged.onnx --calibration empty", 4, "damaged.onnx"),
    ("quantize int8.onnx --calibration empty", 2, "float32"),
    ("quantize model.onnx --calibration empty --target abacus", 2, "abacus"),
    ("verify int8.onnx --reference model.onnx --data empty", 3, "the folder holds no image"),
    ("verify int8.onnx --reference gone.onnx --data empty", 3, "gone.onnx: there is no such file"),
    ("bundle gone.onnx", 3, "gone.onnx: there is no such file"),
    ("bundle damaged.onnx", 4, "damaged.onnx: the file's bytes are not those that were sealed"),
    ("bundle model.onnx --out image.png", 2, "image.png: the file exists"),
    ("bundle model.onnx --out model.onnx --force", 2, "the path is the input"),
    ("repository gone.onnx --for triton --out new", 3, "gone.onnx: there is no such file"),
    ("repository model.onnx --for triton --out images", 2, "images: the folder is not empty"),
    ("repository model.onnx --for triton --out image.png", 2, "image.png: the path is a file"),
    ("repository model.onnx --for triton --out new --storage-uri x", 2, "triton has no storage URI"),
    ("benchmark gone.onnx", 3, "gone.onnx"),
    ("benchmark model.onnx --batch-size 0", 2, "batch-size"),
    ("inspect damaged.onnx", 4, "damaged.onnx"),
    ("export checkpoint.safetensors -o checkpoint.safetensors --force", 2, "the path is the input"),
    ("quantize model.onnx --calibration images -o model.onnx --force", 2, "the path is the input"),
    ("verify model.onnx --reference int8.onnx --data images", 2, "a reference is float32"),
    ("verify int8.onnx --reference model.onnx --data images --max-drop nan", 2, "max drop is nan"),
    ("verify int8.onnx --reference model.onnx --data images --engine null", 7, "computes nothing"),
    ("classify model.onnx image.png --engine null", 2, "is not one of"),
    ("classify model.onnx image.png --threads 100000", 2, "threads"),
    ("benchmark model.onnx --min-seconds inf", 2, "inf seconds"),
    ("benchmark model.onnx --batch-size 2 --scenario single-stream", 2, "one image a query"),
    ("benchmark model.onnx --scenario server", 2, "--latency-bound"),
    ("benchmark model.onnx --latency-bound 5", 2, "--scenario server"),
    ("benchmark model.onnx --scenario server --latency-bound nan", 2, "latency bound is nan"),
    ("benchmark model.onnx --fail-if-slower 5%", 2, "--compare"),
    ("benchmark model.onnx --compare gone.json --fail-if-slower much", 2, "percentage"),
    ("benchmark model.onnx --compare gone.json", 3, "gone.json"),
    ("benchmark model.onnx --compare notanimage.txt", 3, "the file holds no results"),
    ("benchmark model.onnx --save model.onnx", 2, "the file exists"),
    ("benchmark model.onnx --device abacus", 7, "abacus"),
    ("benchmark model.onnx --images empty --min-seconds 0.01 --min-queries 1", 3, "the folder holds no image"),
    ("seal notanimage.txt", 3, "the file is not an ONNX model"),
    ("train empty --out run", 3, "the folder holds no image"),
    ("train gone --out run", 3, "there is no such folder"),
    ("train empty --out run --epochs 0", 2, "epochs"),
    ("inspect model.onnx --config notanimage.txt", 2, "notanimage.txt"),
    ("frobnicate", 2, "No such command"),
]


@pytest.mark.parametrize(("line", "code", "sentence"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_bad_input_gets_one_sentence_and_its_exit_code(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str, code: int, sentence: str
) -> None:
    monkeypatch.chdir(bench)
    before = {path: path.read_bytes() for path in bench.rglob("*") if path.is_file()}
    assert main(line.split()) == code
    printed = capfd.readouterr()
    assert sentence in printed.err
    assert "Traceback" not in printed.err
    assert sum(text.startswith("error: ") for text in printed.err.splitlines()) <= 1
    assert {path: path.read_bytes() for path in bench.rglob("*") if path.is_file()} == before


def test_json_says_errors_too(bench: Path) -> None:
    done = vit_edge("classify", "missing.onnx", "image.png", "--json", cwd=bench)
    assert done.returncode == 3
    printed = json.loads(done.stdout)
    assert (printed["schema"], printed["command"]) == (1, "classify")
    assert printed["error"]["type"] == "ModelRejected"
    assert printed["error"]["file"] == "missing.onnx"
    assert printed["error"]["exit_code"] == 3


def test_one_bad_image_does_not_lose_the_others(bench: Path) -> None:
    done = vit_edge("classify", "model.onnx", "image.png", "notanimage.txt", "--json", cwd=bench)
    assert done.returncode == 3
    printed = json.loads(done.stdout)
    assert [image["label"] for image in printed["images"]] == ["3"]
    assert [image["file"] for image in printed["rejected"]] == ["notanimage.txt"]


def test_a_result_is_on_stdout_and_stderr_has_progress_alone(bench: Path) -> None:
    done = vit_edge("classify", "int8.onnx", "image.png", cwd=bench)
    assert done.returncode == 0
    assert "3 " in done.stdout
    assert {line.split()[0] for line in done.stderr.splitlines()} <= {"starting", "loading", "classifying", "working"}
    assert vit_edge("classify", "int8.onnx", "image.png", "-q", cwd=bench).stderr == ""


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - TEXT_ONLY))
def test_every_command_has_help_with_an_example_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "-h"]) == 0
    printed = capsys.readouterr().out
    assert "--json" in printed
    assert f"vit-edge {name} " in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_help_lists_the_commands_in_order_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    printed = capsys.readouterr().out
    positions = [printed.index(f"\n  {name} ") for name in COMMANDS]
    assert positions == sorted(positions)
    assert "Exit codes" in printed
    assert set(cli.commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_two_options_of_a_command_give_the_same_value(name: str) -> None:
    parameters = cli.commands[name].params
    names = [parameter.name for parameter in parameters]
    options = [option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)]
    assert sorted(set(names), key=str) == sorted(names, key=str)
    assert sorted(set(options)) == sorted(options)


def test_a_configuration_file_gives_options_and_unknown_ones_are_refused(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench)
    Path("config.toml").write_text("[classify]\ntop = 1\nengine = 'openvino'\n")
    assert main(["classify", "model.onnx", "image.png", "--config", "config.toml", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"]["engine"] == "openvino"
    assert len(printed["images"][0]["answers"]) == 1
    for text, message in (
        ("[classify]\ntopp = 1", "'topp'"),
        ("[classify]\ntop = [1]", "a list"),
        ("classify = 3", "'classify'"),
    ):
        Path("config.toml").write_text(text)
        assert main(["classify", "model.onnx", "image.png", "--config", "config.toml"]) == 2
        assert message in capsys.readouterr().err
    Path("config.toml").write_text("json = true\n[train]\nepochs = 3\n[verify]\nengine = ['openvino']\nmax-drop = 7.5")
    assert main(["inspect", "model.onnx", "--config", "config.toml"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == "inspect"


def test_a_missing_package_says_what_to_install(bench: Path) -> None:
    """The package is hidden by a finder that comes first: as good as not installed."""
    script = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'openvino'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from vit_edge.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "export", "x.safetensors"],
        cwd=bench,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert 'pip install "vit-edge[export,onnxruntime]"' in done.stderr


@pytest.mark.parametrize("json_flag", ["", "--json"])
def test_a_reader_that_goes_away_is_no_error_and_a_full_disk_is_said(bench: Path, json_flag: str) -> None:
    inspect = f"{sys.executable} -m vit_edge inspect model.onnx -q {json_flag}"
    gone = subprocess.run(
        ["bash", "-c", f"{inspect} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=bench,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (gone.returncode, gone.stderr) == (0, "")
    full = subprocess.run(
        ["bash", "-c", f"{inspect} > /dev/full"], cwd=bench, capture_output=True, text=True, check=False
    )
    assert full.returncode == 5
    assert "no space left" in full.stderr
    assert "Traceback" not in full.stderr


def test_wrong_usage_with_json_is_json_too(bench: Path) -> None:
    done = vit_edge("classify", "model.onnx", "--json", cwd=bench)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_inspect_tells_the_contract(workspace: Workspace) -> None:
    printed = workspace.printed["inspect"]
    assert printed["input"] == "images: uint8 [batch, 32, 32, 3]"
    assert printed["output"] == "logits: float32 [batch, 10]"
    assert printed["operators"]["MatMul"] > 11
    assert printed["manifest"]["precision"] == "int8"
    assert printed["size_bytes"] == workspace.int8_model.stat().st_size
    done = vit_edge("inspect", workspace.int8_model)
    for text in ("int8", "portable", "1437", "moving-average", "checkpoint sha256", "8 inputs and 2 images"):
        assert text in done.stdout


def test_benchmark_json_has_the_fields_that_others_read(workspace: Workspace) -> None:
    results = workspace.printed["benchmark"]["results"]
    assert len(results) == 4
    for entry in results:
        assert {"model", "engine", "device", "precision", "batch_size", "threads", "scenario"} <= entry.keys()
        assert {"latency_ms", "throughput_per_s", "load_ms", "peak_rss_bytes"} <= entry.keys()
        assert {"min", "p50", "p90", "p99"} == entry["latency_ms"].keys()


def test_the_readme_names_every_command(workspace: Workspace) -> None:
    assert {arguments[0] for arguments in readme_commands()} == set(COMMANDS) - ELSEWHERE
    assert set(workspace.printed) == set(COMMANDS) - ELSEWHERE


def test_nothing_is_left_beside_the_results(workspace: Workspace) -> None:
    assert sorted(os.listdir(workspace.folder)) == ["image.png", "images", "model.int8.onnx", "model.onnx", "run"]
