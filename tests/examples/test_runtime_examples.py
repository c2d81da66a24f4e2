"""The examples for whoever embeds the runtime run, on real images, frames and requests."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace
from vit_edge.errors import InputError
from vit_edge.runtime import load

EXAMPLES = ROOT / "examples"
# A test that waits for a process gives up after this long; none of them measures anything.
PATIENCE_S = 60


def example(name: str) -> ModuleType:
    """Return an example as a module, as an application that took it over would have it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run an example to its end as a person does."""
    words = [sys.executable, *(str(word) for word in command)]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def images_of(workspace: Workspace, digit: str) -> list[Path]:
    return sorted((workspace.test_images / digit).iterdir())


@pytest.mark.parametrize("name", ["folder_watcher.py", "camera.py", "service/app.py"])
def test_every_example_says_at_its_top_what_to_install(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert 'pip install "vit-edge[onnxruntime]"' in text.split('"""')[1]


# The folder watcher


@contextmanager
def watching(folder: Path, model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run the watcher beside the test; its stdout is in the file given."""
    out, err = folder.with_name("out.jsonl"), folder.with_name("err.txt")
    with out.open("w") as out_file, err.open("w") as err_file:
        command = [sys.executable, str(EXAMPLES / "folder_watcher.py"), str(model), str(folder), *options]
        process = subprocess.Popen(command, stdout=out_file, stderr=err_file, text=True)
        try:
            yield process, out
        finally:
            process.kill()
            process.wait()


def wait_for_files(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what was printed once there is a line for each of the names."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        text = out.read_text()
        found = lines_of(text[: text.rfind("\n") + 1])
        if {Path(line["file"]).name for line in found} >= set(names):
            return found
        time.sleep(0.05)
    raise AssertionError(f"only this was printed: {out.read_text()} {out.with_name('err.txt').read_text()}")


def write_slowly(path: Path, data: bytes, *, seconds: float) -> None:
    """Write a file in many pieces, each soon after the one before."""
    pieces = 60
    size = -(-len(data) // pieces)
    for start in range(0, len(data), size):
        with path.open("ab") as file:
            file.write(data[start : start + size])
        time.sleep(seconds / pieces)


def test_the_watcher_names_every_image_and_a_broken_file_does_not_stop_it(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    there, slow, later = (images_of(workspace, digit)[0].read_bytes() for digit in "375")
    (folder / "there.png").write_bytes(there)
    (folder / "broken.png").write_bytes(there[: len(there) // 2])
    (folder / "notes.txt").write_text("no image")
    (folder / ".part.png").write_bytes(there[:100])
    (folder / "empty.png").touch()
    (folder / "subfolder").mkdir()
    with watching(folder, workspace.int8_model, "--interval", "1", "--threads", "1") as (process, out):
        wait_for_files(out, ["there.png"])
        write_slowly(folder / "slow.png", slow, seconds=2.5)
        wait_for_files(out, ["slow.png"])
        (folder / ".later.part").write_bytes(later)
        (folder / ".later.part").rename(folder / "later.png")
        found = wait_for_files(out, ["later.png"])
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    assert {Path(line["file"]).name: line["label"] for line in found} == {
        "there.png": "3",
        "slow.png": "7",
        "later.png": "5",
    }
    assert len(found) == 3
    assert all(0 < line["probability"] <= 1 and line["total_ms"] > 0 for line in found)
    said = out.with_name("err.txt").read_text().splitlines()
    assert len(said) == 4, said  # two lines for each file: what is wrong, what to do
    reasons = sorted(line for line in said if not line.startswith("try: "))
    assert ["broken.png" in line for line in reasons] == [True, False]
    assert "notes.txt" in reasons[1]


def test_a_file_is_handed_out_when_it_stopped_changing_and_again_when_it_is_another(tmp_path: Path) -> None:
    watcher = example("folder_watcher").Watcher(tmp_path)
    path = tmp_path / "image.png"
    path.touch()
    looks = [list(watcher.look()) for _ in range(3)]  # empty: somebody has just opened it
    for part in (b"a", b"ab", b"abc"):
        path.write_bytes(part)
        looks.append(list(watcher.look()))
    assert looks == [[]] * 6
    assert watcher.unfinished() == [path]
    assert [list(watcher.look()) for _ in range(3)] == [[path], [], []]
    path.write_bytes(b"other")
    assert [list(watcher.look()) for _ in range(3)] == [[], [path], []]
    path.unlink()
    assert list(watcher.look()) == []


def test_once_classifies_what_is_there_and_a_memory_keeps_that_over_a_restart(
    workspace: Workspace, tmp_path: Path
) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    for digit in "37":
        shutil.copy(images_of(workspace, digit)[0], folder / f"{digit}.png")
    (folder / "half.png").touch()
    options = ["--once", "--interval", "0.05", "--seen", tmp_path / "seen.json"]
    command = [EXAMPLES / "folder_watcher.py", workspace.int8_model, folder, *options]
    first = run(*command)
    assert first.returncode == 0, first.stderr
    assert [line["label"] for line in lines_of(first.stdout)] == ["3", "7"]
    assert "half.png" in first.stderr
    assert "still being written" in first.stderr
    shutil.copy(images_of(workspace, "3")[1], folder / "7.png")
    second = run(*command)
    assert [line["file"] for line in lines_of(second.stdout)] == [str(folder / "7.png")]
    (tmp_path / "seen.json").write_text("[1]")
    third = run(*command)
    assert third.returncode == InputError.exit_code
    assert "seen.json" in third.stderr
    assert "Traceback" not in third.stderr


@pytest.mark.parametrize(
    ("folder", "options", "told"),
    [
        ("nowhere", ["--once"], "nowhere"),
        (".", ["--seen", "seen.json"], "--seen lies in the folder"),
        (".", ["--interval", "0"], "--interval"),
    ],
)
def test_what_the_watcher_cannot_do_it_says_in_one_line(
    workspace: Workspace, tmp_path: Path, folder: str, options: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(EXAMPLES / "folder_watcher.py", workspace.int8_model, folder, *options)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# The camera


def colourful(workspace: Workspace, digit: str, *, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a digit as RGB pixels with another tint in each channel: BGR taken for RGB gives another answer."""
    with Image.open(images_of(workspace, digit)[number]) as image:
        rgb = np.asarray(image.convert("RGB"), dtype=np.float64)
    return (rgb * [1.0, 0.6, 0.2]).astype(np.uint8)


@pytest.mark.parametrize("color", ["bgr", "bgra"])
def test_frames_are_named_in_their_own_order_of_colours(workspace: Workspace, color: str) -> None:
    camera = example("camera")
    pixels = [colourful(workspace, digit, number=i) for i, digit in enumerate("0123456789")]
    order = [2, 1, 0] if color == "bgr" else [2, 1, 0, 3]
    with_alpha = [np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]) for rgb in pixels]
    with load(workspace.int8_model, threads=1) as classifier:
        expected = [classifier(rgb).answers for rgb in pixels]
        assert expected != [classifier(rgb[..., ::-1]).answers for rgb in pixels]
        frames = (rgba[..., order] for rgba in with_alpha)
        assert [found.answers for found in camera.classify_frames(classifier, frames, color=color)] == expected
        frames = (rgba[..., order] for rgba in with_alpha)
        some = list(camera.classify_frames(classifier, frames, color=color, every=4))
        assert [found.answers for found in some] == [expected[0], expected[4], expected[8]]
        with pytest.raises(TypeError, match="say its color"):
            next(camera.classify_frames(classifier, iter(with_alpha), color="bgr"))
        with pytest.raises(ValueError, match="every is 0"):
            next(camera.classify_frames(classifier, iter(pixels), color="rgb", every=0))


