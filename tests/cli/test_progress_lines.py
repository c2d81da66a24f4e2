"""Progress on a stderr that is no terminal."""

from __future__ import annotations

import time

import pytest

from vit_edge.cli.progress_lines import progress_lines


def test_each_stage_is_one_line_and_a_silent_stage_is_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_lines(every_s=0.05) as progress:
        progress("exporting", 0, 1)
        progress("measuring", 0, 24)
        progress("measuring", 3, 24)
        time.sleep(0.5)  # the work reports nothing meanwhile
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if ":" not in line] == ["exporting", "measuring"]
    assert lines.count("measuring: 3 of 24") >= 2


def test_nothing_is_printed_after_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_lines(every_s=0.01) as progress:
        progress("exporting", 0, 1)
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
