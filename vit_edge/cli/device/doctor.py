"""`vit-edge doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_edge.cli.device.remote import on_devices, ran_on
from vit_edge.cli.output import Result, command, gigabytes, make_table, progress_bar
from vit_edge.errors import EngineUnavailable

if TYPE_CHECKING:
    from vit_edge.remote.fleet import Outcome


def _reported(outcomes: Sequence[Outcome]) -> list[Any]:
    """Return the report of each device."""
    return [entry for outcome in outcomes for entry in _shown(outcome.value, ran_on(outcome))]


@command("doctor")
@on_devices(shown=_reported, needs_engine=False)
def doctor() -> Result:
    """Show the CPU, memory and engines of this machine, what is wrong, and the target to quantize for.

    `vit-edge quantize --target FILE.json` reads the --json output on another machine. The exit code is 7 if no engine
    works here, or if installed packages do not fit each other.

    \b
    Examples:
      vit-edge doctor
      vit-edge doctor --json > device.json
      vit-edge doctor --on ssh://pi@raspberrypi --json > device.json
    """
    from vit_edge.machine.doctor import examine

    with progress_bar("trying the engines"):
        report = examine()
    return Result(data=report, shown=_shown(report, "this machine"), error=_unusable(report))


def _shown(report: dict[str, Any], name: str) -> list[Any]:
    ended = _unusable(report)  # its advice follows the tables
    findings = [
        f"{finding['kind']}: {finding['what']}\n  try: {finding['advice']}"
        for finding in report["findings"]
        if ended is None or finding["what"] != ended.reason
    ]
    extras = _extras(report)
    return [
        _headline(report, name),
        make_table("", (name, ""), _rows(report)),
        *([make_table("", ("missing extra", "for", "install with"), extras)] if extras else []),
        *findings,
    ]


def _headline(report: dict[str, Any], name: str) -> str:
    """Return the verdict in a sentence: whether models run, and the target to quantize for."""
    working = [engine["name"] for engine in report["engines"] if engine["installed"] and not engine["error"]]
    able = f"{name} can run models in {' and '.join(working)}" if working else f"{name} cannot run models"
    target = report["target"]
    mark = "" if target["verified"] else " (unverified: not yet tested on such hardware)"
    able = able[0].upper() + able[1:]
    return f"{able}. Quantize with --target {target['name']}{mark}: {target['reason']}."


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory = report["cpu"], report["memory"]
    granted = f"{cpu['usable_threads']} usable of {cpu['cpus']} CPUs"
    sizes = (("total_bytes", "in total"), ("available_bytes", "free"), ("limit_bytes", "granted"))
    known = [f"{gigabytes(memory[key])} {word}" for key, word in sizes if memory[key] is not None]
    return [
        ("vit-edge", f"{report['vit_edge']}, Python {report['python']['version']} ({report['python']['bits']} bits)"),
        ("system", report["system"]),
        *([("board", cpu["board"])] if cpu["board"] else []),
        ("CPU", f"{cpu['name']}, {cpu['machine']}"),
        ("instructions", " ".join(cpu["instructions"]) or "not known"),
        ("threads", granted + (f", a quota of {cpu['quota_cpus']:g}" if cpu["quota_cpus"] else "")),
        ("frequency governor", ", ".join(cpu["governors"]) or "not known"),
        ("memory", ", ".join(known) or "not known"),
        *((engine["name"], _engine(engine)) for engine in report["engines"]),
    ]


def _engine(engine: dict[str, Any]) -> str:
    if not engine["installed"]:
        return "not installed"
    names = [f"{d} (does not load)" if d in engine["do_not_load"] else d for d in engine["devices"]]
    return engine["error"] or f"{engine['version']}: {', '.join(names) or 'no device'}"


def _extras(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"{entry['extra']} ({', '.join(entry['missing'])})", entry["for"], entry["command"])
        for entry in report["missing_extras"]
    ]


def _unusable(report: dict[str, Any]) -> EngineUnavailable | None:
    works = any(engine["installed"] and not engine["error"] for engine in report["engines"])
    if works and not report.get("misfits"):
        return None
    problems = [finding for finding in report["findings"] if finding["kind"] == "problem"]
    what = "cannot trust the installation" if works else "cannot run a model on this machine"
    return EngineUnavailable(what, reason=problems[0]["what"], remedy=problems[0]["advice"])