def test_a_camera_faster_than_the_network_is_seen_as_it_is_now() -> None:
    camera = example("camera")
    go_on, over = threading.Event(), threading.Event()

    def frames() -> Iterator[Any]:
        try:
            yield np.zeros((8, 8, 3), np.uint8)
            assert go_on.wait(PATIENCE_S)
            for number in range(1, 100):
                yield np.full((8, 8, 3), number, np.uint8)
        finally:
            over.set()

    newest = camera.Newest(frames())
    seen = iter(newest)
    assert next(seen).max() == 0
    go_on.set()
    assert over.wait(PATIENCE_S)  # meanwhile 99 came
    assert [frame.max() for frame in seen] == [99]
    assert newest.dropped == 98


def test_an_error_of_the_camera_comes_where_its_frames_are_used_and_leaving_lets_go_of_it() -> None:
    camera = example("camera")
    closed = threading.Event()

    def failing() -> Iterator[Any]:
        yield np.zeros((8, 8, 3), np.uint8)
        raise OSError("unplugged")

    def endless() -> Iterator[Any]:
        try:
            while True:
                yield np.zeros((8, 8, 3), np.uint8)
        finally:
            closed.set()

    with pytest.raises(OSError, match="unplugged"):
        list(camera.Newest(failing()))
    for _ in camera.Newest(endless()):
        break
    assert closed.wait(PATIENCE_S)


