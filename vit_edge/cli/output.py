"""What every command shares: `--json`, `--config`, `-q`, `-v`, result on stdout, progress and warnings on stderr."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.messages import coloured, print_message
from vit_edge.cli.options import COMMON, GroupedCommand, option_group
from vit_edge.cli.progress_display import command_progress, progress_bar
from vit_edge.cli.streams import holds_unicode
from vit_edge.errors import UsageError, VitEdgeError, escaped
from vit_edge.files import finite, read_file
from vit_edge.machine.cpu import MOST_THREADS

if TYPE_CHECKING:
    from vit_edge.cli.tables import FittingTable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "SCHEMA",
    "Result",
    "command",
    "error_fields",
    "file_argument",
    "gigabytes",
    "image_size_option",
    "make_table",
    "megabytes",
    "parse_size",
    "print_error_json",
    "progress_bar",
    "read_value",
    "threads_option",
]

SCHEMA = 1
_CONFIG_BYTES = 1_000_000
# Without a terminal there is no width; tables must not be cut then.
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a command found: values for `--json`, what to show a person, and the error to end with, if any."""

    data: dict[str, Any]
    shown: Sequence[Any]
    error: VitEdgeError | None = None


def command(name: str) -> Callable[[Callable[..., Result]], click.Command]:
    """Make a click command of a function that returns a Result, with the options that all commands have."""

    def decorate(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, verbose: bool, quiet: bool, **values: Any) -> None:
            with _collected_warnings(verbose=verbose, quiet=quiet) as warnings:
                click.get_current_context().meta["quiet"] = quiet
                try:
                    with command_progress(quiet=quiet):
                        result = function(**values)
                except VitEdgeError as error:
                    if as_json:
                        _print_json(name, {"error": error_fields(error)}, warnings)
                    error.in_json = as_json
                    raise
                if as_json:
                    failed = {"error": error_fields(result.error)} if result.error else {}
                    _print_json(name, {**result.data, **failed}, warnings)
                else:
                    _show(result.shown)
                if result.error:
                    result.error.in_json = as_json
                    raise result.error

        run = option_group(COMMON, *_COMMON)(run)
        return click.command(name, cls=_Remembering, context_settings={"help_option_names": ["-h", "--help"]})(run)

    return decorate


class _Remembering(GroupedCommand):
    """A command that keeps its arguments as they were written, to run them on another machine."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = tuple(args)
        return super().parse_args(ctx, args)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> FittingTable:
    """Return a table that breaks no word: on a narrow terminal its rows are stacked."""
    from vit_edge.cli.tables import FittingTable

    return FittingTable(title, columns, rows)


def megabytes(size_bytes: int) -> str:
    """Return a size for people, in MB of 10^6 bytes."""
    return f"{size_bytes / 1e6:.2f} MB"


def gigabytes(size_bytes: int) -> str:
    """Return a size for people, in GB of 10^9 bytes."""
    return f"{size_bytes / 1e9:.1f} GB"


def file_argument(name: str, *, many: bool = False) -> Callable[[Any], Any]:
    """Return a click argument for a path, not opened by click: our errors name the kind of file, and exit with 3."""
    return click.argument(name, type=click.Path(path_type=Path), nargs=-1 if many else 1, required=True)


def threads_option() -> Callable[[Any], Any]:
    """Return the option `--threads`."""
    return click.option(
        "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads  [default: the CPUs the container grants]."
    )


def image_size_option(help_text: str) -> Callable[[Any], Any]:
    """Return the option `--image-size`, parsed to (height, width)."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
        return None if value is None else parse_size(value)

    return click.option("--image-size", metavar="N|HxW", callback=parse, help=help_text)


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) from "N" or "HxW"; raises UsageError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch(r"[1-9]\d{0,4}", side) for side in sides):
        raise UsageError("cannot use the size", reason=f"the size is {text!r}", remedy="write pixels as 224 or 192x256")
    return int(sides[0]), int(sides[-1])


