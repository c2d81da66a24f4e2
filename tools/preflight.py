"""Can this machine install the project? Checked before anything is downloaded, with the standard library only."""

import importlib.util
import shutil
import sys
from pathlib import Path

NEEDED_PYTHON = (3, 10)
# PyTorch as the package index gives it brings its CUDA libraries: 5.8 GB. The rest, and room for pip to unpack.
TORCH_GB = 5.8
NEEDED_GB = 8.0


def main() -> None:
    venv = Path(sys.argv[1])
    problems = []
    if sys.version_info < NEEDED_PYTHON:
        found = ".".join(str(part) for part in sys.version_info[:3])
        problems.append(f"Python {found} is too old; 3.10 or newer is needed: make PYTHON=python3.11 ...")
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        problems.append("Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv")
    existing = next(folder for folder in venv.absolute().parents if folder.is_dir())
    free_gb = shutil.disk_usage(existing).free / 1e9
    installed = any(venv.glob("lib/python3*/site-packages/torch"))
    if not installed and free_gb < NEEDED_GB:
        problems.append(
            f"{free_gb:.1f} GB of disk are free; {NEEDED_GB:.0f} GB are needed, {TORCH_GB} of them for PyTorch"
        )
    if problems:
        sys.exit("cannot set up:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if not installed:
        print(
            f"Installing into {venv}: PyTorch with its libraries takes {TORCH_GB} GB and about two minutes.", flush=True
        )


if __name__ == "__main__":
    main()
