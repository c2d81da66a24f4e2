"""Does an INT8 file answer on arm64 as it does here? Asked over SSH of an emulated device.

    make test-arm64                                  # as root: makes a portable file and asks
    make test-arm64 MODEL=model.int8.onnx            # asks of this one

An arm64 Debian is built with debootstrap and run by QEMU's user emulation, with the aarch64 wheels of numpy, Pillow,
protobuf and ONNX Runtime and an SSH server on loopback; everything of ours goes there by `--on ssh://`. Checked: golden
vectors pass there; top-1 is equal wherever the top-2 gap here exceeds 0.5; classify and benchmark work and are labelled
emulated; nothing is left behind. It mounts nothing outside a namespace of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from emulated_cpu import CLEAR_GAP, default_images, make_model, read_pixels, run

from vit_edge.data import find_images
from vit_edge.metrics import Logits, sqnr_db
from vit_edge.remote.answers import RemoteModel
from vit_edge.remote.device import Bundle, Device, Session, Setup
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import top2_gap

RELEASE, PYTHON = "bookworm", "3.11"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
PACKAGES = ("numpy", "Pillow", "protobuf", "onnxruntime")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# The header of an ELF file for AArch64, and which of its bits count; F: the emulator is opened now, not in the root.
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
SITE = "opt/site"


def main() -> None:
    """Build the device, ask it, and exit with 1 where it answers otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="INT8 model file  [default: one is made, portable]")
    parser.add_argument("--images", type=Path, help="folder of images  [default: photographs, else digits]")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--root", type=Path, help="a root to use again, or to build and keep")
    options = parser.parse_args()
    check_tools()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vit-edge-arm64-") as name, emulation():
        folder = Path(name)
        images = options.images or default_images(folder)
        model = options.model or make_model(folder, images)
        root = options.root or folder / "root"
        if not (root / SITE).exists():
            build_root(root)
        with ssh_server(root, folder) as address:
            failed = ask(model, images, options.count, address, folder)
            failed += [f"left behind: {path.name}" for path in (root / "tmp").glob("vit-edge-*")]
    print(f"{time.monotonic() - started:.0f} s in all")
    sys.exit("failed: " + "; ".join(failed) if failed else None)


def check_tools() -> None:
    """Exit with what to install where something is missing."""
    if os.geteuid() != 0:
        sys.exit("cannot build an arm64 root: debootstrap and chroot need root; run it with sudo")
    programs = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "ssh": "openssh-client"}
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if missing:
        sys.exit(f"cannot build an arm64 root: apt-get install {' '.join(missing)}")


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """Have the kernel run arm64 programs by QEMU, as long as this lasts where it did not before."""
    if not (BINFMT / "register").exists():
        run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)])
    if any("qemu-aarch64" in path.read_text() for path in BINFMT.iterdir() if path.name not in ("register", "status")):
        yield
        return
    entry = BINFMT / "vit-edge-aarch64"
    emulator = shutil.which("qemu-aarch64-static")
    (BINFMT / "register").write_text(f":{entry.name}:M::{MAGIC}:{MASK}:{emulator}:F")
    try:
        yield
    finally:
        entry.write_text("-1")


