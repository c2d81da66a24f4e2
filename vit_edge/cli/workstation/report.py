"""`vit-edge report`."""

from __future__ import annotations

from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument, progress_bar
from vit_edge.errors import UsageError, printable, require

_PATH = click.Path(path_type=Path)
_PAGE, _CARD = Path("report.html"), Path("README.md")


@command("report")
@file_argument("results", many=True)
@click.option("-o", "--out", type=_PATH, help=f"Write to this file  [default: {_PAGE}; for a model card {_CARD}].")
@click.option("--title", help="Title of the page  [default: the names of the models].")
@click.option("--data", type=_PATH, metavar="DIR", help="Folder of the evaluation images, if they moved.")
@click.option(
    "--max-flips",
    type=click.IntRange(0, 1000),
    help="Show at most this many changed predictions as images  [default: 24].",
)
@click.option("--model-card", is_flag=True, help="Write a Hugging Face README.md with YAML and model-index instead.")
@click.option(
    "--license", "license_", metavar="NAME", help="With --model-card: license of the weights, if no file has one."
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def report(
    results: tuple[Path, ...],
    out: Path | None,
    title: str | None,
    data: Path | None,
    max_flips: int | None,
    model_card: bool,
    license_: str | None,
    force: bool,
) -> Result:
    """Write one page about RESULTS: output of commands with --json, deployments, model files and images.

    The page needs no network and no script. With a verification and both its model files it shows the images whose
    prediction changed, and the attention of both models.

    \b
    Examples:
      vit-edge verify model.int8.onnx --reference model.onnx \\
        --data images/test --json > verified.json
      vit-edge benchmark model.onnx model.int8.onnx --save speed.json
      vit-edge report verified.json speed.json model.onnx model.int8.onnx \\
        -o report.html
      vit-edge report deploy/ --model-card --license apache-2.0 -o README.md
    """
    require("jinja2", extra="export", what="report")
    from vit_edge.report import write_model_card, write_report
    from vit_edge.report.page import MOST_FLIPS

    _check(model_card, {"--title": title, "--data": data, "--max-flips": max_flips}, {"--license": license_})
    if model_card:
        written = write_model_card(results, out=out or _CARD, license=license_, force=force)
    else:
        most_flips = MOST_FLIPS if max_flips is None else max_flips
        with progress_bar() as progress:
            written = write_report(
                results, out=out or _PAGE, title=title, data=data, most_flips=most_flips, force=force, progress=progress
            )
    path, kind = printable(written), "model card" if model_card else "report"
    size_bytes = written.stat().st_size
    shown = [f"{kind}: {path} ({size_bytes / 1e6:.2f} MB)"]
    return Result(data={"file": path, "kind": kind, "size_bytes": size_bytes}, shown=shown)


def _check(model_card: bool, of_page: dict[str, object], of_card: dict[str, object]) -> None:
    """Raise UsageError if an option belongs to the other of the two."""
    for name, value in (of_page if model_card else of_card).items():
        if value is not None:
            reason = f"{name} {'does not go' if model_card else 'only goes'} with --model-card"
            raise UsageError("cannot report", reason=reason, remedy=f"leave out {name}")
