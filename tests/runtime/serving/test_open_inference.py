"""The Open Inference Protocol: requests are read, wrong ones refused, and the logits are those of `load`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.examples.test_service_example import Service, serving
from vit_edge.errors import InputError
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.repository.builder import write_repository
from vit_edge.runtime.repository.client_main import main
from vit_edge.runtime.serving.open_inference import (
    HEADER_LENGTH,
    encode_request,
    read_logits,
    read_request,
    respond,
    server_name,
)

IMAGES = golden_images(range(3), height=24, width=16)
needs_service = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="fastapi and uvicorn are not installed: pip install fastapi uvicorn",
)


@pytest.fixture(scope="module")
def service(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return one service for all tests here; it has to end well."""
    log = tmp_path_factory.mktemp("service") / "log.txt"
    with serving(small_model / "m.onnx", log, VIT_EDGE_DEADLINE_MS="60000") as running:
        running.wait_until_ready()
        yield running
        running.end()


@pytest.fixture(scope="module")
def expected(small_model: Path) -> Any:
    with load(small_model / "m.onnx", threads=1) as classifier:
        return classifier.logits(IMAGES)


def body(**changes: Any) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 24, 16, 3], "data": IMAGES[0].ravel().tolist()}
    return json.dumps({"id": "7", "inputs": [{**tensor, **changes}]}).encode()


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_request_and_its_response_come_back_as_they_were(small_model: Path, expected: Any, is_binary: bool) -> None:
    manifest = open_model(small_model / "m.onnx").manifest
    content, headers = encode_request(IMAGES, name="images", datatype="UINT8")
    asked = read_request(content, headers[HEADER_LENGTH], manifest)
    np.testing.assert_array_equal(asked.images, IMAGES)
    assert asked.is_binary
    if not is_binary:
        asked = read_request(body(), None, manifest)
        assert (asked.id, asked.is_binary) == ("7", False)
    content, headers = respond(asked, expected, name="small")
    np.testing.assert_array_equal(read_logits(content, headers.get(HEADER_LENGTH)), expected)


@pytest.mark.parametrize(
    ("content", "length", "reason"),
    [
        (b"", None, "JSONDecodeError"),
        (b"[1]", None, "no object"),
        (b"{}", None, "KeyError"),
        (b'{"inputs": []}', None, "not enough values"),
        (b"[" * 100_000, None, "RecursionError"),
        (body(), "99999999", "the body has"),
        (body(), "-1", "the body has"),
        (body(), "x", "invalid literal"),
        (body(datatype="FP32"), None, "datatype is FP32"),
        (body(name="pixels"), None, "input 'images'"),
        (body(shape=[1, 16, 24, 3]), None, r"\[-1, 24, 16, 3\]"),
        (body(shape=[-1, 24, 16, 3]), None, "the shape is"),
        (body(shape=[2, 24, 16, 3]), None, "cannot reshape"),
        (body(data=[256] * 1152), None, "not UINT8"),
        (body(data=[0.5] * 1152), None, "not UINT8"),
        (body(data=["a"] * 1152), None, "not UINT8"),
        (body(parameters={"binary_data_size": 5}), None, "binary_data_size is 5"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(
    small_model: Path, content: bytes, length: str | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        read_request(content, length, open_model(small_model / "m.onnx").manifest)


def test_names_that_no_server_accepts_are_made_plain() -> None:
    names = ["ViT-B/16 (ours)", "digits", "日本", "-", "a" * 90]
    assert [server_name(name) for name in names] == ["vit-b-16-ours", "digits", "model", "model", "a" * 50]


@needs_service
def test_the_service_gives_the_logits_of_load(service: Service, expected: Any) -> None:
    status, described, _ = service.ask("/v2/models/small")
    assert (status, described["inputs"][0]["shape"]) == (200, [-1, 24, 16, 3])
    assert service.ask("/v2/health/live")[:2] == (200, {"live": True})
    assert service.ask("/v2/health/ready")[:2] == (200, {"ready": True})
    status, found, _ = service.ask("/v2/models/small/infer", body())
    assert (status, found["id"], found["model_name"]) == (200, "7", "small")
    np.testing.assert_array_equal(np.float32(found["outputs"][0]["data"]), expected[0])


@needs_service
def test_what_the_service_refuses_names_the_reason(service: Service) -> None:
    status, found, _ = service.ask("/v2/models/other/infer", body())
    assert (status, found["error"]) == (404, "there is no model 'other'; the model is 'small'")
    status, found, _ = service.ask("/v2/models/small/infer", body(datatype="BYTES"))
    assert status == 400
    assert "datatype is BYTES" in found["error"]
    assert service.ask("/v2/models/small/infer", body(), **{"Content-Encoding": "gzip"})[0] == 415


@needs_service
def test_the_client_of_a_repository_classifies_and_checks_the_service(
    small_model: Path, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_repository(small_model / "m.onnx", server="triton", out=tmp_path / "r", instances=1)
    image, url = tmp_path / "image.png", f"http://127.0.0.1:{service.port}"
    Image.fromarray(golden_images([5], height=48, width=40)[0]).save(image)
    assert main([url, "--check", str(image)], folder=made.path / "client") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ready: ")
    with load(small_model / "m.onnx", threads=1) as classifier:
        found = classifier(image)
    assert f"{image}: {found.label} {found.probability:.1%}" in printed


@needs_service
def test_the_check_finds_a_server_with_another_model(
    small_model: Path, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_repository(small_model / "m.onnx", server="triton", out=tmp_path / "r", instances=1)
    path = made.path / "client" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["golden"]["seeds"].reverse()
    path.write_text(json.dumps(manifest))
    assert main([f"http://127.0.0.1:{service.port}", "--check"], folder=path.parent) == 6
    assert "other logits" in capsys.readouterr().err
    assert main(["http://127.0.0.1:1", "--check"], folder=path.parent) == 7


@needs_service
def test_tritons_client_works_with_the_service(service: Service, expected: Any) -> None:
    reason = "tritonclient[http] is not installed: pip install 'tritonclient[http]'"
    http = pytest.importorskip("tritonclient.http", reason=reason)
    with http.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("small")
        assert client.get_server_metadata()["name"] == "vit-edge"
        assert client.get_model_metadata("small")["outputs"][0]["shape"] == [-1, 7]
        for is_binary in (True, False):
            images = http.InferInput("images", list(IMAGES.shape), "UINT8")
            images.set_data_from_numpy(IMAGES, binary_data=is_binary)
            outputs = [http.InferRequestedOutput("logits", binary_data=is_binary)]
            for asked in (outputs, None):
                found = client.infer("small", [images], outputs=asked, request_id="1")
                assert found.get_response()["id"] == "1"
                np.testing.assert_array_equal(found.as_numpy("logits"), expected)
