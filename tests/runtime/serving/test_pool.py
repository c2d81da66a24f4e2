"""Many callers get their own answers; what cannot be answered is said at once; models change under load."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace
from tests.support.networks import PREPROCESSING, write_checkpoint
from vit_edge.errors import Closed, DeadlineExceeded, GoldenMismatch, ImageRejected, NotTrusted, Overloaded, UsageError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import Answer, Pool, Prediction, load
from vit_edge.runtime.checks.golden import golden_images

ENGINES = ("onnxruntime", "openvino")
IMAGES = golden_images(range(40), height=48, width=40)
MANY = np.random.default_rng(0).integers(0, 256, (5000, 40, 36, 3), dtype=np.uint8)


def answers_of(path: Path, engine: Any) -> list[tuple[Answer, ...]]:
    with load(path, engine=engine, threads=1) as classifier:
        return [classifier(image).answers for image in IMAGES]


def eventually(pool: Pool, image: Any, **more: Any) -> Future[Prediction]:
    """Submit until there is room."""
    while True:
        try:
            return pool.submit(image, **more)
        except Overloaded:  # noqa: PERF203 - that is the point
            time.sleep(0.001)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("max_batch", "max_delay_ms"), [(1, 0.0), (8, 2.0)])
def test_sixteen_callers_of_a_pool_get_the_answers_of_one(
    workspace: Workspace, engine: Any, max_batch: int, max_delay_ms: float
) -> None:
    images = MANY if max_batch == 1 else MANY[:1250]
    with load(workspace.int8_model, engine=engine, threads=1) as classifier:
        expected = [classifier(image).answers for image in images]
    before = images.copy()
    settings = {"queue_size": 8, "max_batch": max_batch, "max_delay_ms": max_delay_ms}
    with Pool(workspace.int8_model, engine=engine, workers=3, **settings) as pool, ThreadPoolExecutor(16) as callers:  # type: ignore[arg-type]
        found = list(callers.map(lambda image: eventually(pool, image).result().answers, images))
    assert found == expected
    np.testing.assert_array_equal(images, before)


@pytest.fixture
def slow(workspace: Workspace) -> Iterator[Pool]:
    """A pool of one worker that is kept busy by an image that does not come."""
    with Pool(workspace.int8_model, workers=1, queue_size=2, engine="onnxruntime") as pool:
        yield pool


class _Late:
    """A binary file whose bytes come when they are told to."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked, self.may_go = data, threading.Event(), threading.Event()

    def read(self, _size: int) -> bytes:
        self.asked.set()
        assert self.may_go.wait(30)
        return self.data


@pytest.fixture
def late(workspace: Workspace) -> _Late:
    return _Late((workspace.folder / "image.png").read_bytes())


def test_a_full_queue_refuses_at_once_and_what_was_taken_is_answered(slow: Pool, late: _Late) -> None:
    first = slow.submit(late)  # type: ignore[arg-type]
    assert late.asked.wait(30)
    waiting = [slow.submit(image) for image in IMAGES[:2]]
    with pytest.raises(Overloaded, match="2 requests wait already"):
        slow.submit(IMAGES[2])
    assert slow.describe()["queued"] == 2
    late.may_go.set()
    assert first.result(30).label == "3"
    assert [future.result(30).timings.waited_ms > 0 for future in waiting] == [True, True]


def test_a_deadline_and_a_cancellation_leave_the_queue(slow: Pool, late: _Late) -> None:
    first = slow.submit(late)  # type: ignore[arg-type]
    assert late.asked.wait(30)
    expired, cancelled = slow.submit(IMAGES[0], timeout_s=0.0), slow.submit(IMAGES[1])
    assert cancelled.cancel()
    time.sleep(0.01)
    kept = [slow.submit(image, timeout_s=60) for image in IMAGES[:2]]  # those that wait for nothing made room
    with pytest.raises(DeadlineExceeded, match="later than its deadline"):
        expired.result(30)
    with pytest.raises(CancelledError):
        cancelled.result(30)
    late.may_go.set()
    assert all(future.result(30).answers for future in (first, *kept))


