"""The service of examples/service under a real server: what it answers, refuses, survives, and how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace
from vit_edge.runtime import load

SERVICE = ROOT / "examples" / "service"
PATIENCE_S = 60
MAX_BYTES = 1_000_000
# What keeps a worker busy for as long as a test needs it.
LARGE = {"VIT_EDGE_MAX_PIXELS": "50000000", "VIT_EDGE_DEADLINE_MS": "60000"}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="fastapi and uvicorn are not installed: pip install fastapi uvicorn",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A service in a process of its own, on a port that the system chose."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return int(found[1]) if found else 0

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any], Message]:
        """Return the status, the JSON and the headers of one answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, json.loads(answer.read()), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), error.headers

    def wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.port:
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the service did not start: {self.log.read_text()}")
            time.sleep(0.05)

    def end(self) -> None:
        """End it as a service manager does; its log must not tell of a fault."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
        text = self.log.read_text()
        assert "Application shutdown complete" in text
        assert "Traceback" not in text


@contextmanager
def serving(model: Path, log: Path, **environment: str) -> Iterator[Service]:
    """Run the service beside the test."""
    options = ["--app-dir", str(SERVICE), "--http", "app:Impatient", "--host", "127.0.0.1", "--port", "0"]
    command = [sys.executable, "-m", "uvicorn", "app:app", *options]
    settings = {**os.environ, "VIT_EDGE_MODEL": str(model), "VIT_EDGE_WORKERS": "1", **environment}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield Service(process=process, log=log)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def service(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return one service for all tests that leave it as it was; at the end it has to end well."""
    log = tmp_path_factory.mktemp("service") / "log.txt"
    limits = {"VIT_EDGE_MAX_BYTES": str(MAX_BYTES), "VIT_EDGE_BODY_MS": "500"}
    with serving(workspace.int8_model, log, **limits) as running:
        running.wait_until_ready()
        yield running
        running.end()


def image_of(workspace: Workspace, digit: str) -> Path:
    return sorted((workspace.test_images / digit).iterdir())[0]


def test_a_image_gets_the_answer_of_the_classifier(workspace: Workspace, service: Service) -> None:
    with load(workspace.int8_model, threads=1) as classifier:
        for digit in "037":
            path = image_of(workspace, digit)
            status, answer, _ = service.ask("/classify?top=2", path.read_bytes(), **{"Content-Type": "image/png"})
            expected = classifier(path, top=2)
            assert (status, answer["label"], answer["probability"]) == (200, digit, expected.probability)
            assert answer["answers"] == expected.to_dict()["answers"]
            assert answer["timings"]["waited_ms"] >= 0


def test_health_names_what_really_runs(workspace: Workspace, service: Service) -> None:
    status, told, _ = service.ask("/healthz")
    assert status == 200
    with load(workspace.int8_model, threads=1) as classifier:
        described = classifier.describe()
    assert {key: told[key] for key in described} == described
    assert (told["status"], told["workers"], told["queue_size"], told["queued"]) == ("ok", 1, 2, 0)
    assert len(told["sha256"]) == 64


