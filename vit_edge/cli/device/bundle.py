"""`vit-edge bundle`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from vit_edge.cli.options import load_options, option_group
from vit_edge.cli.output import Result, command, file_argument, make_table, megabytes, progress_bar
from vit_edge.errors import UsageError, printable

_FOLDER = click.Path(path_type=Path, file_okay=False)
_platforms = option_group(
    "Other platforms",
    click.option("--c", "c_project", type=_FOLDER, metavar="DIR", help="Write a C project for OpenVINO to DIR."),
    click.option("--web", is_flag=True, help="Write a static site for browsers to the folder --out."),
    click.option(
        "--onnxruntime-web",
        type=_FOLDER,
        metavar="DIR",
        help="Installed onnxruntime-web for --web  [default: fetch with npm].",
    ),
)


@command("bundle")
@file_argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Application to write  [default: MODEL with .pyz].")
@click.option("--force", is_flag=True, help="Replace the application if it exists.")
@_platforms
@load_options
def bundle(
    model: Path, out: Path | None, force: bool, c_project: Path | None, web: bool, onnxruntime_web: Path | None
) -> Result:
    """Pack MODEL and the runtime into one file that any Python with an engine can run.

    The device needs Python 3.10, numpy, Pillow and onnxruntime or openvino, but not vit-edge.

    \b
    Examples:
      vit-edge bundle model.int8.onnx -o app.pyz
      python app.pyz image.jpg
      vit-edge bundle model.int8.onnx --web -o site/
      vit-edge bundle model.int8.onnx --c project/
    """
    if c_project is not None:
        if web or out is not None:
            reason = "--c names the folder to write, and --web writes another one"
            raise UsageError("cannot bundle", reason=reason, remedy="leave out --web and --out, or --c")
        return _project(model, c_project, force=force)
    if web:
        return _site(model, out, force=force, onnxruntime_web=onnxruntime_web)
    if onnxruntime_web is not None:
        remedy = "add --web"
        raise UsageError("cannot bundle", reason="--onnxruntime-web is for sites only", remedy=remedy)
    return _application(model, out, force=force)


def _application(model: Path, out: Path | None, *, force: bool) -> Result:
    from vit_edge.runtime.bundle.builder import bundle as make

    with progress_bar(f"checking {printable(model)}"):
        made = make(model, out=out, force=force)
    path = printable(made.path)
    rows = [
        ("size", megabytes(made.size_bytes)),
        ("checked in", _engines(made.checked_in)),
        ("protobuf inside", made.protobuf or "none: install protobuf on the device"),
    ]
    return Result(
        data={**asdict(made), "path": path},
        shown=[f"Wrote {path}; run it with: python {path} IMAGE...", make_table("", ("application", path), rows)],
    )


def _site(model: Path, out: Path | None, *, force: bool, onnxruntime_web: Path | None) -> Result:
    from vit_edge.runtime.bundle.site import bundle_site

    if out is None:
        raise UsageError("cannot bundle", reason="--web needs a folder to write", remedy="add --out DIR")
    with progress_bar(f"checking {printable(model)}"):
        made = bundle_site(model, out=out, force=force, onnxruntime_web=onnxruntime_web)
    path = printable(made.path)
    rows = [
        ("size", megabytes(made.size_bytes)),
        ("first visit", megabytes(made.first_visit_bytes)),
        ("onnxruntime-web", made.onnxruntime_web),
        ("checked in", _engines(made.checked_in)),
    ]
    try_it = f"python -m http.server --directory {path}"
    return Result(
        data={**asdict(made), "path": path},
        shown=[f"Wrote {path}; try it with: {try_it}", make_table("", ("site", path), rows)],
    )


def _project(model: Path, out: Path, *, force: bool) -> Result:
    from vit_edge.runtime.bundle.c_project import bundle_c_project

    with progress_bar(f"checking {printable(model)}"):
        made = bundle_c_project(model, out=out, force=force)
    path = printable(made.path)
    rows = [("size", megabytes(made.size_bytes)), ("checked in", _engines(made.checked_in))]
    return Result(
        data={**asdict(made), "path": path},
        shown=[f"Wrote {path}; README.md in it says how to build it", make_table("", ("C project", path), rows)],
    )


def _engines(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no engine: none that the file was validated in is installed"