def test_a_deadline_that_passes_in_the_queue_is_told(slow: Pool, late: _Late) -> None:
    first, second = slow.submit(late), None  # type: ignore[arg-type]
    assert late.asked.wait(30)
    second = slow.submit(IMAGES[0], timeout_s=0.01)
    time.sleep(0.05)
    late.may_go.set()
    assert first.result(30).answers
    with pytest.raises(DeadlineExceeded):
        second.result(30)


def test_a_bad_image_is_the_matter_of_the_one_who_sent_it(workspace: Workspace) -> None:
    with Pool(workspace.int8_model, workers=1, queue_size=10, max_batch=4, max_delay_ms=200) as pool:
        good, bad, wrong = pool.submit(IMAGES[0]), pool.submit(b"no image"), pool.submit(IMAGES[1][..., :1])
        with pytest.raises(ImageRejected):
            bad.result(30)
        with pytest.raises(TypeError, match="give uint8"):
            wrong.result(30)
        assert good.result(30).answers == answers_of(workspace.int8_model, "onnxruntime")[0]


def test_an_array_may_be_filled_again_as_soon_as_it_was_given(slow: Pool, late: _Late, workspace: Workspace) -> None:
    slow.submit(late)  # type: ignore[arg-type]
    frame = IMAGES[5].copy()
    future = slow.submit(frame)
    frame[:] = 0
    late.may_go.set()
    assert future.result(30).answers == answers_of(workspace.int8_model, "onnxruntime")[5]


def test_asyncio_awaits_answers_and_cancels_what_was_not_taken(workspace: Workspace, late: _Late) -> None:
    async def run() -> list[Prediction]:
        with Pool(workspace.int8_model, workers=1, queue_size=8, engine="onnxruntime") as pool:
            blocking = pool.submit(late)  # type: ignore[arg-type]
            tasks = [asyncio.create_task(pool.classify(image)) for image in IMAGES[:4]]
            await asyncio.sleep(0.05)
            tasks[1].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            late.may_go.set()
            found = list(await asyncio.gather(*tasks[:1], *tasks[2:]))
            assert blocking.result(30).label == "3"
            with pytest.raises(ImageRejected):
                await pool.classify(b"no image")
            return found

    expected = answers_of(workspace.int8_model, "onnxruntime")
    assert [found.answers for found in asyncio.run(run())] == [expected[0], expected[2], expected[3]]


def test_closing_answers_what_waits_or_cancels_it_and_leaves_no_thread(workspace: Workspace) -> None:
    before = set(threading.enumerate())
    pool = Pool(workspace.int8_model, workers=2, queue_size=50, engine="onnxruntime")  # OpenVINO's import starts one
    pool.watch(workspace.int8_model, interval_s=30)
    futures = [pool.submit(image) for image in IMAGES]
    pool.close()
    assert all(future.result(0).answers for future in futures)
    pool.close()
    with pytest.raises(Closed):
        pool.submit(IMAGES[0])
    with pytest.raises(Closed):
        pool.swap(workspace.int8_model)
    with pytest.raises(Closed):
        pool.watch(workspace.int8_model)
    other = Pool(workspace.int8_model, workers=1, queue_size=50, engine="onnxruntime")
    futures = [other.submit(image) for image in IMAGES]
    other.close(drain=False)
    assert all(future.done() for future in futures)
    assert any(future.cancelled() for future in futures)
    assert set(threading.enumerate()) <= before


