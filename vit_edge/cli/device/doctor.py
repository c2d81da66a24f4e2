"""`vit-edge doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_edge.cli.device.remote import on_devices, ran_on
from vit_edge.cli.output import Result, command, make_table, megabytes
from vit_edge.errors import EngineUnavailable

if TYPE_CHECKING:
    from vit_edge.remote.fleet import Outcome


def _reported(outcomes: Sequence[Outcome]) -> list[Any]:
    """Return the report of each device."""
    return [entry for outcome in outcomes for entry in _shown(outcome.value, ran_on(outcome))]


@command("doctor")
@on_devices(shown=_reported, needs_engine=False)
def doctor() -> Result:
    """Tell what this machine has to run a model with, what is wrong with it, and which target to quantize for.

    With --json it prints what `vit-edge quantize --target FILE.json` takes on another machine. The exit code is 7 where
    no engine works here, else 0.

    \b
    Example:
      vit-edge doctor
      vit-edge doctor --json > device.json
      vit-edge doctor --on ssh://pi@raspberrypi --json > device.json
    """
    from vit_edge.machine.doctor import examine

    report = examine()
    return Result(data=report, shown=_shown(report, "this machine"), error=_unusable(report))


def _shown(report: dict[str, Any], name: str) -> list[Any]:
    return [
        make_table("", (name, ""), _rows(report)),
        *([make_table("", ("missing extra", "for", "install with"), _extras(report))] if _extras(report) else []),
        *(f"{finding['kind']}: {finding['what']} - {finding['advice']}" for finding in report["findings"]),
        _advised(report),
    ]


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory = report["cpu"], report["memory"]
    granted = f"{cpu['usable_threads']} usable of {cpu['cpus']} CPUs"
    sizes = (("total_bytes", "in all"), ("available_bytes", "free"), ("limit_bytes", "granted"))
    known = [f"{megabytes(memory[key])} {word}" for key, word in sizes if memory[key] is not None]
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


def _advised(report: dict[str, Any]) -> str:
    target = report["target"]
    mark = "" if target["verified"] else " (unverified: nobody ran it on such hardware)"
    return f"quantize with --target {target['name']}{mark}: {target['reason']}"


def _unusable(report: dict[str, Any]) -> EngineUnavailable | None:
    if any(engine["installed"] and not engine["error"] for engine in report["engines"]):
        return None
    problems = [finding for finding in report["findings"] if finding["kind"] == "problem"]
    reason = "; ".join(finding["what"] for finding in problems)
    return EngineUnavailable("no model can run here", reason=reason, remedy=problems[0]["advice"])
