"""Measured footprints outlive the program, and a broken file is as none."""

from __future__ import annotations

from pathlib import Path

from router.domain.footprint import FootprintKey
from router.domain.model import BlobDigest
from router.storage.footprint_store import FootprintStore

KEY = FootprintKey(BlobDigest("sha256:a"), 2, 8192, 2, "q8_0", "22,10", flash_attention=True, version="0.33")


def test_what_was_remembered_is_read_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "state" / "footprints.json"
    first = FootprintStore(path)
    assert first.read() == ()
    first.remember(KEY, (10, 20))
    first.remember(KEY, (11, 21))
    assert FootprintStore(path).read() == ((KEY, (11, 21)),)
    assert [found.name for found in path.parent.iterdir()] == ["footprints.json"]


def test_a_file_that_cannot_be_read_is_as_none_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "footprints.json"
    path.write_text("{broken", encoding="utf-8")
    file = FootprintStore(path)
    assert file.read() == ()
    file.remember(KEY, (1, 2))
    assert FootprintStore(path).read() == ((KEY, (1, 2)),)


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    file = FootprintStore(blocked / "footprints.json")
    file.remember(KEY, (1, 2))
    assert file.read() == ()


def test_what_was_kept_before_more_was_noted_is_read_and_is_of_no_server_that_tells_its_version(tmp_path: Path) -> None:
    path = tmp_path / "footprints.json"
    path.write_text('[[["sha256:a",2,8192,2,"q8_0"],[10,20]]]', encoding="utf-8")
    ((key, sizes),) = FootprintStore(path).read()
    assert (key[:5], sizes) == (KEY[:5], (10, 20))
    assert (key.split, key.flash_attention, key.version) == ("", None, "")
