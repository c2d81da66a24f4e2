"""Ray Serve runs the application of a repository, and a killed replica is replaced."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.repository.builder import write_repository
from vit_edge.runtime.repository.client_main import main
from vit_edge.runtime.serving.open_inference import encode_request

PATIENCE_S = 300
SERVE = shutil.which("serve", path=str(Path(sys.executable).parent))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or SERVE is None, reason="ray is not installed: pip install 'ray[serve]'"
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def replicas(folder: Path) -> list[int]:
    """Return the processes of replicas that were started in `folder`."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_replica(path, folder)]


def is_replica(process: Path, folder: Path) -> bool:
    try:
        is_one = (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica")
        return is_one and (process / "cwd").samefile(folder)
    except OSError:  # it ended meanwhile
        return False


def ask(url: str, body: bytes | None = None) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, ValueError):
        return 0, None


def wait_until_ready(url: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while ask(f"{url}/v2/health/ready")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.fixture
def served(small_model: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Return the address of a repository that `serve run` serves, and its folder."""
    made = write_repository(small_model / "m.onnx", server="ray-serve", out=tmp_path / "r", instances=1)
    port, config = free_port(), made.path / "serve_config.yaml"
    config.write_text(f"{config.read_text()}http_options:\n  host: 127.0.0.1\n  port: {port}\n")
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [str(SERVE), "run", config.name], cwd=made.path, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url)
            yield url, made.path
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE_S)


def test_the_application_responds_and_a_killed_replica_is_replaced(served: tuple[str, Path]) -> None:
    url, folder = served
    image = golden_images([1], height=48, width=40)[0]
    assert main([url, "--check"], folder=folder / "client") == 0
    assert ask(f"{url}/v2/models/small")[1]["outputs"][0]["shape"] == [-1, 7]
    assert ask(f"{url}/classify", b"no image")[0] == 400
    assert ask(f"{url}/v2/models/other")[0] == 404
    assert ask(f"{url}/v2/models/small/infer", encode_request(image, name="x", datatype="UINT8")[0])[0] == 400
    (before,) = replicas(folder)
    os.kill(before, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    while replicas(folder) in ([], [before]) or main([url, "--check"], folder=folder / "client") != 0:
        assert time.monotonic() < end
        time.sleep(0.5)
