"""What runs inside an application made by `vit-edge bundle`: this file is its `__main__.py`.

The imports above the functions are the standard library's, so that it can say which packages are missing.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import json
import logging
import os
import sys
import traceback
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_edge.errors import VitEdgeError
    from vit_edge.runtime.classifier import Classifier

__all__ = ["ABOUT", "FALLBACK", "FOLDER", "SCHEMA", "main"]

SCHEMA = 1
# No package may be shadowed by the folders of the archive, which lies first on sys.path: all but ours is in this one.
FOLDER = "vit_edge_app"
ABOUT, FALLBACK = f"{FOLDER}/app.json", f"{FOLDER}/fallback"
_PACKAGES = {"numpy": "numpy", "PIL": "Pillow"}
_OLDEST_PYTHON = (3, 10)


def main(app: Path, arguments: Sequence[str] | None = None) -> int:
    """Classify images with the model in the application at `app`; returns the exit code, as `vit-edge` has them."""
    from vit_edge.errors import Interrupted, ResourceExhausted, VitEdgeError

    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        about = json.loads(_member(app, ABOUT))
        options = _parser(about, app.name).parse_args(arguments)
        code = _run(app, about, options)
        sys.stdout.flush()
    except VitEdgeError as error:
        return _fail(error, as_json=as_json)
    except KeyboardInterrupt:
        stopped = Interrupted("stopped", reason="interrupted by the user", remedy="run it again")
        return _fail(stopped, as_json=as_json)
    except MemoryError:
        out = ResourceExhausted("cannot go on", reason="memory ran out", remedy="free some memory")
        return _fail(out, as_json=as_json)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left cannot be written either
        if error.errno == errno.EPIPE:  # the reader went away (`| head`): nothing is wrong
            return 0
        full = ResourceExhausted("cannot write the predictions", reason=str(error), remedy="free some space")
        return _fail(full, as_json=False)
    return code


def _parser(about: Mapping[str, Any], name: str) -> argparse.ArgumentParser:
    height, width = about["input"]
    inside = f"{about['name']}, {about['labels']} labels, {about['precision']}, {height}x{width} pixels"
    parser = argparse.ArgumentParser(
        prog=name,
        description=f"Name what images show. Inside: {inside} (SHA-256 {about['sha256'][:12]}; "
        f"vit-edge {about['vit_edge']}).",
        epilog="Needs Python 3.10, numpy, Pillow and " + " or ".join(about["engines"]) + ". Exit codes: 0 done, "
        "2 usage, 3 an image cannot be used, 4 not trusted, 5 memory, 6 verification, 7 engine or package missing.",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="JPEG, PNG, WEBP, BMP or TIFF")
    parser.add_argument("--top", type=int, default=3, help="answers for each image (default: 3)")
    parser.add_argument("--engine", default="auto", help=f"auto, {' or '.join(about['engines'])} (default: auto)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, help="default: the CPUs that the container grants")
    parser.add_argument("--allow-fallback", action="store_true", help="take the CPU where the device is not here")
    parser.add_argument("--describe", action="store_true", help="say what runs: engine, device, precision, target")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run(app: Path, about: Mapping[str, Any], options: argparse.Namespace) -> int:
    from vit_edge.errors import UsageError

    if options.top < 1:
        raise UsageError("cannot classify", reason=f"--top is {options.top}", remedy="give 1 or more")
    if not options.images and not options.describe:
        raise UsageError("cannot classify", reason="no image is given", remedy="give images, or --describe")
    from vit_edge.errors import escaped

    _require_packages(app, about, options.engine)
    _find_protobuf(app)
    images: list[dict[str, Any]] = []
    rejected: list[VitEdgeError] = []
    with _warnings() as warnings, _load(app, about, options) as classifier:
        described = classifier.describe()
        if options.describe and not options.json:
            _print(escaped("\n".join(f"{key}: {value}" for key, value in described.items())))
        for image in options.images:
            _classify(classifier, image, options, images=images, rejected=rejected)
    if options.json:
        failed = [{"file": error.file, "reason": error.reason} for error in rejected]
        error = {"error": _fields(rejected[0])} if rejected else {}
        _print_json({"model": described, "images": images, "rejected": failed, **error, "warnings": warnings})
    return rejected[0].exit_code if rejected else 0


def _classify(
    classifier: Classifier,
    image: str,
    options: argparse.Namespace,
    *,
    images: list[dict[str, Any]],
    rejected: list[VitEdgeError],
) -> None:
    from vit_edge.errors import ImageRejected, escaped, printable

    try:
        prediction = classifier(image, top=options.top)
    except ImageRejected as error:
        sys.stderr.write(f"error: {error}\n")
        rejected.append(error)
        return
    images.append({"file": printable(image), **prediction.to_dict()})
    if not options.json:
        answers = prediction.text
        _print(escaped(f"{printable(image)}: {answers}"))


def _load(app: Path, about: Mapping[str, Any], options: argparse.Namespace) -> Classifier:
    """Return the classifier, from the bytes in the archive, checked as every load is."""
    from dataclasses import replace

    from vit_edge.errors import VitEdgeError, printable
    from vit_edge.model_file.artifact import open_model
    from vit_edge.model_file.openvino_ir import open_ir
    from vit_edge.runtime.checks.load_policy import NO_SANDBOX
    from vit_edge.runtime.classifier import as_classifier
    from vit_edge.runtime.engines.protocol import EngineOptions, refuse_null
    from vit_edge.runtime.loading import load_model

    refuse_null(options.engine)
    chosen = EngineOptions(
        device=options.device, threads=options.threads, allow_fallback=options.allow_fallback
    )  # before the model is read: a wrong option is said at once
    name = f"{printable(app)}/{about['model']}"
    data = _member(app, about["model"])
    weights = _member(app, about["weights"]) if about["weights"] else None
    try:
        if weights is not None and about["model"].endswith(".xml"):
            ir = replace(open_ir(data, weights=weights), source=name)
            return as_classifier(load_model(ir, engine="openvino", options=chosen, policy=NO_SANDBOX), name)
        model = replace(open_model(data, weights=weights), source=name)
        return as_classifier(load_model(model, engine=options.engine, options=chosen, policy=NO_SANDBOX), name)
    except VitEdgeError as error:
        if error.file == "the bytes given":
            error.file = name
        raise


def _member(app: Path, name: str) -> bytes:
    from vit_edge.errors import NotTrusted

    try:
        with zipfile.ZipFile(app) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        reason = f"{name} in it was changed or damaged ({error})"
        raise NotTrusted("will not run the application", file=app, reason=reason, remedy="copy it again") from error


def _require_packages(app: Path, about: Mapping[str, Any], engine: str) -> None:
    """Raise MissingExtra that names everything that is missing at once, and the one command that installs it."""
    from vit_edge.errors import MissingExtra

    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    engines = [engine] if engine in about["engines"] else about["engines"]
    reasons = list(missing)
    if not any(importlib.util.find_spec(name) for name in engines):
        missing.append(engines[0])
        reasons.append(" or ".join(engines))
    if missing:
        reason, remedy = f"not installed: {', '.join(reasons)}", f"pip install {' '.join(missing)}"
        raise MissingExtra("cannot run", file=app, reason=reason, remedy=remedy)


def _find_protobuf(app: Path) -> None:
    """Let `google.protobuf` be imported: the one that is installed, else the pure-Python one in the archive."""
    from vit_edge.errors import MissingExtra

    try:
        importlib.import_module("google.protobuf")
    except ImportError:
        sys.path.append(os.path.join(app, *FALLBACK.split("/")))  # noqa: PTH118 - sys.path holds texts
        importlib.invalidate_caches()
    remedy = 'pip install --upgrade "protobuf>=4.25"'
    try:
        factory = importlib.import_module("google.protobuf.message_factory")
    except ImportError as error:
        raise MissingExtra("cannot run", file=app, reason=str(error), remedy=remedy) from error
    if not hasattr(factory, "GetMessageClass"):  # since 4.22; a second one would break what else imports it
        version = importlib.import_module("google.protobuf").__version__
        reason = f"the protobuf installed here, {version}, is too old"
        raise MissingExtra("cannot run", file=app, reason=reason, remedy=remedy)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        sys.stderr.write(f"{record.levelname.lower()}: {record.getMessage()}\n")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Write what the runtime warns of to stderr, and yield the list that it is kept in."""
    logger, collector = logging.getLogger("vit_edge"), _Collector()
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)


