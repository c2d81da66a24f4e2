"""`vit-edge verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.errors import VerificationFailed, require
from vit_edge.metrics import BOUND_METHOD

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.export.verification import EngineResult, Verdict, Verification


@command("verify")
@file_argument("model")
@click.option("--reference", type=click.Path(path_type=Path), required=True, help="The float file MODEL was made from.")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Labelled pictures that calibrated nothing."
)
@click.option(
    "--max-drop",
    type=float,
    default=1.0,
    show_default=True,
    help="Points of top-1 that may be lost, at 95 % confidence.",
)
@click.option("--min-agreement", type=float, help="Percent of answers that must be those of the reference.")
@click.option(
    "--engine", "engines", multiple=True, help="onnxruntime or openvino, repeatable  [default: all installed]."
)
@threads_option()
def verify(
    model: Path,
    reference: Path,
    data: Path,
    max_drop: float,
    min_agreement: float | None,
    engines: tuple[str, ...],
    threads: int | None,
) -> Result:
    """Compare MODEL with its float reference on labelled pictures, in every engine.

    It passes where the drop of top-1 is at most --max-drop points with 95 % confidence, fails where the drop seen is
    larger, and is inconclusive where the pictures are too few to say. Exit code 0 on pass, else 6.

    \b
    Example:
      vit-edge verify model.int8.onnx --reference model.onnx --data pictures/test --max-drop 0.5
    """
    require("scipy", extra="export", what="verify")
    from vit_edge.export.verification import best_possible
    from vit_edge.export.verification import verify as run

    num_images, best = best_possible(data, reference)
    if not click.get_current_context().meta["quiet"]:
        said = f"{num_images} pictures can certify a drop of {best:.2f} points at best; asked: {max_drop:g}"
        click.echo(said, err=True)
    with progress_bar() as progress:
        result = run(
            model,
            reference=reference,
            data=data,
            max_drop_points=max_drop,
            min_agreement=min_agreement,
            engines=engines,
            threads=threads,
            progress=progress,
        )
    shown = [verification_table(result), f"bound: {BOUND_METHOD}", f"verdict: {result.verdict}"]
    return Result(data=verification_data(result), shown=shown, error=_failure(result, model))


def verification_data(result: Verification) -> dict[str, Any]:
    """Return the verification as JSON-ready values: the deciding engine's figures on top, all engines below."""
    return {
        **_engine_data(result.decisive),
        "verdict": result.verdict,
        "max_drop_points": result.max_drop_points,
        "min_agreement": result.min_agreement,
        "best_certifiable_points": result.best_certifiable_points,
        "bound_method": BOUND_METHOD,
        "data_sha256": result.data_sha256,
        "results": [_engine_data(entry) for entry in result.results],
    }


def verification_table(result: Verification) -> Table:
    """Return one row for each engine, with the verdict."""
    verdicts = [r.verdict for r in result.results]
    return figures_table(result, more={"verdict": verdicts})


def figures_data(result: Verification) -> list[dict[str, Any]]:
    """Return each engine's figures as JSON-ready values, without a verdict on a budget."""
    dropped = ("verdict", "images_needed")
    return [{key: v for key, v in _engine_data(r).items() if key not in dropped} for r in result.results]


def figures_table(result: Verification, *, more: dict[str, list[Verdict]] | None = None) -> Table:
    """Return one row for each engine; `more` are columns to add."""
    more = more or {}
    rows = [
        (
            r.engine,
            f"{r.reference_top1:.2f} %",
            f"{r.candidate_top1:.2f} %",
            f"{r.drop_points:.2f}",
            f"{r.drop_upper_bound_points:.2f}",
            f"{r.agreement:.2f} % ({r.agreement_interval[0]:.1f} to {r.agreement_interval[1]:.1f})",
            f"{r.sqnr_db:.1f}",
            *(column[position] for column in more.values()),
        )
        for position, r in enumerate(result.results)
    ]
    columns = ("engine", "float top-1", "top-1", "drop, points", "bound, 95 %", "agreement", "SQNR dB", *more)
    return make_table(f"On {result.results[0].images} labelled pictures", columns, rows)


def _engine_data(entry: EngineResult) -> dict[str, Any]:
    fields = asdict(entry)
    fields["reference"] = {"top1": fields.pop("reference_top1")}
    fields["candidate"] = {"top1": fields.pop("candidate_top1")}
    return fields


def _failure(result: Verification, model: Path) -> VerificationFailed | None:
    worst = result.decisive
    if result.verdict == "pass":
        return None
    if result.verdict == "inconclusive":
        bound = f"{worst.drop_upper_bound_points:.2f} points, not at {result.max_drop_points:g}"
        reason = f"{worst.images} pictures bound the drop at {bound}"
        needed = f"about {worst.images_needed:,}" if worst.images_needed else "many more"
        remedy = f"give {needed} labelled pictures, or a larger --max-drop"
        return VerificationFailed("verification is inconclusive", file=model, reason=reason, remedy=remedy)
    reason = f"in {worst.engine} the drop is {worst.drop_points:.2f} points (at most {result.max_drop_points:g})"
    if result.min_agreement is not None:
        reason += f", agreement {worst.agreement:.2f} % (at least {result.min_agreement:g})"
    remedy = "quantize again with more or better calibration pictures"
    return VerificationFailed("verification failed", file=model, reason=reason, remedy=remedy)
