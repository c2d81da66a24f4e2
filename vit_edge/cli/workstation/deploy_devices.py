"""`vit-edge deploy --on`: one file for each distinct target of the devices, measured on the devices of that target."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vit_edge.cli.device.remote import Remote, parts
from vit_edge.cli.output import progress_bar
from vit_edge.files import temporary_folder
from vit_edge.machine.targets import resolve_target
from vit_edge.remote.device import Bundle, Device, Session
from vit_edge.remote.fleet import Outcome, run_on

__all__ = ["Share", "device_data", "measured_there", "seed", "shares"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One target, the folder of its deployment, and its devices; None if the target is this machine."""

    target: str
    folder: Path
    remote: Remote | None


def shares(remote: Remote | None, target: str, out: Path) -> Iterator[Share]:
    """Yield the deployments to make, one for each distinct target; devices that name none have `target`.

    A single one goes into `out` itself, several into folders below it, named after the targets.
    """
    if remote is None:
        yield Share(target=target, folder=out, remote=None)
        return
    targets: dict[str, str] = {}
    devices: dict[str, list[Device]] = {}
    for device in remote.devices:
        text = device.target or target
        name = resolve_target(text).target.name
        targets.setdefault(name, text)
        devices.setdefault(name, []).append(device)
    for name, text in targets.items():
        folder = out / name if len(targets) > 1 else out
        yield Share(target=text, folder=folder, remote=replace(remote, devices=tuple(devices[name])))


def seed(folder: Path, first: Path) -> None:
    """Copy the float32 file and the record of the first deployment, so that the network is exported once."""
    from vit_edge.export.deployment.record import FLOAT32_FILE, RECORD_FILE

    if not (folder / RECORD_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FLOAT32_FILE, RECORD_FILE):
            shutil.copyfile(first / name, folder / name)


def measured_there(folder: Path, remote: Remote) -> list[Outcome]:
    """Measure both files of a deployment on every device; each load there checks the golden vectors first."""
    from vit_edge.export.deployment.record import FLOAT32_FILE, INT8_FILE

    files = {path: parts(path) for path in (folder / name for name in (FLOAT32_FILE, INT8_FILE))}
    with temporary_folder() as temporary:
        bundle = Bundle.write(Path(temporary), files, remote.setup)
        names = [bundle.name_there(path) for path in files]

        def work(session: Session, outcome: Outcome) -> dict[str, Any]:
            engine = outcome.device.engine
            session.provide(bundle, engine=engine, needs_engine=True)
            options = ["--threads=1", "--no-peak", *([] if engine is None else [f"--engine={engine}"])]
            value = session.command(["benchmark", "--json", "--quiet", *options, "--", *names], bundle)
            if "error" in value:
                outcome.error = session.error_of(value["error"])
            return value

        with progress_bar() as progress:
            return run_on(remote.devices, work, remote.setup, progress=progress)


def device_data(outcome: Outcome) -> dict[str, Any]:
    """Return what a record keeps of a device."""
    value, failed = outcome.value or {}, outcome.error
    error = {"error": failed.reason, "error_exit_code": failed.exit_code} if failed else {}
    return {
        **outcome.to_dict(),
        "results": value.get("results", []),
        "noise": list(value.get("invalid_because", ())),
        **error,
    }