def _fail(error: VitEdgeError, *, as_json: bool) -> int:
    if as_json:
        _print_json({"error": _fields(error), "warnings": []})
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


def _fields(error: VitEdgeError) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in ("exit_code", "what", "file", "reason", "remedy")}
    return {"type": type(error).__name__, **fields}


def _print_json(values: Mapping[str, Any]) -> None:
    _print(json.dumps({"schema": SCHEMA, "command": "classify", **values}, ensure_ascii=False))


def _print(text: str) -> None:
    """Write a line to stdout; a character that its encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _damaged(app: Path) -> str | None:
    """Return which checksum of the code in the archive is wrong, None where all hold; the model has its seal."""
    try:
        with zipfile.ZipFile(app) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    archive.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        return f"it was changed or damaged ({error})"
    return None


def _start() -> int:
    app = Path(__file__).parent
    if sys.version_info < _OLDEST_PYTHON:
        sys.stderr.write(
            f"error: cannot run - {app} - this is Python {sys.version.split()[0]} - install 3.10 or newer\n"
        )
        return 7
    damaged = _damaged(app)
    if damaged:
        sys.stderr.write(f"error: will not run the application - {app} - {damaged} - copy it again\n")
        return 4
    try:
        return main(app)
    except Exception:
        traceback.print_exc()
        sys.stderr.write("error: this is a bug in vit-edge; please report the lines above\n")
        return 1


if __name__ == "__main__":
    sys.exit(_start())
