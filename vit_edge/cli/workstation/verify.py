"""`vit-edge verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.device.remote import Remote, merged, on_devices, ran_on
from vit_edge.cli.messages import print_message
from vit_edge.cli.options import load_options, option_group
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.cli.ray_options import ray_job, ray_options
from vit_edge.cli.workstation.encoder_figures import encoder_certifiable_text, encoder_result
from vit_edge.cli.workstation.engine_figures import deciding_engine, engines_table
from vit_edge.cli.workstation.score_figures import score_figures, terms_of
from vit_edge.errors import UsageError, VerificationFailed, printable, require

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.export.verification.encoder_results import AnyVerification
    from vit_edge.export.verification.request import Labels, VerificationRequest
    from vit_edge.export.verification.results import EngineResult, Verification
    from vit_edge.export.verification.verdict import Budget, Certifiable

__all__ = ["certifiable_text", "figures_data", "figures_table", "verification_data", "verify"]

_FLIPS = Path("flips.csv")
_NUM_SHOWN = 20
_PATH = click.Path(path_type=Path)


@command("verify")
@file_argument("model")
@click.option("--reference", type=_PATH, required=True, help="Float32 file that MODEL was made from.")
@click.option(
    "--data",
    type=_PATH,
    required=True,
    metavar="DIR",
    help="Evaluation images, with or without labels; must not overlap the calibration images.",
)
@click.option(
    "--max-drop",
    "max_drop_points",
    type=float,
    metavar="POINTS",
    help="Accept at most this drop of top-1, at 95 % confidence"
    "  [default: 1; without labels none if --min-agreement is given].",
)
@click.option(
    "--min-agreement",
    type=float,
    metavar="PERCENT",
    help="Accept if at least this share of predictions is unchanged, at 95 % confidence.",
)
@option_group(
    "Images without labels",
    click.option("--unlabelled", is_flag=True, help="Ignore the labels of the images."),
    click.option("--flips", type=_PATH, metavar="FILE", help="Use the labels filled in in this flips file."),
    click.option(
        "--flips-out",
        type=_PATH,
        metavar="FILE",
        help="Write the changed predictions here, to be labelled; keeps labels given with --flips"
        f"  [default, without labels: {_FLIPS}].",
    ),
    click.option("--force", is_flag=True, help="Replace a flips file in which no label is filled in."),
)
@option_group(
    "Encoders",
    click.option(
        "--min-neighbours",
        type=float,
        metavar="PERCENT",
        help="Accept if at least this share of each image's ten nearest neighbours stays the same, at 95 % confidence"
        "  [default: 90].",
    ),
)
@option_group(
    "Where it runs",
    click.option(
        "--engine",
        "engines",
        multiple=True,
        help="Verify in onnxruntime or openvino; repeatable  [default: all installed].",
    ),
    threads_option(),
)
@on_devices(own=True)
@load_options
@ray_options()
def verify(
    model: Path,
    flips: Path | None,
    flips_out: Path | None,
    force: bool,
    engines: tuple[str, ...],
    threads: int | None,
    remote: Remote | None,
    **values: Any,
) -> Result:
    """Compare MODEL with its float32 reference on the same images, in every engine.

    The verdict is `pass` if the drop of top-1 is at most --max-drop points with 95 % confidence, `fail` if the measured
    drop is larger, and `inconclusive` if there are too few images. Exit code 0 on pass, else 6.

    Images need no labels: only those whose prediction changes count. They are written to flips.csv; fill in their
    labels and run the command again with --flips.

    The files of encoders are compared by the nearest neighbours that each image keeps; labels are not needed.
    Several labels at once count each on its own, and values by their error.

    With --on, MODEL runs on a device; the reference and the statistics run here. `vit-edge explain` shows where the
    error comes from.

    \b
    Examples:
      vit-edge verify model.int8.onnx --reference model.onnx \\
        --data images/test --max-drop 0.5
      vit-edge verify model.int8.onnx --reference model.onnx --data loose \\
        --max-drop 0.5
      vit-edge verify model.int8.onnx --reference model.onnx --data loose \\
        --max-drop 0.5 --flips flips.csv
    """
    require("scipy", extra="export", what="verify")
    job = ray_job(values, verb="verify", unused=("on", "device_list"))
    from vit_edge.export.verification.encoder_verifier import run_any_verification
    from vit_edge.export.verification.request import open_request

    with progress_bar("reading the files"):
        request = open_request(
            model,
            flips=flips,
            carry_labels=flips_out is not None,
            engines=() if remote else engines,
            threads=threads,
            **values,
        )
    output = _FlipsFiles(given=flips, target=_flips_target(flips_out, request, force=force), force=force)
    if not click.get_current_context().meta["quiet"]:
        print_message(_certifiable(request))
    if remote is not None:
        return _on_devices(remote, model, request, engines, output)
    if job is not None:
        from vit_edge.cli.workstation.verify_there import verify_on_ray

        return verify_on_ray(job, request, threads=threads, result_of=lambda found: _result(found, model, output))
    with progress_bar() as progress:
        result = run_any_verification(request, progress=progress)
    return _result(result, model, output)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FlipsFiles:
    """The flips file that was given, and the one to write, if any."""

    given: Path | None
    target: Path | None
    force: bool

    def write(self, result: Verification) -> Path | None:
        """Write the changed predictions if there are any and a file is wanted; return the file."""
        from vit_edge.export.verification.verifier import write_flips

        if self.target is None or not result.num_changed:
            return None
        write_flips(result, self.target, force=self.force)
        return self.target


def _on_devices(
    remote: Remote, model: Path, request: VerificationRequest, engines: tuple[str, ...], output: _FlipsFiles
) -> Result:
    """Verify on each device; a flips file is written only if there is one device."""
    from vit_edge.cli.workstation.verify_there import verify_there

    shown: list[Any] = []
    found = verify_there(remote, model, request, engines=engines)
    if len(found) > 1:
        output = replace(output, target=None)
    for outcome, result in found:
        if result is None:
            continue
        each = _result(result, model, output)
        outcome.value, outcome.error = each.data, each.error
        shown += [f"on {ran_on(outcome)}:", *each.shown]
    return merged([outcome for outcome, _ in found], shown)


def _certifiable(request: VerificationRequest) -> str:
    if request.model.manifest.is_encoder:
        return encoder_certifiable_text(request.certifiable, request.budget)
    return certifiable_text(request.certifiable, request.budget, request.labels)


def _result(result: AnyVerification, model: Path, output: _FlipsFiles) -> Result:
    from vit_edge.export.verification.results import Verification

    if not isinstance(result, Verification):
        return encoder_result(result, model)
    written = output.write(result)
    shown = [_sentence(result), *_tables(result), *_remarks(result, written)]
    files = {"model": printable(model), "flips_file": None if written is None else printable(written)}
    error = _failure(result, model, written or output.given)
    return Result(data={**verification_data(result), **files}, shown=shown, error=error)


def verification_data(result: Verification) -> dict[str, Any]:
    """Return the verification as JSON-ready values: the deciding engine's figures on top, all engines below."""
    from vit_edge.export.verification.scores import SCORE_METHOD
    from vit_edge.metrics import AGREEMENT_METHOD, BOUND_METHOD

    return {
        **_engine_data(result.decisive),
        "verdict": result.verdict,
        "labels": result.labels,
        "max_drop_points": result.max_drop_points,
        "min_agreement": result.min_agreement,
        "best_certifiable_points": result.certifiable.best_points,
        "best_certifiable_agreement": result.certifiable.best_agreement,
        "too_few_images": result.certifiable.too_few,
        "images_needed_at_best": result.certifiable.images_needed,
        "bound_method": SCORE_METHOD if result.decisive.scores else BOUND_METHOD,
        "agreement_method": SCORE_METHOD if result.decisive.scores else AGREEMENT_METHOD,
        "data": printable(result.data),
        "data_sha256": result.data_sha256,
        "models_sha256": result.models_sha256,
        "near_copies": list(result.near_copies),
        "results": [_engine_data(entry) for entry in result.results],
    }


