"""What may be taken of a host's memory: limits of control groups, both versions and nested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from letheon.loaders.backends import memory
from letheon.loaders.backends.memory import free_bytes, group_rooms


def write(root: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")


def groups(root: Path, text: str) -> list[int]:
    (root / "self").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "GROUPS", root / "self")
        patch.setattr(memory, "MOUNT", root / "fs")
        return group_rooms()


def test_every_limit_above_the_process_counts(tmp_path: Path) -> None:
    """SLURM's way: a job with a limit, a step within it without one, a task with a smaller one."""
    write(
        tmp_path / "fs",
        {
            "job/memory.max": 1000, "job/memory.current": 700,
            "job/memory.stat": "anon 400\ninactive_file 100",
            "job/step/memory.max": "max", "job/step/memory.current": 600,
            "job/step/task/memory.max": 900, "job/step/task/memory.current": 650,
            "job/step/task/memory.stat": "inactive_file 0",
        },
    )  # fmt: skip
    assert groups(tmp_path, "0::/job/step/task\n") == [250, 400]
    assert groups(tmp_path, "0::/job/step\n") == [400]
    assert groups(tmp_path, "0::/other\n") == []


def test_a_container_sees_its_limit_at_the_top(tmp_path: Path) -> None:
    """Docker with version 1: the path is the host's, the mount is the container's own."""
    write(
        tmp_path / "fs" / "memory",
        {"memory.limit_in_bytes": 5000, "memory.usage_in_bytes": 6000,
         "memory.stat": "total_inactive_file 500\nrss 1"},
    )  # fmt: skip
    assert groups(tmp_path, "4:memory:/docker/abc\n3:cpuset:/\n0::/\n") == [0]
    (tmp_path / "fs" / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert groups(tmp_path, "4:memory:/docker/abc\n") == []


def test_free_memory_is_that_of_the_tightest_group(monkeypatch: pytest.MonkeyPatch) -> None:
    host = free_bytes(torch.device("cpu"))
    monkeypatch.setattr(memory, "group_rooms", lambda: [4096, 1 << 60])
    assert host > 4096 == free_bytes(torch.device("cpu"))
