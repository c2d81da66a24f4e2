"""Progress that is shown: lines in a file or pipe, one bar in a terminal, and something at once in every command."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from vit_edge.progress import ProgressBar, ProgressLines, Stage, duration


def test_quick_work_writes_no_line() -> None:
    lines = list[str]()
    with ProgressLines(lines.append, first_s=60) as progress:
        progress("reading", 0, 3)
        progress("reading", 3, 3)
    assert lines == []


def test_each_stage_is_one_line_and_a_silent_stage_is_repeated() -> None:
    lines = list[str]()
    with ProgressLines(lines.append, first_s=0, every_s=0.05) as progress:
        progress("exporting", 0, 1)
        progress("measuring", 0, 24)
        progress("measuring", 3, 24)
        _wait_for(lines, 8)  # the work reports nothing meanwhile
    begun = dict.fromkeys(line for line in lines if ":" not in line and line != "starting")
    assert list(begun) == ["exporting", "measuring"]
    assert lines[-1].startswith("measuring: 3 of 24")


def test_work_that_reports_nothing_still_writes_a_line() -> None:
    lines = list[str]()
    with ProgressLines(lines.append, first_s=0, every_s=0.05) as progress:
        _wait_for(lines, 2)
        progress("reading", 3, 3)
        _wait_for(lines, len(lines) + 2)
    assert lines[0] == "starting"
    assert lines[-1].startswith("working")


def test_an_announced_stage_is_named_at_once_and_nothing_is_written_after_the_end() -> None:
    lines = list[str]()
    with ProgressLines(lines.append, every_s=0.01) as progress:
        progress.announce("loading PyTorch")
        assert lines[0] == "loading PyTorch"
    number = len(lines)
    time.sleep(0.05)
    assert len(lines) == number


def test_a_detail_belongs_to_its_stage() -> None:
    lines = list[str]()
    with ProgressLines(lines.append, first_s=0, every_s=0.05) as progress:
        progress("training", 1, 9)
        progress.detail("epoch 1 of 3")
        _wait_for(lines, 3)
        progress("testing", 0, 9)
    assert "training: epoch 1 of 3" in lines
    assert lines[-1] == "testing"


def test_the_estimate_is_of_what_is_left_since_the_stage_began() -> None:
    stage = Stage("reading", done=20, total=50, first_done=10, begun=time.monotonic() - 20)
    assert stage.position() == "20 of 50, about 1 min 00 s left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3720, "1 h 02 min")])
def test_durations_are_rounded_once(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_terminal_shows_one_bar_that_disappears() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    with ProgressBar(console, first_s=0) as progress:
        progress("reading", 1, 3)
        progress.announce("loading PyTorch")
        progress("training", 2, 9)
        progress.detail("epoch 12/120, loss 0.123, top-1 100.0 %, 12 min 34 s left")
        time.sleep(0.3)
    text = shown.getvalue()
    assert "epoch 12/120, loss 0.123, top-1 100.0 %, 12 min 34 s left" in text
    assert "\x1b[2K" in text.rpartition(" left")[2]  # the line is erased


def _wait_for(lines: list[str], number: int) -> None:
    end = time.monotonic() + 20
    while len(lines) < number and time.monotonic() < end:
        time.sleep(0.02)
    assert len(lines) >= number
