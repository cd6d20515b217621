"""Memory and CPUs of a container, read from made-up control groups."""

from pathlib import Path

import psutil
import pytest

from polytower import cluster
from polytower.machine import cpus, memory_bytes

HALF = 512 << 20


def group(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root folder with these files below sys/fs/cgroup, for a process in these groups."""
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/", {"memory.max": str(HALF), "cpu.max": "100000 100000"}),
        ("0::/a/b", {"a/memory.max": str(HALF), "a/b/memory.max": "max", "a/b/cpu.max": "150000 100000"}),
        ("0::/../elsewhere", {"memory.max": str(HALF), "cpu.max": "50000 100000"}),
        (
            "3:memory:/docker/x\n4:cpu:/docker/x",
            {
                "memory/docker/x/memory.limit_in_bytes": str(HALF),
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu/cpu.cfs_quota_us": "100000",
                "cpu/cpu.cfs_period_us": "100000",
            },
        ),
    ],
    ids=["container", "nested", "outside", "version 1"],
)
def test_the_group_decides(tmp_path: Path, cgroup: str, files: dict[str, str]) -> None:
    root = group(tmp_path, cgroup, files)
    assert memory_bytes(root) == HALF
    assert cpus(root) == 1


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert cpus(tmp_path) >= 1
    root = group(tmp_path, "0::/", {"memory.max": "max", "cpu.max": "max 100000"})
    assert memory_bytes(root) == psutil.virtual_memory().total


def test_a_small_container_gets_a_small_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "memory_bytes", lambda: HALF)
    monkeypatch.setattr(cluster, "cpus", lambda: 1)
    assert cluster.sizes() == {"buffers": 64, "maintenance": 64, "work": 4, "workers": 0, "maintainers": 0}
