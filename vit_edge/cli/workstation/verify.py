"""`vit-edge verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.device.remote import Remote, merged, on_devices, ran_on
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.cli.workstation.explain import explain_options, explained, image_target, prepare
from vit_edge.errors import UsageError, VerificationFailed, printable, require
from vit_edge.metrics import AGREEMENT_METHOD, BOUND_METHOD

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.export.verification.verdict import Budget, Outlook
    from vit_edge.export.verification.verifier import EngineResult, Labels, Verdict, Verification

_FLIPS = Path("flips.csv")
_NUM_SHOWN = 20


@command("verify")
@file_argument("model")
@click.option("--reference", type=click.Path(path_type=Path), required=True, help="The float file MODEL was made from.")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Images that calibrated nothing, labelled or not."
)
@click.option(
    "--max-drop",
    type=float,
    help="Points of top-1 that may be lost, at 95 % confidence  [default: 1; without labels, none if --min-agreement].",
)
@click.option(
    "--min-agreement", type=float, help="Percent of answers that must be those of the reference, at 95 % confidence."
)
@click.option("--unlabelled", is_flag=True, help="Take the images without their labels.")
@click.option(
    "--flips", type=click.Path(path_type=Path), help="The labels of the changed answers, filled in where verify asked."
)
@click.option(
    "--flips-out",
    type=click.Path(path_type=Path),
    help="Where to write the changed answers to be labelled; labels given with --flips are taken over"
    f"  [default, without labels: {_FLIPS}].",
)
@click.option("--force", is_flag=True, help="Replace layers.png, or a flips file in which no label is filled in.")
@click.option(
    "--engine", "engines", multiple=True, help="onnxruntime or openvino, repeatable  [default: all installed]."
)
@threads_option()
@explain_options
@on_devices(own=True)
def verify(
    model: Path,
    reference: Path,
    data: Path,
    max_drop: float | None,
    min_agreement: float | None,
    unlabelled: bool,
    flips: Path | None,
    flips_out: Path | None,
    force: bool,
    engines: tuple[str, ...],
    threads: int | None,
    remote: Remote | None,
    **explaining: Any,
) -> Result:
    """Compare MODEL with its float reference on the same images, in every engine.

    It passes where the drop of top-1 is at most --max-drop points with 95 % confidence, fails where the drop seen is
    larger, and is inconclusive where the images are too few to say. Exit code 0 on pass, else 6.

    Images without labels do: only those whose answer changes count. They are written to flips.csv; fill in their
    labels and run again with --flips.

    --explain runs some of the images through every form of the network that is at hand: torch and plain ONNX with
    --checkpoint, REF, each algorithm with --calibration, MODEL in each engine; and it times each layer. The layers are
    also drawn, in layers.png.

    With --on MODEL answers on a device, its reference and the statistics run here.

    \b
    Examples:
      vit-edge verify model.int8.onnx --reference model.onnx --data images/test --max-drop 0.5
      vit-edge verify model.int8.onnx --reference model.onnx --data loose --max-drop 0.5
      vit-edge verify model.int8.onnx --reference model.onnx --data loose --max-drop 0.5 --flips flips.csv
      vit-edge verify model.int8.onnx --reference model.onnx --data images/test --explain --calibration images/train
    """
    require("scipy", extra="export", what="verify")
    from vit_edge.export.verification.verifier import certifiable
    from vit_edge.export.verification.verifier import verify as run

    asked: dict[str, Any] = {"max_drop_points": max_drop, "min_agreement": min_agreement}
    labels, budget, at_best = certifiable(data, reference, **asked, unlabelled=unlabelled, flips=flips is not None)
    target = _flips_target(flips_out, labels, budget, force=force)
    image = image_target(explaining, force=force)
    if not click.get_current_context().meta["quiet"]:
        click.echo(outlook_text(at_best, budget, labels), err=True)
    judged: dict[str, Any] = {**asked, "unlabelled": unlabelled, "flips": flips, "carry_labels": flips_out is not None}
    if remote is not None:
        given = {"reference": reference, "data": data, **judged}
        return _on_devices(
            remote, model, given, explaining, engines=engines, threads=threads, target=target, force=force
        )
    common: dict[str, Any] = {"reference": reference, "data": data, "engines": engines, "threads": threads}
    with progress_bar() as progress:
        common["progress"] = progress
        prepared = prepare(model, explaining, **common, unlabelled=labels != "all")
        result = run(model, **common, **judged)
    told = _told(result, model, flips=flips, written=_written(result, target, force=force))
    return told if prepared is None or image is None else explained(prepared, image, told)


def _written(result: Verification, target: Path | None, *, force: bool) -> Path | None:
    """Write the changed answers where some changed and a file is wanted; returns the file."""
    from vit_edge.export.verification.verifier import write_flips

    if target is None or not any(r.changed for r in result.results):
        return None
    write_flips(result, target, force=force)
    return target


def _on_devices(
    remote: Remote,
    model: Path,
    given: dict[str, Any],
    explaining: dict[str, Any],
    *,
    engines: tuple[str, ...],
    threads: int | None,
    target: Path | None,
    force: bool,
) -> Result:
    """Verify on each device; flips are written of one device alone."""
    from vit_edge.cli.workstation.verify_there import verify_there

    if explaining["explain"]:
        raise UsageError("cannot explain on a device", reason="--explain runs here", remedy="leave out --on")
    shown: list[Any] = []
    found = verify_there(remote, model, asked=given, engines=engines, threads=threads)
    for outcome, result in found:
        if result is None:
            continue
        written = _written(result, target, force=force) if len(found) == 1 else None
        told = _told(result, model, flips=given["flips"], written=written)
        outcome.value, outcome.error = told.data, told.error
        shown += [f"on {ran_on(outcome)}:", *told.shown]
    return merged([outcome for outcome, _ in found], shown)


def _told(result: Verification, model: Path, *, flips: Path | None, written: Path | None) -> Result:
    shown = [*_tables(result), *_remarks(result, written), f"verdict: {result.verdict}"]
    files = {"model": printable(model), "flips_file": None if written is None else printable(written)}
    fields = {**verification_data(result), **files}
    return Result(data=fields, shown=shown, error=_failure(result, model, written or flips))


def verification_data(result: Verification) -> dict[str, Any]:
    """Return the verification as JSON-ready values: the deciding engine's figures on top, all engines below."""
    return {
        **_engine_data(result.decisive),
        "verdict": result.verdict,
        "labels": result.labels,
        "max_drop_points": result.max_drop_points,
        "min_agreement": result.min_agreement,
        "best_certifiable_points": result.at_best.best_points,
        "best_certifiable_agreement": result.at_best.best_agreement,
        "too_few_images": result.at_best.too_few,
        "images_needed_at_best": result.at_best.images_needed,
        "bound_method": BOUND_METHOD,
        "agreement_method": AGREEMENT_METHOD,
        "data": printable(result.data),
        "data_sha256": result.data_sha256,
        "models_sha256": result.models_sha256,
        "near_copies": list(result.near_copies),
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
            _two_percentages(r.reference_top1, r.candidate_top1),
            _two_percentages(r.reference_top5, r.candidate_top5),
            f"{'at most ' if r.unlabelled else ''}{r.drop_points:.2f}",
            f"{r.drop_upper_bound_points:.2f}",
            f"{r.worse} / {r.better}",
            "-" if r.mcnemar_p is None else f"{r.mcnemar_p:.3g}",
            f"{r.agreement:.2f} % ({r.agreement_interval[0]:.1f} to {r.agreement_interval[1]:.1f})",
            f"{r.sqnr_db:.1f}",
            *(column[position] for column in more.values()),
        )
        for position, r in enumerate(result.results)
    ]
    columns = ("engine", "top-1 float, this", "top-5 float, this", "drop, points", "bound, 95 %", "worse / better")
    title = f"On {result.results[0].images} {'labelled ' if result.labels == 'all' else ''}images"
    return make_table(title, (*columns, "McNemar p", "agreement", "SQNR dB", *more), rows)


