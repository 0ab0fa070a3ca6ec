"""Free host memory, within the limit of a container."""

from __future__ import annotations

from pathlib import Path

import psutil

from router.gpu.host_memory import host_free_bytes


def _cgroup(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text("3000\n")
    (folder / "memory.stat").write_text("anon 1500\ninactive_file 900\nactive_file 600\nslab 1\n")
    return folder


def test_the_page_cache_of_a_container_with_a_limit_counts_as_free(tmp_path: Path) -> None:
    assert host_free_bytes(_cgroup(tmp_path, "10000")) == 10_000 - 3_000 + 1_500


def test_without_a_limit_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    for folder in (tmp_path, _cgroup(tmp_path, "max")):
        found = host_free_bytes(folder)
        assert found is not None
        assert 0 < found <= total


def test_an_unreadable_limit_leaves_it_unknown(tmp_path: Path) -> None:
    (_cgroup(tmp_path, "10000") / "memory.current").write_text("what?")
    assert host_free_bytes(tmp_path) is None
