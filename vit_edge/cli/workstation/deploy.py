"""`vit-edge deploy`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.device.remote import Remote, on_devices
from vit_edge.cli.options import load_options, option_group
from vit_edge.cli.output import Result, command, make_table, progress_bar
from vit_edge.cli.workstation.deploy_devices import device_data, measured_there, seed, shares
from vit_edge.errors import UsageError, VerificationFailed, printable, require
from vit_edge.progress import Progress
from vit_edge.remote.fleet import Outcome, failure

if TYPE_CHECKING:
    from vit_edge.export.deployment.deployer import Deployment, DeploymentOptions

_PATH = click.Path(path_type=Path)
_PAGE = "report.html"
_TARGETS = (
    "portable, x86-vnni, openvino-avx2, arm-dotprod, openvino-npu, tensorrt, qnn, auto, or a FILE.json of "
    "`vit-edge doctor`"
)


@command("deploy")
@click.argument("source", required=False)
@click.option(
    "--calibration",
    type=_PATH,
    metavar="DIR",
    help="Calibration images, with or without labels; by default those in train/ of --data.",
)
@click.option("--data", type=_PATH, metavar="DIR", help="Evaluation images; must not overlap the calibration images.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Accept at most this drop of top-1.")
@click.option(
    "--min-agreement", type=float, metavar="PERCENT", help="Accept if at least this share of predictions is unchanged."
)
@click.option("-o", "--out", type=_PATH, default=Path("deploy"), show_default=True, help="Folder for all files.")
@click.option("--no-speed", is_flag=True, help="Do not measure speed; accuracy alone decides.")
@click.option(
    "--check",
    type=_PATH,
    metavar="RECORD.json",
    help="Verify and measure an earlier deployment again, and update its record and report.",
)
@option_group(
    "Quantization",
    click.option("--target", default="portable", show_default=True, help=f"Quantize for {_TARGETS}."),
    click.option("--recipe", type=click.Choice(["fast", "accurate"]), default="fast", show_default=True,
                 help="accurate: keep the most sensitive layers in float32."),
    click.option("--effort", type=click.Choice(["fast", "balanced", "thorough"]), default="balanced",
                 show_default=True, help="Set how many steps the optimizers take."),
)  # fmt: skip
@option_group(
    "What the checkpoint does not specify",
    click.option("--like", metavar="timm:NAME", help="Take heads, activation, eps and preprocessing from timm."),
    click.option("--labels", type=_PATH, metavar="FILE|DIR",
                 help="Class names: a text file, a JSON file or class folders."),
    click.option("--preprocessing", type=_PATH, metavar="FILE",
                 help="TOML or JSON: resize, crop, interpolation, mean, std."),
)  # fmt: skip
@on_devices(own=True)
@load_options
def deploy(
    source: str | None,
    calibration: Path | None,
    data: Path | None,
    max_drop: float | None,
    min_agreement: float | None,
    out: Path,
    no_speed: bool,
    check: Path | None,
    target: str,
    recipe: Any,
    effort: Any,
    like: str | None,
    labels: Path | None,
    preprocessing: Path | None,
    remote: Remote | None,
) -> Result:
    """Convert, export, quantize, verify and measure SOURCE, with one verdict.

    SOURCE is anything that `vit-edge export` takes, or a float32 model file. The folder gets model.onnx,
    model.int8.onnx, record.json (hashes, versions and results of every step) and report.html, a page that shows all of
    it. A step is skipped if its inputs did not change.

    The verdict is `pass` if the images certify the accuracy and INT8 is faster here, `fail` if it is less accurate or
    slower, and else `inconclusive`. Exit code 0 on pass, else 6. With --on, INT8 has to be faster on each device
    instead; exit code 7 if a device is unreachable. If the devices in --devices have several targets, each target gets
    a deployment in a folder below --out.

    \b
    Examples:
      vit-edge deploy run/best.safetensors --data images/ --max-drop 1
      vit-edge deploy CKPT --calibration cal/ --data test/ --max-drop 1 \\
        --on ssh://pi@raspberrypi
      vit-edge deploy --check deploy/record.json
    """
    for module in ("torch", "onnx", "onnxruntime", "scipy", "jinja2"):
        require(module, extra="export,onnxruntime", what="deploy")
    from vit_edge.export import QuantizationOptions
    from vit_edge.export.deployment.deployer import DeploymentOptions

    if remote is not None and no_speed:
        raise UsageError("cannot deploy", reason="--on measures speed", remedy="leave out --no-speed or --on")
    if check is not None:
        return _checked(check, source, data, remote, no_speed=no_speed)
    calibration = calibration or _training_folder(data)
    if source is None or calibration is None or data is None:
        given = {"SOURCE": source, "--calibration": calibration, "--data": data}
        missing = ", ".join(name for name, value in given.items() if value is None)
        remedy = "add the missing arguments; see `vit-edge deploy -h`"
        if calibration is None and data is not None:
            remedy = "add --calibration, or give --data a folder that is divided into train/ and test/"
        raise UsageError("cannot deploy", reason=f"{missing} is missing", remedy=remedy)
    quantization = QuantizationOptions(
        target=target, recipe=recipe, effort=effort, max_drop_points=max_drop, min_agreement=min_agreement
    )
    options = DeploymentOptions(
        like=like, labels=labels, preprocessing=preprocessing, quantization=quantization, measure_speed=not no_speed
    )
    images = _Images(calibration=calibration, data=data)
    return _result(list(_deployments(source, images, options, remote, target=target, out=out)))


def _training_folder(data: Path | None) -> Path | None:
    """Return the training images beside the evaluation images, if DIR of --data is divided into both."""
    from vit_edge.data import training_folder

    return None if data is None else training_folder(data)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    calibration: Path
    data: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A deployment, the results of its devices, and where its page is."""

    found: Deployment
    outcomes: list[Outcome]
    page: str


