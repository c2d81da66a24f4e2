"""A pool whose workers are busy still keeps its word: deadlines are told on time, refusals cost nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, Workspace
from vit_edge.errors import Closed, DeadlineExceeded, Overloaded
from vit_edge.runtime import Pool
from vit_edge.runtime.checks.golden import golden_images

IMAGES = golden_images(range(4), height=40, width=40)


class Never:
    """A binary file whose bytes do not come before they are let go: a driver that hangs."""

    def __init__(self) -> None:
        self.asked, self.may_go = threading.Event(), threading.Event()

    def read(self, _size: int) -> bytes:
        self.asked.set()
        assert self.may_go.wait(60)
        return b"no image"


@pytest.fixture
def busy(workspace: Workspace) -> Iterator[Pool]:
    """A pool of one worker that answers nothing, with room for three requests."""
    never = Never()
    with Pool(workspace.int8_model, workers=1, queue_size=3, engine="onnxruntime") as pool:
        pool.submit(never)  # type: ignore[arg-type]
        assert never.asked.wait(30)
        yield pool
        never.may_go.set()


def test_a_deadline_is_told_when_it_is_over_and_not_when_a_worker_is_free(busy: Pool) -> None:
    started = time.monotonic()
    later, sooner = busy.submit(IMAGES[0], timeout_s=0.4), busy.submit(IMAGES[1], timeout_s=0.1)
    for future in (sooner, later):
        with pytest.raises(DeadlineExceeded, match="no worker took it in"):
            future.result(30)
    assert 0.4 <= time.monotonic() - started < 20  # the worker is busy still
    assert busy.describe()["queued"] == 0


def test_closing_waits_for_what_has_no_deadline_only(workspace: Workspace) -> None:
    never = Never()
    pool = Pool(workspace.int8_model, workers=1, queue_size=3, engine="onnxruntime")
    pool.submit(never)  # type: ignore[arg-type]
    assert never.asked.wait(30)
    expiring, kept = pool.submit(IMAGES[0], timeout_s=0.2), pool.submit(IMAGES[1])
    closer = threading.Thread(target=pool.close)
    closer.start()
    with pytest.raises(DeadlineExceeded):
        expiring.result(30)
    assert not kept.done()
    never.may_go.set()
    closer.join(30)
    assert kept.result(0).answers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vit-edge-")]


def test_a_worker_that_hangs_does_not_keep_the_interpreter(workspace: Workspace) -> None:
    script = """
import sys, threading
from vit_edge.runtime import Pool
asked = threading.Event()
class Never:
    def read(self, size):
        asked.set()
        threading.Event().wait()
pool = Pool(sys.argv[1], workers=1, threads=1)
pool.submit(Never())
waiting = pool.submit(sys.argv[2])
asked.wait()
print("asked", flush=True)
"""
    command = [sys.executable, "-c", script, workspace.int8_model, workspace.folder / "image.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


class Counted(np.ndarray[Any, Any]):
    """An array that counts how often it is copied."""

    copies = 0

    def copy(self, *arguments: Any, **more: Any) -> Any:
        Counted.copies += 1
        return super().copy(*arguments, **more)


def test_a_full_queue_refuses_before_it_copies(busy: Pool) -> None:
    frame = IMAGES[0].view(Counted)
    for number in range(3):
        busy.submit(frame)
        assert Counted.copies == number + 1
    with pytest.raises(Overloaded):
        busy.submit(frame)
    assert Counted.copies == 3


def test_a_place_is_free_again_where_the_image_could_not_be_copied(busy: Pool) -> None:
    class Broken(Counted):
        def copy(self, *_arguments: Any, **_more: Any) -> Any:
            raise MemoryError

    for _ in range(5):
        with pytest.raises(MemoryError):
            busy.submit(IMAGES[0].view(Broken))
    assert [busy.submit(image).done() for image in IMAGES[:3]] == [False, False, False]


def test_a_pool_that_is_closed_while_a_image_is_copied_does_not_take_it(workspace: Workspace) -> None:
    pool = Pool(workspace.int8_model, workers=1, engine="onnxruntime")

    class Closing(Counted):
        def copy(self, *arguments: Any, **more: Any) -> Any:
            pool.close()
            return super().copy(*arguments, **more)

    with pytest.raises(Closed):
        pool.submit(IMAGES[0].view(Closing))
