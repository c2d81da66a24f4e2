"""Idle OpenMP threads sleep, so that training does not collapse when another process uses the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PRINT = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize("imported", ["vit_edge", "vit_edge.runtime", "vit_edge.__main__", "vit_edge.machine.openmp"])
def test_every_way_in_lets_idle_threads_sleep(imported: str) -> None:
    assert _printed(f"import {imported}; {_PRINT}") == "passive"


def test_torch_is_not_loaded_before() -> None:
    assert _printed("import vit_edge, sys; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "5")]
)
def test_what_the_user_set_stays(name: str, value: str) -> None:
    found = _printed(
        f"import vit_edge, os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ['{name}'])", name, value
    )
    assert found == f"{'active' if name == 'OMP_WAIT_POLICY' else None} {value}"


def _printed(script: str, name: str = "", value: str = "") -> str:
    settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {key: text for key, text in os.environ.items() if key not in settings}
    environment |= {name: value} if name else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_no_telemetry_is_sent_unless_the_user_asks_for_it(given: dict[str, str], expected: str) -> None:
    environment = {key: text for key, text in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"} | given
    script = "import vit_edge, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
