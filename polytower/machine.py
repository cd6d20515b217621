"""How much memory and how many CPUs this process may use: what its control group allows, else the machine's."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")
# Version 1 says "no limit" with the largest multiple of a page.
_UNLIMITED = 1 << 60


def memory_bytes(root: Path = ROOT) -> int:
    """Bytes of memory: the least of the machine's and of what the groups above this process allow."""
    total: int = psutil.virtual_memory().total
    names = ("memory.max", "memory/memory.limit_in_bytes", "memory.limit_in_bytes")
    limits = (int(text) for text in _settings(root, names) if text.isdecimal())
    return min([total, *(limit for limit in limits if 0 < limit < _UNLIMITED)])


def cpus(root: Path = ROOT) -> int:
    """Whole CPUs, at least one: the least of what the scheduler and the groups above this process allow."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for text in _settings(root, ("cpu.max",)):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            allowed = min(allowed, int(quota) / int(period))
    quotas, periods = (list(_settings(root, (f"cpu/cpu.cfs_{name}_us",))) for name in ("quota", "period"))
    for quota, period in zip(quotas, periods, strict=False):
        if quota.isdecimal() and period.isdecimal():
            allowed = min(allowed, int(quota) / int(period))
    return max(1, int(allowed))


def _settings(root: Path, names: tuple[str, ...]) -> Iterator[str]:
    """The texts of these files in the process's group and in all groups above it, as far as they can be read."""
    mounted = root / "sys/fs/cgroup"
    for folder in _groups(root, mounted):
        for name in names:
            try:
                yield (folder / name).read_text().strip()
            except OSError:
                continue


def _groups(root: Path, mounted: Path) -> list[Path]:
    """Within a container the group's own path is often not visible: then its root is what limits us."""
    found = {mounted: None}
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return list(found)
    for line in lines:
        number, controllers, path = line.split(":", 2)
        below = mounted if number == "0" else mounted / controllers
        folder = below / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == mounted or mounted not in group.parents:
                break
            found[group] = None
    return list(found)
