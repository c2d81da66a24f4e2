"""`--on ssh://user@host`: run a command on devices and show the results here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from vit_edge.cli.options import option_group
from vit_edge.cli.output import Result, make_table, progress_bar
from vit_edge.errors import UsageError, VitEdgeError, printable
from vit_edge.files import temporary_folder

if TYPE_CHECKING:
    from vit_edge.remote.device import Bundle, Device, Session, Setup
    from vit_edge.remote.fleet import Outcome

__all__ = ["Remote", "Shown", "classified", "measured", "merged", "on_devices", "parts", "ran_on"]

# A command's tables for people, of what each device printed.
Shown: TypeAlias = "Callable[[Sequence[Outcome]], list[Any]]"
# Takes the options about the result, and returns the function that uses them.
Begin: TypeAlias = Callable[[dict[str, Any]], Callable[[Result], Result]]
_OWN = ("on", "device_list", "tags", "install", "wheels", "python", "device_timeout")
_COMMON = ("as_json", "verbose", "quiet", "config")
_PATH = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--on", multiple=True, metavar="ADDRESS",
                 help="Run on this device: ssh://user@host[:port] or adb://SERIAL; repeatable."),
    click.option("--devices", "device_list", type=_PATH, metavar="FILE", help="Run on the devices of a devices.toml."),
    click.option("--tag", "tags", multiple=True, help="Use only the devices with this tag; repeatable."),
    click.option("--python", default="python3", show_default=True, help="Python on the device, with an engine."),
    click.option("--install", is_flag=True, help="Install the engine in a temporary folder on the device."),
    click.option("--wheels", type=_PATH, metavar="DIR", help="Install from these wheels, without network."),
    click.option("--device-timeout", type=click.FloatRange(1), default=3600, show_default=True,
                 help="Longest time for a copy or a command, in seconds."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """The devices that were asked for, and how they are made ready."""

    devices: tuple[Device, ...]
    setup: Setup


def on_devices(
    *,
    uploads: Sequence[str] = (),
    shown: Shown | None = None,
    needs_engine: bool = True,
    own: bool = False,
    here: Sequence[str] = (),
    begin: Begin = lambda _: lambda result: result,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Give a command the options for devices; with them it runs there, as `vit-edge COMMAND --json`, and not here.

    `uploads` are its parameters whose files are sent along; other paths cannot be given then. `shown` makes its tables.
    With `own` the command is called all the same, with the devices as `remote`, or None. Parameters in `here` are about
    the result: `begin` gets them before anything runs, and returns what is done with it here.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(**values: Any) -> Result:
            options = {name: values.pop(name) for name in _OWN}
            remote = _asked(options)
            if own:
                return function(**values, remote=remote)
            if remote is None:
                return function(**values)
            finish = begin({name: values[name] for name in here})
            return finish(_run_there(remote, uploads, shown, needs_engine=needs_engine, here=here))

        decorated: Callable[..., Result] = option_group("Run on other devices", *_OPTIONS)(run)
        return decorated

    return decorate


def ran_on(outcome: Outcome) -> str:
    """Return how a device is called in tables: "emulated" is said wherever it is."""
    return f"{outcome.device.name}{' (emulated)' if outcome.facts.get('emulated') else ''}"


def merged(outcomes: Sequence[Outcome], shown: list[Any]) -> Result:
    """Return the result of all devices: of one, its own values too; `results` of all in one list."""
    devices = [
        {**outcome.to_dict(), **(outcome.value or {}), **({"error": _fields(outcome.error)} if outcome.error else {})}
        for outcome in outcomes
    ]
    first = outcomes[0].value or {}
    data = {key: value for key, value in first.items() if key != "error"} if len(outcomes) == 1 else {}
    data["devices"] = devices
    if any("results" in (outcome.value or {}) for outcome in outcomes):
        data["results"] = [entry for outcome in outcomes for entry in labelled(outcome)]
    from vit_edge.remote.fleet import failure

    failed = [f"{ran_on(o)}: {o.error}" for o in outcomes if o.error is not None and len(outcomes) > 1]
    return Result(data=data, shown=[*shown, *failed], error=failure(outcomes))


def labelled(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the entries of a device's `results`, each with the device it is of."""
    name, emulated = outcome.device.name, bool(outcome.facts.get("emulated"))
    results = (outcome.value or {}).get("results", [])
    return [{**entry, "on": outcome.device.address, "device_name": name, "emulated": emulated} for entry in results]