def figures_data(result: Verification) -> list[dict[str, Any]]:
    """Return each engine's figures as JSON-ready values, without a verdict on a budget."""
    dropped = ("verdict", "images_needed")
    return [{key: v for key, v in _engine_data(r).items() if key not in dropped} for r in result.results]


def figures_table(result: Verification, *, with_verdict: bool = True) -> Table:
    """Return one row for each figure and one column for each engine, which fits 80 columns."""
    return engines_table(result, [_figures(entry) for entry in result.results], with_verdict=with_verdict)


def _figures(entry: EngineResult) -> dict[str, str]:
    if entry.scores is not None:
        return score_figures(entry)
    low, high = entry.agreement_interval
    ranks = {1: (entry.reference_top1, entry.candidate_top1), 5: (entry.reference_top5, entry.candidate_top5)}
    known = {k: both for k, both in ranks.items() if None not in both}
    return {
        **{f"top-{k}, reference": f"{both[0]:.2f} %" for k, both in known.items()},
        **{f"top-{k}, candidate": f"{both[1]:.2f} %" for k, both in known.items()},
        "drop": f"{'at most ' if entry.unlabelled else ''}{entry.drop_points:.2f} points",
        "drop, 95 % upper bound": f"{entry.drop_upper_bound_points:.2f} points",
        "correct lost / gained": f"{entry.worse} / {entry.better}",
        "McNemar p": "-" if entry.mcnemar_p is None else f"{entry.mcnemar_p:.3g}",
        "agreement, 95 % interval": f"{entry.agreement:.2f} % ({low:.1f} to {high:.1f})",
        "SQNR": f"{entry.sqnr_db:.1f} dB",
    }


