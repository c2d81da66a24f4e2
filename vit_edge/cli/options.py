"""Named groups of options in `-h`: the most used options first, then one section for each group."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import click

__all__ = ["COMMON", "DECODING", "ENGINE", "GroupedCommand", "load_options", "option_group"]

COMMON = "Common options"
# click's column for option names; longer lists of values go into the help text, where they wrap.
_WIDEST = 30
# Which engine runs one model file, and how its images are decoded.
ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "onnxruntime", "openvino"]),
    default="auto",
    show_default=True,
    help="Inference engine; auto takes what `vit-edge tune` saved, else the first installed one.",
)
DECODING = (
    click.option(
        "--decode",
        type=click.Choice(["full", "fast"]),
        default="full",
        show_default=True,
        help="fast: decode large JPEGs at a reduced scale, never below the input size.",
    ),
    click.option(
        "--max-image-megapixels",
        type=click.FloatRange(0, 10_000, min_open=True),
        help="Refuse larger images: decoding needs 12 bytes a pixel  [default: 50].",
    ),
)
_log = logging.getLogger(__name__)
_TITLES: dict[click.Parameter, str] = {}


def option_group(title: str, *options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds options, as made by `click.option`, and shows them under `title` in `-h`.

    Options outside of any group come first, under "Options".
    """

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
            _TITLES[function.__click_params__[-1]] = title
        return function

    return decorate


def load_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--sandbox` and `--allow-op`, which hold for every model file that the command loads."""

    @functools.wraps(function)
    def run(*arguments: Any, sandbox: Any, allow_op: tuple[str, ...], **values: Any) -> Any:
        from vit_edge.runtime.checks.load_policy import LoadPolicy, load_policy

        if allow_op:
            _log.warning("allowed besides the operator allow-list: %s", ", ".join(allow_op))
        with load_policy(LoadPolicy(sandbox=sandbox, allow_ops=allow_op)):
            result = function(*arguments, **values)
        if allow_op:
            result.data["allowed_operators"] = list(allow_op)
        return result

    choice = click.Choice(["auto", "always", "never"])
    when = "Try a model file in a subprocess first: auto, if this machine has not accepted the file before."
    more = "Allow an operator besides the allow-list; repeatable. The output lists it."
    decorated: Callable[..., Any] = option_group(
        "Trust",
        click.option("--sandbox", type=choice, default="auto", show_default=True, help=when),
        click.option("--allow-op", multiple=True, metavar="NAME", help=more),
    )(run)
    return decorated


class GroupedCommand(click.Command):
    """A command whose `-h` shows groups of options, and every value of an option with a closed set of values."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            title = _TITLES.get(parameter, COMMON if "--help" in parameter.opts else "Options")
            if isinstance(parameter, click.Option) and (record := _record(parameter, ctx)):
                groups.setdefault(title, []).append(record)
        last = groups.pop(COMMON, [])
        for title, records in [*groups.items(), (COMMON, last)]:
            with formatter.section(title):
                formatter.write_dl(records, col_max=_WIDEST)


def _record(parameter: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    """Return the row of an option in `-h`; values that would widen the first column follow the help text."""
    record = parameter.get_help_record(ctx)
    values = getattr(parameter.type, "choices", None)
    if record is None or not values:
        return record
    shown = f"[{'|'.join(map(str, values))}]"
    if shown in record[0] and len(record[0]) <= _WIDEST:
        return record
    name = (parameter.name or "").strip("_").rsplit("_", maxsplit=1)[-1].upper()
    text, gap, defaults = record[1].partition("  [")
    if not all(str(value) in text for value in values):
        text = f"{text.rstrip('.')}: {', '.join(map(str, values))}."
    return record[0].replace(shown, name), f"{text}{gap}{defaults}"
