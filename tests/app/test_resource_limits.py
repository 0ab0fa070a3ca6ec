"""The memory limit of control groups is read as the kernel applies it: the lowest of all groups above."""

from __future__ import annotations

from pathlib import Path

from router.app.resource_limits import cgroup_memory_bytes


def _group(root: Path, path: str, limit: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")


def test_the_lowest_limit_of_all_groups_above_holds(tmp_path: Path) -> None:
    own, root = tmp_path / "self", tmp_path / "cgroup"
    own.write_text("0::/system.slice/llamayard.service\n")
    _group(root, "system.slice", "8000000000")
    _group(root, "system.slice/llamayard.service", "max")
    assert cgroup_memory_bytes(own, root) == 8_000_000_000
    _group(root, "system.slice/llamayard.service", "4000000000")
    assert cgroup_memory_bytes(own, root) == 4_000_000_000


def test_without_a_limit_or_a_group_there_is_none(tmp_path: Path) -> None:
    own, root = tmp_path / "self", tmp_path / "cgroup"
    assert cgroup_memory_bytes(own, root) is None
    own.write_text("1:cpu:/x\n")
    assert cgroup_memory_bytes(own, root) is None
    own.write_text("0::/x\n")
    _group(root, "x", "max")
    assert cgroup_memory_bytes(own, root) is None
