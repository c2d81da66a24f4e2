"""Run on several devices at once; a device that fails does not disturb the others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_edge.errors import EngineUnavailable, UsageError, VitEdgeError
from vit_edge.files import read_file
from vit_edge.progress import Progress, silent
from vit_edge.remote.device import Device, Session, Setup
from vit_edge.remote.package import ENGINES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Outcome", "chosen_devices", "failure", "run_on"]

_MOST_BYTES, _MOST_AT_ONCE = 1_000_000, 16
_TEXTS, _NEEDED = ("name", "address", "python", "target", "engine"), ("name", "address")


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What one device gave: facts of it, what the work returned, and the error that ended it, if any."""

    device: Device
    facts: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    error: VitEdgeError | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return which device it was, as JSON-ready values."""
        device = self.device
        known = ("python", "machine", "system", "emulated")
        found = {"on": device.address, "device": device.name, "target": device.target, "tags": list(device.tags)}
        return found | {key: self.facts[key] for key in known if key in self.facts}


def chosen_devices(addresses: Sequence[str], *, file: Path | None, tags: Sequence[str], python: str) -> list[Device]:
    """Return the devices of the addresses and those of a `devices.toml` that have one of the tags (or any without).

    Raises UsageError where the file is not what it should be, or nothing is chosen.
    """
    found = [Device(address=address, name=address, python=python) for address in dict.fromkeys(addresses)]
    if file is not None:
        listed = _read(file, python)
        found += [device for device in listed if not tags or set(tags) & set(device.tags)]
    if not found:
        reason = f"no device in it has the tag {' or '.join(tags)}" if tags else "it names no device"
        raise UsageError("cannot choose a device", file=file, reason=reason, remedy="see docs/devices.md")
    return found


def run_on(
    devices: Sequence[Device],
    work: Callable[[Session, Outcome], Any],
    setup: Setup,
    *,
    progress: Progress = silent,
) -> list[Outcome]:
    """Do the work on all devices at once and return the outcome of each, in their order; Ctrl-C ends all sessions.

    `progress` gets the names of the devices that still run.
    """
    running = _Running(setup)
    outcomes = [Outcome(device=device) for device in devices]
    with ThreadPoolExecutor(max_workers=min(len(devices), _MOST_AT_ONCE)) as pool:
        futures: list[Future[None]] = [pool.submit(running.one, outcome, work) for outcome in outcomes]
        try:
            while names := [device.name for device, one in zip(devices, futures, strict=True) if not one.done()]:
                progress(f"running on {', '.join(names)}", 0, 0)
                wait([one for one in futures if not one.done()], return_when=FIRST_COMPLETED)
        except BaseException:
            running.stop()
            raise
        for future in futures:
            future.result()  # a bug in the work is raised here
    return outcomes


def failure(outcomes: Iterable[Outcome]) -> VitEdgeError | None:
    """Return the error to end with: the one there is, or one for all, with exit code 7 where a device was lost."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    errors = [outcome.error for outcome in failed if outcome.error is not None]
    if len(errors) <= 1:
        return errors[0] if errors else None
    lost = [error for error in errors if isinstance(error, EngineUnavailable)]
    kind = type((lost or errors)[0])
    reason = "; ".join(str(error) for error in errors)
    names = ", ".join(outcome.device.name for outcome in failed)
    return kind(
        f"{len(errors)} devices failed: {names}", reason=reason, remedy="see the results of the other devices above"
    )


class _Running:
    """The sessions that are open, so that all can be ended from outside."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._lock = setup, threading.Lock()
        self._sessions: list[Session] = []
        self._stopped = False

    def one(self, outcome: Outcome, work: Callable[[Session, Outcome], Any]) -> None:
        """Do the work on one device; what goes wrong there is its outcome."""
        session = None
        try:
            with self._lock:
                if self._stopped:
                    return
                session = Session(outcome.device, self._setup)
                self._sessions.append(session)
            with session:
                outcome.facts = session.facts
                outcome.value = work(session, outcome)
        except VitEdgeError as error:
            outcome.error = error
        finally:
            with self._lock:
                if session in self._sessions:
                    self._sessions.remove(session)

    def stop(self) -> None:
        """End every session; the devices clean up."""
        with self._lock:
            self._stopped, sessions = True, list(self._sessions)
        for session in sessions:
            threading.Thread(target=session.abort, daemon=True).start()


def _read(file: Path, python: str) -> list[Device]:
    text = read_file(file, what="list of devices", max_bytes=_MOST_BYTES, error=UsageError)
    try:
        entries = tomllib.loads(text.decode("utf-8")).get("device", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("devices are tables called [[device]]")
        devices = [_device(entry, python) for entry in entries]
        names = [device.name for device in devices]
        if len(set(names)) < len(names):
            raise ValueError("two devices have the same name")
    except (ValueError, RecursionError) as error:
        remedy = "see docs/devices.md"
        reason = str(error)[:300]
        raise UsageError("cannot read the list of devices", file=file, reason=reason, remedy=remedy) from error
    return devices


def _device(entry: dict[str, Any], python: str) -> Device:
    unknown = sorted(set(entry) - {*_TEXTS, "tags"})
    if unknown:
        raise ValueError(f"a device has no {unknown[0]!r}; it has {', '.join((*_TEXTS, 'tags'))}")
    for name in _TEXTS:
        if name in entry and not (isinstance(entry[name], str) and entry[name]):
            raise ValueError(f"{name} is {entry[name]!r}")
    missing = [name for name in _NEEDED if name not in entry]
    if missing:
        raise ValueError(f"a device has no {missing[0]}")
    tags = entry.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags of {entry['name']} are {tags!r}")
    if entry.get("engine") not in (None, *ENGINES):
        raise ValueError(f"engine of {entry['name']} is {entry['engine']!r}; choose {' or '.join(ENGINES)}")
    return Device(**{"python": python, **entry, "tags": tuple(tags)})
