"""`vit-edge deploy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.device.remote import Remote, on_devices
from vit_edge.cli.output import Result, command, make_table, progress_bar
from vit_edge.cli.workstation.deploy_devices import device_data, measured_there, seed, shares
from vit_edge.errors import UsageError, VerificationFailed, printable, require
from vit_edge.remote.fleet import Outcome, failure

if TYPE_CHECKING:
    from vit_edge.export.deployment.deployer import Deployment

_PATH = click.Path(path_type=Path)
_PAGE = "report.html"
_TARGETS = "portable, x86-vnni, arm-dotprod, openvino-npu, tensorrt, qnn, auto, or a FILE.json of `vit-edge doctor`"


@command("deploy")
@click.argument("source", required=False)
@click.option("--calibration", type=_PATH, metavar="DIR", help="Images that calibrate.")
@click.option("--data", type=_PATH, metavar="DIR", help="Images that judge; with --check, where they lie now.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Accuracy that may be lost, in percentage points.")
@click.option("--min-agreement", type=float, metavar="PERCENT", help="Answers that have to stay the same.")
@click.option("-o", "--out", type=_PATH, default=Path("deploy"), show_default=True, help="Folder for all that is made.")
@click.option("--target", default="portable", show_default=True, help=f"{_TARGETS}.")
@click.option("--recipe", type=click.Choice(["fast", "accurate"]), default="fast", show_default=True,
              help="accurate spends time where it buys most accuracy.")  # fmt: skip
@click.option("--effort", type=click.Choice(["fast", "balanced", "thorough"]), default="balanced", show_default=True,
              help="Steps of the optimisers.")  # fmt: skip
@click.option("--like", metavar="timm:NAME", help="Network of timm to ask for what weights from elsewhere do not tell.")
@click.option("--labels", type=_PATH, metavar="FILE|DIR", help="Class names: a line each, JSON, or class folders.")
@click.option(
    "--preprocessing", type=_PATH, metavar="FILE", help="JSON or TOML: resize, crop, interpolation, mean, std."
)
@click.option("--check", type=_PATH, metavar="RECORD.json", help="Verify a deployment again, files, images and all.")
@on_devices(own=True)
def deploy(source: str | None, check: Path | None, data: Path | None, remote: Remote | None, **values: Any) -> Result:
    """Go the whole way from SOURCE, whatever `vit-edge convert` takes, to a verified INT8 file, with one verdict.

    The folder gets model.onnx, model.int8.onnx, record.json (hashes, versions and results of every step) and
    report.html, a page of it all with the images whose answer changed. A step is skipped where its inputs did not
    change. The exit code is 6 where the images do not certify the accuracy, or INT8 is not faster here. With --on it
    has to be faster on each of these devices instead, after its golden vectors passed there; one that cannot be reached
    is told, and the exit code is 7. Where devices in --devices name several targets, one file is made for each distinct
    target, in a folder of its own.

    \b
    Examples:
      vit-edge deploy run/best.safetensors --calibration images/train --data images/test --max-drop 1
      vit-edge deploy CKPT --calibration cal/ --data test/ --max-drop 1 --on ssh://pi@raspberrypi
      vit-edge deploy --check deploy/record.json
    """
    for module in ("torch", "onnx", "onnxruntime", "scipy", "jinja2"):
        require(module, extra="export,onnxruntime", what="deploy")
    from vit_edge.export.deployment.deployer import check_record

    if check is not None and source is not None:
        reason = "--check takes a record, and no source"
        raise UsageError("cannot check", reason=reason, remedy="leave the source out")
    if check is not None:
        with progress_bar() as progress:
            found = check_record(check, data=data, progress=progress)
        return _result([_finished(found, remote, data, has_page=False)])
    done: list[_Done] = []
    for share in shares(remote, values["target"], values["out"]):
        if done:
            seed(share.folder, done[0].found.folder)
        with progress_bar() as progress:
            found = _deploy(source, data, {**values, "target": share.target, "out": share.folder}, progress)
        done.append(_finished(found, share.remote, data, has_page=True))
    return _result(done)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A deployment, what its devices gave, and where its page is."""

    found: Deployment
    outcomes: list[Outcome]
    page: str | None