def read_value(text: str) -> Any:
    """Return what a value on the command line means: a TOML value, "none" for nothing, else the text itself."""
    if text.strip().lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        text = read_file(path, what="configuration", max_bytes=_CONFIG_BYTES).decode("utf-8")
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise UsageError("cannot read the configuration", file=path, reason=reason, remedy="write TOML") from error
    name = context.info_name or ""
    # Values outside of a table are for whichever command reads them; a table is for the command of its name.
    own = values.get(name, {})
    values = {key: value for key, value in values.items() if not isinstance(value, dict) and key != name}
    values |= own if isinstance(own, dict) else {name: own}
    spellings = {text.lstrip("-"): p for p in context.command.params for text in p.opts if p.name != "config"}
    unknown = sorted(set(values) - set(spellings))
    if unknown:
        reason, remedy = f"{name} has no option {unknown[0]!r}", f"see `vit-edge {name} -h`"
        raise UsageError("cannot use the configuration", file=path, reason=reason, remedy=remedy)
    for key, value in values.items():
        if not _fits(spellings[key], value):
            reason, remedy = (
                f"{key} is {value!r}"[:200],
                "write it as on the command line; options that repeat as a list",
            )
            raise UsageError("cannot use the configuration", file=path, reason=reason, remedy=remedy)
    context.default_map = {spellings[key].name or key: value for key, value in values.items()}


def _fits(option: Any, value: Any) -> bool:
    """Return whether a TOML value is of the kind that an option takes."""
    if getattr(option, "multiple", False):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if getattr(option, "is_flag", False):
        return isinstance(value, bool)
    return isinstance(value, str | int | float) and not isinstance(value, bool)


_COMMON = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-v", "--verbose", is_flag=True, help="Show more on stderr."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no warnings on stderr."),
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        metavar="FILE",
        help="TOML file with values for any of these options.",
    ),
)


class _Collector(logging.Handler):
    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self.quiet, self.messages = quiet, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        message = escaped(record.getMessage())
        if message in self.messages:  # the same files are looked through more than once
            return
        if record.levelno >= logging.WARNING:
            self.messages.append(message)
        if not self.quiet:
            print_message(message, label=record.levelname.lower())


@contextmanager
def _collected_warnings(*, verbose: bool, quiet: bool) -> Iterator[list[str]]:
    logger, collector = logging.getLogger("vit_edge"), _Collector(quiet=quiet)
    logger.addHandler(collector)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)


def error_fields(error: VitEdgeError) -> dict[str, Any]:
    """Return an error as JSON-ready values."""
    return {
        "type": type(error).__name__,
        "exit_code": error.exit_code,
        "what": error.what,
        "file": error.file,
        "reason": error.reason,
        "remedy": error.remedy,
    }


def _print_json(name: str, data: dict[str, Any], warnings: list[str]) -> None:
    everything = {"schema": SCHEMA, "command": name, **data, "warnings": warnings}
    text = json.dumps(finite(everything), ensure_ascii=not holds_unicode(), default=str)
    # A terminal may show it: what is not printable is escaped as JSON escapes it.
    click.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


def print_error_json(name: str, error: dict[str, Any]) -> None:
    """Print an error as the one JSON object of a command that never ran."""
    _print_json(name, {"error": error}, [])


def _show(shown: Sequence[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        width = int(os.environ.get("COLUMNS", "")) if os.environ.get("COLUMNS", "").isdigit() else None
        console = Console(highlight=False, markup=False, emoji=False, width=width or _WIDTH_WITHOUT_TERMINAL)
    for entry in shown:
        # In a terminal a line ends between words; in a file a sentence stays one line.
        console.print(
            coloured(escaped(entry)) if isinstance(entry, str) else entry,
            soft_wrap=isinstance(entry, str) and not console.is_terminal,
        )