def _sentence(result: Verification) -> str:
    """Return the verdict with the figures that decided it, in one sentence."""
    worst, said = result.decisive, list[str]()
    terms = terms_of(worst)
    if result.max_drop_points is not None:
        drop = f"{'at most ' if worst.unlabelled else ''}{worst.drop_points:.2f} {terms.unit}"
        bound = f"no more than {worst.drop_upper_bound_points:.2f} with 95 % confidence"
        said.append(f"{terms.drop} {drop}, {bound} (limit {result.max_drop_points:g})")
    if result.min_agreement is not None:
        bound = f"at least {worst.agreement_lower_bound:.2f} % with 95 % confidence"
        said.append(f"{worst.agreement:.2f} % {terms.same}, {bound} (limit {result.min_agreement:g} %)")
    return f"{result.verdict}: on {worst.images} images {' and '.join(said)}, in {deciding_engine(result)}"


def _tables(result: Verification) -> Iterator[Table]:
    """Yield the tables for people: engines, the classes that lost most, the predictions that changed."""
    from vit_edge.export.verification.flips import path_below

    yield figures_table(result)
    worst = result.decisive
    if worst.worst_classes:
        lost = worst.worst_classes[:_NUM_SHOWN]
        cells = [(c.label, c.lost, _or_dash(c.images), _or_dash(c.reference_right), _or_dash(c.candidate_right))
                 for c in lost]  # fmt: skip
        columns = ("class", "lost", "images", "correct, reference", "correct, candidate")
        yield make_table(f"Classes that lost most, in {worst.engine}", columns, cells)
    if worst.changed:
        order = ("worse", None, "neither", "better")
        first = sorted(worst.changed, key=lambda change: order.index(change.effect))[:_NUM_SHOWN]
        rows = [
            (c.reference, c.candidate, _or_dash(c.label), _or_dash(c.effect), path_below(c.path, result.data))
            for c in first
        ]
        more = f", {len(first)} of {len(worst.changed)}; all with --json" if len(first) < len(worst.changed) else ""
        columns = ("reference", "candidate", "label", "effect", "image")
        yield make_table(f"{terms_of(worst).changes} in {worst.engine}{more}", columns, rows)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _remarks(result: Verification, written: Path | None) -> Iterator[str]:
    """Yield what the figures do not say."""
    from vit_edge.export.verification.scores import SCORE_METHOD
    from vit_edge.metrics import AGREEMENT_METHOD, BOUND_METHOD

    if written is not None:
        todo = f"{result.num_unlabelled} of them need a label"
        yield f"flips: wrote the {result.num_changed} images whose prediction changed to {written}; {todo}"
    if result.decisive.scores is not None:
        yield f"bounds: {SCORE_METHOD}" + (
            "" if result.labels == "all" else "; without labels each change counts as lost"
        )
        return
    if result.labels == "none" and not result.num_changed:
        yield "no prediction changed: no label is needed"
    elif result.num_unlabelled and result.verdict == "pass" and result.max_drop_points is not None:
        yield f"within the budget even if all {result.num_unlabelled} unlabelled changes are lost"
    elif result.num_unlabelled:
        yield f"{result.num_unlabelled} changed predictions have no label and count as lost"
    yield f"drop bound: {BOUND_METHOD}; agreement: {AGREEMENT_METHOD}"