def _fields(error: VitEdgeError) -> dict[str, Any]:
    from vit_edge.cli.output import error_fields

    return error_fields(error)


def _asked(options: dict[str, Any]) -> Remote | None:
    if not options["on"] and options["device_list"] is None:
        given = [name for name in ("tags", "install", "wheels") if options[name]]
        if given:
            option = f"--{given[0].removesuffix('s') if given[0] == 'tags' else given[0]}"
            raise UsageError("cannot choose a device", reason=f"{option} needs a device", remedy="name one with --on")
        return None
    from vit_edge.remote.device import Setup
    from vit_edge.remote.fleet import chosen_devices

    devices = chosen_devices(options["on"], file=options["device_list"], tags=options["tags"], python=options["python"])
    setup = Setup(install=options["install"], wheels=options["wheels"], seconds=options["device_timeout"])
    return Remote(devices=tuple(devices), setup=setup)


def _run_there(
    remote: Remote, uploads: Sequence[str], shown: Shown | None, *, needs_engine: bool, here: Sequence[str]
) -> Result:
    from vit_edge.remote.device import Bundle
    from vit_edge.remote.fleet import run_on

    context = click.get_current_context()
    given = list(_given(context, uploads, here))
    files = {path: parts(path) for _, values, is_file in given if is_file for path in map(Path, values)}
    with temporary_folder() as folder:
        bundle = Bundle.write(Path(folder), files, remote.setup)

        def work(session: Session, outcome: Outcome) -> dict[str, Any]:
            engine, argv = _arguments(context, given, bundle, outcome.device.engine)
            session.provide(bundle, engine=engine, needs_engine=needs_engine)
            value = session.command(argv, bundle)
            if "error" in value:
                outcome.error = session.error_of(value["error"])
            return {key: entry for key, entry in value.items() if key not in ("schema", "command")}

        with progress_bar() as progress:
            outcomes = run_on(remote.devices, work, remote.setup, progress=progress)
    _repeat_warnings(outcomes)
    return merged(outcomes, [] if shown is None else shown([o for o in outcomes if o.value]))


def _repeat_warnings(outcomes: Sequence[Outcome]) -> None:
    import logging

    for outcome in outcomes:
        for warning in (outcome.value or {}).pop("warnings", []):
            logging.getLogger("vit_edge").warning("%s: %s", outcome.device.name, warning)


def _given(
    context: click.Context, uploads: Sequence[str], here: Sequence[str]
) -> Iterator[tuple[click.Parameter, list[Any], bool]]:
    """Yield (parameter, values as they were written, whether they are files to send) of what was given for there.

    As written, for a command may have made something else of them.
    """
    raw, _, _ = context.command.make_parser(context).parse_args(args=list(context.meta["arguments"]))
    for parameter in context.command.params:
        if parameter.name in (*_OWN, *_COMMON, *here):
            continue
        value, source = parameter.consume_value(context, raw)
        if source in (ParameterSource.DEFAULT, None) or value is None:
            continue
        values = list(value) if isinstance(value, list | tuple) else [value]
        is_file = parameter.name in uploads
        if isinstance(parameter.type, click.Path) and not is_file:
            option = parameter.opts[0]
            raise UsageError(
                "cannot run on a device", reason=f"{option} names a file on this machine", remedy=f"omit {option}"
            )
        yield parameter, values, is_file


def _arguments(
    context: click.Context, given: Sequence[tuple[click.Parameter, list[Any], bool]], bundle: Bundle, engine: str | None
) -> tuple[str | None, list[str]]:
    """Return the engine that is asked for, if any, and the command line there; a device's own engine by default."""
    options, arguments = list[str](), list[str]()
    for parameter, values, is_file in given:
        texts = [bundle.name_there(Path(value)) if is_file else str(value) for value in values]
        if isinstance(parameter, click.Argument):
            arguments += texts
            continue
        name = max(parameter.opts, key=len)
        flag = getattr(parameter, "is_flag", False)
        options += [name] if flag and values[0] else [f"{name}={text}" for text in texts] if not flag else []
        if name == "--engine":
            engine = texts[0] if texts[0] != "auto" else None
            continue
    if engine is not None and not any(option.startswith("--engine=") for option in options):
        names = {option for parameter in context.command.params for option in parameter.opts}
        options += [f"--engine={engine}"] if "--engine" in names else []
    return engine, [context.command.name or "", "--json", "--quiet", *options, "--", *arguments]


