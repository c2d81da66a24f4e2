"""The command line in the processes that people have: other encodings, closed streams, packages that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from PIL import Image
from rich.console import Console

from vit_edge.cli import cli, main
from vit_edge.cli.output import make_table

NAME = "猫-é-😀.onnx"


def run(
    *arguments: str, cwd: Path, redirect: str = "", code: str = "pass", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run `vit-edge` in a shell, with its streams redirected; `code` runs first in that process."""
    start = f"{code}; from vit_edge.__main__ import run; run()"
    command = ["bash", "-c", f'"$0" -c "$1" "${{@:2}}" {redirect}', sys.executable, start, *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, check=False, timeout=120, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_an_output_of_any_encoding_gets_escaped_characters(tmp_path: Path, encoding: str) -> None:
    done = run("inspect", NAME, "--json", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 3
    assert json.loads(done.stdout.decode(encoding))["error"]["file"] == NAME
    assert b"error: cannot read the model file" in done.stderr


def test_the_c_locale_prints_too(tmp_path: Path) -> None:
    done = run("inspect", NAME, cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("redirect", "arguments", "code"),
    [(">&-", ("help",), 0), ("2>&-", ("inspect", "x"), 3), (">&- 2>&- <&-", ("inspect", "x", "--json"), 3)],
)
def test_closed_streams_do_not_crash(tmp_path: Path, redirect: str, arguments: tuple[str, ...], code: int) -> None:
    done = run(*arguments, cwd=tmp_path, redirect=redirect)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


def test_without_a_home_and_an_entry_in_passwd_the_cache_is_left_out(tmp_path: Path) -> None:
    code = "import pwd; pwd.getpwuid = lambda uid: {}[uid]; import os; os.environ.pop('HOME', None)"
    code += "; from vit_edge.cache import recall, remember; assert not remember('probes', 'k', {})"
    code += "; assert recall('probes', 'k') is None"
    done = run("inspect", "x", cwd=tmp_path, code=code, VIT_EDGE_CACHE="", XDG_CACHE_HOME="")
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_without_a_home_every_engine_classifies(small_model: Path, tmp_path: Path, engine: str) -> None:
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "image.png")
    code = "import pwd; pwd.getpwuid = lambda uid: {}[uid]; import os; os.environ.pop('HOME', None)"
    command = ("classify", str(small_model / "m.onnx"), "image.png", "--engine", engine)
    done = run(*command, cwd=tmp_path, code=code, VIT_EDGE_CACHE="", XDG_CACHE_HOME="", VIT_EDGE_CONFIG="")
    assert done.returncode == 0, done.stderr


def test_packages_that_do_not_fit_are_named_with_their_versions(tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("raise ImportError('cannot import name runtime_version from google.protobuf')")
    (tmp_path / "x.safetensors").write_bytes(b"")
    code = "import sys; sys.path.insert(0, '.'); sys.modules.pop('onnx', None)"
    done = run("export", "x.safetensors", cwd=tmp_path, code=code)
    assert done.returncode == 7, done.stderr
    for text in ("onnx ", "cannot be imported with protobuf ", "runtime_version"):
        assert text in done.stderr.decode()


def test_a_package_that_the_command_line_itself_needs_is_named(tmp_path: Path) -> None:
    for module, arguments in (("rich.console", ["doctor"]), ("google.protobuf.message_factory", ["inspect", "x.onnx"])):
        (tmp_path / "x.onnx").write_bytes(b"x")
        done = run(*arguments, cwd=tmp_path, code=f"import sys; sys.modules['{module}'] = None")
        assert done.returncode == 7, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"cannot import a package" in done.stderr
        assert b"protobuf " in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("a surprise"), PermissionError(13, "no"), AssertionError()])
def test_a_bug_of_ours_leaves_a_file_and_asks_for_a_report(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_options: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli.commands["seal"], "callback", fail)
    assert main(["seal", "x.onnx", "--json"]) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert json.loads(printed.out)["error"]["exit_code"] == 1
    (written,) = tmp_path.glob("vit-edge-crash-*.txt")
    assert str(written) in printed.err
    text = written.read_text(encoding="utf-8")
    assert f"{type(error).__name__}" in text
    assert "vit-edge 'seal' 'x.onnx'" in text
    assert "numpy " in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_offers_closed_sets_of_values(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    assert "_VIT_EDGE_COMPLETE" in capsys.readouterr().out
    words = {"COMP_WORDS": "vit-edge completion ", "COMP_CWORD": "2"}
    if shell == "bash":
        done = run(cwd=tmp_path, _VIT_EDGE_COMPLETE="bash_complete", **words)
        assert {line.split(b",")[1] for line in done.stdout.split()} == {b"bash", b"zsh", b"fish"}


def test_help_shows_a_command_or_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "convert"]) == 0
    shown = capsys.readouterr().out
    assert main(["convert", "-h"]) == 0
    assert shown == capsys.readouterr().out
    assert main(["help", "frobnicate"]) == 2
    assert main(["help"]) == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_shows_every_value_of_a_closed_set(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "-h"]) == 0
    printed = capsys.readouterr().out
    for parameter in cli.commands[name].params:
        if isinstance(parameter.type, click.Choice):
            assert all(str(value) in printed for value in parameter.type.choices), parameter.name
    assert all(len(line) <= 80 for line in printed.partition("ptions:\n")[2].splitlines())


@pytest.mark.parametrize("width", [200, 60, 40])
def test_a_table_never_breaks_a_word(width: int) -> None:
    rows = [("a/path/model.int8.onnx", "onnxruntime", "int8", "1,234.5", "inconclusive") for _ in "ab"]
    table = make_table("Title", ("model", "engine", "precision", "images/s", "verdict"), rows)
    with open(os.devnull, "w", encoding="utf-8") as nothing:  # noqa: PTH123
        console = Console(width=width, file=nothing, record=True)
        console.print(table)
    text = console.export_text()
    assert all(word in text for row in rows for word in row)
    assert (text.count("precision") == 2) == (width < 100)
