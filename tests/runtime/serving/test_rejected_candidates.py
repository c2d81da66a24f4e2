"""A model that is rejected leaves the process, and what the process serves, as they were."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.faults.hostile_models import breaks_in_a_batch, resealed
from vit_edge.errors import GoldenMismatch
from vit_edge.runtime import Pool, installed_engines
from vit_edge.runtime.checks.golden import golden_images

_NUM_SWAPS = 10
_IMAGE = golden_images([0], height=24, width=16)[0]


@pytest.fixture
def files(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return a good file, a second good file, and one that fails its golden check."""
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(resealed(small_model / "m.onnx", breaks_in_a_batch))
    return {"good": small_model / "m.onnx", "bad": bad}


@pytest.mark.skipif("openvino" not in installed_engines(), reason="OpenVINO is not installed")
def test_a_pool_serves_on_while_every_second_candidate_fails_its_golden_check(files: dict[str, Path]) -> None:
    failed: list[BaseException] = []
    stop = threading.Event()

    def call() -> None:
        try:
            while not stop.is_set():
                pool.submit(_IMAGE).result(60)
        except BaseException as error:
            failed.append(error)

    with Pool(files["good"], engine="openvino", workers=1, queue_size=8) as pool:
        expected = pool.submit(_IMAGE).result(60).answers
        callers = [threading.Thread(target=call) for _ in range(2)]
        for caller in callers:
            caller.start()
        for number in range(_NUM_SWAPS):
            if number % 2:
                with pytest.raises(GoldenMismatch, match="golden inputs"):
                    pool.swap(files["bad"])
            else:
                pool.swap(files["good"])
        stop.set()
        for caller in callers:
            caller.join()
        assert pool.submit(_IMAGE).result(60).answers == expected
    assert failed == []
