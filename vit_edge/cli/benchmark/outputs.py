"""What `vit-edge benchmark` does with its results, measured here or on devices: files, a comparison, a verdict."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_edge.cli.benchmark.tables import csv_text
from vit_edge.cli.output import SCHEMA, Result, make_table
from vit_edge.errors import UsageError, VerificationFailed, require
from vit_edge.files import finite, may_write, write_atomic

if TYPE_CHECKING:
    from vit_edge.cli.benchmark.comparison import Comparison

__all__ = ["OUTPUTS", "begin"]

# The parameters that are about the results, and not about how they are measured.
OUTPUTS = ("csv", "save", "plot", "force", "compare", "fail_if_slower", "fail_if_noisy", "allow_invalid")
_log = logging.getLogger(__name__)


def begin(options: Mapping[str, Any]) -> Callable[[Result], Result]:
    """Check the options before anything is measured; returns the function that writes and compares the result."""
    from vit_edge.cli.benchmark.comparison import compare, invalid_reasons, read_old

    path = options["compare"]
    if options["fail_if_slower"] is not None and path is None:
        reason = "--fail-if-slower needs a saved run"
        raise UsageError("cannot compare", reason=reason, remedy="add --compare OLD.json")
    _check_outputs((options["csv"], options["save"], options["plot"]), force=options["force"])
    if options["plot"] is not None:
        require("matplotlib", extra="train", what="draw the results")
    old = None if path is None else read_old(path)

    def finish(result: Result) -> Result:
        if not result.data.get("results"):
            return result
        reasons = _invalid_because(result.data)
        data = {**result.data, "valid": not reasons, "invalid_because": reasons}
        comparisons = [] if old is None else compare(data["results"], old["results"], path)
        _write(data, csv=options["csv"], save=options["save"], plot=options["plot"])
        if old is not None:
            data["comparison"] = [asdict(one) for one in comparisons]
        rows = [(one.what, one.text) for one in comparisons]
        table = (
            [make_table("time per image, compared with the saved run", ("what", "change (95 %)"), rows)] if rows else []
        )
        invalid = [*reasons, *(f"{path}: {reason}" for reason in invalid_reasons(old or {}))]
        error = result.error or _verdict(comparisons, invalid, options)
        return Result(data=data, shown=[*result.shown, *table], error=error)

    return finish


def _check_outputs(paths: Sequence[Path | None], *, force: bool) -> None:
    given = [path for path in paths if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        reason, remedy = "two options name the same file", "give each option another file"
        raise UsageError("cannot write", reason=reason, remedy=remedy)
    for path in given:
        may_write(path, force=force)


def _invalid_because(data: Mapping[str, Any]) -> list[str]:
    """Return why the figures do not count: here, or on each of the devices."""
    if "devices" not in data:
        return list(data["invalid_because"])
    found = ((entry["device"], reason) for entry in data["devices"] for reason in entry.get("invalid_because", ()))
    return [f"{name}: {reason}" for name, reason in found]


def _write(data: dict[str, Any], *, csv: Path | None, save: Path | None, plot: Path | None) -> None:
    if csv is not None:
        write_atomic(csv, csv_text(data["results"], is_valid=data["valid"]).encode())
    if save is not None:
        everything = finite({"schema": SCHEMA, "command": "benchmark", **data})
        write_atomic(save, (json.dumps(everything, ensure_ascii=False, default=str) + "\n").encode())
    if plot is not None:
        from vit_edge.report.benchmark_plot import draw_benchmark

        if all(result["top1"] is None for result in data["results"]):
            _log.warning("accuracy is not drawn: no file holds an evaluation; `vit-edge quantize --data` leaves one")
        write_atomic(plot, draw_benchmark(data["results"], data["invalid_because"]))


def _verdict(
    comparisons: Sequence[Comparison], invalid: Sequence[str], options: Mapping[str, Any]
) -> VerificationFailed | None:
    """Return the error to end with: figures that do not count are never compared, unless `--allow-invalid` asks."""
    limit, noise = options["fail_if_slower"], "; ".join(invalid)
    if noise and options["fail_if_noisy"]:
        return VerificationFailed("cannot use the figures", reason=noise, remedy="measure on a quiet machine")
    if noise and limit is not None and not options["allow_invalid"]:
        remedy = "measure both runs on a quiet machine, or add --allow-invalid"
        return VerificationFailed("cannot compare the runs", reason=f"a run is INVALID ({noise})", remedy=remedy)
    slower = [one for one in comparisons if limit is not None and one.is_slower_than(limit)]
    if slower:
        reason = "; ".join(f"{one.what}: {one.text}" for one in slower)
        remedy = "measure both runs again, and look for what changed"
        what = f"cannot accept a run that is more than {limit:g} % slower"
        return VerificationFailed(what, reason=reason, remedy=remedy)
    return None
