"""Measured footprints survive a restart, and an unreadable file counts as empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.domain.footprint import FootprintKey, GpuFootprint, MeasuredFootprint
from router.domain.model import BlobDigest
from router.storage.footprint_store import FootprintStore

KEY = FootprintKey(BlobDigest("sha256:a"), 2, 8192, 2, "q8_0", "22,10", flash_attention=True, version="0.33")


def test_a_stored_footprint_is_read_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "state" / "footprints.json"
    first = FootprintStore(path)
    assert first.read() == ()
    first.remember(MeasuredFootprint(KEY, (10, 20)))
    first.remember(MeasuredFootprint(KEY, (11, 21)))
    assert FootprintStore(path).read() == (MeasuredFootprint(KEY, (11, 21)),)
    assert [entry.name for entry in path.parent.iterdir()] == ["footprints.json"]


@pytest.mark.parametrize("raw", [b"{broken", b'[{"\xff": 1}]', b"[" * 100_000])
def test_an_unreadable_file_counts_as_empty_and_is_replaced(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "footprints.json"
    path.write_bytes(raw)
    store = FootprintStore(path)
    assert store.read() == ()
    store.remember(MeasuredFootprint(KEY, (1, 2)))
    assert FootprintStore(path).read() == (MeasuredFootprint(KEY, (1, 2)),)


def test_write_errors_are_ignored(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    store = FootprintStore(blocked / "footprints.json")
    store.remember(MeasuredFootprint(KEY, (1, 2)))
    assert store.read() == ()


def test_an_older_file_with_fewer_key_fields_is_read_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "footprints.json"
    path.write_text('[[["sha256:a",2,8192,2,"q8_0"],[10,20]]]', encoding="utf-8")
    ((key, sizes, parts),) = FootprintStore(path).read()
    assert (key[:5], sizes, parts) == (KEY[:5], (10, 20), ())
    assert (key.split, key.flash_attention, key.version) == ("", None, "")


def test_parts_that_a_server_told_are_kept(tmp_path: Path) -> None:
    told = MeasuredFootprint(KEY, (30, 3), (GpuFootprint(10, 20), GpuFootprint(cuda_context_bytes=3)))
    FootprintStore(tmp_path / "footprints.json").remember(told)
    assert FootprintStore(tmp_path / "footprints.json").read() == (told,)
