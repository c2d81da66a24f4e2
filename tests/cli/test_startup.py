"""Start-up: a command imports what it needs, nothing before it is called, and says so before it loads PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit_edge.cli import cli

# Each takes 50 ms or more to import; rich and PIL together as much.
SLOW = ("numpy", "PIL", "rich", "onnx", "onnxruntime", "openvino", "scipy", "torch", "importlib.metadata")


def run(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if key != "RANK"},
    )  # fmt: skip


def test_help_imports_no_command() -> None:
    script = "from vit_edge.cli import main; main(['-h']); import sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run(script).stdout.splitlines()[-1])
    assert [name for name in loaded if name.startswith(("vit_edge.cli.device", "vit_edge.cli.workstation"))] == []
    assert set(loaded) & set(SLOW) == set()


def test_the_help_of_no_command_imports_a_slow_library() -> None:
    script = (
        "import sys, json\nfrom vit_edge.cli import main\n"
        f"found = {{name: main([name, '-h']) or [m for m in {SLOW} if m in sys.modules] for name in sys.argv[1:]}}\n"
        "print(json.dumps(found))"
    )
    done = run(script, *sorted(cli.commands))
    assert json.loads(done.stdout.splitlines()[-1]) == {name: [] for name in cli.commands}


def test_inspect_loads_no_engine(small_model: Path) -> None:
    script = "import sys, json; from vit_edge.cli import main; main(['inspect', 'm.onnx']); "
    done = run(script + "print(json.dumps(sorted(sys.modules)))", cwd=small_model)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert set(loaded) & {"torch", "onnxruntime", "openvino", "scipy"} == set()  # onnx counts parameters


@pytest.mark.parametrize(
    "arguments", [("export", "x"), ("convert", "x"), ("train", "x", "-o", "run"), ("deploy", "x")], ids=lambda a: a[0]
)
def test_loading_pytorch_is_announced_before_it_begins(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import sys; print('torch begins', file=sys.stderr); raise ImportError('x')")
    script = "import sys; sys.path.insert(0, '.'); from vit_edge.cli import main; main(sys.argv[1:])"
    lines = run(script, *arguments, cwd=tmp_path).stderr.splitlines()
    # "starting" comes first if half a second passed before.
    assert [line for line in lines if line != "starting"][:2] == ["loading PyTorch", "torch begins"]
    assert "torch begins" in run(script, *arguments, "-q", cwd=tmp_path).stderr.splitlines()[0]


def test_commands_are_completed_with_their_summaries_and_without_being_imported() -> None:
    script = (
        "import sys, click\nfrom vit_edge.cli import cli\n"
        "items = cli.shell_complete(click.Context(cli), 'de')\n"
        "print([(item.value, item.help) for item in items], 'vit_edge.cli.workstation.deploy' in sys.modules)"
    )
    assert run(script).stdout == "[('deploy', 'Export, quantize, verify and package in one command')] False\n"
