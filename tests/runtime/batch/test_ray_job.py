"""A job on Ray gives the rows of one process, survives what is killed, and a stopped job goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.batch.test_shard_work import check_inputs, check_labels, images, rows_of
from vit_edge.export.verification.encoder_verifier import verify_encoder
from vit_edge.files import sha256_hex
from vit_edge.runtime import load_encoder
from vit_edge.runtime.batch.shard_files import shard_path

__all__ = ["images"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None,
    reason="ray is not installed: pip install 'ray[data]'",
)
PATIENCE_S = 900
# A machine that does other work starts the processes of Ray slowly.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "240", "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a cluster with two CPUs, and return the environment in which commands reach it."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text(sha256_hex(os.urandom(16)))
    environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    script = Path(__file__).with_name("cluster_process.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().strip() if process.stdout else ""
        assert address, "the cluster did not start"
        yield {**environment, "TEST_RAY_ADDRESS": address}
    finally:
        process.communicate("", timeout=PATIENCE_S)


def run(environment: dict[str, str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """Run a command on the cluster and return what it printed as JSON."""
    command = [sys.executable, "-m", "vit_edge", *map(str, arguments), "--json"]
    command += ["--ray", environment["TEST_RAY_ADDRESS"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_job_gives_the_rows_of_one_process_and_resumes(
    cluster: dict[str, str], images: Path, small_model: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", small_model / "m.onnx"
    job = ("classify", model, images, "--out", out, "--shard-size", 4)
    printed = run(cluster, *job)
    assert (printed["images"], printed["errors"], printed["shards"], printed["kept_shards"]) == (9, 3, 3, 0)
    assert sum(node["images"] for node in printed["nodes"]) == 9
    assert all(node["instruction_set"] and node["cpu"] for node in printed["nodes"])
    check_inputs(rows_of(out), images)
    check_labels(rows_of(out), model)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    shard_path(out, 1).unlink()
    printed = run(cluster, *job, "--resume")
    assert (printed["images"], printed["errors"], printed["kept_shards"]) == (9, 3, 2)
    check_inputs(rows_of(out), images)
    changed = {path.name for path in out.glob("part-*") if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"part-000001.parquet"}


def actors() -> list[int]:
    """Return the processes in which actors of a job run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if path.read_bytes().startswith(b"ray::MapWorker(Map(_Actor") else []
    return found


def test_the_shard_of_a_killed_actor_is_computed_again(
    cluster: dict[str, str], images: Path, small_model: Path, tmp_path: Path
) -> None:
    many, out = tmp_path / "many", tmp_path / "out"
    for number in range(50):
        shutil.copytree(images, many / str(number))
    killed: list[int] = []

    def kill() -> None:
        while not list(out.glob("part-*")):
            time.sleep(0.01)
        killed.extend(actors()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    printed = run(cluster, "classify", small_model / "m.onnx", many, "--out", out, "--shard-size", 2)
    killing.join(PATIENCE_S)
    assert (len(killed), printed["images"], printed["errors"]) == (1, 450, 150)
    assert sorted(row["path"] for row in rows_of(out)) == sorted(str(path) for path in many.rglob("*.*"))


def test_embeddings_are_those_of_one_process(cluster: dict[str, str], small_encoder: Path, tmp_path: Path) -> None:
    model, images = small_encoder / "e.onnx", small_encoder / "images" / "odd"
    printed = run(cluster, "embed", images, "--model", model, "--out", tmp_path / "out", "--shard-size", 25)
    assert (printed["images"], printed["errors"], printed["shards"]) == (60, 0, 3)
    with load_encoder(model, threads=1) as encoder:
        for row in rows_of(tmp_path / "out"):
            assert np.array_equal(np.float32(row["embedding"]), encoder.embed(row["path"]))


def test_a_verification_decides_here_with_what_the_cluster_computed(
    cluster: dict[str, str], small_encoder: Path, tmp_path: Path
) -> None:
    model, reference = small_encoder / "e.int8.onnx", small_encoder / "e.onnx"
    command = ("verify", model, "--reference", reference, "--data", small_encoder / "images")
    options = ("--min-neighbours", 50, "--engine", "onnxruntime", "--threads", 1)
    alone = verify_encoder(
        model, reference=reference, data=small_encoder / "images", min_neighbours=50, engines=["onnxruntime"], threads=1
    )
    code = 0 if alone.verdict == "pass" else 6
    printed = run(cluster, *command, *options, "--out", tmp_path / "out", "--shard-size", 50, code=code)
    assert (printed["verdict"], printed["data_sha256"]) == (alone.verdict, alone.data_sha256)
    assert (printed["job"]["images"], printed["job"]["shards"]) == (120, 3)


def test_an_error_in_the_actors_is_the_error_of_the_command(
    cluster: dict[str, str], images: Path, small_model: Path, tmp_path: Path
) -> None:
    job = ("classify", small_model / "m.onnx", images, "--out", tmp_path / "out", "--device", "qnn")
    assert "qnn" in run(cluster, *job, code=7)["error"]["reason"]
