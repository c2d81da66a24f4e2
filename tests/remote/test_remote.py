"""Commands on other machines, over a real SSH server on loopback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Workspace, vit_edge
from tests.support.ssh_devices import SshDevice, start_device, stop_device
from vit_edge.machine.targets import resolve_target
from vit_edge.remote import agent
from vit_edge.remote.package import ENGINES, NEEDED, build_wheel


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    """A device that has all that this Python has."""
    found = start_device(tmp_path_factory.mktemp("device"))
    yield found
    stop_device(found)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    """Another one."""
    found = start_device(tmp_path_factory.mktemp("second"))
    yield found
    stop_device(found)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package but pip."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def both(device: SshDevice, second: SshDevice, tmp_path: Path) -> Path:
    """A list of both devices, each with the key of its own server known."""
    shutil.copy(device.folder / "known", tmp_path / "known")
    (tmp_path / "known").write_text((device.folder / "known").read_text() + (second.folder / "known").read_text())
    users = f"  IdentityFile {device.folder}/user\n  IdentityFile {second.folder}/user\n"
    (device.folder / "config_both").write_text(f"Host *\n{users}  UserKnownHostsFile {tmp_path}/known\n")
    path = tmp_path / "devices.toml"
    path.write_text(
        f'[[device]]\nname = "kitchen"\naddress = "{device.address}"\npython = "{sys.executable}"\ntags = ["indoor"]\n'
        f'[[device]]\nname = "garden"\naddress = "{second.address}"\npython = "{sys.executable}"\n'
        'engine = "onnxruntime"\ntarget = "portable"\n'
    )
    return path


def assert_one_line(done: subprocess.CompletedProcess[str], *texts: str, code: int = 7) -> None:
    """One line says what is wrong, and nothing of it is a traceback."""
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :]  # with its second line, what to do
    for text in texts:
        assert text in error


def test_a_device_classifies_as_this_machine_does(device: SshDevice, workspace: Workspace) -> None:
    image = workspace.folder / "image.png"
    here = json.loads(vit_edge("classify", workspace.int8_model, image, "--json").stdout)
    done = device.vit_edge("classify", workspace.int8_model, image, "--json")
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert there["images"][0]["answers"] == here["images"][0]["answers"]
    assert there["images"][0]["file"] == str(image)
    assert there["model"]["sha256"] == here["model"]["sha256"]
    assert there["model"]["verified"] == "full"  # the golden vectors ran on the device
    assert there["devices"][0]["on"] == device.address
    assert not there["devices"][0]["emulated"]
    assert device.left_behind() == []


def test_file_names_that_a_shell_would_take_for_more_arrive(
    device: SshDevice, workspace: Workspace, tmp_path: Path
) -> None:
    folder = tmp_path / 'it\'s; touch $(echo pwned) `x` "q" & *'
    folder.mkdir()
    model, image = folder / "my model's.onnx", folder / "-pic ture\u00e9.png"
    shutil.copy(workspace.int8_model, model)
    shutil.copy(workspace.folder / "image.png", image)
    done = device.vit_edge("classify", model, image, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"][0]["file"] == str(image)
    assert not list(tmp_path.rglob("pwned"))
    assert device.left_behind() == []


def test_a_image_that_cannot_be_used_is_named_as_it_is_here(
    device: SshDevice, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    done = device.vit_edge(
        "classify", workspace.int8_model, workspace.folder / "image.png", tmp_path / "broken.png", "--json"
    )
    assert_one_line(done, str(tmp_path / "broken.png"), code=3)
    printed = json.loads(done.stdout)
    assert [image["label"] for image in printed["images"]] == ["3"]
    assert printed["rejected"][0]["file"] == str(tmp_path / "broken.png")


def test_what_doctor_says_of_a_device_is_what_a_target_is_chosen_from(device: SshDevice, tmp_path: Path) -> None:
    done = device.vit_edge("doctor", "--json")
    assert done.returncode == 0, done.stderr
    (tmp_path / "device.json").write_text(done.stdout)
    assert resolve_target(tmp_path / "device.json").target.name == json.loads(done.stdout)["target"]["name"]
    assert device.address in device.vit_edge("doctor").stdout


def test_two_devices_are_measured_in_one_table(device: SshDevice, both: Path, workspace: Workspace) -> None:
    common = ("benchmark", workspace.int8_model, "--devices", both, "--min-seconds", "0.2", "--min-queries", "10")
    done = device.vit_edge(*common, "--engine", "onnxruntime", on=False, config="config_both")
    assert done.returncode == 0, done.stderr
    assert "kitchen" in done.stdout
    assert "garden" in done.stdout
    done = device.vit_edge(*common, "--json", on=False, config="config_both")
    printed = json.loads(done.stdout)
    engines = [(entry["device_name"], entry["engine"]) for entry in printed["results"]]
    # The garden's engine is told in the list, the kitchen measures all that it has.
    assert engines == [("kitchen", "onnxruntime"), ("kitchen", "openvino"), ("garden", "onnxruntime")]
    assert {entry["model"] for entry in printed["results"]} == {str(workspace.int8_model)}
    assert device.left_behind() == []


def test_a_tag_chooses_devices(device: SshDevice, both: Path) -> None:
    chosen = ("doctor", "--json", "--devices", both, "--tag")
    done = device.vit_edge(*chosen, "indoor", on=False, config="config_both")
    assert [entry["device"] for entry in json.loads(done.stdout)["devices"]] == ["kitchen"]
    assert_one_line(device.vit_edge(*chosen, "attic", on=False), "attic", code=2)


def test_a_device_that_is_cut_off_is_one_line_and_the_others_results_are_kept(
    device: SshDevice, second: SshDevice, both: Path, workspace: Workspace
) -> None:
    process = device.start(
        "benchmark", workspace.int8_model, "--engine", "onnxruntime", "--min-seconds", "12", "--json",
        "--devices", both, on=False, config="config_both",
    )  # fmt: skip
    wait_for_command(second)
    second.cut_off()
    printed, told = process.communicate(timeout=120)
    done = subprocess.CompletedProcess([], process.returncode, printed, told)
    assert_one_line(done, "garden", "the connection was lost")
    assert [entry["device_name"] for entry in json.loads(printed)["results"]] == ["kitchen"]
    # Nobody cleaned up but the device itself.
    assert second.left_behind() == []
    assert device.left_behind() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_here_leaves_nothing_there(
    device: SshDevice, workspace: Workspace, number: signal.Signals
) -> None:
    process = device.start("benchmark", workspace.int8_model, "--engine", "onnxruntime", "--min-seconds", "60")
    wait_for_command(device)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number is signal.SIGINT else -number)
    assert device.left_behind() == []


def wait_for_command(device: SshDevice) -> None:
    """Wait until our package lies on the device and a command of it has started."""
    for _ in range(300):
        if list(device.temp.glob("*/package/vit_edge")):
            time.sleep(1)
            return
        time.sleep(0.1)
    raise AssertionError("nothing was copied to the device")


def test_a_folder_of_a_run_whose_device_lost_power_is_removed_by_the_next(device: SshDevice) -> None:

    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = device.temp / f"{agent.PREFIX}dead"
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps({"pid": dead.pid, "started": 0}))
    other = device.temp / "somebody-elses"
    other.mkdir()
    assert device.vit_edge("doctor", "--json").returncode == 0
    assert not folder.exists()
    assert other.exists()
    other.rmdir()


def test_a_device_that_cannot_be_reached_is_one_line(device: SshDevice, workspace: Workspace) -> None:
    common = ("classify", workspace.int8_model, workspace.folder / "image.png")
    assert_one_line(device.vit_edge(*common, config="config_wrong"), "Host key verification failed", "ssh-keygen")
    refused = ("--on", "ssh://127.0.0.1:1")
    assert_one_line(device.vit_edge(*common, *refused, on=False), "Connection refused", "ssh://127.0.0.1:1")
    stranger = ("--on", device.address.replace("ssh://", "ssh://no-such-user@"))
    assert_one_line(device.vit_edge(*common, *stranger, on=False), "Permission denied", "ssh-copy-id")


def test_a_device_without_python_or_engine_is_one_line(
    device: SshDevice, workspace: Workspace, bare_python: Path, tmp_path: Path
) -> None:
    common = ("classify", workspace.int8_model, workspace.folder / "image.png")
    assert_one_line(device.vit_edge(*common, python="no-such-python"), "there is no no-such-python there")
    assert_one_line(device.vit_edge(*common, python=bare_python), "numpy", "onnxruntime or openvino", "--install")
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 'vit-edge: Python 3.7.3' >&2\nexit 1\n")
    old.chmod(0o755)
    assert_one_line(device.vit_edge(*common, python=old), "Python 3.7.3", "3.10")
    assert device.left_behind() == []


@pytest.mark.parametrize(
    "address",
    ["ssh://-oProxyCommand=touch x", "ssh://a b", "http://host", "ssh://host/path", "ssh://u:secret@host", "pi"],
)
def test_an_address_that_is_none_is_refused(address: str, workspace: Workspace) -> None:
    done = vit_edge("doctor", "--on", address)
    assert_one_line(done, "ssh://user@host:port", code=2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("device = 3", "[[device]]"),
        ('[[device]]\nname = "a"', "no address"),
        ('[[device]]\nname = "a"\naddress = "ssh://a"\nport = 3', "'port'"),
        ('[[device]]\nname = "a"\naddress = "ssh://a"\nengine = "tflite"', "tflite"),
        ('[[device]]\nname = "a"\naddress = "ssh://a"\n[[device]]\nname = "a"\naddress = "ssh://b"', "same name"),
        ("[[", "devices.toml"),
        ("", "names no device"),
    ],
)
def test_a_list_of_devices_that_is_wrong_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "devices.toml").write_text(text)
    assert_one_line(vit_edge("doctor", "--devices", tmp_path / "devices.toml"), reason, code=2)


def test_options_for_devices_without_a_device_are_refused() -> None:
    assert_one_line(vit_edge("doctor", "--install"), "--on", code=2)


def test_a_wheel_of_the_installed_package_is_the_same_twice_and_whole(tmp_path: Path) -> None:
    first = build_wheel()
    assert build_wheel() == first
    archive = zipfile.ZipFile(BytesIO(first))
    names = archive.namelist()
    sources = {f"vit_edge/{path.relative_to(ROOT / 'vit_edge')}" for path in (ROOT / "vit_edge").rglob("*.py")}
    sources |= {
        f"vit_edge/{path.relative_to(ROOT)}" for top in ("export", "runtime") for path in (ROOT / top).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert len(names) == len(set(names))
    (tmp_path / "vit_edge-0.1.0-py3-none-any.whl").write_bytes(first)


def test_what_the_wheel_needs_is_what_the_package_needs() -> None:
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert [line for line in config["options"]["install_requires"].splitlines() if line] == list(NEEDED)
    for engine, requirement in ENGINES.items():
        assert config["options.extras_require"][engine].split() == [requirement]


def test_an_engine_is_installed_there_from_wheels_without_a_network(
    device: SshDevice, workspace: Workspace, bare_python: Path, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels of mine"
    wanted = [line for line in NEEDED if "tomli" not in line] + [ENGINES["onnxruntime"]]
    more = ["tomli>=2", "typing_extensions"] if sys.version_info < (3, 11) else []
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", str(wheels)]
    subprocess.run([*download, *wanted, *more], check=True, capture_output=True, timeout=600)
    image = workspace.folder / "image.png"
    common = ("classify", workspace.int8_model, image, "--json", "--wheels", wheels)
    done = device.vit_edge(*common, python=bare_python)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"][0]["label"] == "3"
    assert device.left_behind() == []
    for wheel in wheels.glob("onnxruntime*"):
        wheel.unlink()
    assert_one_line(device.vit_edge(*common, python=bare_python), "onnxruntime", "--wheels")
    assert device.left_behind() == []
    nothing: dict[str, Any] = {"python": bare_python}
    assert_one_line(device.vit_edge(*common[:-1], tmp_path / "none", **nothing), "no wheel", code=2)
