"""Commands on a CPU without AVX-512 and VNNI, at native speed: the processor's answers are changed, not its work.

Neither engine has a switch that does. MLAS, the kernels of ONNX Runtime, has none. ONEDNN_MAX_CPU_ISA=AVX2 reaches
only what OpenVINO 2026.4 leaves to oneDNN: its own kernels stay AVX-512 (one digits network has both), and
at its default bfloat16 that network does not compile. So what the processor says of itself is masked, for all.
Run as `python -m tests.support.masked_cpu COMMAND...` it runs a command there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vit_edge.machine import cpu

__all__ = ["CannotMaskError", "build_mask", "masked_environment"]

_SOURCE = Path(__file__).with_name("cpu_without_avx512.c")
_NO_FAULTING = 77


class CannotMaskError(Exception):
    """The reason why this machine cannot pretend."""


def build_mask(folder: Path) -> Path:
    """Return the library to preload, compiled into `folder`; raises CannotMaskError with the reason."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotMaskError("CPUID is masked on x86-64 Linux only")
    if not cpu.instructions().names & {"avx512f", *cpu.VNNI}:
        raise CannotMaskError("this CPU has neither AVX-512 nor VNNI: it is of that class itself")
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise CannotMaskError("no C compiler: apt-get install gcc")
    library = folder / "cpu_without_avx512.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl"], check=True)
    tried = subprocess.run(["/bin/true"], env=masked_environment(library), capture_output=True, text=True, check=False)
    if tried.returncode == _NO_FAULTING:
        raise CannotMaskError(tried.stderr.strip())
    tried.check_returncode()
    return library


def masked_environment(library: Path) -> Mapping[str, str]:
    """Return this process's environment with the mask preloaded."""
    return {**os.environ, "LD_PRELOAD": str(library)}


def main(command: list[str]) -> int:
    """Run a command under the mask and return its exit code; on a CPU that cannot mask, 77 with the reason."""
    with tempfile.TemporaryDirectory(prefix="vit-edge.") as folder:
        try:
            library = build_mask(Path(folder))
        except CannotMaskError as error:
            sys.stderr.write(f"{error}\n")
            return _NO_FAULTING
        return subprocess.run(command, env=masked_environment(library), check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