def _deployments(
    source: str, images: _Images, options: DeploymentOptions, remote: Remote | None, *, target: str, out: Path
) -> Iterator[_Done]:
    """Yield the deployment of each target of the devices; without devices there is one target."""
    from vit_edge.export.deployment.deployer import deploy as run

    first: Path | None = None
    for share in shares(remote, target, out):
        if first is not None:
            seed(share.folder, first)
        first = first or share.folder
        quantization = replace(options.quantization, target=share.target)
        with progress_bar() as progress:
            found = run(
                source,
                calibration=images.calibration,
                data=images.data,
                out=share.folder,
                options=replace(options, quantization=quantization),
                progress=progress,
            )
        yield _finished(found, share.remote, images.data)


def _checked(check: Path, source: str | None, data: Path | None, remote: Remote | None, *, no_speed: bool) -> Result:
    from vit_edge.export.deployment.deployer import check_record

    if source is not None:
        reason = "--check takes a record and no source"
        raise UsageError("cannot check", reason=reason, remedy="leave out SOURCE")
    with progress_bar() as progress:
        found = check_record(check, data=data, measure_speed=not no_speed, progress=progress)
    return _result([_finished(found, remote, data)])


def _finished(found: Deployment, remote: Remote | None, data: Path | None) -> _Done:
    """Measure a deployment on its devices, if there are any, and write its page."""
    from vit_edge.export.deployment.deployer import with_devices

    outcomes = [] if remote is None else measured_there(found.folder, remote)
    if outcomes:
        found = with_devices(found, [device_data(outcome) for outcome in outcomes])
    with progress_bar() as progress:
        return _Done(found=found, outcomes=outcomes, page=_report(found, data, progress))


def _report(found: Deployment, data: Path | None, progress: Progress) -> str:
    """Write the page of the deployment next to its files; return its path."""
    from vit_edge.report import write_report

    return printable(write_report([found.folder], out=found.folder / _PAGE, data=data, force=True, progress=progress))


def _result(done: Sequence[_Done]) -> Result:
    """Return the result: the values of one deployment, or of several each by its target, with one verdict."""
    from vit_edge.export.deployment.claims import worst_verdict

    verdict = worst_verdict([claim for one in done for claim in one.found.claims])
    fields = [{**_fields(one.found), "report": one.page} for one in done]
    shown = [entry for one in done for entry in _shown(one, has_folder=len(done) > 1)]
    failed = [error for error in (_failure(one.found) for one in done) if error is not None]
    error = failure(outcome for one in done for outcome in one.outcomes) or (failed[0] if failed else None)
    data = fields[0] if len(done) == 1 else {"verdict": verdict, "deployments": fields}
    return Result(data=data, shown=[f"{verdict}: {_summary(done)}", *shown], error=error)


def _summary(done: Sequence[_Done]) -> str:
    claims = [claim for one in done for claim in one.found.claims]
    return ", ".join(dict.fromkeys(f"{claim.subject} {claim.verdict}" for claim in claims))


def _fields(found: Deployment) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "verdict": found.verdict,
        "claims": [asdict(claim) for claim in found.claims],
        "ran": list(found.ran),
        "skipped": list(found.skipped),
        "record": found.record,
    }


def _shown(done: _Done, *, has_folder: bool) -> list[Any]:
    found = done.found
    rows = [(name, "done") for name in found.ran] + [(name, "skipped: same inputs") for name in found.skipped]
    files = [f"{name}  sha256 {digest}" for name, digest in sorted(found.record["files"].items())]
    title = printable(found.folder) if has_folder else ""
    claims = [str(claim) for claim in found.claims]
    return [*claims, make_table(title, ("step", ""), rows), *files, f"report: {done.page}"]


def _failure(found: Deployment) -> VerificationFailed | None:
    """Return the error to end with: every claim that does not pass, and what to do about the first."""
    open_ = [claim for claim in found.claims if claim.verdict != "pass"]
    if not open_:
        return None
    reason = "; ".join(map(str, open_))
    what = "cannot accept the deployment" if found.verdict == "fail" else "cannot certify the deployment"
    return VerificationFailed(what, file=found.folder, reason=reason, remedy=open_[0].remedy)
