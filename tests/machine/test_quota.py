"""Threads are those that the container, or the service, grants: not what the host has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vit_edge.machine import cpu
from vit_edge.machine.cpu import usable_threads
from vit_edge.runtime.engines.protocol import EngineOptions

CASES: dict[str, tuple[str, dict[str, str], int]] = {
    "no quota": ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "a container": ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "less than one CPU": ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "a service, CPUQuota= of systemd": (
        "0::/system.slice/vit-edge.service\n",
        {
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/vit-edge.service/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "a slice above it grants less": (
        "0::/system.slice/vit-edge.service\n",
        {
            "sys/fs/cgroup/system.slice/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/system.slice/vit-edge.service/cpu.max": "300000 100000\n",
        },
        2,
    ),
    "version 1, its path that of the host": (
        "4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n",
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without a quota": (
        "1:cpu:/\n",
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        16,
    ),
    "outside of its own tree": ("0::/../other\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
    "nothing to read": ("", {}, 16),
    "nonsense": ("a\nb:c\n", {"sys/fs/cgroup/cpu.max": "many\n"}, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_the_least_quota_above_this_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    groups, files, threads = CASES[case]
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpu, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    assert usable_threads() == threads
    assert EngineOptions().num_threads == threads
    assert EngineOptions(threads=7).num_threads == 7
