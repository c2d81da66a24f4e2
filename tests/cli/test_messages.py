"""Colours, messages and widths in a terminal, and their absence elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "vit_edge")


def in_terminal(*arguments: str | Path, width: int = 80, code: tuple[str, ...] = COMMAND, **environment: str) -> str:
    """Return what a command writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "TERM")}
    command = [*code, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**clean, "TERM": "xterm", **environment}
    ):
        os.close(theirs)
        written = b""
        while chunk := _read(ours):
            written += chunk
    os.close(ours)
    return written.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other side is closed
        return b""


def plain(text: str) -> list[str]:
    """Return the lines that stay on the screen, without colours."""
    lines = (line.rstrip("\r").split("\r")[-1] for line in text.split("\n"))
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in lines]


def test_an_error_is_red_in_a_terminal_alone(tmp_path: Path) -> None:
    missing = tmp_path / "no.onnx"
    assert "\x1b[31m\x1b[1merror:\x1b[0m cannot read" in in_terminal("inspect", missing)
    assert "\x1b[" not in in_terminal("inspect", missing, "-q", NO_COLOR="1")
    piped = subprocess.run([*COMMAND, "inspect", missing], capture_output=True, text=True, check=False)
    assert "\x1b" not in piped.stdout + piped.stderr
    assert piped.stderr.splitlines()[-2].startswith("error: cannot read")


def test_wrong_usage_is_shown_as_other_errors_are() -> None:
    text = in_terminal("classify")
    assert "\x1b[31m\x1b[1merror:\x1b[0m Missing argument 'MODEL'." in text
    assert plain(text)[-2:] == ["try: vit-edge classify -h", ""]


@pytest.mark.parametrize(("verdict", "colour"), [("pass", "32"), ("fail", "31"), ("inconclusive", "33")])
def test_a_verdict_has_its_colour(verdict: str, colour: str) -> None:
    shown = f"'{verdict}: it is so', 'speed: {verdict}, 1.2', 'a {verdict} of it'"
    table = f"make_table('', ('verdict',), [('{verdict}',)])"
    code = f"from vit_edge.cli.output import _show, make_table; _show([{shown}, {table}])"
    text = in_terminal(code=(sys.executable, "-c", code))
    assert text.count(f"\x1b[1;{colour}m{verdict}\x1b[0m") == 3
    assert "\x1b[1;3" not in in_terminal(code=(sys.executable, "-c", code), NO_COLOR="1")


def test_a_message_goes_above_the_bar_and_ends_lines_between_words() -> None:
    code = (
        "import time; from vit_edge.progress import shown_progress; from vit_edge.cli.messages import print_message\n"
        "with shown_progress() as progress:\n"
        "    progress.announce('loading PyTorch'); print_message('a word ' * 30, label='warning'); time.sleep(0.3)"
    )
    text = in_terminal(code=(sys.executable, "-c", code))
    (start,) = [line for line in plain(text) if "warning:" in line]
    assert start.startswith("warning: a word a word")
    assert all(len(line) <= 80 for line in plain(text))
    words = " ".join(line.strip() for line in plain(text) if "word" in line).split()
    assert words == ["warning:", *["a", "word"] * 30]