def _two_percentages(reference: float | None, candidate: float | None) -> str:
    return "-" if reference is None or candidate is None else f"{reference:.2f} %, {candidate:.2f} %"


def _tables(result: Verification) -> list[Any]:
    """Return the tables for people: engines, the classes that lost most, the answers that changed."""
    worst = result.decisive
    shown: list[Any] = [verification_table(result)]
    if worst.worst_classes:
        rows = [(c.label, c.lost, c.images, c.reference_right, c.candidate_right) for c in worst.worst_classes]
        columns = ("class", "lost", "images", "right, float", "right, this")
        cells = [tuple("-" if value is None else value for value in row) for row in rows[:_NUM_SHOWN]]
        shown.append(make_table(f"Classes that lost most, in {worst.engine}", columns, cells))
    if worst.changed:
        order = ("worse", None, "neither", "better")
        first = sorted(worst.changed, key=lambda change: order.index(change.effect))[:_NUM_SHOWN]
        rows_ = [
            (c.path, c.reference, c.candidate, f"{c.reference_margin:.2f}", f"{c.candidate_margin:.2f}",
             c.label or "-", c.effect or "-")
            for c in first
        ]  # fmt: skip
        more = f", {len(first)} of {len(worst.changed)}; all with --json" if len(first) < len(worst.changed) else ""
        columns_ = ("image", "float says", "this says", "margin, float", "margin, this", "label", "effect")
        shown.append(make_table(f"Answers that changed in {worst.engine}{more}", columns_, rows_))
    return shown