def _finished(found: Deployment, remote: Remote | None, data: Path | None, *, has_page: bool) -> _Done:
    """Have a deployment judged by the devices that it is for, and write its page."""
    from vit_edge.export.deployment.deployer import with_devices

    outcomes = [] if remote is None else measured_there(found.folder, remote)
    if outcomes:
        found = with_devices(found, [device_data(outcome) for outcome in outcomes])
    return _Done(found=found, outcomes=outcomes, page=_report(found, data) if has_page else None)


def _result(done: Sequence[_Done]) -> Result:
    """Return the result: of one deployment its own values; of several, each by its target, with one verdict."""
    from vit_edge.export.verification.verdict import SEVERITY

    verdict = max((one.found.verdict for one in done), key=lambda outcome: SEVERITY[outcome])
    fields = [{**_fields(one.found), "report": one.page} for one in done]
    shown = [entry for one in done for entry in _shown(one, has_folder=len(done) > 1)]
    failed = [error for error in (_failure(one.found) for one in done) if error is not None]
    error = failure(outcome for one in done for outcome in one.outcomes) or (failed[0] if failed else None)
    data = fields[0] if len(done) == 1 else {"verdict": verdict, "deployments": fields}
    return Result(data=data, shown=[*shown, f"verdict: {verdict}"], error=error)


def _report(found: Deployment, data: Path | None) -> str:
    """Write the page of the deployment beside its files; returns where."""
    from vit_edge.report import write_report

    with progress_bar() as progress:
        return printable(
            write_report([found.folder], out=found.folder / _PAGE, data=data, force=True, progress=progress)
        )


def _deploy(source: str | None, data: Path | None, values: dict[str, Any], progress: Any) -> Deployment:
    from vit_edge.export import QuantizationOptions
    from vit_edge.export.deployment.deployer import DeploymentOptions, deploy

    missing = [name for name, value in (("SOURCE", source), ("--calibration", values["calibration"]), ("--data", data))
               if value is None]  # fmt: skip
    if source is None or data is None or missing:
        remedy = "see `vit-edge deploy -h`"
        raise UsageError("cannot deploy", reason=f"{', '.join(missing)} is not given", remedy=remedy)
    quantization = QuantizationOptions(
        target=values["target"],
        recipe=values["recipe"],
        effort=values["effort"],
        max_drop_points=values["max_drop"],
        min_agreement=values["min_agreement"],
    )
    told = {name: values[name] for name in ("like", "labels", "preprocessing")}
    options = DeploymentOptions(**told, quantization=quantization)
    return deploy(
        source, calibration=values["calibration"], data=data, out=values["out"], options=options, progress=progress
    )


def _fields(found: Deployment) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "verdict": found.verdict,
        "claims": list(found.claims),
        "ran": list(found.ran),
        "skipped": list(found.skipped),
        "record": found.record,
    }


def _shown(done: _Done, *, has_folder: bool) -> list[Any]:
    found = done.found
    rows = [(name, "run") for name in found.ran] + [
        (name, "skipped: its inputs did not change") for name in found.skipped
    ]
    files = [f"{digest}  {name}" for name, digest in sorted(found.record["files"].items())]
    title = printable(found.folder) if has_folder else ""
    page = [] if done.page is None else [f"report: {done.page}"]
    return [make_table(title, ("step", ""), rows), *files, *found.claims, *page]


def _failure(found: Deployment) -> VerificationFailed | None:
    if found.verdict == "pass":
        return None
    reason = "; ".join(claim for claim in found.claims if ", pass:" not in claim)
    if found.verdict == "inconclusive":
        remedy = "give more images, or ask for less"
    elif ", pass:" not in found.claims[0]:
        remedy = "see `vit-edge verify --explain`"
    else:
        remedy = "choose the --target of that machine, or deploy the float file"
    return VerificationFailed("the deployment does not pass", file=found.folder, reason=reason, remedy=remedy)
