"""What `vit-edge verify` and `quantize` print about an encoder: figures, verdict and what settles it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_edge.cli.output import Result, make_table
from vit_edge.cli.workstation.engine_figures import deciding_engine, engines_table
from vit_edge.errors import VerificationFailed, printable

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.export.quantization.accuracy_budget import SearchTrace
    from vit_edge.export.verification.encoder_results import EncoderResult, EncoderVerification
    from vit_edge.export.verification.verdict import Budget, Certifiable

__all__ = [
    "encoder_certifiable_text",
    "encoder_data",
    "encoder_failure",
    "encoder_result",
    "encoder_search_table",
    "encoder_table",
]

_NUM_SHOWN = 10


def encoder_result(result: EncoderVerification, model: Path) -> Result:
    """Return what `vit-edge verify` prints about an encoder."""
    from vit_edge.export.verification.flips import path_below
    from vit_edge.export.verification.neighbours import NEIGHBOURS_METHOD

    rows = [(f"{m.cosine:.4f}", f"{m.kept_percent:.0f} %", path_below(m.path, result.data))
            for m in result.decisive.moved[:_NUM_SHOWN]]  # fmt: skip
    title = f"Images whose vector moved most, in {result.decisive.engine}"
    shown = [
        _sentence(result),
        encoder_table(result),
        make_table(title, ("cosine", "10 neighbours kept", "image"), rows),
        f"neighbours kept: {NEIGHBOURS_METHOD}",
    ]
    data = {**encoder_data(result), "model": printable(model)}
    return Result(data=data, shown=shown, error=encoder_failure(result, model))


def encoder_data(result: EncoderVerification) -> dict[str, Any]:
    """Return the verification as JSON-ready values: the deciding engine's figures on top, all engines below."""
    from vit_edge.export.verification.neighbours import NEIGHBOURS_METHOD

    return {
        **asdict(result.decisive),
        "kind": "encoder",
        "verdict": result.verdict,
        "labels": result.labels,
        "max_drop_points": result.max_drop_points,
        "min_neighbours": result.min_neighbours,
        "best_certifiable_neighbours": result.certifiable.best_neighbours,
        "too_few_images": result.certifiable.too_few,
        "images_needed_at_best": result.certifiable.images_needed,
        "neighbours_method": NEIGHBOURS_METHOD,
        "data": printable(result.data),
        "data_sha256": result.data_sha256,
        "models_sha256": result.models_sha256,
        "near_copies": list(result.near_copies),
        "results": [asdict(entry) for entry in result.results],
    }


def encoder_table(result: EncoderVerification, *, with_verdict: bool = True) -> Table:
    """Return one row for each figure and one column for each engine."""
    return engines_table(result, [_figures(entry) for entry in result.results], with_verdict=with_verdict)


def encoder_search_table(search: SearchTrace) -> Table:
    """Return one row for each step of an accuracy search."""
    rows = [
        (str(step.num_integer), f"{step.neighbours:.2f} %", f"{step.neighbours_lower_bound:.2f} %",
         f"{step.sqnr_db:.1f}", step.verdict)
        for step in search.steps
    ]  # fmt: skip
    return make_table("Accuracy search", ("ops in INT8", "neighbours kept", "bound, 95 %", "SQNR dB", "verdict"), rows)


def _figures(entry: EncoderResult) -> dict[str, str]:
    rows = {
        "cosine similarity, mean": f"{entry.cosine_mean:.5f}",
        "cosine similarity, 5 % quantile": f"{entry.cosine_q05:.5f}",
        "cosine similarity, worst": f"{entry.cosine_worst:.5f}",
        "SQNR": f"{entry.sqnr_db:.1f} dB",
    }
    for kept in entry.neighbours:
        rows[f"neighbours kept, k = {kept.k}"] = f"{kept.percent:.2f} % (at least {kept.lower_bound:.2f})"
    if entry.knn is not None:
        rows["k-NN top-1, reference"] = f"{entry.knn.reference_top1:.2f} %"
        rows["k-NN top-1, candidate"] = f"{entry.knn.candidate_top1:.2f} %"
        bound = f"at most {entry.knn.drop_upper_bound_points:.2f}"
        rows["k-NN drop"] = f"{entry.knn.drop_points:.2f} points ({bound})"
    return rows


def _sentence(result: EncoderVerification) -> str:
    """Return the verdict with the figures that decided it, in one sentence."""
    worst, said = result.decisive, list[str]()
    if result.min_neighbours is not None:
        bound = f"at least {worst.kept.lower_bound:.2f} % with 95 % confidence"
        said.append(
            f"{worst.kept.percent:.2f} % of the {worst.kept.k} nearest neighbours stay the same, {bound} "
            f"(limit {result.min_neighbours:g} %)"
        )
    if result.max_drop_points is not None and worst.knn is not None:
        bound = f"no more than {worst.knn.drop_upper_bound_points:.2f} with 95 % confidence"
        drop = f"the drop of k-NN accuracy is {worst.knn.drop_points:.2f} points"
        said.append(f"{drop}, {bound} (limit {result.max_drop_points:g})")
    return f"{result.verdict}: on {worst.images} images {' and '.join(said)}, in {deciding_engine(result)}"


def encoder_certifiable_text(found: Certifiable, budget: Budget) -> str:
    """Return what the images can certify if every neighbour stays, and whether that is enough."""
    said = []
    if budget.min_neighbours is not None:
        best = f"the maximum certifiable share of neighbours is {found.best_neighbours:.2f} %"
        said.append(f"{best} (limit {budget.min_neighbours:g} %)")
    if budget.max_drop_points is not None:
        best = f"the minimum certifiable drop of k-NN accuracy is {found.best_points:.2f} points"
        said.append(f"{best} (limit {budget.max_drop_points:g})")
    text = f"{found.images} images: {', and '.join(said)}"
    if not found.too_few:
        return text
    return f"{text}\neven an unchanged model cannot pass with so few: use {_at_least(found)} images"


def encoder_failure(result: EncoderVerification, model: Path) -> VerificationFailed | None:
    """Return the error to end with unless the verdict is `pass`."""
    worst, limit = result.decisive, result.min_neighbours
    if result.verdict == "pass":
        return None
    measured, bounded = [], []
    if limit is not None:
        measured.append(f"{worst.kept.percent:.2f} % of the neighbours are kept (at least {limit:g})")
        bounded.append(f"bound the neighbours kept at {worst.kept.lower_bound:.2f} %, not at {limit:g}")
    if result.max_drop_points is not None and worst.knn is not None:
        limit_points = f"{result.max_drop_points:g}"
        measured.append(f"the drop of k-NN accuracy is {worst.knn.drop_points:.2f} points (at most {limit_points})")
        bounded.append(f"bound that drop at {worst.knn.drop_upper_bound_points:.2f} points, not at {limit_points}")
    if result.verdict == "fail":
        remedy = "quantize again with --min-neighbours and --data, --recipe accurate, or other calibration images"
        reason = f"in {worst.engine} {', '.join(measured)}"
        return VerificationFailed("cannot accept", file=model, reason=reason, remedy=remedy)
    needed = f"about {worst.images_needed:,}" if worst.images_needed else "many more"
    if result.certifiable.too_few:
        needed = _at_least(result.certifiable)
    reason = f"in {worst.engine} {worst.images} images {' and '.join(bounded)}"
    return VerificationFailed(
        "cannot certify", file=model, reason=reason, remedy=f"use {needed} images, or a larger budget"
    )


def _at_least(found: Certifiable) -> str:
    return "more than 100,000" if found.images_needed is None else f"at least {found.images_needed:,}"