def _remarks(result: Verification, written: Path | None) -> list[str]:
    """Return what has to be said beside the figures."""
    said = [f"bound: {BOUND_METHOD}", f"agreement: {AGREEMENT_METHOD}"]
    if written is not None:
        num = len({change.pixels_sha256 for r in result.results for change in r.changed})
        said.append(
            f"flips: {num} images whose answer changed are in {written}, {result.num_unlabelled} to be labelled"
        )
    if result.labels == "none" and not any(r.changed for r in result.results):
        said.append("not one answer changed: no label is needed")
    elif result.num_unlabelled and result.verdict == "pass" and result.max_drop_points is not None:
        said.append(f"within the budget even if each of the {result.num_unlabelled} without a label is lost")
    elif result.num_unlabelled:
        said.append(f"{result.num_unlabelled} changed answers have no label and count as lost")
    return said


def _engine_data(entry: EngineResult) -> dict[str, Any]:
    fields = asdict(entry)
    for name in ("reference", "candidate"):
        fields[name] = {"top1": fields.pop(f"{name}_top1"), "top5": fields.pop(f"{name}_top5")}
    return fields


def _flips_target(flips_out: Path | None, labels: Labels, budget: Budget, *, force: bool) -> Path | None:
    """Return where flips will be written, if they will; refused before any work is done."""
    from vit_edge.export.verification.flips import may_write_flips

    if labels == "all" and flips_out is not None:
        remedy = "leave out --flips-out, or add --unlabelled"
        raise UsageError("cannot write flips", reason="the images have labels: none is missing", remedy=remedy)
    if flips_out is None and labels == "none" and budget.max_drop_points is not None:
        flips_out = _FLIPS
    return None if flips_out is None else may_write_flips(flips_out, force=force)


def outlook_text(at_best: Outlook, budget: Budget, labels: Labels) -> str:
    """Return what the images can certify at best, and whether that is enough."""
    kind = "unlabelled images" if labels == "none" else "images"
    certified = []
    if budget.max_drop_points is not None:
        certified.append(f"a drop of {at_best.best_points:.2f} points at best; asked: {budget.max_drop_points:g}")
    if budget.min_agreement is not None:
        certified.append(f"an agreement of {at_best.best_agreement:.2f} % at best; asked: {budget.min_agreement:g}")
    text = f"{at_best.images} {kind} can certify {', and '.join(certified)}"
    if not at_best.too_few:
        return text
    return f"{text}\neven an unchanged model could not pass with so few: {_at_least(at_best)} are needed"


def _at_least(at_best: Outlook) -> str:
    return "more than a million" if at_best.images_needed is None else f"at least {at_best.images_needed:,}"


def _failure(result: Verification, model: Path, flips: Path | None) -> VerificationFailed | None:
    worst = result.decisive
    if result.verdict == "pass":
        return None
    if result.verdict == "inconclusive":
        reason, remedy = _inconclusive(result, worst, flips)
        return VerificationFailed("verification is inconclusive", file=model, reason=reason, remedy=remedy)
    said = []
    if result.max_drop_points is not None:
        said.append(f"the drop is {worst.drop_points:.2f} points (at most {result.max_drop_points:g})")
    if result.min_agreement is not None:
        said.append(f"the agreement is {worst.agreement:.2f} % (at least {result.min_agreement:g})")
    remedy = "quantize again with more or better calibration images"
    reason = f"in {worst.engine} {', '.join(said)}"
    return VerificationFailed("verification failed", file=model, reason=reason, remedy=remedy)


def _inconclusive(result: Verification, worst: EngineResult, flips: Path | None) -> tuple[str, str]:
    """Return why nothing can be said yet, and what would settle it."""
    drop, agreement = result.max_drop_points, result.min_agreement
    said = []
    if drop is not None and worst.drop_upper_bound_points > drop:
        said.append(f"bound the drop at {worst.drop_upper_bound_points:.2f} points, not at {drop:g}")
    if agreement is not None and worst.agreement_lower_bound < agreement:
        said.append(f"bound the agreement at {worst.agreement_lower_bound:.2f} %, not at {agreement:g}")
    reason = f"in {worst.engine} {worst.images} images {' and '.join(said)}"
    if result.at_best.too_few:
        reason += "; even an unchanged model could not pass with so few"
        return reason, f"give {_at_least(result.at_best)} images, or ask for less"
    if drop is not None and worst.unlabelled and worst.drop_upper_bound_points > drop:
        file = flips or _FLIPS
        reason += f", each of the {worst.unlabelled} changed answers without a label counted as lost"
        return reason, f"fill in the {result.num_unlabelled} labels in {file} and run again with --flips {file}"
    needed = f"about {worst.images_needed:,}" if worst.images_needed else "many more"
    return reason, f"give {needed} images, or ask for less"