def test_a_pool_that_nobody_closed_does_not_keep_the_interpreter(workspace: Workspace) -> None:
    script = """
import sys
from vit_edge.runtime import Pool
pool = Pool(sys.argv[1], workers=2)
print(pool.submit(sys.argv[2]).result().label)
pool.submit(sys.argv[2])
"""
    command = [sys.executable, "-c", script, workspace.int8_model, workspace.folder / "image.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_pool_notices_a_fork(workspace: Workspace) -> None:
    with Pool(workspace.int8_model, workers=1) as pool:
        child = os.fork()
        if child == 0:
            try:
                pool.submit(IMAGES[0])
            except Closed as error:
                os._exit(0 if "fork" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.submit(IMAGES[0]).result(30).answers


@pytest.mark.parametrize(
    "settings",
    [{"workers": 0}, {"workers": 999}, {"queue_size": 2.5}, {"threads": 0}, {"max_batch": 0}, {"max_delay_ms": -1.0}],
)
def test_impossible_pools_are_refused(workspace: Workspace, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Pool(workspace.int8_model, **settings)


def test_callbacks_may_do_with_the_pool_what_they_like(workspace: Workspace, late: _Late) -> None:
    done = threading.Event()
    pool = Pool(workspace.int8_model, workers=1, queue_size=8, engine="onnxruntime")
    first = pool.submit(late)  # type: ignore[arg-type]
    assert late.asked.wait(30)
    kept = [pool.submit(image) for image in IMAGES[1:4]]
    expired = pool.submit(IMAGES[0], timeout_s=0.5)  # long enough to be called back from a thread of the pool

    def close(_future: object) -> None:
        pool.close()
        done.set()

    expired.add_done_callback(close)
    assert done.wait(30)
    late.may_go.set()
    assert first.result(30).label == "3"
    expected = answers_of(workspace.int8_model, "onnxruntime")
    assert [future.result(30).answers for future in kept] == expected[1:4]  # closing answers what waits
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vit-edge-")]


def test_a_callback_that_ends_the_program_ends_no_worker(workspace: Workspace, late: _Late) -> None:
    def leave(_future: object) -> None:
        raise SystemExit(3)

    with Pool(workspace.int8_model, workers=1, engine="onnxruntime") as pool:
        first = pool.submit(late)  # type: ignore[arg-type]
        first.add_done_callback(leave)
        late.may_go.set()
        first.result(30)
        assert pool.submit(IMAGES[0]).result(30).answers


def test_a_request_is_not_kept_waiting_for_others_beyond_its_deadline(workspace: Workspace) -> None:
    with Pool(workspace.int8_model, workers=1, max_batch=8, max_delay_ms=30_000) as pool:
        assert pool.submit(IMAGES[0], timeout_s=20.0).result(15).answers


def test_a_image_that_is_shared_or_filled_again_is_copied(slow: Pool, late: _Late, workspace: Workspace) -> None:
    blocking = slow.submit(late)  # type: ignore[arg-type]
    assert late.asked.wait(30)
    image = Image.open(workspace.folder / "image.png")
    data = bytearray((workspace.folder / "image.png").read_bytes())
    futures = [slow.submit(image), slow.submit(data)]
    image.close()
    data[:] = bytes(len(data))
    late.may_go.set()
    assert {future.result(30).label for future in (blocking, *futures)} == {"3"}


def test_an_interrupted_close_goes_on_at_the_second(workspace: Workspace, late: _Late) -> None:
    pool = Pool(workspace.int8_model, workers=1, queue_size=50, engine="onnxruntime")
    pool.submit(late)  # type: ignore[arg-type]
    futures = [pool.submit(image) for image in IMAGES]
    assert late.asked.wait(30)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()  # to the main thread, which waits
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    signal.signal(signal.SIGINT, before)
    late.may_go.set()
    pool.close()
    assert all(future.done() for future in futures)


def test_a_pool_serves_a_classifier_made_elsewhere(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    model = onnx.load(small_model / "m.onnx")
    del model.metadata_props[:]
    model.producer_name = "somebody"
    onnx.save(model, tmp_path / "theirs.onnx")
    told = {"preprocessing": PREPROCESSING, "labels": tuple("abcdefg")}
    with load(small_model / "m.onnx") as classifier:
        expected = classifier(IMAGES[0]).answers
    with Pool(tmp_path / "theirs.onnx", workers=1, **told) as pool:  # type: ignore[arg-type]
        assert pool.submit(IMAGES[0]).result(30).answers == expected
        assert pool.describe()["verified"] == "probe"


def test_ir_is_exchanged_when_both_its_files_are_there(tmp_path: Path) -> None:
    for name, depth in (("one", 2), ("two", 3)):
        write_checkpoint(tmp_path / f"{name}.safetensors", depth=depth)
        options = ExportOptions(format="openvino")
        export_onnx(tmp_path / f"{name}.safetensors", out=tmp_path / f"{name}.xml", options=options)
    with Pool(tmp_path / "one.xml", workers=1) as pool:
        pool.watch(tmp_path / "one.xml", interval_s=0.05)
        before = pool.describe()["sha256"]
        (tmp_path / "two.xml").replace(tmp_path / "one.xml")
        time.sleep(0.3)  # the weights are still those of the other: it is refused
        assert pool.describe()["sha256"] == before
        (tmp_path / "two.bin").replace(tmp_path / "one.bin")
        end = time.monotonic() + 30
        while pool.describe()["sha256"] == before and time.monotonic() < end:
            time.sleep(0.02)
        assert pool.describe()["sha256"] != before


def _damaged(folder: Path, good: Path) -> list[Path]:
    """Return copies that must never serve: a changed byte, and golden vectors of another network."""
    data = good.read_bytes()
    (folder / "flipped.onnx").write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    model = open_model(good)
    golden = dict(model.manifest.golden or {})
    golden["seeds"] = [seed + 1000 for seed in golden["seeds"]]
    (folder / "other.onnx").write_bytes(model.with_manifest(replace(model.manifest, golden=golden)))
    return [folder / "flipped.onnx", folder / "other.onnx"]


@pytest.mark.parametrize("engine", ENGINES)
def test_models_change_under_load_without_a_failed_or_mixed_answer(
    workspace: Workspace, tmp_path: Path, engine: Any
) -> None:
    good = (workspace.float_model, workspace.int8_model)
    possible = [set(each) for each in zip(*(answers_of(path, engine) for path in good), strict=True)]
    assert sum(len(each) == 2 for each in possible) > 30  # the two files answer differently
    damaged, stop, wrong, count = _damaged(tmp_path, workspace.int8_model), threading.Event(), [], [0]

    def call(start: int) -> None:
        position = start
        while not stop.is_set():
            position = (position + 1) % 40
            if eventually(pool, IMAGES[position]).result(30).answers not in possible[position]:
                wrong.append(position)
            count[0] += 1

    with Pool(workspace.float_model, engine=engine, workers=2, queue_size=16, max_batch=2) as pool:
        callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        refused = 0
        for number in range(12):
            if number % 3 == 2:
                with pytest.raises((NotTrusted, GoldenMismatch)):
                    pool.swap(damaged[number % 2])
                refused += 1
            else:
                pool.swap(good[number % 2])
            time.sleep(0.05)
        stop.set()
        for caller in callers:
            caller.join()
        assert pool.describe()["precision"] == "float32"  # the last good one, number 10
    assert (wrong, refused) == ([], 4)
    assert count[0] > 100


def test_a_watched_file_is_exchanged_when_it_is_whole_and_right(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = tmp_path / "served.onnx"
    shutil.copy(workspace.float_model, served)
    with Pool(served, workers=1, engine="onnxruntime") as pool:
        pool.watch(served, interval_s=0.05)

        def until(text: str) -> None:
            end = time.monotonic() + 30
            while text not in (*caplog.messages, pool.describe()["precision"]) and time.monotonic() < end:
                if any(text in message for message in caplog.messages):
                    return
                time.sleep(0.02)

        served.write_bytes(workspace.int8_model.read_bytes()[:1000])
        until("the model before goes on")
        assert pool.describe()["precision"] == "float32"
        (tmp_path / "next.onnx").write_bytes(workspace.int8_model.read_bytes())
        (tmp_path / "next.onnx").replace(served)
        until("int8")
        assert pool.describe()["precision"] == "int8"
        assert sum("the model before goes on" in message for message in caplog.messages) == 1
        served.unlink()
        time.sleep(0.2)
        assert pool.submit(IMAGES[0]).result(30).answers