def test_a_film_is_classified_frame_by_frame(workspace: Workspace, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is no dependency: install opencv-python-headless to run this")
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 160))
    with Image.open(images_of(workspace, "3")[0]) as image:
        rgb = np.asarray(image.convert("RGB").resize((160, 160)))
    for _ in range(7):
        writer.write(np.ascontiguousarray(rgb[..., ::-1]))
    writer.release()
    done = run(EXAMPLES / "camera.py", workspace.int8_model, "--film", film, "--every", "3")
    assert done.returncode == 0, done.stderr
    assert [line["label"] for line in lines_of(done.stdout)] == ["3", "3", "3"]
    gone = run(EXAMPLES / "camera.py", workspace.int8_model, "--film", tmp_path / "none.avi")
    assert gone.returncode == 1
    assert "OpenCV cannot open" in gone.stderr


# It has what the example uses of picamera2, which runs on a Raspberry Pi only, and fails as one that is unplugged.
PICAMERA2 = """
import os
import numpy as np
from PIL import Image

class Picamera2:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        os.write(1, b"closed\\n")  # in one piece: the main thread prints too
    def create_video_configuration(self, main):
        return main
    def configure(self, main):
        self.size, self.left = main["size"], 1
        assert main["format"] == "RGB888"
    def start(self):
        pass
    def capture_array(self, name):
        if not self.left:
            raise RuntimeError("Camera frontend has timed out!")
        self.left -= 1
        return np.asarray(Image.open("image.png").convert("RGB").resize(self.size))[..., ::-1]
"""


def test_the_camera_of_a_raspberry_pi_is_read_and_let_go_when_it_fails(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picamera2.py").write_text(PICAMERA2)
    shutil.copy(images_of(workspace, "3")[0], tmp_path / "image.png")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(EXAMPLES / "camera.py", workspace.int8_model, "--picamera2", environment={"PYTHONPATH": path})
    answers = [line for line in done.stdout.splitlines() if line != "closed"]
    assert [line["label"] for line in lines_of("\n".join(answers))] == ["3"]
    assert "closed" in done.stdout.splitlines()
    assert done.returncode == 1
    assert "timed out" in done.stderr
    assert "Traceback" not in done.stderr


# The unit


def test_the_unit_starts_what_is_there_and_locks_it_in(tmp_path: Path) -> None:
    folder = EXAMPLES / "service"
    text = (folder / "vit-edge.service").read_text(encoding="utf-8")
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    service = unit["Service"]
    words = service["ExecStart"].split()
    module, attribute = words[words.index("uvicorn") + 1].split(":")
    assert f"{attribute} = FastAPI(" in (folder / f"{module}.py").read_text(encoding="utf-8")
    assert {key: service[key] for key in ("NoNewPrivileges", "DynamicUser", "ProtectSystem", "Restart")} == {
        "NoNewPrivileges": "yes",
        "DynamicUser": "yes",
        "ProtectSystem": "strict",
        "Restart": "on-failure",
    }
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit was only parsed")
    (tmp_path / "vit-edge.service").write_text(text.replace(words[0], sys.executable))
    done = run_tool("systemd-analyze", "verify", tmp_path / "vit-edge.service")
    assert (done.returncode, done.stderr) == (0, "")


def run_tool(*command: str | Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_settings_shown_are_those_that_the_service_reads() -> None:
    folder = EXAMPLES / "service"
    shown = [line.split("=")[0] for line in (folder / "vit-edge.env").read_text().splitlines() if "=" in line]
    read, explained = (folder / "app.py").read_text(), (folder / "README.md").read_text()
    assert [name for name in shown if f'"{name}"' not in read] == []
    assert [name for name in set(shown) if f"`{name}`" not in explained] == []
