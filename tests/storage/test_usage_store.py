"""The database of usage: sums, bounds, failures, and a router that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from router.domain.usage import UsageRow, UsageTotals
from router.storage.usage_store import OTHER, UsageError, UsageStore, read_usage

DAY = "2026-03-01"
ONE = UsageTotals(1, 3, 10, 0.5, 0.25)


def _store(folder: Path, keep_days: int = 30) -> UsageStore:
    return UsageStore(folder / "usage.sqlite", keep_days)


def _rows(folder: Path, since: str = "0000-01-01") -> list[UsageRow]:
    return read_usage(folder / "usage.sqlite", since)


def test_what_is_added_is_summed_by_day_client_and_model_over_restarts(tmp_path: Path) -> None:
    for _ in range(2):
        store = _store(tmp_path)
        store.add(DAY, {("a", "tiny"): ONE, ("b", "tiny"): ONE})
        store.add("2026-03-02", {("a", "tiny"): ONE})
        store.close()
    two = UsageTotals(2, 6, 20, 1.0, 0.5)
    expected = [UsageRow(DAY, "a", "tiny", two), UsageRow(DAY, "b", "tiny", two),
                UsageRow("2026-03-02", "a", "tiny", two)]  # fmt: skip
    assert _rows(tmp_path) == expected
    assert _rows(tmp_path, "2026-03-02") == expected[2:]


def test_the_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.add(DAY, {("a", "tiny"): ONE})
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    store.close()


def test_days_that_are_too_old_are_dropped(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_days=2)
    for day in ("2026-02-27", "2026-02-28", DAY):
        store.add(day, {("a", "tiny"): ONE})
    assert [row.day for row in _rows(tmp_path)] == ["2026-02-28", DAY]
    store.close()


def test_the_clients_of_a_day_are_bounded_over_restarts(tmp_path: Path) -> None:
    for first in (0, 600):
        store = _store(tmp_path)
        store.add(DAY, {(f"c{number}", "tiny"): ONE for number in range(first, first + 600)})
        store.close()
    rows = {row.client: row.totals.requests for row in _rows(tmp_path)}
    assert len(rows) == 1001
    assert rows[OTHER] == 200
    store = _store(tmp_path)
    store.add("2026-03-02", {("c1199", "tiny"): ONE})
    assert [row.client for row in _rows(tmp_path, "2026-03-02")] == ["c1199"]
    store.close()


def test_what_cannot_be_written_is_kept_for_the_next_time(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.write_text("in the way", encoding="utf-8")
    store = _store(folder)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"Not a directory|File exists"):
            store.add(DAY, {("a", "tiny"): ONE})
    folder.unlink()
    store.add(DAY, {("a", "tiny"): ONE})
    assert [row.totals.requests for row in _rows(folder)] == [3]
    store.close()


def test_a_file_that_is_no_database_is_reported_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    path.write_bytes(b"x" * 4096)
    with pytest.raises(UsageError, match="not a database"):
        _store(tmp_path).add(DAY, {("a", "tiny"): ONE})
    with pytest.raises(UsageError, match="not a database"):
        _rows(tmp_path)
    assert path.read_bytes() == b"x" * 4096


def test_no_database_is_no_usage(tmp_path: Path) -> None:
    assert _rows(tmp_path) == []
    (tmp_path / "usage.sqlite").touch()
    assert _rows(tmp_path) == []


_WRITER = """
import os, signal, sys
from pathlib import Path
from router.domain.usage import UsageTotals
from router.storage.usage_store import UsageStore
store = UsageStore(Path(sys.argv[1]), 30)
for _ in range(5):
    store.add("2026-03-01", {("a", "tiny"): UsageTotals(1, 3, 10, 0.5, 0.25)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_survives_a_killed_router(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    killed = subprocess.run([sys.executable, "-c", _WRITER, path], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [row.totals.requests for row in _rows(tmp_path)] == [5]
    store = _store(tmp_path)
    store.add(DAY, {("a", "tiny"): ONE})
    assert [row.totals.requests for row in _rows(tmp_path)] == [6]
    store.close()