def _engine_data(entry: EngineResult) -> dict[str, Any]:
    fields = asdict(entry)
    for name in ("reference", "candidate"):
        fields[name] = {"top1": fields.pop(f"{name}_top1"), "top5": fields.pop(f"{name}_top5")}
    return fields


def _flips_target(flips_out: Path | None, request: VerificationRequest, *, force: bool) -> Path | None:
    """Return where flips will be written, if they will; refused before any work is done."""
    from vit_edge.export.verification.flips import may_write_flips

    if request.labels == "all" and flips_out is not None:
        remedy = "leave out --flips-out, or add --unlabelled"
        raise UsageError("cannot write flips", reason="every image has a label already", remedy=remedy)
    if not request.model.manifest.chooses_class:
        if flips_out is not None:
            reason = "the file does not choose one class of several"
            raise UsageError("cannot write flips", reason=reason, remedy="leave --flips-out out")
        return None
    if flips_out is None and request.labels == "none" and request.budget.max_drop_points is not None:
        flips_out = _FLIPS
    return None if flips_out is None else may_write_flips(flips_out, force=force)


def certifiable_text(found: Certifiable, budget: Budget, labels: Labels) -> str:
    """Return what the images can certify if no prediction changes, and whether that is enough."""
    kind = "unlabelled images" if labels == "none" else "images"
    said = []
    if budget.max_drop_points is not None:
        said.append(
            f"the minimum certifiable drop is {found.best_points:.2f} points (limit {budget.max_drop_points:g})"
        )
    if budget.min_agreement is not None:
        limit = f"limit {budget.min_agreement:g} %"
        said.append(f"the maximum certifiable agreement is {found.best_agreement:.2f} % ({limit})")
    text = f"{found.images} {kind}: {', and '.join(said)}"
    if not found.too_few:
        return text
    return f"{text}\neven an unchanged model cannot pass with so few: use {_at_least(found)} images"


def _at_least(found: Certifiable) -> str:
    return "more than a million" if found.images_needed is None else f"at least {found.images_needed:,}"


def _failure(result: Verification, model: Path, flips: Path | None) -> VerificationFailed | None:
    worst = result.decisive
    if result.verdict == "pass":
        return None
    if result.verdict == "inconclusive":
        reason, remedy = _inconclusive(result, worst, flips)
        return VerificationFailed("cannot certify", file=model, reason=reason, remedy=remedy)
    said = []
    if result.max_drop_points is not None:
        said.append(f"the drop is {worst.drop_points:.2f} points (at most {result.max_drop_points:g})")
    if result.min_agreement is not None:
        said.append(f"the agreement is {worst.agreement:.2f} % (at least {result.min_agreement:g})")
    remedy = "`vit-edge explain` to see where the error comes from, or quantize again with other calibration images"
    reason = f"in {worst.engine} {', '.join(said)}"
    return VerificationFailed("cannot accept", file=model, reason=reason, remedy=remedy)


def _inconclusive(result: Verification, worst: EngineResult, flips: Path | None) -> tuple[str, str]:
    """Return why the verdict is open, and what settles it."""
    drop, agreement = result.max_drop_points, result.min_agreement
    said = []
    if drop is not None and worst.drop_upper_bound_points > drop:
        said.append(f"bound the drop at {worst.drop_upper_bound_points:.2f} points, not at {drop:g}")
    if agreement is not None and worst.agreement_lower_bound < agreement:
        said.append(f"bound the agreement at {worst.agreement_lower_bound:.2f} %, not at {agreement:g}")
    reason = f"in {worst.engine} {worst.images} images {' and '.join(said)}"
    if result.certifiable.too_few:
        reason += "; even an unchanged model cannot pass with so few"
        return reason, f"use {_at_least(result.certifiable)} images, or a larger budget"
    if drop is not None and worst.unlabelled and worst.scores is None and worst.drop_upper_bound_points > drop:
        file = flips or _FLIPS
        reason += f"; the {worst.unlabelled} changed predictions without a label count as lost"
        return reason, f"fill in the {result.num_unlabelled} labels in {file} and run again with --flips {file}"
    needed = f"about {worst.images_needed:,}" if worst.images_needed else "many more"
    return reason, f"use {needed} images, or a larger budget"