def mirror() -> str:
    """Return the Debian mirror that apt uses here."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL)|$(SITE)"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    sites = [line.partition("|")[2] for line in listed.stdout.splitlines() if line.startswith("Debian|")]
    if not sites:
        sys.exit("cannot build an arm64 root: apt names no Debian mirror here; run apt-get update on a Debian")
    return sites[0]


def build_root(root: Path) -> None:
    """Build an arm64 Debian with Python and an SSH server, and the wheels of the runtime next to it."""
    print("building an arm64 Debian: about three minutes", flush=True)
    wanted = "--include=python3,openssh-server,openssh-sftp-server"
    run(["debootstrap", "--arch=arm64", "--variant=minbase", wanted, RELEASE, str(root), mirror()])
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(root / SITE), *platforms]
    run([*pip, "--python-version", PYTHON, "--implementation", "cp", "--only-binary", ":all:", *PACKAGES])


@contextlib.contextmanager
def ssh_server(root: Path, folder: Path) -> Iterator[str]:
    """Start the root's SSH server on loopback with keys made for it; yields its address."""
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")])
    (root / "root" / "authorized").write_text((folder / "key.pub").read_text())
    (root / "run" / "sshd").mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "etc" / "ssh" / "vit_edge").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey /etc/ssh/ssh_host_ed25519_key\nAuthorizedKeysFile /root/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        f"Subsystem sftp /usr/lib/openssh/sftp-server\nSetEnv PYTHONPATH=/{SITE}\n"
    )
    public = " ".join((root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}\n")
    (folder / "config").write_text(f"Host *\n  IdentityFile {folder}/key\n  UserKnownHostsFile {folder}/known\n")
    os.environ["VIT_EDGE_SSH_CONFIG"] = str(folder / "config")
    # Not /sys: what cpuinfo reads there is this machine's, and under emulation ONNX Runtime crashes of it.
    inside = 'mount -t proc proc "$0/proc" && exec chroot "$0" /usr/sbin/sshd -D -e -f /etc/ssh/vit_edge'
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([*namespace, "sh", "-c", inside, str(root)], stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"ssh://root@127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def ask(model: Path, images: Path, count: int, address: str, folder: Path) -> list[str]:
    """Print what the device answers and what this machine does; returns what is wrong."""
    images_NHWC = read_pixels(model, images, count)
    with load(model, engine="onnxruntime") as classifier:
        here_BK = np.concatenate([classifier.logits(image[None]) for image in images_NHWC])
    failed = compare(here_BK, answers_there(model, images_NHWC, address, folder))
    image_path = str(find_images(images)[0])
    fast = ["--min-seconds", "1", "--min-queries", "5", "--engine", "onnxruntime", "--no-peak"]
    for arguments in (["classify", str(model), image_path], ["benchmark", str(model), *fast]):
        command = [sys.executable, "-m", "vit_edge", *arguments, "--on", address]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
        if done.returncode:
            failed.append(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
            continue
        printed = json.loads(done.stdout)
        (device,) = printed["devices"]
        if device["machine"] != "aarch64" or not device["emulated"]:
            failed.append(f"{arguments[0]} was not labelled as emulated aarch64")
        if arguments[0] == "classify":
            best, verified = printed["images"][0]["label"], printed["model"]["verified"]
            print(f"classify: {best}; golden vectors: {verified}")
            failed += [] if verified == "full" else ["the golden vectors were not checked there"]
        else:
            print(f"benchmark: p50 {printed['results'][0]['latency_ms']['p50']:.1f} ms, emulated")
    return failed


def answers_there(model: Path, images_NHWC: np.ndarray, address: str, folder: Path) -> Logits:
    """Return the device's logits, one image at a time; loading checks the golden vectors there."""
    setup = Setup(seconds=600)
    bundle = Bundle.write(folder, {model: [("model.onnx", model)]}, setup)
    with Session(Device(address=address, name="arm64"), setup) as session:
        session.provide(bundle, engine="onnxruntime", needs_engine=True)
        with RemoteModel(session, bundle, model=model, engine="onnxruntime", threads=None, seconds=600) as there:
            print(f"golden vectors there: {there.described['verified']}, {there.described['instruction_set']}")
            return np.concatenate([there.logits(image[None]) for image in images_NHWC])


def compare(here_BK: Logits, there_BK: Logits) -> list[str]:
    """Print how both answer; returns what is wrong."""
    changed, clear = here_BK.argmax(axis=1) != there_BK.argmax(axis=1), top2_gap(here_BK) > CLEAR_GAP
    equal = " (bitwise equal)" if np.array_equal(here_BK, there_BK) else ""
    print(f"{len(here_BK)} images, SQNR {sqnr_db(here_BK, there_BK):.1f} dB{equal}")
    print(f"top-1 changed where the gap exceeds {CLEAR_GAP}: {int((changed & clear).sum())} of {int(clear.sum())}")
    print(f"top-1 changed elsewhere: {int((changed & ~clear).sum())} of {int((~clear).sum())}")
    return ["top-1 differs where the gap is clear"] if (changed & clear).any() else []


if __name__ == "__main__":
    main()
