"""Classify what a camera sees: one line of JSON for each frame that there was time for, until it ends or Ctrl-C.

    pip install "vit-edge[onnxruntime]" opencv-python-headless        # a USB camera, or a film
    python examples/camera.py model.int8.onnx --camera 0
    python examples/camera.py model.int8.onnx --film film.mp4 --every 30

    sudo apt install python3-picamera2                                # a camera module of a Raspberry Pi
    python3 -m venv --system-site-packages venv                       # picamera2 comes with the system, not with pip
    venv/bin/pip install "vit-edge[onnxruntime]"
    venv/bin/python examples/camera.py model.int8.onnx --picamera2

`classify_frames` takes frames from anywhere: any iterable of uint8 arrays [height, width, 3 or 4], and the order of
their channels. A network that gets BGR for RGB answers wrongly without an error, and the names mislead:

    source                       channels in memory     color
    OpenCV                       B G R                  "bgr"
    picamera2 "RGB888"           B G R                  "bgr"
    picamera2 "BGR888"           R G B                  "rgb"
    picamera2 "XRGB8888"         B G R X                "bgr" of frame[..., :3]
    picamera2 "XBGR8888"         R G B X                "rgb" of frame[..., :3]

X is padding of any value, no alpha. Frames that do have alpha are "bgra" or "rgba"; they are shown on white.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vit_edge.errors import VitEdgeError
from vit_edge.image import Color
from vit_edge.runtime import Classifier, Prediction, load

Frame = npt.NDArray[np.uint8]
# How long the end waits for a camera that gives no frame any more.
_PATIENCE_S = 2.0


def classify_frames(
    classifier: Classifier, frames: Iterable[Frame], *, color: Color, every: int = 1
) -> Iterator[Prediction]:
    """Yield a prediction for the first frame and every `every`-th after it; ends when the frames do."""
    if every < 1:
        raise ValueError(f"every is {every}; give 1 for each frame, 2 for every other")
    for number, frame in enumerate(frames):
        if number % every == 0:
            yield classifier(frame, color=color)


class Newest:
    """The newest of `frames` each time one is asked for: what came and went meanwhile is dropped, and counted.

    A camera does not wait. Read in turn, the frames of one that is faster than the network pile up in its driver, and
    every answer is about an older one than the last.
    """

    def __init__(self, frames: Iterable[Frame]) -> None:
        self.dropped = 0
        self._frames = frames
        self._slot: deque[Frame] = deque(maxlen=1)
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Frame]:
        reader = threading.Thread(target=self._read, name="camera", daemon=True)
        reader.start()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._slot or self._ended)
                    if not self._slot:
                        break
                    frame = self._slot.pop()
                yield frame
        finally:
            self._stopped = True
            reader.join(_PATIENCE_S)
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        try:
            for frame in self._frames:
                with self._changed:
                    self.dropped += len(self._slot)
                    self._slot.append(frame)
                    self._changed.notify()
                if self._stopped:
                    break
        except BaseException as error:  # it is raised where the frames are used
            self._error = error
        close = getattr(self._frames, "close", None)  # a generator's: it lets go of the camera
        if close is not None:
            close()
        with self._changed:
            self._ended = True
            self._changed.notify()


def opencv_frames(source: int | str) -> Iterator[Frame]:
    """Yield BGR frames of the camera with this number, or of the film at this path, until there are no more."""
    import cv2

    capture = cv2.VideoCapture(source)
    try:
        if not capture.isOpened():
            raise OSError(f"OpenCV cannot open {source!r}")
        while True:
            was_read, frame = capture.read()
            if not was_read:  # the film is over, or the camera was unplugged
                return
            yield frame
    finally:
        capture.release()


def picamera2_frames(width: int = 640, height: int = 480) -> Iterator[Frame]:
    """Yield frames of a Raspberry Pi's camera, BGR in spite of the format's name, until it fails."""
    from picamera2 import Picamera2

    with Picamera2() as camera:
        camera.configure(camera.create_video_configuration(main={"format": "RGB888", "size": (width, height)}))
        camera.start()
        while True:
            yield camera.capture_array("main")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model file made by vit-edge")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--camera", type=int, metavar="NUMBER", help="a camera that OpenCV can open, 0 for the first")
    source.add_argument("--picamera2", action="store_true", help="the camera module of a Raspberry Pi")
    source.add_argument("--film", metavar="FILE", help="a film that OpenCV can read; none of its frames is dropped")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="classify every N-th frame only (1)")
    parser.add_argument("--threads", type=int, help="of the engine; by default what the machine grants")
    arguments = parser.parse_args()
    frames: Iterable[Frame]
    if arguments.film is not None:
        frames = opencv_frames(arguments.film)
    else:
        frames = Newest(picamera2_frames() if arguments.picamera2 else opencv_frames(arguments.camera))
    try:
        with load(arguments.model, threads=arguments.threads) as classifier:
            for prediction in classify_frames(classifier, frames, color="bgr", every=arguments.every):
                total_ms = round(prediction.timings.total_ms, 3)
                answer = {"label": prediction.label, "probability": round(prediction.probability, 6)}
                print(json.dumps({**answer, "total_ms": total_ms}), flush=True)
    except KeyboardInterrupt:
        pass
    except VitEdgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"cannot watch the camera: {error}")


if __name__ == "__main__":
    main()
