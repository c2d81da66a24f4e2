"""Which ONNX Runtime release reads which file: the highest opset and IR version of each."""

from __future__ import annotations

import re

__all__ = ["OLDEST_RELEASE", "RELEASES", "highest_versions", "oldest_release"]

# (highest opset, highest IR version), each tried apart on the published wheels with one-node files: a release refuses
# a higher one. The opset is that of the onnx release it was built with, the IR version often is not.
RELEASES: dict[str, tuple[int, int]] = {
    "1.15": (19, 9),
    "1.16": (19, 9),
    "1.17": (20, 9),
    "1.18": (21, 10),
    "1.19": (21, 10),
    "1.20": (21, 10),
    "1.21": (22, 10),
    "1.22": (22, 10),
    "1.23": (23, 11),
    "1.24": (25, 13),
    "1.25": (26, 13),
    "1.26": (26, 13),
}
OLDEST_RELEASE = next(iter(RELEASES))


def highest_versions(release: str) -> tuple[int, int]:
    """Return the highest opset and IR version that `release` ("1.17" or "1.17.3") reads; raises ValueError.

    A release newer than the table reads what the newest in it does.
    """
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d{1,4})?", release)
    if not found:
        raise ValueError(f"{release!r} is not a release such as {OLDEST_RELEASE}")
    wanted = int(found[1]), int(found[2])
    known = [versions for name, versions in RELEASES.items() if _number(name) <= wanted]
    if not known:
        raise ValueError(
            f"ONNX Runtime {release} is older than {OLDEST_RELEASE}, the oldest that a file can be made for"
        )
    return known[-1]


def oldest_release(*, opset: int, ir_version: int) -> str | None:
    """Return the oldest release known to read a file of this opset and IR version; None where none is."""
    fitting = (name for name, (most, ir) in RELEASES.items() if opset <= most and ir_version <= ir)
    return next(fitting, None)


def _number(release: str) -> tuple[int, int]:
    major, minor = release.split(".")
    return int(major), int(minor)
