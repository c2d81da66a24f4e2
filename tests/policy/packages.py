"""What an installation has to hold: every module and template of the tree, under its installed name."""

from __future__ import annotations

import configparser
from pathlib import Path

from tests.policy.ranks import modules

__all__ = ["expected_files", "listed_packages", "missing_packages"]

_DATA = (".html", ".md", ".typed")


def listed_packages(root: Path) -> set[str]:
    """Return the packages that setup.cfg lists."""
    settings = configparser.ConfigParser()
    settings.read(root / "setup.cfg", encoding="utf-8")
    return {*settings["options"]["packages"].split()}


def missing_packages(root: Path) -> dict[str, set[str]]:
    """Return the folders of code that setup.cfg does not list, and the packages that it lists and nobody wrote."""
    in_tree = {module.rpartition(".")[0] for module in modules(root)}
    listed = listed_packages(root)
    return {"not listed": in_tree - listed, "not there": listed - in_tree}


def expected_files(root: Path) -> set[str]:
    """Return the names in a wheel of every module and every file of data beside the modules."""
    found = set()
    for module, path in modules(root).items():
        folder = module.rpartition(".")[0].replace(".", "/")
        found |= {f"{folder}/{file.name}" for file in path.parent.iterdir() if file.suffix in {".py", *_DATA}}
    for source in ("runtime/bundle/web", "runtime/bundle/c"):  # what bundles copy as it is
        files = (file for file in (root / source).rglob("*") if file.is_file())
        found |= {f"vit_edge/{file.relative_to(root).as_posix()}" for file in files}
    return found
