"""Every command that a page, a help text or an error names exists, with these options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator

import click
import pytest

from tests.conftest import ROOT
from tests.policy.ranks import modules
from vit_edge.cli import cli

PAGES = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
_OPTION = re.compile(r"(?<![\w-])(--?[a-z][a-z0-9-]*)")


def _command_lines() -> Iterator[tuple[str, str]]:
    """Yield (place, the words after `vit-edge`) of each line of code in the pages."""
    for path in sorted(PAGES):
        if path.name == "CHANGELOG.md":  # it names what there was
            continue
        is_fenced = False
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            is_fenced ^= line.lstrip().startswith("```")
            found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )?vit-edge (.*)", line)
            if found and (is_fenced or line.startswith("    ")):
                yield path.relative_to(ROOT).as_posix(), found[1]


def _mentions() -> Iterator[tuple[str, str, bool]]:
    """Yield (place, the words after `vit-edge`, whether it must be a command) from inline code and the code's texts."""
    for path in sorted(PAGES):
        if path.name != "CHANGELOG.md":
            for text in re.findall(r"`vit-edge ([^`]+)`", path.read_text(encoding="utf-8")):
                yield path.relative_to(ROOT).as_posix(), text, True
    for path in modules(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for text in re.findall(r"(?<![\w.])vit-edge ([a-z]+(?: [^`\n;,)]*)?)", node.value):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text, False


def _arguments(line: str) -> list[str]:
    """Return the words of a command line without comment, redirection and ellipsis."""
    bare = re.split(r"\s+#\s|\s[|>]\s|\s2>", line)[0]
    return [word for word in shlex.split(bare) if word != "..."]


def _problem(line: str) -> str | None:
    """Return why a command line would not parse, or None."""
    name, *rest = _arguments(line)
    command = cli.commands.get(name)
    if name.startswith("-"):
        return None if name in {"-h", "--help", "--version"} else f"no option {name}"
    if command is None:
        return f"no command {name}"
    try:
        with command.make_context(name, rest):
            return None
    except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
        return None
    except click.UsageError as error:
        return error.format_message()


@pytest.mark.parametrize("place", sorted({place for place, _ in _command_lines()}))
def test_command_lines_of_a_page_parse(place: str) -> None:
    problems = {line: _problem(line) for page, line in _command_lines() if page == place}
    assert {line: problem for line, problem in problems.items() if problem} == {}


def test_commands_and_options_that_are_mentioned_exist() -> None:
    wrong = []
    for place, text, is_code in _mentions():
        name, _, rest = text.partition(" ")
        command = cli.commands.get(name)
        known = {option for parameter in command.params for option in parameter.opts} if command else set()
        missing = {option for option in _OPTION.findall(rest) if option not in known | {"-h", "--help"}}
        if name[0] != "-" and (missing if command else is_code and name != "COMMAND"):  # prose: "vit-edge loads it"
            wrong.append(f"{place}: vit-edge {text}: {sorted(missing) or 'no such command'}")
    assert wrong == []


def test_a_wrong_command_is_found() -> None:
    assert "--calibrate" in str(_problem("quantize model.onnx --calibrate x"))
    assert "batch" in str(_problem("quantize model.onnx --calibration x --batch-size none"))
    assert _problem("quantise model.onnx") == "no command quantise"
    assert _problem("verify model.onnx --reference r.onnx") is not None
    assert _problem("verify m.int8.onnx --reference m.onnx --data images  # a comment") is None