def parts(path: Path) -> list[tuple[str, Path]]:
    """Return the file and what belongs to it, each with a name for it there; raises what is wrong with a model file."""
    from vit_edge.model_file.artifact import open_model
    from vit_edge.runtime.onnx_import.importer import is_third_party

    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError("cannot send", file=path, reason="devices take files, not folders", remedy="name the files")
    if suffix == ".xml":
        return [("model.xml", path), ("model.bin", path.with_suffix(".bin"))]
    if suffix != ".onnx":
        extension = suffix if suffix[1:].isalnum() and suffix.isascii() else ""
        return [(f"file{extension}", _readable(path))]
    if is_third_party(path):
        return [("model.onnx", path)]
    weights = open_model(path, warn=False).manifest.weights
    weights_file = [] if weights is None else [(weights["file"], path.parent / weights["file"])]
    return [("model.onnx", path), *weights_file]


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise UsageError("cannot send", file=path, reason="there is no such file", remedy="check the path")
    return path


def classified(outcomes: Sequence[Outcome]) -> list[Any]:
    """Return what ran on each device, and one row for each image on each device."""
    rows, ran = [], []
    for outcome in outcomes:
        model = outcome.value.get("model") or {}
        for image in outcome.value.get("images", []):
            labels = "  ".join(map(_answer, image["answers"]))
            rows.append((ran_on(outcome), image["file"], printable(labels), f"{image['timings']['total_ms']:.1f}"))
        if model:
            where = f"{model['device']}, {model['threads']} threads"
            ran.append(f"{ran_on(outcome)}: {model['engine']} {model['engine_version']} on {where}")
    return [*ran, make_table("", ("device", "image", "labels", "ms"), rows)] if rows else []


def _answer(answer: Mapping[str, Any]) -> str:
    value = answer.get("value")  # of a regression
    return f"{answer['label']} {answer['probability']:.1%}" if value is None else f"{answer['label']} {value:.6g}"


def measured(outcomes: Sequence[Outcome]) -> list[Any]:
    """Return the devices whose figures do not count, and one row for each result of each device."""
    rows, notes = [], list[str]()
    for outcome in outcomes:
        notes += [f"INVALID on {ran_on(outcome)}: {reason}" for reason in outcome.value.get("invalid_because", ())]
        for entry in labelled(outcome):
            rows.append(_row(outcome, entry))
            if entry.get("scenario") == "server" and not entry.get("throughput_per_s"):
                notes.append(f"{rows[-1][0]}: no rate stays within {entry.get('latency_bound_ms')} ms")
    if any(outcome.facts.get("emulated") for outcome in outcomes):
        notes.append("emulated: the times are those of the emulation, not of such hardware")
    columns = ("candidate", "min ms", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up")
    return [*notes, make_table("", columns, rows)] if rows else []


def _row(outcome: Outcome, entry: Mapping[str, Any]) -> tuple[str, ...]:
    latency, ratio = entry.get("latency_ms") or {}, entry.get("ratio") or {}
    engine = f"{entry.get('engine')} {entry.get('engine_version', '')}"
    how = f"{entry.get('precision', '-')}, batch {entry.get('batch_size', '-')}, threads {entry.get('threads', '-')}"
    candidate = f"{ran_on(outcome)}: {Path(str(entry.get('model', '-'))).name} in {engine}, {how}"
    times = [_number(latency.get(name)) for name in ("min", "p50", "p90", "p99")]
    rate, speed_up = _number(entry.get("throughput_per_s"), digits=1), _number(ratio.get("by_round"), digits=2)
    return (candidate, *times, rate, speed_up)


def _number(value: object, *, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"