@pytest.mark.parametrize(
    ("body", "path", "headers", "status", "told"),
    [
        (b"no image at all", "/classify", {}, 422, "the file is not an image that can be read"),
        (b"", "/classify", {}, 422, "the bytes given"),
        (bytes(MAX_BYTES + 1), "/classify", {}, 413, "more than 1,000,000 bytes"),
        (bytes(30 * MAX_BYTES), "/classify", {}, 413, "more than 1,000,000 bytes"),
        (b"--x--", "/classify", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "the body is a form"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(
    service: Service, body: bytes, path: str, headers: dict[str, str], status: int, told: str
) -> None:
    found, answer, _ = service.ask(path, body, **headers)
    assert found == status
    assert told in answer["message"]


def test_half_a_image_is_refused_and_the_service_goes_on(workspace: Workspace, service: Service) -> None:
    data = image_of(workspace, "3").read_bytes()
    status, answer, _ = service.ask("/classify", data[: len(data) // 2])
    assert (status, answer["error"]) == (422, "ImageRejected")
    assert service.ask("/classify", data)[1]["label"] == "3"
    assert service.ask("/classify?top=0", data)[0] == 422


def test_a_small_file_with_very_many_pixels_is_refused(workspace: Workspace, service: Service) -> None:
    data = large_image(image_of(workspace, "3"))
    assert len(data) < MAX_BYTES
    status, answer, _ = service.ask("/classify", data)
    assert (status, answer["error"]) == (413, "Refused")
    assert "49,000,000 pixels" in answer["message"]


def test_a_client_that_stalls_or_goes_away_holds_nothing_up(workspace: Workspace, service: Service) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"
    with socket.create_connection(("127.0.0.1", service.port)) as stalling:
        stalling.settimeout(PATIENCE_S)
        stalling.sendall(head)
        with socket.create_connection(("127.0.0.1", service.port)) as leaving:
            leaving.sendall(head)
        assert service.ask("/classify", image_of(workspace, "3").read_bytes())[1]["label"] == "3"
        assert b" 408 " in stalling.recv(1000)


def test_a_client_that_sends_its_headers_slowly_is_cut_off(workspace: Workspace, tmp_path: Path) -> None:
    data = image_of(workspace, "3").read_bytes()
    with serving(workspace.int8_model, tmp_path / "log.txt", VIT_EDGE_HEADER_MS="500", **LARGE) as service:
        service.wait_until_ready()
        request = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
        with socket.create_connection(("127.0.0.1", service.port)) as slow:
            slow.settimeout(PATIENCE_S)
            slow.sendall(request + data)
            assert b" 200 " in slow.recv(10_000)  # then, on the same connection, headers that never end
            started = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - started < PATIENCE_S:
                    slow.sendall(b"X")
                    time.sleep(0.05)
            assert time.monotonic() - started < PATIENCE_S / 2
        # A request that is busy for longer than the limit is not cut off.
        assert service.ask("/classify", large_image(image_of(workspace, "3")))[0] == 200
        service.end()


def test_the_length_of_a_image_is_counted_where_it_is_not_told_and_believed_where_the_client_asks(
    service: Service,
) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as chunked:
        chunked.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(11):
            chunked.sendall(b"186a0\r\n" + bytes(100_000) + b"\r\n")
        chunked.sendall(b"0\r\n\r\n")
        chunked.settimeout(PATIENCE_S)
        assert b" 413 " in chunked.recv(1000)
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as asking:
        asking.settimeout(PATIENCE_S)
        asking.sendall(head)
        assert asking.recv(1000).startswith(b"HTTP/1.1 413 ")


def large_image(path: Path) -> bytes:
    """Return an image of 49 million pixels in a small file: work for a worker, none for the network card."""
    with Image.open(path) as image:
        large = image.convert("L").resize((7000, 7000), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_a_full_queue_refuses_at_once_and_what_was_taken_is_answered(workspace: Workspace, tmp_path: Path) -> None:
    data = large_image(image_of(workspace, "3"))
    settings = {"VIT_EDGE_QUEUE": "1", **LARGE}
    with serving(workspace.int8_model, tmp_path / "log.txt", **settings) as service:
        service.wait_until_ready()
        with load(workspace.int8_model, threads=1) as classifier:
            expected = classifier(data)
        with ThreadPoolExecutor(12) as clients:
            asked = [clients.submit(service.ask, "/classify", data) for _ in range(12)]
            states = set()
            while not all(one.done() for one in asked):
                states.add(service.ask("/healthz")[1]["status"])
        answers = [one.result() for one in asked]
        assert {status for status, _, _ in answers} == {200, 503}
        for status, answer, headers in answers:
            if status == 503:
                assert answer["error"] == "Overloaded"
                assert int(headers["Retry-After"]) >= 1
            else:
                assert (answer["label"], answer["probability"]) == ("3", expected.probability)
        assert "overloaded" in states
        assert service.ask("/healthz")[1]["status"] == "ok"
        service.end()


def peak_bytes(service: Service) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def test_no_more_images_are_decoded_at_a_time_than_there_are_workers(workspace: Workspace, tmp_path: Path) -> None:
    data = large_image(image_of(workspace, "3"))
    settings = {"VIT_EDGE_QUEUE": "8", "MALLOC_MMAP_THRESHOLD_": "1048576", **LARGE}
    with serving(workspace.int8_model, tmp_path / "log.txt", **settings) as service:
        service.wait_until_ready()
        before = peak_bytes(service)
        with ThreadPoolExecutor(6) as clients:
            asked = [clients.submit(service.ask, "/classify", data) for _ in range(6)]
        assert [one.result()[0] for one in asked] == [200] * 6
        assert peak_bytes(service) - before < 12 * 49_000_000 + 8 * len(data)  # side by side: 30 bytes for each of 49 M
        service.end()


def test_a_image_whose_time_is_over_is_not_answered(workspace: Workspace, tmp_path: Path) -> None:
    with serving(workspace.int8_model, tmp_path / "log.txt", VIT_EDGE_DEADLINE_MS="0.000001") as service:
        service.wait_until_ready()
        status, answer, _ = service.ask("/classify", image_of(workspace, "3").read_bytes())
        assert (status, answer["error"]) == (504, "DeadlineExceeded")
        service.end()


def test_images_that_were_taken_are_answered_before_the_end(workspace: Workspace, tmp_path: Path) -> None:
    data = large_image(image_of(workspace, "3"))
    with serving(workspace.int8_model, tmp_path / "log.txt", **LARGE) as service:
        service.wait_until_ready()
        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(service.ask, "/classify", data) for _ in range(2)]
            while service.ask("/healthz")[1]["queued"] == 0 and not any(one.done() for one in asked):
                pass
            service.end()
        assert [one.result()[1]["label"] for one in asked] == ["3", "3"]


def test_another_model_in_its_place_serves_when_it_was_checked(workspace: Workspace, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(workspace.int8_model, model)
    with serving(model, tmp_path / "log.txt", VIT_EDGE_WATCH="1") as service:
        service.wait_until_ready()
        assert service.ask("/healthz")[1]["precision"] == "int8"
        shutil.copy(workspace.float_model, tmp_path / "new.onnx")
        (tmp_path / "new.onnx").replace(model)
        end = time.monotonic() + PATIENCE_S
        while service.ask("/healthz")[1]["precision"] != "float32":
            assert time.monotonic() < end, service.log.read_text()
            time.sleep(0.1)
        assert service.ask("/classify", image_of(workspace, "3").read_bytes())[1]["label"] == "3"
        service.end()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"VIT_EDGE_MODEL": ""}, "VIT_EDGE_MODEL is not set"),
        ({"VIT_EDGE_QUEUE": "many"}, "VIT_EDGE_QUEUE is 'many'"),
        ({"VIT_EDGE_QUEUE": "0"}, "queue_size is 0"),
        ({"VIT_EDGE_MODEL": __file__}, "the file is not an ONNX model"),
    ],
)
def test_what_it_cannot_start_with_it_says(
    workspace: Workspace, tmp_path: Path, environment: dict[str, str], told: str
) -> None:
    with serving(workspace.int8_model, tmp_path / "log.txt", **environment) as service:
        assert service.process.wait(PATIENCE_S) not in (0, -signal.SIGTERM)
        assert told in service.log.read_text()


def test_systemd_hears_when_it_is_ready_and_as_long_as_images_are_answered(
    workspace: Workspace, tmp_path: Path
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vit-edge.") as folder,  # the path of a socket has 107 bytes at most
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(f"{folder}/notify")
        manager.settimeout(PATIENCE_S)
        told = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "1000000"}
        with serving(workspace.int8_model, tmp_path / "log.txt", **told) as service:
            assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            service.end()
            manager.settimeout(0)
            heard = []
            while not heard or heard[-1] != b"STOPPING=1":
                heard.append(manager.recv(100))
            assert set(heard[:-1]) <= {b"WATCHDOG=1"}


def test_systemd_hears_nothing_while_no_image_is_answered(workspace: Workspace, tmp_path: Path) -> None:
    data = large_image(image_of(workspace, "3"))
    with (
        tempfile.TemporaryDirectory(prefix="vit-edge.") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(f"{folder}/notify")
        manager.settimeout(PATIENCE_S)
        # An image has to be answered within 25 ms; one of 49 million pixels takes the only worker for longer.
        told = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "100000", **LARGE}
        log = tmp_path / "log.txt"
        with serving(workspace.int8_model, log, **told) as service, ThreadPoolExecutor(1) as client:
            service.wait_until_ready()
            asked = client.submit(service.ask, "/classify", data)
            while not asked.done():
                manager.recv(100)
            assert asked.result()[1]["label"] == "3"
            assert "no answer for the watchdog: nothing in 0.025 s" in log.read_text()
            assert manager.recv(100) == b"WATCHDOG=1"
            service.end()
