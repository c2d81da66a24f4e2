"""A small seeded share of `make fuzz`, and what the fuzzer found before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fuzzing import fuzz
from tests.faults.fuzzing.fuzz_targets import TARGETS, make_seeds
from tests.faults.fuzzing.mutants import change_text


def test_300_mutants_are_loaded_as_the_original_or_refused_by_one_error(deployment: Path, tmp_path: Path) -> None:
    (tmp_path / "seeds").mkdir()
    make_seeds(tmp_path / "seeds", deployment)
    found = fuzz.fuzz(tmp_path / "seeds", first=0, mutants=300, seed=0)
    assert found.wrong == []
    assert sum(found.ran.values()) == 300
    assert found.ran.keys() == TARGETS.keys()


DIES = """
import json, os, sys, time
start, end, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for number in range(start, end):
    if number == 3 and how == "dies":
        os.abort()
    if number == 3 and how == "hangs":
        time.sleep(600)
    print(json.dumps([number, "kind", None, 25.0 if number == 5 else 0.1, 2 * 10**9 if number == 6 else 0]), flush=True)
"""


@pytest.mark.parametrize(("how", "said"), [("dies", "ended with -6"), ("hangs", "said nothing for 8 s")])
def test_the_fuzzer_sees_deaths_hangs_slowness_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setattr(fuzz, "_PATIENCE_S", 8.0)
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        at = command.index("--child")
        return real([sys.executable, "-c", DIES, *command[at + 3 : at + 5], how], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzz.subprocess, "Popen", popen)
    found = fuzz.fuzz(tmp_path, first=0, mutants=8, seed=0, workers=1)
    assert [number for number, _, _ in found.wrong] == [3, 5, 6]
    texts = " ".join(text for _, _, text in found.wrong)
    assert said in texts
    assert "slow: 25.0 s" in texts
    assert "memory: 2.00 GB" in texts
    assert sum(found.ran.values()) == 8


def test_the_same_number_gives_the_same_mutant() -> None:
    import random

    data = json.dumps({"a": [1, 2, {"b": "c"}]}).encode()
    mutants = [change_text(data, random.Random(f"0:{number}")) for number in range(50)]
    assert mutants == [change_text(data, random.Random(f"0:{number}")) for number in range(50)]
    assert len({*mutants}) > 20
